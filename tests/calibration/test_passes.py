"""Passes through tiny models of many families: against float64 brute force, with and without keeping activations."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile import passes
from moacompress.calibration.profile.collectors import InfluenceSums
from moacompress.calibration.profile.passes import Recording, Tape, hidden_states, output_logits
from moacompress.calibration.profile.sample_statistics import (
    FisherCotangent,
    cotangent_generator,
    label_cotangent,
    sample_statistics,
)
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.tiles import Collector, TileView
from moacompress.estimate.live_bytes import LiveBytes
from moacompress.models.modules import attention_modules, decoder_layers
from moacompress.models.source import model_shape
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from tests import oracle

MIN_WINDOW = 16
RULES = (Rule.FULL, Rule(4, 16, 0), Rule(16, 40, 0), Rule(64, 0, 300), Rule(4, 20, 200), Rule(16, 110, 0))
TABLE = RuleTable.of(RULES, MIN_WINDOW)
DRAWS = 3
CHOSEN = ProfileRecipe(draws=DRAWS)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 512}
SPECIAL: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm3 without positions in a layer": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "llama3 rotary scaling": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rotary scaling": ("llama", {"rope_parameters": YARN}),
    "granite": ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5}),
    "cohere": ("cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
}
"""Models beside the families of the shared fixture: family and what its config needs beside the common part."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt_oss")
EVERY = (*FAMILIES, *SPECIAL)
SOME = ("llama", "gemma2", "gpt_neox", "gpt_oss", "smollm3 without positions in a layer")

Factory = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def build(tiny_model: Callable[..., PreTrainedModel]) -> Factory:
    """Returns a function that builds one of `EVERY`."""

    def make(name: str, **overrides: Any) -> PreTrainedModel:
        if name not in SPECIAL:
            return tiny_model(name, **overrides)
        family, settings = SPECIAL[name]
        return tiny_model(family, **{**settings, **overrides})

    return make


def random_sample(n: int, answer: int = 12, seed: int = 0) -> Sample:
    ids = np.random.default_rng(seed).integers(3, 150, n)
    return Sample(ids, (np.arange(n) >= n - answer - 3) & (np.arange(n) < n - 3), "random", n)


def statistics(model: PreTrainedModel, sample: Sample, chosen: ProfileRecipe = CHOSEN) -> Statistics:
    return sample_statistics(model, model_shape(model), TABLE, sample, chosen, 0, 0)


def tape_of(model: PreTrainedModel, sample: Sample) -> Tape:
    recording = Recording.of(model_shape(model), TABLE)
    return Tape(model, recording, torch.from_numpy(sample.input_ids), torch.from_numpy(sample.target_rows))


# --- against float64 -------------------------------------------------------------------------------------------------


class Exact(TorchFunctionMode):
    """Lets a float64 model stay in float64 where its code asks for float32 (norms, routers)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        narrows = func is Tensor.float or (func is Tensor.to and torch.float32 in args[1:])
        if narrows and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def double(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a float64 copy. Rotary frequencies stay as they are, so that both models turn by the same angles."""
    wide = copy.deepcopy(model).double()
    for module, own in zip(wide.modules(), model.modules(), strict=True):
        for name, buffer in own.named_buffers(recurse=False):
            if "inv_freq" in name:
                setattr(module, name, buffer.clone())
    if hasattr(wide.config, "_experts_implementation"):
        wide.set_experts_implementation("eager")  # grouped matrix products are not there in float64
    return wide


@dataclass
class Seen:
    """What one attention layer was called with, and what it returned."""

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor
    scaling: float
    softcap: float | None
    sink_logit: Tensor | None
    out: Tensor = field(init=False)

    def attend(self, visible: Tensor) -> Tensor:
        """Returns the plain attention output `[heads, N, head_dim]` over `visible`, `[N, N]`."""
        scores = self.scaling, self.softcap, self.sink_logit
        return oracle.attend(self.query, self.key, self.value, visible & self.visible, *scores)[0]


SEEN: list[Seen] = []


def plain_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    assert attention_mask is not None
    assert query.dtype == torch.float64
    visible = attention_mask[0, 0] > -1
    seen = Seen(query, key, value, visible, kwargs["scaling"], kwargs.get("softcap"), kwargs.get("s_aux"))
    seen.out = seen.attend(torch.ones_like(visible))
    SEEN.append(seen)
    return seen.out.transpose(0, 1)[None], None


