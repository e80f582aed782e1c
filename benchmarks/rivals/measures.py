"""What is measured of rivals: answers, and the time and memory of prompts and steps. Each row is on disk once it is there."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.core.errors import UsageError
from moacompress.core.files import digest_files, fingerprint, read_json
from moacompress.core.records import Records
from moacompress.evaluation.scoring.prompts import match_share
from rivals.environments import python_of
from rivals.processes import Runner, RunnerError, runner
from rivals.prompts import SEEN, UNSEEN, Prompt
from rivals.settings import DENSE, NEED_GGUF, OURS, REQUIREMENTS, Setting, chosen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Failures = dict[str, str]
"""Why a setting could not be measured, by its full name."""
_digest = functools.cache(digest_files)

ROW_VERSION = 2
"""Changes with what rows of answers say, so that those of older files are measured again."""


@dataclass(frozen=True)
class Bench:
    """What all settings are measured with.

    Attributes:
        dense: folder of the model.
        gguf: the same model as a `.gguf` file, or None where no rival needs it.
        environments: folder of the rivals' environments.
        threads: of every process.
        records: of rows.
        machine: in words.
        deadline: nothing new is begun after this (`time.monotonic()`), or None.
    """

    dense: Path
    gguf: Path | None
    environments: Path
    threads: int
    records: Records[dict[str, float]]
    machine: str
    deadline: float | None = None

    def late(self) -> bool:
        """Says whether nothing new is to be begun."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @contextmanager
    def started(self, setting: Setting, tokens: int, **more: Any) -> Iterator[Runner]:
        """Starts the process of a setting, with room for so many tokens; its runner is told `more` besides.

        Raises:
            UsageError: it needs a file that was not given, or its environment cannot be made.
            RunnerError: it ends before it is ready.
        """
        if setting.rival in NEED_GGUF and self.gguf is None:
            raise UsageError(f"{setting.rival} needs the model as a .gguf file (--gguf FILE)")
        python = python_of(setting.rival, self.environments)
        task = {
            **setting.options,
            **more,
            "dense": str(self.dense),
            "gguf": str(self.gguf),
            "folder": str(self.environments / setting.rival),
            "model_key": _digest(self.gguf or self.dense),
            "dense_key": _digest(self.dense),
            "threads": self.threads,
            "tokens": tokens,
            "vocabulary": read_json(self.dense / "config.json", "model config")["vocab_size"],
        }
        with runner(python, setting.rival, setting.full_name, task) as process:
            yield process

    def key(self, setting: Setting, *parts: Any) -> str:
        """Returns what a row is filed under: setting, versions and model, and what it is a row of."""
        if setting.rival == OURS:
            of = _digest(Path(setting.options["checkpoint"])) if "checkpoint" in setting.options else ""
        else:
            of = (REQUIREMENTS / f"{setting.rival}.txt").read_text("utf-8")
        if setting.rival in NEED_GGUF and self.gguf is not None:
            of += _digest(self.gguf)
        return fingerprint([setting.rival, dict(setting.options), of, _digest(self.dense), *parts])

    def file(self, key: str, numbers: Mapping[str, float], process: Runner, setting: Setting, **notes: Any) -> None:
        """Files a row; `model` and `patch_points` in it are digests of what its key is of."""
        self.records.append(
            {
                "key": key,
                "numbers": dict(numbers),
                "rival": setting.rival,
                "setting": setting.name,
                "note": setting.note,
                "versions": process.ready["versions"],
                "model": _digest(self.dense),
                "patch_points": self.key(setting),
                "machine": self.machine,
                "threads": self.threads,
                "date": datetime.now(UTC).date().isoformat(),
                **notes,
            }
        )


