"""Weights in the same problem as the KV heads: which linear layers a plan has rounded, within a total of memory.

Every linear layer is one more row of the knapsack. Its options are its formats, its sizes the bytes of its weight in each, and
they count for budgets of memory alone. Solved together, a byte of weights has the price of a byte of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.arrays import Floats, Ints
from moacompress.core.errors import BudgetError, UsageError
from moacompress.models.source import SourceModel
from moacompress.models.weight_choices import CHOICES, WeightChoices, checkpoint_bytes
from moacompress.recipe import AUTO, Recipe
from moacompress.rules.budget import Budget, byte_limits, memory_budgets
from moacompress.rules.cost import byte_table, floored, layer_floors
from moacompress.rules.formats import DTYPE_BYTES
from moacompress.rules.limits import WeightBytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.planned_weights import count_formats
from moacompress.rules.rule import Rule
from moacompress.search.problem.solver import solve

if TYPE_CHECKING:
    from moacompress.search.search_request import SearchRequest

GATE_BYTES = 320
"""Most bytes of the names, headers and biases of a layer's gates in a checkpoint."""


@dataclass(frozen=True, eq=False)
class WeightChoice:
    """The formats of linear layers that a search chooses.

    Attributes:
        choices: what every layer's weight may be.
        chosen: of `CHOICES`, for every layer; the smallest until prices are known.
        prices: predicted KL of every choice, nats, `[layers, choices]`; None until it is known.
        compared: what was measured to choose, as the plan's notes have it.
        alone: KL of the rounded weights without a plan, as a plan's notes have it.
    """

    choices: WeightChoices
    chosen: Ints
    prices: Floats | None = None
    compared: tuple[dict[str, Any], ...] = ()
    alone: dict[str, Any] = field(default_factory=dict)

    @property
    def formats(self) -> dict[str, str]:
        """The layers that are rounded, with their formats."""
        return self.choices.formats(self.chosen)

    @property
    def bytes(self) -> WeightBytes:
        """What the weights take; before prices are known that is the least."""
        return WeightBytes(self.choices.bytes(self.chosen), chosen=True)

    @property
    def predicted(self) -> float | None:
        """Predicted KL of the rounded layers, nats, without embedding and output layer."""
        return None if self.prices is None else float(self.prices[np.arange(len(self.chosen)), self.chosen].sum())

    @property
    def note(self) -> dict[str, Any]:
        """The note of a plan's provenance; see `rules.planned_weights`."""
        formats = self.formats
        return {
            "formats": formats,
            "layers": len(self.choices.names),
            "of": count_formats(formats.values()),
            "bytes": self.bytes.bytes,
        }

    def taking(self, chosen: Ints) -> WeightChoice:
        """Returns the choice with other formats."""
        return replace(self, chosen=chosen)


def weight_choice(
    recipe: Recipe, budgets: Iterable[Budget], rules: Sequence[Rule], shape: ModelShape, source: SourceModel | None
) -> tuple[WeightBytes | None, WeightChoice | None]:
    """Returns what the weights take, and what of them a search chooses; None where no budget asks, or no model is loaded.

    Args:
        recipe: the run.
        budgets: as asked for.
        rules: on offer; gates of those that select are weights too.
        shape: of the model.
        source: the model.

    Raises:
        BudgetError: weights are to be chosen without a budget that they count for.
        UsageError: weights are to be chosen beside layers that share attention, or none can be.
    """
    if recipe.weights == AUTO and recipe.search.share != "off":
        raise UsageError("--weights auto cannot be combined with layers that share attention; leave out --share")
    if not memory_budgets(budgets):
        if recipe.weights == AUTO:
            raise BudgetError(
                "--weights auto chooses weights within a total of weights and cache; say how much, such as --memory 6GiB@8k"
            )
        return None, None
    if source is None:
        return None, None
    gates = _gate_bytes(source, shape) if any(rule.selects for rule in rules) else 0
    if recipe.weights != AUTO:
        return WeightBytes(checkpoint_bytes(source.model, shape.dtype) + gates), None
    choices = WeightChoices.of(source.model, shape.dtype, recipe.head_weights)
    if not choices.names:
        raise UsageError(
            "--weights auto has nothing to choose: no linear layer has floats in rows of whole blocks of 32 numbers; leave it "
            "out, --memory works without"
        )
    choice = WeightChoice(replace(choices, fixed=choices.fixed + gates), choices.smallest)
    return choice.bytes, choice


def _gate_bytes(source: SourceModel, shape: ModelShape) -> int:
    hidden = int(source.model.config.get_text_config(decoder=True).hidden_size)
    return shape.layers * (shape.kv_heads * (hidden + 1) * DTYPE_BYTES[shape.dtype] + GATE_BYTES)


def joint_choice(request: SearchRequest, choice: WeightChoice, kv_costs: Floats, scale: float = 1.0) -> Ints:
    """Returns the formats of all layers that a knapsack of KV heads and layers chooses together, int64 `[layers]`.

    A limit of classes is left out: it binds the KV heads alone, which are solved again within what the weights leave.

    Args:
        request: its budgets; those of memory count weights and cache.
        choice: with prices.
        kv_costs: predicted KL of every rule on every KV head, nats, `[layers, kv_heads, rules]`.
        scale: what the prices of weights are multiplied by beside it.

    Raises:
        InfeasibleBudgetError: nothing fits.
    """
    assert choice.prices is not None
    costs, sizes, limits = joint_problem(request, choice, kv_costs, scale)
    found = solve(costs, sizes, limits, solver=request.recipe.search.solver).choice
    return np.minimum(
        found[-len(choice.choices.names) :], len(CHOICES) - 1
    )  # the last option stands there several times


def joint_problem(
    request: SearchRequest, choice: WeightChoice, kv_costs: Floats, scale: float = 1.0
) -> tuple[Floats, Ints, Ints]:
    """Returns costs `[rows, options]`, sizes `[limits, rows, options]` and limits, of which layers are the last rows.

    Rows of layers have fewer options than those of KV heads: their last one stands there several times.

    Args: those of `joint_choice`.
    """
    assert choice.prices is not None
    budgets = [Budget.parse(text) for text in request.asked]
    others = [budget for budget in budgets if not budget.with_weights]
    profile, choices = request.profile, choice.choices
    bare = byte_limits(others, profile.shape, profile.lengths) if others else {}
    totals = memory_budgets(budgets)
    lengths = [*bare, *(budget.length or 0 for budget in totals)]
    limits = [*bare.values(), *((budget.bytes or 0) - choices.fixed for budget in totals)]
    table = byte_table(profile.shape, profile.rules, profile.min_window, lengths)
    table = floored(table, layer_floors(request.recipe.search.floors, profile.shape))
    heads = table.reshape(len(table), -1, table.shape[-1])
    options = max(heads.shape[-1], len(CHOICES))
    layers = np.repeat(choices.sizes[None], len(heads), axis=0)
    layers[: len(bare)] = 0
    return (
        np.concatenate([_padded(kv_costs.reshape(heads.shape[1:]), options), _padded(choice.prices * scale, options)]),
        np.concatenate([_padded(heads, options), _padded(layers, options)], axis=1),
        np.array(limits, np.int64),
    )


def _padded(table: Any, options: int) -> Any:
    """Returns a table whose last axis has so many options, the last one repeated."""
    return np.concatenate([table, np.repeat(table[..., -1:], options - table.shape[-1], axis=-1)], axis=-1)
