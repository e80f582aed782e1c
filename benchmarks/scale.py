"""FLOPs and bytes of a profile, a search and an evaluation, by the shape of a model: the table of docs/scale.md.

    python benchmarks/scale.py                        # the table
    python benchmarks/scale.py --tflops 400           # with hours at a rate of your own

A product and its addition are two operations. Counted are products of matrices: of the layers' weights, of the output layer at
the tokens whose logits are needed, and of attention. Sums, norms and what rules hide are not. So hours at a rate are a floor;
`--dry-run` times the model itself. tests/test_scale.py holds the formulas against counted runs of a tiny model.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from moacompress.calibration.profile.passes import KEEP_TOKENS
from moacompress.evaluation.eval_estimate import ANSWER, TEACHER_FORCED
from moacompress.recipe import Recipe
from moacompress.search.search_estimate import PASSES, measurements

RECIPE = Recipe().override(calibration__lengths=(1024, 4096))
"""What the table is of: the defaults, at two lengths."""
EVALUATED = 3
"""Models of an evaluation: the plan, dense and one baseline."""
HALF = 2
"""Bytes of a number in bfloat16."""
SINGLE = 4
"""Bytes of a statistic, float32."""


@dataclass(frozen=True)
class Shape:
    """A decoder with gated feed-forward layers, as Llama's."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False

    @property
    def linear(self) -> int:
        """Weights of the layers' products."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.hidden * self.vocabulary

    @property
    def parameters(self) -> int:
        """All weights: with embeddings, and the norms of layers and at the end."""
        return self.linear + self.head * (1 if self.tied else 2) + (2 * self.layers + 1) * self.hidden

    def attended(self, tokens: int) -> int:
        """Returns the operations of one product of queries and keys, each query with those before it."""
        return self.layers * self.heads * self.head_dim * tokens * (tokens + 1)

    def forward(self, tokens: int, targets: int) -> int:
        """Returns the operations of reading a prompt; logits are computed at `targets` tokens."""
        return 2 * self.linear * tokens + 2 * self.head * targets + 2 * self.attended(tokens)

    def step(self, tokens: int) -> int:
        """Returns the operations of one more token after so many."""
        return 2 * (self.linear + self.head) + 4 * self.layers * self.heads * self.head_dim * (tokens + 1)

    def sample(self, tokens: int, targets: int, draws: int, formats: int) -> int:
        """Returns the operations of a sample's passes: one forward, and for each draw one backward to the embeddings.

        A backward pass has gradients of inputs alone, as weights are frozen; of attention scores, their gradient, and the
        gradients of queries, keys and values. Beyond `KEEP_TOKENS` it runs the layers again, all but their last product. Keys
        and values are rotated for each format.
        """
        body = 2 * self.linear * tokens + 2 * self.attended(tokens)
        again = body - 2 * self.layers * self.hidden * self.intermediate * tokens if tokens > KEEP_TOKENS else 0
        rotated = 2 * formats * 2 * self.layers * self.kv_heads * self.head_dim**2 * tokens
        backward = 2 * self.linear * tokens + 5 * self.attended(tokens) + 4 * self.head * targets
        return body + draws * (backward + again + rotated)

    def answer(self, tokens: int, targets: int) -> int:
        """Returns the operations of the dense model's answer to a prompt."""
        return self.forward(tokens, 1) + targets * self.step(tokens)

    def kv_bytes(self, tokens: int) -> int:
        """Returns the bytes of a dense cache of one row."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * HALF

    def statistics_bytes(self, rules: int, recipe: Recipe) -> int:
        """Returns the bytes of a sample's statistics: squares, and a sum a draw, of rules and of formats of both sides."""
        columns = rules + 2 * (1 + len(recipe.profile.formats))
        return SINGLE * self.layers * self.kv_heads * columns * (1 + recipe.profile.draws)

    def kept_bytes(self, tokens: int) -> int:
        """Returns the bytes of the inputs of layers that a long sample keeps for its backward passes."""
        return self.layers * tokens * self.hidden * HALF


MODELS = (
    Shape("1B", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    Shape("8B", 32, 4096, 32, 8, 128, 14336, 128256),
    Shape("70B", 80, 8192, 64, 8, 128, 28672, 128256),
    Shape("405B", 126, 16384, 128, 8, 128, 53248, 128256),
)
"""Shapes of Llama 3.1 and 3.2."""


def profile_flops(shape: Shape, recipe: Recipe) -> int:
    """Returns the operations of a profile: answers to all samples, and the passes of those that are profiled."""
    asked, draws, formats = recipe.calibration, recipe.profile.draws, len(recipe.profile.formats)
    total = 0
    for length in asked.lengths:
        samples, held_out = (count // len(asked.lengths) for count in (asked.samples, asked.validation_samples))
        total += (samples + held_out) * shape.answer(length, asked.answer_tokens)
        total += samples * shape.sample(length, asked.answer_tokens, draws, formats)
    return total + asked.longer_samples * shape.answer(2 * max(asked.lengths), asked.answer_tokens)


def search_flops(shape: Shape, recipe: Recipe) -> int:
    """Returns the operations of a search: forward passes of the validation samples, and its rounds' profiles."""
    asked = recipe.calibration
    counts = [(length, asked.validation_samples // len(asked.lengths)) for length in asked.lengths]
    counts.append((2 * max(asked.lengths), asked.longer_samples))
    samples = sum(count for _, count in counts)
    whole = sum(count * shape.forward(length, asked.answer_tokens) for length, count in counts)
    rounds = recipe.search.rounds * recipe.search.round_samples * PASSES * whole / samples
    return round(measurements(recipe, samples) * whole + rounds)


def evaluation_flops(shape: Shape, recipe: Recipe) -> int:
    """Returns the operations of evaluating `EVALUATED` models by one task at the longest length."""
    length = max(recipe.calibration.lengths)
    each = (1 + TEACHER_FORCED) * shape.forward(length, 1) + ANSWER * shape.step(length)
    return round(recipe.evaluation.prompts * EVALUATED * each)


def table(rules: int, tflops: float | None = None) -> str:
    """Returns the table as Markdown.

    Args:
        rules: candidate rules of a profile.
        tflops: 10^12 operations a second, for hours beside operations; None for none.
    """
    names = ["model", "profile", "search", "eval", "weights", "inputs kept", "KV cache, 8k", "statistics"]
    lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    for shape in MODELS:
        flops = (profile_flops(shape, RECIPE), search_flops(shape, RECIPE), evaluation_flops(shape, RECIPE))
        work = [
            f"{count / 1e15:,.3g}" + ("" if tflops is None else f" ({count / tflops / 3.6e15:.2g} h)")
            for count in flops
        ]
        longest = max(RECIPE.calibration.lengths)
        samples = RECIPE.calibration.samples * shape.statistics_bytes(rules, RECIPE)
        sizes = (shape.parameters * HALF, shape.kept_bytes(longest), shape.kv_bytes(2 * longest), samples)
        lines.append(f"| {' | '.join([shape.name, *work, *(f'{size / 1e9:,.3g}' for size in sizes)])} |")
    return "\n".join(lines)


def rules_of(recipe: Recipe) -> int:
    """Returns how many rules a profile offers."""
    from moacompress.calibration.profile.profiler import rules_on_offer

    return len(rules_on_offer(recipe, None))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, help="10^12 operations a second: also print hours")
    given = parser.parse_args()
    if given.tflops is not None and given.tflops <= 0:
        parser.error("--tflops is a positive number")
    print(table(rules_of(RECIPE), given.tflops))


if __name__ == "__main__":
    main()
