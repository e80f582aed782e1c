"""On every tested version of transformers the plan's cache is what really runs, wherever a cache is handed on.

A model swallows an argument that it does not know, and then runs without the cache or makes one of its own. So these tests look
at what caches hold and at what each forward found in them, and no other cache may be made.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer

from moacompress.calibration.data.answers import generate_greedy
from moacompress.core.errors import UnsupportedError
from moacompress.estimate.estimator import Estimator
from moacompress.estimate.work import Kind
from moacompress.evaluation.runner import evaluate
from moacompress.evaluation.scoring.prompts import score_batch
from moacompress.evaluation.scoring.text import read
from moacompress.evaluation.tasks.cases import Case
from moacompress.runtime import PlanCache, attach
from moacompress.runtime.compat import private_names, versions
from moacompress.runtime.compat.alternates import CACHE_NAMES, cache_argument, returned_cache
from tests import plan_kinds
from tests.runtime.forwards import GREEDY, difference, in_parts, logits, plan_of
from tests.runtime.test_compat import product_files

ROOT = Path(__file__).resolve().parents[2]
NEW = 6
"""Tokens that are generated."""


@dataclass
class Forwards:
    """What forwards under a plan found in their caches.

    Attributes:
        seen: cache, tokens in it, and tokens fed, of each forward with a cache.
        others: caches of another kind that were made.
    """

    seen: list[tuple[PlanCache, int, int]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def of(self, cache: Any) -> list[tuple[int, int]]:
        return [(held, fed) for one, held, fed in self.seen if one is cache]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Forwards:
    """Notes every forward under a plan, and every cache of transformers' own that is made."""
    noted, expect, own = Forwards(), PlanCache.expect, DynamicCache.__init__

    def expected(self: Any, real: Any, last_position: Any, tokens: int) -> None:
        noted.seen.append((self, self.get_seq_length(), tokens))
        expect(self, real, last_position, tokens)

    def made(self: Any, *arguments: Any, **rest: Any) -> None:
        noted.others.append(type(self).__name__)
        own(self, *arguments, **rest)

    monkeypatch.setattr(PlanCache, "expect", expected)
    monkeypatch.setattr(DynamicCache, "__init__", made)
    return noted


@pytest.fixture
def ids(token_ids: Callable[..., torch.Tensor]) -> torch.Tensor:
    """A prompt of 150 tokens."""
    return token_ids(1, 150)


def generated(model: Any, ids: torch.Tensor, **given: Any) -> Any:
    asked = {**GREEDY, "max_new_tokens": NEW, "attention_mask": torch.ones_like(ids), **given}
    return model.generate(ids, return_dict_in_generate=True, **asked)


def test_generate_runs_with_the_plans_cache(
    family: str, model: Callable[..., Any], ids: torch.Tensor, forwards: Forwards
) -> None:
    made = model(family, plan=plan_kinds.gates)
    out = generated(made, ids)
    cache, plan = returned_cache(out), plan_of(made)
    assert isinstance(cache, PlanCache)
    assert forwards.of(cache) == [(0, 150), *((150 + step, 1) for step in range(NEW - 1))]
    assert len(forwards.seen) == NEW
    assert forwards.others == []
    assert cache.get_seq_length() == 150 + NEW - 1
    assert cache.used_bytes() == plan.kv_bytes(150 + NEW - 1)
    assert sum(cache.step_routes.values()) == plan.model.layers * (NEW - 1)
    layers: Any = cache.layers
    for layer, row in zip(layers, plan.rules, strict=True):
        assert (layer.held.selected is not None) == any(rule.selects for rule in row)
    assert torch.equal(out.sequences, generated(made, ids, use_cache=False).sequences)


def test_generate_goes_on_from_a_cache(
    model: Callable[..., Any], ids: torch.Tensor, token_ids: Any, forwards: Forwards
) -> None:
    made = model()
    first = generated(made, ids)
    longer = torch.cat((first.sequences, token_ids(1, 9, seed=1)), 1)
    forwards.seen.clear()
    cache = returned_cache(first)
    again = generated(made, longer, **cache_argument(cache))
    assert returned_cache(again) is cache
    assert forwards.of(cache)[0] == (150 + NEW - 1, 10), "only what the cache does not hold is read"
    assert forwards.others == []
    assert torch.equal(again.sequences, generated(made, longer).sequences)


