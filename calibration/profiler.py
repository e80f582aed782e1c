"""Profiling: how much the dense model's answers change if a KV head keeps less, for every head and candidate rule.

What is predicted is the KL divergence to the dense model. Its gradient there is zero: its curvature is what counts.
So each backward pass starts at the logits of the answer tokens from a random cotangent z with covariance
diag(p) - p p^T, the Fisher matrix of the next-token distribution. Then the expected square of `sum_i d_i(r)` (see
`influence`) is twice the KL of rule r to second order. A few draws of z serve a sample.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moacompress.calibration.influence import AttentionSpec, InfluenceSums, ProfiledAttention, RuleTable
from moacompress.calibration.samples import Sample, fingerprint_samples, save_samples
from moacompress.calibration.store import (
    Head,
    Profile,
    Statistics,
    fingerprint_ordered,
    merge,
    prepare,
    read_sample,
    read_samples,
    request_fingerprint,
    write_sample,
)
from moacompress.errors import ArtefactError, DataError, ModelError
from moacompress.models import SourceModel, load_source
from moacompress.plan import ModelShape
from moacompress.progress import SILENT, Progress
from moacompress.recipe import Recipe
from moacompress.search.space import candidate_rules

logger = logging.getLogger(__name__)

ATTENTION = "moacompress_profile"
"""Name of the profiling attention among transformers' attention functions."""
MAX_SKIPPED = 0.05
"""Share of the samples that may be left out because a number in them is not finite."""


@dataclass(frozen=True)
class _Recording:
    """What the attention layers of one forward pass need: the rules, and where each layer puts its sums."""

    table: RuleTable
    native_windows: tuple[int | None, ...]
    sums: list[InfluenceSums]


_recording: ContextVar[_Recording] = ContextVar("moacompress_recording")


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    if attention_mask is not None or kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} attends with a mask or bias of its own; only causal attention can be profiled"
        )
    recording, layer = _recording.get(), int(module.layer_idx)  # type: ignore[arg-type]
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        native_window=recording.native_windows[layer],
        softcap=softcap,
    )
    out: Tensor = ProfiledAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, s_aux, spec, recording.table, recording.sums[layer]
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function beside `_attention`, which needs none: a sample is one row without padding."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def _profiled(model: PreTrainedModel, recording: _Recording) -> Iterator[None]:
    """Lets the model attend through `_attention`, and puts everything back."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    token = _recording.set(recording)
    try:
        for config, _ in before:
            config._attn_implementation = ATTENTION
        yield
    finally:
        _recording.reset(token)
        for config, name in before:
            config._attn_implementation = name


def logit_cotangent(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draws a cotangent whose covariance is the Fisher matrix of the next-token distributions, averaged over tokens.

    `z = sqrt(p) eps - p (sqrt(p) . eps)` with eps ~ N(0, I), over the square root of the number of tokens.

    Args:
        logits: `[tokens, vocabulary]`.
        generator: on the CPU, so that every device draws the same numbers.

    Returns:
        Shape and dtype of `logits`.
    """
    p = torch.softmax(logits.float(), -1)
    noise = p.sqrt() * torch.randn(p.shape, generator=generator).to(p.device)
    z = noise - p * noise.sum(-1, keepdim=True)
    return z.div(len(logits) ** 0.5).to(logits.dtype)


