"""`moacompress chat`: talk to a compressed model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command, readable
from moacompress.core.errors import MoaCompressError, UsageError

NEW, END = "/new", ("/exit", "/quit")


@command(
    "moacompress chat runs/mine",
    'moacompress chat runs/mine/model --system "Answer in one sentence." --temperature 0.7',
    'moacompress chat runs/mine --ask "What is the capital of France?" --json',
    settings=("seed", "device", "dtype"),
    takes=("trust_remote_code",),
    computes=True,
)
def chat(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or the folder of a run.")],
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="TEXT", help="Ask this and exit. Repeat for several turns."),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 for greedy decoding.")] = 0.0,
) -> Output:
    """Talk to a compressed model.

    After every answer it shows the size of the KV cache beside that of the dense model. Ctrl-C interrupts an answer, /new
    starts a new conversation, /exit or end of input quits.
    """
    if run.common.as_json and not ask:
        raise UsageError("--json needs --ask, because its output is not interactive")

    import torch

    from moacompress.demo.chat_session import ChatSession

    run.progress.say(f"{NEW} starts a new conversation, {END[0]} quits")
    recipe = run.recipe()
    torch.manual_seed(recipe.seed)
    system = readable(system)
    session = ChatSession(path, system, recipe.device, recipe.dtype, trust_remote_code=run.common.trust_remote_code)
    turns: list[dict[str, Any]] = []

    def answer(question: str) -> None:
        say = (lambda text: None) if run.common.as_json else run.write
        turn = session.ask(question, max_new_tokens=max_new_tokens, temperature=temperature, on_text=say)
        turns.append({"question": question, **asdict(turn)})
        say("\n")
        if not run.common.as_json and not run.common.quiet:
            run.note(turn.sentence())

    for question in ask or ():
        answer(readable(question))
    while not ask:
        line = run.read("> ")
        if line is None or line in END:
            break
        if line == NEW:
            session.forget()
        elif line:
            try:
                answer(line)
            except MoaCompressError as error:
                run.note(f"{error} ({NEW} starts a new conversation)")
            except KeyboardInterrupt:
                run.note("interrupted; the question is dropped")
    return Output({"turns": turns})