@pytest.mark.parametrize(("kind", "name"), [("windows", CACHE_NAMES[0]), ("gates", CACHE_NAMES[1])])
def test_a_forward_runs_with_the_cache_that_it_is_given(
    kind: str, name: str, model: Callable[..., Any], ids: torch.Tensor, forwards: Forwards
) -> None:
    """Under its name of every version: one that is not this version's would be swallowed."""
    made = model(plan=plan_kinds.KINDS[kind])
    cache, sizes = PlanCache(plan_of(made)), (100, 1, 30, 1, 18)

    def run(part: torch.Tensor, **given: Any) -> Any:
        out = made(part, use_cache=True, **{name: cache})
        assert returned_cache(out) is cache
        return out

    found = in_parts(run, ids, sizes)
    assert [fed for _, fed in forwards.of(cache)] == list(sizes)
    assert [held for held, _ in forwards.of(cache)] == [0, 100, 101, 131, 132]
    assert cache.used_bytes() == plan_of(made).kv_bytes(150)
    assert forwards.others == []
    assert difference(found, logits(made, ids, use_cache=False)) <= 1e-4


def test_an_evaluation_runs_with_the_plans_cache(compressed: Path, tmp_path: Path, forwards: Forwards) -> None:
    """Prompts are read once, and every answer goes on from what was read."""
    report = evaluate(
        compressed, against=(), tasks=("needle-noise",), lengths=(700,), prompts=1, out=tmp_path / "eval.json"
    )
    assert report["results"]
    caches = {id(cache): cache for cache, _, _ in forwards.seen}
    fresh = [fed for _, held, fed in forwards.seen if not held]
    steps = [held for _, held, fed in forwards.seen if fed == 1]
    assert len(caches) >= 2, "the answer is scored from one, and generated from another"
    assert max(fresh) > 500
    assert steps
    assert min(steps) > 500
    assert forwards.others == []


def test_text_is_scored_with_the_cache_that_it_is_given(
    model: Callable[..., Any], ids: torch.Tensor, forwards: Forwards
) -> None:
    made, window = model(), ids[0].tolist()
    cache = PlanCache(plan_of(made))
    found = read(made, window, cache, (50, 50, 50))
    assert forwards.of(cache) == [(0, 50), (50, 50), (100, 50)]
    assert cache.used_bytes() == plan_of(made).kv_bytes(150)
    assert difference(found.states, read(made, window).states) <= 1e-4


