"""Checks of the environment, of a model to compress and of a compressed checkpoint, without loading weights."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import ArtefactError, MoaCompressError, ModelError, one_line
from moacompress.core.machine import processor_name
from moacompress.models.modules import module_problems, needed_weights
from moacompress.models.shape import config_shape
from moacompress.models.skeleton import load_config, make_skeleton
from moacompress.models.source import GGUF_PACKAGES, find_model_folder, locate_source
from moacompress.models.stored_plan import plan_file_problem
from moacompress.models.support import TORCHAO, config_problems, is_tested, quantization_method, stored_problems
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.models.weight_files import (
    check_weights,
    checkpoint_files,
    gguf_problems,
    missing_weights,
    tokenizer_problems,
    weight_problems,
)
from moacompress.rules.plan import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from moacompress.runtime.hf.config import MoaCompressConfig

PACKAGES = ("moacompress", "torch", "transformers", "optuna", "datasets", "safetensors", "numpy", "scipy")
EXTRAS = {
    "demo": (*GGUF_PACKAGES, "jinja2", "plotly"),
    "eval": ("accelerate", "lm_eval"),
    "heal": ("accelerate", "peft"),
    "offload": ("accelerate",),
    "postgresql": ("psycopg",),
    "report": ("jinja2", "kaleido", "plotly"),
    "rivals": ("hqq", "optimum.quanto"),
    "torchao": ("torchao",),
    "vllm": ("vllm",),
}
"""Modules that each extra brings; those for work on moacompress itself are left out."""
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
    kernel, gpus = _kernel(), _gpus()
    if kernel["name"] is None:
        problems.append(str(kernel["reason"]))
    names, broken = _private_names()
    problems += broken
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "transformers": _transformers(),
        "cpu": {"name": processor_name(), "cores": cores},
        "gpus": gpus,
        "kernel": kernel,
        "gpu_kernel": _gpu_kernel(gpus),
        "autoload": autoload,
        "private_names": names,
        "extras": {name: all(map(_is_there, modules)) for name, modules in EXTRAS.items()},
        "problems": problems,
    }


def check_model(
    source: str, *, trust_remote_code: bool = False, environment: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns what can be said of MODEL without its weights, and under `problems` what in it is not supported or damaged.

    MODEL is a hub id, a folder, a `.gguf` file, or the folder of a run that holds a checkpoint as `model/`. Of a compressed
    checkpoint `checkpoint` says what is in it and whether it would load in the `environment` (by default this one).
    """
    found_at = find_model_folder(Path(source))
    if found_at is not None and found_at != Path(source):
        source = str(found_at)
    facts: dict[str, Any] = dict.fromkeys(
        ("model_type", "layers", "heads", "kv_heads", "head_dim", "sliding_layers", "context")
    )
    facts |= {"source": source, "compressed": False, "tested": None, "checkpoint": None, "problems": []}
    try:
        config = load_config(source, trust_remote_code)
        facts["model_type"] = config.model_type
        facts["tested"] = is_tested(config)
        facts["context"] = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if quantization_method(config) == "moacompress":
            facts["compressed"] = True
            folder = Path(source) if Path(source).is_dir() else None
            checked = _Checkpoint(config, folder, trust_remote_code)
            facts["checkpoint"] = checked.facts(check_environment() if environment is None else environment)
            facts["problems"] = checked.problems
        else:
            facts["problems"] = _dense_problems(source, config, trust_remote_code)
        shape = config_shape(config, dtype="float32")
        facts |= {name: getattr(shape, name) for name in ("layers", "heads", "kv_heads", "head_dim")}
        facts["sliding_layers"] = sum(window is not None for window in shape.native_windows)
    except MoaCompressError as error:
        if not (facts["problems"] and isinstance(error, ModelError)):  # then the shape has no more to say
            facts["problems"].append(str(error))
    return facts


