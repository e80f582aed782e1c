"""Known ways to evict tokens as compared models: at the plan's bytes, with the question seen and unseen.

A method that evicts after a prompt is measured twice. With the question seen it scores all of the prompt but its last token,
which is read after the eviction, as the answer is. With the question unseen it scores what stands before the question, so that
one compressed context has to serve any; the question then comes after the eviction. All of them start from one dense reading. A
method that evicts as it reads cannot know what follows, so it is measured once.

What a method keeps of a prompt may be rounded to a format too, `snapkv:int4`: more tokens then fit into the same bytes. What is
read after the eviction stays in the model's dtype.

What is evicted is masked and not freed. Bytes are counted as if it were: what is kept, token by token, in its format, and all
that is read after the eviction, up to the end of the reference answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moacompress.core.errors import DataError, InfeasibleBudgetError, UsageError
from moacompress.core.files import fingerprint
from moacompress.evaluation.baselines.compared_models import ComparedModel
from moacompress.evaluation.eviction.attention import SideBySide, WholeCache, attending
from moacompress.evaluation.eviction.baseline import Baseline, PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.reading import PromptReading, read_prompt
from moacompress.evaluation.eviction.registry import SEEN, UNSEEN, eviction_name, read_eviction
from moacompress.evaluation.eviction.stream_cache import stream_cache
from moacompress.evaluation.scoring.prompts import Score, read_on, score_answers
from moacompress.evaluation.tasks.cases import Case, mean_tokens
from moacompress.models.placement import input_device
from moacompress.rules.formats import NATIVE
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule

if TYPE_CHECKING:
    from moacompress.runtime.checkpoint import Checkpoint


@dataclass(frozen=True)
class ComparedEviction(ComparedModel):
    """The dense model under the masks of a way to evict tokens; `score_evictions` gives it a cache.

    Attributes:
        baseline: how it evicts.
        question: "seen", "unseen", or None for a method that evicts as it reads.
        plan: the plan whose bytes it gets.
        format: of the keys and values that it keeps of a prompt, one of `formats.all_formats`.
    """

    baseline: Baseline
    question: str | None
    plan: Plan
    format: str = NATIVE

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head, as they are kept of a prompt."""
        return self.plan.model.token_bytes(Rule.FULL.in_formats(self.format, self.format))

    def key(self) -> str:
        """Returns what its scores of a prompt are kept under, besides the bytes: method, parameters, question and format."""
        format = () if self.format == NATIVE else (self.format,)
        return fingerprint([self.baseline.key(), self.question, *format])

    def case_key(self, case: Case) -> str:
        """Returns what its score of one prompt is kept under, besides weights and prompt."""
        return fingerprint([self.key(), self.plan.kv_bytes(case.tokens), case.question_at])

    def description(self, tokens: int) -> dict[str, Any]:
        """Returns how often it reads the prompt, and that its bytes are counted as if the others were freed."""
        return {"readings": self.baseline.readings, "freed": False}

    def end(self, case: Case) -> int:
        """Returns how many tokens it evicts from: those read before it does, or all where it evicts as it reads."""
        if isinstance(self.baseline, StreamBaseline):
            return case.tokens
        last = len(case.prompt_ids) - 1
        return last if self.question != UNSEEN or case.question_at is None else min(case.question_at, last)

    def bytes_before(self, case: Case) -> int:
        """Returns the bytes that it may keep of what it evicts from; the tokens after that are kept whole."""
        return self.plan.kv_bytes(case.tokens) - self._bytes_after(case.tokens - self.end(case))

    def on_prompts(self, cases: Sequence[Case]) -> ComparedEviction:
        """Returns the same with the bytes that it takes on prompts: less than the plan's where all of a prompt fits."""
        tokens, end = mean_tokens(cases), round(sum(map(self.end, cases)) / len(cases))
        after = self._bytes_after(tokens - end)
        kept = min((self.plan.kv_bytes(tokens) - after) // self.token_bytes, end * self._heads)
        return replace(self, kv_bytes=kept * self.token_bytes + after)

    def _bytes_after(self, tokens: int) -> int:
        """Returns the bytes of tokens that are read after the eviction."""
        return tokens * self._heads * self.plan.model.token_bytes(Rule.FULL)

    @property
    def _heads(self) -> int:
        """KV heads of all layers."""
        return self.plan.model.layers * self.plan.model.kv_heads

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
        if self.bytes_before(case) < self._heads * self.token_bytes:
            after = case.tokens - self.end(case)
            raise InfeasibleBudgetError(
                f"{self.name} keeps the {after} tokens of a prompt of {case.task} that follow its eviction, and the plan's "
                f"{self.plan.kv_bytes(case.tokens):,} bytes at {case.tokens:,} tokens leave less than one other token for each "
                "KV head; compare at longer --lengths or with a larger plan"
            )


def compared_eviction(name: str, plan: Plan, tokens: int) -> ComparedEviction:
    """Returns a way to evict by a name as `expanded` gives it, at a plan's bytes for so many tokens of prompt and answer.

    Raises:
        UsageError: the model has layers with a window of their own.
    """
    if any(window is not None for window in plan.model.native_windows):
        raise UsageError(
            f"{name} cannot be measured on this model: its layers have sliding windows of their own, and known ways to evict "
            "share bytes among layers that see all tokens; leave it out"
        )
    found = read_eviction(name)
    assert found is not None
    baseline, format, question = found
    name = eviction_name(baseline, format, question)
    return ComparedEviction(name, plan.kv_bytes(tokens), baseline, question, plan, format)


def score_evictions(checkpoint: Checkpoint, case: Case, compared: Sequence[ComparedEviction]) -> list[Score]:
    """Returns the score of each way to evict on one prompt, which is read densely once at most.

    Those that evict at the same place and keep the same format read on side by side, and all of them answer so, as rows of one
    batch.
    """
    model = checkpoint.without_plan()
    # caches, each with how many tokens it holds and what it scores
    stores: list[tuple[WholeCache, int, list[int]]] = []
    evicting: dict[tuple[int, str], list[int]] = {}
    for number, one in enumerate(compared):
        if isinstance(one.baseline, StreamBaseline):
            shape = one.plan.model
            room = one.baseline.allocate(one.bytes_before(case), one.token_bytes, shape.layers, shape.kv_heads)
            stores.append((stream_cache(one.baseline, room), 0, [number]))
        else:
            evicting.setdefault((one.end(case), one.format), []).append(number)
    if evicting:
        reading = read_prompt(model, checkpoint.tokenizer, case.prompt_ids[:-1])
        for (end, format), numbers in evicting.items():
            masks = [kept_mask(compared[number], case, reading) for number in numbers]
            stores.append((reading.kept(*masks, format=format), end, numbers))
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


def kept_mask(one: ComparedEviction, case: Case, reading: PromptReading) -> torch.Tensor:
    """Returns what a method that evicts after a prompt keeps of it, bool `[layers, kv_heads, end]`.

    The reading is of the prompt without its last token.
    """
    baseline = one.baseline
    assert isinstance(baseline, PromptBaseline)
    with torch.inference_mode():
        prompt = reading.until(one.end(case))
        scores = baseline.scores(prompt, baseline.prepare(prompt))
        return baseline.allocate(scores, one.bytes_before(case), one.token_bytes)
