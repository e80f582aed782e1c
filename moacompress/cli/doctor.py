"""`moacompress doctor`: checks the environment, a model to compress, or a compressed checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import RenderableType

from moacompress.cli.dense_memory import dense_memory
from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import BatchOption
from moacompress.core.errors import UsageError


@command(
    "moacompress doctor",
    "moacompress doctor path/to/model",
    "moacompress doctor path/to/model --lengths 32k --batch 8",
    "moacompress doctor path/to/model.gguf --json",
    "moacompress doctor runs/mine",
    settings=("device",),
    takes=("trust_remote_code",),
)
def doctor(
    run: CommandRun,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Hub id, folder or .gguf file of a dense model, or a compressed model.",
            show_default=False,
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens of a request, such as 4k,32k [default: the context, at most 32k].",
            show_default=False,
        ),
    ] = None,
    batch: BatchOption = None,
) -> Output:
    """Check the environment and, if given, MODEL.

    For a dense model it tells whether it can be compressed, how much KV memory requests take, dense and compressed, and how
    many fit on this machine. A compressed model or the folder of its run is described and checked. The weights are not loaded.
    Exits with 1 if something does not work.
    """
    from moacompress.doctor.checks import check_environment, check_model
    from moacompress.report.doctor_tables import environment_table, model_table
    from moacompress.report.inspection import memory_tables

    trust_remote_code = run.common.trust_remote_code
    data = check_environment()
    show: list[RenderableType] = [environment_table(data)]
    problems = list(data["problems"])
    data["model"] = None
    if model is not None:
        checked = check_model(model, trust_remote_code=trust_remote_code, environment=data)
        data["model"] = {**checked, "memory": None}
        problems += data["model"]["problems"]
        show.append(model_table(data["model"]))
        if not data["model"]["compressed"] and not data["model"]["problems"]:
            memory = dense_memory(model, lengths, batch, run.recipe().device, trust_remote_code)
            data["model"]["memory"] = memory
            show += memory_tables(memory)
        elif lengths is not None or batch is not None:
            raise UsageError(
                f"{model} is compressed or cannot be used; `moacompress inspect` has the KV bytes of a plan"
            )
    verdict = [f"problem: {problem}" for problem in problems] or ["Everything is in order."]
    return Output(data, [*show, *verdict], exit_code=1 if problems else 0)