class _Checkpoint:
    """What is in a compressed checkpoint, and what is wrong with it; on the hub (no folder) only its config is looked at."""

    def __init__(self, config: PreTrainedConfig, folder: Path | None, trust_remote_code: bool) -> None:
        self.plan: Plan | None = None  # that would run, if it can be read
        self.weights: dict[str, str] = {}  # layers whose weights are in blocks, with the types
        self.files: list[Path] = []  # of its weights
        self.bytes_by_type: dict[str, int] = {}
        self.stopping: list[str] = []  # what keeps `from_pretrained` from loading it, one sentence each
        self._beside: list[str] = []
        with self._noting():
            stored = _stored(config)
            self.plan, self.weights = stored.plan, stored.weights
            self.plan.check_model(config_shape(config, dtype=self.plan.model.dtype), weights=False)
        with self._noting():
            self._check_model(config, folder, trust_remote_code)
        self.problems = [*self.stopping, *self._beside, *self._plan_file_problems(folder)]

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except MoaCompressError as error:
            self.stopping.append(str(error))

    def _check_model(self, config: PreTrainedConfig, folder: Path | None, trust_remote_code: bool) -> None:
        found = config_problems(config)
        if found:
            self.stopping += found
            return
        skeleton = make_skeleton(config, trust_remote_code)
        self.stopping += module_problems(skeleton)
        from moacompress.models.block_layers import block_weights, put_block_layers

        put_block_layers(skeleton, self.weights)
        if folder is None:
            return
        blocks = block_weights(skeleton)
        self.stopping += weight_problems(folder, blocks)
        if not self.stopping:
            self.files, self.bytes_by_type = checkpoint_files(folder), checkpoint_weight_bytes(folder)
            self.stopping += _lost_weights(skeleton, self.files, "export the model again", blocks)
            self._beside = _tokenizer_problems(folder, trust_remote_code)

    def _plan_file_problems(self, folder: Path | None) -> list[str]:
        if folder is None or self.plan is None or not (folder / PLAN_FILE).is_file():
            return []
        try:
            problem = plan_file_problem(folder, Plan.load(folder / PLAN_FILE), self.plan)
        except MoaCompressError as error:
            return [str(error)]
        return [] if problem is None else [problem]

    def facts(self, environment: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is in the checkpoint, and whether and how it would run in an environment."""
        plan = self.plan
        facts: dict[str, Any] = dict.fromkeys(
            ("made_from", "plan", "dtype", "weights_fingerprint", "budget", "kv_bytes", "kv_share", "kernel")
        )
        if plan is not None:
            lengths = plan.stated_lengths
            facts |= {
                "made_from": plan.provenance.get("source"),
                "plan": plan.key(),
                "dtype": plan.model.dtype,
                "weights_fingerprint": plan.model.weights_fingerprint,
                "budget": list(plan.budget.get("asked", [])),
                "kv_bytes": plan.kv_bytes_by_length(lengths),
                "kv_share": {str(n): plan.kv_share(n) for n in lengths},
                "kernel": _kernel_for(plan.model.dtype) if environment["kernel"]["name"] else None,
            }
        facts["weight_files"] = [file.name for file in self.files]
        facts["weight_bytes"] = sum(file.stat().st_size for file in self.files)
        facts["weight_types"] = self.bytes_by_type
        facts["blocks_read_as_they_lie"] = _reads_blocks(plan) if plan is not None and self.weights else None
        facts["loads"] = not self.stopping and bool(environment["autoload"]["registered"])
        return facts


def _dense_problems(source: str, config: PreTrainedConfig, trust_remote_code: bool) -> list[str]:
    """Returns what is wrong with a dense model; where its files are here and nothing else is, also what is missing of them."""
    found = config_problems(config)
    skeleton = None
    if not found:  # what the modules tell is told by the config already, and an unsupported model may not even build
        skeleton = make_skeleton(config, trust_remote_code)
        found = module_problems(skeleton)
    path, folder = Path(source), _files_of(source)
    in_files = weight_problems(path) if path.is_dir() else gguf_problems(path) if path.is_file() else []
    found = [*stored_problems(config), *found, *in_files]
    names_parts = quantization_method(config) == TORCHAO  # of weights
    if found or skeleton is None or folder is None or names_parts:
        return found
    try:
        fix = "copy the weights again from where the model is from"
        found += _lost_weights(skeleton, checkpoint_files(folder), fix)
    except ArtefactError as error:
        found.append(str(error))
    return [*found, *_tokenizer_problems(folder, trust_remote_code)]


def _lost_weights(skeleton: Any, files: list[Path], fix: str, blocks: Container[str] = ()) -> list[str]:
    """Returns which weights of a model its files lack, and what to do about that.

    Raises:
        ArtefactError: they have a weight of another shape.
    """
    expected = needed_weights(skeleton)
    check_weights(files, expected, blocks)
    lost = missing_weights(files, expected, getattr(skeleton, "all_tied_weights_keys", None) or {})
    return [] if lost is None else [f"{lost}; {fix}"]


def _files_of(source: str) -> Path | None:
    """Returns the folder that the files of a model lie in; None for a `.gguf` file, which has all in it, and on the hub."""
    name, arguments = locate_source(source)
    if "gguf_file" in arguments:
        return None
    if Path(name).is_dir():
        return Path(name)
    if not arguments.get("local_files_only"):
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return Path(cached).parent if isinstance(cached, str) else None


def _tokenizer_problems(folder: Path, trust_remote_code: bool) -> list[str]:
    """Returns why a model folder gives no tokenizer; it is loaded, and nothing is fetched."""
    from transformers import AutoTokenizer

    missing = [] if trust_remote_code else tokenizer_problems(folder)
    if missing:
        return missing
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise whatever their parsers raise
        return [f"the tokenizer in {folder} cannot be loaded: {one_line(error)}"]
    return []


def _reads_blocks(plan: Plan) -> bool:
    """Returns whether compiled kernels multiply with weights in blocks here, in the plan's dtype; else they are dequantized."""
    import torch

    from moacompress.kernels.dispatch import capabilities_for

    return capabilities_for(torch.empty(0, dtype=getattr(torch, plan.model.dtype))).linear_blocks


def _stored(config: PreTrainedConfig) -> MoaCompressConfig:
    """Returns plan and types of weights in a config, read as `from_pretrained` reads it.

    Raises:
        PlanError: they are malformed, or newer than is known.
    """
    from moacompress.runtime.hf.config import MoaCompressConfig

    found: Any = config.quantization_config
    return (
        found if isinstance(found, MoaCompressConfig) else cast(MoaCompressConfig, MoaCompressConfig.from_dict(found))
    )


def _check_autoload() -> dict[str, Any]:
    """Asks a fresh process that imports nothing but transformers."""
    if os.environ.get(SWITCH, "1") != "1":  # as torch reads it
        return {
            "registered": False,
            "switch": os.environ[SWITCH],
            "reason": f"{SWITCH}={os.environ[SWITCH]} turns it off; unset it, or import moacompress",
        }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, timeout=AUTOLOAD_SECONDS, check=False
        )
        said = done.stdout.strip().splitlines()[-1:] == ["registered"]
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else "the entry point is not installed; `pip install` moacompress"
    except (OSError, subprocess.SubprocessError) as error:
        said, reason = False, str(error)
    return {"registered": said, "switch": os.environ.get(SWITCH), "reason": None if said else reason}


