"""`torch_abi.h` against the torch that is here: it declares what torch does, and what the built library asks for."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from moacompress.kernels.cpu import library

HEADER = library.LIBRARY.parent / "torch_abi.h"
COMPILER = next((found for name in library.COMPILERS if (found := shutil.which(os.environ.get("CXX") or name))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
needs_library = pytest.mark.skipif(not library.LIBRARY.exists(), reason="the extension is not built")

DECLARATION = re.compile(r"^(?P<weak>\[\[gnu::weak\]\] )?[\w ]+\*? ?\b(?P<name>\w+)\(.*?\);$", re.MULTILINE | re.DOTALL)

TORCH = """
#include <type_traits>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
"""
SAME = 'static_assert(std::is_same_v<decltype(&::{name}), decltype(&ours::{name})>, "{name}");\n'
CONVENTIONS = """
static_assert(std::is_same_v<StableIValue, uint64_t>);
static_assert(std::is_same_v<AtenTensorHandle, AtenTensorOpaque*> && std::is_same_v<TorchLibraryHandle, TorchLibraryOpaque*>);
static_assert(std::is_same_v<StableListHandle, StableListOpaque*>);
static_assert(AOTI_TORCH_SUCCESS == 0 && TORCH_SUCCESS == 0);
static_assert(moacompress::TORCH_ABI == TORCH_VERSION_2_10_0 && moacompress::TORCH_ABI <= TORCH_ABI_VERSION);
"""


def declarations() -> tuple[str, dict[str, bool]]:
    """Returns the C block of the header, and of each function whether it may be lacking."""
    (block,) = re.findall(r'^extern "C" \{\n(.*?)^\}\n', HEADER.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    block = re.sub(r"^//.*\n", "", block, flags=re.MULTILINE)
    return block, {found["name"]: found["weak"] is not None for found in DECLARATION.finditer(block)}


def compile_beside_torch(folder: Path, block: str, names: list[str]) -> subprocess.CompletedProcess[str]:
    """Compiles the header after torch's own, and compares every function of the block with torch's of that name."""
    source = folder / "beside.cpp"
    same = "".join(SAME.format(name=name) for name in names)
    source.write_text(f'{TORCH}namespace ours {{\n{block}}}\n{same}#include "{HEADER}"\n{CONVENTIONS}')
    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", *includes, str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.builds("torch_abi")
@needs_compiler
def test_every_declaration_is_torchs_own(tmp_path: Path) -> None:
    block, functions = declarations()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    names = [name for name, may_lack in functions.items() if not may_lack or version >= (2, 13)]
    assert len(names) == block.count(";") - (len(functions) - len(names))  # the pattern found every one
    done = compile_beside_torch(tmp_path, block, names)
    assert done.returncode == 0, done.stderr[-3000:]
    other = block.replace("int64_t dim, int64_t* size", "int32_t dim, int64_t* size")
    assert other != block
    refused = compile_beside_torch(tmp_path, other, names)
    assert refused.returncode != 0
    assert "aoti_torch_get_size" in refused.stderr


def undefined_symbols(path: Path) -> dict[str, bool]:
    """Returns what an ELF library of 64 bits asks of others, and whether it does without: of each symbol if it is weak."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (begin,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, begin + i * size) for i in range(count)]
    (symbols,) = (section for section in sections if section[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]][4]
    found = {}
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", data, at)
        if name and section == 0:
            found[data[names + name : data.index(b"\0", names + name)].decode()] = info >> 4 == 2
    return found


@needs_library
def test_the_library_asks_torch_for_what_is_declared() -> None:
    asked = {name: weak for name, weak in undefined_symbols(library.LIBRARY).items() if "torch" in name}
    assert asked == declarations()[1]


@needs_library
def test_an_error_of_an_operator_is_one_of_python() -> None:
    library.load()
    with pytest.raises(RuntimeError, match=r"^linear: weight has the shape \[3, 5\], not \[any, 4\]"):
        torch.ops.moacompress_cpu.linear(torch.zeros(2, 4), torch.zeros(3, 5), None)
    with pytest.raises(RuntimeError, match=r"^linear: the query must be float32, bfloat16 or float16"):
        torch.ops.moacompress_cpu.linear(torch.zeros(2, 4, dtype=torch.float8_e5m2), torch.zeros(3, 4), None)


@needs_library
def test_an_error_within_torch_is_one_of_python() -> None:
    """Memory that nobody has: the result of an operator, of 2^60 numbers, on inputs that take none."""
    library.load()
    rows = torch.zeros(1, 1).expand(1 << 40, 1)
    outputs = torch.zeros(1, 1).expand(1 << 20, 1)
    with pytest.raises(RuntimeError, match="aoti_torch_empty_strided"):
        torch.ops.moacompress_cpu.linear(rows, outputs, None)


_TWICE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
from moacompress.kernels.cpu import library
print(library.load().reason)
"""


@needs_library
def test_operators_that_are_there_already_are_a_reason_not_to_load(tmp_path: Path) -> None:
    other = shutil.copy(library.LIBRARY, tmp_path / "other.so")
    done = subprocess.run([sys.executable, "-c", _TWICE, other], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == (
        "libmoacompress_cpu.so cannot be loaded: torch refused its operators; the reason stands on stderr"
    )
    assert "torch refused the operators of moacompress_cpu: " in done.stderr
    if torch.__version__ >= "2.13":  # what torch itself says is asked for from then on
        assert "multiple times" in done.stderr


@needs_library
def test_arguments_are_released_and_results_handed_over() -> None:
    """Tensors in lists and optional ones are held while an operator runs, by nobody after it, and after an error neither."""
    library.load()
    operators = torch.ops.moacompress_cpu
    weight, bias = torch.randn(3, 4), torch.randn(3)
    x = torch.randn(4, 2).t()  # not contiguous: a copy is made
    held = [part._use_count() for part in (x, weight, bias)]  # type: ignore[attr-defined]
    for given in (bias, None):
        out = operators.linear(x, weight, given)
        assert torch.allclose(out, torch.nn.functional.linear(x, weight, given), atol=1e-6)
        assert out._use_count() == torch.zeros(2)._use_count()  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="^read_layers: "):
        operators.read_layers([weight, weight], [bias], [], [], [x], 1e-5, 4, [weight], 1.0, weight, [])
    assert [part._use_count() for part in (x, weight, bias)] == held  # type: ignore[attr-defined]
