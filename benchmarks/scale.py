"""FLOPs and bytes of a profile, a search and an evaluation, by the shape of a model: the table of docs/scale.md.

    python benchmarks/scale.py                        # the table
    python benchmarks/scale.py --tflops 400           # with hours at a rate of your own

What is counted, and how, is in `moacompress/run_counts.py`. Hours at a rate are a floor; `--dry-run` times the model itself.
"""

from __future__ import annotations

from collections.abc import Callable

from harness import markdown, options  # beside this script
from transformers import LlamaConfig

from moacompress.calibration.profile.request import rules_on_offer
from moacompress.recipe import Recipe
from moacompress.run_counts import ModelCounts, count_run

RECIPE = Recipe().override(calibration__lengths=(1024, 4096), evaluation__lengths=(4096,))
"""What the table is of: the defaults, at two lengths."""
HALF = 2
"""Bytes of a number in bfloat16."""


def llama(layers: int, hidden: int, heads: int, head_dim: int, intermediate: int, *, tied: bool = False) -> ModelCounts:
    """Returns the sizes of a model of Llama 3.1 or 3.2, with their 8 KV heads and vocabulary."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )
    return ModelCounts.of(config)


MODELS: dict[str, Callable[[], ModelCounts]] = {
    "1B": lambda: llama(16, 2048, 32, 64, 8192, tied=True),
    "8B": lambda: llama(32, 4096, 32, 128, 14336),
    "70B": lambda: llama(80, 8192, 64, 128, 28672),
    "405B": lambda: llama(126, 16384, 128, 128, 53248),
}
"""Models of Llama 3.1 and 3.2."""


def table(rules: int, tflops: float | None = None) -> str:
    """Returns the table as Markdown, of so many candidate rules, with hours at 10^12 * `tflops` operations a second."""
    names = ["model", "profile", "search", "eval", "weights", "inputs kept", "KV cache, 8k", "statistics"]
    lines = []
    longest = max(RECIPE.calibration.lengths)
    for name, made in MODELS.items():
        counts = made()
        run = count_run(RECIPE, counts)
        work = [
            f"{count / 1e15:,.3g}" + ("" if tflops is None else f" ({count / tflops / 3.6e15:.2g} h)")
            for count in run.operations.values()
        ]
        samples = RECIPE.calibration.samples * counts.statistics_bytes(rules, RECIPE)
        sizes = (run.bytes["weights"], counts.kept_bytes(longest, HALF), run.bytes["kv_cache"], samples)
        lines.append([name, *work, *(f"{size / 1e9:,.3g}" for size in sizes)])
    return markdown(names, lines)


def rules_of(recipe: Recipe) -> int:
    """Returns how many rules a profile offers."""
    return len(rules_on_offer(recipe))


def main() -> None:
    """Prints the table."""
    parser = options(__doc__)
    parser.add_argument("--tflops", type=float, help="10^12 operations a second: also print hours")
    given = parser.parse_args()
    if given.tflops is not None and given.tflops <= 0:
        parser.error("--tflops is a positive number")
    print(table(rules_of(RECIPE), given.tflops))


if __name__ == "__main__":
    main()
