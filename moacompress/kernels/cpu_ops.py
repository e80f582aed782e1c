"""The compiled CPU kernels as torch operators: finding the library, what `torch.compile` must know, and gradients.

The library lies at `cpu/libmoacompress_cpu.so` beside its sources. It is not a Python module: loading it registers
`torch.ops.moacompress_cpu`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moacompress.core.errors import UnsupportedError, UsageError

LIBRARY = Path(__file__).parent / "cpu" / "libmoacompress_cpu.so"
ISA_VARIABLE = "MOACOMPRESS_ISA"
ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""Instruction sets, the plainest first."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Built:
    """Whether the compiled kernels can run.

    Attributes:
        isa: the instruction set they use, or None if they cannot run.
        reason: why they cannot.
    """

    isa: str | None
    reason: str | None = None


@functools.cache
def load() -> Built:
    """Loads the library and registers what torch needs of its operators, once.

    Raises:
        UsageError: MOACOMPRESS_ISA names no instruction set of this processor.
    """
    if not LIBRARY.exists():
        return Built(None, missing(os.environ))
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return Built(None, f"{LIBRARY.name} cannot be loaded: {(str(error).splitlines() or ['no reason given'])[0]}")
    library.moacompress_isa.restype = ctypes.c_char_p
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        set_isa(wanted)
    _register()
    return Built(library.moacompress_isa().decode())


def missing(environ: Mapping[str, str]) -> str:
    """Returns why there is no library, and what to do.

    Args:
        environ: environment variables; `CXX` may name the compiler.
    """
    names = (environ["CXX"].split()[0],) if environ.get("CXX", "").strip() else COMPILERS
    found = next((name for name in names if shutil.which(name, path=environ.get("PATH"))), None)
    if found is None:
        return (
            f"the extension is not built and no C++ compiler is found ({', '.join(names)}); install one, then reinstall"
        )
    return f"the extension is not built; {found} is here, so `pip install --no-build-isolation` moacompress builds it"


def set_isa(name: str) -> None:
    """Makes the kernels use an instruction set.

    Args:
        name: one of `ISAS`.

    Raises:
        UsageError: no such set, or not on this processor.
    """
    if name not in ISAS:
        raise UsageError(f"{ISA_VARIABLE} is {name!r}, not one of {', '.join(ISAS)}")
    if not ctypes.CDLL(str(LIBRARY)).moacompress_set_isa(name.encode()):
        raise UsageError(f"{ISA_VARIABLE} is {name!r}, which this processor does not have; leave it out")


def visible(n: int, sink: int, alpha: int, beta_q: int, min_window: int, native_window: int) -> tuple[int, int, int]:
    """Returns what the kernels take to be visible: as `moacompress.rules.windows.segments`, with 0 for no native window."""
    out = (ctypes.c_int64 * 3)()
    arguments = (ctypes.c_int64(x) for x in (n, sink, alpha, beta_q, min_window, native_window))
    ctypes.CDLL(str(LIBRARY)).moacompress_visible(*arguments, out)
    return out[0], out[1], out[2]


def forget_layers(number: int) -> None:
    """Lets go of what `dispatch.read_layers` read."""
    ctypes.CDLL(str(LIBRARY)).moacompress_forget_layers(ctypes.c_int64(number))


def forget_caches(number: int) -> None:
    """Lets go of what `dispatch.read_caches` read."""
    ctypes.CDLL(str(LIBRARY)).moacompress_forget_caches(ctypes.c_int64(number))


def _rows(like: torch.Tensor, rows: Any, heads: Any, tokens: Any, dim: Any) -> torch.Tensor:
    """Returns an empty `[rows, heads, tokens, dim]` as the operators lay it out: tokens before heads."""
    return like.new_empty(rows, tokens, heads, dim).transpose(1, 2)


def _fake_decode(query: torch.Tensor, keys: Any, values: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, _ = query.shape
    out = query.new_empty(rows, heads, values[0].shape[-1])
    return out, query.new_empty(rows, heads, dtype=torch.float32)


def _fake_prefill(query: torch.Tensor, key: Any, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, tokens, _ = query.shape
    lse = query.new_empty(rows, heads, tokens, dtype=torch.float32)
    return _rows(query, rows, heads, tokens, value.shape[-1]), lse


def _fake_backward(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _rows(query, *query.shape), _rows(key, *key.shape), _rows(value, *value.shape)


def _fake_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_step(query: torch.Tensor, key: Any, value: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Any]:
    rows, heads, _, _ = query.shape
    return query.new_empty(rows, 1, heads, value.shape[-1]), torch.library.get_ctx().new_dynamic_size()


def _fake_step_hidden(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Any, cos: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, Any]:
    head_dim = cos.shape[-1]
    queries, keys, values = (weight.shape[0] for weight in weights)
    out = x.new_empty(x.shape[0], 1, queries // head_dim, values // (keys // head_dim))
    return out, torch.library.get_ctx().new_dynamic_size()


def _fake_step_layer(x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Any]:
    return x.new_empty(*x.shape), torch.library.get_ctx().new_dynamic_size()


def _fake_profile(
    dout: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rules: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    sums = query.new_empty(4 if rest[-1] else 2, key.shape[1], rules.shape[1], dtype=torch.float64)
    return *_fake_backward(dout, query, key, value), sums, torch.library.get_ctx().new_dynamic_size()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, keys, _, _, _, valid, sink, alpha, beta_q, *numbers, sink_logits = inputs
    ctx.numbers, ctx.cached = numbers, len(keys) > 0
    ctx.save_for_backward(query, key, value, valid, sink, alpha, beta_q, sink_logits, *output)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    """Gradients of a prefill without cache; the learned logits' follow from the lanes' sums alone."""
    if ctx.cached:
        raise UnsupportedError("a prefill over a cache has no gradients; train without a cache (use_cache=False)")
    query, key, value, valid, sink, alpha, beta_q, sink_logits, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    dquery, dkey, dvalue = torch.ops.moacompress_cpu.prefill_backward(
        dout, query, key, value, lse, delta.contiguous(), valid, sink, alpha, beta_q, *ctx.numbers
    )
    dlogits = None
    if sink_logits is not None:
        taken = torch.exp(sink_logits[:, None] - lse) * delta
        dlogits = -torch.where(lse == float("-inf"), 0, taken).sum((0, 2))
    return dquery, dkey, dvalue, [], [], *[None] * 10, dlogits


def _register() -> None:
    fakes: dict[str, Callable[..., Any]] = {
        "decode": _fake_decode,
        "prefill": _fake_prefill,
        "prefill_backward": _fake_backward,
        "linear": _fake_linear,
        "step": _fake_step,
        "step_hidden": _fake_step_hidden,
        "step_layer": _fake_step_layer,
        "profile_backward": _fake_profile,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"moacompress_cpu::{name}", fake)
    torch.library.register_autograd("moacompress_cpu::prefill", _backward, setup_context=_keep)
