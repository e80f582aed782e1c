"""Which tests run on a GPU, and in which processes.

Triton makes its functions when it is first imported: for its interpreter, or for a card. So a process has one of the two. Tests
run by the interpreter, with a card or without, and those marked `gpu` are skipped; `pytest -m gpu` has a process (or many) that
runs these alone, on the card. `MOACOMPRESS_TEST_GPU=1` asks for such a process too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import re
import sys
from typing import Any

import pytest

INTERPRET = "TRITON_INTERPRET"
VARIABLE = "MOACOMPRESS_TEST_GPU"
TRITON = "triton on cuda"
"""The kernels in Triton on a card, by a name that `use_backend` takes; see `on_device`."""
GPU = pytest.param(TRITON, marks=pytest.mark.gpu)
PLACES = ["triton", GPU]
"""Where the kernels in Triton are tested."""


def asked() -> bool:
    """Whether this process is for tests on a GPU."""
    return os.environ.get(VARIABLE) == "1"


def begin(arguments: list[str]) -> None:
    """Has Triton imported for its interpreter, unless tests on a GPU are asked for; before anything else imports it.

    Args:
        arguments: of pytest; processes that it starts find `VARIABLE` in their environment.
    """
    if re.search(r"(^| )-m ?gpu\b", " ".join(arguments)):
        os.environ[VARIABLE] = "1"
    if asked() or importlib.util.find_spec("triton") is None or "triton" in sys.modules:
        return
    os.environ[INTERPRET] = "1"  # kernels are what they are when a test runs on them
    importlib.import_module("triton.language")
    del os.environ[INTERPRET]
    _hurry(importlib.import_module("triton.runtime.interpreter"))


def _hurry(interpreter: Any) -> None:
    """Has the interpreter leave out what it does over and over, which is more than half of its time."""
    builder = interpreter.interpreter_builder
    # sums that overflow are looked for, at twice the time, and told to nobody unless `debug` is on
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    if not hasattr(interpreter, "_LangPatchScope"):  # an earlier Triton
        return
    made = interpreter._get_np_dtype  # makes a table of all dtypes each time
    known = functools.cache(made)
    interpreter._get_np_dtype = lambda kind: (made if kind.scalar.is_ptr() else known)(kind.scalar)
    # the language is patched for a kernel, and again for every function that it calls
    patch, now = interpreter._patch_lang, set[int]()
    modules = {id(interpreter.tl), id(interpreter.tl.core)}

    @functools.cache
    def named(fn: Any) -> set[int]:
        return {id(value) for value in fn.__globals__.values()} & modules

    def once(fn: Any) -> Any:
        wanted = named(fn)
        if wanted and wanted <= now:
            return interpreter._LangPatchScope()  # a function's is never restored: the kernel's is, when it ends
        scope = patch(fn)
        now.update(wanted)
        restore = scope.restore

        def restored() -> None:
            now.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = once


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Has the tests of kernels that ask for `triton` run by the interpreter and on a GPU."""
    if "triton" in metafunc.fixturenames and metafunc.definition.path.parent.name == "kernels":
        metafunc.parametrize("use_backend", PLACES, indirect=True)


def leave_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """Takes those tests from a list that are not for this process, and returns them; skips what is for a GPU without one."""
    if asked():
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
    else:
        others = []
    on_a_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    reason = problem() if on_a_gpu else None
    if reason is not None:
        for item in on_a_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))
    return others


def problem() -> str | None:
    """Returns why tests on a GPU do not run in this process; None where they do."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU"
    return None if asked() else "Triton is there for its interpreter; `pytest -m gpu` runs tests on the GPU"
