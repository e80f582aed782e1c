"""Profiling: how much the model's answers change if a KV head keeps less, for every head and candidate rule.

What is predicted is the KL divergence to the dense model. Its gradient there is zero: its curvature is what counts.
So each backward pass starts at the logits of the answer tokens from a random cotangent z with covariance
diag(p) - p p^T, the Fisher matrix of the next-token distribution. Then the expected square of `sum_i d_i(r)` (see
`influence`) is twice the KL of rule r to second order. A few draws of z serve a sample.

Around a plan the gradient is not zero: one more pass starts at it, and its signed `sum_i d_i(r)` is the first-order
term of what a change of rule does, beside half the curvature at the plan's own distribution.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moacompress.calibration.data.answers import SampleDraft, answer_drafts
from moacompress.calibration.data.samples import Sample, fingerprint_ordered, fingerprint_samples, save_samples
from moacompress.calibration.gates.gate_samples import GATE_SEED, gate_drafts
from moacompress.calibration.gates.training import LAG, Gates, train_gates
from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums, TokenSums
from moacompress.calibration.profile.head_statistics import HeadSums
from moacompress.calibration.profile.influence import Collector, GradientCollector
from moacompress.calibration.profile.manifest import Manifest, prepare, request_fingerprint
from moacompress.calibration.profile.passes import Cotangent, Recording, Tape, output_logits, recorded, target_states
from moacompress.calibration.profile.precision import PrecisionSums
from moacompress.calibration.profile.rounding_loss import measure_rounding
from moacompress.calibration.profile.sharing import CopySums, copyable
from moacompress.calibration.profile.statistics import DRAWN, Floats32, Statistics
from moacompress.calibration.profile.store import Profile, merge, read_sample, read_samples, write_sample
from moacompress.calibration.profile.wording import calibration_wording, check_wording
from moacompress.core.artefact_names import ANSWERS_FILE, CALIBRATION_FILE, GATES_FILE, VALIDATION_FILE
from moacompress.core.errors import ArtefactError, DataError, PlanError
from moacompress.core.files import digest_files
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.models.modules import attention_modules
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import Split
from moacompress.recipe import ProfileRecipe, Recipe
from moacompress.rules.candidates import candidate_rules, gated_rules
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.gate import check_room, gates_of
from moacompress.runtime.ready_model import load_for

logger = logging.getLogger(__name__)

MAX_SKIPPED = 0.05
"""Share of the samples that may be left out because a number in them is not finite."""


def logit_cotangent(logits: Tensor, generator: torch.Generator, tokens: int | None = None) -> Tensor:
    """Draws a cotangent whose covariance is the Fisher matrix of the next-token distributions, averaged over tokens.

    `z = sqrt(p) eps - p (sqrt(p) . eps)` with eps ~ N(0, I), over the square root of the number of tokens.

    Args:
        logits: `[tokens, vocabulary]`.
        generator: on the CPU, so that every device draws the same numbers.
        tokens: tokens that the mean is over, where `logits` is a part of them; all by default.

    Returns:
        Shape and dtype of `logits`.
    """
    p = torch.softmax(logits.float(), -1)
    noise = p.sqrt() * torch.randn(p.shape, generator=generator).to(p.device)
    z = noise - p * noise.sum(-1, keepdim=True)
    return z.div((tokens or len(logits)) ** 0.5).to(logits.dtype)


def _generator(seed: int, sample: int, draw: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {sample} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def fisher_cotangent(tokens: int, generator: torch.Generator) -> Cotangent:
    """Returns a random cotangent whose covariance is the Fisher matrix, mean over `tokens`; see `logit_cotangent`."""
    return lambda logits, part: logit_cotangent(logits, generator, tokens)


def label_cotangent(labels: Tensor) -> Cotangent:
    """Returns the gradient of the mean cross-entropy of `labels`, int64 `[tokens]`, as MoA starts from it."""

    def gradient(logits: Tensor, part: slice) -> Tensor:
        p = torch.softmax(logits.float(), -1)
        p.scatter_add_(1, labels[part, None], p.new_full((len(p), 1), -1.0))
        return p.div_(len(labels)).to(logits.dtype)

    return gradient


class Divergence:
    """The gradient of the mean KL(dense || model) at the model's logits; a `Cotangent`.

    Args:
        model: the model; only its output layer is used.
        dense: what the dense model's output layer gets, `[tokens, hidden]`.

    Attributes:
        kl: the mean KL of the rows that it was called for, nats.
    """

    def __init__(self, model: PreTrainedModel, dense: Tensor) -> None:
        self.model, self.dense, self.kl = model, dense, 0.0

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """Returns the gradient at a chunk of rows, `[rows, vocabulary]`."""
        with torch.no_grad():
            p, q = (torch.log_softmax(of.float(), -1) for of in (output_logits(self.model, self.dense[part]), logits))
            self.kl += float((p.exp() * (p - q)).sum()) / len(self.dense)
            return q.exp_().sub_(p.exp_()).div_(len(self.dense)).to(logits.dtype)


def check_around(source: SourceModel, plan: Plan) -> None:
    """Refuses a plan that a model cannot be profiled around.

    Raises:
        PlanError: a plan of another model, one whose layers share attention, or one whose gates are not at hand.
    """
    plan.check_model(source.shape, weights=source.weights_like)
    if plan.shares:
        raise PlanError(
            "layers of the plan share attention, and profiling around such a plan is not possible; give a plan without sharing"
        )
    gates_of(plan, source.model.config.get_text_config(decoder=True).hidden_size)


def sample_statistics(
    model: PreTrainedModel,
    shape: ModelShape,
    table: RuleTable,
    sample: Sample,
    chosen: ProfileRecipe,
    around: Plan | None,
    seed: int,
    index: int,
    gates: GateWeights | None = None,
) -> Statistics:
    """Runs one sample forward and several times backward.

    Args:
        model: the dense model, weights frozen.
        shape: its shape.
        table: the rules.
        sample: the sample.
        chosen: how many cotangents, and which statistics beside the influence.
        around: the plan to profile around, or None for the dense model.
        seed: the run's seed.
        index: number of the sample; with `seed` it decides the cotangents.
        gates: what rules that select choose by, those of the plan too.

    Returns:
        See `store.Statistics`; the numbers may be not finite.
    """
    assert around is None or not around.selects or gates is not None
    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask) - 1).to(model.device)
    ids = torch.from_numpy(sample.input_ids).to(model.device)
    dense = None
    if around is not None:
        with recorded(model, Recording.of(shape, table)):  # attention as below: around a full plan nothing differs
            dense = target_states(model, ids, rows)
    size = shape.kv_heads, len(table), model.device
    recording = Recording.of(shape, table, around, keep=chosen.anchors > 0, gates=gates)
    influence = [InfluenceSums(*size) for _ in range(shape.layers)]
    rounding = [
        PrecisionSums(shape.kv_heads, chosen.formats, plan, model.device)
        for plan in (recording.plans if chosen.formats else ())
    ]
    found: dict[str, Tensor] = {}
    heads = [HeadSums(shape.kv_heads, model.device) for _ in range(shape.layers if chosen.heads else 0)]
    copies = [
        CopySums(recording.attended, layer, may, shape.kv_heads, model.device)
        for layer, may in enumerate(copyable(shape.native_windows, chosen.anchors).tolist())
        if recording.attended is not None
    ]
    with Tape(model, recording, ids, rows) as tape:
        if dense is not None:
            divergence = Divergence(model, dense)
            tape.backward(divergence, _by_layer(influence, rounding), last=False)
            sums = _stacked(influence) | (_stacked(rounding) if rounding else {})
            found |= {name.replace("total", "first"): sums[name] for name in DRAWN if name in sums}
            found["harm"] = torch.tensor([max(divergence.kl, 0.0)])
        if chosen.baselines:
            baselines = [BaselineSums(*size) for _ in range(shape.layers)]
            _reset(influence)
            tape.backward(label_cotangent(ids[rows + 1]), _by_layer(influence, baselines), last=False)
            found |= {f"gold_{name}": value for name, value in _stacked(influence).items()} | _stacked(baselines)
        drawn = []
        for draw in range(chosen.draws):
            _reset([*influence, *rounding])
            cotangent = fisher_cotangent(len(rows), _generator(seed, index, draw))
            wanted = _by_layer(influence, rounding, copies, heads if draw == 0 else [])
            tape.backward(cotangent, wanted, last=draw + 1 == chosen.draws)
            for copied in copies:
                copied.end()
            drawn.append(_stacked(influence) | (_stacked(rounding) if rounding else {}))
    for name in drawn[0]:
        every = torch.stack([one[name] for one in drawn])
        found[name] = every if name in DRAWN else every.mean(0)
    found |= (_stacked(heads) if heads else {}) | (_stacked(copies) if copies else {})
    return Statistics({name: value.float().cpu().numpy() for name, value in found.items()})


def token_influence(
    model: PreTrainedModel, shape: ModelShape, sample: Sample, draws: int, seed: int, index: int
) -> Floats32:
    """Returns what hiding single tokens would do, mean over draws, `[layers, kv_heads, tokens]`; see `collectors.TokenSums`.

    Args:
        model: the dense model, weights frozen.
        shape: its shape.
        sample: the sample.
        draws: random cotangents.
        seed: the run's seed.
        index: number of the sample; with `seed` it decides the cotangents.
    """
    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask) - 1).to(model.device)
    ids = torch.from_numpy(sample.input_ids).to(model.device)
    sums = [TokenSums(shape.kv_heads, len(ids), LAG, model.device) for _ in range(shape.layers)]
    with Tape(model, Recording.of(shape, RuleTable.of([Rule.FULL], 1)), ids, rows) as tape:
        for draw in range(draws):
            cotangent = fisher_cotangent(len(rows), _generator(seed, index, draw))
            tape.backward(cotangent, _by_layer(sums), last=draw + 1 == draws)
    found: Floats32 = (_stacked(sums)["of_tokens"] / draws).float().cpu().numpy()
    return found


def _by_layer(*collectors: Sequence[Collector | GradientCollector]) -> list[tuple[Collector | GradientCollector, ...]]:
    """Returns the collectors of each layer, from lists with one of every layer, or with none at all."""
    return list(zip(*filter(None, collectors), strict=True))


def _reset(collectors: Sequence[InfluenceSums | PrecisionSums]) -> None:
    for sums in collectors:
        sums.reset()


def _stacked(
    collectors: Sequence[InfluenceSums | PrecisionSums | BaselineSums | HeadSums | CopySums | TokenSums],
) -> dict[str, Tensor]:
    """Returns the sums of all layers by name, layers in front."""
    layers = [sums.tensors() for sums in collectors]
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


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
    from moacompress.calibration.data.sample_sources import check_data

    out, progress = Path(out), progress or SILENT
    check_writable(out)
    check_data(recipe)
    source = load_for(recipe, model, trust_remote_code=trust_remote_code)
    if around is not None:
        check_around(source, around)
    check_samples(source, recipe, None if overwrite else out, around)
    rules = rules_on_offer(recipe, around)
    key = around.key() if around is not None else ""
    files = _local_files(recipe)
    with no_empty_folder(out), own_folder(out):
        shape = _known_shape(out, source, overwrite)
        request = request_fingerprint(shape, rules, recipe, files, key, source.computes_in)
        trains = around is None and any(rule.selects for rule in rules)
        kept = recipe.of_any_machine()
        asked = Manifest(source.source, shape, rules, kept, request, key, wording=calibration_wording())
        if not overwrite:
            check_wording(out, asked, lambda found: trains and _known_gates(out, found) is None)
        manifest = prepare(out, asked, overwrite)
        if manifest.complete and (not manifest.has_gates or _known_gates(out, manifest) is not None):
            try:
                return Profile.load(out)
            except ArtefactError as error:
                logger.warning("%s; repairing it", str(error).partition("; run")[0])
        # too little data is found before anything is answered
        drafts = gate_drafts(source, manifest.recipe) if trains and _known_gates(out, manifest) is None else None
        manifest, samples, validation = _make_samples(out, source, manifest, progress, from_scratch=drafts is not None)
        if around is None:
            measure_rounding(out, source, recipe, validation, progress, trust_remote_code=trust_remote_code)
        gates = None
        if manifest.has_gates:
            known = _known_gates(out, manifest) or (_kept_gates(out, manifest, around) if around is not None else None)
            drafts = drafts or (gate_drafts(source, manifest.recipe) if known is None else [])
            gates = (known or _train_gates(out, source, manifest, drafts, progress)).weights
            manifest = replace(manifest, gates=gates.fingerprint)
            manifest.write(out)
        statistics, manifest = _run_samples(out, source, manifest, samples, around, gates, progress)
        merge(out, manifest, samples, statistics)
        return Profile.load(out)


def rules_on_offer(recipe: Recipe, around: Plan | None) -> tuple[Rule, ...]:
    """Returns the rules that a profile is of; some select where gates are trained, or the plan around which it is has them."""
    bounds = max(recipe.calibration.lengths), recipe.profile.sinks, recipe.profile.min_window
    selects = recipe.profile.gates if around is None else around.selects
    return candidate_rules(*bounds) + (gated_rules(*bounds) if selects else ())


def _known_gates(out: Path, manifest: Manifest) -> Gates | None:
    """Returns the gates in the folder of a profile; None where they are to be trained, as they are not those it began with."""
    found = Gates.load(out, manifest.fingerprint)
    return found if found is not None and manifest.gates in ("", found.weights.fingerprint) else None


def _kept_gates(out: Path, manifest: Manifest, around: Plan) -> Gates:
    """Writes the gates of the plan that is profiled around into the profile's folder: rules on offer choose by them."""
    assert around.gate_weights is not None
    gates = Gates(around.gate_weights, {})
    gates.save(out, manifest.fingerprint)
    return gates


