"""Known ways to evict tokens as compared models: at the plan's bytes, with the question seen and unseen.

A method that evicts after a prompt is measured twice. With the question seen it scores all of the prompt but its last token,
which is read after the eviction, as the answer is. With the question unseen it scores what stands before the question, so that
one compressed context has to serve any; the question then comes after the eviction. All of them start from one dense reading. A
method that evicts as it reads cannot know what follows, so it is measured once.

What is evicted is masked and not freed. Bytes are counted as if it were: what is kept, token by token, in the model's dtype,
and all that is read after the eviction, up to the end of the reference answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moacompress.core.errors import DataError, InfeasibleBudgetError, UsageError
from moacompress.core.files import fingerprint
from moacompress.evaluation.eviction.attention import SideBySide, WholeCache, attending
from moacompress.evaluation.eviction.baseline import Baseline, PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.reading import DenseReading, read_prompt
from moacompress.evaluation.eviction.registry import baseline_name, known_evictions, read_baseline
from moacompress.evaluation.eviction.stream_cache import stream_cache
from moacompress.evaluation.scoring.prompts import Score, read_on, score_answers
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.placement import input_device
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moacompress.runtime.checkpoint import Checkpoint

UNSEEN, SEEN = "unseen", "seen"


@dataclass(frozen=True)
class ComparedEviction:
    """A `ComparedModel`: the dense model under the masks of a way to evict tokens.

    Attributes:
        baseline: how it evicts.
        question: "seen", "unseen", or None for a method that evicts as it reads.
        plan: the plan whose bytes it gets.
        kv_bytes: of all tokens that it keeps, at the mean number of tokens of the prompts.
    """

    baseline: Baseline
    question: str | None
    plan: Plan
    kv_bytes: int

    @property
    def name(self) -> str:
        """Name in tables and on the command line, such as `snapkv:seen` and `snapkv:window=16:seen`."""
        return _full_name(self.baseline, self.question)

    @property
    def unit(self) -> int:
        """Tokens that are read at a time: any number."""
        return 1

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return self.plan.model.token_bytes(Rule.FULL)

    def key(self) -> str:
        """Returns what its scores of a prompt are kept under, besides the bytes: method, parameters and question."""
        return fingerprint([self.baseline.key(), self.question])

    def case_key(self, case: Case) -> str:
        """Returns what its score of one prompt is kept under, besides weights and prompt."""
        return fingerprint([self.key(), self.plan.kv_bytes(case.tokens), case.question_at])

    def put_on(self, checkpoint: Checkpoint) -> PreTrainedModel:
        """Returns the dense model."""
        return checkpoint.without_plan()

    def new_cache(self, model: PreTrainedModel) -> Any:
        """Returns None: what is scored has a cache of its own, see `score_evictions`."""
        return None

    def description(self, tokens: int) -> dict[str, Any]:
        """Returns how often it reads the prompt, and that its bytes are counted as if the others were freed."""
        return {"readings": self.baseline.readings, "freed": False}

    def end(self, case: Case) -> int:
        """Returns how many tokens of a prompt are read before it evicts."""
        last = len(case.prompt_ids) - 1
        return last if self.question != UNSEEN or case.question_at is None else min(case.question_at, last)

    def bytes_before(self, case: Case) -> int:
        """Returns the bytes that it may keep of what it evicts from; the tokens after that are kept whole."""
        shape = self.plan.model
        after = case.tokens - self.end(case) if isinstance(self.baseline, PromptBaseline) else 0
        return self.plan.kv_bytes(case.tokens) - after * shape.layers * shape.kv_heads * self.token_bytes

    def check(self, case: Case) -> None:
        """Refuses a prompt on which it cannot be measured.

        Raises:
            DataError: the question is to be unseen, and the prompt does not say where it begins.
            InfeasibleBudgetError: the plan's bytes leave less than a token for each KV head.
        """
        if self.question == UNSEEN and not case.question_at:
            raise DataError(
                f"{self.name} evicts before the question is read, and a prompt of {case.task} does not say where it begins: it "
                f"is one line; put the question on a line of its own, or measure against {self.baseline.name}:{SEEN}"
            )
        shape = self.plan.model
        if self.bytes_before(case) < shape.layers * shape.kv_heads * self.token_bytes:
            after = case.tokens - self.end(case)
            raise InfeasibleBudgetError(
                f"{self.name} keeps the {after} tokens of a prompt of {case.task} that follow its eviction, and the plan's "
                f"{self.plan.kv_bytes(case.tokens):,} bytes at {case.tokens:,} tokens leave less than one other token for each "
                "KV head; compare at longer --lengths or with a larger plan"
            )


def eviction_names() -> tuple[str, ...]:
    """Returns the names of known ways to evict without settings: of a method, and of it with the question seen or unseen."""
    known = known_evictions()
    return (*known, *(f"{name}:{question}" for name in known for question in _questions(known[name]) if question))


def is_eviction(name: str) -> bool:
    """Returns whether a name is that of a way to evict, with settings or without.

    Raises:
        UsageError: a setting that the method does not have, or a value that it cannot have.
    """
    return _read(name) is not None


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names with a method that evicts after a prompt in both its settings, without repeats."""
    return tuple(dict.fromkeys(each for name in names for each in _with_questions(name)))


