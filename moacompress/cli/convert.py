"""`moacompress convert`: imports and exports plans of other projects."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.core.artefact_names import PLAN_FILE
from moacompress.core.errors import ArtefactError, PlanError, UsageError
from moacompress.core.files import read_json, write_text, write_texts
from moacompress.models.skeleton import is_described
from moacompress.models.stored_plan import find_plan_file, read_plan
from moacompress.rules.budget import parse_length
from moacompress.rules.foreign_formats import (
    compressed_tensors_of_plan,
    layers_of_compressed_tensors,
    layers_of_modelopt,
    modelopt_of_plan,
    plan_of_layers,
)
from moacompress.rules.foreign_plans import DuoPattern, MoaSpans, duo_of_plan, moa_of_plan, plan_of_duo, plan_of_moa

if TYPE_CHECKING:
    from moacompress.rules.model_shape import ModelShape
    from moacompress.rules.plan import Plan

Form = Literal["duo-attention", "moa", "modelopt", "llm-compressor"]
HEADS_FILE, CONFIG_FILE = "full_attention_heads.tsv", "config.json"
"""DuoAttention's two files of a pattern."""
MODELOPT_FILE = "hf_quant_config.json"
"""Where a checkpoint of ModelOpt says how it is quantized; in `config.json` is the same in another form."""
MOST_BYTES = 1 << 26


ForeignPlan = Annotated[
    Path,
    typer.Argument(
        metavar="PATH",
        help="A DuoAttention pattern folder, a MoA JSON file, a quantized checkpoint or its config, or a plan of ours.",
    ),
]
Source = Annotated[Form | None, typer.Option("--from", help="Format of PATH, to import it.")]
Target = Annotated[Form | None, typer.Option("--to", help="Format to export our plan to.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="With --from: the model that the plan is for. A folder with its config.json is enough."
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="With --from duo-attention: share of KV heads that stream. [default: those below 0.5]"),
]
At = Annotated[
    str | None,
    typer.Option(
        metavar="LENGTH", help="With --from moa: length at which the spans of query heads are compared. [default: 8k]"
    ),
]
OutPath = Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="File or folder to write.")]


@command(
    "moacompress convert path/to/pattern --from duo-attention --model path/to/model --sparsity 0.5 -o plan.json",
    "moacompress convert moa_alpha_beta.json --from moa --model path/to/model --at 8k -o plan.json",
    "moacompress convert plan.json --to moa -o moa_alpha_beta.json",
    "moacompress convert runs/mine --to duo-attention -o pattern/",
    "moacompress convert path/to/checkpoint --from modelopt --model path/to/model -o plan.json",
    "moacompress convert plan.json --to llm-compressor -o quantization.json",
    takes=("overwrite", "trust_remote_code"),
)
def convert(
    run: CommandRun,
    path: ForeignPlan,
    source: Source = None,
    target: Target = None,
    model: Model = None,
    sparsity: Sparsity = None,
    at: At = None,
    out: OutPath = Path(PLAN_FILE),
) -> Output:
    """Convert plans from and to DuoAttention, MoA, ModelOpt and llm-compressor.

    Lists what the other format cannot express. Nothing is measured: export an imported plan and `eval` it.
    """
    if (source is None) == (target is None):
        raise UsageError("give one of --from (to import a plan) and --to (to export one)")
    if target is not None and out == Path(PLAN_FILE):
        raise UsageError(f"give --out PATH for the {target} plan: {PLAN_FILE} is the name of a plan of ours")
    read = {path, *(path / name for name in (HEADS_FILE, CONFIG_FILE, MODELOPT_FILE) if source is not None)}
    if target is not None:
        read.add(find_plan_file(path))
    if out.resolve() in {each.resolve() for each in read}:
        raise UsageError(f"{out} is the input; choose another place for the output (--out PATH)")
    if out.exists() and not run.common.overwrite:
        raise ArtefactError(f"{out} exists already; choose another place or pass --overwrite")
    if target is not None:
        return _exported(find_plan_file(path), target, out)
    if model is None:
        raise UsageError(f"a plan of {source} does not name its model; give it (--model MODEL)")
    assert source is not None
    plan, notes = _read(path, source, model, sparsity, at or "8k", run.common.trust_remote_code)
    plan.save(out)
    shown = [f"The plan is {out}: {plan}", *(f"Not as it was: {note}." for note in notes)]
    if is_described(model):
        shown.append("The model folder has no weights, so the plan is accepted for any weights of this shape.")
        model = "MODEL"
    following = shlex.join(["moacompress", "export", model, str(out), "-o", "model/"])
    return Output({"plan": str(out), "lost": notes}, [*shown, f"Next: {following}"])


