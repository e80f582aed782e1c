"""Scores of one prompt: is the reference in the greedy answer, and how surprised is the model by it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moacompress.calibration.answers import generate_greedy
from moacompress.calibration.generators import ANSWER_ROOM
from moacompress.evaluation.tasks import Case

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """What one model did on one prompt.

    Attributes:
        hit: the reference appears in the greedy answer, whatever its case (RULER's rule for one reference).
        nll: mean negative log-likelihood of the reference's value tokens, teacher-forced, nats a token.
    """

    hit: bool
    nll: float


def score_case(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Case) -> Score:
    """Returns the score of a model on a prompt.

    All but the prompt's last token is read once; the teacher-forced pass and `generate` each go on from a copy of that
    cache.

    Args:
        model: dense or under a plan; its own kind of cache is used.
        tokenizer: decodes the answer.
        case: the prompt.
    """
    prompt = torch.tensor([case.prompt_ids], device=model.device)
    with torch.inference_mode():
        cache = model(input_ids=prompt[:, :-1], use_cache=True, logits_to_keep=1).cache
        nll = _answer_nll(model, case, copy.deepcopy(cache))
    (answer,) = generate_greedy(model, [case.prompt_ids], len(case.answer_ids) + ANSWER_ROOM, cache)
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    return Score(case.answer.lower() in text.lower(), nll)


def _answer_nll(model: PreTrainedModel, case: Case, cache: Any) -> float:
    given = torch.tensor([[case.prompt_ids[-1], *case.answer_ids[:-1]]], device=model.device)
    logits = model(input_ids=given, cache=cache, use_cache=True).logits[0]  # [answer tokens, vocabulary]
    targets = torch.tensor(case.answer_ids, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return float(losses[torch.tensor(case.is_value, device=losses.device)].mean())