def _train_gates(
    out: Path, source: SourceModel, manifest: Manifest, drafts: Sequence[SampleDraft], progress: Progress
) -> Gates:
    """Trains gates on samples of their own, and writes them into the folder of the profile."""
    from moacompress.calibration.data.answer_store import AnswerStore

    check_room(attention_modules(source.model))
    answers = AnswerStore(out / ANSWERS_FILE, manifest.shape.weights_fingerprint, source.computes_in)
    samples = answer_drafts(source.model, drafts, progress, answers)

    def influence(index: int) -> Floats32:
        draws, seed = manifest.recipe.profile.draws, manifest.recipe.seed + GATE_SEED
        return token_influence(source.model, source.shape, samples[index], draws, seed, index)

    gates = train_gates(source.model, samples, influence, progress)
    gates.save(out, manifest.fingerprint)
    return gates


def _known_shape(out: Path, source: SourceModel, overwrite: bool) -> ModelShape:
    """Returns the model's shape; where `out` has a profile of these weights, with the fingerprint that it knows them by.

    So what was begun under an older version of the fingerprint is taken up, with its samples and answers.

    Raises:
        PlanError: a profile whose fingerprint has a newer version than is known, and it may not be replaced.
    """
    try:
        known = Manifest.read(out).shape.weights_fingerprint
        same = source.weights_like(known) == known
    except ArtefactError:
        return source.shape
    except PlanError:
        if overwrite:
            return source.shape
        raise
    return replace(source.shape, weights_fingerprint=known) if same else source.shape


