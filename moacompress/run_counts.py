"""What a run computes and holds, counted from a model's config alone: products of matrices, and bytes.

A product and its addition are two operations. Counted are the products of the layers' weights, of the output layer at the
tokens whose logits are needed, and of attention. Sums, norms, what rules hide and what a profile of sharing multiplies are
not, so a count is a floor. `tests/test_run_counts.py` holds it against counted passes of tiny models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moacompress.calibration.data.sample_sources import longer_counts
from moacompress.calibration.profile.estimate import backward_passes
from moacompress.core.errors import ModelError
from moacompress.core.tables import readable_bytes
from moacompress.estimate.work import Kind, Work
from moacompress.models.modules import check_supported, decoder_layers
from moacompress.models.shape import config_shape
from moacompress.models.skeleton import load_config, make_skeleton
from moacompress.models.source import context_length
from moacompress.models.support import stored_problems
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.model_shape import ModelShape
from moacompress.run_estimate import run_work

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SINGLE = 4
"""Bytes of a statistic, float32."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Keys of configs under which the number of a layer's experts is."""
UNIT = 1e15
"""Operations in the unit that a person reads."""


@dataclass(frozen=True)
class ModelCounts:
    """The sizes of a decoder that operations and bytes follow from.

    Attributes:
        shape: its layers, heads and windows; without a fingerprint.
        context: longest sequence that it was made for, tokens; 0 if its config does not say.
        hidden: numbers that a token has between layers.
        linear: weights of all layers that one token is multiplied with; of experts, those of the ones that it is sent to.
        last: of these, the last matrix of every layer; 0 where a layer has experts, whose outputs are multiplied once more.
        head: weights of the output layer.
        parameters: all weights.
    """

    shape: ModelShape
    context: int
    hidden: int
    linear: int
    last: int
    head: int
    parameters: int

    @staticmethod
    def of(config: PreTrainedConfig, trust_remote_code: bool = False) -> ModelCounts:
        """Counts the weights of the model that a config describes; none are made.

        Raises:
            ModelError: not a model that can be compressed.
        """
        model: Any = make_skeleton(config, trust_remote_code)
        check_supported(model)
        text: Any = config.get_text_config(decoder=True)
        experts = next((getattr(text, key) for key in EXPERTS if getattr(text, key, None)), 1)
        chosen = getattr(text, "num_experts_per_tok", None) or 1
        linear, last = 0, 0
        for layer in decoder_layers(model):
            matrices = {name: weight for name, weight in layer.named_parameters() if weight.ndim > 1}
            routed = sum(weight.numel() for name, weight in matrices.items() if ".experts." in f".{name}")
            linear += sum(weight.numel() for weight in matrices.values()) - routed + routed * chosen // experts
            last += 0 if routed else [*matrices.values()][-1].numel()
        named = str(config.dtype).removeprefix("torch.") if config.dtype is not None else "float32"
        return ModelCounts(
            shape=config_shape(config, dtype=dtype_name(named)),
            context=context_length(model),
            hidden=int(text.hidden_size),
            linear=linear,
            last=last,
            head=model.get_output_embeddings().weight.numel(),
            parameters=sum(weight.numel() for weight in model.parameters()),
        )

    def attended(self, tokens: int) -> int:
        """Returns the operations of one product of queries and keys, each query with those that it sees."""
        within = (min(tokens, tokens if window is None else window) for window in self.shape.native_windows)
        pairs = sum(width * (width + 1) // 2 + (tokens - width) * width for width in within)
        return 2 * self.shape.heads * self.shape.head_dim * pairs

    def forward(self, tokens: int, targets: int) -> int:
        """Returns the operations of reading a prompt; logits are computed at `targets` tokens."""
        return 2 * self.linear * tokens + 2 * self.head * targets + 2 * self.attended(tokens)

    def step(self, tokens: int) -> int:
        """Returns the operations of one more token after so many."""
        return 2 * (self.linear + self.head) + 2 * (self.attended(tokens + 1) - self.attended(tokens))

    def sample(self, tokens: int, targets: int, passes: int, formats: int) -> int:
        """Returns the operations of a sample's passes: one forward, and some backward to the embeddings.

        A backward pass has gradients of inputs alone, as weights are frozen; of attention scores, their gradient, and the
        gradients of queries, keys and values. With formats keys, values and their gradients are rotated.
        """
        body, shape = 2 * self.linear * tokens + 2 * self.attended(tokens), self.shape
        rotated = bool(formats) * 4 * 2 * shape.layers * shape.kv_heads * shape.head_dim**2 * tokens
        backward = 2 * self.linear * tokens + 5 * self.attended(tokens) + 4 * self.head * targets
        return body + passes * (backward + rotated)

    def rerun(self, tokens: int) -> int:
        """Returns the operations of running the layers again, all but their last product."""
        return 2 * (self.linear - self.last) * tokens + 2 * self.attended(tokens)

    def operations(self, work: Work, chosen: ProfileRecipe) -> float:
        """Returns the operations of some passes of a run; `chosen` says what is profiled."""
        tokens, targets, formats = work.tokens, work.targets, len(chosen.formats)
        one = {
            Kind.FORWARD: lambda: self.forward(tokens, targets),
            Kind.STEP: lambda: self.step(tokens),
            Kind.SAMPLE: lambda: self.sample(tokens, targets, backward_passes(chosen), formats),
            Kind.RERUN: lambda: self.rerun(tokens),
            Kind.GATE_SAMPLE: lambda: self.sample(tokens, targets, chosen.draws, 0),
        }
        return work.count * one[work.kind]()

    def kept_bytes(self, tokens: int, number: int) -> int:
        """Returns the bytes of the inputs of layers that a long sample keeps for its backward passes, `number` bytes each."""
        return self.shape.layers * tokens * self.hidden * number

    def statistics_bytes(self, rules: int, recipe: Recipe) -> int:
        """Returns the bytes of a sample's statistics: squares, and a sum a draw, of rules and of formats of both sides."""
        columns = rules + 2 * (1 + len(recipe.profile.formats))
        return SINGLE * self.shape.layers * self.shape.kv_heads * columns * (1 + recipe.profile.draws)


@dataclass(frozen=True)
class RunCounts:
    """What a run computes and holds at least.

    `bytes` are those of `weights`, of the `inputs` of layers that the longest sample keeps, of the largest dense `kv_cache` of
    a row, and of all at a time (`peak`).
    """

    operations: Mapping[str, int]  # of every step
    bytes: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        total = sum(self.operations.values())
        return {
            "estimate": True,
            "counted": True,
            "operations": {**self.operations},
            "total_operations": total,
            "bytes": {**self.bytes},
        }

    def line(self) -> str:
        """Returns what a person is told."""
        total = sum(self.operations.values()) / UNIT
        parts = ", ".join(f"{name} {count / UNIT:,.3g}" for name, count in self.operations.items())
        sizes = {name: readable_bytes(size) for name, size in self.bytes.items()}
        return (
            f"at least {total:,.3g} x 10^15 operations ({parts}), and at least {sizes['peak']} of the device's memory "
            f"(weights {sizes['weights']}, a dense cache {sizes['kv_cache']}, inputs of layers for a backward pass "
            f"{sizes['inputs']}). The folder has no weights, so this is counted from its config.json and nothing was timed."
        )


def read_counts(source: str, trust_remote_code: bool = False) -> ModelCounts:
    """Returns the sizes of the model that a folder's config describes; weights are not looked at.

    Raises:
        ModelError: not a model that can be compressed.
    """
    config = load_config(source, trust_remote_code)
    problems = stored_problems(config)
    if problems:
        raise ModelError(f"{source} cannot be used: {problems[0]}")
    return ModelCounts.of(config, trust_remote_code)


def count_run(recipe: Recipe, counts: ModelCounts, steps: tuple[str, ...] = ("profile", "search", "eval")) -> RunCounts:
    """Counts some steps of a run."""
    work = run_work(recipe, counts.shape, counts.hidden, counts.context)
    number = DTYPE_BYTES[counts.shape.dtype if recipe.dtype == "auto" else recipe.dtype]
    lengths = recipe.calibration.lengths
    longest = max(lengths) * (2 if any(longer_counts(recipe, counts.context)) else 1)
    if "eval" in steps:
        longest = max(longest, *recipe.evaluation.lengths)
    weights, kept = counts.parameters * number, counts.kept_bytes(max(lengths), number)
    cache = counts.shape.dense_kv_bytes(longest) * number // DTYPE_BYTES[counts.shape.dtype]
    return RunCounts(
        {name: round(sum(counts.operations(part, recipe.profile) for part in work[name])) for name in steps},
        {"weights": weights, "inputs": kept, "kv_cache": cache, "peak": weights + max(kept, cache)},
    )
