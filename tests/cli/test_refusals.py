"""What a user gets wrong: each such command ends with its exit code and a sentence that says what to do, and writes nothing."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from moacompress import pipeline, run_estimate
from moacompress.bench import benchmark, serve_benchmark
from moacompress.evaluation import runner
from moacompress.models import source
from moacompress.runtime import ready_model
from tests.cli.commands import answer, invoke
from tests.cli.conftest import QUICK
from tests.conftest import tiny_model

COMPRESS = "compress model -o out --lengths 700 --samples 4 --validation-samples 2 --source needle --trials 1"
RUN = f"{COMPRESS} --budget 50%"
PROFILE = "profile model -o out --lengths 768 --samples 4 --validation-samples 2 --source needle"
EVAL = "eval run --against none --tasks needle-noise --lengths 768 --prompts 2"
FILES = {
    "empty.jsonl": "",
    "columns.jsonl": '{"a": 1}',
    "broken.jsonl": "{",
    "rows.jsonl": '{"prompt": "a short one"}\n{"prompt": "and another"}\n{"prompt": "and a third"}\n',
    "prose.txt": "Not many words.",
    "zero.json": "",
    "object.json": "{}",
    "garbage.journal": "not json\nnor this\n",
    "half.yaml": "a: [",
    "typo.yaml": "buget: 25%",
    "task.yaml": "evaluation: {tasks: [needle-nose]}",
    "text.yaml": "calibration: {text: nowhere.txt, text_samples: 3}",
    "full.yaml": "heal: {train: full}",
    "empty/": "",
    "half/profile.json": "{",
    "begun/profile/profile.json": '{"format": "moacompress-profile"}',
    "pattern/config.json": "{}",
    "table/config.json": '{"sink_size": 64, "recent_size": 256}',
    "table/full_attention_heads.tsv": "a\tb\n",
    "named/recipe.json": '{"model": "somewhere/dense"}',
    "unnamed/recipe.json": "{",
    "around/recipe.json": "{",
}
"""What the commands below name, beside `model`, `run` (a compressed one), `profile`, and damaged copies of them."""

USAGE = [
    (2, "inspct x", "Did you mean 'inspect'?"),
    (2, "inspect --lenghts 1k x", "--lengths"),
    (2, "inspect", "Missing argument"),
    (2, "search profile --trials many", "Invalid value for '--trials'"),
    (2, "report m --device cpu", "No such option: --device"),
    (2, "data preview model --count 0", "Invalid value for '--count'"),
    (2, "compress --budget 25%", "no model given; name one as MODEL (hub id, folder or .gguf file)"),
    (2, COMPRESS, "no budget given; write --budget 25%"),
    (2, f"{COMPRESS} --budget 25", "did you mean '25%'?"),
    (2, f"{COMPRESS} --budget 25%,12%", "names several plans"),
    (2, f"{RUN} --lengths 1x", "length '1x' is not a number of tokens"),
    (2, f"{RUN} --dtype int4", "dtype: "),
    (2, f"{RUN} --formats itn8", "unknown format 'itn8'; did you mean 'int8'?"),
    (
        2,
        f"{RUN} --formats int8,int4 --set profile.formats=int8",
        "search.formats offers int4, which profile.formats leaves out",
    ),
    (2, f"{RUN} --set search.share=auto", "search.share needs to know what copies cost; add profile.anchors"),
    (
        2,
        f"{RUN} --recipe text.yaml --effort quick",
        "--effort has no effect beside --recipe: the recipe says how much is",
    ),
    (2, f"{RUN} --recipe none.yaml", "cannot read recipe none.yaml"),
    (2, f"{RUN} --recipe half.yaml", "recipe half.yaml is not valid YAML"),
    (2, f"{PROFILE} --source nedle", "did you mean 'needle'?"),
    (2, f"{PROFILE} --set profile.draws=0", "profile.draws: "),
    (2, f"{PROFILE} --anchors -1", "profile.anchors"),
    (2, "profile model other", "2 models given, but only one can be profiled; to combine shards, add --merge"),
    (2, "search --budget 25%", "missing argument PROFILE"),
    (2, "search profile --classes 0 --budget 25%", "search.classes"),
    (2, "data preview", "no model given"),
    (2, "data preview model --source zzz", "unknown source 'zzz'; it is a generator"),
    (2, "data preview none --set search.trials", "--set 'search.trials' is not KEY=VALUE, such as search.trials=1"),
    (2, "data preview none --set search.classes=null", "such as search.trials=1: it needs a key and a value"),
    (2, "data preview none --set search.tirals=3", "options: unknown key 'search.tirals'; did you mean 'trials'?"),
    (2, "data preview none --set seed.trials=3", "options: seed is a value, not a section; it has no key 'trials'"),
    (2, "data preview none --set search.trials=many", "options: search.trials: Input should be a valid integer"),
    (2, "recipe validate typo.yaml", "did you mean 'budget'?"),
    (2, "recipe validate task.yaml", "unknown task 'needle-nose'"),
    (1, "recipe validate text.yaml", "cannot read nowhere.txt"),
    (1, "recipe show empty", "holds no recipe.json"),
    (2, "recipe show run/model/plan.json", "does not say which recipe it was made with"),
    (2, "heal run -o out --objective klx", "heal.objective"),
    (
        2,
        "heal run -o out --recipe full.yaml --modules o_proj",
        "--modules has no effect without --train lora; give --train",
    ),
    (2, "heal run -o out", "there is no profile beside"),
    (2, "heal model -o out", "is a dense model: it has lost nothing"),
    (2, f"{PROFILE} --tensor-parallel", "splits a model over the processes of torchrun, and there is one"),
    (2, "eval run --tensor-parallel", "splits a model over the processes of torchrun, and there is one"),
    (2, "eval", "missing argument DIR"),
    (2, "eval nothing", "nothing does not exist; give a compressed model, or the folder of a run"),
    (2, "eval model", "is a model but not a compressed one; compress it first"),
    (2, f"{EVAL} --against model", "is a model but not a compressed one"),
    (2, f"{EVAL} --tasks needle-nose", "unknown task 'needle-nose'; did you mean 'needle-noise'"),
    (2, f"{EVAL} --tasks ,", "no tasks given"),
    (2, f"{EVAL} --lm-eval ''", "no tasks of lm-evaluation-harness given"),
    (2, f"{EVAL} --against dense,unifrom", "cannot evaluate against 'unifrom'; did you mean 'uniform'"),
    (1, f"{EVAL} --tasks qa-squad", "qa-squad needs SQuAD's questions"),
    (1, f"{EVAL} --tasks text", "task text needs prose"),
    (1, f"{EVAL} --tasks needle-prose --dry-run", "needs prose"),
    (1, f"{EVAL} --text missing.txt", "cannot read missing.txt"),
    (2, f"{EVAL} --prompts 0", "evaluation.prompts"),
    (2, f"{EVAL} --fail-under exact_mach=0.5", "did you mean 'exact_match'"),
    (2, f"{EVAL} --fail-under key-value:exact_match=0.5", "unknown task 'key-value'"),
    (2, f"{EVAL} --tasks all --fail-under needle-prose:accuracy=0.1", "unknown task"),
    (1, f"{EVAL} --csv run/model/plan.json", "exists already and is not a table of scores"),
    (1, f"{EVAL} --csv empty", "cannot be replaced by a table of scores"),
    (2, f"{EVAL} --csv table.csv -o ./table.csv", "--csv and --out are both"),
    (1, f"{EVAL} --csv prose.txt/table.csv", "is not a folder"),
    (2, "bench run --batch 0", "batch is 0; it must be at least 1"),
    (2, "bench run --batch one", "batch 'one' is not a number of rows"),
    (2, "bench run --batch ,", "no batch given"),
    (2, "bench run --sides plan,dence", "unknown side 'dence'; did you mean 'dense'?"),
    (2, "bench run --dtype float32,int4", "unknown dtype 'int4'"),
    (2, "bench run --dtype float64", "unknown dtype 'float64'"),
    (2, "bench run --sides ,", "no side given"),
    (2, "bench run --tokens 0", "tokens is 0; it must be 1 to 4,096"),
    (2, "bench run --tokens 5000", "tokens is 5000"),
    (2, "bench run --repeats 0", "repeats is 0"),
    (2, "bench run --prefill-repeats -1", "prefill-repeats is -1; it must be at least 0"),
    (2, "bench run --device abacus", "'abacus' is not the name of a torch device"),
    (2, "bench model", "is a model but not a compressed one"),
    (2, "bench nothing", "nothing does not exist; give a compressed model"),
    (2, "bench run --serve --sides dense_best", "unknown side 'dense_best'"),
    (1, "bench run --lengths 1k,8k", "a length of 8,192 tokens was asked for; the model was made for at most 4,096"),
    (1, "bench run --batch 100000000", "would take about"),
    (1, "bench run -o empty", "is a folder; name a file"),
    (2, "bench run --serve --kv-memory much", "size 'much' is not understood"),
    (2, "bench run --serve --kv-memory 10k", "of KV cache under dense, and --kv-memory is 10.0 KiB"),
    (1, "bench run --serve --prompt 100000 --new 8", "the longest request has 100,008 tokens; "),
    (2, "chat model --ask hi", "is a model but not a compressed one"),
    (2, "chat run --json", "--json needs --ask"),
    (2, "convert object.json -o o.json", "give one of --from"),
    (2, "convert object.json --from moa -o o.json", "does not name its model"),
    (1, "convert object.json --from moa --model m -o o.json", "it needs `alphas` and `betas`"),
    (1, "convert nowhere --from duo-attention --model m -o o.json", "config.json"),
    (1, "convert pattern --from duo-attention --model m -o o.json", "it needs `sink_size` and `recent_size`"),
    (1, "convert table --from duo-attention --model m -o o.json", "is no table of numbers"),
    (1, "convert nowhere --to moa -o o.json", "does not exist"),
    (1, "inspect empty", "make a plan with `moacompress search` or `moacompress compress`"),
    (1, "inspect object.json", "not a moacompress plan"),
    (1, "demo -o out --data empty", "make test-data"),
]
PLACES = [
    (1, "search nothing --budget 25%", "there is no profile nothing; make one with `moacompress profile`"),
    (1, "search begun --budget 25%", "is not a profile: it has no profile.json; give begun/profile"),
    (1, "search model --budget 25%", "is not a profile: it has no profile.json; make one with `moacompress profile`"),
    (1, "search half --budget 25%", "profile"),
    (1, f"{RUN} -o model/LICENSE", "cannot write to model/LICENSE: it is not a folder"),
    (1, f"{RUN} -o model/LICENSE/out", "cannot write to model/LICENSE/out: "),
    (1, f"{PROFILE} -o model/LICENSE", "cannot write to model/LICENSE: it is not a folder; choose another one"),
    (1, "export model model -o out", "model holds no plan.json; make a plan with `moacompress search`"),
    (1, "export model zero.json -o out", "plan zero.json is not valid JSON"),
]
DATA = [
    (2, "--tasks needle-nois", "unknown task 'needle-nois'; did you mean 'needle-noise'?"),
    (1, "--tasks needle-prose", "task needle-prose needs prose: give a .txt file or a folder of them as text"),
    (2, "--tasks qa-squad", "moacompress eval OUT --tasks qa-squad --squad FILE"),
    (1, "--text no-such", "cannot read no-such: there is no such file or folder; give its path"),
    (1, "--source empty.jsonl", "file:empty.jsonl has no rows"),
    (1, "--source columns.jsonl", "file:columns.jsonl has the columns a; rows need `messages`"),
    (1, "--source broken.jsonl", "cannot read broken.jsonl: ArrowInvalid: JSON parse error"),
    (1, "--source needle-prose", "calibration.text names no file or folder of it (--text)"),
]
"""What is wrong with a run's data."""
MISSING = (1, "--source none.jsonl", "cannot read none.jsonl: there is no such file or folder; give its path")
WRONG_DATA = [
    *((code, f"{RUN} {wrong}", said) for code, wrong, said in [*DATA, MISSING]),
    *((1, f"{command} {MISSING[1]}", MISSING[2]) for command in (f"{RUN} --dry-run", PROFILE, f"{PROFILE} --dry-run")),
    (1, f"data preview model {MISSING[1]}", MISSING[2]),
]
"""The same of every command that reads it."""
EARLY = [*USAGE, *PLACES, *WRONG_DATA]
"""What is found before a model is loaded."""

