"""Rows as tables: what each setting kept and answered, and how fast it was, beside ours and the dense model."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.core.statistics import SIGNIFICANT, p_value, paired_rates, rate, verdict
from moacompress.core.tables import Table, estimate_text, p_text
from moacompress.rules.budget import format_length
from rivals.settings import DENSE, OURS

Row = dict[str, Any]
Which = tuple[str, int, int, str]
"""Task, length and index of a prompt, and a digest of what it says."""
COMMON = {"quality": ("model",), "kept": ("model",), "speed": ("model", "machine", "threads", "steps")}
"""What all rows of a measure have in common, for their numbers to stand in one table."""
MORE_BYTES = 1.05
"""A checkpoint of ours may take so many times a rival's bytes and still be compared with it."""


@dataclass(frozen=True)
class Answers:
    """What one setting did on the prompts that the dense model answers right.

    Attributes:
        rival: its name.
        setting: name of its setting.
        question: whether a rival that evicts once had seen the question; empty for others.
        share: bytes of keys and values that are attended to at the end of an answer, of the dense model's there.
        in_memory: bytes of keys and values that are there at the end of an answer, of the dense model's.
        match: exact match by prompt.
        note: for a reader.
    """

    rival: str
    setting: str
    question: str
    share: float
    in_memory: float
    match: Mapping[Which, float]
    note: str


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a file, the last of each key; what is no row is left out, and without a file there are none."""
    found: dict[str, Row] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[row["key"]] = row
        except (ValueError, KeyError, TypeError):
            continue
    return [*found.values()]


def tables(rows: Iterable[Row]) -> str:
    """Returns all tables as Markdown, with what they were made with; a part that has no rows is left out.

    A file may have rows of several runs: tables are of those that belong to the newest, and how many do not is said.
    """
    rows = newest([*rows])
    parts = [quality_table(rows), kept_table(rows), speed_table(rows), made_with(rows)]
    return "\n\n".join(part for part in parts if part)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Returns the rows that are of what the newest are of: those of their measure, and then those of their setting.

    What a row does not say, as of older files, it has in common with any.

    Args:
        rows: oldest first.
    """
    kept = _like_the_last(rows, ("measure",), COMMON)
    kept = _like_the_last(kept, ("measure", "rival", "setting"), dict.fromkeys(COMMON, ("patch_points",)))
    if len(kept) < len(rows):
        print(
            f"{len(rows) - len(kept)} of {len(rows)} rows are left out: newer ones are of another model, checkpoint or "
            "setting, or were timed on another machine, with other threads or steps",
            file=sys.stderr,
        )
    return kept


def _like_the_last(rows: Sequence[Row], group: Sequence[str], names: Mapping[str, Sequence[str]]) -> list[Row]:
    """Returns the rows that say the same under some names, by measure, as the last one of their group does."""

    def places(row: Row) -> list[tuple[Any, ...]]:
        named = (name for name in names.get(row.get("measure", ""), ()) if name in row)
        return [(name, *(row.get(part) for part in group)) for name in named]

    last = {place: row[place[0]] for row in rows for place in places(row)}
    return [row for row in rows if all(row[place[0]] == last[place] for place in places(row))]


def quality_table(rows: Sequence[Row]) -> str:
    """Returns the table of answers, by bytes; empty where the dense model has answered nothing."""
    dense = _numbers(row for row in rows if (row.get("rival"), row.get("setting")) == DENSE)
    right = {which for which, numbers in dense.items() if numbers["match"] == 1.0}
    if not right:
        return ""
    found = sorted(_answers(rows, dense), key=lambda one: one.share)
    ours = [one for one in found if one.rival == OURS]
    heads = (
        "",
        "setting",
        "question",
        "KV bytes, of dense",
        "retention",
        "ours at these bytes, minus it",
        "better",
        "",
    )
    lines, tests = [], 0
    for one in found:
        some = [which for which in one.match if which in right]
        if not some:
            continue
        kept = estimate_text(*rate([one.match[which] for which in some]))
        counted = "" if len(some) == len(right) else f" of {len(some)}"
        beside, better = _beside(one, ours, right)
        bytes_said = f"{one.share:.3f}" + (f", {one.in_memory:.2f} in memory" if one.in_memory > one.share else "")
        cells = [one.rival, one.setting, one.question, bytes_said]
        cells += [f"{kept}{counted}", beside, better, one.note]
        tests += bool(beside)
        lines.append(cells)
    said = f"Retention on the {len(right)} of {len(dense)} prompts that the dense model answers right."
    chance = f"{SIGNIFICANT * tests:.2g}"
    note = f"Each of {tests} differences is tested alone: if none were real, up to {chance} would count by chance."
    return f"{said}\n\n{Table('', heads, lines, note if tests > 1 else '', 8).markdown()}"


def _numbers(some: Iterable[Row]) -> dict[Which, Mapping[str, float]]:
    """Returns the numbers of rows of answers by prompt."""
    return {
        (row["task"], row["length"], row["index"], row.get("prompt", "")): row["numbers"]
        for row in some
        if row.get("measure") == "quality"
    }


