"""`moacompress profile`: predicts what every rule would cost on every KV head, and audits the predictions."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import RenderableType

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import (
    Devices,
    GatesOption,
    HeadWeightsOption,
    LengthsOption,
    ModelArgument,
    Overwrite,
    RecipeFile,
    Samples,
    ScorerOption,
    Sources,
    TensorParallel,
    Text,
    TextSamples,
    TrustRemoteCode,
    ValidationSamples,
    WeightsOption,
    dry_run_option,
    required_model,
)
from moacompress.cli.recipe_options import recipe_option
from moacompress.core.artefact_names import PROFILE_FOLDER
from moacompress.core.errors import UsageError
from moacompress.core.ranks import rank, world_size
from moacompress.models.locate import find_plan_file

if TYPE_CHECKING:
    from moacompress.calibration.profile.manifest import Manifest
    from moacompress.calibration.profile.store import Profile
    from moacompress.recipe import Recipe

logger = logging.getLogger(__name__)

AUDIT_KEYS = (
    "audit",
    "audit_plans",
    "audit_precision",
    "audit_sharing",
    "audit_repair",
    "fisher_minus_moa",
    "chosen_minus_moa",
    "split_half",
    "points",
    "plans",
    "precision_points",
    "sharing_points",
    "repair_points",
)
"""What `--json` takes over from an audit."""


@command(
    "moacompress profile path/to/model -o profile/",
    "moacompress profile path/to/model.gguf -o profile/ --lengths 1k,2k --samples 48 --dry-run",
    "moacompress profile path/to/model -o profile/ --source needle --source qa.jsonl --json",
    "moacompress profile path/to/model -o audited/ --audit 120 --audit-plans 40 --budget 25%",
    "moacompress profile path/to/model -o around/ --around plan.json",
    "moacompress profile path/to/model -o profile-3/ --shard 3/8",
    "moacompress profile --merge profile-1/ profile-2/ -o profile/",
    computes=True,
    maps=True,
    shared=True,
)
def profile(
    run: CommandRun,
    model: ModelArgument = None,
    others: Annotated[
        list[str] | None,
        typer.Argument(metavar="DIR...", help="With --merge: the folders of all shards.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write the profile to.")] = Path(
        PROFILE_FOLDER
    ),
    recipe: RecipeFile = None,
    weights: WeightsOption = None,
    head_weights: HeadWeightsOption = None,
    lengths: LengthsOption = None,
    samples: Samples = None,
    text_samples: TextSamples = None,
    validation_samples: ValidationSamples = None,
    draws: Annotated[int | None, recipe_option("profile.draws")] = None,
    estimator: Annotated[str | None, recipe_option("profile.estimator")] = None,
    baselines: Annotated[bool | None, recipe_option("profile.baselines")] = None,
    heads: Annotated[bool | None, recipe_option("profile.heads")] = None,
    anchors: Annotated[int | None, recipe_option("profile.anchors", metavar="N")] = None,
    gates: GatesOption = None,
    scorer: ScorerOption = None,
    source: Sources = None,
    text: Text = None,
    around: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Profile the changes to this plan instead of to the dense model."),
    ] = None,
    audit: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Afterwards measure K single-head ablations, K single-head format changes and, with --anchors, up to K shared "
            "layers, and compare them with the predictions.",
        ),
    ] = None,
    audit_plans: Annotated[
        int, typer.Option(metavar="M", help="Number of equal-size plans that --audit measures.")
    ] = 40,
    budget: Annotated[str, typer.Option(metavar="BUDGET", help="Budget of the plans that --audit measures.")] = "25%",
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="K/N",
            help="Profile part K of N of the samples. The runs need no network between them; --merge combines them.",
        ),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Combine the shards in the given folders into one profile.")
    ] = False,
    dry_run: Annotated[bool, dry_run_option("Estimate tokens, time and memory; profile nothing.")] = False,
    devices: Devices = None,
    overwrite: Overwrite = False,
    tensor_parallel: TensorParallel = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Predict what each rule costs on every KV head.

    Writes a profile of MODEL at several lengths. The same command resumes a stopped run. --audit compares the predictions with
    measured KL and writes DIR/audit.json and DIR/audit.html.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress profile ...) the processes share the samples, or
    the model with --tensor-parallel.
    """
    if merge:
        return _merged([name for name in (model, *(others or ())) if name], out, overwrite, dry_run, run)
    if others:
        raise UsageError(
            f"{1 + len(others)} models given, but only one can be profiled; to combine shards, add --merge"
        )
    if audit is not None and world_size() > 1:
        raise UsageError(
            "--audit runs in one process; profile under torchrun first, then run the command with --audit without torchrun"
        )
    from moacompress.calibration.profile.manifest import recipe_in
    from moacompress.models.processes import broadcast

    earlier = broadcast(None if overwrite or recipe is not None or rank() else recipe_in(out, model))
    if earlier is not None:
        logger.info("%s holds a profile of this model; settings that no option gives are taken from it", out)
    resolved = run.recipe(
        recipe,
        base=earlier,
        profile__baselines=None if audit is None else True,
    )
    name = required_model(model, resolved.model)
    resolved = resolved.override(model=name)

    from moacompress.models.stored_plan import read_plan

    plan = None if around is None else read_plan(find_plan_file(around))
    from moacompress.calibration.data.sample_sources import check_data
    from moacompress.models.skeleton import is_described
    from moacompress.runtime.ready_model import load_for

    if dry_run:
        from moacompress.calibration.profile.estimate import estimate_profile

        check_data(resolved)
        if plan is None and is_described(name):
            if shard is not None:
                raise UsageError(
                    f"{name} has no weights, so the operations of the whole profile are counted; leave --shard out"
                )
            if devices is not None:
                raise UsageError(f"{name} has no weights, so operations are counted, not timed; leave --devices out")
            return _counted(resolved, name, trust_remote_code)
        loaded = load_for(resolved, name, trust_remote_code=trust_remote_code)
        expected = estimate_profile(loaded, resolved, run.progress, around=plan, devices=devices or 1, shard=shard)
        return Output(expected.to_dict(), list(expected.lines()))

    from moacompress.calibration.profile.profiler import profile as profile_model
    from moacompress.core.place import check_writable

    if not rank():
        check_writable(out)
        check_data(resolved)
    loaded = load_for(resolved, name, trust_remote_code=trust_remote_code)
    if audit is not None:
        from moacompress.search.audit.audit import check_audit

        check_audit(loaded.shape, resolved, audit, audit_plans, budget)
    if shard is not None:
        from moacompress.calibration.profile.profiler import profile_shard

        part = profile_shard(loaded, out, resolved, shard, around=plan, overwrite=overwrite, progress=run.progress)
        return _shard_output(part, out)
    made = profile_model(loaded, out, resolved, around=plan, overwrite=overwrite, progress=run.progress)
    data, show = _profile_output(made, out)
    if audit is not None:
        from moacompress.core.artefact_names import AUDIT_FILE
        from moacompress.report.profile_tables import audit_tables, write_scatter
        from moacompress.search.audit.audit import audit as audit_profile

        found = audit_profile(
            made,
            loaded,
            audit,
            audit_plans,
            budget,
            seed=resolved.seed,
            progress=run.progress,
            overwrite=overwrite,
        )
        write_scatter(out / AUDIT_FILE, found.data)
        data |= {key: found.data[key] for key in AUDIT_KEYS if key in found.data}
        data["audit_samples"] = found.data["samples"]
        show += audit_tables(found.data)
    if plan is None:
        show.append(f"Next: moacompress search {shlex.quote(str(out))} --budget 25% -o plan.json")
    return Output(data, show)


