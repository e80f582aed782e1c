"""Rows of a rival: measured once, resumed, and never at the cost of the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moacompress.core.errors import UsageError
from moacompress.evaluation.eviction.key_scores import KeyDiff
from moacompress.evaluation.tasks.cases import Case

STOP = [2]


@pytest.fixture
def prompts(rivals: SimpleNamespace, tiny_tokenizer: Any) -> list[Any]:
    def prompt(index: int, text: str, word: str) -> Any:
        ids = tiny_tokenizer(f"{text} with {word}\nwhich?", add_special_tokens=False)["input_ids"]
        answer = tiny_tokenizer(word, add_special_tokens=False)["input_ids"]
        case = Case("made-up", 64, ids, answer, [True] * len(answer), (word,), "all", 8)
        return rivals.prompts.Prompt(case, index, len(ids) - 6, len(answer) + 1)

    return [prompt(0, "a text", "cat"), prompt(1, "one", "cat"), prompt(2, "a text", "dog")]


@pytest.fixture
def says(rivals: SimpleNamespace, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the fake rival answers, and the dense model too: the first two prompts' word."""
    said = [*tiny_tokenizer("cat", add_special_tokens=False)["input_ids"], *STOP]
    dense = rivals.settings.Setting(*rivals.settings.DENSE, {"says": said})
    monkeypatch.setattr(rivals.measures, "chosen", lambda names, checkpoints: [dense])
    return said


def rows(rivals: SimpleNamespace, tmp_path: Path) -> list[dict[str, Any]]:
    return list(rivals.table.read_rows(tmp_path / "rows.jsonl"))


def test_rows_of_another_gguf_file_are_other_rows(rivals: SimpleNamespace, tiny_folder: Path, tmp_path: Path) -> None:
    """Where a rival runs its weights; for the others it changes nothing."""
    files = [tmp_path / f"{name}.gguf" for name in "ab"]
    for file in files:
        file.write_bytes(file.name.encode())
    benches = [rivals.measures.Bench(tiny_folder, file, tmp_path, 1, None, "a machine") for file in (None, *files)]
    for rival, different in (("llamacpp", 3), ("openvino", 3), ("kvpress", 1)):
        (rivals.requirements / f"{rival}.txt").touch()
        setting = rivals.settings.Setting(rival, "one")
        assert len({bench.key(setting, "speed") for bench in benches}) == different


