"""Building samples: sources, lengths, splits, and what is wrong with data."""

from __future__ import annotations

import copy
import json
from collections import UserList
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from moacompress.calibration.data import answers
from moacompress.calibration.data.answers import AnswerStore, SampleDraft, generate_greedy
from moacompress.calibration.data.data_rows import first_of_each
from moacompress.calibration.data.plain import chop
from moacompress.calibration.data.sample_sources import build_samples, longer_counts, make_drafts, spread, varied
from moacompress.calibration.data.samples import Sample, fingerprint_samples
from moacompress.core.errors import DataError
from moacompress.prompts.library_source import ASKED, calibration_modules, read_modules
from moacompress.prompts.pools import SPLITS, Prose, Split
from moacompress.recipe import Recipe
from moacompress.recipe_sections import Generator
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moacompress.models.source import SourceModel


def recipe(sources: Any, lengths: Sequence[int] = (256,), samples: int = 4, **calibration: Any) -> Recipe:
    part = {"sources": sources, "lengths": list(lengths), "samples": samples, "validation_samples": samples}
    return Recipe.from_dict({"calibration": {"answer_tokens": 8, "longer_samples": 0, **part, **calibration}})


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def text_of(source: SourceModel, sample: Sample) -> str:
    return str(source.tokenizer.decode(sample.input_ids))


def prompts(count: int, size: int = 190) -> list[dict[str, str]]:
    return [{"prompt": f"{i:03d}" + "x" * (size - 3), "answer": "unused"} for i in range(count)]


def turns_of(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(said)]


def conversations(count: int) -> list[dict[str, Any]]:
    said = ("first.", "z" * 30, "human answer")
    return [{"messages": turns_of(f"{i:02d}" + "q" * 100, *said)} for i in range(count)]


def test_spread_is_even_over_lengths_and_by_weight() -> None:
    table = spread(24, 2, [1, 1, 0.5])
    assert [sum(row) for row in table] == [12, 12]
    totals = [sum(column) for column in zip(*table, strict=True)]
    assert sum(totals) == 24
    assert totals[2] == 5
    assert spread(5, 2, [1]) == [[2], [3]]
    assert spread(4, 2, [1, 1]) == [[1, 1], [1, 1]]
    for weights in ([3, 1, 1, 0.1], [0.01, 5], [1] * 7):
        for count in range(2, 40):
            assert sum(map(sum, spread(count, 2, weights))) == count


def test_validation_has_samples_longer_than_any_that_is_profiled(source: SourceModel, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "qa.jsonl", prompts(12, 480))
    sources = [{"generator": "needle"}, {"path": path}, {"generator": "key-value", "weight": 2}]
    asked, plain = recipe(sources, (700,), longer_samples=3), recipe(sources, (700,))
    samples = build_samples(source, asked, "validation")
    longer = [sample for sample in samples if sample.length == 1400]
    assert sorted(sample.source for sample in longer) == ["key-value", "key-value", "needle/noise"]
    assert all(1300 < len(sample.input_ids) <= 1400 for sample in longer)
    others = [sample for sample in samples if sample.length < 1400]
    assert fingerprint_samples(others) == fingerprint_samples(build_samples(source, plain, "validation"))
    assert {sample.length for sample in build_samples(source, asked, "calibration")} == {700}
    assert longer_counts(asked, 1399) == [0, 0, 0]
    assert longer_counts(asked, 0) == longer_counts(asked, 1400) == [1, 0, 2]
    assert longer_counts(recipe([{"path": path}], longer_samples=3), 0) == [0]


