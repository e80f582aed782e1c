"""Profiling: how much the model's answers change if a KV head keeps less, for every head and candidate rule.

A profile is a folder that is filled sample by sample. The processes of `torchrun` share the samples: each writes those that it
takes, and the first one does everything else that touches the disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moacompress.calibration.data import sample_sources
from moacompress.calibration.gates.scorers import find_scorer
from moacompress.calibration.profile.folder import prepare
from moacompress.calibration.profile.manifest import Manifest
from moacompress.calibration.profile.preparation import Preparation, known_gates, profile_drafts
from moacompress.calibration.profile.request import (
    check_samples,
    file_digests,
    request_fingerprint,
    rules_on_offer,
)
from moacompress.calibration.profile.rounding_loss import measure_rounding
from moacompress.calibration.profile.sample_run import SampleRun
from moacompress.calibration.profile.shard import Shard, parse_shard
from moacompress.calibration.profile.store import Profile, merge
from moacompress.calibration.profile.wording import calibration_wording, check_wording
from moacompress.core.artefact_names import (
    MANIFEST_FILE,
    SAMPLES_FOLDER,
)
from moacompress.core.errors import ArtefactError
from moacompress.core.files import remove
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.core.ranks import rank
from moacompress.core.version import own_version
from moacompress.models.processes import broadcast, check_alike, join
from moacompress.models.source import SourceModel
from moacompress.prompts.pools import SPLITS
from moacompress.recipe import Recipe
from moacompress.runtime.ready_model import load_for

logger = logging.getLogger(__name__)


def profile(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    *,
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
        overwrite: start from scratch, whatever profile is in the folder; other files in it stay.
        trust_remote_code: run modelling code that comes with the model; recipes and other files have no say in it.
        progress: receives the progress.

    Raises:
        ModelError: the model cannot be loaded or profiled.
        DataError: lengths that the model or the rules do not allow, no samples, or too many without finite numbers.
        ArtefactError: the folder holds something else, cannot be written, or another process is filling it.
    """
    made, _ = _profiled(model, out, recipe, None, overwrite, trust_remote_code, progress or SILENT)
    assert made is not None
    return made


def profile_shard(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
    shard: str,
    *,
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
    return _profiled(model, out, recipe, shard, overwrite, trust_remote_code, progress or SILENT)[1]


def _profiled(
    model: str | Path | SourceModel,
    out: str | Path,
    recipe: Recipe,
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
    with _place(out):
        manifest, made = broadcast(None if rank() else _begin(out, source, recipe, shard, overwrite))
        if made is not None:
            return made, manifest
        if rank():  # on a machine that does not see the first one's disk
            if overwrite:
                remove([out / SAMPLES_FOLDER])
            if not (out / MANIFEST_FILE).exists():
                manifest.write(out)
        begun = Preparation(out, source, manifest, progress)
        drafts = begun.untrained_drafts()
        samples, validation = begun.make_samples()
        begun.find_centres()
        begun.write_shingles([*samples, *validation], drafts)
        measure_rounding(out, source, recipe, validation, progress, trust_remote_code=trust_remote_code)
        gates = begun.make_gates(drafts)
        numbered = begun.manifest.numbered(samples)
        statistics, manifest = SampleRun(out, source, begun.manifest, numbered, gates, progress).run()
        if shard is not None:
            begun.note(manifest)
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
    out: Path, source: SourceModel, recipe: Recipe, shard: str | None, overwrite: bool
) -> tuple[Manifest, Profile | None]:
    """Checks what is asked for, and makes the folder, or finds what an earlier run left there.

    Returns the manifest, and the profile where it is finished.
    """
    check_samples(source, recipe, None if overwrite else out)
    rules = rules_on_offer(recipe)
    request = request_fingerprint(source.shape, rules, recipe, file_digests(recipe), source.computes_in)
    asked = Manifest(source.source, source.shape, rules, recipe, request, wording=calibration_wording())
    if shard is not None:
        drafts = (profile_drafts(source, asked, split) for split in SPLITS[:2])
        asked = replace(asked, shard=Shard.of(*parse_shard(shard), *drafts))
    if not overwrite:
        check_wording(out, asked, lambda found: asked.has_gates and known_gates(out, found) is None)
    manifest = prepare(out, asked, overwrite)
    if manifest.complete and (not manifest.has_gates or known_gates(out, manifest) is not None):
        try:
            return manifest, Profile.load(out)
        except ArtefactError as error:
            logger.warning("%s; repairing it", str(error).partition("; run")[0])
    return manifest, None
