"""What `doctor` found, as rows of name and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moacompress.core.tables import Table, facts, readable_bytes, readable_types
from moacompress.rules.budget import format_length


def environment_table(data: Mapping[str, Any]) -> Table:
    """Returns the environment, as `check_environment` finds it."""
    rows = {"python": f"{data['python']}, {data['platform']}"}
    rows |= {name: version or "not installed" for name, version in data["versions"].items()}
    found = data["transformers"]
    if found["installed"] and found["tested"]:
        span = f"{found['tested'][0]} to {found['tested'][-1]}"
        known = f"a tested version ({span})" if found["is_tested"] else f"not tested; {span} are"
        rows["transformers"] = f"{found['installed']}, {known}"
    rows["CPU"] = f"{data['cpu']['name']}, {data['cpu']['cores']} cores"
    rows["GPU"] = ", ".join(data["gpus"]) or "none"
    kernel = data["kernel"]
    named = f"{kernel['name']}, {kernel['isa']}" if kernel["isa"] else kernel["name"] or "none"
    rows["kernel"] = f"{named}: {kernel['reason']}"
    if data["gpu_kernel"]:
        rows["GPU kernel"] = data["gpu_kernel"]
    rows["autoload"] = "registers with transformers" if data["autoload"]["registered"] else "does not register"
    names = data["private_names"]
    lost = ", ".join(found["name"] for found in names["broken"])
    said = f"missing or changed: {lost}" if lost else f"all {names['listed']} private names are there"
    rows["internals"] = f"{names['packages']}: {said}" if names["packages"] else "transformers or torch is missing"
    rows["extras"] = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in data["extras"].items())
    return facts("Environment", rows)


def model_table(data: Mapping[str, Any]) -> Table:
    """Returns what is known of a model, as `check_model` finds it."""
    rows = {"model": data["source"], "family": data["model_type"] or "unknown"}
    if data["tested"] is not None:
        rows["tested"] = (
            "yes, this family is part of the test suite"
            if data["tested"]
            else "no, this family is not part of the test suite; compare with the dense model first (moacompress eval)"
        )
    if data["layers"] is not None:
        sliding = f", {data['sliding_layers']} layers with sliding windows" if data["sliding_layers"] else ""
        rows["attention"] = (
            f"{data['layers']} layers, {data['heads']} query heads, {data['kv_heads']} KV heads, head size {data['head_dim']}"
            f"{sliding}"
        )
    if data["context"]:
        rows["context"] = f"{data['context']:,} tokens"
    if data["compressed"]:
        rows["state"] = "compressed"
    else:
        rows["supported"] = "no" if data["problems"] else "yes"
    checkpoint = data["checkpoint"] if data["compressed"] else None
    return facts("Model", rows | (_checkpoint_rows(checkpoint) if checkpoint is not None else {}))


def _checkpoint_rows(data: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    if data["plan"] is not None:
        rows["made from"] = f"{data['made_from'] or 'not said'}, weights {data['weights_fingerprint']}"
        rows["plan"] = f"{data['plan']}, budget {', '.join(data['budget']) or 'none asked for'}"
        for length, sizes in data["kv_bytes"].items():
            rows[f"KV at {format_length(int(length))}"] = (
                f"{readable_bytes(sizes['plan'])} of {readable_bytes(sizes['dense'])}, {data['kv_share'][length]:.1%}"
            )
        rows["kernel"] = f"{data['kernel'] or 'none'}, for {data['dtype']}"
    files = len(data["weight_files"])
    if files:
        rows["weights"] = f"{readable_bytes(data['weight_bytes'])} in {files} file{'s' if files > 1 else ''}"
        if data["blocks_read_as_they_lie"] is not None:
            rows["types"] = readable_types(data["weight_types"])
            rows["products"] = (
                "read blocks as they lie; on a GPU a few rows are dequantized at a time, which is slow"
                if data["blocks_read_as_they_lie"]
                else "dequantize some rows of a weight at a time, which is slow: the compiled kernels do not run"
            )
    rows["loads here"] = "with from_pretrained" if data["loads"] else "no"
    return rows
