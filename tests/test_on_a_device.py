"""The way of a model on a device that is not there; see `pretend_device`. What it computes is what the CPU does."""

import json
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import moacompress
from moacompress.bench.bench_request import BenchRequest
from moacompress.bench.benchmark import run_bench
from moacompress.calibration.profile.profiler import profile
from moacompress.evaluation.eviction.attention import attending
from moacompress.evaluation.eviction.baseline import PromptBaseline
from moacompress.evaluation.eviction.reading import read_prompt
from moacompress.evaluation.eviction.registry import EVICTIONS
from moacompress.evaluation.eviction.stream_cache import stream_cache
from moacompress.models.source import load_source, model_shape
from moacompress.pipeline import compress
from moacompress.recipe import Recipe
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.cache.layer_cache import PlanCacheLayer
from moacompress.runtime.cache.real_tokens import Chunk
from moacompress.runtime.compat.alternates import cache_argument
from moacompress.search.study import find_plan
from tests import plan_kinds
from tests.conftest import tiny_model
from tests.pretend_device import KIND, as_a_card

PLANS = {
    "formats": lambda model: plan_kinds.random_plan(model_shape(model), 3, formats=True),
    "gates": lambda model: plan_kinds.gated_plan(model, 1),
}


def test_a_cache_waits_once_for_scores(pretend_device):
    """Of a chunk whose tokens compete the host is told the scores, in one copy; of any other it waits for nothing."""
    rules = RuleTable.of([Rule(4, 0, 0, "int8", "int4", select_alpha=9), Rule(4, 0, 512)], 16)
    sizes = (10, 5, 40, 1, 1, 30, 1)
    chunks = [[torch.randn(1, 2, size, 16) for _ in "kv"] for size in sizes]
    scores = [torch.randint(-99, 99, (1, 2, size), dtype=torch.int16) for size in sizes]
    layer, done = PlanCacheLayer(rules), 0
    with pretend_device() as device:
        for chunk, score in zip(chunks, scores, strict=True):
            before, size = len(device.waits), score.shape[-1]
            layer.update(*(part.to(KIND) for part in chunk))
            layer.commit(Chunk(size), score.to(KIND))
            left = [int(rules.tokens_left(np.array([n]))[0, 0]) for n in (done, done + size)]
            done += size
            assert len(device.waits) - before == int(left[1] > left[0]), size


@pytest.mark.parametrize("kernel", ["reference", "triton"])
def test_gradients(kernel, pretend_device, use_backend, monkeypatch):
    """Training under a plan with formats; no kernel of Triton has gradients, and without them it runs."""
    model = tiny_model("llama").requires_grad_()
    plan = PLANS["formats"](model)
    ids = torch.randint(3, model.config.vocab_size, (1, 50))
    moacompress.attach(model, plan)
    model(ids, labels=ids, use_cache=False).loss.backward()
    name, wanted = next((name, part.grad.clone()) for name, part in model.named_parameters() if "q_proj" in name)
    moacompress.detach(model)
    model.zero_grad()
    kernels = as_a_card(monkeypatch, use_backend("triton")) if kernel == "triton" else {}
    with pretend_device():
        model.to(KIND)
        moacompress.attach(model, plan)
        there = ids.to(KIND)
        model(there, labels=there, use_cache=False).loss.backward()
        found = dict(model.named_parameters())[name].grad
        assert found.device.type == KIND
        assert (found.cpu() - wanted).abs().max() < 1e-5
        assert not any(each.launches for each in kernels.values())
        if kernels:
            with torch.no_grad():
                model(there, use_cache=False)
            assert kernels["attend_chunk"].launches


def test_what_fails_on_a_device_fails(pretend_device):
    with pretend_device() as device:
        here, there = torch.ones(3), torch.ones(3, device=KIND)
        with pytest.raises(RuntimeError, match="on the same device"):
            here + there
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert device.waits == []
        assert there.sum().item() == 3
        assert (there * torch.tensor(2.0)).cpu().tolist() == [2, 2, 2]
        assert len(device.waits) == 2
        there[there > 2] = there[there > 0][:0]  # as many as are found
        assert device.waits[2:] == ["aten.index.Tensor", "aten.index_put_.default"]
        there[torch.tensor([0, 2])] = torch.zeros(2, device=KIND)
        assert len(device.waits) == 4
        assert device.doubles == []
        there.double()
        torch.zeros(1, dtype=torch.float64, device=KIND)
        assert len(device.doubles) == 2


