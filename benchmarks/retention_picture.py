"""Draws what plans keep against the bytes that they take, from evaluations of the same prompts, as a PNG.

    python benchmarks/retention_picture.py gates=quarter/eval.json gates=eighth/eval.json windows=eval.json:eighth -o kept.png

A point is `NAME=FILE`, the plan of an evaluation that was written with `eval -o`, or `NAME=FILE:MODEL`, another side of it, a
folder by its name. Points of one name are joined by a line. Retention is of all prompts together that dense gets right,
with its 95% interval; bytes are of the dense cache at the same prompts. Needs the extra `report` and a Chrome.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from moacompress.report.page.figure_style import OTHERS, Picture, axis, intervals, lines
from moacompress.report.page.quality_figures import side_names
from moacompress.report.page.still_pictures import png

ROLES = ("plan", "uniform", *OTHERS)


@dataclass(frozen=True)
class Point:
    """A side of an evaluation.

    Attributes:
        name: of the line that it is on.
        share: of the dense bytes.
        kept: of what dense gets right.
        ci95: its interval.
        prompts: that dense gets right.
        wording: of the tasks' prompts, as the evaluation has it.
    """

    name: str
    share: float
    kept: float
    ci95: tuple[float, float]
    prompts: int
    wording: dict[str, str]


def read_point(text: str) -> Point:
    """Reads `NAME=FILE` or `NAME=FILE:MODEL`.

    Raises:
        SystemExit: no such side, or an evaluation without dense.
    """
    name, _, rest = text.partition("=")
    file, _, model = rest.partition(":")
    evaluation = json.loads(Path(file).read_text("utf-8"))
    pooled = evaluation["pooled"]["results"]
    found = {row["model"]: row for row in pooled if row["metric"] == "retention"}
    names = side_names(found)
    rows = {names[given]: row for given, row in found.items()}
    side = model or names.get("plan", "plan")
    if side not in rows or "dense" not in rows:
        raise SystemExit(f"{file} has no retention of {side} beside dense; it has {', '.join(rows)}")
    row = rows[side]
    low, high = row["ci95"] or (row["value"],) * 2
    return Point(
        name,
        row["kv_bytes"] / rows["dense"]["kv_bytes"],
        row["value"],
        (low, high),
        row["prompts"],
        evaluation.get("wording", {}),
    )


def picture(points: list[Point]) -> Picture:
    """Returns the picture.

    Raises:
        SystemExit: more names than can be told apart, or evaluations whose prompts say different things.
    """
    if any(point.wording != points[0].wording for point in points):
        raise SystemExit("the evaluations are of prompts in different wordings, and cannot be compared")
    traces, names = [], list(dict.fromkeys(point.name for point in points))
    if len(names) > len(ROLES):
        raise SystemExit(f"{len(names)} names are more than can be told apart; give at most {len(ROLES)}")
    for role, name in zip(ROLES, names, strict=False):
        mine = sorted((point for point in points if point.name == name), key=lambda point: point.share)
        values = [point.kept for point in mine]
        error = intervals(values, [point.ci95 for point in mine])
        traces.append(lines(role, name, [100 * point.share for point in mine], values, error_y=error))
    ticks = [3.125, 6.25, 12.5, 25, 50, 100]
    layout = {
        "xaxis": axis("% of the dense KV bytes", type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks]),
        "yaxis": axis("kept of what dense gets right", range=[0, 1.02], tickformat=".0%"),
        "height": 460,
    }
    counts = sorted({point.prompts for point in points})
    title = f"What is kept of {' or '.join(map(str, counts))} prompts that dense gets right, with 95% intervals"
    return Picture("retention", title, traces, layout)


def main() -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", nargs="+", metavar="NAME=FILE[:MODEL]")
    parser.add_argument("-o", "--out", type=Path, default=Path("retention.png"))
    given = parser.parse_args()
    given.out.write_bytes(png(picture([read_point(text) for text in given.points])))
    print(given.out)


if __name__ == "__main__":
    main()
