"""The commands and Python blocks of the README and docs: what runs each, `make test` or `make test-all`, or why nothing."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md")))
PAGES = [path.read_text("utf-8") for path in FILES]
BLOCKS = [block for page in PAGES for block in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
COMMANDS = [
    line.split("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.split("#")[0].strip()
]
"""Every command line, in the order of the pages."""
PYTHON = {
    str(path.relative_to(ROOT)): re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for path, page in zip(FILES, PAGES, strict=True)
    if "\n```python\n" in page and path.parent.name != "lab"
}
"""The Python blocks of every page that has some, but for the dated ones of docs/lab, which are of the day that they were run.

Those of a page are run one after the other, with the names of the earlier ones.
"""

CANNOT = {
    r"^make (demo|setup|test)": "a target of the Makefile: the environment, tests or the demo itself",
    r"^(\S+/)?pip |-m venv ": "installs packages from a registry",
    r"^serve/bin/|\.cache/vllm/": "needs vLLM in an environment of its own; `make test-vllm` runs the plugin",
    r"^optuna-dashboard|transformers serve": "a server, which runs until it is stopped",
    r"HuggingFaceTB/|Qwen/": "downloads a model from the hub",
    r"--nnodes|node-1": "needs a cluster",
    r"^torchrun": "starts processes of its own; tests/test_clusters.py, tests/torchrun.py and those of shared runs have them",
    r"--device (cuda|auto)|gpu\w*\.py|--tensor-parallel": "needs a GPU",
    r"^(\S+=\S+ )?python (benchmarks|tests)/(?!scale\.py)": "a measurement of minutes or hours; tests/test_benchmarks.py runs "
    "small ones",
    r"smollm2|SmolLM2|gemma|qwen2|\.cache/|runs/(demo|quick)|moby-dick|rotated/": "a measurement on a real model and texts, "
    "of minutes or hours, as the page says",
    r"memory=6GiB|--budget 512MiB@32k": "its budget is of a model with billions of weights",
    r"^(\S+=\S+ )?moacompress bench ": "times this machine for minutes; tests/cli/test_bench.py and tests/bench run small ones",
    r"--tasks ruler --lengths 1k,2k": "a token of the tiny tokenizer is a character: RULER's shortest prompts are longer",
    r"quantized:": "needs the extra rivals",
    r"--ranks 4": "the tiny model has two KV heads; tests/exporter/test_dealt_heads.py deals more out",
    r"search by-keydiff/": "needs a profile with such gates",
    r"--merge profile-1/": "needs eight shards; tests/calibration/test_shards.py merges some",
}
"""Why a command whose line matches is only parsed."""

QUICK = {
    "moacompress doctor path/to/model",
    "moacompress doctor model/",
    "moacompress inspect model/",
    "moacompress inspect runs/quarter --lengths 4k,32k",
    "moacompress inspect runs/mine",
    "moacompress inspect docs/plans/smollm2-135m-quarter.json --lengths 512,1k,2k,4k,8k",
    "moacompress eval --list-tasks",
    "moacompress eval runs/mine --tasks ruler --lengths 4k --text prose/ --squad squad.json --dry-run",
    "moacompress export path/to/model plan.json -o model/",
    "moacompress data preview path/to/model --source needle --source squad.json --lengths 1k",
    "moacompress data preview path/to/model --source support.jsonl --lengths 1k",
    "moacompress convert path/to/pattern --from duo-attention --model path/to/model --sparsity 0.5 -o plan.json",
    "moacompress convert moa_alpha_beta.json --from moa --model path/to/model --at 8k -o plan.json",
    "moacompress convert plan.json --to moa -o moa_alpha_beta.json",
    "moacompress convert path/to/checkpoint --from modelopt --model path/to/model -o plan.json",
    "moacompress convert plan.json --to llm-compressor -o quantization.json",
    "moacompress report runs/mine",
    "moacompress report runs/mine --card",
    "moacompress recipe init path/to/model --budget 25% -o recipe.yaml",
    "moacompress recipe validate recipe.yaml",
    "moacompress recipe show runs/quarter",
    "moacompress compress tests/configs/qwen3-8b --recipe recipes/qwen3-8b/quarter.yaml --text docs/comparison.md --dry-run",
    "python benchmarks/scale.py --tflops 200",
}
"""Run by `make test`, on a tiny model and on files: seconds each."""

SMALLER = {
    "profile": "--samples 2 --validation-samples 5 --set profile.draws=1",
    "search": "--trials 1",
    "eval": "--prompts 2",
    "compress": "--samples 2 --set calibration.text_samples=0 --validation-samples 5 --trials 1 --prompts 1 --lengths 1k",
    "heal": "--steps 2 --samples 2 --batch 1024 --set heal.evaluations=1",
}
"""Put behind a command that is run by `make test-all`: less of the same work."""


def smaller(command: str) -> str:
    """Returns what is put behind a command that `make test-all` runs."""
    verb = command.split()[1]
    if "--shard" in command:
        return "--samples 16 --validation-samples 8 --set profile.draws=1"  # or a shard has no samples
    if verb == "search" and "--status" in command:
        return ""
    return "" if verb == "eval" and "--dry-run" in command else SMALLER.get(verb, "")


def reason(command: str) -> str | None:
    """Returns why a command is only parsed; None where it is run."""
    if command in QUICK:
        return None
    return next((why for pattern, why in CANNOT.items() if re.search(pattern, command)), None)


SLOW = [command for command in dict.fromkeys(COMMANDS) if command not in QUICK and reason(command) is None]
"""Run by `make test-all`, on a tiny model, with less of the same work."""

PYTHON_CANNOT = {
    "OpenAI(": "asks a server; tests/runtime/test_other_programs.py and tests/serving start some",
    "DistributedConfig": "is of two processes; tests/runtime/ranks_of_tensor_parallelism.py is run in them",
}
"""Why a block with this in it is only checked for names."""

PYTHON_SLOW = ("torch.compile(", "moacompress.profile(", "compress_(")
"""Blocks with one of these are left to `make test-all`."""

PYTHON_SMALLER = {'"calibration__samples": 20': '"calibration__samples": 4', "data=prompts": "data=prompts[::8]"}
"""What stands in their place there: less of the same work."""