def check_lengths(source: SourceModel, recipe: Recipe) -> None:
    """Refuses lengths that cannot be profiled.

    Raises:
        DataError: beyond the model's context, or so short that no rule would leave anything out.
    """
    shortest, longest = min(recipe.calibration.lengths), max(recipe.calibration.lengths)
    if source.context and longest > source.context:
        raise DataError(
            f"length {longest:,} is beyond the model's context of {source.context:,} tokens; ask for lengths up to that"
        )
    needed = max(recipe.profile.sinks) + recipe.profile.min_window
    if shortest <= needed:
        raise DataError(
            f"length {shortest:,} is too short to profile: with a sink of {max(recipe.profile.sinks)} and a window of "
            f"{recipe.profile.min_window} tokens nothing would be left out; ask for lengths above {needed}"
        )


def _local_files(recipe: Recipe) -> dict[str, str]:
    """Returns the digest of every local file or folder that samples are made of, by its name in the recipe."""
    named = [*(source.path for source in recipe.calibration.sources), recipe.calibration.text]
    return {name: digest_files(Path(name)) for name in named if name}


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

    check_lengths(source, recipe)
    if recipe.profile.gates and around is None and (out is None or not (out / GATES_FILE).exists()):
        gate_drafts(source, recipe)
    if out is None or not (out / CALIBRATION_FILE).exists():
        make_drafts(source, recipe, "calibration")
    if out is None or not (out / VALIDATION_FILE).exists():
        make_drafts(source, recipe, "validation")