def _generator(seed: int, sample: int, draw: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {sample} {draw}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def answer_logits(model: PreTrainedModel, embeddings: Tensor, rows: Tensor) -> Tensor:
    """Returns the logits of some positions, `[len(rows), vocabulary]`; the others never pass the output layer.

    Args:
        model: any causal LM.
        embeddings: `[1, N, hidden]`.
        rows: int64 positions.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits: Tensor = model(inputs_embeds=embeddings, use_cache=False, logits_to_keep=rows).logits[0]
    else:
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, rows]
    return logits


def sample_statistics(
    model: PreTrainedModel,
    shape: ModelShape,
    table: RuleTable,
    sample: Sample,
    draws: int,
    seed: int,
    index: int,
) -> Statistics:
    """Runs one sample forward and `draws` times backward.

    Args:
        model: the dense model, weights frozen.
        shape: its shape.
        table: the rules, on the model's device.
        sample: the sample.
        draws: number of cotangents.
        seed: the run's seed.
        index: number of the sample; with `seed` it decides the cotangents.

    Returns:
        Statistics, `[draws, layers, kv_heads, rules]`; they may hold numbers that are not finite.
    """
    size = shape.kv_heads, len(table.sink)
    recording = _Recording(
        table, shape.native_windows, [InfluenceSums(*size, model.device) for _ in range(shape.layers)]
    )
    rows = torch.from_numpy(np.flatnonzero(sample.answer_mask) - 1).to(model.device)
    ids = torch.from_numpy(sample.input_ids)[None].to(model.device)
    squares = np.zeros((draws, shape.layers, *size), np.float32)
    total = np.zeros_like(squares)
    with _profiled(model, recording), torch.enable_grad():
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = answer_logits(model, embeddings, rows)
        for draw in range(draws):
            for sums in recording.sums:
                sums.reset()
            z = logit_cotangent(logits.detach(), _generator(seed, index, draw))
            torch.autograd.grad(logits, embeddings, z, retain_graph=draw + 1 < draws)
            squares[draw] = torch.stack([sums.squares for sums in recording.sums]).cpu().numpy()
            total[draw] = torch.stack([sums.total for sums in recording.sums]).cpu().numpy()
    return Statistics(squares, total)


def profile(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Profiles a model into a folder, or takes up where an earlier run of the same request stopped.

    Args:
        model: MODEL (hub id, folder, `.gguf` file), or a loaded model.
        out: the folder. With the same request in it, finished samples are kept and a finished profile is returned.
        recipe: the run; `calibration`, `profile`, `seed` count, and for MODEL `dtype`, `device`, `trust_remote_code`.
        overwrite: replace whatever else is in the folder.
        progress: receives the progress.

    Raises:
        ModelError: the model can not be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, no samples, or too many without finite numbers.
        ArtefactError: the folder holds something else, or can not be written.
    """
    out, progress = Path(out), progress or SILENT
    source = model if isinstance(model, SourceModel) else _load(model, recipe)
    _check_lengths(source, recipe)
    chosen = recipe.profile
    rules = candidate_rules(max(recipe.calibration.lengths), chosen.sinks, chosen.min_window)
    request = request_fingerprint(source.shape, rules, recipe, _local_files(recipe))
    head = prepare(out, Head(source.source, source.shape, rules, recipe, request), overwrite)
    if head.complete:
        try:
            return Profile.load(out)
        except ArtefactError as error:
            logger.warning("%s; repairing it", str(error).partition("; run")[0])
    head, samples = _make_samples(out, source, head, progress)
    statistics, head = _run_samples(out, source, head, samples, progress)
    merge(out, head, [sample.length for sample in samples], statistics)
    return Profile.load(out)


def _load(model: str | Path, recipe: Recipe) -> SourceModel:
    return load_source(model, dtype=recipe.dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code)


def _check_lengths(source: SourceModel, recipe: Recipe) -> None:
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
    return {name: _digest(Path(name)) for name in named if name}


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if path.is_file():
                digest.update(str(path.relative_to(root)).encode())
                with path.open("rb") as file:
                    for block in iter(lambda: file.read(1 << 20), b""):
                        digest.update(block)
    except OSError as error:
        raise DataError(f"can not read {root}: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _make_samples(out: Path, source: SourceModel, head: Head, progress: Progress) -> tuple[Head, list[Sample]]:
    """Makes the samples, or reads those that are on disk already, and completes the fingerprints."""
    calibration = _stored_or_built(out, "calibration", head.calibration_fingerprint, source, head, progress)
    validation = _stored_or_built(out, "validation", head.validation_fingerprint, source, head, progress)
    ids = fingerprint_ordered(calibration)
    head = replace(
        head,
        fingerprint=hashlib.sha256(f"{head.request} {ids}".encode()).hexdigest()[:16],
        calibration_fingerprint=fingerprint_samples(calibration),
        validation_fingerprint=fingerprint_samples(validation),
        complete=False,
    )
    head.write(out)
    missing = sorted(set(head.lengths) - {sample.length for sample in calibration})
    if missing:
        raise DataError(
            f"no calibration sample has length {missing[0]:,}: {len(calibration)} samples are too few for "
            f"{len(head.lengths)} lengths; raise calibration.samples"
        )
    return head, calibration


def _stored_or_built(
    out: Path, split: str, expected: str, source: SourceModel, head: Head, progress: Progress
) -> list[Sample]:
    from moacompress.calibration.data import build_samples

    path = out / f"{split}.safetensors"
    samples = read_samples(path, expected)
    if samples is None:
        samples = build_samples(
            source, head.recipe, "calibration" if split == "calibration" else "validation", progress
        )
        save_samples(path, samples)
    return samples


def _run_samples(
    out: Path, source: SourceModel, head: Head, samples: Sequence[Sample], progress: Progress
) -> tuple[list[Statistics], Head]:
    """Returns the statistics of every sample; those on disk are read, the others are made and written one by one."""
    table = RuleTable.of(head.rules, head.recipe.profile.min_window, source.model.device)
    done, skipped, seconds = [], [], 0.0
    progress.start("profiling", len(samples))
    for index, sample in enumerate(samples):
        found = read_sample(out, index, head.fingerprint, head.sample_shape)
        if found is None:
            begin = time.perf_counter()
            statistics = sample_statistics(
                source.model, source.shape, table, sample, head.recipe.profile.draws, head.recipe.seed, index
            )
            found = statistics, time.perf_counter() - begin
            write_sample(out, index, statistics, head.fingerprint, found[1])
        done.append(found[0])
        seconds += found[1]
        if not found[0].finite:
            skipped.append(index)
            logger.warning("sample %d (%s) has numbers that are not finite; it is left out", index, sample.source)
            _check_skipped(skipped, samples)
        progress.step(f"{sample.length} tokens")
    progress.done()
    return done, replace(head, skipped=tuple(skipped), seconds=round(seconds, 3))


def _check_skipped(skipped: list[int], samples: Sequence[Sample]) -> None:
    left = {sample.length for index, sample in enumerate(samples) if index not in skipped}
    lost = sorted({sample.length for sample in samples} - left)
    if len(skipped) > MAX_SKIPPED * len(samples) or lost:
        where = f", and none of length {lost[0]:,} is left" if lost else ""
        raise DataError(
            f"{len(skipped)} of {len(samples)} samples have activations or gradients that are not finite (at most "
            f"{MAX_SKIPPED:.0%} may){where}; profile with --dtype float32, and check that the model is sound"
        )
