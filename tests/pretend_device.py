"""A device that is not there: tensors say that they are on it, and what they hold is computed on the CPU.

What would fail on a card fails here: tensors of two devices in one operation, numpy views of a device's memory. What would
wait for the card is noted: numbers read by the host, results whose size depends on numbers.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from moacompress.kernels import sdpa

aten = torch.ops.aten
KIND = "xla"
"""Type of the device: not CUDA, which PyTorch's autograd would look for."""
WAITS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
"""Operations for whose result the host waits; so it does where masks on the device are indices."""
ACROSS = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
"""Operations that take tensors of two devices: copies."""
INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
"""Operations whose indices may be on the CPU."""
LAUNCHED = {
    "append_kernels": ("append", "append_next"),
    "decode_kernels": ("split", "merge"),
    "prefill_kernels": ("attend_chunk",),
    "select_kernels": ("select", "move"),
}
"""The kernels in Triton, by their modules."""


class PretendTensor(torch.Tensor):
    """A tensor on a device that is not there.

    Attributes:
        held: its numbers, on the CPU.
    """

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> PretendTensor:
        """Returns a tensor that says it is on the device."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held: torch.Tensor, device: torch.device) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"pretending({self.held!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {}, [], [])

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy; use Tensor.cpu() first")

    def __array__(self, *_: Any) -> Any:
        return self.numpy()


class PretendDevice(TorchDispatchMode):
    """While it is on, devices of the type `KIND` are there.

    Attributes:
        waits: what the host waited for, in order: names of operations.
        doubles: operations that made float64 there, which cards are slow at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.doubles: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.waits, self.doubles)


