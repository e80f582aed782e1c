"""Profiling: how much the model's answers change if a KV head keeps less, for every head and candidate rule.

A profile is a folder that is filled sample by sample; what is computed of a sample is in `sample_statistics`. The processes of
`torchrun` share the samples: each writes those that it takes, and the first one does everything else that touches the disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from moacompress.calibration.data.answer_store import AnswerStore
from moacompress.calibration.data.answers import SampleDraft, answer_drafts
from moacompress.calibration.data.samples import Sample, save_samples
from moacompress.calibration.gates.gate_samples import GATE_SEED, gate_drafts
from moacompress.calibration.gates.scorers import find_scorer, scored_by
from moacompress.calibration.gates.training import Gates, train_gates
from moacompress.calibration.profile.centres import centre_texts, mean_keys
from moacompress.calibration.profile.manifest import Manifest, prepare, request_fingerprint
from moacompress.calibration.profile.rounding_loss import measure_rounding
from moacompress.calibration.profile.sample_statistics import sample_statistics, token_influence
from moacompress.calibration.profile.shard import Shard, parse_shard
from moacompress.calibration.profile.skipped import check_skipped
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile, merge, read_sample, read_samples, write_sample
from moacompress.calibration.profile.wording import calibration_wording, check_wording
from moacompress.core.arrays import Floats32
from moacompress.core.artefact_names import (
    ANSWERS_FILE,
    CALIBRATION_FILE,
    GATES_FILE,
    MANIFEST_FILE,
    SAMPLES_FOLDER,
    SHINGLES_FILE,
    VALIDATION_FILE,
)
from moacompress.core.errors import ArtefactError, DataError, PlanError
from moacompress.core.files import digest_files, remove
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import rank, work_shard, world_size
from moacompress.core.shingles import Shingles
from moacompress.core.version import own_version
from moacompress.models.modules import attention_modules
from moacompress.models.processes import broadcast, check_alike, gathered, join, shared
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import Split
from moacompress.prompts.templates import decode_text
from moacompress.recipe import Recipe
from moacompress.recipe_sections import file_name
from moacompress.rules.candidates import candidate_rules, gated_rules
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.key_centres import Centres
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.gate import check_room, gates_of
from moacompress.runtime.ready_model import load_for

logger = logging.getLogger(__name__)


def check_around(source: SourceModel, plan: Plan) -> None:
    """Refuses a plan that a model cannot be profiled around.

    Raises:
        PlanError: a plan of another model, one whose layers share attention, or one whose gates are not at hand.
    """
    plan.check_model(source.shape, weights=True)
    if plan.shares:
        raise PlanError(
            "layers of the plan share attention, and profiling around such a plan is not possible; give a plan without sharing"
        )
    gates_of(plan, source.model.config.get_text_config(decoder=True).hidden_size)


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

    Args:
        model: see `profile`.
        out: likewise.
        recipe: likewise, of the whole profile.
        shard: which part: "3/8" is the third of eight.
        around: see `profile`.
        overwrite: likewise.
        trust_remote_code: likewise.
        progress: likewise.

    Returns:
        What the folder holds.

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
    from moacompress.calibration.data.sample_sources import check_data

    out = Path(out)
    find_scorer(recipe.profile.scorer)  # an unknown one is said before anything is read
    join()
    if not rank():
        check_writable(out)
        check_data(recipe)
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
        if rank():
            _follow(out, manifest, overwrite)
        # too little data is found before anything is answered
        untrained = trains and broadcast(None if rank() else _known_gates(out, manifest)) is None
        drafts = broadcast(gate_drafts(source, manifest.recipe) if untrained and not rank() else None)
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
        numbered = manifest.numbered(samples)
        statistics, manifest = _run_samples(out, source, manifest, numbered, around, gates, progress)
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
    request = request_fingerprint(source.shape, rules, recipe, _local_files(recipe), key, source.computes_in)
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


def _follow(out: Path, manifest: Manifest, overwrite: bool) -> None:
    """Makes a folder of another process that of the profile too, where its machine does not see the first one's."""
    if overwrite:
        remove([out / SAMPLES_FOLDER])
    if not (out / MANIFEST_FILE).exists():
        manifest.write(out)


def _write(out: Path, manifest: Manifest) -> None:
    if not rank():
        manifest.write(out)


