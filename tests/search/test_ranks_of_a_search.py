"""A search by the processes of `torchrun`, a model in each: the plan is that of one process, and they share the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from moacompress.rules.plan import Plan
from tests.cli.commands import answer
from tests.preloaded import Preloaded

COUNTED = """
import atexit, os, pathlib, sys
from moacompress.cli import main
from moacompress.search.measure import objective

measure, calls = objective.kl_divergence, []

def counted(*arguments):
    calls.append(1)
    return measure(*arguments)

objective.kl_divergence = counted
place = pathlib.Path(sys.argv.pop(1)) / f"calls-{os.environ.get('RANK', 0)}"
atexit.register(lambda: place.write_text(str(len(calls))))
main()
"""


@pytest.mark.heavy
def test_processes_share_what_is_measured(
    tiny_folder: Path, small_run: dict[str, Any], tmp_path: Path, preloaded: Preloaded
) -> None:
    """Trials; also where ranks are more than samples are left."""
    calibration = {**small_run["calibration"], "lengths": [300], "samples": 2, "validation_samples": 3}
    recipe, script = tmp_path / "recipe.yaml", tmp_path / "counted.py"
    recipe.write_text(yaml.safe_dump({"calibration": calibration, "profile": {"draws": 1}, "search": {"trials": 3}}))
    script.write_text(COUNTED)
    answer("profile", tiny_folder, "--recipe", recipe, "-o", tmp_path / "profile")
    plans, calls = [], []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}" / "plan.json"
        out.parent.mkdir()
        options = ["--budget", "50%", "--recipe", str(recipe), "-o", str(out), "--json"]
        found = preloaded.run(script, out.parent, "search", tmp_path / "profile", *options, ranks=ranks)
        assert found.returncode == 0, found.stderr[-3000:]
        assert len(found.stdout.splitlines()) == 1  # the first process prints
        plans.append((Plan.load(out), json.loads(found.stdout)))
        calls.append([int((out.parent / f"calls-{rank}").read_text()) for rank in range(ranks)])
    (alone, said), (together, also) = plans
    assert together.rules == alone.rules
    harms = [plan.quality["measured_harm"]["plan"] for plan in (alone, together)]
    assert harms[1] == pytest.approx(harms[0], rel=1e-6)
    assert also.keys() == said.keys()
    ((all_calls,), shared) = calls
    assert all(0.4 * all_calls < own < 0.8 * all_calls for own in shared), calls
    assert {path.name for path in (tmp_path / "1").iterdir()} | {"calls-1"} == {
        path.name for path in (tmp_path / "2").iterdir()
    }
