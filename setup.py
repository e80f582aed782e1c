"""Builds the CPU kernels where a C++ compiler is there; everything else is in pyproject.toml.

They declare what they call of torch's stable ABI themselves (`torch_abi.h`), and name torch's library without being linked to
it, so an isolated `pip install .` builds them in a minute and downloads no torch for it. Without a compiler the package
installs all the same and runs on its reference. What is missing is said; `MOACOMPRESS_REQUIRE_EXT=1` makes it an error, and
with `MOACOMPRESS_NO_EXT=1` they are not built.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = "moacompress/kernels/cpu"
REQUIRE = os.environ.get("MOACOMPRESS_REQUIRE_EXT") == "1"
TORCH_LIBRARY = "torch_cpu"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
BF16 = (*AVX512, "-mavx512bf16", "-mavx512vnni")
AMX = ("-mamx-tile", "-mamx-bf16", "-mamx-int8")
NEON_BF16 = ("-march=armv8.2-a+dotprod+bf16+i8mm",)
X86 = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": BF16,
    "isa_avx512_amx.cpp": (*BF16, *AMX),
}
ARM = {"isa_neon_bf16.cpp": NEON_BF16}  # NEON itself is in every 64-bit ARM processor
SETS = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
"""Of each machine the flags of the sources that are for one instruction set: only they may use it."""
RECENT = {
    "isa_avx512_amx.cpp": (
        AMX,
        "#include <immintrin.h>\nvoid f() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); _tile_dpbusd(0, 1, 2); }",
    ),
    "isa_neon_bf16.cpp": (
        NEON_BF16,
        "#include <arm_neon.h>\nauto f(float32x4_t a, bfloat16x8_t b) { return vbfdotq_f32(a, b, b); }",
    ),
}
"""Flags that not every compiler and assembler knows, and a program that needs them."""


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler: `CXX`, or the first that is found, or None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    return None


def missing() -> str | None:
    """Returns what keeps the kernels from being built, or None."""
    if os.environ.get("MOACOMPRESS_NO_EXT") == "1":
        return "MOACOMPRESS_NO_EXT=1"
    if sys.platform not in ("linux", "darwin"):
        return f"they are built on Linux and macOS only, this is {sys.platform}"
    if compiler() is None:
        return f"no C++ compiler ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    return None


def instruction_flags(source: str) -> tuple[str, ...]:
    """Returns the flags of a source that is for one instruction set, but for those that the compiler does not know.

    Without them the source compiles all the same, and the library says that it lacks the set.

    Args:
        source: its file name.
    """
    flags = SETS.get(platform.machine(), {}).get(source, ())
    optional, program = RECENT.get(source, ((), ""))
    if not set(optional) & set(flags) or _compiles(tuple(compiler() or ()), optional, program):
        return flags
    return tuple(flag for flag in flags if flag not in optional)


@functools.cache
def _compiles(command: tuple[str, ...], flags: tuple[str, ...], program: str) -> bool:
    if not command:
        return False
    run = [*command, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(run, input=program, text=True, capture_output=True, check=False).returncode == 0


class BuildKernels(build_ext):
    """Compiles every source with the flags of its instruction set, into a library that needs torch's when it is loaded."""

    def get_ext_filename(self, fullname: str) -> str:
        """Returns the library's path: it is loaded by torch and is no Python module, so its name bears no Python version."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Builds the library.

        Raises:
            CompileError: a source does not compile, or the objects do not link.
        """
        command = compiler()
        if command is None:
            raise CompileError(f"the CPU kernels cannot be built: {missing()}")
        target = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp) / "kernels"
        objects.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_source(source: str) -> str:
            name = Path(source).name
            flags = [*FLAGS, *instruction_flags(name), *shlex.split(os.environ.get("CXXFLAGS", ""))]
            made = str(objects / f"{name}.o")
            _run([*command, *flags, "-c", source, "-o", made])
            return made

        with ThreadPoolExecutor(cores()) as pool:
            longest_first = sorted(ext.sources, key=lambda source: not Path(source).name.startswith("isa_"))
            made = list(pool.map(compile_source, longest_first))
        _run([*command, "-shared", "-o", str(target), *made, *link_torch(command, objects)])


def cores() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def link_torch(command: list[str], folder: Path) -> list[str]:
    """Makes a library in torch's name to link with, and returns the flags for it.

    The kernels' library then asks for torch's, which is in memory when it is loaded.

    Args:
        command: the compiler.
        folder: to put it into.
    """
    stub, source = folder / f"lib{TORCH_LIBRARY}", folder / "stub.cpp"
    source.write_text("")
    if sys.platform != "darwin":
        _run([*command, "-shared", f"-Wl,-soname,{stub.name}.so", "-o", f"{stub}.so", str(source)])
        return ["-Wl,--no-as-needed", "-L", str(folder), f"-l{TORCH_LIBRARY}"]
    # There every function is looked for in the library that it was linked from, so the stub must have them all.
    header = (Path(__file__).parent / FOLDER / "torch_abi.h").read_text("utf-8")
    names = re.findall(r"\b((?:aoti_)?torch_\w+)\(", header.partition('extern "C" {')[2].partition("\n}")[0])
    source.write_text("\n".join(f'extern "C" void {name}() {{}}' for name in names))
    _run([*command, "-shared", f"-Wl,-install_name,@rpath/{stub.name}.dylib", "-o", f"{stub}.dylib", str(source)])
    return ["-L", str(folder), f"-l{TORCH_LIBRARY}", "-Wl,-rpath,@loader_path/../../../torch/lib"]


class PlatformWheel(bdist_wheel):
    """Tags a wheel that holds the library for its platform and for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns `(python, abi, platform)`."""
        python, abi, plat = super().get_tag()
        return ("py3", "none", plat) if self.distribution.has_ext_modules() else (python, abi, plat)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")


def extensions() -> list[Extension]:
    """Returns the extension, or nothing where it cannot be built."""
    reason = missing()
    if reason is not None:
        if REQUIRE:
            raise SystemExit(f"MOACOMPRESS_REQUIRE_EXT=1, but the CPU kernels cannot be built: {reason}")
        print(f"moacompress installs without its CPU kernels: {reason}", file=sys.stderr)
        return []
    root = Path(__file__).parent
    sources = sorted(str(source.relative_to(root)) for source in (root / FOLDER).glob("*.cpp"))
    depends = sorted(str(path.relative_to(root)) for end in ("h", "inl") for path in (root / FOLDER).glob(f"*.{end}"))
    return [Extension("moacompress.kernels.cpu.libmoacompress_cpu", sources, depends=depends, optional=not REQUIRE)]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel})
