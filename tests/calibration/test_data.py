"""Building samples: sources, lengths, splits, and what is wrong with data."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.calibration.answers import generate_greedy
from moacompress.calibration.data import build_samples, spread
from moacompress.calibration.samples import Sample, fingerprint_samples
from moacompress.errors import DataError
from moacompress.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.models import SourceModel


@pytest.fixture
def source(tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerBase) -> SourceModel:
    from moacompress.models import SourceModel, model_shape

    model = tiny_model("llama")
    return SourceModel(model, tiny_tokenizer, "tiny", model_shape(model), 4096)


def recipe(sources: Any, lengths: Sequence[int] = (256,), samples: int = 4, **calibration: Any) -> Recipe:
    part = {"sources": sources, "lengths": list(lengths), "samples": samples, "validation_samples": samples}
    return Recipe.from_dict({"calibration": {"answer_tokens": 8, **part, **calibration}})


def write_rows(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def text_of(source: SourceModel, sample: Sample) -> str:
    return str(source.tokenizer.decode(sample.input_ids))


def prompts(count: int, size: int = 190) -> list[dict[str, str]]:
    return [{"prompt": f"{i:03d}" + "x" * (size - 3), "answer": "unused"} for i in range(count)]


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


def test_generators(source: SourceModel) -> None:
    asked = recipe([{"generator": "needle"}, {"generator": "key-value"}], (700, 1024), 4)
    samples = build_samples(source, asked, "calibration")
    assert [sample.length for sample in samples] == [700, 700, 1024, 1024]
    assert {sample.source for sample in samples} == {"needle/noise", "key-value"}
    for sample in samples:
        assert sample.length - 40 < len(sample.input_ids) <= sample.length
        cut = int(sample.answer_mask.argmax())
        assert sample.answer_mask[cut:].all()
        (answer,) = generate_greedy(source.model, [sample.input_ids[:cut].tolist()], 8)
        assert sample.input_ids[cut:].tolist() == answer


def test_deterministic_and_split(source: SourceModel) -> None:
    asked = recipe([{"generator": "needle"}], (700,), 3)
    first, again = (build_samples(source, asked, "calibration") for _ in range(2))
    assert fingerprint_samples(first) == fingerprint_samples(again)
    assert fingerprint_samples(first) != fingerprint_samples(build_samples(source, asked, "validation"))
    other = build_samples(source, asked.override(seed=1), "calibration")
    assert fingerprint_samples(first) != fingerprint_samples(other)


def test_prompt_rows_are_answered_by_the_model(source: SourceModel, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "qa.jsonl", [*prompts(12), *prompts(3)])
    seen = {}
    for split in ("calibration", "validation"):
        samples = build_samples(source, recipe([{"path": path}]), split)
        assert {sample.source for sample in samples} == {"file:qa.jsonl"}
        texts = [text_of(source, sample) for sample in samples]
        assert not any("unused" in text for text in texts)
        seen[split] = {text[len("<|im_start|>user\n") :][:3] for text in texts}
        assert len(seen[split]) == 4
    assert not seen["calibration"] & seen["validation"]


def test_messages_rows(source: SourceModel, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{i}" + "q" * 100},
                {"role": "assistant", "content": "first."},
                {"role": "user", "content": "z" * 30},
                {"role": "assistant", "content": "human answer"},
            ]
        }
        for i in range(10)
    ]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    for sample in build_samples(source, recipe([{"path": str(tmp_path / "chat.json")}]), "calibration"):
        assert "human answer" not in text_of(source, sample)
        assert str(source.tokenizer.decode(sample.input_ids[sample.answer_mask])).startswith("first.<|im_end|>")


def test_parquet_rows(source: SourceModel, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(prompts(9)), tmp_path / "qa.parquet")
    assert len(build_samples(source, recipe([{"path": str(tmp_path / "qa.parquet")}]), "calibration")) == 4


@pytest.mark.parametrize("documents", [1, 5])
def test_plain_text(source: SourceModel, tmp_path: Path, documents: int) -> None:
    for name in range(documents):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}w{i:04d}" for i in range(300)))
    words = {}
    for split in ("calibration", "validation"):
        samples = build_samples(source, recipe([{"path": str(tmp_path)}], (256, 300)), split)
        for sample in samples:
            assert len(sample.input_ids) == sample.length
            assert sample.answer_mask.sum() == 32
            assert not sample.answer_mask[: sample.length // 2].any()
        words[split] = {word for sample in samples for word in text_of(source, sample).split()[1:-1]}
    assert not words["calibration"] & words["validation"]


def test_prose_haystack(source: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Once upon a time. " * 300)
    asked = recipe([{"generator": "needle", "haystack": "prose"}], (700,), 2, text=str(tmp_path / "t.txt"))
    (first, _) = build_samples(source, asked, "validation")
    assert first.source == "needle/prose"
    assert "Once upon" in text_of(source, first)


def test_hub_set_without_network(source: SourceModel) -> None:
    with pytest.raises(DataError, match=r"can not load hub set nobody/nothing: \w+: "):
        build_samples(source, recipe([{"dataset": "nobody/nothing"}]), "calibration")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, r"can not read .*none.jsonl: No such file"),
        ("empty.jsonl", "", r"file:empty.jsonl has no rows"),
        ("bad.jsonl", '{"prompt": "a"}\n{"prompt', r"line 2 of .*bad.jsonl is not valid JSON"),
        ("bad.json", "[", r"bad.json is not valid JSON"),
        ("dict.json", "{}", r"dict.json must hold a list of rows, not dict"),
        ("list.json", "[[1]]", r"row 0 of .*list.json is no object but \[1\]"),
        ("x.csv", "a", r"x.csv is no .jsonl, .json, .parquet or .txt file"),
        ("x.parquet", "a", r"can not read .*x.parquet: "),
        ("cols.json", '[{"question": 1, "id": 2}]', r"has the columns id, question; rows need `messages`, `prompt`"),
        ("one.json", '[{"prompt": "a"}]', r"has 1 row; calibration and validation need at least one each"),
        (
            "null.json",
            '[{"prompt": null}, {"prompt": 2}]',
            r"row 0 of file:null.json has no text under 'prompt' but None",
        ),
        ("m.json", '[{"messages": 1}, {"messages": 2}]', r"row 0 of file:m.json has no list of turns"),
        (
            "t.json",
            '[{"messages": [{"role": "user"}]}, {"messages": 2}]',
            r"turn 0 of row 0 .*needs a role and a content",
        ),
        (
            "a.json",
            '[{"messages": [{"role": "assistant", "content": "a"}]}, {"messages": 2}]',
            r"row 0 .*has no user turn before",
        ),
        (
            "short.json",
            json.dumps(prompts(9, 20)),
            r"0 calibration prompts of 121 to 248 .*of 4 needed at 256 .*have 39 to 39",
        ),
        ("long.json", json.dumps(prompts(9, 400)), r"0 calibration prompts of 121 to 248 .*have 419 to 419"),
        ("few.json", json.dumps(prompts(4)), r"has 3 calibration prompts of 121 to 248 .*of 4 needed"),
        ("short.txt", "word " * 50, r"the longest of 1 texts .*has 166 tokens; stretches of 256"),
    ],
)
def test_bad_data(source: SourceModel, tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        build_samples(source, recipe([{"path": str(tmp_path / name)}]), "calibration")


def test_lengths_that_can_not_be(source: SourceModel) -> None:
    needle = [{"generator": "needle"}]
    with pytest.raises(DataError, match=r"samples of 64 tokens .*longer than the largest sink, 64 tokens"):
        build_samples(source, recipe(needle, (64,)), "calibration")
    with pytest.raises(DataError, match="8,192 tokens were asked for; the model was made for at most 4,096"):
        build_samples(source, recipe(needle, (8192,)), "calibration")
    with pytest.raises(DataError, match="1 calibration samples do not cover 2 lengths"):
        build_samples(source, recipe(needle, (512, 1024), 1), "calibration")
    with pytest.raises(DataError, match=r"calibration.text names no file"):
        build_samples(source, recipe([{"generator": "needle", "haystack": "prose"}]), "calibration")


def test_messages_need_a_chat_template(source: SourceModel, tmp_path: Path) -> None:
    import copy

    source.tokenizer = copy.deepcopy(source.tokenizer)
    source.tokenizer.chat_template = None
    path = write_rows(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": f"{i}"}]} for i in range(3)])
    with pytest.raises(DataError, match="the model has no chat template"):
        build_samples(source, recipe([{"path": path}]), "calibration")
