"""Rows as tables: who keeps what at which bytes, who is faster, and who wins."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NOTES = {"versions": {"library": "1.2"}, "machine": "a machine", "threads": 1, "date": "2026-01-02"}


def answers(rival: str, setting: str, matches: list[float], share: float, **more: Any) -> list[dict[str, Any]]:
    numbers = {"kv_bytes": 1000 * share, "masked_bytes": more.get("masked", 0), "tokens": 100}
    of = {"rival": rival, "setting": setting, "question": more.get("question", ""), "note": more.get("note", "")}
    of |= {"measure": "quality", "task": "a", "length": 64, **NOTES}
    return [
        {**of, "key": f"{rival} {setting} {more} {index}", "numbers": {"match": match, **numbers}, "index": index}
        for index, match in enumerate(matches)
    ]


def times(setting: str, length: int, step: list[float]) -> list[dict[str, Any]]:
    of = {"rival": "fast", "setting": setting, "measure": "speed", "length": length, **NOTES}
    numbers = [{"prompt_ms": ms * 1000, "step_ms": ms, "peak_bytes": 2**20 * ms} for ms in step]
    return [{**of, "key": f"{setting} {length} {turn}", "numbers": each} for turn, each in enumerate(numbers)]


def cells(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if f"| {name} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_answers_beside_ours_at_the_bytes(rivals: SimpleNamespace) -> None:
    right = [1.0] * 20
    rows = [
        *answers("transformers", "dense", [*right, 0.0], 1),
        *answers("moacompress", "small", [*right[:10], *[0.0] * 10, 1.0], 0.1),
        *answers("moacompress", "large", [*right, 1.0], 0.25),
        *answers("other", "wins", [*right, 0.0], 0.15, note="a note"),
        *answers("other", "loses", [0.0] * 21, 0.5),
        *answers("other", "tiny", right[:5], 0.01),
        *answers("other", "masks", right, 1, masked=740, question="seen"),
    ]
    table = rivals.table.quality_table(rows)
    assert "the 20 of 21 prompts" in table
    beside = ["small: -0.50 [-0.70, -0.26], p .002", "**the rival**", "a note"]
    assert cells(table, "wins")[3:] == ["0.150", "1.00 [0.84, 1.00]", *beside]
    assert cells(table, "loses")[4:7] == ["0.00 [0.00, 0.16]", "large: +1.00 [+0.68, +1.00], p < .001", "ours"]
    assert cells(table, "tiny")[4:7] == ["1.00 [0.57, 1.00] of 5", "", ""]
    beside = ["large: +0.00 [-0.16, +0.16], p 1", "no difference found"]
    assert cells(table, "masks")[2:7] == ["seen", "0.260, 1.00 in memory", "1.00 [0.84, 1.00]", *beside]
    *lines, _, chance = table.splitlines()[4:]
    assert chance == "Each of 4 differences is tested alone: if none were real, up to 0.2 would count by chance."
    order = [line.split("|")[2].strip() for line in lines]
    assert order == ["tiny", "small", "wins", "large", "masks", "loses", "dense"]
    assert rivals.table.quality_table(rows[21:]) == ""


def test_three_prompts_of_seven_are_no_verdict(rivals: SimpleNamespace) -> None:
    """The exact p of three pairs that all differ one way is .25, whatever an interval shows."""
    rows = [
        *answers("transformers", "dense", [1.0] * 7, 1),
        *answers("moacompress", "ours", [1.0] * 7, 0.1),
        *answers("other", "theirs", [1.0] * 4 + [0.0] * 3, 0.15),
    ]
    beside, better = cells(rivals.table.quality_table(rows), "theirs")[5:7]
    assert beside.endswith(", p .25")
    assert better == "no difference found"


def test_times_are_medians_and_the_best_is_bold(rivals: SimpleNamespace) -> None:
    table = rivals.table.speed_table([*times("a", 256, [3, 1, 2]), *times("b", 256, [4]), *times("b", 1024, [5])])
    assert table.splitlines()[0].count("step, ms") == 2
    assert cells(table, "a")[2:] == ["3", "**2.0**", "", "**2.00**", "", "**2**", ""]
    assert cells(table, "b")[2:] == ["1", "4.0", "**5.0**", "4.00", "**5.00**", "4", "**5**"]


def test_kept_keys_beside_our_baseline(rivals: SimpleNamespace) -> None:
    of = {"rival": "other", "setting": "press-25", "ours": "mine", "question": "unseen", "measure": "kept", **NOTES}
    rows = [{**of, "key": str(same), "numbers": {"same": same, "share": 0.25}} for same in (1.0, 0.5)]
    assert cells(rivals.table.kept_table(rows), "press-25")[2:] == ["mine", "unseen", "2", "0.250", "0.750", "0.500"]
    assert rivals.table.kept_table([]) == ""


def test_rows_of_other_runs_are_left_out(rivals: SimpleNamespace, capsys: Any) -> None:
    def of(rows: list[dict[str, Any]], **notes: Any) -> list[dict[str, Any]]:
        return [{**row, **notes} for row in rows]

    tables = rivals.table.tables
    one = {"model": "m", "patch_points": "a", "threads": 1}
    mine = [
        *of(answers("transformers", "dense", [1.0, 1.0], 1), model="m", patch_points="d"),
        *of(answers("moacompress", "gates", [1.0, 0.0], 0.25), **one),
        *of(times("a", 256, [3, 2]), **one, steps=24),
        *of(times("b", 256, [4]), **one, steps=24),
        *of(times("older", 256, [5])),  # which do not say what they are of
    ]
    wanted = tables(mine)
    assert capsys.readouterr().err == ""
    before = [
        *of(answers("moacompress", "gates", [0.0, 0.0], 0.5), **{**one, "patch_points": "another checkpoint"}),
        *of(answers("transformers", "dense", [1.0, 0.0], 1), model="another model", patch_points="e"),
        *of(answers("moacompress", "of-another-model", [1.0, 0.0], 0.3), model="another model", patch_points="f"),
        *of(times("a", 256, [9]), **{**one, "threads": 4}, steps=24),
        *of(times("a", 256, [9]), **one, steps=8),
        *of(times("b", 256, [9]), **one, steps=24, machine="another"),
        *of(times("b", 256, [9]), **{**one, "patch_points": "b"}, steps=24),
    ]
    assert tables([*before, *mine]) == wanted
    assert capsys.readouterr().err.startswith("10 of 18 rows are left out: newer ones are of another model, checkpoint")


def test_answers_to_other_prompts_of_the_same_place_are_not_paired(rivals: SimpleNamespace) -> None:
    """As of a file that was begun with another text."""

    def of(prompts: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "prompt": prompt} for prompt, row in zip(prompts, rows, strict=True)]

    rows = [
        *of("abc", answers("transformers", "dense", [1.0, 0.0, 1.0], 1)),
        *of("abd", answers("moacompress", "large", [1.0, 1.0, 1.0], 0.25)),
        *of("xyc", answers("other", "some", [1.0, 1.0, 0.0], 0.5)),
        *of("xyz", answers("other", "none", [1.0, 1.0, 1.0], 0.5)),
        *of("xbz", answers("other", "wrong", [1.0, 1.0, 1.0], 0.5)),
    ]
    table = rivals.table.quality_table(rows)
    assert cells(table, "large")[4] == "1.00 of 1"
    assert cells(table, "some")[4:7] == ["0.00 of 1", "", ""]
    assert "none" not in table  # of no prompt that dense answered
    assert "wrong" not in table  # of one that it did not answer right


def test_a_file_of_rows_becomes_tables(rivals: SimpleNamespace, tmp_path: Path) -> None:
    rows = [*answers("transformers", "dense", [1.0], 1), *times("a", 256, [3])]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*map(json.dumps, [*rows, {**rows[-1], "numbers": rows[-1]["numbers"]}]), '{"half']))
    read = rivals.table.read_rows(path)
    assert read == rows
    said = rivals.table.tables(read)
    assert said.endswith("2026-01-02, a machine, 1 thread. transformers (library 1.2); fast (library 1.2).")
    assert rivals.table.tables([]) == ""
    assert rivals.table.read_rows(tmp_path / "nothing was measured") == []