def _make_samples(
    out: Path, source: SourceModel, manifest: Manifest, progress: Progress, from_scratch: bool
) -> tuple[Manifest, list[Sample], list[Sample]]:
    """Makes the samples of both splits, or reads those that are on disk already, and completes the fingerprints.

    With `from_scratch` those that are profiled are not read: an older version may have left nothing for the gates that are
    to be trained. What the model answered before is not answered again.
    """
    makes = partial(_stored_or_built, out, source=source, manifest=manifest, progress=progress)
    calibration = makes("calibration", None if from_scratch else manifest.calibration_fingerprint)
    validation = makes("validation", manifest.validation_fingerprint)
    parts = manifest.request, manifest.wording, fingerprint_ordered(calibration)
    manifest = replace(
        manifest,
        fingerprint=hashlib.sha256(" ".join(filter(None, parts)).encode()).hexdigest()[:16],
        calibration_fingerprint=fingerprint_samples(calibration),
        validation_fingerprint=fingerprint_samples(validation),
        complete=False,
    )
    manifest.write(out)
    missing = sorted(set(manifest.lengths) - {sample.length for sample in calibration})
    if missing:
        raise DataError(
            f"no calibration sample has length {missing[0]:,}: {len(calibration)} samples are too few for "
            f"{len(manifest.lengths)} lengths; raise calibration.samples"
        )
    return manifest, calibration, validation


