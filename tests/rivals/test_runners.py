"""Engines on tiny models: what a rival is fed, and what is counted of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.rivals.conftest import BENCHMARKS

PROMPT = [(7 * index) % 150 + 4 for index in range(40)]


def job(question_at: int | None = None) -> dict[str, Any]:
    return {"do": "answer", "prompt": PROMPT, "question_at": question_at, "new_tokens": 5, "stop": []}


def greedy(model: Any, tokens: int) -> list[int]:
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_a_model_of_transformers_answers_as_it_does_without_a_cache(
    rivals: SimpleNamespace, tiny_folder: Path, tiny_model: Callable[..., Any]
) -> None:
    from rivals.runners.transformers import make

    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        engine = make({"dense": str(tiny_folder), "threads": 1, **({} if size == 2 else {"dtype": dtype})})
        assert engine.model.dtype == getattr(torch, dtype)
        wanted = greedy(engine.model, 5)
        for question_at in (None, 30):
            found = engine.answer(job(question_at))
            # in 16 bits the best two tokens may be as good as each other, and which is taken is the processor's
            assert found["ids"] == wanted if size == 4 else found["ids"][:2] == wanted[:2]
            assert found["kv_bytes"] == 3 * 2 * (len(PROMPT) + 4) * 2 * 16 * size  # layers, keys and values, heads, dim
            assert found["masked_bytes"] == 0
    stopped = engine.answer({**job(), "stop": wanted[1:2]})
    assert stopped["ids"] == wanted[: wanted.index(wanted[1]) + 1]
    turn = engine.turn({"length": 8, "steps": 3, "seed": 0})
    assert engine.tokens == 12
    assert set(turn) == {"prompt_ms", "step_ms"}


def test_our_checkpoint_answers_as_it_does_without_a_cache(rivals: SimpleNamespace, compressed: Path) -> None:
    from rivals.runners.moacompress import make

    from moacompress.rules.plan import Plan

    engine = make({"checkpoint": str(compressed / "model"), "threads": 1})
    found = engine.answer(job(25))
    assert len(found["ids"]) == 5
    assert found["kv_bytes"] == Plan.load(compressed / "model/plan.json").kv_bytes(len(PROMPT) + 4)
    assert engine.answer(job())["ids"] == found["ids"]


def test_kept_keys_are_found_among_all(rivals: SimpleNamespace) -> None:
    from rivals.runners.kvpress import positions

    keys = torch.randn(9, 4).bfloat16()
    assert positions(keys, keys[[5, 0, 3]]) == [0, 3, 5]
    with pytest.raises(ValueError, match="changes keys"):
        positions(keys, keys[:2] + 1)


def test_a_press_is_used_as_its_pipeline_does(
    rivals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """The whole context is read under the press, and what comes behind keeps the positions of the whole."""
    from contextlib import contextmanager

    import rivals.runners.kvpress as module

    read = []

    class Press:
        def __init__(self, compression_ratio: float) -> None:
            self.ratio = compression_ratio

        @contextmanager
        def __call__(self, model: Any) -> Any:
            forward = model.model.forward

            def seen(*args: Any, **kwargs: Any) -> Any:
                read.append(kwargs["input_ids"].shape[1])
                out = forward(*args, **kwargs)
                for layer in next(value for name, value in kwargs.items() if name != "input_ids").layers:
                    layer.keys, layer.values = layer.keys[:, :, 10:], layer.values[:, :, 10:]
                return out

            model.model.forward = seen
            yield
            model.model.forward = forward

    monkeypatch.setitem(sys.modules, "kvpress", SimpleNamespace(Press=Press))
    engine = module.make({"dense": str(tiny_folder), "threads": 1, "press": "Press", "ratio": 0.5})
    found = engine.answer(job(30))
    assert read == [30]
    assert engine.tokens == len(PROMPT) + 4
    assert found["kv_bytes"] == 3 * 2 * (len(PROMPT) + 4 - 10) * 2 * 16 * 2
    kept = engine.kept({"prompt": PROMPT[:30]})["kept"]
    assert kept == [[list(range(10, 30))] * 2] * 3


def test_openvino_is_asked_for_a_whole_prompt(rivals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its pipeline is told, and that the bytes are those of blocks in use."""
    from rivals.runners.openvino import make

    told: dict[str, Any] = {}

    class Pipeline:
        def __init__(self, model: str, plan: Any, device: str, options: dict[str, Any]) -> None:
            told.update(model=model, plan=plan, options=options)

        def generate(self, prompts: list[Any], wanted: list[Any]) -> list[Any]:
            told.update(prompt=prompts[0].tolist()[0], wanted=wanted[0])
            clock = SimpleNamespace(
                get_ttft=lambda: SimpleNamespace(mean=30.0), get_tpot=lambda: SimpleNamespace(mean=2.0)
            )
            return [SimpleNamespace(m_generation_ids=[[7, 2]], perf_metrics=clock)]

        def get_metrics(self) -> Any:
            return SimpleNamespace(kv_cache_size_in_bytes=1000, cache_usage=25.0)

    genai = SimpleNamespace(
        SchedulerConfig=SimpleNamespace,
        GenerationConfig=SimpleNamespace,
        AggregationMode=SimpleNamespace(NORM_SUM="sum"),
        CacheEvictionConfig=lambda *given: given,
        ContinuousBatchingPipeline=Pipeline,
    )
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=lambda array: array))
    task = {"gguf": "m.gguf", "tokens": 100, "threads": 2, "vocabulary": 9, "precision": "u8", "tokens_kept": 256}
    engine = make(task)
    assert told["options"] == {"KV_CACHE_PRECISION": "u8", "INFERENCE_NUM_THREADS": 2}
    assert told["plan"].num_kv_blocks == 4 + 2
    assert told["plan"].cache_eviction_config == (32, 128, 256, "sum")
    assert engine.answer({**job(), "stop": [2]}) == {"ids": [7, 2], "kv_bytes": 250, "masked_bytes": 0}
    assert told["prompt"] == PROMPT
    assert (told["wanted"].max_new_tokens, told["wanted"].ignore_eos, told["wanted"].eos_token_id) == (5, False, 2)
    assert engine.turn({"length": 8, "steps": 3, "seed": 0}) == {"prompt_ms": 30.0, "step_ms": 2.0}
    assert (len(told["prompt"]), told["wanted"].max_new_tokens, told["wanted"].ignore_eos) == (8, 4, True)
    with pytest.raises(SystemExit, match="with its question"):
        engine.answer(job(30))


