"""The registry: every task fits its length, is the same every time, and says what it needs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moacompress.core.errors import DataError, UsageError
from moacompress.evaluation.tasks import ruler
from moacompress.evaluation.tasks.registry import TASKS, Resources, check_resources, expand_tasks, find_task, make_cases
from moacompress.evaluation.tasks.vocabulary import WORDS
from moacompress.prompts.pools import NOUNS, Prose
from moacompress.prompts.sentences import EVALUATION_NEEDLES
from tests.conftest import CHAT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULER = (
    *("niah-single-1", "niah-single-2", "niah-single-3", "niah-multikey-1", "niah-multikey-2", "niah-multikey-3"),
    *("niah-multivalue", "niah-multiquery", "vt", "cwe", "fwe", "qa-squad"),
)
PROSE = {
    *("needle-prose", "needle-prose-uuids", "multi-needle-prose", "multi-value-prose", "multi-query-prose"),
    *("niah-single-2", "niah-single-3", "niah-multikey-1", "niah-multivalue", "niah-multiquery"),
}
SQUAD = {"document-question", "qa-squad"}
UUID = r"[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"
ANSWERS = {  # match, most tokens generated (0: as the reference), what a reference looks like
    **dict.fromkeys(("needle-noise", "needle-prose", "multi-needle-noise", "multi-needle-prose"), ("all", 0, r"\d{7}")),
    **dict.fromkeys(
        ("key-value", "needle-distractors", "multi-value-prose", "multi-query-prose"), ("all", 0, r"\d{7}")
    ),
    **dict.fromkeys(("needle-prose-uuids", "needle-distractors-uuids"), ("all", 0, UUID)),
    "variable-chain": ("all", 0, "[A-Z]{5}"),
    "common-words": ("all", 0, "[a-z]+"),
    "frequent-words": ("all", 0, "[a-z]{6}"),
    "document-question": ("any-words", 32, ".+"),
    "line-lookup": ("last-integer", 40, r"\d{1,5}"),
    **dict.fromkeys(("niah-single-1", "niah-single-2", "niah-multikey-1", "niah-multikey-2"), ("all", 128, r"\d{7}")),
    **dict.fromkeys(("niah-multivalue", "niah-multiquery"), ("all", 128, r"\d{7}")),
    **dict.fromkeys(("niah-single-3", "niah-multikey-3"), ("all", 128, UUID)),
    "vt": ("all", 30, "[A-Z]{5}"),
    "cwe": ("all", 120, "[a-z]+"),
    "fwe": ("all", 50, "[a-z]{6}"),
    "qa-squad": ("any", 32, ".+"),
    "recall": ("all", 0, "[a-z]+"),
    "second-question": ("all", 0, r"\d{7}"),
    "legal-codes": ("all", 0, r"[A-Z]{2}-\d{4}"),
    "table-lookup": ("all", 0, r"\d{4}"),
    "dialogue-fact": ("all", 0, r"\d{4}"),
    "code-completion": ("all", 0, r"\d{4}"),
    "code-question": ("any-words", 0, r"[\w.:/-]+"),
    "tool-call": ("json", 0, r'\{"name": "[a-z]+_ticket", "arguments": \{"ticket_number": "\d{5}"\}\}'),
}
LONG = (
    *("needle-distractors-uuids", "niah-multikey-3", "document-question", "qa-squad", "dialogue-fact"),
    *("code-completion", "code-question"),
)
TWICE = ("tool-call", "cwe", "common-words", "second-question")
"""Their prompts have an answer of the assistant before the one that is asked for."""
BEGINS = {
    "needle-noise": "Which number was",
    "key-value": "What value is listed for",
    "multi-query-prose": "Which numbers were given to",
    "variable-chain": "Which variables end up with",
    "common-words": "Which ten words are they?",
    "frequent-words": "Leaving out the dots",
    "document-question": "What comes",
    "line-lookup": "Which number is on the line of",
    "second-question": "Which number was",
    "legal-codes": "What is the ",
    "table-lookup": "In the table above, ",
    "dialogue-fact": "What is ",
}
"""How a question begins, of tasks for which it is the same for all prompts."""


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Resources:
    """Returns prose of the list of words, and a SQuAD file of it."""
    folder = tmp_path_factory.mktemp("texts")
    for name in range(3):
        words = [f"{word}." if i % 9 == 8 else word for i, word in enumerate(WORDS[name:] + WORDS[:name])]
        (folder / f"{name}.txt").write_text(" ".join(words * 4))

    def paragraph(article: int, number: int) -> dict[str, Any]:
        at = 50 * article + 7 * number
        question = {"question": f"What comes {number}th?", "answers": [{"text": " ".join(WORDS[at : at + 3])}]}
        return {"context": " ".join(WORDS[at : at + 40 + number]), "qas": [question]}

    data = [{"paragraphs": [paragraph(article, number) for number in range(10)]} for article in range(12)]
    (folder / "squad.json").write_text(json.dumps({"data": data}))
    return Resources(Prose.load(folder), folder / "squad.json")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerBase:
    """Returns a small byte-level tokenizer like those of real models: words are tokens, digits stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2500,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    noise = " ".join([*EVALUATION_NEEDLES.noise, *ruler.needles().noise])
    tokenizer.train_from_iterator([" ".join(WORDS), *[noise] * 20, EVALUATION_NEEDLES.needle], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def test_questions_of_long_documents_make_way_for_others(bpe: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In a small file too, no prompt asks what the next one does."""

    def article(number: int) -> dict[str, Any]:
        text = " ".join(WORDS[number : number + (900 if number % 12 == 2 else 40)])
        question = {"question": f"What is {number}?", "answers": [{"text": text[:9]}]}
        return {"paragraphs": [{"context": text, "qas": [question]}]}

    (tmp_path / "squad.json").write_text(json.dumps({"data": [article(number) for number in range(180)]}))
    texts = Resources(squad=tmp_path / "squad.json")
    cases, long = (make_cases("document-question", n, 12, 0, bpe, texts) for n in (512, 1024))
    asked = [re.findall(r"What is \d+", str(bpe.decode(case.prompt_ids))) for case in cases]
    assert all(len(each) == 1 for each in asked)
    assert len({each[0] for each in asked}) == 12
    short = {case.document for case in cases}
    assert len(short) == 12
    assert short & {case.document for case in long}  # the same questions come again at another length


@pytest.mark.parametrize(
    ("task", "length"),
    [*((task, 1024) for task in TASKS), ("needle-prose", 2048), ("cwe", 2048), ("code-question", 2048)],
)
def test_every_task(task: str, length: int, bpe: PreTrainedTokenizerBase, resources: Resources) -> None:
    match, new_tokens, reference = ANSWERS[task]
    line = {"legal-codes": 150}.get(task, 120 if task in LONG else 60)
    cases = make_cases(task, length, 4, 0, bpe, resources)
    for case in cases:
        used = len(case.prompt_ids) + max(case.new_tokens, len(case.answer_ids))
        assert length - line < used <= length
        assert (case.task, case.length, case.match) == (task, length, match)
        assert case.new_tokens == (new_tokens or len(case.answer_ids) + 4)
        assert all(re.fullmatch(reference, text) for text in case.references)
        assert len(case.is_value) == len(case.answer_ids)
        values = [str(bpe.decode([i])) for i, counts in zip(case.answer_ids, case.is_value, strict=True) if counts]
        wanted = case.references[:1] if match.startswith("any") else case.references
        if match == "json":  # the call but for its number stands before the answer
            wanted = tuple(re.findall(r"\d+", wanted[0]))
        if all(map(str.isdigit, wanted)):
            assert values == [digit for number in wanted for digit in number]  # the digits and nothing else
        else:
            assert re.sub(r"[\W_]", "", "".join(values)) == re.sub(r"[\W_]", "", "".join(wanted))
        assert (case.turn_at is not None) == (task == "second-question")
        text = str(bpe.decode(case.prompt_ids))
        assert all(text.count(value) >= 1 for value in wanted)
        assert text.count("<|im_start|>assistant") == (task not in ("recall", "code-completion")) + (task in TWICE)
        if not TASKS[task].ruler:
            assert case.question_at is not None
            asked = str(bpe.decode(case.prompt_ids[case.question_at :]))
            assert asked.strip().startswith(BEGINS.get(task, ""))
            assert 0 < len(asked) < 400
        whole = str(bpe.decode([*case.prompt_ids, *case.answer_ids]))
        assert whole.startswith(text)
        assert bpe(whole, add_special_tokens=False)["input_ids"] == [*case.prompt_ids, *case.answer_ids]
    assert cases == make_cases(task, length, 5, 0, bpe, resources)[:4]
    others = make_cases(task, length, 4, 1, bpe, resources)
    ours, theirs = ({tuple(case.prompt_ids) for case in drawn} for drawn in (cases, others))
    assert len(ours) == 4
    assert not ours & theirs


def test_values_are_of_the_evaluation_pool(bpe: PreTrainedTokenizerBase, resources: Resources) -> None:
    others = {noun for index, noun in enumerate(NOUNS) if index % 3 != 2}
    for name in TASKS:
        if name in (*SQUAD, "line-lookup"):
            continue
        for case in make_cases(name, 1024, 1, 0, bpe, resources):
            text = str(bpe.decode(case.prompt_ids))
            keys = re.findall(r"\b[a-z]+-([a-z]+)\b", text)
            assert not others & set(keys)
            assert {int(number) % 3 for number in re.findall(r"\b\d{7}\b", text)} <= {2}


def test_all_has_what_there_are_texts_for(resources: Resources) -> None:
    assert expand_tasks(("ruler", "recall", "vt")) == (*RULER, "recall")
    assert expand_tasks(["all"], resources) == tuple(TASKS)
    assert set(expand_tasks(["all"])) == set(TASKS) - PROSE - SQUAD
    assert set(expand_tasks(["all"], Resources(prose=resources.prose))) == set(TASKS) - SQUAD
    assert expand_tasks(()) == ()


def test_needs(resources: Resources, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    check_resources(TASKS, resources)
    for names, squad, said in (
        (RULER, None, r"task niah-single-2 needs prose: give a \.txt file or a folder"),
        (("document-question",), tmp_path / "none.json", "cannot read SQuAD file"),
    ):
        with pytest.raises(DataError, match=said):
            check_resources(names, Resources(squad=squad))
    (tmp_path / "short.txt").write_text(" ".join(f"word{number}" for number in range(3000)))
    short = Resources(Prose.load(tmp_path / "short.txt"))
    for name, length, said in (
        ("document-question", 1024, "task document-question needs SQuAD's questions: give a SQuAD file"),
        ("needle-prose-uuids", 60_000, r"has [\d,]+ words, too few for a prompt of 60,000 tokens; give longer text"),
    ):
        with pytest.raises(DataError, match=said):
            make_cases(name, length, 1, 0, tiny_tokenizer, short)


def test_too_short(tiny_tokenizer: PreTrainedTokenizerBase, resources: Resources) -> None:
    for task in TASKS:
        length = 4 if task == "recall" else 100
        with pytest.raises(DataError, match=rf"task {task} takes at least \d+ tokens; {length} were asked for"):
            make_cases(task, length, 1, 0, tiny_tokenizer, resources)


def test_unknown() -> None:
    for name, said in (("rular", "did you mean 'ruler'"), ("xyzzy", "known tasks are needle-noise, ")):
        with pytest.raises(UsageError, match=f"unknown task '{name}'; {said}"):
            expand_tasks(["vt", name])
    with pytest.raises(UsageError, match="unknown task 'niah-single-4'; did you mean 'niah-single-"):
        find_task("niah-single-4")
    assert set(ANSWERS) == set(TASKS)
    assert {name for name, task in TASKS.items() if task.needs == "prose"} == PROSE
