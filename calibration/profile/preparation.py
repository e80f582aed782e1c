"""What a profile has before its first sample is measured: samples of both splits, mean keys, gates, and shingles of all text.

What is in the folder already is taken; the rest is made, written, and noted in the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moacompress.calibration.data import sample_sources
from moacompress.calibration.data.answers import AnswerStore, SampleDraft, answer_drafts
from moacompress.calibration.data.samples import Sample, save_samples
from moacompress.calibration.gates import gate_samples
from moacompress.calibration.gates.scorers import find_scorer, scored_by
from moacompress.calibration.gates.training import Gates, train_gates
from moacompress.calibration.profile.centres import centre_texts, mean_keys
from moacompress.calibration.profile.manifest import Manifest
from moacompress.calibration.profile.request import data_recipe
from moacompress.calibration.profile.sample_statistics import token_influence
from moacompress.calibration.profile.store import read_samples
from moacompress.core.arrays import Floats32
from moacompress.core.artefact_names import ANSWERS_FILE, CALIBRATION_FILE, SHINGLES_FILE, VALIDATION_FILE
from moacompress.core.errors import DataError
from moacompress.core.progress import Progress
from moacompress.core.ranks import rank
from moacompress.core.shingles import Shingles
from moacompress.models.modules import attention_modules
from moacompress.models.processes import broadcast
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import Split
from moacompress.prompts.templates import decode_text
from moacompress.rules.gate_weights import GateWeights
from moacompress.runtime.gate import check_room


def known_gates(out: Path, manifest: Manifest) -> Gates | None:
    """Returns the gates in the folder of a profile; None where they are to be trained, as they are not those it began with."""
    found = Gates.load(out, manifest.fingerprint)
    return found if found is not None and manifest.gates in ("", found.weights.fingerprint) else None


def profile_drafts(source: SourceModel, manifest: Manifest, split: Split) -> list[SampleDraft]:
    """Returns the samples of a whole profile's split before the dense model has answered."""
    return sample_sources.make_drafts(source, data_recipe(manifest.recipe, manifest.rules), split)


