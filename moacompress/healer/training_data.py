"""What a heal trains on and what it is measured on.

Training samples are the profile's calibration samples and, where more are asked for, new ones of the same recipe with another
seed: answers of the dense model, and plain text. They are drawn from the calibration pools, so that none is one that plans
are measured on (the profile's validation samples, which end the training) or that an evaluation uses. What is trained on is
compared with the held-out samples by shingles, which an evaluation of the healed checkpoint finds too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np

from moacompress.calibration.data.answers import AnswerStore, SampleDraft, answer_drafts
from moacompress.calibration.data.sample_sources import check_counts, make_drafts
from moacompress.calibration.data.samples import SHORTEST, Sample, SampleKind, fingerprint_ordered, fingerprint_sample
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import DataError
from moacompress.core.progress import Progress
from moacompress.core.shingles import Shingles, refuse_overlap
from moacompress.models.source import SourceModel
from moacompress.prompts.templates import decode_text
from moacompress.recipe import Recipe

TEXT_TARGETS = 256
"""Positions of a plain text that count: training has time for more than the few that a plan is measured on."""


@dataclass(frozen=True)
class HealData:
    """Samples of a heal."""

    training: list[Sample]
    held_out: list[Sample]  # validation samples of the profile
    seen: Shingles  # of the training samples
    overlap: dict[str, float | None]  # share of the held-out samples' shingles that are among them, by kind

    @property
    def fingerprint(self) -> str:
        """Of the training samples, in order."""
        return fingerprint_ordered(self.training)


@dataclass(frozen=True)
class HealCounts:
    """How many training samples with answers and of plain text are the profile's, and how many are made."""

    answers: int
    texts: int
    new_answers: int
    new_texts: int


def heal_lengths(profile: Profile, recipe: Recipe) -> tuple[int, ...]:
    """Returns the lengths of the training samples, ascending."""
    return recipe.heal.lengths or profile.lengths


def held_out_samples(profile: Profile, recipe: Recipe) -> list[Sample]:
    """Returns the validation samples that a heal is measured on: none longer than what is trained on.

    Raises:
        DataError: all are longer.
    """
    longest = max(heal_lengths(profile, recipe))
    found = [sample for sample in profile.validation if sample.length <= longest]
    if not found:
        shortest = min(sample.length for sample in profile.validation)
        raise DataError(
            f"the validation samples of {profile.path} have {shortest:,} tokens or more, training samples {longest:,}: there "
            "is nothing to measure the heal on; ask for longer lengths"
        )
    wanted = recipe.heal.held_out
    if wanted is None or wanted >= len(found):
        return found
    chosen = np.random.default_rng(recipe.seed).permutation(len(found))[:wanted]
    return [found[number] for number in sorted(chosen.tolist())]


def count_samples(profile: Profile, calibration: Sequence[Sample], recipe: Recipe) -> HealCounts:
    """Returns how many training samples are the profile's, and how many are to be made."""
    heal, lengths = recipe.heal, heal_lengths(profile, recipe)
    here = [sample.kind for sample in calibration if sample.length in lengths]
    wanted = round(heal.samples * heal.text_share)
    texts = min(here.count("text"), wanted)
    profiled = profile.recipe.calibration.text
    prose = recipe.calibration.text is not None or (profiled is not None and Path(profiled).exists())
    new_texts = wanted - texts if prose else 0
    answers = min(here.count("answer"), heal.samples - texts - new_texts)
    return HealCounts(answers, texts, heal.samples - texts - new_texts - answers, new_texts)