def _counted(recipe: Recipe, model: str, trust_remote_code: bool) -> Output:
    """Counts what a profile of a model without weights takes."""
    from moacompress.run_checks import check_profiled
    from moacompress.run_counts import count_run, read_counts

    counts = read_counts(model, trust_remote_code)
    check_profiled(recipe, counts.context)
    found = count_run(recipe, counts, steps=("profile",))
    return Output(found.to_dict(), [f"It would take {found.line()} Nothing was profiled."])


def _merged(folders: list[str], out: Path, overwrite: bool, dry_run: bool, run: CommandRun) -> Output:
    """Puts shards together, or says what that would give."""
    from moacompress.calibration.profile.merging import check_merge, merge_shards

    if world_size() > 1:
        raise UsageError("--merge runs in one process; start it without torchrun")
    if dry_run:
        found = check_merge(folders, out, overwrite=overwrite)
        text = (
            f"{found['shards']} shards would make one profile of {found['samples']} calibration and "
            f"{found['validation_samples']} validation samples in {out}. Nothing was written."
        )
        return Output({"profile": str(out), **found}, [text])
    made = merge_shards(folders, out, overwrite=overwrite, progress=run.progress)
    data, show = _profile_output(made, out)
    return Output(data, [*show, f"Next: moacompress search {shlex.quote(str(out))} --budget 25% -o plan.json"])


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
        "around": made.around,
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
