"""Code that comes with a model runs where this very command says so, and nothing on disk says it for another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from moacompress.core.errors import RecipeError
from moacompress.exporter.exporting import export
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from tests.cli.commands import answer, invoke
from tests.cli.conftest import QUICK
from tests.plan_kinds import random_plan

CODE = """
from pathlib import Path
from transformers import LlamaForCausalLM


class Coded(LlamaForCausalLM):
    def __init__(self, *args, **kwargs):
        with Path({mark!r}).open("a") as file:
            file.write("ran ")
        super().__init__(*args, **kwargs)
"""
FLAG = "--trust-remote-code"
IDS = torch.arange(200)[None] % 150 + 4


class Coded:
    """A dense model with code of its own, and whether that ran since it was last asked."""

    def __init__(self, folder: Path, mark: Path) -> None:
        self.folder, self._mark = folder, mark

    def ran(self) -> bool:
        found = self._mark.exists()
        self._mark.unlink(missing_ok=True)
        return found


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Coded:
    place = tmp_path_factory.mktemp("coded")
    found = Coded(place / "dense", place / "mark")
    shutil.copytree(tiny_folder, found.folder)
    (found.folder / "coded.py").write_text(CODE.format(mark=str(place / "mark")))
    file = found.folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModelForCausalLM": "coded.Coded"}}))
    return found


def says_so(folder: Path) -> list[Path]:
    """Returns the files that speak of consent."""
    return [path for path in folder.rglob("*") if path.is_file() and b"trust_remote_code" in path.read_bytes()]


def give_consent(folder: Path) -> None:
    """Makes files what somebody may put there: their recipes say that code may run."""
    of_model = ("model/plan.json", "model/config.json", "model/recipe.json")
    for name in ("profile/profile.json", "plan.json", *of_model, "recipe.json"):
        if (path := folder / name).exists():
            data = json.loads(path.read_text())
            plan = data.get("quantization_config", {}).get("plan", data)
            recipe = plan.get("recipe") or plan.get("provenance", {}).get("recipe") or plan
            recipe["trust_remote_code"] = True
            path.write_text(json.dumps(data))


@pytest.fixture(scope="module")
def place(coded: Coded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a profile, a plan and a compressed model, all made with the flag."""
    place = tmp_path_factory.mktemp("consent")
    answer("profile", coded.folder, "-o", place / "profile", *QUICK.split(), FLAG)
    assert coded.ran()
    quick = ("--trials", "1")
    answer("search", place / "profile", "--budget", "50%", "-o", place / "plan.json", *quick, FLAG)
    assert coded.ran()
    answer("export", coded.folder, place / "plan.json", "-o", place / "model", FLAG)
    assert coded.ran()
    return place


def uses(folder: Path, out: Path) -> list[tuple[str | Path, ...]]:
    """Returns commands that load the compressed model in a folder."""
    steps = "--quick --lengths 128 --tokens 1 --repeats 1 --sides plan --no-peak"
    return [
        ("eval", folder, "--lengths", "512", "--prompts", "1", "--against", "none"),
        ("bench", folder, *steps.split()),
        ("chat", folder, "--ask", "one two", "--max-new-tokens", "2"),
        ("heal", folder, "-o", out / "healed", "--dry-run"),
    ]


def test_what_a_file_says_is_no_consent(place: Path, coded: Coded, tmp_path: Path) -> None:
    """Files that say it are refused, or what they say counts for nothing: the model's code never runs."""
    marked = tmp_path / "marked"
    shutil.copytree(place, marked)
    give_consent(marked)
    commands: list[tuple[str | Path, ...]] = [
        ("search", marked / "profile", "--budget", "60%", "--trials", "1", "-o", tmp_path / "plan.json"),
        ("export", coded.folder, marked / "plan.json", "-o", tmp_path / "model"),
        ("data", "preview", "--recipe", marked / "model" / "recipe.json", coded.folder, "--count", "1"),
    ]
    for command in [*commands, *uses(marked, tmp_path)]:
        invoke(*command)
        assert not coded.ran(), command
    with pytest.raises(RecipeError, match="unknown key 'trust_remote_code'"):
        Recipe.load(marked / "model" / "recipe.json")


