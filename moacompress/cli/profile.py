"""`moacompress profile`: predicts what every rule would cost on every KV head, and audits the predictions."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import ModelArgument, required_model
from moacompress.core.artefact_names import AUDIT_FILE, PROFILE_FOLDER
from moacompress.core.errors import UsageError
from moacompress.core.place import check_writable
from moacompress.core.ranks import rank, world_size
from moacompress.models.skeleton import is_described
from moacompress.rules.budget import Budget

if TYPE_CHECKING:
    from moacompress.calibration.profile.manifest import Manifest
    from moacompress.calibration.profile.store import Profile
    from moacompress.models.source import SourceModel
    from moacompress.recipe import Recipe

logger = logging.getLogger(__name__)

AUDIT_KEYS = (
    "audit",
    "audit_plans",
    "audit_precision",
    "audit_sharing",
    "audit_repair",
    "chosen_minus_moa",
    "split_half",
    "points",
    "plans",
    "precision_points",
    "sharing_points",
    "repair_points",
)
"""What `--json` takes over from an audit."""


Shards = Annotated[
    list[str] | None,
    typer.Argument(metavar="DIR...", help="With --merge: the folders of all shards.", show_default=False),
]
OutFolder = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the profile to.")]
Audit = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Afterwards measure K single-head ablations, K single-head format changes, K/3 plans of the recipe's budget "
        "(25% if it has none) and, with --anchors, up to K shared layers, and compare them with the predictions.",
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="K/N",
        help="Profile part K of N of the samples. The runs need no network between them; --merge combines them.",
    ),
]
Merge = Annotated[bool, typer.Option("--merge", help="Combine the shards in the given folders into one profile.")]


@command(
    "moacompress profile path/to/model -o profile/",
    "moacompress profile path/to/model.gguf -o profile/ --lengths 1k,2k --samples 48 --dry-run",
    "moacompress profile path/to/model -o profile/ --source needle --source qa.jsonl --json",
    "moacompress profile path/to/model -o audited/ --audit 120",
    "moacompress profile path/to/model -o profile-3/ --shard 3/8",
    "moacompress profile --merge profile-1/ profile-2/ -o profile/",
    settings=(
        "weights",
        "calibration.lengths",
        "calibration.samples",
        "calibration.text_samples",
        "calibration.validation_samples",
        "calibration.sources",
        "calibration.text",
        "profile.baselines",
        "profile.heads",
        "profile.anchors",
        "profile.gates",
        "profile.scorer",
        "seed",
        "device",
        "dtype",
    ),
    takes=("recipe", "settings", "dry_run", "overwrite", "tensor_parallel", "trust_remote_code"),
    computes=True,
    maps=True,
    shared=True,
)
def profile(
    run: CommandRun,
    model: ModelArgument = None,
    others: Shards = None,
    out: OutFolder = Path(PROFILE_FOLDER),
    audit: Audit = None,
    shard: Shard = None,
    merge: Merge = False,
) -> Output:
    """Predict what each rule costs on every KV head.

    Writes a profile of MODEL at several lengths. The same command resumes a stopped run. --audit compares the predictions with
    measured KL and writes DIR/audit.json and DIR/audit.html.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress profile ...) the processes share the samples, or
    the model with --tensor-parallel.
    """
    if merge:
        return _merged([name for name in (model, *(others or ())) if name], out, run)
    if others:
        raise UsageError(
            f"{1 + len(others)} models given, but only one can be profiled; to combine shards, add --merge"
        )
    if audit is not None and world_size() > 1:
        raise UsageError(
            "--audit runs in one process; profile under torchrun first, then run the command with --audit without torchrun"
        )
    from moacompress.calibration.data.sample_sources import check_data
    from moacompress.calibration.profile.profiler import profile as profile_model
    from moacompress.calibration.profile.profiler import profile_shard
    from moacompress.runtime.ready_model import load_for
    from moacompress.search.audit.audit import check_audit

    resolved = run.recipe(_earlier(run, out, model), model=model, profile__baselines=None if audit is None else True)
    name = required_model(resolved)
    if run.common.dry_run:
        check_data(resolved)
        return _estimated(resolved, name, shard, run)
    if not rank():
        check_writable(out)
        check_data(resolved)
    loaded = load_for(resolved, name, trust_remote_code=run.common.trust_remote_code)
    if audit is not None:  # before anything is profiled
        check_audit(loaded.shape, resolved, *_audit_size(audit, resolved))
    options: dict[str, Any] = {"overwrite": run.common.overwrite, "progress": run.progress}
    if shard is not None:
        return _shard_output(profile_shard(loaded, out, resolved, shard, **options), out)
    made = profile_model(loaded, out, resolved, **options)
    data, show = _profile_output(made, out)
    if audit is not None:
        measured, tables = _audited(made, loaded, resolved, audit, out, run)
        data, show = {**data, **measured}, [*show, *tables]
    return Output(data, [*show, _following(out)])


def _earlier(run: CommandRun, out: Path, model: str | None) -> Recipe | None:
    """Returns the recipe of the profile that is in `out` already, which has the settings that no option gives."""
    from moacompress.calibration.profile.folder import recipe_in
    from moacompress.models.processes import broadcast

    fresh = run.common.overwrite or run.common.recipe is not None or rank() > 0
    found: Recipe | None = broadcast(None if fresh else recipe_in(out, model))
    if found is not None:
        logger.info("%s holds a profile of this model; settings that no option gives are taken from it", out)
    return found


def _estimated(recipe: Recipe, model: str, shard: str | None, run: CommandRun) -> Output:
    """Times what a profile takes; counts it where the model has no weights.

    Raises:
        UsageError: a shard of a model without weights.
    """
    from moacompress.calibration.profile.estimate import estimate_profile
    from moacompress.run_checks import check_profiled
    from moacompress.run_counts import count_run, read_counts
    from moacompress.runtime.ready_model import load_for

    consent = run.common.trust_remote_code
    if is_described(model):
        if shard is not None:
            raise UsageError(
                f"{model} has no weights, so the operations of the whole profile are counted; leave --shard out"
            )
        counts = read_counts(model, consent)
        check_profiled(recipe, counts.context)
        found = count_run(recipe, counts, steps=("profile",))
        return Output(found.to_dict(), [f"It would take {found.line()} Nothing was profiled."])
    loaded = load_for(recipe, model, trust_remote_code=consent)
    expected = estimate_profile(loaded, recipe, run.progress, shard=shard)
    return Output(expected.to_dict(), list(expected.lines()))


def _audit_size(count: int, recipe: Recipe) -> tuple[int, int, str]:
    """Returns the numbers of ablations and of plans that an audit measures, and the budget of the plans."""
    budgets = (text for text in recipe.budget if not Budget.parse(text).with_weights)
    return count, count // 3, next(budgets, "25%")


def _audited(
    made: Profile, loaded: SourceModel, recipe: Recipe, count: int, out: Path, run: CommandRun
) -> tuple[dict[str, Any], list[RenderableType]]:
    """Audits a profile; returns what goes to `--json`, and what people see."""
    from moacompress.report.profile_tables import audit_tables, write_scatter
    from moacompress.search.audit.audit import audit

    found = audit(
        made,
        loaded,
        *_audit_size(count, recipe),
        seed=recipe.seed,
        progress=run.progress,
        overwrite=run.common.overwrite,
    ).data
    write_scatter(out / AUDIT_FILE, found)
    data = {key: found[key] for key in AUDIT_KEYS if key in found}
    return {**data, "audit_samples": found["samples"]}, [*audit_tables(found)]


def _merged(folders: list[str], out: Path, run: CommandRun) -> Output:
    """Puts shards together, or says what that would give."""
    from moacompress.calibration.profile.merging import check_merge, merge_shards

    if world_size() > 1:
        raise UsageError("--merge runs in one process; start it without torchrun")
    if run.common.dry_run:
        found = check_merge(folders, out, overwrite=run.common.overwrite)
        text = (
            f"{found['shards']} shards would make one profile of {found['samples']} calibration and "
            f"{found['validation_samples']} validation samples in {out}. Nothing was written."
        )
        return Output({"profile": str(out), **found}, [text])
    made = merge_shards(folders, out, overwrite=run.common.overwrite, progress=run.progress)
    data, show = _profile_output(made, out)
    return Output(data, [*show, _following(out)])


def _following(out: Path) -> str:
    return f"Next: moacompress search {shlex.quote(str(out))} --budget 25% -o plan.json"


def _shard_output(part: Manifest, out: Path) -> Output:
    assert part.shard is not None
    mine, all_samples = len(part.shard.calibration), part.shard.totals[0]
    data = {
        "profile": str(out),
        "model": part.source,
        "shard": part.shard.name,
        "samples": mine,
        "all_samples": all_samples,
        "seconds": part.seconds,
    }
    text = f"Profiled {mine} of {all_samples} samples, shard {part.shard.name}, in {part.seconds:.0f} s."
    return Output(
        data,
        [text, f"Next, once all shards are there: moacompress profile --merge {shlex.quote(str(out))} ... -o profile"],
    )


def _profile_output(made: Profile, out: Path) -> tuple[dict[str, Any], list[RenderableType]]:
    data = {
        "profile": str(out),
        "model": made.source,
        "fingerprint": made.fingerprint,
        "lengths": list(made.lengths),
        "samples": len(made.sample_lengths),
        "validation_samples": len(made.validation),
        "layers": made.shape.layers,
        "kv_heads": made.shape.kv_heads,
        "rules": len(made.rules),
        "estimators": list(made.estimators),
        "seconds": made.seconds,
    }
    found = made.gates if made.recipe.profile.gates else None
    if found is not None and found.report:
        data["gates"] = found.report
    work = f"{made.shape.layers * made.shape.kv_heads} KV heads x {len(made.rules)} rules on {data['samples']} samples"
    show: list[RenderableType] = [f"Profiled {work} in {made.seconds:.0f} s."]
    if found is not None and found.report:
        from moacompress.report.profile_tables import gate_table

        show.append(gate_table(found.report))
    return data, show