def test_an_answer_that_takes_all_the_room_is_refused_before_the_model_answers(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer may be shorter than its room, so the prompt alone must be long enough for a sample."""
    path = write_rows(tmp_path / "rows.jsonl", prompts(12, 30))
    monkeypatch.setattr(type(source.model), "generate", lambda *args, **kwargs: pytest.fail("it answered"))
    missing, no_room = "0 calibration prompts of 65 to 128 tokens left", "leave no room for a prompt of"
    for room, match in ((128, missing), (192, no_room), (900, no_room)):
        with pytest.raises(DataError, match=match):
            build_samples(source, recipe([{"path": path}], answer_tokens=room), "calibration")


def test_a_prompt_with_several_answers_is_one_sample_of_one_split(source: SourceModel, tmp_path: Path) -> None:
    """Answers of rows are not used, so rows that differ in them alone are the same prompt."""
    asked = [row["prompt"] for row in prompts(40)]
    pairs = [(prompt, answer) for prompt in asked for answer in "abc"]
    prompt_rows: list[Any] = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
    turns = [{"messages": turns_of(prompt, answer)} for prompt, answer in pairs]
    splits: tuple[tuple[Split, int], ...] = (("calibration", 14), ("validation", 6))
    for number, rows in enumerate((prompt_rows, turns)):
        path = write_rows(tmp_path / f"{number}.jsonl", rows)
        seen = []
        for split, count in splits:
            drafts = make_drafts(source, recipe([{"path": path}], samples=count), split)
            seen.append({tuple(draft.ids) for draft in drafts})
            assert len(seen[-1]) == count
        assert not seen[0] & seen[1]
    rows_of_hub = HubRows(rows)
    assert list(first_of_each(rows_of_hub, "messages", "hub")) == list(range(0, 120, 3))
    assert rows_of_hub.columns == ["messages"]


class HubRows(UserList[Any]):
    """As of `datasets`: no list, and asked for the columns that are wanted."""

    columns: list[str] | None = None

    def select_columns(self, columns: list[str]) -> HubRows:
        self.columns = columns
        return self


def test_text_for_the_lengths_but_not_for_twice_the_longest(
    source: SourceModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "t.txt").write_text(" ".join(f"Once upon a time {number}." for number in range(1000)))
    asked = recipe(
        [{"generator": "needle", "haystack": "prose"}], (700,), 2, text=str(tmp_path / "t.txt"), longer_samples=1
    )
    assert {draft.length for draft in make_drafts(source, asked, "validation")} == {700, 1400}
    assert caplog.text == ""
    (tmp_path / "t.txt").write_text(" ".join(f"Once {number}." for number in range(560)))
    assert {draft.length for draft in make_drafts(source, asked, "validation")} == {700}
    assert "no plan will be measured on needle beyond the lengths that were asked for" in caplog.text


def test_hub_set_without_network(source: SourceModel) -> None:
    with pytest.raises(DataError, match=r"cannot load hub set nobody/nothing: \w+: "):
        build_samples(source, recipe([{"dataset": "nobody/nothing"}]), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"cannot read .*none.jsonl: No such file"),
        (
            "bad.jsonl",
            '{"prompt": "a"}\n{"prompt',
            r"cannot read .*bad.jsonl: ArrowInvalid: JSON parse error: .* in row 1",
        ),
        ("bad.json", "[", r"cannot read .*bad.json: ValueError: Expected object or value"),
        ("bad.json", "9" * 5000, r"cannot read .*bad.json: ArrowInvalid: JSON parse error"),
        ("dict.json", "{}", r"file:dict.json has no rows"),
        (
            "days.json",
            '[{"prompt": "2021-05-03"}, {"prompt": "2021-05-04"}, {"prompt": "2021-05-05"}]',
            r"row \d of file:days.json has no text under 'prompt' but the date 2021-05-0\d; .* give the rows as .csv",
        ),
        ("empty.json", "[]", r"file:empty.json has no rows"),
        ("blank.txt", " ", r"blank.txt has no text"),
        (
            "half.jsonl",
            '{"prompt": "\\ud83d"}\n{"prompt": "b\\ud83d"}\n{"prompt": "c\\ud83d"}',
            r"half.jsonl: ArrowInvalid: JSON parse error: The surrogate pair in string is invalid",
        ),
        ("squad.json", '{"data": 5}', r"squad.json is not a SQuAD file: TypeError"),
        ("squad.json", '{"data": [{"paragraphs": [{"context": 1, "qas": []}]}]}', r"context is int, not text"),
        ("squad.json", '{"data": []}', r"squad.json has no answerable question"),
        ("list.json", "[[1]]", r"row 0 of file:list.json has no text under 'text' but \[1\]"),
        ("x.csv", "prompt\n", r"file:x.csv has no rows"),
        ("x.tsv", "a", r"x.tsv is no .jsonl, .json, .csv, .parquet, .txt file"),
        ("x.parquet", "a", r"cannot read .*x.parquet: "),
        (
            "cols.json",
            '[{"question": 1, "id": 2}]',
            r"has the columns id, question; rows need `messages`, .*`context` with `question`",
        ),
        (
            "null.json",
            '[{"prompt": null}, {"prompt": 2}, {"prompt": 3}]',
            r"row \d of file:null.json has no text under 'prompt' but (None|2|3)",
        ),
        (
            "m.json",
            '[{"messages": 1}, {"messages": 2}, {"messages": 3}]',
            r"row \d of file:m.json has no list of turns",
        ),
        (
            "t.json",
            '[{"messages": [{"role": "user"}]}, {"messages": [{"role": "assistant"}]}, {"messages": [{"role": "system"}]}]',
            r"turn 0 of row \d .*needs a role and a content",
        ),
        (
            "a.json",
            '[{"messages": [{"role": "assistant", "content": "a"}]}, {"messages": []}, '
            '{"messages": [{"role": "system", "content": ""}]}]',
            r"row \d .*has no user turn before",
        ),
        (
            "short.json",
            json.dumps(prompts(9, 20)),
            r"0 calibration prompts of 121 to 248 .*of 4 needed at 256 .*have 39 to 39 tokens: too few for any length",
        ),
        (
            "long.json",
            json.dumps(prompts(9, 400)),
            r"0 calibration prompts of 121 to 248 .*have 419 to 419 tokens: \d fit 512; choose such lengths \(--lengths\)",
        ),
        ("few.json", json.dumps(prompts(4)), r"has \d calibration prompts of 121 to 248 .*of 4 needed"),
        ("one.json", '[{"prompt": "a"}]', r"has too few distinct rows: 1; calibration, validation, evaluation need"),
        (
            "short.txt",
            " ".join(str(number) for number in range(900)),
            r"short.txt has too few distinct sections of 500 words: 2; calibration, validation, evaluation need at",
        ),
    ],
)
def test_bad_data(source: SourceModel, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    """Beside what is in tests/cli/test_refusals.py."""
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build_samples(source, recipe([{"path": str(tmp_path / name)}]), "calibration")


def test_prompts_that_no_length_has_room_for_are_counted(
    source: SourceModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are left out, and whoever gave them is told how many they are: a calibration of the others is none of theirs."""
    rows = [*prompts(30, 200), *({"prompt": "x" * size + str(size)} for size in range(600, 630))]
    path = write_rows(tmp_path / "mixed.jsonl", rows)
    asked = recipe([{"path": path}], (256,), 8)
    with caplog.at_level("WARNING"):
        drafts = make_drafts(source, asked, "calibration")
        make_drafts(source, asked, "calibration")  # as a run does
    assert len(drafts) == 8
    longer = [text for text in caplog.messages if "are longer than 248 tokens" in text]
    assert len(longer) == 1
    assert "of file:mixed.jsonl that were tried" in longer[0]
    assert "the longest has 6" in longer[0]


def test_samples_that_cannot_be(source: SourceModel) -> None:
    needle = [{"generator": "needle"}]
    for asked, message in (
        (recipe(needle, (64,)), r"samples of 64 tokens .*longer than the largest sink, 64 tokens"),
        (recipe(needle, (8192,)), "8,192 tokens were asked for; the model was made for at most 4,096"),
        (recipe(needle, (512, 1024), 1), "1 calibration samples do not cover 2 lengths"),
        (recipe([{"generator": "needle", "haystack": "prose"}]), r"calibration.text names no file"),
        (recipe(needle, (700,), text_samples=2), r"2 samples of plain text were asked for, but calibration.text names"),
    ):
        with pytest.raises(DataError, match=message):
            build_samples(source, asked, "calibration")


def questions(count: int, size: int = 60) -> list[dict[str, str]]:
    return [{"context": f"D{i:03d} " + "y" * size, "question": f"What of D{i:03d}?"} for i in range(count)]


SOURCES = (
    *("needle", "multi-needle", "key-value", "records", "recall"),
    *("prompts", "conversations", "questions", "squad", "text"),
)


@pytest.fixture
def part(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Returns a function that makes a source of any kind."""

    def make(name: str) -> dict[str, Any]:
        if name in get_args(Generator):
            return {"generator": name}
        path = tmp_path / f"{name}.{'txt' if name == 'text' else 'json' if name == 'squad' else 'jsonl'}"
        if name == "text":
            path.write_text(" ".join(f"w{i:04d}" for i in range(3000)))
        elif name == "squad":
            asked = [{"context": row["context"], "qas": [{**row, "answers": [{"text": "y"}]}]} for row in questions(60)]
            path.write_text(json.dumps({"data": [{"paragraphs": asked[i : i + 6]} for i in range(0, 60, 6)]}))
        else:
            rows = {"prompts": prompts(30, 700), "conversations": conversations(30), "questions": questions(60)}
            write_rows(path, rows[name])
        return {"path": str(path)}

    return make


@pytest.mark.parametrize(
    ("name", "chat"), [*((name, True) for name in SOURCES), *((name, False) for name in ("needle", *SOURCES[5:9]))]
)
def test_every_source_with_and_without_a_chat_template(
    source: SourceModel, part: Callable[[str], dict[str, Any]], name: str, chat: bool
) -> None:
    source.tokenizer = source.tokenizer if chat else without_template(source.tokenizer)
    length = 256 if name == "conversations" else 800
    asked = recipe([part(name)], (length,), 3)
    samples = build_samples(source, asked, "calibration")
    again, other = (build_samples(source, each, "calibration") for each in (asked, asked.override(seed=1)))
    assert fingerprint_samples(samples) == fingerprint_samples(again) != fingerprint_samples(other)
    assert len(samples) == 3
    others = build_samples(source, asked, "validation")
    assert not {tuple(s.input_ids) for s in samples} & {tuple(s.input_ids) for s in others}
    if name == "text":  # a word at either end may be cut
        ours, theirs = ({word for s in each for word in text_of(source, s).split()[1:-1]} for each in (samples, others))
        pools = Prose.load(asked.calibration.sources[0].path or "").pools
        for words, split in zip((ours, theirs), SPLITS[:2], strict=True):
            assert words <= {word for document in pools[split] for word in document}
    drafts = make_drafts(source, asked, "calibration")
    for sample, draft in zip(samples, drafts, strict=True):
        assert (sample.length, sample.kind) == (length, "text" if name == "text" else "answer")
        assert not any(said in text_of(source, sample) for said in ("unused", "human answer"))
        assert ("<|im_start|>" in text_of(source, sample)) == (chat and name not in ("recall", "text"))
        if name == "text":
            continue
        # after the prompt, all is the dense model's answer, and nothing else is but earlier turns of the assistant
        cut = len(draft.ids)
        (answer,) = generate_greedy(source.model, [list(draft.ids)], draft.room)
        assert sample.input_ids[cut:].tolist() == answer
        assert sample.answer_mask[cut:].all()
        before = str(source.tokenizer.decode(sample.input_ids[:cut][sample.answer_mask[:cut]]))
        assert before == ("" if name != "conversations" else "first.<|im_end|>" if chat else "first.")


def prose(tmp_path: Path, documents: int, words: int = 3000) -> str:
    folder = tmp_path / "prose"
    folder.mkdir()
    for name in range(documents):
        (folder / f"{name}.txt").write_text(" ".join(f"{name}w{i:04d}" for i in range(words)))
    return str(folder)


def test_text_samples_come_after_the_answers(source: SourceModel, tmp_path: Path) -> None:
    text = prose(tmp_path, 6)
    given = partial(recipe, [{"generator": "needle"}], (700, 768), 4, text=text)
    plain = build_samples(source, given(), "calibration")
    samples = build_samples(source, given(text_samples=5), "calibration")
    assert fingerprint_samples(samples[:4]) == fingerprint_samples(plain)
    assert [sample.kind for sample in samples] == ["answer"] * 4 + ["text"] * 5
    assert [sample.length for sample in samples[4:]] == [700, 700, 768, 768, 768]
    pool = Prose.load(text).pools["calibration"]
    words = {word for document in pool for word in document}
    for sample in samples[4:]:
        assert sample.source == "text:prose"
        assert len(sample.input_ids) == sample.length
        assert sample.answer_mask.sum() == 32
        assert not sample.answer_mask[: sample.length // 2].any()
        assert set(text_of(source, sample).split()[1:-1]) <= words
    assert len({tuple(sample.answer_mask) for sample in samples[4:]}) == 5
    again = build_samples(source, given(text_samples=5), "calibration")
    assert [s.answer_mask.tolist() for s in again] == [s.answer_mask.tolist() for s in samples]
    validation = build_samples(source, given(text_samples=5), "validation")
    texts = [sample for sample in validation if sample.kind == "text"]
    assert [sample.length for sample in texts] == [700, 700, 768, 768, 768]  # as many samples, so as many texts
    held = {word for document in Prose.load(text).pools["validation"] for word in document}
    assert all(set(text_of(source, sample).split()[1:-1]) <= held - words for sample in texts)
    assert len(validation) == 4 + len(texts)


def test_text_that_is_too_short(source: SourceModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = recipe([{"generator": "needle"}], (700,), text_samples=2, text=prose(tmp_path, 3, 50))
    with pytest.raises(DataError, match=r"the longest of 1 texts of text:prose has 349 tokens; stretches of 700 were"):
        build_samples(source, short, "calibration")
    assert len(build_samples(source, short, "validation")) == 4
    assert "plans will not be measured on plain text: of the validation texts, the longest of 1" in caplog.text


def test_answered_batches_are_not_answered_again(
    source: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "BATCH_TOKENS", 1600)
    asked = recipe([{"generator": "needle"}, {"generator": "recall"}], (700, 800), 8)
    path, calls = tmp_path / "answers.jsonl", []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return generate_greedy(*arguments)

    monkeypatch.setattr(answers, "generate_greedy", counted)
    store = partial(AnswerStore, path, source.shape.weights_fingerprint, "float32")
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        build_samples(source, asked, "calibration", answers=store())
    stop = 0
    assert path.read_bytes().count(b"\n") == 2
    calls.clear()
    resumed = build_samples(source, asked, "calibration", answers=store())
    made = len(calls)
    assert made > 0
    again = build_samples(source, asked, "calibration", answers=store())
    assert fingerprint_samples(again) == fingerprint_samples(resumed)
    assert len(calls) == made
    calls.clear()
    plain = build_samples(source, asked, "calibration")
    assert len(calls) == made + 2
    assert fingerprint_samples(plain) == fingerprint_samples(resumed)


def test_varied_takes_every_source_and_length_first() -> None:
    drafts = [SampleDraft([1], [False], 1, name, length) for length in (1, 2) for name in "aaabbc"]
    assert [(draft.source, draft.length) for draft in varied(drafts, 3)] == [("a", 1), ("c", 1), ("b", 2)]
    assert {(draft.source, draft.length) for draft in varied(drafts, 6)} == {(n, i) for n in "abc" for i in (1, 2)}
    assert varied(drafts, 99) == drafts


def test_source_code_is_of_modules_that_evaluation_does_not_ask_about(source: SourceModel) -> None:
    texts = calibration_modules()
    assert not {text for _, text in read_modules(ASKED)} & {*texts}
    asked = recipe([{"generator": "source-code"}, {"generator": "needle"}], [400])
    drafts = {split: make_drafts(source, asked, split) for split in SPLITS[:2]}
    for split, found in drafts.items():
        code = [draft for draft in found if draft.source == "source-code"]
        assert [draft.kind for draft in code] == ["text"] * 2, split
        assert [len(draft.ids) for draft in code] == [400] * 2
        for draft in code:  # stretches of single modules, their indentation included
            assert any(str(source.tokenizer.decode([*draft.ids[1:]])) in text for text in texts)
    ours, theirs = ({tuple(draft.ids) for draft in found} for found in drafts.values())
    assert not ours & theirs


def test_plain_text_begins_as_the_tokenizer_begins_any(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer: Any = copy.deepcopy(tiny_tokenizer)
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    ids = [(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)]
    assert begin != end
    text = " ".join(f"w{i:04d}" for i in range(300))
    for template, first in (
        (f"{begin} $A", [tokenizer.bos_token_id]),
        (f"{begin} $A {end}", [tokenizer.bos_token_id]),
        ("$A", []),
    ):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ids)
        (draft,) = chop([text], {256: 1}, "text", np.random.default_rng(0), tokenizer)
        assert len(draft.ids) == 256
        assert draft.ids[: len(first)] == first
        assert not {*draft.ids[len(first) :]} & {*tokenizer.all_special_ids}