def _stored_or_built(
    out: Path, split: Split, expected: str | None, source: SourceModel, manifest: Manifest, progress: Progress
) -> list[Sample]:
    """Returns samples on disk of the expected fingerprint, any if that is empty; None builds them."""
    from moacompress.calibration.data.answer_store import AnswerStore
    from moacompress.calibration.data.sample_sources import build_samples

    path = out / (CALIBRATION_FILE if split == "calibration" else VALIDATION_FILE)
    samples = None if expected is None else read_samples(path, expected)
    if samples is None:
        recipe = manifest.recipe
        gates = recipe.profile.model_copy(update={"gates": manifest.has_gates})
        samples = build_samples(
            source,
            recipe.model_copy(update={"profile": gates}),
            split,
            progress,
            AnswerStore(out / ANSWERS_FILE, manifest.shape.weights_fingerprint, source.computes_in),
        )
        save_samples(path, samples)
    return samples


def _run_samples(
    out: Path,
    source: SourceModel,
    manifest: Manifest,
    samples: Sequence[Sample],
    around: Plan | None,
    gates: GateWeights | None,
    progress: Progress,
) -> tuple[list[Statistics], Manifest]:
    """Returns the statistics of every sample; those on disk are read, the others are made and written one by one."""
    table = RuleTable.of(manifest.rules, manifest.recipe.profile.min_window)
    done, skipped, seconds = [], [], 0.0
    progress.start("profiling", len(samples))
    for index, sample in enumerate(samples):
        found = read_sample(out, index, manifest.owner, manifest.array_shapes)
        if found is None:
            begin = time.perf_counter()
            statistics = sample_statistics(
                source.model,
                source.shape,
                table,
                sample,
                manifest.recipe.profile,
                around,
                manifest.recipe.seed,
                index,
                gates,
            )
            found = statistics, time.perf_counter() - begin
            write_sample(out, index, statistics, manifest.owner, found[1])
        done.append(found[0])
        seconds += found[1]
        if not found[0].finite:
            skipped.append(index)
            logger.warning("sample %d (%s) is left out: %s is not finite", index, sample.source, found[0].not_finite())
            _check_skipped(skipped, samples)
        progress.step(f"{sample.length} tokens")
    progress.done()
    return done, replace(manifest, skipped=tuple(skipped), seconds=round(seconds, 3))


def _check_skipped(skipped: list[int], samples: Sequence[Sample]) -> None:
    left = {sample.length for index, sample in enumerate(samples) if index not in skipped}
    lost = sorted({sample.length for sample in samples} - left)
    if len(skipped) > MAX_SKIPPED * len(samples) or lost:
        where = f", and none of length {lost[0]:,} is left" if lost else ""
        raise DataError(
            f"{len(skipped)} of {len(samples)} samples have activations or gradients that are not finite (at most "
            f"{MAX_SKIPPED:.0%} may){where}; profile with --dtype float32, and check that the model is sound"
        )
