"""The dense model's own answers, by which a plan is judged, and the file that keeps them for a run that resumes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moacompress.calibration.data.samples import Sample, SampleKind
from moacompress.core.progress import SILENT, Progress
from moacompress.core.records import Records
from moacompress.models.placement import input_device
from moacompress.models.processes import broadcast, shared
from moacompress.runtime.compat.alternates import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 8192
"""Prompts of equal length are answered together, up to this many tokens."""


@dataclass(frozen=True)
class SampleDraft:
    """A sample before the dense model has answered; `source`, `length` and `kind` are those of the `Sample`.

    Attributes:
        ids: token ids of the prompt `[n]`, everything before the answer.
        mask: bool `[n]`, True at tokens that are targets already: an assistant's earlier turns, or positions of plain
            text.
        room: most tokens of the answer to come; 0 for plain text, which has none.
    """

    ids: Sequence[int]
    mask: Sequence[bool]
    room: int
    source: str
    length: int
    kind: SampleKind = "answer"


class AnswerStore:
    """A file with one line of JSON for every batch of answers: `{"answers": {key: [token ids]}}`.

    A batch is written as a whole before the next begins; what cannot be read is answered again.
    """

    def __init__(self, path: str | Path | None, weights: str, dtype: str) -> None:
        """Reads what is there.

        Without a path, such as `profile/answers.jsonl`, answers are kept in memory. They are those of a dense model with this
        fingerprint of its weights, computed in this dtype.

        Raises:
            ArtefactError: the file cannot be read.
        """
        self._records, self._model = Records(None if path is None else Path(path), _answers), f"{weights} {dtype}"

    def get(self, prompt: Sequence[int], room: int) -> list[int] | None:
        """Returns the answer to a prompt with room for so many tokens, or None if it is not known."""
        answer = self._records.get(self._key(prompt, room))
        return None if answer is None else list(answer)

    def add(self, prompts: Sequence[Sequence[int]], room: int, answers: Sequence[Sequence[int]]) -> None:
        """Writes the answers to a batch of prompts to the end of the file.

        Raises:
            ArtefactError: the file cannot be written; what was in it still is.
        """
        batch = {self._key(prompt, room): list(answer) for prompt, answer in zip(prompts, answers, strict=True)}
        self._records.append({"answers": batch})

    def _key(self, prompt: Sequence[int], room: int) -> str:
        digest = hashlib.sha256(f"{self._model} {room} ".encode())
        digest.update(np.asarray(prompt, "<i8").tobytes())
        return digest.hexdigest()[:32]


def _answers(line: Mapping[str, Any]) -> dict[str, list[int]]:
    batch = line["answers"]
    if not all(type(token) is int and token >= 0 for answer in batch.values() for token in answer):
        raise ValueError("no token ids")
    return dict(batch)


def stop_tokens(model: PreTrainedModel) -> set[int]:
    """Returns the ids that end an answer."""
    stop = model.generation_config.eos_token_id if model.generation_config is not None else model.config.eos_token_id
    return set() if stop is None else set(stop) if isinstance(stop, list | tuple) else {int(stop)}


def generate_greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], new_tokens: int, cache: Any = None
) -> list[list[int]]:
    """Returns the model's greedy continuations of prompts of one length, through `generate` and the model's own cache.

    What the checkpoint's generation config may hold, such as sampling and penalties, is left out, but for what ends an answer:
    the closing token is included where it came, and nothing after it. `cache` is what the model, dense or under a plan,
    returned for the beginning of the prompts, if it has read it already; it is used up.
    """
    from transformers import GenerationConfig

    generate: Any = model.generate  # typed as a module attribute in transformers
    stop = stop_tokens(model)
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop) or None,
        pad_token_id=min(stop, default=0),
        use_cache=True,
    )
    ids = torch.tensor([list(prompt) for prompt in prompts], device=input_device(model))
    own = model.generation_config
    model.generation_config = GenerationConfig()  # where `generate` looks for what a config leaves open
    try:
        with torch.inference_mode():
            output: Any = generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config, **cache_argument(cache)
            )
    finally:
        model.generation_config = own
    return [_until_stop(row, stop) for row in output[:, ids.shape[1] :].tolist()]


def answer_drafts(
    model: PreTrainedModel,
    drafts: Sequence[SampleDraft],
    progress: Progress | None = None,
    answers: AnswerStore | None = None,
) -> list[Sample]:
    """Returns the drafts as samples, each ended by the dense model's own answer of at most `room` tokens.

    Drafts of equal length and room are answered in one batch. Under `torchrun` the processes share the batches, and every
    process must call it with the same drafts.

    Batches of which all answers are in `answers` are not answered again, and new ones are added to it. Batches do not depend
    on it, so a run that was stopped ends with the answers of one that was not. That of the first process counts.

    Raises:
        DataError: a sample is no longer than the largest sink.
        ArtefactError: answers cannot be written.
    """
    progress = progress or SILENT
    progress.start("the dense model's answers", len(drafts))
    batches, samples = answer_batches(drafts), dict[int, Sample]()

    def finish(batch: int, found: Sequence[Sequence[int]]) -> None:
        for index, answer in zip(batches[batch], found, strict=True):
            samples[index] = finish_sample(drafts[index], answer)
            progress.step(drafts[index].source)

    def answer(batch: int) -> list[list[int]]:
        room, prompts = _of_batch(drafts, batches[batch])
        return generate_greedy(model, prompts, room)

    def keep(batch: int, made: list[list[int]]) -> None:
        if answers is not None:
            room, prompts = _of_batch(drafts, batches[batch])
            answers.add(prompts, room, made)
        finish(batch, made)

    known = broadcast([_known(*_of_batch(drafts, members), answers) for members in batches])
    for batch, found in enumerate(known):
        if found is not None:
            finish(batch, found)
    shared([batch for batch, found in enumerate(known) if found is None], answer, keep)
    progress.done()
    return [samples[index] for index in range(len(drafts))]


def answer_batches(drafts: Sequence[SampleDraft]) -> list[list[int]]:
    """Returns the indices of drafts that are answered together: equal length and room, at most `BATCH_TOKENS`."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, draft in enumerate(drafts):
        groups.setdefault((len(draft.ids), draft.room), []).append(index)
    batches = []
    for (size, _), members in groups.items():
        batch = max(1, BATCH_TOKENS // max(size, 1))
        batches += [members[first : first + batch] for first in range(0, len(members), batch)]
    return batches


def _of_batch(drafts: Sequence[SampleDraft], members: Sequence[int]) -> tuple[int, list[Sequence[int]]]:
    """Returns the room of a batch's drafts, and their prompts."""
    return drafts[members[0]].room, [drafts[index].ids for index in members]


def _known(room: int, prompts: Sequence[Sequence[int]], store: AnswerStore | None) -> list[list[int]] | None:
    """Returns the answers to a batch of prompts where there is nothing to be computed; otherwise None."""
    if not room:
        return [[] for _ in prompts]
    known = [store.get(prompt, room) for prompt in prompts] if store is not None else []
    found = [answer for answer in known if answer is not None]
    return found if len(found) == len(prompts) else None


def finish_sample(draft: SampleDraft, answer: Sequence[int]) -> Sample:
    """Returns the draft followed by an answer, whose tokens are all targets."""
    ids = np.array([*draft.ids, *answer], dtype=np.int64)
    mask = np.array([*draft.mask, *([True] * len(answer))], dtype=np.bool_)
    return Sample(ids, mask, draft.source, draft.length, draft.kind)


def _until_stop(ids: list[int], stop: set[int]) -> list[int]:
    end = next((index + 1 for index, token in enumerate(ids) if token in stop), len(ids))
    return ids[:end]
