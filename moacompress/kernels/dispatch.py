"""Which backend runs: the first of those registered that works, and another where that one does not support a tensor.

`MOACOMPRESS_KERNEL` names one and overrides the choice; a backend that was asked for and does not support a query's device or
dtype is an error, never a silent change. Gradients that the chosen one does not have come from the reference.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.core.plugins import BACKENDS, plugins
from moacompress.kernels.backend import FEW_ROWS, Backend
from moacompress.kernels.capabilities import Capabilities
from moacompress.kernels.cpu.cpu_backend import CpuBackend
from moacompress.kernels.kv_format import refuse_outside
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton.triton_backend import TritonBackend
from moacompress.rules.formats import FORMATS

VARIABLE = "MOACOMPRESS_KERNEL"
REFERENCE = ReferenceBackend()
REFERENCE_TIMES = "13 to 16"
"""How many times as long as with compiled kernels a decode step on a CPU takes in plain PyTorch: docs/results.md."""
logger = logging.getLogger(__name__)
_backends: dict[str, Backend] = {backend.name: backend for backend in (CpuBackend(), TritonBackend(), REFERENCE)}


@dataclass(frozen=True)
class Choice:
    """The backend that runs where it supports device and dtype.

    Attributes:
        isa: instruction set or card that it runs on, or None.
        reason: why this one.
        asked: whether the environment names it.
    """

    name: str
    isa: str | None
    reason: str
    asked: bool = False


def backends() -> tuple[Backend, ...]:
    """Returns the backends there are, the preferred first; those of installed packages come before ours."""
    _register_installed()
    return tuple(_backends.values())


@functools.cache
def _register_installed() -> None:
    """Registers the backends of installed packages, which name a subclass of `Backend` in the entry point group."""
    for name, kind in plugins(BACKENDS):
        if isinstance(kind, type) and issubclass(kind, Backend):
            register(kind())
        else:
            logger.warning("%s, an entry point of %s, is no backend and is left out: %r", name, BACKENDS, kind)


def register(backend: Backend) -> None:
    """Puts a backend before all others, or in the place of the one of its name.

    A model that is compiled already continues with the one that its graph was made for.
    """
    global _backends
    _backends = {backend.name: backend, **{name: other for name, other in _backends.items() if name != backend.name}}
    forget()


def forget() -> None:
    """Has the choice made again, as after a change of the environment."""
    chosen.cache_clear()
    _name_for.cache_clear()


def choose(wanted: str | None, backends: Sequence[Backend]) -> Choice:
    """Returns the backend that MOACOMPRESS_KERNEL asks for with `wanted`, or the first that works; the last one always does.

    Raises:
        UsageError: no backend of that name.
        UnsupportedError: the backend that is asked for cannot run, or none can.
    """
    if wanted:
        backend = next((backend for backend in backends if backend.name == wanted), None)
        if backend is None:
            known = ", ".join(backend.name for backend in backends)
            raise UsageError(f"{VARIABLE} is {wanted!r}, not one of {known}")
        status = backend.status()
        if not status.works:
            raise UnsupportedError(f"{VARIABLE} asks for the kernel {wanted!r}, which cannot run: {status.reason}")
        return Choice(wanted, status.isa, f"{VARIABLE} asks for it", asked=True)
    failed = ""
    for backend in backends:
        status = backend.status()
        if status.works:
            return Choice(backend.name, status.isa, failed or status.reason)
        failed = failed or status.reason
    raise UnsupportedError(f"no kernel can run: {failed}")


def choice_on_cpu(choice: Choice) -> Choice:
    """Returns what runs on the CPU where a choice was made: the same, unless that is for GPUs and was not asked for."""
    if choice.asked or _backends[choice.name].supports("cpu", torch.float32):
        return choice
    return choose(None, [backend for backend in backends() if backend.supports("cpu", torch.float32)])


def why_plain(device: str) -> str:
    """Returns why attention is plain PyTorch's on a type of device, and how much slower it is; for devices that are no CPU.

    Raises:
        UsageError, UnsupportedError: as `chosen`.
    """
    choice = chosen()
    if choice.asked:
        reason = f"{VARIABLE} is {choice.name}"
    else:
        statuses = (backend.status() for backend in backends() if backend.supports(device, torch.bfloat16))
        reason = next((status.reason for status in statuses if not status.works), f"no kernels know {device}")
    return f"{reason}; how much slower that is there was not measured"


def slower_on_cpu() -> str:
    """Returns how much slower plain PyTorch is on a CPU."""
    return f"a decode step takes {REFERENCE_TIMES} times as long as with compiled kernels"


@functools.cache
def chosen() -> Choice:
    """Returns the backend of this process; says which, once.

    Raises:
        UsageError: MOACOMPRESS_KERNEL names no backend, or another variable nothing that there is.
        UnsupportedError: the backend that is asked for cannot run.
    """
    choice = choose(os.environ.get(VARIABLE), backends())
    logger.info("kernel: %s%s (%s)", choice.name, f", {choice.isa}" if choice.isa else "", choice.reason)
    return choice


def check_formats(names: Iterable[str]) -> None:
    """Refuses formats of installed packages where the backend of this process keeps ours alone.

    Raises:
        UnsupportedError: names the format, the backend, and what keeps it.
        UsageError: as `chosen`.
    """
    others = [name for name in names if name not in FORMATS]
    if others and not _backends[chosen().name].capabilities.outside_formats:
        instead = f"set {VARIABLE}={REFERENCE.name}, which keeps it in plain PyTorch"
        refuse_outside(others, f"the kernel {chosen().name}", instead)


def backend_for(tensor: torch.Tensor) -> Backend:
    """Returns the backend that runs for tensors of this device and dtype.

    Raises:
        UnsupportedError: the environment asks for a backend that does not know the dtype or the device.
    """
    return _backends[_constant_name(tensor.device.type, tensor.dtype)]


def backend_with_gradients(query: torch.Tensor, *others: torch.Tensor, cached: bool) -> Backend:
    """Returns the backend for a query; the reference where it, or `others`, need gradients that the backend does not have.

    `cached` says whether what is attended to is in a cache.

    Raises:
        UnsupportedError: as `backend_for`.
    """
    backend = backend_for(query)
    able = backend.capabilities
    has = able.cached_gradients if cached else able.prefill_gradients
    if not has and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *others)):
        return REFERENCE
    return backend


def capabilities_for(tensor: torch.Tensor) -> Capabilities:
    """Returns what the backend for tensors of this device and dtype can do; nothing where `backend_for` refuses them."""
    name = _supporting_name(tensor.device.type, tensor.dtype)
    return _backends[name].capabilities if name else Capabilities()


def few_rows(tensor: torch.Tensor) -> int:
    """Returns up to how many rows compiled kernels multiply a tensor by plain weights faster than torch."""
    found: int = _few_rows(tensor.device.type, tensor.dtype)
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _few_rows(device: str, dtype: torch.dtype) -> int:
    name = _supporting_name(device, dtype)
    return _backends[name].few_rows(dtype) if name else FEW_ROWS


def backend_on(device: str, dtype: torch.dtype) -> Backend:
    """Returns the backend for tensors of a type of device and a dtype; the reference where the one asked for knows neither."""
    name = _supporting_name(device, dtype)
    return _backends[name] if name else REFERENCE


def backend_on_host() -> Backend:
    """Returns the backend for what is computed in integers on the CPU, wherever the model is."""
    return backend_on("cpu", torch.float32)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _supporting_name(device: str, dtype: torch.dtype) -> str:
    choice = chosen()
    return "" if choice.asked and not _backends[choice.name].supports(device, dtype) else _name_for(device, dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_name(device: str, dtype: torch.dtype) -> str:
    """A constant to `torch.compile`, which cannot trace the loading of a library."""
    return _name_for(device, dtype)


@functools.cache
def _name_for(device: str, dtype: torch.dtype) -> str:
    choice = chosen()
    if _backends[choice.name].supports(device, dtype):
        return choice.name
    if choice.asked:
        known = _backends[choice.name].known
        raise UnsupportedError(
            f"{VARIABLE}={choice.name} cannot run {dtype} on {device}; it knows {known}; unset {VARIABLE}"
        )
    others = (backend for backend in _backends.values() if backend.status().works and backend.supports(device, dtype))
    return next(others).name
