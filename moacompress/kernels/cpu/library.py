"""Finding and loading the compiled kernels, and choosing their instruction set.

The library lies at `libmoacompress_cpu.so` beside its sources. It is not a Python module: loading it registers
`torch.ops.moacompress_cpu`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from moacompress.core.errors import UsageError
from moacompress.kernels.capabilities import Status
from moacompress.kernels.cpu.operators import register
from moacompress.rules.rule_table import RuleTable

LIBRARY = Path(__file__).parent / "libmoacompress_cpu.so"
ISA_VARIABLE = "MOACOMPRESS_ISA"
X86_ISAS, ARM_ISAS = ("avx2", "avx512", "avx512_bf16", "avx512_amx"), ("neon", "neon_bf16")
ISAS_OF = {"x86_64": X86_ISAS, "aarch64": ARM_ISAS, "arm64": ARM_ISAS}
ISAS = ("portable", *ISAS_OF.get(platform.machine(), ()))
"""Instruction sets of this machine, the plainest first."""
TILES = X86_ISAS[-1]
"""The one with products of tiles."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILERS = ("c++", "g++", "clang++")
_one_at_a_time = threading.Lock()
SYSTEMS = {"linux": "Linux", "darwin": "macOS"}
"""Those that the library is built on."""


def load() -> Status:
    """Loads the library and registers what torch needs of its operators, once, whichever thread is the first.

    Raises:
        UsageError: MOACOMPRESS_ISA names no instruction set of this processor.
    """
    with _one_at_a_time:
        return _load()


@functools.cache
def _load() -> Status:
    if not LIBRARY.exists():
        return Status(False, missing(os.environ))
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return _not_loaded(str(error))
    library.moacompress_isa.restype = ctypes.c_char_p
    if library.moacompress_isa() is None:
        return _not_loaded("torch refused its operators; the reason stands on stderr")
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        set_isa(wanted)
    register()
    return Status(True, "the extension is built for this machine", library.moacompress_isa().decode())


def _not_loaded(reason: str) -> Status:
    return Status(False, f"{LIBRARY.name} cannot be loaded: {(reason.splitlines() or ['no reason given'])[0]}")


def missing(environ: Mapping[str, str], system: str = sys.platform) -> str:
    """Returns why there is no library on a system, as `sys.platform` names it, and what to do; `CXX` may name the compiler."""
    if system not in SYSTEMS:
        return f"the extension is built on {' and '.join(SYSTEMS.values())} only, this is {system}"
    names = (environ["CXX"].split()[0],) if environ.get("CXX", "").strip() else COMPILERS
    found = next((name for name in names if shutil.which(name, path=environ.get("PATH"))), None)
    if found is None:
        return (
            f"the extension is not built and no C++ compiler is found ({', '.join(names)}); install one, then reinstall"
        )
    return f"the extension is not built; {found} is here, so installing moacompress again builds it (`pip install .`)"


def set_isa(name: str) -> None:
    """Makes the kernels use an instruction set, one of `ISAS`.

    Raises:
        UsageError: no such set, or not on this processor.
    """
    if name not in ISAS:
        raise UsageError(f"{ISA_VARIABLE} is {name!r}, not one of {', '.join(ISAS)}")
    if not ctypes.CDLL(str(LIBRARY)).moacompress_set_isa(name.encode()):
        raise UsageError(f"{ISA_VARIABLE} is {name!r}, which this processor does not have; leave it out")


def visible(n: int, table: RuleTable) -> tuple[list[int], list[int]]:
    """Returns what the kernels take to be visible under one rule: intervals and block runs of `rules.windows`, flattened."""
    numbers = (ctypes.c_int64 * len(table.columns))(*table.columns[:, 0].tolist())
    intervals, blocks = (ctypes.c_int64 * 4)(), (ctypes.c_int64 * 4)()
    ctypes.CDLL(str(LIBRARY)).moacompress_visible(ctypes.c_int64(n), numbers, intervals, blocks)
    return list(intervals), list(blocks)


def forget_layers(number: int) -> None:
    """Lets go of what the operator `read_layers` read."""
    ctypes.CDLL(str(LIBRARY)).moacompress_forget_layers(ctypes.c_int64(number))


def forget_caches(number: int) -> None:
    """Lets go of what the operator `read_caches` read."""
    ctypes.CDLL(str(LIBRARY)).moacompress_forget_caches(ctypes.c_int64(number))