def _transformers() -> dict[str, Any]:
    """Returns the version of transformers, the minors that are tested, and whether its own is one of them."""
    try:
        from moacompress.runtime.compat import versions
    except ImportError:
        return {"installed": _version("transformers"), "tested": [], "is_tested": False}
    here = versions.installed()
    return {"installed": here or None, "tested": list(versions.TESTED), "is_tested": versions.is_tested(here)}


def _private_names() -> tuple[dict[str, Any], list[str]]:
    """Returns how many private names of transformers and torch are looked for and which are broken; and that as sentences."""
    try:
        from moacompress.runtime.compat import private_names
    except ImportError as error:
        return {"packages": None, "listed": 0, "broken": []}, [one_line(error)]
    broken = private_names.check()
    facts = {
        "packages": private_names.installed(),
        "listed": len(private_names.NAMES),
        "broken": [asdict(found) for found in broken],
    }
    return facts, [*map(str, broken), *([private_names.remedy()] if broken else [])]


def _kernel() -> dict[str, str | None]:
    """Returns the attention kernel that will run on the CPU, its instruction set, and why; without a name if none can run."""
    try:
        from moacompress.kernels import dispatch

        choice = dispatch.choice_on_cpu(dispatch.choose(os.environ.get(dispatch.VARIABLE), dispatch.backends()))
    except (MoaCompressError, ImportError) as error:
        return {"name": None, "isa": None, "reason": one_line(error)}
    slow = f"; {dispatch.slower_on_cpu()}" if choice.name == dispatch.REFERENCE.name else ""
    return {"name": choice.name, "isa": choice.isa, "reason": choice.reason + slow}


def _gpu_kernel(gpus: Sequence[str]) -> str | None:
    """Returns which attention kernels would run on the GPUs, and what is known of their speed; None without a GPU."""
    if not gpus:
        return None
    try:
        import torch

        from moacompress.kernels import dispatch

        name = dispatch.backend_on("cuda", torch.bfloat16).name
        if name == dispatch.REFERENCE.name:
            return f"plain PyTorch: {dispatch.why_plain('cuda')}"
    except (MoaCompressError, ImportError) as error:
        return f"none: {one_line(error)}"
    return (
        f"{name} for attention, and for the gradients of prompts; those of cached and of selected tokens are plain PyTorch's; "
        "its speed on a GPU has not been measured"
    )


def _kernel_for(dtype: str) -> str:
    """Returns the attention kernel that will run on the CPU in this dtype."""
    import torch

    from moacompress.kernels.dispatch import backend_for

    return backend_for(torch.empty(0, dtype=getattr(torch, dtype))).name


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    try:
        import torch

        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (ImportError, RuntimeError):
        return []
