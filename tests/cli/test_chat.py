"""`moacompress chat`: turns on one cache, what it says of bytes, and how a conversation ends."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moacompress.cli.harness import CommandRun
from moacompress.cli.options import Common
from moacompress.core.errors import DataError
from moacompress.core.progress import Progress
from moacompress.demo.chat_session import ChatSession
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.rules.cost import holds_from
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from tests.cli import commands
from tests.plan_kinds import random_plan

invoke = partial(commands.invoke, "chat")


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("chat") / "model"
    source = load_source(str(tiny_folder), dtype="float32")
    export(source, random_plan(source.shape, seed=3), out)
    return out


def test_turns_on_one_cache_are_those_without(folder: Path) -> None:
    session, again = ChatSession(folder, dtype="float32"), ChatSession(folder, dtype="float32")
    plan = Plan.load(folder / "plan.json")
    questions = ["one two three four five six", "seven eight", "nine " * 60]
    for question in questions:
        again._cache, again._cached = None, []
        turn, fresh = (each.ask(question, max_new_tokens=12) for each in (session, again))
        assert turn.answer == fresh.answer
        assert (turn.tokens, turn.new_tokens) == (fresh.tokens, fresh.new_tokens)
        assert turn.dense_bytes == plan.model.dense_kv_bytes(turn.tokens)
        assert turn.kv_bytes >= plan.kv_bytes(turn.tokens)
    session.forget()
    assert session.ask(questions[1], max_new_tokens=4).tokens < 60


def test_a_broken_off_answer_leaves_nothing_behind(folder: Path) -> None:
    session, fresh = ChatSession(folder, dtype="float32"), ChatSession(folder, dtype="float32")

    def stop(text: str) -> None:
        raise KeyboardInterrupt

    for question in ("one two three four", "five six"):
        with pytest.raises(KeyboardInterrupt):
            session.ask("seven " * 30, max_new_tokens=40, on_text=stop)
        assert session.ask(question, max_new_tokens=8).answer == fresh.ask(question, max_new_tokens=8).answer


def test_the_answer_is_that_of_generate(folder: Path) -> None:
    session, pieces = ChatSession(folder, dtype="float32"), list[str]()
    turn = session.ask("alpha beta", max_new_tokens=10, on_text=pieces.append)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.tensor([session._ids([{"role": "user", "content": "alpha beta"}])])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[
        0, ids.shape[1] :
    ]
    assert turn.answer == session._tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert "".join(pieces).strip() == turn.answer


def test_a_conversation_is_typed(folder: Path) -> None:
    longest = ChatSession(folder)._model.config.max_position_embeddings
    typed = f"hello\n\n/new\nhello\n{'word ' * longest}\nhello\n/exit\nnever asked\n"
    result = invoke(folder, "--max-new-tokens", "4", input=typed)
    assert result.exit_code == 0, result.stderr
    assert f"the model takes {longest:,}" in result.stderr  # and the conversation goes on
    first, second, _ = (line for line in result.stderr.splitlines() if "KV cache" in line)
    assert first.split(";")[:2] == second.split(";")[:2]  # /new forgot the first
    assert "never" not in result.stdout
    with pytest.raises(DataError, match="begin a new conversation"):
        ChatSession(folder).ask("hello", max_new_tokens=longest)


def test_bytes_that_are_no_text_do_not_end_a_conversation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke(folder, "--max-new-tokens", "2", input=b"caf\xe9\nhello\n")
    assert done.stderr.count("KV cache") == 2  # of two turns
    monkeypatch.setattr(sys, "stdin", None)  # it was closed
    assert CommandRun(Common(), Progress()).read("> ") is None


def test_one_object(folder: Path) -> None:
    result = invoke(folder, "--ask", "hello", "--ask", "again", "--max-new-tokens", "4", "--json")
    assert result.exit_code == 0, result.stderr
    turns = json.loads(result.stdout)["turns"]
    assert [turn["question"] for turn in turns] == ["hello", "again"]
    assert turns[1]["tokens"] > turns[0]["tokens"]


def test_below_the_length_that_the_budget_holds_from_it_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    """A short conversation is all within windows: its share says nothing of the plan."""
    source = load_source(str(tiny_folder), dtype="float32")
    plan = Plan.uniform(source.shape, Rule(4, 64, 0), 32)
    noted = plan.with_notes(budget={"asked": ["25%"], "bytes": {"512": {}, "1024": {}}})
    export(source, noted, tmp_path / "model")
    result = invoke(tmp_path / "model", "--ask", "hello", "--ask", "nine " * 500, "--max-new-tokens", "4")
    assert result.exit_code == 0, result.stderr
    short, long = (line for line in result.stderr.splitlines() if "KV cache" in line)
    start = holds_from(noted)
    assert start is not None
    assert plan.kv_share(start) <= 0.25 < plan.kv_share(start - 16)
    assert f"25% from {start} tokens on" in short
    assert "from" not in long
    # searched at 512 and 1,024 tokens
    notes = {"asked": ["25%", "100%@256"], "bytes": {"256": {}, "512": {}, "1024": {}}}
    assert holds_from(plan.with_notes(budget=notes, provenance={"lengths": [512, 1024]})) == start
    assert holds_from(plan) is None  # nobody asked for a budget
    assert holds_from(plan.with_notes(budget={"asked": ["1MiB@1k"]})) is None


def test_a_model_with_settings_of_its_own(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    settings = {"num_beams": 3, "num_return_sequences": 2, "stop_strings": ["no such end"]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    sessions = [ChatSession(each, dtype="float32") for each in (folder, tmp_path / "model")]
    first, second = (session.ask("one two three", max_new_tokens=4).answer for session in sessions)
    assert first == second
