"""The blocks of docs/clusters.md: shell that ShellCheck takes, commands that parse, and a job with the fields of its schema."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from moacompress.cli import app

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "clusters.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [block for language, block in BLOCKS if language == "sh"]
JOBS = [block for language, block in BLOCKS if language == "yaml"]
SBATCH = {
    *("job-name", "array", "time", "requeue", "nodes"),
    *("gpus-per-task", "gpus-per-node", "cpus-per-task", "ntasks-per-node"),
}
"""Options of `sbatch` that are used, as its manual spells them."""
PROGRAMS = {
    *("moacompress", "torchrun", "srun", "scontrol", "ray", "ssh"),
    *("cd", "head", "export", "set", "for", "do", "done", "wait"),
}


def words(line: str) -> list[str]:
    """Returns the words of a line of shell, operators apart."""
    reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
    reader.whitespace_split, reader.commenters = True, ""
    return list(reader)


def commands(script: str) -> Iterator[list[str]]:
    """Yields the commands of a script, those that it hands to `ssh` too."""
    for line in script.replace("\\\n", " ").splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found: list[str] = []
        for word in [*words(re.sub(r"\$\(\((.*?)\)\)", "1", line)), ";"]:
            if word in ("&&", "||", ";", "&", "|", "do"):
                if found:
                    yield found
                    if found[0] == "ssh":
                        yield from commands(found[-1])
                found = []
            else:
                found.append(word)


def check(command: list[str]) -> str | None:
    """Parses what a command starts; returns the command of moacompress, if it is one."""
    if command[0] in ("srun", "ray", "OMP_NUM_THREADS=8"):
        inner = next((number for number, word in enumerate(command) if word in ("torchrun", "moacompress")), None)
        return check(command[inner:]) if inner is not None else None
    if command[0] == "torchrun":
        given = get_args_parser().parse_args([re.sub(r"\$\{?[#\w!\[\]@]+\}?", "1", word) for word in command[1:]])
        assert given.module
        assert given.training_script == "moacompress"
        command = ["moacompress", *given.training_script_args]
    if command[0] != "moacompress":
        return None
    name, *arguments = command[1:]
    typer.main.get_command(app).commands[name].make_context(name, arguments)  # type: ignore[attr-defined]
    return name


@pytest.mark.parametrize("script", SCRIPTS)
def test_script(script: str, tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    path.write_text(script)
    assert script.startswith("#!/bin/bash\n")
    subprocess.run(["bash", "-n", path], check=True)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", path], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout
    options = re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)
    assert len(options) == script.count("#SBATCH")
    assert set(options) <= SBATCH
    found_commands = list(commands(script))
    started = [check(command) for command in found_commands]
    assert any(started)
    for command in found_commands:
        assert command[0] in PROGRAMS or re.match(r"\w+=", command[0]), command


def test_what_does_not_parse_is_found() -> None:
    assert check(["moacompress", "profile", "m", "--shard", "1/2"]) == "profile"
    for wrong in ("--shards", "--merges"):
        with pytest.raises(Exception, match="No such option"):
            check(["srun", "torchrun", "--nnodes", "2", "-m", "moacompress", "profile", "m", wrong, "1/2"])
    with pytest.raises(SystemExit):
        check(["torchrun", "--nodes", "two", "-m", "moacompress", "eval", "out"])


FIELDS: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "completionMode": str,
        "completions": int,
        "parallelism": int,
        "backoffLimit": int,
        "template": {
            "spec": {
                "restartPolicy": str,
                "containers": [
                    {
                        "name": str,
                        "image": str,
                        "command": [str],
                        "args": [str],
                        "resources": {"limits": {"nvidia.com/gpu": int}},
                        "volumeMounts": [{"name": str, "mountPath": str}],
                    }
                ],
                "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
            }
        },
    },
}
"""What a Job of batch/v1 may have, of what is used."""


def check_fields(value: Any, fields: Any, path: str = "") -> None:
    if isinstance(fields, dict):
        assert isinstance(value, dict), path
        assert set(value) <= set(fields), path
        for name, inner in value.items():
            check_fields(inner, fields[name], f"{path}.{name}")
    elif isinstance(fields, list):
        assert isinstance(value, list), path
        for inner in value:
            check_fields(inner, fields[0], path)
    else:
        assert type(value) is fields, path


@pytest.mark.parametrize("block", JOBS)
def test_job(block: str) -> None:
    job = yaml.safe_load(block)
    check_fields(job, FIELDS)
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"  # without it there is no JOB_COMPLETION_INDEX
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")  # a Job takes no other
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", job["metadata"]["name"])
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (script,) = container["args"]
    assert [check(command) for command in commands(script)] == ["profile"]
    assert f"/{spec['completions']}" in script


def test_there_is_one_of_each() -> None:
    assert len(JOBS) == 1
    for name in ("sbatch --dependency", "#SBATCH --array", "srun", "ray job submit", "ssh ", "--storage", "--merge"):
        assert any(name in script for script in SCRIPTS), name
