"""Profiling: how much the model's answers change if a KV head keeps less, for every head and candidate rule.

A profile is a folder that is filled sample by sample. The processes of `torchrun` share the samples: each writes those that it
takes, and the first one does everything else that touches the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moacompress.calibration.data import sample_sources
from moacompress.calibration.data.answers import AnswerStore, SampleDraft, answer_drafts
from moacompress.calibration.data.samples import Sample, save_samples
from moacompress.calibration.gates import gate_samples
from moacompress.calibration.gates.scorers import find_scorer, scored_by
from moacompress.calibration.gates.training import Gates, train_gates
from moacompress.calibration.profile.centres import centre_texts, mean_keys
from moacompress.calibration.profile.folder import prepare
from moacompress.calibration.profile.manifest import Manifest
from moacompress.calibration.profile.request import (
    check_around,
    check_samples,
    data_recipe,
    file_digests,
    request_fingerprint,
    rules_on_offer,
)
from moacompress.calibration.profile.rounding_loss import measure_rounding
from moacompress.calibration.profile.sample_run import SampleRun
from moacompress.calibration.profile.sample_statistics import token_influence
from moacompress.calibration.profile.shard import Shard, parse_shard
from moacompress.calibration.profile.store import Profile, merge, read_samples
from moacompress.calibration.profile.wording import calibration_wording, check_wording
from moacompress.core.arrays import Floats32
from moacompress.core.artefact_names import (
    ANSWERS_FILE,
    CALIBRATION_FILE,
    MANIFEST_FILE,
    SAMPLES_FOLDER,
    SHINGLES_FILE,
    VALIDATION_FILE,
)
from moacompress.core.errors import ArtefactError, DataError
from moacompress.core.files import remove
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import rank
from moacompress.core.shingles import Shingles
from moacompress.core.version import own_version
from moacompress.models.modules import attention_modules
from moacompress.models.processes import broadcast, check_alike, join
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import Split
from moacompress.prompts.templates import decode_text
from moacompress.recipe import Recipe
from moacompress.rules.key_centres import Centres
from moacompress.rules.plan import Plan
from moacompress.runtime.gate import check_room
from moacompress.runtime.ready_model import load_for

logger = logging.getLogger(__name__)


def profile(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    *,
    around: Plan | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Profiles a model into a folder, or takes up where an earlier run of the same request stopped.

    Under `torchrun` its processes share the samples, and every process must call it alike; all return the profile. An earlier
    run may have had another number of processes. Where machines do not share a disk, the folder of the first process is whole.

    Args:
        model: MODEL (hub id, folder, `.gguf` file), or a loaded model.
        out: the folder. With the same request in it, finished samples are kept and a finished profile is returned.
        recipe: the run; `calibration`, `profile`, `seed` count, and for MODEL `dtype` and `device`.
        around: a plan of this model: profile what every change of a rule would do to the model under it.
        overwrite: start from scratch, whatever profile is in the folder; other files in it stay.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: receives the progress.

    Raises:
        ModelError: the model cannot be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, no samples, or too many without finite numbers.
        PlanError: `around` is a plan of another model, one whose layers share attention, or one whose gates are not at hand.
        ArtefactError: the folder holds something else, cannot be written, or another process is filling it.
    """
    made, _ = _profiled(model, out, recipe, around, None, overwrite, trust_remote_code, progress or SILENT)
    assert made is not None
    return made


