"""Is the environment right, and can this model be compressed: answers without loading any weights."""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import MoaCompressError, ModelError, one_line
from moacompress.models.modules import module_problems
from moacompress.models.shape import config_shape
from moacompress.models.source import locate_source
from moacompress.models.support import config_problems, quantization_method, stored_problems
from moacompress.models.weight_files import gguf_problems, weight_problems

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PACKAGES = ("moacompress", "torch", "transformers", "optuna", "datasets", "safetensors", "numpy", "scipy")
EXTRAS = {"demo": "gguf", "offload": "accelerate"}
SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""torch's own variable; "0" keeps torch from calling the entry point that registers moacompress."""
AUTOLOAD_SECONDS = 120
_PROBE = """
import sys
import transformers.modeling_utils
transformers.modeling_utils.PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("registered" if "moacompress" in AUTO_QUANTIZER_MAPPING else "missing")
"""


def check_environment() -> dict[str, Any]:
    """Returns what moacompress runs on, and under `problems` what is wrong with it."""
    autoload = _check_autoload()
    problems = [f"{name} is not installed" for name in PACKAGES if _version(name) is None]
    if not autoload["registered"]:
        problems.append(f"from_pretrained would not see compressed checkpoints: {autoload['reason']}")
    kernel = _kernel()
    if kernel["name"] is None:
        problems.append(str(kernel["reason"]))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": {"name": _cpu_name(), "cores": _cores()},
        "gpus": _gpus(),
        "kernel": kernel,
        "autoload": autoload,
        "extras": {name: importlib.util.find_spec(module) is not None for name, module in EXTRAS.items()},
        "problems": problems,
    }


def check_model(source: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Returns what can be said of MODEL without its weights, and under `problems` what in it is not supported.

    Args:
        source: hub id, folder or `.gguf` file.
        trust_remote_code: run modelling code that comes with the model.
    """
    facts: dict[str, Any] = dict.fromkeys(
        ("model_type", "layers", "heads", "kv_heads", "head_dim", "sliding_layers", "context")
    )
    facts |= {"source": source, "compressed": False, "problems": []}
    try:
        config = _load_config(source, trust_remote_code)
        facts["model_type"] = config.model_type
        facts["context"] = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        facts["compressed"] = quantization_method(config) == "moacompress"
        found = config_problems(config)
        # what the modules tell is told by the config already, and an unsupported model may not even build
        facts["problems"] = [*stored_problems(config), *(found or _skeleton_problems(config, trust_remote_code))]
        facts["problems"] += _file_problems(source)
        shape = config_shape(config, dtype="float32")
        facts |= {name: getattr(shape, name) for name in ("layers", "heads", "kv_heads", "head_dim")}
        facts["sliding_layers"] = sum(window is not None for window in shape.native_windows)
        if facts["compressed"]:
            _check_plan(Path(source), config)
    except MoaCompressError as error:
        if not (facts["problems"] and isinstance(error, ModelError)):  # then the shape has no more to say
            facts["problems"].append(str(error))
    return facts


def _file_problems(source: str) -> list[str]:
    path = Path(source)
    if path.is_dir():
        return weight_problems(path)
    return gguf_problems(path) if path.is_file() else []


def _load_config(source: str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import AutoConfig

    name, arguments = locate_source(source)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **arguments)
        return config
    except ImportError as error:
        raise ModelError(f"{source} needs a package that is not installed: {error}") from error
    except Exception as error:  # damaged files raise whatever their parsers raise
        raise ModelError(f"{source} is not a model that transformers knows: {one_line(error)}") from error


def _skeleton_problems(config: PreTrainedConfig, trust_remote_code: bool) -> list[str]:
    """Returns `module_problems` of the model without memory for its weights.

    Raises:
        ModelError: transformers has no causal language model for this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the skeleton has no weights to be quantized
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that contradicts itself raises whatever the modules raise
        raise ModelError(f"{config.model_type} is not a causal language model: {one_line(error)}") from error
    return module_problems(model)


def _check_plan(folder: Path, config: PreTrainedConfig) -> None:
    from moacompress.rules.plan import Plan

    plan = Plan.load(folder / PLAN_FILE)
    plan.check_model(config_shape(config, dtype=plan.model.dtype), weights=None)


def _check_autoload() -> dict[str, Any]:
    """Asks a fresh process that imports nothing but transformers."""
    if os.environ.get(SWITCH) == "0":
        return {
            "registered": False,
            "switch": "0",
            "reason": f"{SWITCH}=0 turns it off; unset it, or import moacompress",
        }
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=AUTOLOAD_SECONDS, check=False
        )
        said = done.stdout.strip().splitlines()[-1:] == ["registered"]
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "the entry point is not installed; `pip install` moacompress"
    except (OSError, subprocess.SubprocessError) as error:
        said, reason = False, str(error)
    return {"registered": said, "switch": os.environ.get(SWITCH), "reason": None if said else reason}


def _kernel() -> dict[str, str | None]:
    """Returns the attention kernel that will run on the CPU, its instruction set, and why; without a name if none can run."""
    try:
        from moacompress.kernels import cpu_ops, dispatch

        choice = dispatch.choose(os.environ.get(dispatch.VARIABLE), cpu_ops.load())
    except (MoaCompressError, ImportError) as error:
        return {"name": None, "isa": None, "reason": one_line(error)}
    return {"name": choice.name, "isa": choice.isa, "reason": choice.reason}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        import torch

        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError):
        return []