def test_onnx_runtime_is_built_once_and_fed_tokens(
    rivals: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folder: Path
) -> None:
    """With scales of the model's own keys and values, which the real builder is handed as a file."""
    import rivals.runners.onnxruntime as module

    fed: list[list[int]] = []
    built: list[list[str]] = []
    asked: list[dict[str, Any]] = []

    class Generator:
        def __init__(self, model: Any, params: Any) -> None:
            fed.clear()

        def append_tokens(self, ids: Any) -> None:
            fed.append(ids.tolist()[0])

        def get_logits(self) -> Any:
            return torch.eye(9)[len(fed)][None, None].numpy()

        def get_output(self, name: str) -> Any:
            return torch.zeros(1, 2, 64, 16, dtype=torch.int8).numpy()

    genai = SimpleNamespace(
        Config=lambda folder: SimpleNamespace(overlay=lambda text: fed.append(json.loads(text))),
        Model=lambda config: config,
        GeneratorParams=lambda model: SimpleNamespace(set_search_options=lambda **options: asked.append(options)),
        Generator=Generator,
    )

    def run(command: list[str], **options: Any) -> None:
        built.append(command)
        folder = Path(command[command.index("-o") + 1])
        config = {"model": {"vocab_size": 9, "context_length": 48, "decoder": {"num_hidden_layers": 3}}}
        (folder / "genai_config.json").write_text(json.dumps(config))

    monkeypatch.setitem(sys.modules, "onnxruntime_genai", genai)
    monkeypatch.setattr(subprocess, "run", run)
    task = {"dense": str(tiny_folder), "dense_key": "key", "folder": str(tmp_path), "scheme": "int8_per_channel"}
    for _ in range(2):
        engine = module.make({**task, "threads": 1, "tokens": 64})
    assert len(built) == 1
    assert "kv_cache_quant_scheme=int8_per_channel" in built[0]
    scales = json.loads((tmp_path / "key-int8_per_channel/scales.json").read_text())["scales"]
    sizes = {name: (len(rows), len(rows[0])) for name, rows in scales.items()}
    assert sizes == {"k_scales": (3, 32), "v_scales": (3, 32)}
    assert all(number > 0 for rows in scales.values() for row in rows for number in row)
    assert engine.answer({**job(), "new_tokens": 2})["ids"] == [2, 3]
    assert fed == [PROMPT[:-1], PROMPT[-1:], [2]]
    assert engine.kv_bytes() == 3 * 2 * (len(PROMPT) + 1) * 2 * 16
    assert [options["max_length"] for options in asked] == [48]  # the model's context, as it refuses more


def test_what_a_library_prints_is_no_answer(rivals: SimpleNamespace, tmp_path: Path) -> None:
    """Through a process, as a rival is run."""
    task = {"threads": 1, "says": [7, 2]}
    with rivals.processes.runner(Path(sys.executable), "fake", "fake:one", task) as process:
        assert process.ready["vocabulary"] == 50
        assert process.do("answer", prompt=[1, 2, 3], question_at=None, new_tokens=4, stop=[2])["ids"] == [7, 2]
        with pytest.raises(rivals.processes.RunnerError, match="does not say which tokens it keeps"):
            process.do("kept", prompt=[1])


@pytest.mark.heavy
def test_a_runner_starts_by_its_name(tiny_folder: Path) -> None:
    """The script that is really started, with a setting that needs nothing but transformers."""
    task = json.dumps({"dense": str(tiny_folder), "threads": 1})
    command = [sys.executable, "-P", str(BENCHMARKS / "rivals/start.py"), "transformers", task]
    done = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["vocabulary"] == 160
