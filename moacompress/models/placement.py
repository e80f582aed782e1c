"""Where the parts of a model lie: on one device, or by a device map of accelerate on several, the host's memory and disk.

Where `--device` or `device=` names a device, a device map can stand that transformers' `from_pretrained` takes, or a JSON
file of one. Weights that a map offloads are on "meta" between the calls of their module: what reads weights asks here.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from moacompress.core.errors import ArtefactError, ModelError, UsageError, did_you_mean
from moacompress.core.files import read_json
from moacompress.core.ranks import splits_model, world_size
from moacompress.models.device import check_device
from moacompress.models.modules import attention_modules

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
"""Device maps that accelerate makes, by name."""
MAP_FILE = ".json"
"""Suffix of a file with a device map."""
ARGUMENTS = ("device_map", "max_memory", "offload_folder")
"""What a file may give of the arguments of `from_pretrained`; one without `device_map` is a map itself."""
DISK = "disk"
_MEMORY = re.compile(r"\d+(\.\d+)?\s*(B|[KMGT]i?B)", re.IGNORECASE)


def checked_placement(device: str) -> dict[str, Any]:
    """Returns `loading_arguments`, once it is known that the device, or those of the map, are here; empty for one device.

    Raises:
        UsageError: they are not.
    """
    if not is_device_map(device):
        check_device(device)
    return loading_arguments(device)


def is_device_map(device: str) -> bool:
    """Returns whether what is given for a device is a device map: accelerate's own, or a JSON file of one."""
    return device in AUTOMATIC or device.endswith(MAP_FILE)


def loading_arguments(device: str) -> dict[str, Any]:
    """Returns what `from_pretrained` is given so that a model lies where it was asked for; nothing for a single device.

    Where the processes of the run hold one model together, it is split as transformers does. A device map is one of `AUTOMATIC`
    or a file.

    Raises:
        UsageError: accelerate is not installed, the file is no device map, or `torchrun` started several processes.
    """
    if splits_model():
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    if not is_device_map(device):
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError(
            f"the device map {device} needs the package accelerate: `pip install 'moacompress[offload]'`; or give one device"
        )
    if world_size() > 1:
        raise UsageError(
            f"the device map {device} spreads a model over the devices of one process, and this is one of {world_size()}; "
            "start it without torchrun, or give --device cuda"
        )
    return {"device_map": device} if device in AUTOMATIC else _read(Path(device))


def _read(file: Path) -> dict[str, Any]:
    """Returns the arguments that a file has.

    Raises:
        UsageError: it is not there, no JSON, or no device map.
    """
    try:
        found = read_json(file, "device map")
    except ArtefactError as error:
        raise UsageError(
            f"{error}; give --device a device, {', '.join(AUTOMATIC)}, or a JSON file of a device map"
        ) from error
    arguments = found if isinstance(found, dict) and ARGUMENTS[0] in found else {ARGUMENTS[0]: found}
    for name in arguments:
        if name not in ARGUMENTS:
            raise UsageError(
                f"{file} has {name!r}, which is none of {', '.join(ARGUMENTS)}; {did_you_mean(name, ARGUMENTS, '')}"
            )
    _check_map(file, arguments[ARGUMENTS[0]])
    memory, folder = arguments.get("max_memory"), arguments.get("offload_folder")
    if memory is not None:
        arguments["max_memory"] = _memory(file, memory)
    if folder is not None and not isinstance(folder, str):
        raise UsageError(f"{file} has the offload_folder {folder!r}, which is no text; give the path of a folder")
    return dict(arguments)


def _check_map(file: Path, found: Any) -> None:
    if found in AUTOMATIC:
        return
    if not isinstance(found, dict) or not found:
        raise UsageError(
            f"{file} holds no device map: it is one of {', '.join(AUTOMATIC)}, or an object from names of modules to devices, "
            'such as {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "lm_head": "disk"}'
        )
    for name, device in found.items():
        if isinstance(device, bool) or not isinstance(device, int | str):
            raise UsageError(
                f"{file} puts {name!r} on {device!r}, which is no device; give a number, a name or {DISK!r}"
            )
        if device != DISK:
            check_device(f"cuda:{device}" if isinstance(device, int) else device)