def _exported(file: Path, target: Form, out: Path) -> Output:
    """Writes a plan of ours in another project's format."""
    ours = read_plan(file)
    if target == "moa":
        spans, notes = moa_of_plan(ours)
        write_text(out, json.dumps({"alphas": spans.alphas, "betas": spans.betas}))
    elif target in ("modelopt", "llm-compressor"):
        config, notes = (modelopt_of_plan if target == "modelopt" else compressed_tensors_of_plan)(ours)
        write_text(out, json.dumps(config, indent=1) + "\n")
    else:
        pattern, notes = duo_of_plan(ours)
        _check_pattern_folder(out)
        write_pattern(out, pattern)
    return Output({"written": str(out), "lost": notes}, [f"Written: {out}", *(f"Lost: {note}." for note in notes)])


def _check_pattern_folder(out: Path) -> None:
    """Refuses to replace a config that is no pattern's, such as a model's, not even with `--overwrite`.

    Raises:
        ArtefactError: there is one.
    """
    config = out / CONFIG_FILE
    if not config.exists():
        return
    try:
        _pattern_sizes(out)
    except ArtefactError as error:
        raise ArtefactError(
            f"{config} exists already and is no pattern's (sink_size, recent_size); choose another folder"
        ) from error


def write_pattern(folder: Path, pattern: DuoPattern) -> None:
    """Writes a pattern as DuoAttention's own two files; what else is in the folder stays."""
    rows = "".join("\t".join(f"{value:.6e}" for value in row) + "\n" for row in pattern.heads)
    config = json.dumps({"sink_size": pattern.sink, "recent_size": pattern.recent})
    write_texts({folder / HEADS_FILE: rows, folder / CONFIG_FILE: config})


def _read(
    path: Path, source: Form, model: str, sparsity: float | None, at: str, trust_remote_code: bool
) -> tuple[Plan, list[str]]:

    length = parse_length(at)
    if source in ("modelopt", "llm-compressor"):
        return _read_formats(path, source, _shape(model, trust_remote_code))
    if source == "moa":
        found = read_json(path, "plan of MoA")
        if not isinstance(found, dict) or not {"alphas", "betas"} <= set(found):
            raise ArtefactError(f"{path} is no plan of MoA: it needs `alphas` and `betas`")
        return plan_of_moa(MoaSpans(found["alphas"], found["betas"]), _shape(model, trust_remote_code), length)
    sizes = _pattern_sizes(path)
    pattern = DuoPattern(_table(path / HEADS_FILE), *sizes)
    return plan_of_duo(pattern, _shape(model, trust_remote_code), sparsity)


def _pattern_sizes(folder: Path) -> tuple[int, int]:
    """Returns the sinks and the window that a pattern's config says.

    Raises:
        ArtefactError: it says none.
    """
    config = read_json(folder / CONFIG_FILE, "pattern of DuoAttention")
    sizes = [config.get(name) if isinstance(config, dict) else None for name in ("sink_size", "recent_size")]
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise ArtefactError(
            f"{folder / CONFIG_FILE} is no pattern of DuoAttention: it needs `sink_size` and `recent_size`"
        )
    sink, recent = map(int, sizes)  # type: ignore[arg-type]
    return sink, recent


def _shape(model: str, trust_remote_code: bool) -> ModelShape:
    """Returns the shape of MODEL; of a config alone it has no fingerprint of weights."""
    from moacompress.models.source import load_source
    from moacompress.run_counts import read_counts

    if is_described(model):
        return read_counts(model, trust_remote_code).shape
    return load_source(model, trust_remote_code=trust_remote_code).shape


def _read_formats(path: Path, source: Form, shape: ModelShape) -> tuple[Plan, list[str]]:

    if path.is_dir():
        own = path / MODELOPT_FILE
        path = own if source == "modelopt" and own.is_file() else path / CONFIG_FILE
    config = read_json(path, f"config of {source}", MOST_BYTES)
    try:
        if source == "modelopt":
            formats, notes = layers_of_modelopt(config, shape.layers)
        else:
            formats, notes = layers_of_compressed_tensors(config, shape)
    except PlanError as error:
        raise PlanError(f"{path} cannot be read as a config of {source}: {error}") from error
    return plan_of_layers(formats, shape), notes


def _table(file: Path) -> list[list[float]]:
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ArtefactError(f"{file} has more than {MOST_BYTES >> 20} MiB; a pattern has a number for each KV head")
        return [
            [float(value) for value in line.split("\t")]
            for line in file.read_text("utf-8").splitlines()
            if line.strip()
        ]
    except OSError as error:
        raise ArtefactError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtefactError(f"{file} is no table of numbers: {error}") from error