class _Indexed(TorchFunctionMode):
    """Names the device by its number, and copies without what PyTorch has of a device only where it is built for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **kwargs or {})
        args, kwargs = (tree_map_only((str, torch.device), _numbered, part) for part in (args, kwargs or {}))
        if func is torch.Tensor.copy_:
            return aten.copy_.default(*args, **kwargs)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            listed = [torch.tensor(each) if isinstance(each, list) else each for each in at]
            return func(args[0], tuple(listed), *args[2:])
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            grad = kwargs.pop("requires_grad", False)
            found = func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
            return found.requires_grad_() if grad else found
        if func is torch.Tensor.new_tensor:
            device = kwargs.pop("device", None) or args[0].device
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs}).to(device)
        return func(*args, **kwargs)


class _HostGenerator(torch.Generator):
    """One on the CPU, whatever device is asked for."""

    def __new__(cls, device: Any = "cpu") -> _HostGenerator:
        """Returns it."""
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


def _run_backward(*args: Any, **kwargs: Any) -> Any:
    with _Indexed():  # which is off inside of a function that it looks at, and so in what that calls
        return torch.autograd.graph._engine_run_backward(*args, **kwargs)


def _no_gradients(mode: bool = True) -> Any:
    return torch.set_grad_enabled(not mode and torch.is_grad_enabled())


def _numbered(name: str | torch.device) -> str | torch.device:
    return torch.device(f"{KIND}:0") if str(name) == KIND else name


def _run(func: Any, args: Any, kwargs: dict[str, Any], waits: list[str], doubles: list[str]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
    pretending = [each for each in tensors if isinstance(each, PretendTensor)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if not pretending and (wanted is None or wanted.type != KIND):
        return func(*args, **kwargs)
    device = pretending[0].device if pretending else _indexed(wanted)
    if func not in ACROSS:
        _same_device(func, args, tensors)
    if func in WAITS or (func in INDEXING and any(map(_is_mask, args[1]))):
        waits.append(str(func))
    given, named = tree_map_only(PretendTensor, lambda each: each.held, (args, kwargs))
    if wanted is not None:
        named["device"] = torch.device("cpu")
    if named.get("pin_memory"):
        named["pin_memory"] = False
    if func is aten._to_copy.default:
        found = func(*given, **{**named, "non_blocking": False})
        if found is given[0]:
            found = found.clone()
        if wanted is not None and wanted.type != KIND:
            waits.append("to the host")
            return found
        if found.dtype == torch.float64:
            doubles.append(str(func))
        return PretendTensor(found, _indexed(wanted) if wanted is not None else device)
    if func is aten.copy_.default and not isinstance(args[0], PretendTensor):
        waits.append("to the host")
    out = func(*given, **named)
    if func is aten._local_scalar_dense.default:
        return out
    goes = _indexed(wanted) if wanted is not None else device
    if wanted is not None and wanted.type != KIND:
        return out
    if any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in tree_flatten(out)[0]):
        doubles.append(str(func))
    own = {id(each.held): each for each in pretending}  # what is written to in place comes back
    return tree_map_only(
        torch.Tensor, lambda each: own[id(each)] if id(each) in own else PretendTensor(each, goes), out
    )


def _is_mask(index: Any) -> bool:
    """Whether where to look is found by counting on the device, for whose result the host waits."""
    return isinstance(index, PretendTensor) and index.dtype in (torch.bool, torch.uint8)


def _indexed(device: torch.device | None) -> torch.device:
    assert device is not None
    return torch.device(device.type, device.index or 0) if device.type == KIND else device


def _same_device(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    if func in INDEXING:  # indices may be on the CPU; values as in any other operation
        tensors = [each for each in (args[0], *args[2:3]) if isinstance(each, torch.Tensor)]
    found = {each.device for each in tensors if each.ndim or isinstance(each, PretendTensor)}
    if len(found) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {sorted(map(str, found))} in {func}")


@contextlib.contextmanager
def pretend_device() -> Iterator[PretendDevice]:
    """Has devices of the type `KIND` there."""
    with (
        mock.patch.object(torch.autograd, "_engine_run_backward", _run_backward),
        mock.patch.object(torch, "inference_mode", _no_gradients),  # which knows no tensors of a kind of one's own
        mock.patch.object(torch.accelerator, "synchronize"),
        mock.patch.object(torch, "Generator", _HostGenerator),
        torch.autograd.set_multithreading_enabled(False),
        PretendDevice() as mode,
        _Indexed(),
    ):
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            yield mode
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)


class Launched:
    """A kernel in Triton for tensors on the device, which Triton's interpreter would not read.

    Args:
        kernel: the kernel.
        cpu_too: whether it may be given tensors of the CPU alone.
        chosen: tensors whose GPU is the current one, the last one's now.

    Attributes:
        launches: how often it was launched.
    """

    def __init__(self, kernel: Any, cpu_too: bool, chosen: list[torch.Tensor]) -> None:
        self.kernel, self.arg_names, self.cpu_too, self.chosen = kernel, kernel.arg_names, cpu_too, chosen
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **constants: Any) -> None:
            self.launches += 1
            assert self.chosen, "launched on the GPU that happens to be the current one"
            there = {isinstance(each, PretendTensor) for each in given if isinstance(each, torch.Tensor)}
            if there != {True} and not (self.cpu_too and there == {False}):
                raise RuntimeError(f"{self.kernel.__name__} is given a tensor of the CPU")
            self.kernel[grid](*(each.held if isinstance(each, PretendTensor) else each for each in given), **constants)

        return launch


def launch_there(patch: Any, *, cpu_too: bool = False) -> dict[str, Launched]:
    """Has the kernels in Triton take tensors on the device; those of the CPU among them are an error, as on a card.

    Args:
        patch: pytest's `monkeypatch`.
        cpu_too: whether a kernel may be given tensors of the CPU alone.

    Returns:
        What stands in the kernels' places, by their names.
    """
    found, chosen = {}, list[torch.Tensor]()

    @contextlib.contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        chosen.append(tensor)
        yield
        chosen.pop()

    patch.setattr(torch.cuda, "device_of", device_of)
    for name, kernels in LAUNCHED.items():
        module = importlib.import_module(f"moacompress.kernels.triton.{name}")
        for kernel in kernels:
            found[kernel] = Launched(getattr(module, kernel), cpu_too, chosen)
            patch.setattr(module, kernel, found[kernel])
    return found


def as_a_card(patch: Any, triton: Any, *, cpu_too: bool = False) -> dict[str, Launched]:
    """Has the device run as a card does: Triton's kernels, and PyTorch's attention for dense passes of a profile.

    Args:
        patch: pytest's `monkeypatch`.
        triton: the backend, in use.
        cpu_too: whether it runs what is on the CPU as well.

    Returns:
        What stands in the kernels' places, by their names.
    """
    patch.setattr(
        type(triton), "supports", lambda backend, device, dtype: device == KIND or (cpu_too and device == "cpu")
    )
    patch.setattr(sdpa, "DEVICES", (KIND,))
    return launch_there(patch, cpu_too=cpu_too)
