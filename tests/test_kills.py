"""A resumable command that is killed before a random change in its folder and run again ends as one that nothing disturbed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.kills import Command, Harness, contents
from tests.preloaded import Preloaded

PROFILE = "profile {model} --lengths 700,800 --samples 4 --validation-samples 2 --set profile.draws=1 --source needle -o {out}/"
SHARDS = tuple(f"{PROFILE}{part} --shard {part}/2" for part in (1, 2))
SEARCH = "search {run}/profile -o {out}/plan.json --budget 50% --trials 3"
HEAL = "heal {run} -o {out}/healed --samples 2 --steps 2 --batch 800 --set heal.evaluations=2"
COMMANDS = {
    "compress": Command("compress --recipe {out}.yaml -o {out}"),
    "profile": Command(f"{PROFILE}profile"),
    "shard": Command(SHARDS[0]),
    "merge": Command("profile --merge {out}/1 {out}/2 -o {out}/profile", first=SHARDS),
    "search": Command(SEARCH),
    "workers": Command(f"{SEARCH} --storage {{out}}/study.journal", beside=1),
    "export": Command("export {model} {run}/plan.json -o {out}/model"),
    "eval": Command("eval {run} -o {out}/eval.json --tasks needle-noise,recall --lengths 700 --prompts 2"),
    "heal": Command(HEAL),
    "heal all weights": Command(f"{HEAL} --train full"),
}
"""Commands that resume, on the tiny model."""


@pytest.fixture(scope="session")
def harness(
    tmp_path_factory: pytest.TempPathFactory, preloaded: Preloaded, tiny_folder: Path, small_run: dict[str, Any]
) -> Harness:
    """Returns what runs commands, with a whole run that others of them begin with."""
    made = Harness(tmp_path_factory.mktemp("whole"), preloaded, tiny_folder, small_run)
    made.whole("compress", COMMANDS["compress"])
    return made


COVERED = ("compress", "shard", "merge", "workers", "export", "eval", "heal all weights")
"""Those that are made of others here, take the same way, or write little before they end."""
CASES = [
    pytest.param(name, times, marks=[pytest.mark.heavy] if times > 1 or name in COVERED else [])
    for name in COMMANDS
    for times in (1, 15)
]


@pytest.mark.parametrize(("name", "times"), CASES)
def test_it_ends_as_one_that_was_never_killed(name: str, times: int, harness: Harness, tmp_path: Path) -> None:
    command, rng = COMMANDS[name], random.Random(f"{name} {times}")
    undisturbed, changes = harness.whole(name, command)
    wanted = contents(undisturbed)
    for time in range(times):
        out = tmp_path / str(time)
        harness.prepare(command, out)
        numbers = [rng.randint(1, changes) for _ in range(1 + time % 3)]
        for number in numbers:
            harness.run(command.arguments, out, number, command.beside)
        assert harness.run(command.arguments, out), numbers
        found = contents(out)
        differ = [path for path in sorted({*found, *wanted}) if found.get(path) != wanted.get(path)]
        assert differ == [], f"killed before the changes {numbers} of {changes}"