def measure_quality(
    bench: Bench,
    settings: Sequence[Setting],
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[int],
    questions: Sequence[str] = (SEEN, UNSEEN),
) -> Failures:
    """Lets the dense model answer every prompt, and every setting those that it answers right.

    Settings that evict once answer with the question seen and unseen.

    Returns:
        What could not be measured.
    """
    failures: Failures = {}
    (dense,) = chosen([":".join(DENSE)], {})
    tokens = max(len(prompt.case.prompt_ids) + prompt.new_tokens for prompt in prompts) + 1

    def key(setting: Setting, way: str, prompt: Prompt) -> str:
        of = bench.key(setting, "quality", list(stop))
        return fingerprint([of, ROW_VERSION, way, prompt.case.prompt_ids, prompt.new_tokens])

    def rows(setting: Setting) -> None:
        asked = [way for way in (SEEN, UNSEEN) if way in questions] if setting.once else [SEEN]
        wanted = [
            (key(setting, way, prompt), way, prompt)
            for way in asked
            for prompt in prompts
            if setting == dense or (bench.records.get(key(dense, SEEN, prompt)) or {}).get("match") == 1.0
        ]
        left = [one for one in wanted if bench.records.get(one[0]) is None]
        if not left or bench.late():
            return
        with bench.started(setting, tokens) as process:
            for done, (row_key, way, prompt) in enumerate(left):
                if bench.late():
                    return
                case = prompt.case
                begin = time.perf_counter()
                said = process.do(
                    "answer",
                    prompt=case.prompt_ids,
                    question_at=prompt.question_at if way == UNSEEN else None,
                    new_tokens=prompt.new_tokens,
                    stop=list(stop),
                )
                text = str(tokenizer.decode(said["ids"], skip_special_tokens=True))
                numbers = {
                    "match": match_share(case, text),
                    "kv_bytes": said["kv_bytes"],
                    "masked_bytes": said["masked_bytes"],
                    "tokens": len(case.prompt_ids) + len(said["ids"]) - 1,
                }
                where: dict[str, Any] = {"task": case.task, "length": case.length, "index": prompt.index}
                where["prompt"] = fingerprint(case.prompt_ids)
                question = way if setting.once else ""
                bench.file(row_key, numbers, process, setting, measure="quality", question=question, **where)
                seconds = time.perf_counter() - begin
                told = f"{setting.full_name} {question} {case.task}: {numbers['match']:g} ({seconds:.1f} s)"
                print(f"{told}, {done + 1} of {len(left)}", file=sys.stderr)

    for setting in (dense, *(one for one in settings if one != dense)):
        attempt(failures, setting, rows)
    return failures


def measure_speed(
    bench: Bench, settings: Sequence[Setting], lengths: Sequence[int], steps: int, turns: int
) -> Failures:
    """Times prompts and steps of all settings in turns; their processes are there at the same time.

    Returns:
        What could not be measured.
    """
    failures: Failures = {}
    wanted = [
        (bench.key(setting, "speed", length, turn, steps, bench.threads, bench.machine), setting, length, turn)
        for length in lengths
        for turn in range(turns)
        for setting in settings
    ]
    left = [one for one in wanted if bench.records.get(one[0]) is None]
    with ExitStack() as stack:
        processes: dict[str, Runner] = {}

        def start(setting: Setting) -> None:
            processes[setting.full_name] = stack.enter_context(bench.started(setting, max(lengths) + steps + 2))

        missing = {setting.full_name: setting for _, setting, _, _ in left}
        for setting in missing.values():
            attempt(failures, setting, start)
        for key, setting, length, turn in left:
            if bench.late():
                break

            def row(setting: Setting, key: str = key, length: int = length, turn: int = turn) -> None:
                process = processes[setting.full_name]
                found = process.do("turn", length=length, steps=steps, seed=turn)
                bench.file(key, found, process, setting, measure="speed", length=length, turn=turn, steps=steps)
                times = f"{found['step_ms']:.1f} ms a step, {found['prompt_ms']:.0f} ms the prompt"
                print(f"{setting.full_name} at {length}: {times}", file=sys.stderr)

            if setting.full_name not in failures:
                attempt(failures, setting, row)
    return failures


def attempt(failures: Failures, setting: Setting, run: Callable[[Setting], None]) -> None:
    """Runs something of a setting; that its process fails is noted, and others go on."""
    try:
        run(setting)
    except RunnerError as error:
        failures[setting.full_name] = str(error)
        print(error, file=sys.stderr)
