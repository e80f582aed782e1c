"""Tables on narrow and wide consoles: every number stands in one line, with its interval in brackets."""

from __future__ import annotations

from rich.console import RenderableType

from moacompress.core.tables import Columns, Table, error_text, estimate_text, facts, p_text
from tests.printed import printed


def lines(shown: list[RenderableType], width: int) -> list[str]:
    found = printed(*(part for part in shown if not isinstance(part, str)), width=width).splitlines()
    assert all(len(line) <= width for line in found)
    return [line.rstrip() for line in found]


def test_an_interval_has_brackets() -> None:
    assert estimate_text(0.951, (0.87, 1.0)) == "0.95 [0.87, 1.00]"
    assert estimate_text(-0.12, (-0.2, 0.04), "+.2f") == "-0.12 [-0.20, +0.04]"
    assert estimate_text(0.5, None, ".2f", "*") == "0.50*"
    assert (error_text(0.1, None), error_text(0.1, 0.02)) == ("0.1", "0.1 ± 0.02")  # a single sample has no error
    assert (p_text(0.0001), p_text(0.25), p_text(1.0)) == ("p < .001", "p .25", "p 1")


def test_a_long_path_is_shown_whole() -> None:
    path = "/models/" + "a-name" * 20
    assert path in "".join(line.removeprefix("model").strip() for line in lines([facts("Model", {"model": path})], 60))


def test_columns_without_room_follow_in_a_table_of_their_own() -> None:
    table = Table("Title", ("", "a", "a longer heading", "c"), [("row 1", "1" * 9, "2" * 9, "3" * 9), ("row 2",)])
    wide, narrow = lines([table], 80), lines([table], 36)
    assert sum("row 1" in line for line in wide) == 1
    assert sum("row 1" in line for line in narrow) == 2
    assert sum("row 2" in line for line in narrow) == 2
    assert [line for line in narrow if "heading" in line and "a longer" not in line]  # wrapped
    text = "\n".join(narrow)
    assert all(text.count(digit * 9) == 1 for digit in "123")


def test_the_same_table_as_markdown() -> None:
    columns: Columns = {"name": str, "KL(dense || model)": lambda value: f"{value:.2f}"}
    assert Table.of("Title", columns, (1, 25), "A note.").markdown() == (
        "| name | KL(dense \\|\\| model) |\n| --- | ---: |\n| 1 | 1.00 |\n| 25 | 25.00 |\n\nA note."
    )
    shown = "\n".join(lines([Table.of("Title", columns, (1, 25), "A note.")], 80))
    assert shown.startswith("Title\n")
    assert "25.00" in shown
    assert shown.endswith("A note.")
