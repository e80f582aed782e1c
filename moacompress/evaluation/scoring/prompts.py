"""Scores of prompts: what is found in the greedy answer, and how well the reference is predicted, teacher-forced.

Prompts of one length are scored together. A prompt is read once; the teacher-forced pass continues from a copy of its
cache, the greedy answer from the cache itself. Dense and compressed models take the same path.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moacompress.calibration.data.answers import stop_tokens
from moacompress.core.errors import ModelError, UsageError
from moacompress.evaluation.tasks.cases import Case
from moacompress.models.kept_logits import kept_logits
from moacompress.models.placement import input_device
from moacompress.runtime.compat.alternates import cache_argument, returned_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
"""Prompts of equal length are scored together, up to this many tokens in the cache; a longer prompt goes alone."""
LOGITS = 1 << 27
"""Most numbers in the logits of a teacher-forced pass, where more than one prompt is in it."""
INTEGER = re.compile(r"[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+")
"""An integer, its thousands set apart by commas or not."""
UNSPACED = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR")
"""How Unicode's names begin of characters that no space sets apart from the next word, or from a particle."""


@dataclass(frozen=True)
class Score:
    """What one model did on one prompt.

    Attributes:
        exact_match: how much of the reference is in the greedy answer, 0 to 1, by the prompt's rule of matching.
        accuracy: share of the reference's value tokens that the model ranks first, teacher-forced.
        nll: mean negative log-likelihood of the reference's value tokens, teacher-forced, nats a token.
        answer: the greedy answer, as far as it decides the score.
    """

    exact_match: float
    accuracy: float
    nll: float
    answer: str = ""


def batches(cases: Sequence[Case], vocabulary: int) -> list[list[int]]:
    """Returns the indices of cases that are scored together: of one prompt length, and as many as memory allows."""
    groups: dict[tuple[int, int | None], list[int]] = {}
    for index, case in enumerate(cases):
        groups.setdefault((len(case.prompt_ids), case.turn_at), []).append(index)
    found = []
    for members in groups.values():
        answer = max(len(cases[index].answer_ids) for index in members)
        tokens = max(len(cases[index].prompt_ids) + cases[index].new_tokens for index in members)
        size = max(1, min(BATCH_TOKENS // tokens, LOGITS // (answer * vocabulary)))
        found += [members[first : first + size] for first in range(0, len(members), size)]
    return found


def score_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], cache: Any = None, unit: int = 1
) -> list[Score]:
    """Returns the scores of a model on prompts, all with the same number of tokens and the same `turn_at`.

    They are read into an empty `cache`, by default of the model's own kind: up to a multiple of `unit` tokens, and the rest
    with the answer.

    Raises:
        UsageError: prompts of different lengths.
        ModelError: the model's logits are not finite.
    """
    if len({(len(case.prompt_ids), case.turn_at) for case in cases}) != 1:
        raise UsageError(
            "prompts of different lengths, or with other turns, cannot be scored together; score each alone"
        )
    last, cache = read_on(model, cases, cache, unit=unit)
    return score_answers(model, tokenizer, cases, last, cache)


def score_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], last: torch.Tensor, cache: Any
) -> list[Score]:
    """Returns the scores of prompts that have been read but for their `last` tokens; the cache of those before is used up.

    Raises:
        ModelError: the model's logits are not finite.
    """
    with torch.inference_mode():
        forced = _teacher_forced(model, cases, last, copy.deepcopy(cache))
        answers = _greedy(model, tokenizer, cases, last, cache)
    return [
        Score(match_share(case, answer), *numbers, answer)
        for case, answer, numbers in zip(cases, answers, forced, strict=True)
    ]


def match_share(case: Case, answer: str, ended: bool = True) -> float:
    """Returns how much of a case's reference is in an answer, 0 to 1; upper and lower case are the same.

    Where the answer has not `ended`, what the next character could undo does not count, and 1 is final.
    """
    if case.match == "last-integer":
        said = INTEGER.findall(answer)
        wanted = {reference.strip().lstrip("0") for reference in case.references}
        return float(ended and bool(said) and said[-1].replace(",", "").lstrip("0") in wanted)
    if case.match == "json":
        said_object = _first_object(case.opening + answer)
        return float(said_object is not None and said_object in map(_first_object, case.references))
    text = _comparable(answer)
    if case.match == "any-words":
        return float(any(_has_words(text, _comparable(reference.strip()), ended) for reference in case.references))
    found = [_comparable(reference) in text for reference in case.references]
    return float(any(found)) if case.match == "any" else sum(found) / len(found)


def _comparable(text: str) -> str:
    """Returns a text with upper and lower case alike, and letters with accents alike however they are put together."""
    return unicodedata.normalize("NFC", text).casefold()


