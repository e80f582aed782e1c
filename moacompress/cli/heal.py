"""`moacompress heal`: weights that fit the plan, by a short distillation from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import LengthsOption, Overwrite, RecipeFile, Text, TrustRemoteCode, dry_run_option


@command(
    "moacompress heal runs/mine -o healed/",
    "moacompress heal model/ -o healed/ --profile profile/ --teacher path/to/model --dry-run",
    "moacompress heal runs/mine -o healed/ --train full --lr 2e-5 --steps 200 --max-minutes 30",
    "moacompress heal runs/mine -o healed/ --objective echoatt --samples 200 --text prose/ --json",
    computes=True,
    shared=True,
)
def heal(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or folder of a run.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the healed checkpoint.")],
    recipe: RecipeFile = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Profile of the dense model, whose validation samples are held out; by default the run's own.",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model; by default the one that was profiled."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="kl: KL to the dense model; echoatt: EchoAtt's two stages, first states of layers, KL and tokens, then "
            "tokens alone.",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="full: all weights; lora: LoRA, merged at the end; reuse: layers that reuse attention; gates: the gates "
            "that choose tokens, and nothing else.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Training samples: those of the profile first, then new ones.")
    ] = None,
    lengths: LengthsOption = None,
    text: Text = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Minutes of training after which it ends.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens of an optimizer step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of LoRA.")] = None,
    modules: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Linear layers that LoRA is trained in, such as o_proj,down_proj; by default all."
        ),
    ] = None,
    hidden_weight: Annotated[float | None, typer.Option(help="EchoAtt: weight of the states of layers.")] = None,
    soft_weight: Annotated[float | None, typer.Option(help="EchoAtt: weight of KL to dense.")] = None,
    hard_weight: Annotated[float | None, typer.Option(help="EchoAtt: weight of the answers' own tokens.")] = None,
    evaluations: Annotated[int | None, typer.Option(help="Times that held-out KL is measured on the way.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations in a row without a new best that end the training.")
    ] = None,
    held_out: Annotated[int | None, typer.Option(help="Validation samples that it is measured on.")] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing/--no-checkpointing", help="Compute layers twice, and keep less in memory."),
    ] = None,
    dry_run: Annotated[
        bool, dry_run_option("Say what it would take (tokens, time, memory), and train nothing.")
    ] = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Distil the weights of a compressed model from the dense one.

    The plan stays as it is, but for its gates where these are trained. What is written is the state of least KL to the dense
    model on held-out samples, and the start where no step was better. --dtype is what is computed in: float32 on a CPU, else
    bfloat16; weights are trained in float32.
    Under torchrun (torchrun --standalone --nproc-per-node 2 -m moacompress heal ...) processes share the samples.
    """
    resolved = run.recipe(
        recipe,
        heal__objective=objective,
        heal__train=train,
        heal__samples=samples,
        heal__lengths=lengths,
        heal__steps=steps,
        heal__max_minutes=max_minutes,
        heal__batch=batch,
        heal__lr=lr,
        heal__rank=rank,
        heal__modules=modules,
        heal__hidden_weight=hidden_weight,
        heal__soft_weight=soft_weight,
        heal__hard_weight=hard_weight,
        heal__evaluations=evaluations,
        heal__patience=patience,
        heal__held_out=held_out,
        heal__checkpointing=checkpointing,
        calibration__text=text,
    )
    if dry_run:
        from moacompress.healer.heal_estimate import estimate_heal

        expected = estimate_heal(
            path,
            profile=profile,
            teacher=teacher,
            recipe=resolved,
            trust_remote_code=trust_remote_code,
            progress=run.progress,
        )
        return Output(expected.to_dict(), list(expected.lines()))

    from moacompress.healer.healing import heal as heal_model

    healed = heal_model(
        path,
        out,
        profile=profile,
        teacher=teacher,
        recipe=resolved,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        progress=run.progress,
    )
    from moacompress.report.heal_tables import heal_table

    data = {"model": str(healed.folder), **healed.notes, "losses": list(healed.losses)}
    shown: list[RenderableType] = [
        heal_table(healed.notes),
        f'Load it with AutoModelForCausalLM.from_pretrained("{healed.folder}")',
    ]
    return Output(data, shown)
