"""What `doctor` found, as rows of name and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group

from moacompress.core.tables import facts


def environment_table(data: Mapping[str, Any]) -> Group:
    """Returns the environment.

    Args:
        data: as `moacompress.doctor.checks.check_environment` returns it.
    """
    rows = {"python": f"{data['python']}, {data['platform']}"}
    rows |= {name: version or "not installed" for name, version in data["versions"].items()}
    rows["CPU"] = f"{data['cpu']['name']}, {data['cpu']['cores']} cores"
    rows["GPU"] = ", ".join(data["gpus"]) or "none"
    kernel = data["kernel"]
    named = f"{kernel['name']}, {kernel['isa']}" if kernel["isa"] else kernel["name"] or "none"
    rows["kernel"] = f"{named}: {kernel['reason']}"
    rows["autoload"] = "registers with transformers" if data["autoload"]["registered"] else "does not register"
    rows["extras"] = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in data["extras"].items())
    return facts("Environment", rows)


def model_table(data: Mapping[str, Any]) -> Group:
    """Returns what is known of a model.

    Args:
        data: as `moacompress.doctor.checks.check_model` returns it.
    """
    rows = {"model": data["source"], "family": data["model_type"] or "unknown"}
    if data["layers"] is not None:
        rows["attention"] = (
            f"{data['layers']} layers, {data['heads']} query heads, {data['kv_heads']} KV heads of {data['head_dim']}, "
            f"{data['sliding_layers']} layers with a window of their own"
        )
    if data["context"]:
        rows["context"] = f"{data['context']:,} tokens"
    if data["compressed"]:
        rows["state"] = "compressed already"
    rows["can be used"] = "no" if data["problems"] else "yes"
    return facts("Model", rows)