@dataclass
class Preparation:
    """A profile that is being prepared; under `torchrun` every process has one, and the first one writes.

    Attributes:
        out: the folder of the profile.
        source: the model.
        manifest: of the profile; replaced as its parts are made.
        progress: told of what is made.
    """

    out: Path
    source: SourceModel
    manifest: Manifest
    progress: Progress

    def untrained_drafts(self) -> list[SampleDraft] | None:
        """Returns what gates are to be trained on, in the first process; None where none are to be trained.

        Raises:
            DataError: there is too little data for gates, which is found before anything is answered.
        """
        if not self.manifest.has_gates:
            return None
        if broadcast(None if rank() else known_gates(self.out, self.manifest)) is not None:
            return None
        found: list[SampleDraft] = broadcast(None if rank() else self._gate_drafts())
        return found

    def make_samples(self) -> tuple[list[Sample], list[Sample]]:
        """Returns the calibration and the validation samples that are to be here, and notes their fingerprints.

        Raises:
            DataError: there are too few for the lengths.
        """
        expected = self.manifest.calibration_fingerprint, self.manifest.validation_fingerprint
        calibration = self._samples("calibration", CALIBRATION_FILE, expected[0])
        validation = self._samples("validation", VALIDATION_FILE, expected[1])
        self.note(self.manifest.of_samples(calibration, validation))
        missing = sorted(set(self.manifest.lengths) - {sample.length for sample in calibration})
        if missing and self.manifest.shard is None:
            raise DataError(
                f"no calibration sample has length {missing[0]:,}: {len(calibration)} samples are too few for "
                f"{len(self.manifest.lengths)} lengths; raise calibration.samples"
            )
        return calibration, validation

    def find_centres(self) -> None:
        """Notes the mean keys where formats are profiled; they are those of all shards too."""
        chosen = self.manifest.recipe.profile
        if chosen.formats and chosen.centres and not self.manifest.centres:
            drafts = None if rank() else profile_drafts(self.source, self.manifest, "calibration")
            texts = broadcast(None if drafts is None else centre_texts(drafts))
            self.note(replace(self.manifest, centres=broadcast(mean_keys(self.source, texts, self.progress))))

    def write_shingles(self, samples: Sequence[Sample], drafts: Sequence[SampleDraft] | None) -> None:
        """Writes the shingles of all that plans of the profile are fitted to and chosen by; an evaluation compares with them.

        Those are all its samples, and the drafts that gates are trained on; `drafts` is None where the gates were there before.
        """
        path = self.out / SHINGLES_FILE
        if rank() or (drafts is None and path.is_file()):
            return
        if drafts is None and self.manifest.has_gates:
            drafts = self._gate_drafts()
        ids = [*(sample.input_ids.tolist() for sample in samples), *(draft.ids for draft in drafts or ())]
        Shingles.of(decode_text(self.source.tokenizer, tokens) for tokens in ids).save(path)

    def make_gates(self, drafts: Sequence[SampleDraft] | None) -> GateWeights | None:
        """Returns the gates in the folder, after they were trained; None where no rule selects.

        `drafts` are those of `untrained_drafts`.
        """
        if not self.manifest.has_gates:
            return None
        gates: Gates | None = broadcast(None if rank() else known_gates(self.out, self.manifest))
        if gates is None:
            gates = self._train(drafts or broadcast(None if rank() else self._gate_drafts()))
            if not rank():
                gates.save(self.out, self.manifest.fingerprint)
        self.note(replace(self.manifest, gates=gates.weights.fingerprint))
        return gates.weights

    def note(self, manifest: Manifest) -> None:
        """Takes over a manifest and writes it."""
        self.manifest = manifest
        if not rank():
            manifest.write(self.out)

    def _gate_drafts(self) -> list[SampleDraft]:
        return gate_samples.gate_drafts(self.source, self.manifest.recipe)

    def _train(self, drafts: Sequence[SampleDraft]) -> Gates:
        """Trains gates on samples of their own."""
        source, recipe = self.source, self.manifest.recipe
        check_room(attention_modules(source.model))
        samples = answer_drafts(source.model, drafts, self.progress, self._answers())

        def influence(index: int) -> Floats32:
            seed = recipe.seed + gate_samples.GATE_SEED
            return token_influence(source.model, source.shape, samples[index], recipe.profile.draws, seed, index)

        scorer = find_scorer(recipe.profile.scorer)
        if scorer is None:
            return train_gates(source.model, samples, influence, self.progress)
        score = scored_by(scorer, source.model, source.shape, samples)
        gates = train_gates(source.model, samples, score, self.progress)
        return replace(gates, report={**gates.report, "scorer": scorer.name})

    def _samples(self, split: Split, file: str, expected: str) -> list[Sample]:
        """Returns a split's samples that are to be here, all or the shard's.

        Those on disk are taken if they have the expected fingerprint, or any if that is empty; else they are made and saved.
        """
        path, source, manifest = self.out / file, self.source, self.manifest
        samples: list[Sample] | None = broadcast(None if rank() else read_samples(path, expected))
        if samples is not None:
            return samples
        if manifest.shard is None:
            recipe = data_recipe(manifest.recipe, manifest.rules)
            samples = sample_sources.build_samples(source, recipe, split, self.progress, self._answers())
        else:
            numbers = manifest.shard.calibration if split == "calibration" else manifest.shard.validation
            drafts = None if rank() else profile_drafts(source, manifest, split)
            chosen = broadcast(None if drafts is None else [drafts[number] for number in numbers])
            samples = answer_drafts(source.model, chosen, self.progress, self._answers())
        if not rank():
            save_samples(path, samples)
        return samples

    def _answers(self) -> AnswerStore:
        """Returns the answers in the folder; processes but the first one keep theirs in memory."""
        path = None if rank() else self.out / ANSWERS_FILE
        return AnswerStore(path, self.manifest.shape.weights_fingerprint, self.source.computes_in)