@pytest.fixture
def stock_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes how many tokens each layer of transformers' own cache held when it was given one more."""
    held, update = list[int](), DynamicLayer.update

    def updated(self: Any, keys: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if keys.shape[-2] == 1:
            held.append(self.get_seq_length())
        return update(self, keys, *rest, **more)

    monkeypatch.setattr(DynamicLayer, "update", updated)
    return held


def test_a_stock_model_is_scored_with_its_cache(
    tiny_model: Callable[..., Any], tiny_tokenizer: Any, token_ids: Any, stock_steps: list[int]
) -> None:
    """As those with quantized caches are: no plan is there to see to it."""
    model, ids = tiny_model(), token_ids(1, 300)[0].tolist()
    case = Case("t", 300, ids, [5, 6], [True, True], ("~~",), "all", 4)
    score_batch(model, tiny_tokenizer, [case])
    assert len(stock_steps) >= 3 * model.config.num_hidden_layers
    assert min(stock_steps) >= 299
    cache = DynamicCache(config=model.config)
    read(model, ids[:150], cache, (50, 50, 50))
    assert cache.get_seq_length() == 150


def test_answers_of_a_dense_model_go_on_from_what_it_has_read(tiny_model: Callable[..., Any], token_ids: Any) -> None:
    model, ids = tiny_model(), token_ids(1, 60)
    with torch.inference_mode():
        cache = returned_cache(model(ids[:, :40], use_cache=True))
    assert isinstance(cache, DynamicCache)
    answers = generate_greedy(model, ids.tolist(), NEW, cache)
    assert cache.get_seq_length() >= 60
    assert answers == generate_greedy(model, ids.tolist(), NEW)


def test_a_step_is_timed_behind_its_prompt(tiny_model: Callable[..., Any], stock_steps: list[int]) -> None:
    Estimator(tiny_model(), "cpu").one(Kind.STEP, 100)
    assert stock_steps
    assert min(stock_steps) >= 100


def calls_that_hand_on_a_cache(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields what a module calls with a cache under a fixed name, and attributes and keys of such a name; with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            named = [word.arg for word in node.keywords if word.arg in CACHE_NAMES]
            called = ast.unparse(node.func).rpartition(".")[2]
            if named and (
                called in ("model", "decoder", "generate", "forward", "_model", "partial") or called.endswith(")")
            ):
                yield ast.unparse(node.func), node.lineno
        elif isinstance(node, ast.Constant) and node.value in ("past_key_values", "layer_past"):
            yield node.value, node.lineno
        elif isinstance(node, ast.Dict):
            yield from (
                (str(key.value), key.lineno)
                for key in node.keys
                if isinstance(key, ast.Constant) and key.value in CACHE_NAMES
            )
        elif isinstance(node, ast.Attribute) and node.attr in CACHE_NAMES:
            whose = ast.unparse(node.value)
            if whose.startswith(("out", "result", "read")) or whose.endswith(")"):
                yield ast.unparse(node), node.lineno


def test_the_product_names_no_cache_by_itself() -> None:
    named = {
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in (*product_files(), *(ROOT / "benchmarks").glob("*.py"))
        if path.name != "alternates.py"
        for what, line in calls_that_hand_on_a_cache(ast.parse(path.read_text("utf-8")))
    }
    assert named == set()
    for code in (
        "model(ids, cache=c)",
        "m.generate(i, past_key_values=c)",
        "{'cache': c}",
        "out.cache",
        "m(ids).cache",
    ):
        assert [*calls_that_hand_on_a_cache(ast.parse(code))], "the search finds them"


def test_a_checkpoint_of_another_version_computes_the_same() -> None:
    """Those that `tests/versions.py` has had other versions write, with what they computed."""
    given = os.environ.get("MOACOMPRESS_TEST_CHECKPOINTS")
    if not given:
        pytest.skip("`make test-versions` has every version write checkpoints for the others")
    folders = sorted(path.parent for path in Path(given).glob("*/*/computed.json"))
    assert folders
    for folder in folders:
        written = json.loads((folder / "computed.json").read_text("utf-8"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        out = generated(model, torch.tensor(written["ids"]), output_logits=True)
        assert isinstance(returned_cache(out), PlanCache), folder
        assert plan_of(model).key() == written["plan"], folder
        assert out.sequences.tolist() == written["sequences"], folder
        logits = torch.stack(out.logits, 1)[0, :, :8]
        assert torch.allclose(logits, torch.tensor(written["logits"]), atol=1e-3, rtol=1e-3), folder


@pytest.fixture
def as_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Returns a function that makes transformers say it is another version."""

    def pretend(full: str) -> None:
        monkeypatch.setattr(versions, "installed", lambda: full)
        private_names.check_installed.cache_clear()

    yield pretend
    private_names.check_installed.cache_clear()


def test_an_untested_version_is_warned_of_once(
    as_version: Callable[[str], None],
    tiny_model: Callable[..., Any],
    compressed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    as_version("5.99.1")
    model = tiny_model()
    for _ in range(2):
        attach(model, plan_kinds.windows(tiny_model()))
    AutoModelForCausalLM.from_pretrained(compressed / "model")
    said = [record.getMessage() for record in caplog.records if record.name == private_names.__name__]
    assert len(said) == 1
    for part in ("5.99.1", versions.tested_range(), "moacompress doctor", versions.requirement()):
        assert part in said[0]


def test_an_untested_version_that_lacks_something_is_refused(
    as_version: Callable[[str], None],
    tiny_model: Callable[..., Any],
    compressed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = private_names.Broken("transformers.a.b", "seeing", "is missing")
    monkeypatch.setattr(private_names, "check", lambda: [lost, lost])
    model, plan = tiny_model(), plan_kinds.windows(tiny_model())
    attach(model, plan)  # a tested one is not looked at
    as_version("5.99.1")
    for attempt in (lambda: attach(model, plan), lambda: AutoModelForCausalLM.from_pretrained(compressed / "model")):
        with pytest.raises(UnsupportedError) as refusal:
            attempt()
        said = str(refusal.value)
        assert "\n" not in said
        assert "does not run with transformers 5.99.1" in said
        assert "transformers.a.b is missing; it is for seeing, and 1 more" in said
        assert versions.requirement() in said


def test_the_tested_versions_are_one_list() -> None:
    minors = [versions.minor(one) for one in versions.TESTED]
    assert minors == [(5, number) for number in range(minors[0][1], minors[-1][1] + 1)]
    assert versions.is_tested(versions.installed())
    assert not versions.is_tested("5.99.0")
    asked = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'"transformers>={versions.TESTED[0]}"' in asked
    readme = (ROOT / "README.md").read_text("utf-8")
    assert versions.tested_range() in " ".join(readme.split())
