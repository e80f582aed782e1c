"""Runs the compiled operators in another program, maybe of another processor in an emulator: `operators_server.cpp`.

With `MOACOMPRESS_TEST_EMULATED="qemu-aarch64 -cpu max PROGRAM"` in the environment the tests of this folder call them there.
What keeps tensors from one call to the next, as `read_caches` does, stays here: a step elsewhere would not reach them.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from moacompress.core.errors import UsageError
from moacompress.kernels.capabilities import Status
from moacompress.kernels.cpu import library

VARIABLE = "MOACOMPRESS_TEST_EMULATED"
DTYPES = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""As torch numbers them."""
SPACE = "moacompress_cpu"
HERE = {"read_layers", "read_caches", "read_cache", "step_layers", "trace"}
"""Operators that run in this process all the same."""
KEPT: list[torch.library.Library] = []
"""What torch would forget with the last reference."""


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what a tensor's numbers lie in, from the first to the last one, `[numbers]`."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((last + 1 if tensor.numel() else 0,), (1,))


def raw(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of numbers that lie side by side."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


class Program:
    """A program that runs the operators."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.tensors: list[torch.Tensor] = []

    def _read(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self._read_bytes(struct.calcsize(f"<{form}")))[0]

    def _read_bytes(self, count: int) -> bytes:
        assert self.process.stdout is not None
        found = self.process.stdout.read(count)
        assert len(found) == count, f"the program ended, {self.process.wait()}"
        return found

    def _read_text(self) -> str:
        return self._read_bytes(self._read("Q")).decode()

    def _read_tensor(self) -> torch.Tensor:
        dtype, dims = self._read("i"), self._read("Q")
        sizes, strides = ([self._read("q") for _ in range(dims)] for _ in range(2))
        made = torch.empty_strided(sizes, strides, dtype=next(key for key, code in DTYPES.items() if code == dtype))
        self._read_into(made)
        return made

    def _read_into(self, tensor: torch.Tensor) -> None:
        into = flat(tensor)
        if len(into):
            found = bytearray(self._read_bytes(len(into) * into.element_size()))
            into.copy_(torch.frombuffer(found, dtype=into.dtype))

    def _ask(self, *parts: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()

    def _argument(self, value: Any, kind: Any) -> Iterator[bytes]:
        if isinstance(kind, torch.OptionalType):
            yield b"N" if value is None else b"O"
            if value is None:
                return
            kind = kind.getElementType()
        if isinstance(kind, torch.ListType):
            yield b"L" + struct.pack("<Q", len(value))
            for item in value:
                yield from self._argument(item, kind.getElementType())
        elif isinstance(value, torch.Tensor):
            self.tensors.append(value)
            dims = f"{value.ndim}q"
            yield b"T" + struct.pack(f"<iQ{dims}{dims}", DTYPES[value.dtype], value.ndim, *value.shape, *value.stride())
            yield raw(flat(value))
        else:
            yield b"v" + (
                struct.pack("<d", value) if isinstance(kind, torch.FloatType) else struct.pack("<q", int(value))
            )

    def call(self, schema: Any, *values: Any) -> Any:
        """Calls an operator.

        Args:
            schema: its own.
            values: its arguments; torch leaves the last ones out where they have their default.

        Raises:
            RuntimeError: it refused them.
        """
        self.tensors = []
        values = (*values, *(argument.default_value for argument in schema.arguments[len(values) :]))
        name, kinds = (text.encode() for text in (schema.name.partition("::")[2], self._kinds(schema)))
        head = [part for text in (name, kinds) for part in (struct.pack("<Q", len(text)), text)]
        arguments = zip(values, schema.arguments, strict=True)
        parts = [part for value, argument in arguments for part in self._argument(value, argument.real_type)]
        self._ask(b"c", *head, struct.pack("<IQ", torch.get_num_threads(), len(values)), *parts)
        problem = self._read_text()
        if problem:
            raise RuntimeError(problem)
        results = [self._read_tensor() if kind == "T" else self._read("q") for kind in self._kinds(schema)]
        for tensor in self.tensors:
            if self._read("?"):
                self._read_into(tensor)
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    @staticmethod
    def _kinds(schema: Any) -> str:
        return "".join("T" if isinstance(result.real_type, torch.TensorType) else "i" for result in schema.returns)

    def best(self) -> str:
        """Returns the instruction set that it uses."""
        self._ask(b"b")
        return self._read_text()

    def set_isa(self, name: str) -> None:
        """Makes it use an instruction set.

        Raises:
            UsageError: no such set, or not on its processor.
        """
        self._ask(b"s", struct.pack("<Q", len(name)), name.encode())
        if not self._read("?"):
            raise UsageError(f"{name!r} is not on the processor of the program")


def install(command: list[str]) -> None:
    """Lets torch call the operators of a program instead of those that are built here."""
    built = library.load()
    assert built.isa is not None, built.reason
    program = Program(command)
    best = Status(True, "", program.best())
    assert best.isa is not None
    library.ISAS = next(("portable", *names) for names in library.ISAS_OF.values() if best.isa in ("portable", *names))
    library.load = lambda: best  # type: ignore[assignment]
    library.set_isa = program.set_isa
    names = (
        name.removeprefix(f"{SPACE}::") for name in torch._C._dispatch_get_all_op_names() if name.startswith(SPACE)
    )
    kernels = torch.library.Library(SPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*operators may also be overridden")
        for name in set(names) - HERE:
            schema = getattr(getattr(torch.ops, SPACE), name).default._schema
            kernels.impl(name, functools.partial(program.call, schema), "CPU", allow_override=True)
    KEPT.append(kernels)
    torch.ops.moacompress_cpu.linear(torch.zeros(1, 1), torch.zeros(1, 1), None)
    assert len(program.tensors) == 2  # it was called there
