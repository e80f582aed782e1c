"""Where the plan of a run lies, and which of two it runs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from moacompress.core.errors import ArtefactError
from moacompress.models.locate import find_plan_file, find_running_plan
from moacompress.rules.plan import Plan


def test_a_run_with_a_checkpoint_runs_the_checkpoints_plan(compressed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(compressed, run)
    model = run / "model" / "plan.json"
    assert find_plan_file(run) == find_running_plan(run) == model
    plan = Plan.load(model)
    plan.save(run / "plan.json")
    assert find_plan_file(run) == run / "plan.json"
    assert find_running_plan(run) == model
    assert find_running_plan(run / "plan.json") == run / "plan.json"
    replace(plan, rules=tuple(reversed(plan.rules))).save(run / "plan.json")
    with pytest.raises(ArtefactError, match="is another plan than that which .*model runs; name one of the two"):
        find_running_plan(run)
    shutil.rmtree(run / "model")
    assert find_running_plan(run) == run / "plan.json"