def rules_on_offer(recipe: Recipe, around: Plan | None) -> tuple[Rule, ...]:
    """Returns the rules that a profile is of; some select where gates are trained, or the plan around which it is has them."""
    bounds = max(recipe.calibration.lengths), SINKS, recipe.profile.min_window
    selects = recipe.profile.gates if around is None else around.selects
    return candidate_rules(*bounds) + (gated_rules(*bounds) if selects else ())


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

    Args:
        out: the folder of the profile.
        source: the model, whose tokenizer counts.
        manifest: of the profile.
        samples: those that are profiled, and those that plans are measured on.
        around: the plan that is profiled around, or None.
        drafts: the samples that gates are trained on; None where the gates were there before.
    """
    path = out / SHINGLES_FILE
    if drafts is None and path.is_file():
        return
    if drafts is None and around is None and manifest.has_gates:
        drafts = gate_drafts(source, manifest.recipe)
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
        drafts = drafts or broadcast(None if rank() else gate_drafts(source, manifest.recipe))
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
        draws, seed = manifest.recipe.profile.draws, manifest.recipe.seed + GATE_SEED
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


def check_lengths(context: int, recipe: Recipe) -> None:
    """Refuses lengths that cannot be profiled.

    Args:
        context: the model's, tokens; 0 if it has none.
        recipe: the run.

    Raises:
        DataError: beyond the model's context, or so short that no rule would leave anything out.
    """
    shortest, longest = min(recipe.calibration.lengths), max(recipe.calibration.lengths)
    if context and longest > context:
        raise DataError(
            f"length {longest:,} is beyond the model's context of {context:,} tokens; ask for lengths up to that"
        )
    needed = max(SINKS) + recipe.profile.min_window
    if shortest <= needed:
        raise DataError(
            f"length {shortest:,} is too short to profile: with a sink of {max(SINKS)} and a window of "
            f"{recipe.profile.min_window} tokens nothing would be left out; ask for lengths above {needed}"
        )


def _local_files(recipe: Recipe) -> dict[str, str]:
    """Returns the digest of every local file or folder that samples are made of, by its name; of several alike all."""
    named = [*(source.path for source in recipe.calibration.sources), recipe.calibration.text]
    found: dict[str, dict[str, None]] = {}
    for path in named:
        if path:
            found.setdefault(str(file_name(path)), {})[digest_files(Path(path))] = None
    return {name: " ".join(digests) for name, digests in found.items()}


def check_samples(source: SourceModel, recipe: Recipe, out: Path | None = None, around: Plan | None = None) -> None:
    """Refuses samples that cannot be made, before anything is written: drafts are made of all that are not on disk yet.

    Args:
        source: the model, which does not run.
        recipe: the run.
        out: folder of a profile whose samples may be used again; None for none.
        around: the plan that is profiled around, or None.

    Raises:
        DataError: as `make_drafts`, or lengths that cannot be profiled.
    """
    from moacompress.calibration.data.sample_sources import make_drafts

    check_lengths(source.context, recipe)
    if recipe.profile.gates and around is None and (out is None or not (out / GATES_FILE).exists()):
        gate_drafts(source, recipe)
    if out is None or not (out / CALIBRATION_FILE).exists():
        make_drafts(source, recipe, "calibration")
    if out is None or not (out / VALIDATION_FILE).exists():
        make_drafts(source, recipe, "validation")


def _make_samples(
    out: Path, source: SourceModel, manifest: Manifest, progress: Progress
) -> tuple[Manifest, list[Sample], list[Sample]]:
    """Makes the samples of both splits, or reads those that are on disk already, and completes the fingerprints."""
    makes = partial(_stored_or_built, out, source=source, manifest=manifest, progress=progress)
    calibration = makes("calibration", manifest.calibration_fingerprint)
    validation = makes("validation", manifest.validation_fingerprint)
    manifest = manifest.of_samples(calibration, validation)
    _write(out, manifest)
    missing = sorted(set(manifest.lengths) - {sample.length for sample in calibration})
    if missing and manifest.shard is None:
        raise DataError(
            f"no calibration sample has length {missing[0]:,}: {len(calibration)} samples are too few for "
            f"{len(manifest.lengths)} lengths; raise calibration.samples"
        )
    return manifest, calibration, validation


def _stored_or_built(
    out: Path, split: Split, expected: str, source: SourceModel, manifest: Manifest, progress: Progress
) -> list[Sample]:
    """Returns samples on disk of the expected fingerprint, any if that is empty, or builds them."""
    path = out / (CALIBRATION_FILE if split == "calibration" else VALIDATION_FILE)
    samples: list[Sample] | None = broadcast(None if rank() else read_samples(path, expected))
    if samples is None:
        samples = _built(source, manifest, split, progress, _answers(out, source, manifest))
        if not rank():
            save_samples(path, samples)
    return samples


def _built(
    source: SourceModel, manifest: Manifest, split: Split, progress: Progress, answers: AnswerStore
) -> list[Sample]:
    """Returns the samples of a split that are to be here: all, or those of the shard."""
    from moacompress.calibration.data.sample_sources import build_samples

    if manifest.shard is None:
        return build_samples(source, data_recipe(manifest.recipe, manifest.rules), split, progress, answers)
    numbers = manifest.shard.calibration if split == "calibration" else manifest.shard.validation
    drafts = None if rank() else _drafts(source, manifest, split)
    chosen = broadcast(None if drafts is None else [drafts[number] for number in numbers])
    return answer_drafts(source.model, chosen, progress, answers)


def _drafts(source: SourceModel, manifest: Manifest, split: Split) -> list[SampleDraft]:
    """Returns the samples of a whole profile's split before the dense model has answered."""
    from moacompress.calibration.data.sample_sources import make_drafts

    return make_drafts(source, data_recipe(manifest.recipe, manifest.rules), split)


