"""Registering with transformers: in every order of imports, never in the way of `import torch`."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

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
        """
        import sys, torch
        assert not {"transformers", "moacompress"} & {*sys.modules}
        from transformers import LlamaForCausalLM
        """,
        pytest.param("import moacompress; from transformers import LlamaForCausalLM", marks=pytest.mark.heavy),
    ],
)
def test_orders_of_imports(code: str) -> None:
    done = run(textwrap.dedent(code) + REGISTERED)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_the_switch_of_torch_turns_it_off_and_importing_turns_it_on() -> None:
    code = "from transformers import LlamaForCausalLM" + REGISTERED + "import moacompress" + REGISTERED
    assert run(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0").stdout == "False\nTrue\n"


def test_a_config_is_known_before_any_model_is() -> None:
    code = "import torch; import transformers.quantizers.auto as auto; AutoQuantizationConfig = auto.AutoQuantizationConfig"
    reads = """
try:
    AutoQuantizationConfig.from_dict({"quant_method": "moacompress", "plan": {"version": 99}})
except Exception as error:
    print(type(error).__name__)
"""
    done = run(code + reads)
    assert (done.stdout, done.stderr) == ("PlanError\n", "")


@pytest.mark.heavy
def test_a_failure_is_said_once_and_breaks_nothing() -> None:
    done = run(
        """
        import sys
        sys.modules["moacompress.runtime.hf.loading"] = None
        import transformers.quantizers.auto, torch
        from transformers import LlamaForCausalLM
        import moacompress
        moacompress.autoload()
        print(torch.ones(2).sum().item())
        """
    )
    assert done.stdout == "2.0\n"
    assert done.stderr.startswith("moacompress: could not register with transformers: ModuleNotFoundError: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands in modules of its own for those of transformers and for the module that registers."""
    (tmp_path / "fake_auto.py").write_text("KNOWN = []\n")
    (tmp_path / "fake_models.py").write_text("from fake_auto import KNOWN\nassert not KNOWN\nVALUE = 3\n")
    (tmp_path / "fake_registers.py").write_text(
        "import fake_auto, fake_models\nSEEN = fake_models.VALUE\n"
        "def register():\n    fake_auto.KNOWN[:] = ['moacompress']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if type(finder) is not autoload_module._Finder]
    )
    monkeypatch.setattr(autoload_module, "WATCHED", ("fake_models", "fake_auto"))
    monkeypatch.setattr(autoload_module, "REGISTERS", "fake_registers")
    monkeypatch.setattr(autoload_module, "_reported", False)
    yield tmp_path
    for name in ("fake_models", "fake_auto", "fake_registers"):
        sys.modules.pop(name, None)


def rewrite(file: Path, text: str) -> None:
    file.write_text(text)
    importlib.invalidate_caches()


def test_it_registers_when_something_is_taken(fakes: Path) -> None:
    autoload()
    autoload()
    assert [type(finder) for finder in sys.meta_path].count(autoload_module._Finder) == 1
    for name in ("fake_models", "fake_auto"):
        module = importlib.import_module(name)
        assert type(module.__loader__) is SourceFileLoader
        assert module.__spec__ is not None
        assert module.__spec__.loader is module.__loader__
    assert "fake_registers" not in sys.modules
    assert importlib.import_module("fake_models").VALUE == 3
    assert sys.modules["fake_auto"].KNOWN == ["moacompress"]
    assert {type(sys.modules[name]) for name in ("fake_models", "fake_auto")} == {type(sys)}


@pytest.mark.parametrize(
    "how", ["import fake_auto; fake_auto.KNOWN", "from fake_auto import KNOWN", "from fake_auto import *"]
)
def test_any_way_to_take_registers(fakes: Path, how: str) -> None:
    autoload()
    taken: dict[str, Any] = {}
    exec(how, taken)
    assert taken.get("KNOWN", sys.modules["fake_auto"].KNOWN) == ["moacompress"]


