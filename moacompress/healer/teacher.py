"""The dense model of a heal: its predictions at the targets of samples, and the states of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.passes import answer_logits, output_logits, target_states
from moacompress.core.errors import ModelError
from moacompress.core.ranks import rank, world_size
from moacompress.models import processes
from moacompress.models.kept_logits import kept_logits
from moacompress.models.kl import kl_divergence

MAX_STATE_BYTES = 2 * 2**30
"""Of what is kept of the dense model; samples beyond it are read again."""


class Teacher:
    """The dense model, in eval mode. What its output layer gets at targets is kept, so that it reads most samples once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._states: dict[Any, Tensor] = {}
        self._room = MAX_STATE_BYTES

    def target_logits(self, key: Any, ids: Tensor, rows: Tensor) -> Tensor:
        """Returns logits `[rows, vocabulary]` of the sample known by `key`, with token ids int64 `[N]`."""
        states = self._states.get(key)
        if states is None:
            states = target_states(self.model, ids, rows)
            if states.nbytes <= self._room:
                self._states[key] = states
                self._room -= states.nbytes
        with torch.no_grad():
            return output_logits(self.model, states)

    def logits_and_layers(self, ids: Tensor, rows: Tensor, layers: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Returns logits `[rows, vocabulary]`, and what each of some layers gives, `[1, N, hidden]`."""
        with torch.no_grad():
            out = kept_logits(self.model, rows, input_ids=ids[None], use_cache=False, output_hidden_states=True)
        return out.logits[0], [out.hidden_states[layer + 1] for layer in layers]


class HeldOut:
    """The samples that a heal is measured on."""

    def __init__(self, teacher: Teacher, samples: Sequence[Sample]) -> None:
        self.teacher, self.samples = teacher, list(samples)

    def kls(self, model: Any) -> list[float]:
        """Returns KL(dense || model) of every sample, nats, mean over its targets; each process measures its share.

        Raises:
            ModelError: logits that are not finite.
        """
        training = model.training
        model.eval()
        found = {}
        for number in range(rank(), len(self.samples), world_size()):
            sample = self.samples[number]
            ids, rows = (torch.from_numpy(part) for part in (sample.input_ids, sample.target_rows))
            dense = self.teacher.target_logits(f"held out {number}", ids.to(model.device), rows.to(model.device))
            found[number] = kl_divergence(dense.float(), answer_logits(model, sample))
            if not np.isfinite(found[number]):
                raise ModelError(f"the logits of held-out sample {number} are not finite; heal with --dtype float32")
        model.train(training)
        together = processes.gathered(found)
        return [together[number] for number in range(len(self.samples))]