def _memory(file: Path, given: Any) -> dict[int | str, int | str]:
    if not isinstance(given, dict):
        raise UsageError(
            f'{file} has the max_memory {given!r}; give an object such as {{"0": "20GiB", "cpu": "60GiB"}}'
        )
    for device, size in given.items():
        if isinstance(size, bool) or not (isinstance(size, int) or (isinstance(size, str) and _MEMORY.fullmatch(size))):
            raise UsageError(f'{file} gives {device!r} the max_memory {size!r}; give bytes, or a text such as "20GiB"')
    return {int(device) if device.isdigit() else device: size for device, size in given.items()}


def first_device(device: str) -> str:
    """Returns the name of a device, and of a device map that of the first device which computes.

    Raises:
        UsageError: as `loading_arguments`.
    """
    if not is_device_map(device):
        return device
    found = loading_arguments(device)["device_map"]
    if found in AUTOMATIC:
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    first = next((place for place in found.values() if place != DISK), "cpu")
    return f"cuda:{first}" if isinstance(first, int) else str(first)


def is_offloaded(model: nn.Module) -> bool:
    """Returns whether some weights are brought to their device for each call of their module alone."""
    return any(weight.is_meta for weight in model.parameters())


def _device_of(model: nn.Module, module: nn.Module) -> torch.device:
    """Returns the device that a module computes on: of offloaded weights the first of the model's map that computes."""
    import torch

    there = next((weight for weight in module.parameters() if not weight.is_meta), None)
    if there is not None:
        return there.device
    used = [place for place in (getattr(model, "hf_device_map", None) or {}).values() if place != DISK]
    first = next((place for place in used if str(place) != "cpu"), "cpu")
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)


def input_device(model: PreTrainedModel) -> torch.device:
    """Returns the device that the tokens of a model are to be on: that of its embedding."""
    return _device_of(model, model.get_input_embeddings())


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """Returns the device on which each layer attends."""
    return [_device_of(model, module) for module in attention_modules(model)]


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Has the weights of a module itself, not of its parts, in memory for a while where they are offloaded."""
    if not any(weight.is_meta for weight in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def tensor_in_memory(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of `state_dict`, read from where it is offloaded to, and put together if ranks have parts of it.

    Raises:
        ModelError: it is on "meta", and nothing says where its numbers are.
    """
    whole: Any = getattr(tensor, "full_tensor", None)  # of what is split over ranks, which all have to ask for it
    if whole is not None:
        return cast("torch.Tensor", whole())
    if not tensor.is_meta:
        return tensor
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if not _has_offloaded(module):
        raise ModelError(
            f"the weights are not all in memory: {name} is on the device 'meta', and no device map says where its numbers are; "
            "load the model with from_pretrained"
        )
    with in_memory(module):
        return cast("torch.Tensor", getattr(module, own)).detach().clone()


def _has_offloaded(module: nn.Module) -> bool:
    if importlib.util.find_spec("accelerate") is None:
        return False
    from accelerate.utils import has_offloaded_params

    return bool(has_offloaded_params(module))


def check_one_device(model: PreTrainedModel, what: str) -> None:
    """Refuses a model with offloaded weights, or whose layers lie on several devices; `what` is the subject of the sentence.

    Raises:
        ModelError: it is one.
    """
    check_in_memory(model, what)
    devices = sorted({str(device) for device in layer_devices(model)})
    if devices[1:]:
        raise ModelError(
            f"{what} needs all layers on one device, and they are on {', '.join(devices)}; give --device cpu"
        )


def check_in_memory(model: nn.Module, what: str) -> None:
    """Refuses a model with offloaded weights for what changes weights as they lie; `what` is the subject of the sentence.

    Raises:
        ModelError: some are offloaded.
    """
    if is_offloaded(model):
        raise ModelError(f"{what} needs all weights in memory, and the device map offloads some; give --device cpu")


def tensors_once(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a model's state with their names, a shared one once, wherever they lie.

    What is offloaded, or split over processes, has no address; of that the model says which weights are tied.
    """
    import torch

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    seen = set[int | str]()
    for name, tensor in model.state_dict().items():
        address = 0 if tensor.is_meta or type(tensor) is not torch.Tensor else tensor.data_ptr()
        place = address or tied.get(name, name)
        if place not in seen:
            seen.add(place)
            yield name, tensor
