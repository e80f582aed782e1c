"""What keys in codes cost a model, whole and less their mean key, by the kernels that run a checkpoint.

    python benchmarks/centred_keys.py MODEL ... --text FILE,FILE --tokens 1k --texts 4 -o rows.jsonl
    python benchmarks/centred_keys.py --table rows.jsonl

Every KV head keeps every token; keys are in one format and values as they are, or both in one. KL(dense || codes) is the mean
over the later half of each text, its last 2,048 tokens at most, nats a token, dense by the same kernels at full span. `whole`
has no centre. `mean` has the mean key of another text as long. The others say how far it matters what the mean is of: `first`
of all tokens of that text, its first four too; `code` of source code; `short` of a quarter as many tokens; `own` of the text.
"""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import append_row, markdown, options, read_rows  # beside this script

from moacompress.calibration.profile.centres import mean_keys
from moacompress.models.source import SourceModel, load_source
from moacompress.rules.budget import parse_length
from moacompress.rules.key_centres import Centres
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach

FORMATS = (("int8", "native"), ("int4", "native"), ("int4", "int4"))
WHOLE = "whole"
MEASURED = 2048
"""Tokens of a text at most that are measured: of more the logits would take gigabytes."""


def main() -> None:
    """Measures every model, and prints each row as it is found."""
    parser = options(__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--text", help="files of prose, with commas")
    parser.add_argument("--table", type=Path, help="print the rows of a file as Markdown; nothing is measured")
    parser.add_argument("--tokens", default="1k")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--centres", default="mean", help="which, such as mean,first,code,short,own")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("-o", "--out", type=Path, help="a file that every row is appended to")
    given = parser.parse_args()
    if given.table is not None:
        print(table(read_rows(given.table)))
        return
    if given.text is None:
        parser.error("give files of prose with --text")
    for name in given.models:
        source = load_source(name, dtype=given.dtype, weights="dense")
        for row in measured(source, given):
            row = {"model": Path(name).name, "dtype": given.dtype, **row}
            append_row(given.out, row)
            print(
                f"{row['model'][:32]:<32} {row['keys']}/{row['values']:<7} {row['centre']:<6} {row['kl']:.5f} nats",
                flush=True,
            )


def measured(source: SourceModel, given: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a model."""
    length = parse_length(given.tokens)
    files = [Path(name).read_text("utf-8", errors="ignore") for name in given.text.split(",")]
    *texts, other = pieces(source, re.sub(r"\s+", " ", "".join(files)), length, given.texts + 1)
    makes: dict[str, Callable[[], Centres]] = {
        WHOLE: lambda: (),
        "mean": lambda: mean_keys(source, [other]),
        "first": lambda: mean_keys(source, [other], first=0),
        "code": lambda: mean_keys(source, pieces(source, standard_library(), length, 1)),
        "short": lambda: mean_keys(source, [other[: length // 4]]),
    }
    chosen = [WHOLE, *given.centres.split(",")]
    known = {name: makes[name]() for name in chosen if name != "own"}
    with torch.inference_mode():
        dense = [logits(source, Plan.full(source.shape), text) for text in texts]
        for keys, values in FORMATS:
            rule = Rule.FULL.in_formats(keys, values)
            for name in chosen:
                kls = []
                for text, wanted in zip(texts, dense, strict=True):
                    centres = mean_keys(source, [text]) if name == "own" else known[name]
                    plan = Plan(
                        source.shape, 16, ((rule,) * source.shape.kv_heads,) * source.shape.layers, centres=centres
                    )
                    kls.append(divergence(wanted, logits(source, plan, text)))
                row: dict[str, Any] = {"keys": keys, "values": values, "centre": name, "tokens": length}
                yield row | {"kl": sum(kls) / len(kls), "of_texts": kls}


def logits(source: SourceModel, plan: Plan, text: list[int]) -> torch.Tensor:
    """Returns log probabilities of the measured tokens of a text under a plan, `[tokens, vocabulary]`."""
    model: Any = source.model
    attach(model, plan)
    found = model(
        torch.tensor([text]), use_cache=False, logits_to_keep=min(len(text) - len(text) // 2, MEASURED)
    ).logits
    detach(model)
    return torch.log_softmax(found[0].float(), -1)


def divergence(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Returns the mean KL over tokens, nats."""
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def standard_library() -> str:
    """Returns some modules of Python's standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return "\n".join((folder / name).read_text("utf-8") for name in ("argparse.py", "ast.py", "tarfile.py"))


def pieces(source: SourceModel, text: str, tokens: int, count: int) -> list[list[int]]:
    """Returns pieces of a text from places at random, tokens of each."""
    rng, size = random.Random(5), 6 * tokens
    starts = [rng.randrange(max(len(text) - size, 1)) for _ in range(count)]
    return [source.tokenizer(text[start : start + size])["input_ids"][:tokens] for start in starts]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a table of a line for each model and pair of formats, and a column for each centre."""
    names = list(dict.fromkeys(row["centre"] for row in rows))
    kls: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        kls.setdefault((row["model"], row["keys"], row["values"]), {})[row["centre"]] = row["kl"]
    cells = (
        [*place, *(f"{found[name]:.5f}" if name in found else "" for name in names)] for place, found in kls.items()
    )
    return markdown(["model", "keys", "values", *names], cells, 3)


if __name__ == "__main__":
    main()