def profile_shard(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    shard: str,
    *,
    around: Plan | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Profiles a part of the samples into a folder of its own, which `merging.merge_shards` puts together with the others.

    `recipe` is that of the whole profile; the shard "3/8" is the third of eight. Returns what the folder holds.

    Raises:
        UsageError: no shard, or one without samples. Other errors are those of `profile`.
    """
    parse_shard(shard)
    return _profiled(model, out, recipe, around, shard, overwrite, trust_remote_code, progress or SILENT)[1]


def _profiled(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    around: Plan | None,
    shard: str | None,
    overwrite: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> tuple[Profile | None, Manifest]:
    """Returns the profile and its manifest; of a shard only this."""
    out = Path(out)
    find_scorer(recipe.profile.scorer)  # an unknown one is said before anything is read
    join()
    if not rank():
        check_writable(out)
        sample_sources.check_data(recipe)
    source = load_for(recipe, model, trust_remote_code=trust_remote_code)
    weights = source.shape.weights_fingerprint
    check_alike({"moacompress": own_version(), "weights": weights, "dtype": source.computes_in})
    if around is not None:
        check_around(source, around)
    with _place(out):
        made: Profile | None
        found = None if rank() else _begin(out, source, recipe, around, shard, overwrite)
        manifest, trains, made = broadcast(found)
        if made is not None:
            return made, manifest
        if rank():  # on a machine that does not see the first one's disk
            if overwrite:
                remove([out / SAMPLES_FOLDER])
            if not (out / MANIFEST_FILE).exists():
                manifest.write(out)
        # too little data is found before anything is answered
        untrained = trains and broadcast(None if rank() else _known_gates(out, manifest)) is None
        drafts = broadcast(gate_samples.gate_drafts(source, manifest.recipe) if untrained and not rank() else None)
        manifest, samples, validation = _make_samples(out, source, manifest, progress)
        chosen = manifest.recipe.profile
        if chosen.formats and chosen.centres and not manifest.centres:
            manifest = replace(manifest, centres=_centres(source, manifest, progress))
            _write(out, manifest)
        if not rank():
            _write_shingles(out, source, manifest, [*samples, *validation], around, drafts)
        if around is None:
            measure_rounding(out, source, recipe, validation, progress, trust_remote_code=trust_remote_code)
        gates = None
        if manifest.has_gates:
            gates = _gates(out, source, manifest, around, drafts, progress).weights
            manifest = replace(manifest, gates=gates.fingerprint)
            _write(out, manifest)
        run = SampleRun(out, source, manifest, manifest.numbered(samples), around, gates, progress)
        statistics, manifest = run.run()
        if shard is not None:
            _write(out, manifest)
            return None, broadcast(manifest)
        if not rank():
            merge(out, manifest, samples, statistics)
            made = Profile.load(out)
        made, manifest = broadcast((made, manifest))
        return made, manifest


@contextmanager
def _place(out: Path) -> Iterator[None]:
    """Makes the first process the lock holder of the profile's folder, as long as the block runs."""
    if rank():
        yield
        return
    with no_empty_folder(out), own_folder(out):
        yield


def _begin(
    out: Path, source: SourceModel, recipe: Recipe, around: Plan | None, shard: str | None, overwrite: bool
) -> tuple[Manifest, bool, Profile | None]:
    """Checks what is asked for, and makes the folder, or finds what an earlier run left there.

    Returns:
        The manifest, whether gates are to be known that a profile trains, and the profile where it is finished.
    """
    check_samples(source, recipe, None if overwrite else out, around)
    rules = rules_on_offer(recipe, around)
    key = around.key() if around is not None else ""
    request = request_fingerprint(source.shape, rules, recipe, file_digests(recipe), key, source.computes_in)
    trains = around is None and any(rule.selects for rule in rules)
    asked = Manifest(source.source, source.shape, rules, recipe, request, key, wording=calibration_wording())
    if shard is not None:
        drafts = (_drafts(source, asked, split) for split in ("calibration", "validation"))
        asked = replace(asked, shard=Shard.of(*parse_shard(shard), *drafts))
    if not overwrite:
        check_wording(out, asked, lambda found: trains and _known_gates(out, found) is None)
    manifest = prepare(out, asked, overwrite)
    if manifest.complete and (not manifest.has_gates or _known_gates(out, manifest) is not None):
        try:
            return manifest, trains, Profile.load(out)
        except ArtefactError as error:
            logger.warning("%s; repairing it", str(error).partition("; run")[0])
    return manifest, trains, None


def _write(out: Path, manifest: Manifest) -> None:
    if not rank():
        manifest.write(out)


def _known_gates(out: Path, manifest: Manifest) -> Gates | None:
    """Returns the gates in the folder of a profile; None where they are to be trained, as they are not those it began with."""
    found = Gates.load(out, manifest.fingerprint)
    return found if found is not None and manifest.gates in ("", found.weights.fingerprint) else None


def _write_shingles(
    out: Path,
    source: SourceModel,
    manifest: Manifest,
    samples: Sequence[Sample],
    around: Plan | None,
    drafts: Sequence[SampleDraft] | None,
) -> None:
    """Writes the shingles of all that plans of the profile are fitted to and chosen by; an evaluation compares with them.

    Those are all its samples, and the drafts that gates are trained on; `drafts` is None where the gates were there before.
    """
    path = out / SHINGLES_FILE
    if drafts is None and path.is_file():
        return
    if drafts is None and around is None and manifest.has_gates:
        drafts = gate_samples.gate_drafts(source, manifest.recipe)
    ids = [*(sample.input_ids.tolist() for sample in samples), *(draft.ids for draft in drafts or ())]
    found = Shingles.of(decode_text(source.tokenizer, tokens) for tokens in ids)
    known = around.seen if around is not None else None
    (found if known is None else Shingles.union([found, known])).save(path)


def _centres(source: SourceModel, manifest: Manifest, progress: Progress) -> Centres:
    """Returns the mean keys of a profile, which are those of all its shards too."""
    texts = broadcast(None if rank() else centre_texts(_drafts(source, manifest, "calibration")))
    found: Centres = broadcast(mean_keys(source, texts, progress))
    return found


def _gates(
    out: Path,
    source: SourceModel,
    manifest: Manifest,
    around: Plan | None,
    drafts: Sequence[SampleDraft] | None,
    progress: Progress,
) -> Gates:
    """Returns the gates in the folder of a profile, after they were put there, from the plan or by training."""
    known: Gates | None = broadcast(None if rank() else _known_gates(out, manifest))
    if known is not None:
        return known
    if around is not None:
        assert around.gate_weights is not None
        gates = Gates(around.gate_weights, {})
    else:
        drafts = drafts or broadcast(None if rank() else gate_samples.gate_drafts(source, manifest.recipe))
        gates = _train_gates(out, source, manifest, drafts, progress)
    if not rank():
        gates.save(out, manifest.fingerprint)
    return gates


def _train_gates(
    out: Path, source: SourceModel, manifest: Manifest, drafts: Sequence[SampleDraft], progress: Progress
) -> Gates:
    """Trains gates on samples of their own."""
    check_room(attention_modules(source.model))
    samples = answer_drafts(source.model, drafts, progress, _answers(out, source, manifest))

    def influence(index: int) -> Floats32:
        draws, seed = manifest.recipe.profile.draws, manifest.recipe.seed + gate_samples.GATE_SEED
        return token_influence(source.model, source.shape, samples[index], draws, seed, index)

    scorer = find_scorer(manifest.recipe.profile.scorer)
    if scorer is None:
        return train_gates(source.model, samples, influence, progress)
    gates = train_gates(source.model, samples, scored_by(scorer, source.model, source.shape, samples), progress)
    return replace(gates, report={**gates.report, "scorer": scorer.name})


def _answers(out: Path, source: SourceModel, manifest: Manifest) -> AnswerStore:
    """Returns the answers in the folder of a profile; processes but the first one keep theirs in memory."""
    path = None if rank() else out / ANSWERS_FILE
    return AnswerStore(path, manifest.shape.weights_fingerprint, source.computes_in)


def _make_samples(
    out: Path, source: SourceModel, manifest: Manifest, progress: Progress
) -> tuple[Manifest, list[Sample], list[Sample]]:
    """Makes the samples of both splits, or reads those that are on disk already, and completes the fingerprints."""
    expected = manifest.calibration_fingerprint, manifest.validation_fingerprint
    calibration = _samples(out, source, manifest, "calibration", expected[0], progress)
    validation = _samples(out, source, manifest, "validation", expected[1], progress)
    manifest = manifest.of_samples(calibration, validation)
    _write(out, manifest)
    missing = sorted(set(manifest.lengths) - {sample.length for sample in calibration})
    if missing and manifest.shard is None:
        raise DataError(
            f"no calibration sample has length {missing[0]:,}: {len(calibration)} samples are too few for "
            f"{len(manifest.lengths)} lengths; raise calibration.samples"
        )
    return manifest, calibration, validation


def _samples(
    out: Path, source: SourceModel, manifest: Manifest, split: Split, expected: str, progress: Progress
) -> list[Sample]:
    """Returns a split's samples that are to be here, all or the shard's.

    Those on disk are taken if they have the expected fingerprint, or any if that is empty; else they are made and saved.
    """
    path = out / (CALIBRATION_FILE if split == "calibration" else VALIDATION_FILE)
    samples: list[Sample] | None = broadcast(None if rank() else read_samples(path, expected))
    if samples is not None:
        return samples
    answers = _answers(out, source, manifest)
    if manifest.shard is None:
        recipe = data_recipe(manifest.recipe, manifest.rules)
        samples = sample_sources.build_samples(source, recipe, split, progress, answers)
    else:
        numbers = manifest.shard.calibration if split == "calibration" else manifest.shard.validation
        drafts = None if rank() else _drafts(source, manifest, split)
        chosen = broadcast(None if drafts is None else [drafts[number] for number in numbers])
        samples = answer_drafts(source.model, chosen, progress, answers)
    if not rank():
        save_samples(path, samples)
    return samples


def _drafts(source: SourceModel, manifest: Manifest, split: Split) -> list[SampleDraft]:
    """Returns the samples of a whole profile's split before the dense model has answered."""
    return sample_sources.make_drafts(source, data_recipe(manifest.recipe, manifest.rules), split)