def data_recipe(recipe: Recipe, rules: Sequence[Rule]) -> Recipe:
    """Returns the recipe that samples are made by: something is left for gates where rules select by some."""
    gates = recipe.profile.model_copy(update={"gates": any(rule.selects for rule in rules)})
    return recipe.model_copy(update={"profile": gates})


def _run_samples(
    out: Path,
    source: SourceModel,
    manifest: Manifest,
    samples: Mapping[int, Sample],
    around: Plan | None,
    gates: GateWeights | None,
    progress: Progress,
) -> tuple[list[Statistics], Manifest]:
    """Returns the statistics of every sample; those on disk are read, the others are made and written one by one.

    The first process returns them, the others none.
    """
    table = RuleTable.of(manifest.rules, manifest.recipe.profile.min_window)
    finished: dict[int, tuple[Statistics, float]] = {}
    skipped: list[int] = []

    def finish(index: int, not_finite: str) -> None:
        progress.step(f"{samples[index].length} tokens")
        if not_finite:
            skipped.append(index)
            logger.warning("sample %d (%s) is left out: %s is not finite", index, samples[index].source, not_finite)
            check_skipped(skipped, samples, manifest.shard.totals[0] if manifest.shard is not None else len(samples))

    def read(index: int) -> tuple[Statistics, float] | None:
        return read_sample(out, index, manifest.owner, manifest.array_shapes)

    def run(index: int) -> tuple[int, str]:
        begin = time.perf_counter()
        statistics = sample_statistics(
            source.model,
            source.shape,
            table,
            samples[index],
            manifest.recipe.profile,
            around,
            manifest.recipe.seed,
            index,
            gates,
            manifest.centres,
        )
        seconds = time.perf_counter() - begin
        if work_shard()[0] == rank():
            write_sample(out, index, statistics, manifest.owner, seconds)
        if not rank():
            finished[index] = statistics, seconds
        return rank(), statistics.not_finite()

    def ran(index: int, result: tuple[int, str]) -> None:
        holders[index], not_finite = result
        finish(index, not_finite)

    progress.start("profiling", len(samples))
    for index in samples if not rank() else ():
        found = read(index)
        if found is not None:
            finished[index] = found
            finish(index, found[0].not_finite())
    missing: list[int] = broadcast([index for index in samples if index not in finished])
    # where machines share no disk, a sample that was finished before is on that of the process that ran it
    holders: dict[int, int] = gathered({index: rank() for index in missing if rank() and read(index) is not None})
    left = [index for index in missing if index not in holders]
    if world_size() > 1:
        left.sort(key=lambda index: -len(samples[index].input_ids))
    shared(left, run, ran)
    for index in missing if not rank() else ():
        found = finished.get(index) or read(index)
        if found is not None:
            finished[index] = found
    for index in broadcast([index for index in missing if index not in finished]):
        found = broadcast(read(index) if rank() == holders[index] else None, of=holders[index])
        if found is None:
            raise ArtefactError(
                f"rank {holders[index]} ran sample {index}, and its file is gone; start the same run again"
            )
        if not rank():
            finished[index] = found
            write_sample(out, index, found[0], manifest.owner, found[1])
            if index not in left:
                finish(index, found[0].not_finite())
    progress.done()
    seconds = sum(finished[index][1] for index in sorted(finished))
    statistics = [finished[index][0] for index in sorted(finished)]
    return statistics, replace(manifest, skipped=tuple(sorted(skipped)), seconds=round(seconds, 3))