@pytest.mark.parametrize("kind", [pytest.param("formats", marks=pytest.mark.heavy), "gates"])
def test_bench(kind, tiny_tokenizer, tmp_path, pretend_device):
    """Steps and prompts of all sides that are not compiled."""
    model = tiny_model("llama")
    plan = PLANS[kind](model)
    moacompress.attach(model, plan).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    sides = ("plan", "full_span", "dense")
    request = BenchRequest(
        (96,), (2,), ("float32",), sides, tokens=2, repeats=1, prefill_repeats=1, peak=False, device=f"{KIND}:0"
    )
    with pretend_device():
        decode, prefill = run_bench(tmp_path, request)["runs"]
    assert decode["kv_bytes_plan"] == plan.kv_bytes(96, 2)
    assert all(row[f"{side}_ms"] > 0 for row in (decode, prefill) for side in sides)
    assert decode["kernel"] == "reference"


def test_known_ways_to_evict(tiny_tokenizer, pretend_device):
    """What they keep of a prompt is what they keep on the CPU."""
    ids = torch.arange(100).remainder(37).add(5).tolist()
    kept = []
    for device in ("cpu", f"{KIND}:0"):
        model = tiny_model("llama")
        with pretend_device() if device != "cpu" else nullcontext(), torch.no_grad():
            reading = read_prompt(model.to(device), tiny_tokenizer, ids)
            prompt = reading.until(80)
            for kind in EVICTIONS.values():
                baseline = kind()
                if isinstance(baseline, PromptBaseline):
                    mask = baseline.allocate(baseline.scores(prompt, baseline.prepare(prompt)), 200, 1)
                    store = reading.kept(mask)
                    kept.append(mask.to("cpu"))
                else:
                    store = stream_cache(baseline, baseline.allocate(200, 1, 3, 2))
                with attending(model):
                    last = model(input_ids=torch.tensor([ids[80:]], device=device), **cache_argument(store)).logits
                kept.append(last.to("cpu"))
    half = len(kept) // 2
    for here, there in zip(kept[:half], kept[half:], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
def test_a_whole_run(tiny_folder, small_run, tmp_path, pretend_device):
    """Profile, search, export, evaluation: the plan is the CPU's, and so is what it keeps."""
    recipe = Recipe.from_dict({**small_run, "model": str(tiny_folder)})
    torch.set_num_threads(1)
    there = compress(recipe, tmp_path / "cpu")
    with pretend_device():
        summary = compress(recipe.override(device=f"{KIND}:0"), tmp_path / "out")
    assert Plan.load(tmp_path / "out" / "plan.json").rules == Plan.load(tmp_path / "cpu" / "plan.json").rules
    assert summary["kv_bytes"] == there["kv_bytes"]


@pytest.mark.heavy
def test_a_plan_is_found_by_a_cards_kernels(tiny_folder, tmp_path, pretend_device, use_backend, monkeypatch):
    """As on a card, with gates, heads and formats: Triton's kernels, and PyTorch's attention for dense passes of a profile."""
    rows, words = tmp_path / "rows.jsonl", "The code of the house by the lake is what we look for in the letters here."
    lines = [json.dumps({"prompt": f"{words} {number:04d}"}) for number in range(40)]
    rows.write_text("\n".join(lines))
    calibration = {"sources": [{"path": str(rows)}], "lengths": [128, 160], "samples": 4, "validation_samples": 2}
    recipe = Recipe.from_dict(
        {
            "model": str(tiny_folder),
            "budget": "50%",
            "calibration": {**calibration, "answer_tokens": 4},
            "profile": {"draws": 1, "heads": True, "gates": True},
            "search": {"trials": 2},
        }
    )
    torch.set_num_threads(1)
    here = _found(recipe, tmp_path / "cpu")
    kernels = as_a_card(monkeypatch, use_backend("triton"))
    with pretend_device():
        there = _found(recipe.override(device=f"{KIND}:0"), tmp_path / "out")
    for one, other in zip(here[:2], there[:2], strict=True):
        assert np.abs(one - other).max() < 1e-3 * np.abs(one).max()
    assert kernels["attend_chunk"].launches
    assert here[2] == there[2]
    assert np.abs(here[3] - there[3]).max() < 0.05


def _found(recipe, folder):
    """Returns influence, squares of sums, the bytes of the plan found, and logits under it."""
    source = load_source(recipe.model, device=recipe.device)
    profiled = profile(source, folder / "profile", recipe)
    plan = find_plan(profiled, recipe=recipe, out=folder / "plan.json", model=source).plan
    model = moacompress.attach(source.model, plan)
    ids = torch.arange(150).remainder(97).add(5)[None].to(recipe.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    estimates = profiled.influence("robust"), (profiled.statistics.arrays["total"] ** 2).mean((0, 1))
    return *estimates, plan.kv_bytes(150), logits.float().cpu().numpy()