def _answers(rows: Sequence[Row], dense: Mapping[Which, Mapping[str, float]]) -> list[Answers]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("measure") == "quality":
            groups.setdefault((row["rival"], row["setting"], row["question"]), []).append(row)
    found = []
    for (rival, setting, question), some in groups.items():
        numbers = {which: one for which, one in _numbers(some).items() if which in dense}
        if not numbers:
            continue
        # an answer may be longer than dense's: bytes of dense are counted for as many tokens
        whole = sum(dense[which]["kv_bytes"] / dense[which]["tokens"] * one["tokens"] for which, one in numbers.items())
        held = sum(one["kv_bytes"] for one in numbers.values())
        used = held - sum(one["masked_bytes"] for one in numbers.values())
        match = {which: one["match"] for which, one in numbers.items()}
        found.append(Answers(rival, setting, question, used / whole, held / whole, match, some[0].get("note", "")))
    return found


def _beside(one: Answers, ours: Sequence[Answers], right: set[Which]) -> tuple[str, str]:
    """Returns the paired difference to the largest checkpoint of ours that takes no more bytes, and who is better by a test."""
    fitting = [mine for mine in ours if mine.share <= one.share * MORE_BYTES]
    if one.rival == OURS or not fitting:
        return "", ""
    mine = max(fitting, key=lambda candidate: candidate.share)
    both = [which for which in one.match if which in mine.match and which in right]
    if not both:
        return "", ""
    pair = [mine.match[which] for which in both], [one.match[which] for which in both]
    better = {1: "ours", -1: "**the rival**", 0: "no difference found"}[verdict(*pair)]
    return f"{mine.setting}: {estimate_text(*paired_rates(*pair), '+.2f')}, {p_text(p_value(*pair))}", better


def kept_table(rows: Sequence[Row]) -> str:
    """Returns the table of kept keys that are the same as our baseline's; empty without such rows."""
    groups: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.get("measure") == "kept":
            groups.setdefault((row["rival"], row["setting"], row["ours"], row["question"]), []).append(row)
    if not groups:
        return ""
    heads = ("", "setting", "our baseline", "question", "prompts", "keeps", "the same keys", "least")
    lines = []
    for names, some in groups.items():
        found = [row["numbers"]["same"] for row in some]
        share = statistics.mean(row["numbers"]["share"] for row in some)
        lines.append([*names, str(len(some)), f"{share:.3f}", f"{statistics.mean(found):.3f}", f"{min(found):.3f}"])
    return Table("", heads, lines, text_columns=4).markdown()


def speed_table(rows: Sequence[Row]) -> str:
    """Returns the table of times and memory: medians over turns, the best of each column bold; empty without such rows."""
    groups: dict[tuple[str, str], dict[int, list[Row]]] = {}
    for row in rows:
        if row.get("measure") == "speed":
            groups.setdefault((row["rival"], row["setting"]), {}).setdefault(row["length"], []).append(row)
    if not groups:
        return ""
    lengths = sorted({length for some in groups.values() for length in some})
    units = (
        ("step_ms", 1.0, 1, "step, ms"),
        ("prompt_ms", 1e-3, 2, "prompt, s"),
        ("peak_bytes", 1 / 2**20, 0, "peak, MiB"),
    )
    columns = [(name, scale, digits, length) for name, scale, digits, _ in units for length in lengths]
    heads = [f"{label} {format_length(length)}" for _, _, _, label in units for length in lengths]
    values = {
        (side, name, length): statistics.median(row["numbers"][name] for row in some[length])
        for side, some in groups.items()
        for name, _, _, length in columns
        if length in some
    }
    least = {
        (name, length): min(value for (_, other, at), value in values.items() if (other, at) == (name, length))
        for name, _, _, length in columns
    }
    lines = []
    for side, some in groups.items():
        turns = sorted({len(found) for found in some.values()})
        cells = [*side, "-".join(map(str, dict.fromkeys((turns[0], turns[-1]))))]
        for name, scale, digits, length in columns:
            value = values.get((side, name, length))
            text = "" if value is None else f"{value * scale:.{digits}f}"
            cells.append(f"**{text}**" if value is not None and value == least[name, length] else text)
        lines.append(cells)
    return Table("", ("", "setting", "turns", *heads), lines, text_columns=2).markdown()


def made_with(rows: Sequence[Row]) -> str:
    """Returns dates, versions, threads and machines of the rows."""
    if not rows:
        return ""
    versions: dict[str, dict[str, str]] = {}
    for row in rows:
        versions.setdefault(row["rival"], {}).update(row["versions"])
    said = [
        f"{rival} ({', '.join(f'{name} {number}' for name, number in found.items())})"
        for rival, found in versions.items()
    ]
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    where = "; ".join(
        dict.fromkeys(f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows)
    )
    return f"{when}, {where}. {'; '.join(said)}."