def _with_questions(name: str) -> tuple[str, ...]:
    found = _read(name)
    if found is None:
        return (name,)
    baseline, question = found
    asked = _questions(type(baseline)) if question is None else (question,)
    return tuple(_full_name(baseline, each) for each in asked)


def _read(name: str) -> tuple[Baseline, str | None] | None:
    """Returns a way to evict and what it knows of the question, None where the name leaves that open; None of other names."""
    found = read_baseline(name)
    return found if found is not None and found[1] in (None, *_questions(type(found[0]))) else None


def _full_name(baseline: Baseline, question: str | None) -> str:
    name = baseline_name(baseline)
    return name if question is None else f"{name}:{question}"


def compared_eviction(name: str, plan: Plan, tokens: int) -> ComparedEviction:
    """Returns a known way to evict by a name that is not ambiguous, as `expanded` gives it.

    Args:
        name: of a method and its settings, with `:seen` or `:unseen` where it evicts after a prompt.
        plan: whose bytes it gets.
        tokens: of a prompt and its answer.

    Raises:
        UsageError: the model has layers with a window of their own.
    """
    if any(window is not None for window in plan.model.native_windows):
        raise UsageError(
            f"{name} cannot be measured on this model: its layers have sliding windows of their own, and known ways to evict "
            "share bytes among layers that see all tokens; leave it out"
        )
    found = _read(name)
    assert found is not None
    token_bytes = plan.model.token_bytes(Rule.FULL)
    return ComparedEviction(*found, plan, plan.kv_bytes(tokens) // token_bytes * token_bytes)


def score_evictions(checkpoint: Checkpoint, case: Case, compared: Sequence[ComparedEviction]) -> list[Score]:
    """Returns the score of each way to evict on one prompt, which is read densely once at most.

    Those that evict at the same place read on side by side, and all of them answer so, as rows of one batch.

    Args:
        checkpoint: gives the dense model.
        case: the prompt.
        compared: what is scored, in this order.
    """
    model = checkpoint.without_plan()
    # caches, each with how many tokens it holds and what it scores
    stores: list[tuple[WholeCache, int, list[int]]] = []
    evicting: dict[int, list[int]] = {}
    for number, one in enumerate(compared):
        if isinstance(one.baseline, StreamBaseline):
            shape = one.plan.model
            room = one.baseline.allocate(one.bytes_before(case), one.token_bytes, shape.layers, shape.kv_heads)
            stores.append((stream_cache(one.baseline, room), 0, [number]))
        else:
            evicting.setdefault(one.end(case), []).append(number)
    if evicting:
        reading = read_prompt(model, checkpoint.tokenizer, case.prompt_ids[:-1])
        for end, numbers in evicting.items():
            masks = [kept_mask(compared[number], case, reading) for number in numbers]
            stores.append((reading.kept(*masks), end, numbers))
    with attending(model):
        for store, end, numbers in stores:
            read_on(model, [case] * len(numbers), store, end)
        together = SideBySide([(store, len(numbers)) for store, _, numbers in stores])
        cases = [case] * len(compared)
        last = torch.tensor([case.prompt_ids[-1:]] * len(cases), device=input_device(model))
        found = score_answers(model, checkpoint.tokenizer, cases, last, together)
    order = [number for *_, numbers in stores for number in numbers]
    scores = dict(zip(order, found, strict=True))
    return [scores[number] for number in range(len(compared))]


def kept_mask(one: ComparedEviction, case: Case, reading: DenseReading) -> torch.Tensor:
    """Returns what a method keeps of a prompt, bool `[layers, kv_heads, end]`.

    Args:
        one: a method that evicts after a prompt.
        case: the prompt.
        reading: of the prompt without its last token.
    """
    baseline = one.baseline
    assert isinstance(baseline, PromptBaseline)
    with torch.inference_mode():
        prompt = reading.until(one.end(case))
        scores = baseline.scores(prompt, baseline.prepare(prompt))
        return baseline.allocate(scores, one.bytes_before(case), one.token_bytes)


def _questions(kind: type[Baseline]) -> tuple[str | None, ...]:
    """Returns what a method may know of the question as it evicts; None where that is not asked."""
    return (None,) if issubclass(kind, StreamBaseline) else (UNSEEN, SEEN)
