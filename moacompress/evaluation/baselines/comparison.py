"""What a checkpoint is measured against, by name: dense, baselines at the plan's bytes, other checkpoints, caches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import InfeasibleBudgetError, PlanError, UsageError, did_you_mean
from moacompress.evaluation.baselines.compared_models import (
    DENSE,
    PLAN,
    STOCK,
    ComparedCheckpoint,
    ComparedModel,
    ComparedPlan,
    formats_of,
    sinks_of,
)
from moacompress.evaluation.baselines.evictions import compared_eviction
from moacompress.evaluation.baselines.quantized_caches import QUANTIZED, ComparedQuantizedCache
from moacompress.evaluation.eviction.registry import eviction_names, expanded, is_eviction
from moacompress.rules.formats import CODED, NATIVE, is_format
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS
from moacompress.runtime.checkpoint import Checkpoint, compressed_folder, load_checkpoint, profile_folder
from moacompress.runtime.linear import use_kernels
from moacompress.search.baselines.families import BASELINES, FAMILIES, baseline_plans, uniform_plan

logger = logging.getLogger(__name__)

BEST = "best"
NAMED = (DENSE, STOCK, BEST, *BASELINES, *(f"uniform:{sink}" for sink in SINKS), *QUANTIZED)
"""What can be measured against by name besides `is_eviction`; anything else is another compressed checkpoint. `BEST` stands for
the baseline that the search measured best."""
NEED_PROFILE = ("per-layer", "split", "moa")


@dataclass(frozen=True)
class Comparison:
    """What a checkpoint is measured against.

    Attributes:
        checkpoint: what is measured.
        against: names and folders, without repeats, in the order asked for.
        others: of each of `against` that is a folder the plan, where its weights are the dense model's, or else the checkpoint.
        profile: the profile that some baselines are made from, or None.
        every_candidate: try every sink of a baseline, also where the search has found one to be best. Every pair of formats
            is tried where the plan does not say which the search found best.
        best: the baseline that stands in `against` because the search measured it best; None where it was asked for by name,
            or not at all. It is left out where it does not fit a prompt.
    """

    checkpoint: Checkpoint
    against: tuple[str, ...]
    others: dict[str, Plan | Checkpoint]
    profile: Profile | None
    every_candidate: bool
    best: str | None = None

    @property
    def plan(self) -> Plan:
        """The checkpoint's own."""
        return self.checkpoint.plan

    def at(self, tokens: int, last: int) -> list[ComparedModel]:
        """Returns the models to run on prompts of so many tokens, answers included, the plan first.

        The `last` of them are read after the others.

        Raises:
            InfeasibleBudgetError: a baseline has no plan that is small enough.
            UsageError: a cache that cannot hold the model's layers.
        """
        shape, limit = self.plan.model, self.plan.kv_bytes(tokens)
        found = [self._first(limit)]
        for name in self.against:
            if name == DENSE:
                found.append(ComparedPlan(name, shape.dense_kv_bytes(tokens), Plan.full(shape)))
            elif name == STOCK:
                found.append(ComparedModel(name, shape.dense_kv_bytes(tokens)))
            elif name in QUANTIZED:
                kind = QUANTIZED[name]
                held = kind.measured_bytes(self.checkpoint.model, shape, tokens, last)
                found.append(ComparedQuantizedCache(name, held, kind))
            elif is_eviction(name):
                found.append(compared_eviction(name, self.plan, tokens))
            elif name in self.others:
                found.append(_other_model(name, self.others[name], tokens))
            else:
                with suppress(InfeasibleBudgetError) if name == self.best else nullcontext():
                    plans = self._baseline(name, tokens, limit)
                    found += [ComparedPlan(name, plan.kv_bytes(tokens), plan) for plan in plans]
        return found

    def _first(self, kv_bytes: int) -> ComparedModel:
        """Returns the checkpoint itself, under its plan."""
        if self.checkpoint.dense is None:
            return ComparedPlan(PLAN, kv_bytes, self.plan)
        return ComparedCheckpoint(PLAN, kv_bytes, self.checkpoint)

    def without_baselines(self) -> list[ComparedModel]:
        """Returns the models that are the same at every length, where they keep no token: the plan, other folders, dense."""
        found = [self._first(0)]
        found += [_other_model(name, other, 0) for name, other in self.others.items()]
        return found + ([ComparedPlan(DENSE, 0, Plan.full(self.plan.model))] if DENSE in self.against else [])

    def _baseline(self, name: str, tokens: int, limit: int) -> list[Plan]:
        """Returns the candidates of a baseline."""
        shape, min_window = self.plan.model, self.plan.min_window
        if ":" in name:
            return [uniform_plan(shape, tokens, limit, int(name.partition(":")[2]), min_window)]
        plans = baseline_plans(
            name, shape, {tokens: limit}, min_window, self.profile, formats=CODED, centres=self.plan.centres
        )
        sink, formats = _known_best(self.plan, name)
        plans = [plan for plan in plans if formats in formats_of(plan)] or plans
        every = self.every_candidate and name != self.best
        return plans if every else [plan for plan in plans if sink in sinks_of(plan)] or plans


def sides(against: Sequence[str]) -> tuple[str, ...]:
    """Returns the names of what is measured: evictions in both their settings, and dense by both attentions where needed.

    Quantized caches and evictions run transformers' attention, the plan and dense our kernels. Rounding differs between the two
    and decides a few prompts. With such a side the dense model is measured by both attentions, and retention is of the prompts
    that both answer, so that rounding counts against no side.
    """
    names = expanded(against)
    if DENSE not in names or STOCK in names or not any(name in QUANTIZED or is_eviction(name) for name in names):
        return names
    at = names.index(DENSE) + 1
    return (*names[:at], STOCK, *names[at:])


