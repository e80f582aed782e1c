"""What happened in a heal so far, in its work folder, so that a run that was stopped resumes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from zipfile import is_zipfile

import numpy as np
import torch

from moacompress.core.artefact_names import HEAL_BEST_FILE, HEAL_HISTORY_FILE
from moacompress.core.errors import ArtefactError
from moacompress.core.files import read_json, write_bytes, write_json
from moacompress.models.weight_files import read_header

TRAINER_STATE = "trainer_state.json"
"""What transformers writes last into a checkpoint: one without it is half-written."""
TORCH_FILES = (".pt", ".pth", ".bin")
"""Names of what torch writes end so."""


@dataclass
class Evaluated:
    """Held-out KL after some optimizer steps."""

    step: int
    mark: int  # number of the evaluation that was due
    kls: list[float]  # KL(dense || model) of every held-out sample, nats

    @property
    def mean(self) -> float:
        """Mean over the samples."""
        return float(np.mean(self.kls))


@dataclass
class HealHistory:
    """Losses and held-out KL of a heal."""

    start: Evaluated | None = None  # None until it is measured
    best: Evaluated | None = None  # the lowest so far, if below the start's
    evaluations: list[Evaluated] = field(default_factory=list)  # without `start`
    losses: list[float] = field(default_factory=list)  # mean of every step
    tokens: int = 0
    seconds: float = 0.0  # of training, evaluations included
    finished: bool = False

    def add(self, found: Evaluated) -> bool:
        """Takes in an evaluation; returns whether it is the best so far."""
        assert self.start is not None
        self.evaluations.append(found)
        better = found.mean < (self.best or self.start).mean
        if better:
            self.best = found
        return better

    def evaluations_without_improvement(self) -> int:
        """Returns how many evaluations in a row, up to the last, were no new best."""
        best = self.best.step if self.best is not None else 0
        return sum(found.step > best for found in self.evaluations)

    def back_to(self, step: int) -> None:
        """Forgets what came after a step; the best state stays what it was, as it was measured."""
        self.tokens = round(self.tokens * step / max(len(self.losses), 1))
        self.losses = self.losses[:step]
        self.evaluations = [found for found in self.evaluations if found.step <= step]

    def write(self, folder: Path) -> None:
        """Writes it into the work folder, atomically."""
        write_json(folder / HEAL_HISTORY_FILE, asdict(self))

    @staticmethod
    def read(folder: Path) -> HealHistory:
        """Reads what an earlier run wrote; an empty history where it wrote none.

        Raises:
            ArtefactError: the file is damaged.
        """
        path = folder / HEAL_HISTORY_FILE
        if not path.is_file():
            return HealHistory()
        data = read_json(path, "history")
        try:
            start, best = (None if data[name] is None else Evaluated(**data[name]) for name in ("start", "best"))
            evaluations = [Evaluated(**found) for found in data["evaluations"]]
            return HealHistory(**{**data, "start": start, "best": best, "evaluations": evaluations})
        except (KeyError, TypeError) as error:
            raise ArtefactError(f"{path} is damaged: {error}; heal from scratch with --overwrite") from error


def save_best(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes the best weights so far, atomically."""
    from safetensors.torch import save

    write_bytes(folder / HEAL_BEST_FILE, save(tensors))


def load_best(folder: Path) -> dict[str, torch.Tensor]:
    """Reads what `save_best` wrote.

    Raises:
        ArtefactError: it is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / HEAL_BEST_FILE)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"{folder / HEAL_BEST_FILE} is damaged: {error}; heal from scratch with --overwrite"
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last whole checkpoint of transformers' Trainer in a folder."""
    found = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that the Trainer writes last is there, and none was cut, as by a full disk or a power cut."""
    try:
        state = read_json(checkpoint / TRAINER_STATE, "state")
    except ArtefactError:
        return False
    named = isinstance(state, dict) and str(state.get("global_step")) == checkpoint.name.rpartition("-")[2]
    return named and all(map(_has_its_end, checkpoint.iterdir()))


def _has_its_end(file: Path) -> bool:
    """Whether a file of tensors has all bytes that its own table counts; nothing of it is unpacked."""
    if file.suffix in TORCH_FILES:
        return is_zipfile(file)  # a table stands at the end
    if file.suffix == ".safetensors":
        try:
            read_header(file)
        except ArtefactError:
            return False
    return True