def _has_words(text: str, wanted: str, ended: bool) -> bool:
    """Returns whether a text has another one in it that is not part of a longer word.

    Where it has not `ended`, its end is not that of a word, and its last character may be there in part, as U+FFFD.
    """
    text = text if ended else text.rstrip("\ufffd")
    begin = text.find(wanted)
    while begin >= 0:
        before, after = text[:begin][-1:], text[begin + len(wanted) :][:1]
        if not _joins_words(before) and (not _joins_words(after) if after else ended):
            return True
        begin = text.find(wanted, begin + 1)
    return False


def _joins_words(character: str) -> bool:
    """Returns whether a word goes on with a character: a letter, digit, mark or underscore of a script with spaces."""
    if not character or unicodedata.name(character, "").startswith(UNSPACED):
        return False
    return character.isalnum() or character == "_" or unicodedata.category(character).startswith("M")


def _first_object(text: str) -> Any:
    """Returns the JSON object that begins at the first brace of a text; None where none does."""
    begin = text.find("{")
    try:
        return None if begin < 0 else json.JSONDecoder().raw_decode(text, begin)[0]
    except ValueError:
        return None


def read_on(
    model: PreTrainedModel, cases: Sequence[Case], cache: Any, begin: int = 0, unit: int = 1
) -> tuple[torch.Tensor, Any]:
    """Reads prompts of one length and `turn_at` but for their last tokens; returns these, `[batch, 1 to unit]`, and the cache.

    The cache holds the tokens before `begin`; None is a new one. They are read up to a multiple of `unit` tokens.
    """
    ids = torch.tensor([case.prompt_ids for case in cases], device=input_device(model))
    end, turn = ((at - at % unit) for at in (ids.shape[1] - 1, cases[0].turn_at or 0))
    edges = [begin, turn, end] if begin < turn < end else [begin, end]
    with torch.inference_mode():
        for first, after in itertools.pairwise(edges):
            if first == after:
                continue
            out = kept_logits(model, 1, input_ids=ids[:, first:after], use_cache=True, **cache_argument(cache))
            cache = returned_cache(out)
    return ids[:, end:], cache


def _teacher_forced(
    model: PreTrainedModel, cases: Sequence[Case], last: torch.Tensor, cache: Any
) -> list[tuple[float, float]]:
    """Returns accuracy and NLL of the value tokens of each case; `cache` is used up.

    Shorter answers are filled up behind their end, where nothing that counts can see it.
    """
    size = max(len(case.answer_ids) for case in cases)
    answers = torch.tensor([case.answer_ids + case.answer_ids[-1:] * (size - len(case.answer_ids)) for case in cases])
    given = torch.cat((last, answers[:, :-1].to(last.device)), 1)
    logits = kept_logits(
        model, size, input_ids=given, use_cache=True, **cache_argument(cache)
    ).logits  # [batch, size, vocabulary]
    found = []
    for case, row in zip(cases, logits, strict=True):
        values = torch.tensor([index for index, counts in enumerate(case.is_value) if counts], device=row.device)
        targets = torch.tensor(case.answer_ids, device=row.device)[values]
        picked = row[values].float()
        nll = float(torch.nn.functional.cross_entropy(picked, targets))
        if not bool(torch.isfinite(picked).all()):
            raise ModelError(
                f"the model's logits are not finite on a prompt of {case.task} with {len(case.prompt_ids):,} tokens "
                f"in {str(model.dtype).removeprefix('torch.')}; evaluate it in float32"
            )
        found.append((int((picked.argmax(-1) == targets).sum()) / len(targets), nll))
    return found


def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], last: torch.Tensor, cache: Any
) -> list[str]:
    """Returns the greedy answers as text, up to where more of them could not change the score; `cache` is used up.

    An answer ends at a closing token, at `new_tokens`, or once all that is looked for is in it, as whole words with the
    character behind them where words count: what is found stays found in a longer answer, because decoding only ever appends.
    """
    stop = stop_tokens(model)
    said: list[list[int]] = [[] for _ in cases]
    answers = [""] * len(cases)
    open_rows = [index for index, case in enumerate(cases) if case.new_tokens > 0]
    while open_rows:
        logits = kept_logits(model, 1, input_ids=last, use_cache=True, **cache_argument(cache)).logits
        last = logits[:, -1:].argmax(-1)
        chosen = last[:, 0].tolist()
        for index in tuple(open_rows):
            case = cases[index]
            said[index].append(chosen[index])
            answers[index] = str(
                tokenizer.decode(said[index], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            )
            settled = match_share(case, answers[index], ended=False) == 1.0
            if chosen[index] in stop or len(said[index]) >= case.new_tokens or settled:
                open_rows.remove(index)
    return answers