def make_heal_data(
    profile: Profile,
    teacher: SourceModel,
    recipe: Recipe,
    progress: Progress | None = None,
    answers: AnswerStore | None = None,
    allow_overlap: bool = False,
) -> HealData:
    """Returns the samples of a heal; the same arguments give the same samples.

    The recipe's `calibration.text` wins over the profile's. With `allow_overlap` more than 1% of the held-out text may be
    trained on.

    Raises:
        DataError: data that are missing, or that the held-out set uses too; lengths that the model cannot have.
        ArtefactError: the profile's samples cannot be read, or answers not be written.
    """
    calibration = profile.calibration_samples()
    counts = count_samples(profile, calibration, recipe)
    drafts = heal_drafts(profile, teacher, recipe, counts)
    lengths = heal_lengths(profile, recipe)
    rng = np.random.default_rng(recipe.seed)
    chosen: list[Sample] = []
    for kind, wanted in (("answer", counts.answers), ("text", counts.texts)):
        here = [sample for sample in calibration if sample.kind == kind and sample.length in lengths]
        chosen += [here[number] for number in sorted(rng.permutation(len(here))[:wanted].tolist())]
    made = answer_drafts(teacher.model, drafts, progress, answers) if drafts else []
    known = {fingerprint_sample(sample) for sample in chosen}
    chosen += [sample for sample in made if fingerprint_sample(sample) not in known]
    if not chosen:
        raise DataError("there are no training samples; ask for more (--samples)")
    refuse_seen(chosen, profile.validation)
    held_out = held_out_samples(profile, recipe)
    seen = Shingles.of(decode_text(teacher.tokenizer, sample.input_ids.tolist()) for sample in chosen)
    shares = {
        kind: seen.share(
            decode_text(teacher.tokenizer, sample.input_ids.tolist()) for sample in held_out if sample.kind == kind
        )
        for kind in get_args(SampleKind)
    }
    if not allow_overlap:
        text = recipe.calibration.text or profile.recipe.calibration.text
        refuse_overlap(shares["text"], f"the held-out text of {profile.path}", f"training on {text}")
    return HealData([_with_more_targets(sample, rng) for sample in chosen], held_out, seen, shares)


def heal_drafts(profile: Profile, teacher: SourceModel, recipe: Recipe, counts: HealCounts) -> list[SampleDraft]:
    """Returns what the dense model is still to answer or to read: of the profile's recipe, with a seed that it did not use.

    Raises:
        DataError: data that are missing; lengths that the model or samples cannot have.
    """
    lengths = heal_lengths(profile, recipe)
    check_counts(lengths, len(lengths), teacher.context, "calibration")
    if not counts.new_answers + counts.new_texts:
        return []
    ours = profile.recipe.calibration.text if recipe.calibration.text is None else recipe.calibration.text
    wanted = profile.recipe.override(
        seed=(profile.recipe.seed + 1 + recipe.seed) % 2**31,
        calibration__text=ours,
        calibration__lengths=lengths,
        calibration__samples=max(counts.new_answers, len(lengths)),
        calibration__text_samples=counts.new_texts,
    )
    drafts = make_drafts(teacher, wanted, "calibration")
    texts = [draft for draft in drafts if draft.kind == "text"]
    answers = [draft for draft in drafts if draft.kind == "answer"]
    return [*answers[: counts.new_answers], *texts]


def refuse_seen(training: Sequence[Sample], held_out: Sequence[Sample]) -> None:
    """Refuses training samples that are held out.

    Raises:
        DataError: says how many.
    """
    known = {fingerprint_sample(sample) for sample in held_out}
    seen = [sample for sample in training if fingerprint_sample(sample) in known]
    if seen:
        raise DataError(
            f"{len(seen)} of {len(training)} training samples are validation samples of the profile, such as one of "
            f"{seen[0].source}; a heal is measured on those, so train on other data"
        )


def _with_more_targets(sample: Sample, rng: np.random.Generator) -> Sample:
    """Returns a plain text with `TEXT_TARGETS` positions as targets; any other sample as it is."""
    if sample.kind != "text":
        return sample
    later = np.arange(SHORTEST, len(sample.input_ids))
    mask = np.zeros(len(sample.input_ids), np.bool_)
    mask[rng.choice(later, size=min(TEXT_TARGETS, len(later)), replace=False)] = True
    return replace(sample, answer_mask=mask)
