"""`moacompress data preview`: the samples that a profile would be made of, for people and as JSON."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.calibration.data.samples import Sample
from moacompress.report.shown_samples import CLOSE, OPEN, ShownSample, pieces
from tests.cli.commands import answer, invoke, problem
from tests.conftest import tiny_model
from tests.printed import printed
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


preview = partial(answer, "data", "preview")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """Returns the folder of a tiny model without a chat template."""
    folder = tmp_path_factory.mktemp("base") / "dense"
    tiny_model("llama").save_pretrained(folder)
    without_template(tiny_tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("chat", [True, False])
def test_samples_are_those_of_the_profile(tiny_folder: Path, base_folder: Path, chat: bool, tmp_path: Path) -> None:
    from moacompress.calibration.data.sample_sources import build_samples
    from moacompress.models.source import load_source
    from moacompress.recipe import Recipe

    folder = tiny_folder if chat else base_folder
    (tmp_path / "prose.txt").write_text(" ".join(f"w{i:04d}" for i in range(3000)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 4\ncalibration: {samples: 6, text_samples: 2, answer_tokens: 8}\n")
    flags = ("--source", "needle", "--source", "recall", "--text", tmp_path / "prose.txt", "--lengths", "700,768")
    data = preview(folder, "--recipe", recipe, *flags, "--count", "3")
    sources = [{"generator": "needle"}, {"generator": "recall"}]
    resolved = Recipe.load(recipe).override(
        calibration__sources=sources, calibration__text=str(tmp_path / "prose.txt"), calibration__lengths="700,768"
    )
    made = {tuple(s.input_ids): s for s in build_samples(load_source(folder), resolved, "calibration")}
    assert len(made) == 8
    assert {sample["source"] for sample in data["samples"]} == {"needle/noise", "recall", "text:prose.txt"}
    assert {sample["length"] for sample in data["samples"]} == {700, 768}
    for sample in data["samples"]:
        same = made[tuple(sample["ids"])]
        assert sample["mask"] == same.answer_mask.tolist()
        assert (sample["source"], sample["kind"], sample["length"]) == (same.source, same.kind, same.length)
        assert (sample["tokens"], sample["answer_tokens"]) == (len(same.input_ids), same.answer_mask.sum())
        assert sample["text"].endswith(sample["answer"]) == (sample["kind"] == "answer")
        assert ("<|im_start|>user" in sample["text"]) == (chat and sample["source"] == "needle/noise")


def test_people_see_the_head_the_tail_and_the_answer(tiny_folder: Path) -> None:
    arguments = ("--source", "needle", "--lengths", "700", "--count", "2")
    shown = invoke("data", "preview", tiny_folder, *arguments)
    assert shown.exit_code == 0, shown.stderr
    data = preview(tiny_folder, *arguments)
    assert shown.stdout.count(OPEN) == shown.stdout.count(CLOSE) == 2
    flat = shown.stdout.replace("\n", "").replace(" ", "")
    for number, sample in enumerate(data["samples"], 1):
        tokens, answers = sample["tokens"], sample["answer_tokens"]
        title = f"{number}/2 needle/noise length 700: {tokens:,} tokens, {answers} of them"
        assert title.replace(" ", "") in flat
        assert f"{OPEN}{sample['answer']}{CLOSE}".replace("\n", "").replace(" ", "") in flat
        assert f"… {tokens - 60 - 120:,} tokens left out …" in shown.stdout
        assert sample["text"][:60].replace("\n", "").replace(" ", "") in flat


ROWS = ("--source", "rows.jsonl")


def write_rows(count: int) -> None:
    rows = ({"prompt": f"{number:03d}" + "x" * 170} for number in range(count))
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ((*ROWS, "--lengths", "256", "--samples", "6", "--validation-samples", "3"), ""),
        (ROWS, " fit 256; choose such lengths (--lengths), ask for fewer samples (--samples), or give more rows"),
        (("--lengths", "64"), "64"),
    ],
)
def test_what_a_profile_takes_is_shown_and_what_it_refuses_is_refused(
    options: tuple[str, ...], refused: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(33)
    if not refused:
        assert {each["source"] for each in preview(tiny_folder, *options)["samples"]} == {"file:rows.jsonl"}
        return
    said = problem("data", "preview", tiny_folder, *options)
    assert refused in said
    profiled = invoke("profile", tiny_folder, *options, "-o", "profile", "-q")
    assert profiled.stderr.splitlines()[-1] == said


@pytest.mark.parametrize(
    ("count", "samples", "refused"),
    [
        (33, 40, "calibration prompts of 97 to 224 tokens left, of 40 needed"),
        (
            2,
            40,
            "file:rows.jsonl has too few distinct rows: 2; calibration, validation, evaluation need at least one each",
        ),
    ],
)
def test_rows_too_few_for_a_profile_are_shown_and_counted(
    count: int, samples: int, refused: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(count)
    options = (*ROWS, "--lengths", "256", "--samples", str(samples))
    data = preview(tiny_folder, *options)
    assert len(data["samples"]) == min(3, count)
    assert refused in data["refused"]
    needed = max(2 * samples, 4 * 12)
    wanted = {"calibration": samples, "validation": 12}
    assert data["rows"] == [{"source": "file:rows.jsonl", "rows": count, "wanted": wanted, "needed": needed}]
    shown = invoke("data", "preview", tiny_folder, *options).stdout
    assert f"file:rows.jsonl has {count} rows; a profile with these settings needs about {needed}: " in shown
    assert f"A profile with these settings is refused: {data['refused']}\n" in shown


def sample(mask: list[int], n: int = 400, text: str = "", kind: Any = "answer") -> Sample:
    marked = np.zeros(n, np.bool_)
    marked[mask] = True
    return Sample(np.arange(n) % 90 + 5, marked, f"file:{text}", n, kind)


def test_pieces_cover_all_tokens(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    for mask, kind in (([398, 399], "answer"), ([200, 201, 399], "answer"), ([150, 220, 260], "text"), ([70], "text")):
        given = sample(mask, kind=kind)
        found = pieces(given, tiny_tokenizer)
        assert sum(piece.tokens for piece in found) == 400
        assert sum(piece.tokens for piece in found if piece.counts) == len(mask)
        at = 0
        for piece in found:
            ids = given.input_ids[at : at + piece.tokens]
            assert piece.text is None or piece.text == tiny_tokenizer.decode(ids)
            at += piece.tokens
    assert not any(piece.text is None for piece in pieces(sample([99], n=100), tiny_tokenizer))
    assert [piece.tokens for piece in pieces(sample([398, 399]), tiny_tokenizer)] == [60, 220, 118, 2]


def shown(given: Sample, tokenizer: Any, **console: Any) -> str:
    return printed(ShownSample(given, tokenizer, "1/1"), **console)


def test_answers_are_marked_by_colour_on_a_terminal(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    given = sample([398, 399])
    answer = str(tiny_tokenizer.decode(given.input_ids[-2:]))
    coloured = shown(given, tiny_tokenizer, force_terminal=True, color_system="standard")
    assert OPEN not in coloured
    assert f"\x1b[1;30;42m{answer}\x1b[0m" in coloured
    for plain in (shown(given, tiny_tokenizer), shown(given, tiny_tokenizer, force_terminal=True, no_color=True)):
        assert f"{OPEN}{answer}{CLOSE}" in plain


def test_text_of_a_file_gives_the_terminal_no_orders() -> None:
    class Evil:
        def decode(self, ids: Any) -> str:
            return "\x1b]0;title\x07[bold]x\r" if len(ids) else ""

    text = shown(sample([99], n=100), Evil())
    assert "\x1b" not in text
    assert "\\x1b]0;title\\x07[bold]x\\r" in text