def test_answers_are_scored_and_not_asked_for_again(
    rivals: SimpleNamespace, bench: Callable[..., Any], prompts: Any, says: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    setting = rivals.settings.Setting("fake", "one", {"says": says, "masked": 8}, once=True, note="made up")
    late = bench(deadline=time.monotonic() - 1)
    assert rivals.measures.measure_quality(late, [setting], prompts, tiny_tokenizer, STOP) == {}
    assert not (tmp_path / "rows.jsonl").exists()
    for _ in range(2):
        rivals.measures.measure_quality(bench(), [setting], prompts[:1], tiny_tokenizer, STOP, ["unseen"])
    assert len(rows(rivals, tmp_path)) == 2
    assert rivals.measures.measure_quality(bench(), [setting], prompts, tiny_tokenizer, STOP) == {}
    everything = rows(rivals, tmp_path)
    found = [row for row in everything if row["setting"] == "one"]
    assert [row["numbers"]["match"] for row in everything if row["setting"] == "dense"] == [1.0, 1.0, 0.0]
    assert {row["numbers"]["match"] for row in found} == {1.0}
    places = [("unseen", 0), ("seen", 0), ("seen", 1), ("unseen", 1)]
    assert [(row["question"], row["index"]) for row in found] == places
    found = [row for row in found if row["index"] == 0]
    tokens = len(prompts[0].case.prompt_ids) + 3  # the word, whose last token and the stop were not read
    assert all(row["numbers"]["tokens"] == tokens for row in found)
    assert all((row["numbers"]["kv_bytes"], row["numbers"]["masked_bytes"]) == (4 * tokens, 8) for row in found)
    assert all(row["note"] == "made up" and row["versions"]["pytest"] == pytest.__version__ for row in found)
    # nothing starts where all is there: a runner that cannot start is not noticed
    rivals.processes.START.write_text("raise SystemExit('started')")
    assert rivals.measures.measure_quality(bench(), [setting], prompts, tiny_tokenizer, STOP) == {}
    other = rivals.settings.Setting("fake", "one", {"says": says, "masked": 9})
    assert "started" in rivals.measures.measure_quality(bench(), [other], prompts, tiny_tokenizer, STOP)["fake:one"]
    (rivals.requirements / "fake.txt").write_text("pytest==0\n")  # other versions are other rows
    assert rivals.measures.measure_quality(bench(), [setting], prompts, tiny_tokenizer, STOP)


@pytest.mark.parametrize(("when", "why"), [("start", "no such model"), ("answer", "out of memory")])
def test_a_rival_that_fails_is_named_and_the_others_are_measured(
    rivals: Any, bench: Any, prompts: Any, says: Any, tiny_tokenizer: Any, tmp_path: Path, when: str, why: str
) -> None:
    settings = [
        rivals.settings.Setting("fake", "bad", {"says": says, "broken": when}),
        rivals.settings.Setting("fake", "good", {"says": says}),
    ]
    failures = rivals.measures.measure_quality(bench(), settings, prompts, tiny_tokenizer, STOP)
    assert list(failures) == ["fake:bad"]
    assert "the process of fake:bad ended with 1" in failures["fake:bad"]
    assert why in failures["fake:bad"]
    assert {row["setting"] for row in rows(rivals, tmp_path)} == {"dense", "good"}
    failures = rivals.measures.measure_speed(bench(), settings, [8], 2, 1)
    assert list(failures) == ["fake:bad"]
    assert [row["setting"] for row in rows(rivals, tmp_path) if row["measure"] == "speed"] == ["good"]


def test_turns_alternate_and_are_resumed(
    rivals: SimpleNamespace, bench: Callable[..., Any], says: Any, tmp_path: Path
) -> None:
    settings = [rivals.settings.Setting("fake", name, {"says": says, "of": name}) for name in ("one", "two")]
    rivals.measures.measure_speed(bench(), settings[:1], [8], 3, 1)
    rivals.measures.measure_speed(bench(), settings, [8, 16], 3, 2)
    found = rows(rivals, tmp_path)
    assert [(row["setting"], row["length"], row["turn"]) for row in found] == [
        (name, length, turn) for length in (8, 16) for turn in (0, 1) for name in ("one", "two")
    ]
    assert all(row["numbers"]["peak_bytes"] > 2**20 and row["numbers"]["step_ms"] > 0 for row in found)


def test_kept_keys_are_compared_at_as_many(
    rivals: SimpleNamespace, bench: Callable[..., Any], prompts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counterpart is the same fake rival: it is told the number of kept keys, and keeps those from the tenth on."""
    monkeypatch.setattr(rivals.kept, "OURS", "fake")
    settings = [
        rivals.settings.Setting("fake", "one", {"keeps": 8}, ours="keydiff"),
        rivals.settings.Setting("fake", "alone", {"keeps": 8}),
    ]
    failures = rivals.kept.measure_kept(bench(), settings, prompts[:1], ["unseen"])
    assert "does not say which tokens it keeps" in failures["fake:one"]  # our baseline is not told `keeps`
    monkeypatch.setattr(rivals.kept, "Setting", lambda *given: rivals.settings.Setting("fake", "mine", {"keeps": 10}))
    for _ in range(2):
        assert rivals.kept.measure_kept(bench(), settings, prompts[:1], ["seen", "unseen"]) == {}
    size = len(prompts[0].case.prompt_ids)
    found = {row["question"]: row["numbers"] for row in rows(rivals, tmp_path)}
    assert found["seen"] == pytest.approx({"same": (size - 11) / (size - 9), "share": (size - 9) / (size - 1)})
    read = prompts[0].question_at
    assert found["unseen"] == pytest.approx({"same": (read - 10) / (read - 8), "share": (read - 8) / read})
    assert len(rows(rivals, tmp_path)) == 2
    monkeypatch.setattr(KeyDiff, "key", lambda self: "another")  # rows of the baseline as it was are no rows of it
    assert rivals.kept.measure_kept(bench(), settings, prompts[:1], ["unseen"]) == {}
    assert len(rows(rivals, tmp_path)) == 3
    assert [row["question"] for row in rivals.table.newest(rows(rivals, tmp_path))] == ["unseen"]


def test_our_baseline_keeps_as_many_as_it_is_told(rivals: SimpleNamespace, tiny_folder: Path) -> None:
    from rivals.runners.moacompress import make

    engine = make({"dense": str(tiny_folder), "threads": 1, "baseline": "keydiff", "dtype": "float32"})
    kept = engine.kept({"prompt": list(range(4, 44)), "count": 3 * 2 * 7})["kept"]
    assert [[len(row) for row in layer] for layer in kept] == [[7, 7]] * 3
    for what in (engine.answer, engine.turn):
        with pytest.raises(NotImplementedError):
            what({})


def test_llama_cpp_needs_its_file(rivals: SimpleNamespace, bench: Callable[..., Any]) -> None:
    (setting,) = rivals.settings.chosen(["llamacpp:bf16-q8_0"], {})
    (rivals.requirements / "llamacpp.txt").touch()
    with pytest.raises(UsageError, match="--gguf"):
        rivals.measures.measure_speed(bench(), [setting], [8], 2, 1)


def test_a_question_begins_on_its_line(rivals: SimpleNamespace, tiny_tokenizer: Any) -> None:
    from moacompress.evaluation.tasks.registry import Resources

    made = rivals.prompts.make_prompts(tiny_tokenizer, ["needle-noise"], [900], 2, Resources())
    assert [prompt.index for prompt in made] == [0, 1]
    for prompt in made:
        before = tiny_tokenizer.decode(prompt.case.prompt_ids[: prompt.question_at])
        behind = tiny_tokenizer.decode(prompt.case.prompt_ids[prompt.question_at :])
        assert before.endswith("\n")
        assert prompt.case.references[0] in before
        assert "?" in behind
        assert "\n" not in behind.partition("<|im_end|>")[0]
        assert prompt.new_tokens >= len(prompt.case.answer_ids)