def test_tools_that_look_at_every_module_find_plain_ones(fakes: Path) -> None:
    autoload()
    importlib.import_module("fake_models")
    for module in [*sys.modules.values()]:
        for name in ("__file__", "__dict__", "__path__", "__warningregistry__"):
            getattr(module, name, None)
    assert "fake_registers" not in sys.modules


def test_what_has_been_imported_registers_at_once(fakes: Path) -> None:
    known = importlib.import_module("fake_auto").KNOWN
    autoload()
    assert known == ["moacompress"]


def test_a_reload_is_registered_again(fakes: Path) -> None:
    autoload()
    module = importlib.import_module("fake_auto")
    for _ in range(2):
        assert module.KNOWN == ["moacompress"]
        assert importlib.reload(module) is module
        assert vars(module)["KNOWN"] == []
    assert module.KNOWN == ["moacompress"]


def test_an_import_that_fails_may_be_tried_again(fakes: Path) -> None:
    autoload()
    rewrite(fakes / "fake_models.py", "raise RuntimeError('first')")
    with pytest.raises(RuntimeError, match="first"):
        importlib.import_module("fake_models")
    assert "fake_registers" not in sys.modules
    rewrite(fakes / "fake_models.py", "VALUE = 4  # now it works")
    assert importlib.import_module("fake_models").VALUE == 4
    assert sys.modules["fake_auto"].KNOWN == ["moacompress"]


@pytest.mark.parametrize("calling", ["fake_models", "fake_auto"])
def test_a_module_that_calls_it_while_it_is_imported(fakes: Path, calling: str) -> None:
    own = (fakes / f"{calling}.py").read_text()
    rewrite(
        fakes / f"{calling}.py",
        f"import _moacompress_autoload\n_moacompress_autoload.autoload()\n{own}import sys\n"
        "assert 'fake_registers' not in sys.modules\n",
    )
    importlib.import_module(calling)
    assert importlib.import_module("fake_auto").KNOWN == ["moacompress"]
    assert importlib.import_module("fake_models").VALUE == 3
    assert {type(sys.modules[name]) for name in ("fake_models", "fake_auto")} == {type(sys)}


def test_threads_wait_for_the_one_that_registers(fakes: Path) -> None:
    rewrite(fakes / "fake_registers.py", "import time\ntime.sleep(0.3)\n" + (fakes / "fake_registers.py").read_text())
    autoload()
    with ThreadPoolExecutor(4) as pool:
        seen = pool.map(lambda name: [*importlib.import_module(name).KNOWN], ["fake_auto", "fake_models"] * 2)
        assert [*seen] == [["moacompress"]] * 4


def test_a_thread_waits_for_another_that_imports(fakes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(autoload_module, "events", (inside, go_on), raising=False)
    waits = "import _moacompress_autoload\ninside, go_on = _moacompress_autoload.events\ninside.set(); go_on.wait(30)\n"
    rewrite(fakes / "fake_models.py", (fakes / "fake_models.py").read_text().replace("VALUE", waits + "VALUE"))
    autoload()
    with ThreadPoolExecutor(2) as pool:
        importing = pool.submit(lambda: importlib.import_module("fake_models").VALUE)
        assert inside.wait(30)
        taking = pool.submit(lambda: [*importlib.import_module("fake_auto").KNOWN])
        with pytest.raises(TimeoutError):
            taking.result(0.3)
        go_on.set()
        assert taking.result(30) == ["moacompress"]
        assert importing.result(30) == 3


def test_failures_are_said_once(fakes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(fakes / "fake_registers.py", "raise RuntimeError('two\\nlines')")
    autoload()
    assert importlib.import_module("fake_models").VALUE == 3
    autoload()
    autoload()
    said = capsys.readouterr().err
    assert said == "moacompress: could not register with transformers: RuntimeError: two lines\n"


def test_a_module_that_is_not_there_is_not_found(fakes: Path) -> None:
    (fakes / "fake_auto.py").unlink()
    importlib.invalidate_caches()
    autoload()
    with pytest.raises(ModuleNotFoundError, match="fake_auto"):
        importlib.import_module("fake_auto")
