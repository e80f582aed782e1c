"""Long text: how well a model predicts it, and how far its predictions are from the dense model's.

A window of N tokens is scored in two halves: its first N/2 positions are hardly compressed, its last N/2 are what a plan
is about. The logits of a whole window are never in memory: a forward leaves the states that enter the language-model
head, and the head turns them into logits a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moacompress.core.errors import DataError, ModelError
from moacompress.models.placement import input_device
from moacompress.prompts.pools import SPLITS, Prose
from moacompress.prompts.templates import encode_text
from moacompress.runtime.compat.alternates import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_LENGTH = 4
"""Tokens of a window below which a half has no position."""
MAX_ROWS = 256
MAX_LOGITS = 1 << 26
"""Rows, and numbers, of logits of one model that are in memory at a time."""


@dataclass(frozen=True)
class TextScore:
    """What one model did on one window of N tokens: means over the tokens of its early half, [1, N/2), and its late, [N/2, N).

    Attributes:
        nll_early: negative log-likelihood of the text, nats a token; perplexity is `exp` of its mean over windows.
        nll_late: of the late half.
        kl: KL(dense || model) of the prediction of a token of the late half, nats.
        top1_agreement: share of the late half's tokens for which model and dense hold the same token most likely.
    """

    nll_early: float
    nll_late: float
    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class States:
    """A forward of one window, up to the language-model head.

    Attributes:
        model: the model, for its head; what plan it is under does not matter any more.
        states: what enters the head, `[tokens, hidden]`.
    """

    model: PreTrainedModel
    states: torch.Tensor


class Window(NamedTuple):
    """Tokens of a text, and the number of its document in the evaluation pool."""

    document: int
    ids: list[int]


def text_windows(
    prose: Prose, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int = 0
) -> list[Window]:
    """Returns windows of text for evaluation; no two overlap, and a larger count begins with those of a smaller one.

    Documents come in random order and give one window each before one gives a second. A tokenizer's beginning-of-text
    token, if it adds one, is the first token of a window.

    Raises:
        DataError: the pool has fewer windows of that length.
    """
    if length < MIN_LENGTH:
        raise DataError(f"a window of text takes at least {MIN_LENGTH} tokens; {length} were asked for")
    begin = _beginning(tokenizer)
    rng = np.random.default_rng((seed, SPLITS.index("evaluation"), length))
    documents = prose.pools["evaluation"]
    order: list[int] = rng.permutation(len(documents)).tolist()
    cuts: dict[int, list[list[int]]] = {}
    windows: list[Window] = []
    turn = 0
    while len(windows) < count:
        before = len(windows)
        for number in order:
            if number not in cuts:
                cut_rng = np.random.default_rng((seed, SPLITS.index("evaluation"), length, number))
                ids = encode_text(tokenizer, " ".join(documents[number]), special=False)
                cuts[number] = [[*begin, *cut] for cut in _cut(ids, length - len(begin), cut_rng)]
            windows += [Window(number, cut) for cut in cuts[number][turn : turn + 1]]
            if len(windows) == count:
                return windows
        if len(windows) == before:
            raise DataError(
                f"{prose.name} has {len(windows)} windows of {length:,} tokens for evaluation (a third of it), {count} were "
                "asked for; give more or longer text, ask for fewer prompts, or for a shorter length"
            )
        turn += 1
    return windows


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that the tokenizer puts before a text."""
    plain, special = (encode_text(tokenizer, "a", special) for special in (False, True))
    at = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return special[:at]


def _cut(ids: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """Returns all windows of `size` tokens that fit side by side, from a random token on, in random order."""
    count, rest = divmod(len(ids), size)
    start = int(rng.integers(rest + 1))
    return [list(ids[start + size * i : start + size * (i + 1)]) for i in rng.permutation(count).tolist()]


def read(model: PreTrainedModel, window: Sequence[int], cache: Any = None, steps: Sequence[int] = ()) -> States:
    """Runs a model over a window of token ids: in one forward, or into an empty cache, `steps` tokens at a time."""
    ids = torch.tensor([list(window)], device=input_device(model))
    with torch.inference_mode():
        if cache is None:
            states = _decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
        else:
            forwards = (
                _decoder(model)(input_ids=part, use_cache=True, **cache_argument(cache))
                for part in ids.split([*steps], 1)
            )
            states = torch.cat([forward.last_hidden_state for forward in forwards], 1)
        return States(model, states[0])


def score_window(states: States, dense: States, window: Sequence[int]) -> TextScore:
    """Returns the score of a model on a window, by what `read` returned for it and for the dense model.

    Raises:
        ModelError: logits that are not finite, or vocabularies that differ.
    """
    n = len(window)
    targets = torch.tensor(list(window[1:]), device=states.states.device)
    parts = [_compare(*rows) for rows in _rows(states, dense, targets)]
    columns = [torch.cat(column).double().cpu() for column in zip(*parts, strict=True)]
    if not all(bool(column.isfinite().all()) for column in columns):
        raise ModelError(f"the logits of a text of {n:,} tokens are not finite; try --dtype float32")
    nll, kl, agreement = columns
    late = slice(n // 2 - 1, None)  # the token at position t is predicted by row t - 1
    early, *means = (float(part.mean()) for part in (nll[: n // 2 - 1], nll[late], kl[late], agreement[late]))
    return TextScore(early, means[0], max(means[1], 0.0), means[2])


def head_logits(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Returns what the model makes of states: its head, and whatever its family does to logits (scale, softcap, bias).

    The model's own forward is run on a single token, and its decoder's output is exchanged for the states, `[rows, hidden]`: so
    no family needs code here. Logits are float32, `[rows, vocabulary]`.
    """
    token = torch.zeros((1, 1), dtype=torch.long, device=input_device(model))

    def exchange(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = states[None]
        return output

    handle = _decoder(model).register_forward_hook(exchange)
    try:
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=token, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits.float()


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_decoder() or model.base_model


def _rows(
    states: States, dense: States, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields the logits of both models, `[rows, vocabulary]`, and the tokens that they predict, a few rows at a time."""
    vocabulary = int(states.model.config.get_text_config(decoder=True).vocab_size)
    step = max(1, min(MAX_ROWS, MAX_LOGITS // vocabulary))
    for begin in range(0, len(targets), step):
        end = min(begin + step, len(targets))
        ours = head_logits(states.model, states.states[begin:end])
        theirs = ours if dense is states else head_logits(dense.model, dense.states[begin:end])
        if ours.shape != theirs.shape:
            raise ModelError(
                f"the model has {ours.shape[1]:,} tokens in its vocabulary, the dense one {theirs.shape[1]:,}; only models of "
                "one vocabulary can be compared"
            )
        yield ours, theirs, targets[begin:end]


def _compare(
    ours: torch.Tensor, theirs: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns NLL, KL(theirs || ours) and top-1 agreement of every row."""
    agreement = ours.argmax(-1) == theirs.argmax(-1)
    q = ours.log_softmax(-1)
    nll = -q.gather(-1, targets[:, None])[:, 0]
    if ours is theirs:
        return nll, torch.zeros_like(nll), agreement
    p = theirs.log_softmax(-1)
    return nll, (p.exp() * (p - q)).sum(-1), agreement
