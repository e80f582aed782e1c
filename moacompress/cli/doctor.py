"""`moacompress doctor`: is the environment right, can this model be compressed, is this compressed checkpoint whole."""

from __future__ import annotations

from typing import Annotated

import typer

from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import TrustRemoteCode


@command(
    "moacompress doctor",
    "moacompress doctor path/to/model",
    "moacompress doctor path/to/model.gguf --json",
    "moacompress doctor runs/mine",
    on_device=True,
)
def doctor(
    run: CommandRun,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Hub id, folder or .gguf file; or a compressed model.", show_default=False
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Check the environment, and whether MODEL works.

    Of a dense model it says whether it can be compressed; a compressed one, or the folder of its run, it describes and checks.
    The weights of MODEL are not loaded. Exits with 1 if something does not work.
    """
    from moacompress.doctor.checks import check_environment, check_model
    from moacompress.report.doctor_tables import environment_table, model_table

    data = check_environment()
    show = [environment_table(data)]
    problems = list(data["problems"])
    data["model"] = None
    if model is not None:
        data["model"] = check_model(model, trust_remote_code=trust_remote_code, environment=data)
        problems += data["model"]["problems"]
        show.append(model_table(data["model"]))
    verdict = [f"problem: {problem}" for problem in problems] or ["Everything is in order."]
    return Output(data, [*show, *verdict], exit_code=1 if problems else 0)
