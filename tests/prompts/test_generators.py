"""Generators: disjoint pools, uniform depth, exact fit, the form of prompts."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from moacompress.core.errors import DataError
from moacompress.evaluation.tasks import registry as tasks
from moacompress.evaluation.tasks import vocabulary
from moacompress.prompts.field_records import FIELDS, LAYOUTS, record_opening
from moacompress.prompts.generators import (
    ANSWER_ROOM,
    TASKS,
    make_key_value,
    make_needle,
    make_prompt,
    make_recall,
    make_records,
)
from moacompress.prompts.pools import (
    ADJECTIVES,
    CODE_FORMS,
    NOUNS,
    SPLITS,
    Prose,
    Split,
    draw_codes,
    draw_keys,
    draw_numbers,
)
from moacompress.prompts.recall import WORDS
from moacompress.prompts.templates import encode_prompt
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def prose(tmp_path: Path) -> Prose:
    for name in "abcdef":
        words = " ".join(f"{name}{i}." if i % 7 == 6 else f"{name}{i}" for i in range(600))
        (tmp_path / f"{name}.txt").write_text(words)
    return Prose.load(tmp_path)


def test_keys_and_values_of_splits_are_disjoint_by_construction() -> None:
    assert len(set(NOUNS)) == len(NOUNS)
    for draw in (draw_keys, draw_numbers, draw_codes):
        pools = {split: set(draw(rng(), split, 2000)) for split in SPLITS}
        assert all(len(pool) == 2000 for pool in pools.values())
        assert len(set.union(*pools.values())) == 6000
    for index, split in enumerate(SPLITS):
        assert {key.partition("-")[2] for key in draw_keys(rng(), split, 2000)} <= set(NOUNS[index::3])
        assert {int(number) % 3 for number in draw_numbers(rng(), split, 2000)} == {index}
        assert {len(number) for number in draw_numbers(rng(), split, 2000)} == {7}
        codes = draw_codes(rng(), split, 1000)
        assert {re.sub(r"\d", "9", re.sub("[a-z]", "a", re.sub("[A-Z]", "A", code))) for code in codes} == {*CODE_FORMS}
        assert {sum(code.encode()) % 3 for code in codes} == {index}
    fields = [name for split in SPLITS for name in FIELDS[split]]
    assert len(set(fields)) == len(fields) > 40


def test_prose_of_splits_is_disjoint(prose: Prose, tmp_path: Path) -> None:
    words = {split: prose.words(rng(), split) for split in SPLITS}
    assert all(words.values())
    assert len({word for pool in words.values() for word in pool}) == sum(map(len, words.values())) == 6 * (600 - 13)
    assert {name.name for files in prose.files.values() for name in files} == {f"{name}.txt" for name in "abcdef"}


def test_prose_begins_at_a_sentence_and_wraps(prose: Prose) -> None:
    for seed in range(20):
        first = prose.words(rng(seed), "validation")[0]
        assert int(first[1:].rstrip(".")) % 7 == 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("split", "length", "chat"), [("calibration", 1024, True), ("validation", 1500, False), ("evaluation", 1500, True)]
)
def test_prompts_fit_closely(
    task: str, split: Split, length: int, chat: bool, tiny_tokenizer: PreTrainedTokenizerBase, prose: Prose
) -> None:
    if (task, split) == ("recall", "evaluation"):
        pytest.skip("evaluation has a task of its own")
    tokenizer = tiny_tokenizer if chat else without_template(tiny_tokenizer)
    for seed in range(2):
        prompt = make_prompt(task, rng(seed), split, tokenizer, length, prose)
        ids = encode_prompt(tokenizer, prompt.user, prompt.prefix, prompt.plain)
        # one token a character; the space before the answer counts
        used = len(ids) + len(prompt.answer) + 1 + ANSWER_ROOM
        assert length - (100 if task == "records" else 40) < used <= length  # the longest piece of filler
        assert prompt.answer in prompt.user
        assert (prompt.task, prompt.kind) == (task, TASKS[task].kind)
        assert ("<|im_start|>" in str(tokenizer.decode(ids))) == (chat and not prompt.plain)
        assert prompt == make_prompt(task, rng(seed), split, tokenizer, length, prose)


def test_needles_and_pairs_of_uuids(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    one = make_needle(rng(1), "calibration", tiny_tokenizer, 700, values="uuids")
    assert one.user.startswith("Here and there the text below says which uuid a name has")
    assert one.prefix.startswith("The uuid of ")
    assert f" is {one.answer}." in one.user
    pairs = make_key_value(rng(1), "calibration", tiny_tokenizer, 900, "uuids")
    body = json.loads(pairs.user[pairs.user.index("{") : pairs.user.rindex("}") + 1])
    assert body[json.loads(pairs.prefix.removesuffix(":"))] == json.loads(pairs.answer)
    for value in (one.answer, *body.values()):
        assert uuid.UUID(value).int % len(SPLITS) == SPLITS.index("calibration")


def test_four_needles_one_asked_for(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    places = set()
    for seed in range(20):
        prompt = make_needle(rng(seed), "calibration", tiny_tokenizer, 1200, keys=4)
        needles = [line for line in prompt.user.split("\n") if line.startswith("Remember that")]
        assert len(set(needles)) == 4
        places.add(next(i for i, needle in enumerate(needles) if prompt.answer in needle))
    assert places == {0, 1, 2, 3}


def test_depth_is_uniform(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    depths = []
    for seed in range(100):
        prompt = make_needle(rng(seed), "calibration", tiny_tokenizer, 1600)
        lines = prompt.user.split("\n")[1:-1]
        depths.append(next(i for i, line in enumerate(lines) if line.startswith("Remember that")) / (len(lines) - 1))
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() >= 12


def test_prose_needle_follows_a_sentence(tiny_tokenizer: PreTrainedTokenizerBase, prose: Prose) -> None:
    for seed in range(10):
        prompt = make_needle(rng(seed), "calibration", tiny_tokenizer, 2000, "prose", prose)
        before = prompt.user.split("\n")[1].partition("Remember that")[0].rstrip()
        assert not before or before.endswith(".")


def test_key_value_is_json(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = make_key_value(rng(2), "validation", tiny_tokenizer, 900)
    body = prompt.user[prompt.user.index("{") : prompt.user.rindex("}") + 1]
    pairs = json.loads(body)
    assert pairs[prompt.prefix.strip('":')] == int(prompt.answer)
    assert len(pairs) > 15
    assert len(set(pairs.values())) == len(pairs)


def test_recall_is_pairs_and_one_key(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever the chat template says."""
    places = []
    for seed in range(30):
        prompt = make_recall(rng(seed), "calibration", tiny_tokenizer, 900)
        text = str(tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, prompt.user, prompt.prefix, prompt.plain)))
        *lines, asked = text.split("\n")
        pairs = dict(line.split(": ") for line in lines)
        assert len(pairs) == len(lines) > 20
        assert pairs[asked.removesuffix(":")] == prompt.answer
        assert list(pairs.values()).count(prompt.answer) == 1
        places.append(list(pairs).index(asked.removesuffix(":")) / len(pairs))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_words_of_recall_are_those_of_no_other_split(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    everything = [*WORDS["calibration"], *WORDS["validation"], *vocabulary.WORDS, *NOUNS, *ADJECTIVES]
    assert len(set(everything)) == len(everything)
    seen: dict[str, set[str]] = {"keys": set(), "values": set()}
    for case in tasks.make_cases("recall", 1500, 12, 0, tiny_tokenizer):
        pairs = [line.split(": ") for line in str(tiny_tokenizer.decode(case.prompt_ids)).split("\n")[:-1]]
        seen["keys"] |= {key for key, _ in pairs}
        seen["values"] |= {value for _, value in pairs}
    assert len(seen["values"]) > 300
    for split in ("calibration", "validation"):
        for seed in range(5):
            prompt = make_recall(rng(seed), split, tiny_tokenizer, 1500)
            pairs = [line.split(": ") for line in prompt.user.split("\n")[:-1]]
            assert {value for _, value in pairs} <= set(WORDS[split])
            assert not seen["keys"] & {key for key, _ in pairs}
            assert not seen["values"] & {value for _, value in pairs}


@pytest.mark.parametrize("values", ["numbers", "uuids", "codes"])
def test_records(tiny_tokenizer: PreTrainedTokenizerBase, values: Any) -> None:
    layouts, places = set(), []
    for seed in range(30):
        prompt = make_records(rng(seed), "calibration", tiny_tokenizer, 1500, values)
        first, *lines, question = prompt.user.split("\n")
        assert first == "Memorize the records below."
        asked, key = re.fullmatch(r'What is "(\w+)" in the record "([a-z-]+)"\?', question).groups()  # type: ignore[union-attr]
        layout = next(layout for layout in LAYOUTS if record_opening(layout, key, asked) == prompt.prefix)
        layouts.add(layout)
        records: dict[str, dict[str, str]] = {}
        for line in lines:
            if layout == "json-lines":
                fields = {name: json.dumps(value) for name, value in json.loads(line).items()}
                records[json.loads(fields.pop("record"))] = fields
            elif pair := re.fullmatch(r"(?:\* )?(\w+)(?: =|:) (.+)", line):
                records[list(records)[-1]][pair[1]] = pair[2]
            else:
                records[line.strip("[]")] = {}
        assert records[key][asked] == prompt.answer
        assert prompt.user.count(prompt.answer) == 1
        assert len(records) > 8
        assert {len(fields) for fields in records.values()} == {2}
        assert {name for fields in records.values() for name in fields} <= set(FIELDS["calibration"])
        places.append(list(records).index(key) / len(records))
    assert layouts == set(LAYOUTS)
    assert min(places) < 0.25
    assert max(places) > 0.75


def test_recall_has_an_end(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="recall has no words for evaluation; use the evaluation task recall"):
        make_recall(rng(), "evaluation", tiny_tokenizer, 900)
    with pytest.raises(DataError, match=r"recall has [\d,]+ keys, too few for a prompt of 400,000 tokens"):
        make_recall(rng(), "calibration", tiny_tokenizer, 400_000)
    with pytest.raises(DataError, match=r"task recall takes at least \d+ tokens; 20 were asked for"):
        make_recall(rng(), "calibration", tiny_tokenizer, 20)


def test_too_short(tiny_tokenizer: PreTrainedTokenizerBase, prose: Prose) -> None:
    with pytest.raises(DataError, match=r"task multi-needle-noise takes at least \d+ tokens; 300 were asked for"):
        make_needle(rng(), "calibration", tiny_tokenizer, 300, keys=4)
    with pytest.raises(DataError, match=r"[\d,]+ words, too few for a prompt of 20,000 tokens"):
        make_needle(rng(), "calibration", tiny_tokenizer, 20_000, "prose", prose)
    with pytest.raises(DataError, match=r"needle-prose needs prose"):
        make_prompt("needle-prose", rng(), "calibration", tiny_tokenizer, 900)


def test_bad_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*No such file"):
        Prose.load(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"has no .txt files"):
        Prose.load(tmp_path)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(DataError, match="has no text"):
        Prose.load(tmp_path)
    (tmp_path / "blank.txt").write_bytes(b"a\xff")
    with pytest.raises(DataError, match="blank.txt: UnicodeDecodeError: .* in position 1"):
        Prose.load(tmp_path)
