"""`moacompress chat`: talk to a compressed model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from moacompress.cli.harness import CommandRun, Output, command, readable
from moacompress.cli.options import TrustRemoteCode
from moacompress.core.errors import MoaCompressError, UsageError

NEW, END = "/new", ("/exit", "/quit")


@command(
    "moacompress chat runs/mine",
    'moacompress chat runs/mine/model --system "Answer in one sentence." --temperature 0.7',
    'moacompress chat runs/mine --ask "What is the capital of France?" --json',
    computes=True,
)
def chat(
    run: CommandRun,
    path: Annotated[Path, typer.Argument(metavar="DIR", help="Compressed model, or folder of a run.")],
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="TEXT", help="Ask this and end; repeated: one turn after the other."),
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of sampling; 0 for the likeliest token always.")] = 0.0,
    trust_remote_code: TrustRemoteCode = False,
) -> Output:
    """Talk to a compressed model.

    After every answer it says what the KV cache holds, beside what the dense model's would. Ctrl-C breaks an answer off, /new
    begins a new conversation, /exit or the end of the input ends.
    """
    if run.common.as_json and not ask:
        raise UsageError("--json needs --ask, as nobody is there to type")

    import torch

    from moacompress.demo.chat_session import ChatSession

    run.progress.say(f"{NEW} begins a new conversation, {END[0]} ends")
    recipe = run.recipe()
    torch.manual_seed(recipe.seed)
    system = readable(system)
    session = ChatSession(path, system, recipe.device, run.common.dtype or "auto", trust_remote_code=trust_remote_code)
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
                run.note(f"{error} ({NEW} begins a new conversation)")
            except KeyboardInterrupt:
                run.note("broken off; the question is forgotten")
    return Output({"turns": turns})
