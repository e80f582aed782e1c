"""What a search writes: the plan of lowest KL, the baselines beside it, and why it is as it is."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from moacompress.report.search_tables import baseline_line
from moacompress.rules.plan import Plan
from moacompress.search import study
from moacompress.search.search_context import Incumbent, SearchContext
from tests.search.conftest import FakeObjective, Search, make_profile


def test_the_plan_of_every_baseline_is_beside_the_found_one(search: Search, tmp_path: Path) -> None:
    result, fake = search(make_profile(trials=1), out=tmp_path / "plan.json")
    written = {path.stem: Plan.load(path) for path in (tmp_path / "plan.baselines").iterdir()}
    assert set(written) == {"uniform", "per_layer", "duo"}
    for family, plan in written.items():
        assert plan.key() == result.plan.quality["baselines"][family]["key"]
        order = np.random.default_rng(fake.profile.recipe.seed).permutation(fake.size)
        measured = order[: result.plan.quality["baselines"][family]["samples"]]
        assert np.mean(np.array(fake.kls(plan))[measured]) == pytest.approx(result.harm[family])
        assert plan.quality["measured_harm"]["plan"] == result.harm[family]
        assert plan.provenance["baseline"] == family
    search(make_profile(trials=1, alternatives=False), out=tmp_path / "other.json")
    assert not (tmp_path / "other.baselines").exists()


def test_a_better_uniform_window_is_returned_and_said(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeObjective, "_cost", lambda self, layer, head, rule: 0.1 if rule in self.index else 0.01)
    result, _ = search(make_profile(trials=3))
    beside = result.plan.quality["best_baseline"]
    assert (beside["family"], beside["verdict"], beside["saved"]) == ("uniform", "worse", True)
    assert beside["harm"] == result.harm["uniform"] < beside["found_harm"]
    (line,) = baseline_line(beside)
    assert line.startswith("The baseline uniform window (")
    assert "beats the best searched plan" in line
    assert len({rule for row in result.plan.rules for rule in row}) == 1
    assert result.harm["plan"] == result.harm["uniform"] < result.harm["trial0"]


def test_the_last_step_of_a_whole_search_stays(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the budget is spent also where that measures a little worse; the best trial's plan is on disk by then."""

    def worse(incumbent: Incumbent, context: SearchContext) -> Incumbent:
        return replace(incumbent, kls=[kl + 0.01 for kl in incumbent.kls], stage="rest")

    monkeypatch.setattr(study, "STEPS", (*study.STEPS[:-1], worse))
    found, _ = search(make_profile(trials=14), out=tmp_path / "plan.json")
    assert any(stage["kept"] for stage in found.explanation["stages"] if stage["name"] == "study")
    assert found.plan.provenance["stage"] == "rest"


def test_the_explanation_says_which_heads_and_why(search: Search) -> None:
    result, fake = search(make_profile(trials=14))
    told = result.explanation
    rows = told["heads"]
    shape = fake.profile.shape
    assert len(rows) == shape.layers * shape.kv_heads
    saves = [row["saves"] for row in rows]
    assert saves == sorted(saves, reverse=True)
    for row in rows[:4]:
        rule = result.plan.rules[row["layer"]][row["kv_head"]]
        assert row["rule"] == ("full" if rule.is_full else asdict(rule))
        assert row["kept"] == rule.kept(512, 32, shape.native_windows[row["layer"]])
    assert saves[0] > 0
    assert sum(told["knobs"].values()) == pytest.approx(1.0)
    assert told["predicted"]["spearman"] <= 1
    assert told["harm"] == result.harm
