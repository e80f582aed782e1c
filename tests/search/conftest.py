"""Synthetic profiles with heavy-tailed influence, and a stand-in for the model that measures a hidden truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.sharing import copyable
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.recipe import Recipe
from moacompress.rules.candidates import candidate_rules
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.search.sharing.copy_costs import CopyCosts
from tests.conftest import tiny_model

Search = Callable[..., tuple[Any, Any]]
"""What the fixture `search` is."""
LENGTHS = (256, 512)
MIN_WINDOW = 32


def keep_shares(rules: tuple[Rule, ...], n: int, natives: tuple[int | None, ...]) -> np.ndarray:
    """[layers, rules]: kept / n."""
    return np.array([[rule.kept(n, MIN_WINDOW, native) / n for rule in rules] for native in natives])


def make_profile(
    layers: int = 6,
    kv_heads: int = 2,
    seed: int = 0,
    samples: int = 8,
    formats: bool = False,
    anchors: int = 0,
    copying: float = 1.0,
    **search: Any,
) -> Profile:
    """A profile of a model that does not exist: a few KV heads matter a lot, most hardly at all; so do formats, if wanted.

    Where every layer was tried with some `anchors`, `copying` says how much copies cost.
    """
    rng = np.random.default_rng(seed)
    natives = tuple(64 if layer % 5 == 4 else None for layer in range(layers))
    shape = ModelShape("llama", layers, 2 * kv_heads, kv_heads, 16, "float32", natives, f"weights{seed}")
    rules = candidate_rules(max(LENGTHS), (4, 16, 64), MIN_WINDOW)
    weight = np.exp(rng.normal(-4, 2.5, (layers, kv_heads, 1)))
    steep = rng.uniform(1, 4, (layers, kv_heads, 1))
    lengths = np.repeat(LENGTHS, 4)
    squares = np.stack(
        [
            weight * (1 - keep_shares(rules, n, natives))[:, None] ** steep * np.exp(rng.normal(0, 0.5, (2, 1, 1, 1)))
            for n in lengths
        ]
    ).astype(np.float32)
    squares[..., 0] = 0
    arrays = {"squares": squares[:, 0], "total": np.sqrt(squares)}
    other = np.random.default_rng([seed, 1])
    for side, size in (("key", 1e-2), ("value", 1e-3)) if formats else ():
        heads = size * np.exp(other.normal(-2, 1.5, (layers, kv_heads, 1)))
        of_formats = heads * np.array([0, 5e-3, 0.07, 1]) * np.exp(other.normal(0, 0.5, (len(lengths), 2, 1, 1, 1)))
        arrays[f"{side}_squares"] = of_formats[:, 0].astype(np.float32)
        arrays[f"{side}_total"] = np.sqrt(of_formats).astype(np.float32)
    if anchors:
        of_copies = len(lengths), layers, anchors, kv_heads, kv_heads
        costs = (
            np.exp(np.random.default_rng([seed, 2]).normal(-3, 2, of_copies[1:]))
            * copyable(natives, anchors)[..., None, None]
        )
        arrays["copy_squares"] = np.broadcast_to(copying * costs, of_copies).astype(np.float32)
    ids = rng.integers(3, 99, (samples, max(LENGTHS)))
    validation = [
        Sample(ids[i, :n].astype(np.int64), np.arange(n) >= n - 4, "needle/noise", n)
        for i, n in enumerate(np.resize(LENGTHS, samples).tolist())
    ]
    recipe = Recipe.from_dict(
        {
            "calibration": {"lengths": list(LENGTHS)},
            "search": {"trials": 8, **search},
            "profile": {"min_window": MIN_WINDOW, "anchors": anchors},
        }
    )
    return Profile(
        path=Path("profile"),
        source="model",
        shape=shape,
        lengths=LENGTHS,
        rules=rules,
        min_window=MIN_WINDOW,
        recipe=recipe,
        fingerprint=f"profile{seed}",
        calibration_fingerprint="calibration",
        validation=validation,
        seconds=1.0,
        sample_lengths=lengths.astype(np.int64),
        sample_kinds=("answer",) * len(lengths),
        statistics=Statistics(arrays),
    )


class FakeObjective:
    """KL by a hidden truth near the profile's: no model runs.

    Attributes:
        calls: (plan key, sample) measured, in order.
        dies_at: number of the measurement at which it fails; None for never.
    """

    def __init__(self, profile: Profile, dies_at: int | None = None) -> None:
        profile = profile.offering(profile.profiled_formats)
        self.profile, self.size, self.dies_at = profile, len(profile.validation), dies_at
        self.calls: list[tuple[str, int]] = []
        rng = np.random.default_rng(7)
        truth = profile.influence("robust").mean(0) * np.exp(
            rng.normal(0, 1, (*profile.influence("robust").shape[1:3], 1))
        )
        self.scale = float(truth.max())
        self.truth = truth / self.scale
        self.sample_scale = np.exp(rng.normal(0, 0.7, self.size))
        self.index = {rule: number for number, rule in enumerate(profile.rules)}

    @contextmanager
    def under(self, plan: Plan) -> Iterator[Callable[[int], float]]:
        def kl(number: int) -> float:
            if len(self.calls) == self.dies_at:
                raise KeyboardInterrupt
            self.calls.append((plan.key(), number))
            total = sum(
                self._cost(layer, head, rule) for layer, row in enumerate(plan.rules) for head, rule in enumerate(row)
            )
            if plan.shares:
                total += CopyCosts.of(self.profile).cost(plan.shares) / self.scale
            return float(total * self.sample_scale[number])

        yield kl

    def kls(self, plan: Plan) -> list[float]:
        """The KL of a plan on every sample."""
        with self.under(plan) as kl:
            return [kl(number) for number in range(self.size)]

    def _cost(self, layer: int, head: int, rule: Rule) -> float:
        if rule in self.index:
            return float(self.truth[layer, head, self.index[rule]])
        keeps = rule.kept(512, MIN_WINDOW) / 512  # a uniform window is no candidate
        whole = self.index[replace(Rule.FULL, key_format=rule.key_format, value_format=rule.value_format)]
        widths = self.truth[layer, head, : len(self.profile.spans)]
        return float(widths.max() * (1 - keeps) ** 2 + self.truth[layer, head, whole])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Everything here is tiny: threads that wait for each other only cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Clock:
    """A clock that only measurements move: each takes a second."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from moacompress.search import deadline, study

    clock = Clock()
    honest = FakeObjective.under

    @contextmanager
    def under(self: Any, plan: Plan) -> Iterator[Callable[[int], float]]:
        with honest(self, plan) as kl:

            def timed(number: int) -> float:
                clock.now += 1
                return float(kl(number))

            yield timed

    monkeypatch.setattr(FakeObjective, "under", under)
    for module in (deadline, study):
        monkeypatch.setattr(module, "time", clock)
    return clock