AttentionInterface.register("test_plain", plain_attention)
AttentionMaskInterface.register("test_plain", ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def brute_force(model: PreTrainedModel, sample: Sample) -> list[list[Tensor]]:
    """Returns d_i of every draw and layer, `[kv_heads, N, rules]`, of a float64 model: O by masks, dO by autograd."""
    rows = torch.from_numpy(sample.target_rows)
    ids, n = torch.from_numpy(sample.input_ids)[None], len(sample.input_ids)
    SEEN.clear()
    with attention(model, "test_plain"), Exact():
        embeddings = model.get_input_embeddings()(ids).requires_grad_()
        logits = model(inputs_embeds=embeddings, use_cache=False).logits[0, rows]
        cotangents = [
            FisherCotangent(len(rows), cotangent_generator(0, 0, draw))(logits.detach(), slice(0, len(rows)))
            for draw in range(DRAWS)
        ]
        outs = [seen.out for seen in SEEN]
        pulled = [torch.autograd.grad(logits, outs, z, retain_graph=True) for z in cotangents]
    assert logits.dtype == torch.float64
    found = []
    with torch.no_grad():
        for grads in pulled:
            layers = []
            for seen, grad in zip(SEEN, grads, strict=True):
                deltas = [
                    (grad * (seen.attend(oracle.visible(rule, n, MIN_WINDOW)) - seen.out)).sum(-1) for rule in RULES
                ]
                kv_heads = seen.key.shape[1]
                layers.append(torch.stack(deltas, -1).view(kv_heads, -1, n, len(RULES)).sum(1))
            found.append(layers)
    SEEN.clear()
    return found


class Deltas:
    """Keeps every d_i of a layer, `[kv_heads, N, rules]`."""

    def __init__(self, kv_heads: int, n: int) -> None:
        self.values = torch.zeros(kv_heads, n, len(RULES), dtype=torch.float64)

    def add(self, view: TileView) -> None:
        self.values[:, view.rows] = view.deltas.double()


def every_delta(model: PreTrainedModel, sample: Sample) -> list[list[Tensor]]:
    """Returns what `brute_force` does, from the profiler's passes in the model's own dtype."""
    shape, n = model_shape(model), len(sample.input_ids)
    found = []
    with tape_of(model, sample) as tape:
        for draw in range(DRAWS):
            layers = [Deltas(shape.kv_heads, n) for _ in range(shape.layers)]
            cotangent = FisherCotangent(len(sample.target_rows), cotangent_generator(0, 0, draw))
            tape.backward(cotangent, [[layer] for layer in layers], last=draw + 1 == DRAWS)
            found.append([layer.values for layer in layers])
    return found


def worst_error(got: list[list[Tensor]], expected: list[list[Tensor]]) -> float:
    """Returns the largest error of any d_i, as a share of the largest d_i of its draw and layer."""
    pairs = [pair for one, other in zip(got, expected, strict=True) for pair in zip(one, other, strict=True)]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", EVERY)
def test_statistics_are_those_of_float64(build: Factory, name: str) -> None:
    """The formula and the gradients that are passed on are exact: in float64 nothing but rounding is left.

    A smaller initialisation, so that the model itself does not magnify the rounding of its first layer in float32.
    """
    model, sample = build(name, initializer_range=0.1), random_sample(150)
    wide = double(model)
    expected = brute_force(wide, sample)
    with Exact():
        assert worst_error(every_delta(wide, sample), expected) < 1e-10
    assert worst_error(every_delta(model, sample), expected) < 1e-5

    exact = torch.stack([torch.stack(layers) for layers in expected])  # [draws, layers, kv_heads, N, rules]
    found = {key: torch.from_numpy(array).double() for key, array in statistics(model, sample).arrays.items()}
    total, squares = exact.sum(3), exact.square().sum(3).mean(0)
    largest = exact.abs().sum(3).amax((2, 3), keepdim=True)
    assert found["total"].shape == total.shape
    assert float(((found["total"] - total).abs() / largest).max()) < 1e-5
    assert float(((found["squares"] - squares).abs() / squares.amax((1, 2), keepdim=True)).max()) < 1e-5
    assert float(squares[..., 1:5].amin()) > 0  # these rules hide something even in a native window


# --- with and without keeping activations ----------------------------------------------------------------------------


class Pulled:
    """Keeps the cotangents of a layer's rows."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []

    def add(self, view: TileView) -> None:
        self.values.append(view.cotangent.clone())


def gradients(model: PreTrainedModel, sample: Sample) -> list[Tensor]:
    """Returns every cotangent of every layer's attention, and that of the embeddings, of all draws from one tape."""
    shape, ids = model_shape(model), torch.from_numpy(sample.input_ids)
    rows = torch.from_numpy(sample.target_rows)
    first, found = decoder_layers(model)[0], []

    def watch(module: Any, args: Any, kwargs: Any) -> None:
        (args[0] if args else kwargs["hidden_states"]).register_hook(lambda grad: found.append(grad.clone()))

    handle = first.register_forward_pre_hook(watch, with_kwargs=True)
    with tape_of(model, sample) as tape:
        for draw in range(DRAWS):
            layers = [Pulled() for _ in range(shape.layers)]
            tape.backward(label_cotangent(ids[rows + 1] + draw), [[layer] for layer in layers], last=draw + 1 == DRAWS)
            found += [value for layer in layers for value in layer.values]
    handle.remove()
    return found


@pytest.mark.parametrize("name", SOME)
def test_long_samples_run_every_layer_again_and_no_bit_changes(
    build: Factory, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sample = build(name), random_sample(150)
    runs: list[int] = []
    for module in attention_modules(model):
        module.register_forward_pre_hook(lambda *_: runs.append(1))
    monkeypatch.setattr(passes, "KEEP_TOKENS", 150)
    kept = statistics(model, sample)
    assert len(runs) == 3
    pulled = gradients(model, sample)
    runs.clear()
    monkeypatch.setattr(passes, "KEEP_TOKENS", 149)
    assert statistics(model, sample).digest() == kept.digest()
    assert len(runs) == 3 * (1 + DRAWS)
    twice = gradients(model, sample)
    assert len(twice) == len(pulled) > 3 * DRAWS
    assert all(torch.equal(a, b) for a, b in zip(twice, pulled, strict=True))


def test_the_backward_pass_may_run_in_another_thread(build: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "KEEP_TOKENS", 0)
    model, sample = build("gemma2"), random_sample(150)
    shape = model_shape(model)
    sums = [InfluenceSums(shape.kv_heads, len(RULES)) for _ in range(shape.layers)]
    failed: list[BaseException] = []

    def backward(tape: Tape) -> None:
        try:
            cotangent = FisherCotangent(len(sample.target_rows), cotangent_generator(0, 0, 0))
            tape.backward(cotangent, [[one] for one in sums], last=True)
        except BaseException as error:
            failed.append(error)

    with tape_of(model, sample) as tape:
        thread = threading.Thread(target=backward, args=(tape,))
        thread.start()
        thread.join()
    assert not failed
    expected = statistics(model, sample, ProfileRecipe(draws=1)).arrays
    assert np.array_equal(torch.stack([one.total for one in sums]).float().numpy(), expected["total"][0])
    assert np.array_equal(torch.stack([one.squares for one in sums]).float().numpy(), expected["squares"])


# --- the output layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_output_logits_are_the_model_s_own(build: Factory, name: str) -> None:
    model, ids = build(name), torch.from_numpy(random_sample(100).input_ids)[None]
    with torch.no_grad():
        hidden = hidden_states(model, model.get_input_embeddings()(ids))[0]
        assert torch.equal(output_logits(model, hidden), model(ids, use_cache=False).logits[0])
    scaled = getattr(model.config, "logit_scale", None) or getattr(model.config, "logits_scaling", None)
    if scaled is not None:
        head = hidden @ model.get_output_embeddings().weight.T
        assert not torch.allclose(head, output_logits(model, hidden))


@pytest.mark.parametrize("name", ["gemma2", "granite"])
def test_logits_in_chunks_are_those_in_one_piece(build: Factory, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample, sizes = build(name), random_sample(150, answer=20), list[int]()
    chosen = ProfileRecipe(draws=2, baselines=True)

    def counted(*args: Any) -> Tensor:
        sizes.append(len(args[1]))
        return output_logits(*args)

    monkeypatch.setattr(passes, "output_logits", counted)
    whole = statistics(model, sample, chosen)
    assert sizes == [20] * 3
    sizes.clear()
    monkeypatch.setattr(passes, "CHUNK_LOGITS", 3 * 160 + 1)
    chunked = statistics(model, sample, chosen)
    assert sizes == [3, 3, 3, 3, 3, 3, 2] * 3
    for key, array in whole.arrays.items():
        scale = np.abs(array).max(axis=(-1, -2), keepdims=True)
        assert float((np.abs(chunked.arrays[key] - array) / scale).max()) < 1e-5, key


# --- memory ----------------------------------------------------------------------------------------------------------


def live_bytes(model: PreTrainedModel, n: int) -> tuple[int, int]:
    """Returns the bytes that a tape of `n` tokens keeps, and the most that are alive in two passes from it."""
    shape, ids = model_shape(model), torch.from_numpy(random_sample(n).input_ids)
    rows = torch.tensor([n - 2])
    sums: list[list[Collector]] = [[InfluenceSums(shape.kv_heads, len(RULES))] for _ in range(shape.layers)]
    with LiveBytes() as live, Tape(model, Recording.of(shape, TABLE), ids, rows) as tape:
        kept = live.now
        for last in (False, True):
            tape.backward(label_cotangent(ids[rows + 1]), sums, last)
    assert live.now < kept / 10
    return kept, live.peak


def test_a_long_sample_keeps_one_input_a_layer(build: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    n, layers = 256, (3, 7)
    whole = [live_bytes(build("llama", num_hidden_layers=count), n)[0] for count in layers]
    monkeypatch.setattr(passes, "KEEP_TOKENS", 0)
    kept = [live_bytes(build("llama", num_hidden_layers=count), n)[0] for count in layers]
    assert kept[1] - kept[0] == (7 - 3) * n * 64 * 4
    assert whole[1] - whole[0] > 5 * (kept[1] - kept[0])


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_peak_memory_is_linear_in_the_tokens(build: Factory, name: str) -> None:
    """Nothing of tokens x tokens, and of a long sample nothing of layers x all that a layer works with."""
    model = build(name)
    peaks = [live_bytes(model, n)[1] for n in (2048, 3072, 4096)]
    assert peaks[2] < 2.02 * peaks[0]
    assert abs(peaks[2] - 2 * peaks[1] + peaks[0]) < 0.01 * peaks[0]
