"""The table of options that have no effect beside others: every row of it is refused, by name, before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moacompress.cli.option_rules import TABLE, GivenOptions, Ignored
from moacompress.cli.options import COMMON_ALWAYS
from moacompress.core.errors import UsageError
from moacompress.recipe import Recipe
from tests.cli.commands import all_commands, invoke

RECIPE = """model: none
profile: {gates: false}
heal: {train: full, objective: kl}
search: {share: "off"}
"""
"""Under which the options of all rows with a case of the recipe have no effect."""
NO_MODE = {
    *("compile_ours", "peak", "quick", "trace"),  # what is computed
    *("baselines", "heads", "gates", "card", "everything"),  # what is written or shown besides
    *("allow_overlap", "show_failures"),
    *("overwrite", "trust_remote_code", "tensor_parallel"),
}
"""Switches with which a command does the same work in another way: none of the other options loses its effect."""


VALUES = {"shard": "1/3", "effort": "quick", "source": "moa", "target": "moa", "dtype": "float32"}
"""What options take that do not take a number."""


COMMANDS = dict(all_commands())


def parameters(command: str) -> dict[str, Any]:
    return {each.name: each for each in COMMANDS[command].params if each.name != "help"}


def given(command: str, name: str, value: str | None = None) -> list[str]:
    """Returns a parameter as it is given on a command line, with some value that it takes."""
    parameter = parameters(command)[name]
    if parameter.param_type_name == "argument":
        return [value or "3"]
    if getattr(parameter, "is_flag", False) or name == "verbose":
        return [parameter.opts[0]]
    return [parameter.opts[0], value or VALUES.get(name, "3")]


def needed(command: str, but: tuple[str, ...]) -> list[str]:
    """Returns the arguments and options without which a command is not parsed."""
    missing = [each for name, each in parameters(command).items() if each.required and name not in but]
    return [part for each in missing for part in given(command, each.name, "none.jsonl")]


def ignored(rule: Ignored) -> list[str]:
    """Returns the options of a row."""
    return [name for name in parameters("doctor" if rule.command == "*" else rule.command) if rule.ignores(name)]


@pytest.mark.parametrize(
    "rule", [pytest.param(each, id=f"{each.command} {each.beside or each.without}") for each in TABLE]
)
def test_an_option_that_has_no_effect_is_refused(rule: Ignored) -> None:
    """All options of a row by the check itself, and the last one on a command line."""
    command, options = "doctor" if rule.command == "*" else rule.command, ignored(rule)
    assert options
    case, _, value = rule.beside.partition("=")
    names = {name: f"--{name}" for name in parameters(command)}
    recipe = Recipe.from_dict(yaml.safe_load(RECIPE)) if rule.of_recipe else None
    for option in options:
        call = GivenOptions(command, {case: value or True, option: 3}, names, {}, [option, case])
        with pytest.raises(UsageError, match=f"--{option} has no effect "):
            call.check(recipe)
    if not rule.of_recipe:
        beside = given(command, case, value) if case else []
        line = [*command.split(), *given(command, option), *beside, *needed(command, (option, case))]
        done = invoke(*line)
        assert done.exit_code == 2, (line, done.output)
        where = f"beside {parameters(command)[case].opts[0]}" if case else ""
        assert f"{parameters(command)[option].opts[0]} has no effect {where}" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "line",
    [
        "heal none -o out --modules o_proj",  # LoRA is the default
        "profile none --gates --scorer keydiff --audit 3 --seed 3 --dtype float32",
        "eval none --dry-run -o scores.json --overwrite",
        "bench none --serve --requests 3 -o b.json --overwrite",
        "convert none --from moa --at 3k --model none",
        "chat none --ask hello --temperature 0.5 --seed 3",
    ],
)
def test_options_that_count_are_taken(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*line.split())
    assert done.exit_code
    assert "has no effect" not in done.stderr


def test_what_the_environment_says_is_not_given(tmp_path: Path) -> None:
    done = invoke("search", "--status", tmp_path / "none.journal", env={"MOACOMPRESS_STORAGE": "x"})
    assert "has no effect" not in done.stderr


def test_every_name_in_the_table_is_a_parameter() -> None:
    for rule in TABLE:
        if rule.command == "*":
            continue
        known = parameters(rule.command)
        cases = [case.partition("=")[0] for case in (rule.beside, *rule.without) if case and "." not in case]
        for name in (*rule.options, *(rule.but or ()), *cases):
            assert name in known, (rule, name)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_switch_is_in_the_table_or_is_no_mode(command: str) -> None:
    """A new switch is put into the table, or is said to take no other option its effect."""
    cases = {
        case.partition("=")[0] for rule in TABLE if rule.command == command for case in (rule.beside, *rule.without)
    }
    for name, each in parameters(command).items():
        if getattr(each, "is_flag", False) and name not in COMMON_ALWAYS:
            allowed = (
                name in NO_MODE or name in cases or (name == "dry_run" and command in {"heal", "compress", "bench"})
            )
            assert allowed, name