def make_comparison(
    checkpoint: Checkpoint, against: Sequence[str], profile: str | Path | None, every_candidate: bool
) -> Comparison:
    """Returns what a checkpoint is measured against, by names of `NAMED` and of evictions, or folders of other checkpoints.

    Those were made from the same dense model, and `profile`, which `NEED_PROFILE` is made from, is of the same weights.

    Raises:
        UsageError: a baseline that needs a profile, and there is none.
        PlanError: a plan of another model.
    """
    given = [name for name in against if name != BEST]
    found = _profile(checkpoint, sides(given), profile)
    best = best_baseline(checkpoint.plan) if BEST in against else None
    best = None if best in given else best
    if best is not None and found is None:
        try:
            found = _profile(checkpoint, [best], profile)
        except (UsageError, PlanError) as error:  # none, or of weights that were rounded since
            logger.warning("%s, the baseline that the search measured best, is left out: %s", best, error)
            best = None
    asked = [best if name == BEST else name for name in against]
    names = sides([name for name in asked if name is not None])
    others = {name: _other(checkpoint, name) for name in names if name not in NAMED and not is_eviction(name)}
    return Comparison(checkpoint, names, others, found, every_candidate, best)


def best_baseline(plan: Plan) -> str | None:
    """Returns the baseline of lowest KL by the search's notes, of those that can be made again; None where there are none."""
    noted = plan.quality.get("baselines")
    found: list[tuple[float, str]] = []
    for family, note in noted.items() if isinstance(noted, dict) else ():
        names, kl = FAMILIES.get(family, ()), note.get("harm") if isinstance(note, dict) else None
        if names and isinstance(kl, int | float):
            found.append((kl, names[-1] if note.get("beta_q") else names[0]))
    return min(found)[1] if found else None


def check_names(against: Sequence[str]) -> None:
    """Refuses what is neither a known name nor a folder, and a cache whose package is not installed.

    Raises:
        UsageError: names the nearest known one, or the package.
    """
    known = (*NAMED, *eviction_names())
    for name in against:
        if name in QUANTIZED:
            QUANTIZED[name].check_installed()
        if name in known or is_eviction(name):
            continue
        if name == PLAN:
            raise UsageError(
                f"cannot evaluate against {name!r}, which is what rows of the checkpoint itself are called; write a folder of "
                f"this name as {'./' + name!r}"
            )
        if Path(name).exists():
            compressed_folder(Path(name))
            continue
        hint = did_you_mean(name, known, f"known are {', '.join(known)} and compressed folders")
        raise UsageError(f"cannot evaluate against {name!r}; {hint}")


def _profile(checkpoint: Checkpoint, names: Sequence[str], given: str | Path | None) -> Profile | None:
    needed = [name for name in names if name in NEED_PROFILE]
    if not needed:
        return None
    path = profile_folder(checkpoint.folder, given)
    if path is None:
        raise UsageError(
            f"{needed[0]} is made from a profile and there is none beside {checkpoint.folder}; give one (--profile DIR)"
        )
    profile = Profile.load(path)
    profiled = profile.shape.weights_fingerprint
    if checkpoint.dense_weights != profiled:
        raise PlanError(
            f"the profile {path} is of other weights: fingerprint {profiled}, the model has {checkpoint.dense_weights}; give "
            "the profile that the plan was found with"
        )
    return profile


def _other(checkpoint: Checkpoint, name: str) -> Plan | Checkpoint:
    """Returns the plan of another compressed folder whose weights are the dense model's; else that checkpoint.

    Raises:
        PlanError: it was made from another model.
    """
    dtype = str(checkpoint.model.dtype).removeprefix("torch.")
    folder = compressed_folder(Path(name))
    other = load_checkpoint(folder, dtype, checkpoint.device, trust_remote_code=checkpoint.trust_remote_code)
    other.plan.check_model(checkpoint.plan.model, weights=False)
    if other.weights == checkpoint.dense_weights:
        return other.plan
    made_from = other.plan.model.weights_fingerprint
    if checkpoint.dense_weights != made_from:
        raise PlanError(
            f"{name} was made from other weights than those that {checkpoint.folder} is measured beside: fingerprint "
            f"{made_from}, not {checkpoint.dense_weights}; give the model that both were made from "
            "(--dense MODEL), or evaluate it on its own"
        )
    use_kernels(other.model)
    return other


def _other_model(name: str, other: Plan | Checkpoint, tokens: int) -> ComparedModel:
    if isinstance(other, Plan):
        return ComparedPlan(name, other.kv_bytes(tokens), other)
    return ComparedCheckpoint(name, other.plan.kv_bytes(tokens), other)


def _known_best(plan: Plan, name: str) -> tuple[int | None, tuple[str, str] | None]:
    """Returns the sink and the formats that the search found best for a baseline, None where the plan does not say."""
    baselines = plan.quality.get("baselines")
    family = next(family for family, names in FAMILIES.items() if name in names)
    noted = baselines.get(family) if isinstance(baselines, dict) else None
    if not isinstance(noted, dict):
        return None, None
    sink, formats = noted.get("sink"), noted.get("formats", [NATIVE, NATIVE])
    known = isinstance(formats, list) and len(formats) == 2 and all(map(is_format, map(str, formats)))
    return sink if sink in SINKS else None, (str(formats[0]), str(formats[1])) if known else None