MODELS = [
    (1, "compress ./none --budget 25% -o runs/mine", "does not exist"),
    (1, "compress model/config.json --budget 25%", "is neither a model folder nor a .gguf file; give its folder model"),
    (1, "compress empty --budget 25%", "is a folder without config.json, not a model"),
    (1, "compress pickled --budget 25%", "a pickle"),
    (1, "compress lama --budget 25%", "did you mean 'llama'?"),
    (
        1,
        "compress run/model --budget 25%",
        "is compressed already (quantization_config); give the dense model it was made from",
    ),
    (1, "compress named --budget 25%", "not a dense model; give the one that it was made from: somewhere/dense"),
    (
        1,
        "compress unnamed --budget 25%",
        "is the folder of a run, not a dense model; give the one that it was made from",
    ),
    (1, "compress around --budget 25%", "not a dense model; give the one that it was made from: around/dense"),
    (1, "export other run/model/plan.json -o out", "the plan is for other weights"),
    (1, "export shallow run/model/plan.json -o out", "it is for 3 layers, and this model has 2 layers"),
    (2, "export model run/model/plan.json -o out --ranks 3", "which 3 ranks cannot share evenly"),
    (2, "export model run/model/plan.json -o out --ranks 2 --repair profile", "give one of --repair and --ranks"),
    (1, "export model run/model/plan.json -o out --repair empty", "is not a profile"),
    (1, "export model run/model/plan.json -o empty/.. --overwrite", "is not a compressed model; choose another folder"),
    (1, f"{RUN} --lengths 8k", "8,192"),
    (1, f"{COMPRESS} --budget 0.1%", "the smallest takes"),
    (1, f"{COMPRESS} --budget memory=8KiB@800", "as they are"),
    (1, f"{RUN} --source rows.jsonl", "file:rows.jsonl has 0 calibration prompts of"),
    (1, f"{RUN} --source prose.txt", "prose.txt"),
    (1, f"{RUN} --tasks line-lookup --lengths 100", "100"),
    (1, f"{COMPRESS} --budget 0.1% --dry-run", "the smallest takes"),
    (2, f"{PROFILE} --audit 100000", "ask for 1 to "),
    (1, f"{PROFILE} --audit 4 --set budget=0.1%", "ask for at least"),
    (1, f"{PROFILE} --text-samples 3", "text"),
    (1, "profile model -o profile --lengths 800", "holds a profile of another model or recipe"),
    (1, "data preview model --lengths 128", "takes at least"),
    (1, "search profile --budget 0.5% -o small.json", "ask for at least"),
    (1, "search profile --budget 60% -o run/model/plan.json", "--overwrite"),
    *(
        (code, f"search profile --budget 60% -o new.json --storage {storage}", said)
        for code, storage, said in (
            (2, "nowhere", "neither a journal file"),
            (1, "sqlite:////nonexistent/folder/s.db", "cannot use the study storage"),
            (2, "nosuchdb://user:secret@host/x", "nosuchdb://host/x is of no database that searches are shared over"),
            (1, "/proc/nothing/s.journal", "cannot use the study storage"),
            (1, "garbage.journal", "cannot use the study storage"),
        )
    ),
    (1, "eval run --against none --lengths 8k", "8,192 tokens were asked for; the model was made for at most 4,096"),
    (1, f"{EVAL} -o object.json", "object.json exists already and is not an evaluation of this checkpoint"),
    (1, f"{EVAL} --profile profile-of-other --against split", "is of other weights"),
]
"""What a model has to be read for; nothing is timed before it is said."""