def model_of(profile: Profile) -> Any:
    """What searches take for a profile's model, where none runs."""
    return SimpleNamespace(model=None, source="model", shape=profile.shape, computes_in=profile.shape.dtype)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lets searches run without a model; gives the stand-in that counts, and what `find_plan` takes for the model."""
    from moacompress.search import study

    def pretend(profile: Profile, dies_at: int | None = None) -> tuple[FakeObjective, Any]:
        fake = FakeObjective(profile, dies_at)
        monkeypatch.setattr(study, "Objective", lambda model, samples, *weights: fake)
        return fake, model_of(profile)

    return pretend


@pytest.fixture
def search(pretended: Callable[..., Any]) -> Search:
    """Runs `find_plan` without a model; returns the result, None where it died, and the stand-in that counted."""
    from moacompress.search.study import find_plan

    def run(
        profile: Profile | None = None, budget: Any = "50%", dies_at: int | None = None, **arguments: Any
    ) -> tuple[Any, Any]:
        profile = profile or make_profile()
        fake, model = pretended(profile, dies_at)
        arguments.setdefault("model", model)
        try:
            return find_plan(profile, budget, **arguments), fake
        except KeyboardInterrupt:
            return None, fake

    return run


@pytest.fixture(scope="module")
def source(tiny_tokenizer: Any) -> Any:
    """A tiny model, as `load_source` gives a real one."""
    from moacompress.models.source import SourceModel, model_shape

    model = tiny_model("llama")
    return SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)


def random_samples(source: Any, recipe: Recipe, split: str, progress: Any = None, answers: Any = None) -> list[Sample]:
    """Stands in for the data, `build_samples`: random ids."""
    rng = np.random.default_rng([recipe.seed, split == "calibration"])
    count = recipe.calibration.samples if split == "calibration" else recipe.calibration.validation_samples
    lengths = np.sort(np.resize(recipe.calibration.lengths, count)).tolist()
    return [Sample(rng.integers(3, 150, n - 1), np.arange(n - 1) > n - 8, "random", n) for n in lengths]


def random_profile(source: Any, out: Path, recipe: Recipe, samples: Callable[..., Any] = random_samples) -> Profile:
    """Profiles a model on random ids."""
    from moacompress.calibration.profile.profiler import profile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moacompress.calibration.data.sample_sources.build_samples", samples)
        patch.setattr("moacompress.calibration.data.sample_sources.make_drafts", lambda *arguments: [])
        return profile(source, out, recipe)
