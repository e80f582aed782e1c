"""What is measured on a set of prompts: a checkpoint's weights under a plan, without one, or with another cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moacompress.core.files import fingerprint
from moacompress.rules.plan import Plan
from moacompress.rules.windows import window
from moacompress.runtime.checkpoint import Checkpoint
from moacompress.search.baselines.families import BASELINES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAN, DENSE, STOCK = "plan", "dense", "dense:transformers"
DENSE_SIDES = (DENSE, STOCK)
"""The dense model by our kernels at full span, and by transformers' own attention."""


@dataclass(frozen=True)
class ComparedModel:
    """A model to be measured on one task and length; this class itself is the dense model as transformers runs it.

    Attributes:
        name: as in the results; candidates of which only the best is reported share one.
        kv_bytes: at the mean number of tokens of the prompts.
    """

    name: str
    kv_bytes: int

    @property
    def unit(self) -> int:
        """A prompt is read up to a multiple of so many tokens, and the rest of it with the answer."""
        return 1

    def key(self) -> str:
        """Returns what its scores depend on besides the checkpoint's weights and the prompts."""
        return self.name

    def put_on(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Returns the checkpoint's weights as it runs them."""
        return checkpoint.without_plan()

    def new_cache(self, model: PreTrainedModel) -> Any:
        """Returns an empty cache that `model` is given, or None where it makes its own."""
        return None

    def description(self, tokens: int) -> dict[str, Any]:
        """Returns further fields of its result rows, at that length."""
        return {}


@dataclass(frozen=True)
class ComparedPlan(ComparedModel):
    """The checkpoint's weights under a plan.

    The dense model runs under a plan that keeps everything: the same kernels then compute all of them, and a difference
    between them is the plan's doing and never one of rounding.
    """

    plan: Plan

    def key(self) -> str:
        """Returns the plan's key."""
        return self.plan.key()

    def put_on(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Returns the checkpoint's model under this plan."""
        return checkpoint.put_on(self.plan)

    def description(self, tokens: int) -> dict[str, Any]:
        """Returns `sink`, `window` (tokens, at that length) and `formats` of a baseline, where its KV heads agree.

        Sink and window are of those that leave something out.
        """
        if self.name.partition(":")[0] not in BASELINES:
            return {}
        rules = [rule for row in self.plan.rules for rule in row if not rule.sees_all]
        found: dict[str, set[Any]] = {
            "sink": sinks_of(self.plan),
            "window": {window(tokens, rule.alpha, rule.beta_q, self.plan.min_window) for rule in rules},
            "formats": {"/".join(pair) for pair in formats_of(self.plan)},
        }
        return {name: values.pop() for name, values in found.items() if len(values) == 1}


@dataclass(frozen=True)
class ComparedCheckpoint(ComparedModel):
    """A checkpoint with weights of its own: repaired, healed, or without the projections that sharing layers do without.

    The one that it is measured beside is in memory with it.
    """

    own: Checkpoint

    def key(self) -> str:
        """Returns a digest of its plan and weights."""
        return fingerprint([self.own.plan.key(), self.own.weights])

    def put_on(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Returns its own model, with the weights that it was stored with."""
        return self.own.as_stored()


def sinks_of(plan: Plan) -> set[int]:
    """Returns the sinks of the rules that leave something out."""
    return {rule.sink for row in plan.rules for rule in row if not rule.sees_all}


def formats_of(plan: Plan) -> set[tuple[str, str]]:
    """Returns the pairs of key and value format of a plan."""
    return {(rule.key_format, rule.value_format) for row in plan.rules for rule in row}
