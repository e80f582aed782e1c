"""Programs that know nothing of moacompress load a checkpoint and run it under its plan."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach
from tests.refusals import sentence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STORY = "seven red balls roll over the hill and four come back; " * 4
SECONDS = 300
LOG_PREFIXES = """
import logging

log = logging.getLogger("moacompress.runtime.hf.prefixes")
log.setLevel("DEBUG")
log.addHandler(logging.FileHandler('{}'))
"""
"""What every process of a server is to run first."""


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., PreTrainedModel],
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> tuple[Path, PreTrainedModel, PreTrainedModel]:
    """Returns a compressed checkpoint, its model, and the dense model, which says something else."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    dense, model = tiny_model("llama"), tiny_model("llama")
    plan = Plan.uniform(model_shape(model), Rule(4, 20, 0), min_window=16)
    attach(model, plan).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    plan.save(folder / "plan.json")
    return folder, model, dense


def run(*command: str) -> str:
    """Runs a program outside the repository and returns what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "moacompress: " not in done.stderr
    return done.stdout


def program(name: str) -> str:
    """Returns the path of a program of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def continuation(model: Any, tokenizer: Any, text: str, tokens: int) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.heavy
def test_lm_eval(checkpoint: Any, tmp_path: Path) -> None:
    folder, model, dense = checkpoint
    (tmp_path / "stories.jsonl").write_text(json.dumps({"story": STORY}) + "\n")
    task = {
        "task": "tiny_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "stories.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tiny_text.yaml").write_text(json.dumps(task))
    run(
        *(program("lm_eval"), "--model", "hf", "--model_args", f"pretrained={folder}", "--device", "cpu"),
        *("--tasks", str(tmp_path / "tiny_text.yaml"), "--output_path", str(tmp_path / "out")),
    )
    (results,) = (tmp_path / "out").rglob("results_*.json")
    (found,) = json.loads(results.read_text())["results"].values()
    from transformers import AutoTokenizer

    ids = torch.tensor([[1, *AutoTokenizer.from_pretrained(folder)(STORY)["input_ids"]]])

    def bits(one: Any) -> float:
        logits = one(ids).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        return float(nll) / len(STORY) / 0.6931471805599453

    assert found["bits_per_byte,none"] == pytest.approx(bits(model), rel=1e-4)
    assert bits(model) != pytest.approx(bits(dense), rel=1e-2)


def test_an_adapter(checkpoint: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder, model, dense = checkpoint
    import copy

    from transformers import AutoModelForCausalLM

    ids = torch.arange(200).remainder(150).unsqueeze(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(ids).logits[0, -1]
        without = model(ids).logits[0, -1]
        of_dense = peft.PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "adapter").eval()(ids).logits[0, -1]
        found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for other in (without, of_dense):
        assert (expected - other).abs().max() > 1e-2


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def served(*options: str) -> Iterator[str]:
    """Runs `transformers serve` on loopback and yields its address."""
    port = free_port()
    command = [program("transformers"), "serve", *options, "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--device", "cpu"], cwd="/", env=environment, **streams) as server:
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
            while not _is_up(address):
                assert server.poll() is None, server.stderr and server.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.5)
            yield address
        finally:
            server.terminate()
            server.communicate(timeout=60)


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


needs_a_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")),
    reason="transformers serve needs fastapi, openai and uvicorn",
)


@pytest.mark.heavy
@needs_a_server
def test_the_client_of_a_server_reads_what_is_refused(checkpoint: Any) -> None:
    import openai

    folder, *_ = checkpoint
    why = sentence("a cache by name", "static")
    with served(str(folder), "--compile") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        messages = [{"role": "user", "content": STORY}]
        asked: dict[str, Any] = {"model": str(folder), "messages": messages, "max_tokens": 4}
        with pytest.raises(openai.APIStatusError) as whole:
            client.chat.completions.create(**asked)
        assert (whole.value.status_code, whole.value.body) in ((501, {"detail": why}), (400, {"detail": why}))
        with pytest.raises(openai.APIError) as streamed:
            list(client.chat.completions.create(stream=True, **asked))
        assert streamed.value.body in (why, {"detail": why})
        assert _is_up(address)


@needs_a_server
def test_a_server_answers_and_keeps_prefixes(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole answers and streamed ones in turn, which the dense model would not give."""
    import openai
    from transformers import AutoTokenizer

    folder, model, dense = checkpoint
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(LOG_PREFIXES.format(log))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MOACOMPRESS_PREFIXES", "64MiB")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    with served(str(folder)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

        def ask(messages: list[dict[str, str]], stream: bool) -> str:
            asked: dict[str, Any] = {"model": str(folder), "messages": messages, "max_tokens": 12, "temperature": 0}
            if not stream:
                return str(client.chat.completions.create(**asked).choices[0].message.content)
            chunks = client.chat.completions.create(stream=True, **asked)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        messages, longest = [{"role": "user", "content": STORY}], 0
        for turn in range(3):
            answer = ask(messages, stream=turn % 2 == 1)
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert continuation(model, tokenizer, prompt, 12).startswith(answer)
            if not turn:
                assert not continuation(dense, tokenizer, prompt, 12).startswith(answer)
                assert len(answer) > 3
            kept, *_, length = map(int, re.findall(r"\d+", log.read_text().splitlines()[turn]))
            assert length == len(tokenizer(prompt)["input_ids"])
            assert kept >= longest
            longest = length
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"and then, {turn}?"}]
