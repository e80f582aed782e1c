"""`moacompress inspect`: shows what a plan keeps and what it costs, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moacompress.cli.dense_memory import dense_memory
from moacompress.cli.harness import CommandRun, Output, command
from moacompress.cli.options import BatchOption, batch_sizes
from moacompress.core.errors import UsageError
from moacompress.models.device import available_memory
from moacompress.models.skeleton import is_dense_model
from moacompress.models.source import find_model_folder
from moacompress.models.stored_plan import find_running_plan, read_plan
from moacompress.rules.budget import parse_lengths
from moacompress.rules.memory import kv_memory


@command(
    "moacompress inspect plan.json",
    "moacompress inspect runs/mine --lengths 1k,4k,32k",
    "moacompress inspect runs/mine/model --json",
    "moacompress inspect path/to/dense --lengths 32k --batch 1,8",
    "moacompress inspect runs/mine --show-tokens notes.txt",
    settings=("device",),
    takes=("trust_remote_code",),
)
def inspect(
    run: CommandRun,
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Compressed model, the folder of a run, a plan file, or a dense model."),
    ],
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="LIST", help="Lengths in tokens to report, such as 1k,4k.")
    ] = None,
    batch: BatchOption = None,
    show_tokens: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Run the compressed model on a text and mark the tokens that its gates keep."
        ),
    ] = None,
) -> Output:
    """Show what a plan keeps and what it costs.

    Shows KV bytes at several lengths, and the kept share and bits of every layer and KV head. --batch adds the KV memory of
    requests and how many fit on this machine, which is all that is shown for a dense model. The model is loaded only for
    --show-tokens.
    """
    from moacompress.report.inspection import inspect_plan, inspection_tables, memory_tables

    device, trust_remote_code = run.recipe().device, run.common.trust_remote_code
    if is_dense_model(path):
        if show_tokens is not None:
            raise UsageError(f"{path} is a dense model, which has no gates; --show-tokens needs a compressed one")
        memory = dense_memory(str(path), lengths, batch, device, trust_remote_code)
        return Output({"dense": True, "memory": memory}, memory_tables(memory))
    file = find_running_plan(path)
    plan = read_plan(file)
    asked = parse_lengths(lengths) if lengths else None
    data = inspect_plan(plan, asked, find_model_folder(file.parent))
    shown = Output(data, inspection_tables(data))
    if batch is not None:
        weights = None if data["weights"] is None else sum(data["weights"].values())
        free, batches = available_memory(device), batch_sizes(batch)
        memory = kv_memory(
            plan.model, asked or plan.stated_lengths, batches, weights=weights, available=free, plan=plan
        )
        shown = Output({**data, "memory": memory}, [*shown.show, *memory_tables(memory)])
    if show_tokens is None:
        return shown
    from moacompress.report.shown_tokens import token_tables
    from moacompress.runtime.selected_tokens import selected_tokens

    folder = find_model_folder(file.parent)
    if folder is None:
        raise UsageError(f"{path} has no weights, and --show-tokens runs the model; give a compressed model")
    found = selected_tokens(folder, plan, show_tokens, device, trust_remote_code=trust_remote_code)
    return Output({**shown.data, "shown_tokens": found}, [*shown.show, token_tables(found)])
