"""Registering with transformers: in every order of imports, never in the way of `import torch`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

import _moacompress_autoload as autoload_module
from _moacompress_autoload import autoload

REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("moacompress" in AUTO_QUANTIZER_MAPPING)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh process, outside the repository."""
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "code",
    [
        "import torch; from transformers import LlamaForCausalLM",
        "from transformers import LlamaForCausalLM",
        "import transformers.modeling_utils as m; m.PreTrainedModel; assert type(m).__name__ == 'module'",
        "from transformers import LlamaForCausalLM; import moacompress",
        "import moacompress; from transformers import LlamaForCausalLM",
    ],
)
def test_every_order_of_imports(code: str) -> None:
    done = run(code + REGISTERED)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_switch_of_torch_turns_it_off_and_importing_turns_it_on() -> None:
    code = "from transformers import LlamaForCausalLM"
    assert run(code + REGISTERED, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "False\n"
    assert run(code + "; import moacompress" + REGISTERED, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "True\n"


@pytest.mark.parametrize("first", ["torch", "transformers.modeling_utils"])
def test_a_failure_is_said_once_and_breaks_nothing(first: str) -> None:
    done = run(
        f"""
        import sys
        sys.modules["moacompress.runtime.hf.loading"] = None
        import {first}, torch
        from transformers import LlamaForCausalLM
        import moacompress
        moacompress.autoload()
        print(torch.ones(2).sum().item())
        """
    )
    assert done.stdout == "2.0\n"
    assert done.stderr.startswith("moacompress: could not register with transformers: ModuleNotFoundError: ")
    assert done.stderr.count("\n") == 1


def test_import_torch_does_not_import_transformers() -> None:
    assert run("import torch, sys; print('transformers' in sys.modules, 'moacompress' in sys.modules)").stdout == (
        "False False\n"
    )


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands in modules of its own for transformers and for the module that registers."""
    (tmp_path / "fake_after.py").write_text("import builtins\nVALUE = builtins.len('abc')\n")
    (tmp_path / "fake_registers.py").write_text("import fake_after\nSEEN = fake_after.VALUE\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(autoload_module, "AFTER", "fake_after")
    monkeypatch.setattr(autoload_module, "REGISTERS", "fake_registers")
    monkeypatch.setattr(autoload_module, "_reported", False)
    yield tmp_path
    for name in ("fake_after", "fake_registers"):
        sys.modules.pop(name, None)


def finders() -> int:
    return sum(isinstance(finder, autoload_module._Finder) for finder in sys.meta_path)


def test_the_finder_comes_once_and_goes_when_it_has_served(fakes: Path) -> None:
    before = finders()
    autoload()
    autoload()
    assert finders() == max(before, 1)
    assert "fake_registers" not in sys.modules
    module = importlib.import_module("fake_after")
    assert sys.modules["fake_registers"].SEEN == 3
    assert type(module.__loader__) is SourceFileLoader
    assert module.__spec__ is not None
    assert module.__spec__.loader is module.__loader__
    assert finders() == 0
    assert importlib.reload(module) is module


def test_what_has_been_imported_registers_at_once(fakes: Path) -> None:
    importlib.import_module("fake_after")
    autoload()
    assert sys.modules["fake_registers"].SEEN == 3


def test_an_import_that_fails_may_be_tried_again(fakes: Path) -> None:
    autoload()
    (fakes / "fake_after.py").write_text("raise RuntimeError('first')")
    importlib.invalidate_caches()
    with pytest.raises(RuntimeError, match="first"):
        importlib.import_module("fake_after")
    assert "fake_registers" not in sys.modules
    (fakes / "fake_after.py").write_text("VALUE = 4  # now it works")
    importlib.invalidate_caches()
    importlib.import_module("fake_after")
    assert sys.modules["fake_registers"].SEEN == 4


def test_a_module_that_calls_it_while_it_is_imported(fakes: Path) -> None:
    (fakes / "fake_after.py").write_text(
        "import _moacompress_autoload\n_moacompress_autoload.autoload()\nimport sys\n"
        "assert 'fake_registers' not in sys.modules\nVALUE = 5\n"
    )
    module = importlib.import_module("fake_after")
    assert module.VALUE == 5
    assert sys.modules["fake_registers"].SEEN == 5
    assert type(module) is type(sys)


def test_failures_are_said_once(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fakes / "fake_registers.py").write_text("raise RuntimeError('two\\nlines')")
    importlib.import_module("fake_after")
    autoload()
    autoload()
    said = capsys.readouterr().err
    assert said == "moacompress: could not register with transformers: RuntimeError: two lines\n"


def test_a_module_that_is_not_there_is_not_found(fakes: Path) -> None:
    (fakes / "fake_after.py").unlink()
    importlib.invalidate_caches()
    autoload()
    with pytest.raises(ModuleNotFoundError, match="fake_after"):
        importlib.import_module("fake_after")