@pytest.fixture(scope="module")
def world(
    tiny_folder: Path, place: Path, compressed: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns a folder with all that the commands name."""
    world = tmp_path_factory.mktemp("refusals")
    shutil.copytree(place / "profile", world / "profile")
    for name in ("run", "named", "unnamed", "around"):
        shutil.copytree(compressed, world / name)
    for name in ("model", "pickled", "lama", "around/dense"):
        shutil.copytree(tiny_folder, world / name)
    for name, text in FILES.items():
        (world / name).parent.mkdir(parents=True, exist_ok=True)
        (world / name).mkdir() if name.endswith("/") else (world / name).write_text(text)
    (world / "pickled" / "model.safetensors").rename(world / "pickled" / "pytorch_model.bin")
    config = json.loads((tiny_folder / "config.json").read_text())
    (world / "lama" / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    for name, changes in (("other", {"seed": 9}), ("shallow", {"num_hidden_layers": 2})):
        tiny_model("llama", **changes).save_pretrained(world / name)
        tiny_tokenizer.save_pretrained(world / name)
    answer("profile", world / "other", "-o", world / "profile-of-other", *QUICK.split())
    return world


def contents(folder: Path) -> dict[Path, int]:
    """Returns all that is in a folder, and when each file was written."""
    return {path: path.is_file() and path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(code: int, command: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a command in the folder, which must fail and write nothing, and returns its sentence."""
    monkeypatch.chdir(world)
    before = contents(world)
    done = invoke(*shlex.split(command))
    assert (done.exit_code, done.stdout) == (code, ""), done.output
    assert "Traceback" not in done.stderr
    assert "secret" not in done.output
    said = [line for line in done.stderr.splitlines() if line.startswith("moacompress: error: ")]
    assert len(said) == (not done.stderr.startswith("Usage: ")), done.stderr
    assert contents(world) == before
    return said[0] if said else " ".join(done.stderr.split())


def no_model(*arguments: Any, **options: Any) -> Any:
    """Stands in for what loads a model."""
    pytest.fail("the model was loaded")


@pytest.mark.parametrize(("code", "command", "said"), EARLY, ids=[row[1] for row in EARLY])
def test_what_is_found_before_a_model_is_loaded(
    code: int, command: str, said: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (source, ready_model):
        monkeypatch.setattr(module, "load_source", no_model)
    for module in (runner, benchmark, serve_benchmark):
        monkeypatch.setattr(module, "load_checkpoint", no_model)
    assert said in refused(code, command, world, monkeypatch)


@pytest.mark.parametrize(("code", "command", "said"), MODELS, ids=[row[1] for row in MODELS])
def test_what_a_model_is_read_for(
    code: int, command: str, said: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pipeline, run_estimate):
        monkeypatch.setattr(module, "estimate_run", lambda *arguments: pytest.fail("something was timed"))
    assert said in refused(code, command, world, monkeypatch)


def test_a_package_that_is_not_there_is_named(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moacompress.evaluation.tasks.ruler.is_installed", lambda: False)
    said = refused(2, f"{EVAL} --tasks key-value,niah-single-1", world, monkeypatch)
    assert "task niah-single-1 takes RULER's sentences from lm-evaluation-harness, which is not installed" in said
    assert "`pip install 'moacompress[eval]'`" in said


def test_a_full_disk(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moacompress.core.files.os.fsync", full)
    assert "No space left on device; nothing was changed" in refused(1, RUN, world, monkeypatch)


def test_no_network(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("moacompress.models.hub.can_reach", lambda endpoint: False)
    said = refused(1, "compress nobody/such-a-model --budget 25%", world, monkeypatch)
    assert "cannot be reached" in said
    assert "give a model folder or a .gguf file, or connect to the network" in said


@pytest.mark.parametrize("command", [RUN, PROFILE])
def test_a_folder_that_may_not_be_written(command: str, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).resolve() != world and allowed(path, mode))
    assert "may not be written; choose another folder" in refused(1, command, world, monkeypatch)