def test_the_flag_is_consent(place: Path, coded: Coded, tmp_path: Path) -> None:
    """It is stored nowhere."""
    assert says_so(place) == []
    for arguments in uses(place, tmp_path):
        answer(*arguments, FLAG)
        assert coded.ran(), arguments[0]
    for name in ("compress", "inspect", "doctor", "demo", "data preview"):
        assert FLAG in invoke(*name.split(), "--help", env={"COLUMNS": "200"}).stdout


def test_what_was_made_without_the_flag_is_taken_up_with_it(place: Path, coded: Coded, tmp_path: Path) -> None:
    """Consent is in no fingerprint: artefacts with it and without it are the same."""
    old = tmp_path / "old"
    shutil.copytree(place, old)
    before = (old / "profile" / "influence.safetensors").stat().st_mtime_ns
    quick = ("--trials", "1")
    answer("profile", coded.folder, "-o", old / "profile", *QUICK.split())
    answer("search", old / "profile", "--budget", "50%", "-o", old / "plan.json", *quick)
    answer("export", coded.folder, old / "plan.json", "-o", old / "model")
    assert (old / "profile" / "influence.safetensors").stat().st_mtime_ns == before
    assert not coded.ran()


FAMILY = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({mark!r}).open("a").write("ran ")


class OwnConfig(LlamaConfig):
    model_type = "own-family"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_family(tmp_path: Path, tiny_folder: Path) -> Coded:
    """A dense model of a family that only its own code knows."""
    found = Coded(tmp_path / "own", tmp_path / "mark")
    shutil.copytree(tiny_folder, found.folder)
    (found.folder / "own.py").write_text(FAMILY.format(mark=str(tmp_path / "mark")))
    file = found.folder / "config.json"
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "own-family", "auto_map": auto_map}))
    return found


def loaded(folder: Path, trusts: bool) -> Any:
    """Returns the model that plain `from_pretrained` gives of a compressed checkpoint, and checks that it has the plan."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusts)
    plan = Plan.load(folder / "plan.json")
    with torch.no_grad():
        assert model(IDS, logits_to_keep=1).cache.kv_bytes() < plan.model.dense_kv_bytes(IDS.shape[1])
    return model


def test_from_pretrained_runs_code_only_where_the_call_says_so(place: Path, coded: Coded, tmp_path: Path) -> None:
    """A family that transformers knows attends by its own class without the flag, and alike with it."""
    folders = [place / "model", tmp_path / "again"]
    logits = []
    for trusts in (True, False):
        model = loaded(folders[0], trusts)
        assert coded.ran() == trusts == (type(model).__name__ == "Coded")
        with torch.no_grad():
            logits.append(model(IDS, logits_to_keep=4).logits)
        if trusts:
            model.save_pretrained(folders[1])
            shutil.copy(folders[0] / "plan.json", folders[1])
    assert torch.equal(*logits)
    loaded(folders[1], trusts=False)  # what was saved by a call that trusts is no consent for the next one
    assert not coded.ran()
    assert says_so(folders[1]) == []


def test_a_family_of_its_own_is_compressed_and_loaded_with_the_flag_alone(own_family: Coded, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moacompress.core.errors import ModelError
    from moacompress.models.source import load_source

    out = tmp_path / "model"
    plan = random_plan(load_source(own_family.folder, trust_remote_code=True).shape, 3)
    assert own_family.ran()
    with pytest.raises(ModelError, match="own-family.*--trust-remote-code"):
        export(own_family.folder, plan, out)
    assert not out.exists()
    assert not own_family.ran()
    export(own_family.folder, plan, out, trust_remote_code=True)
    assert own_family.ran()
    assert says_so(out) == []
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    refused = invoke("chat", out, "--ask", "one two", "--max-new-tokens", "2", "--json")
    assert (refused.exit_code, own_family.ran()) == (1, False)
    assert FLAG in refused.stderr
    assert type(loaded(out, trusts=True)).__name__ == "OwnModel"
    assert own_family.ran()
