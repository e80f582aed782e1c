"""Known ways to evict tokens: every formula against a plain computation, what they keep, and the model under that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from moacompress.core.errors import ModelError
from moacompress.evaluation.eviction import stream_cache as stream_cache_module
from moacompress.evaluation.eviction.allocation import best_of_all, best_of_each, even_counts, rounded_counts
from moacompress.evaluation.eviction.attention import MORE, attending
from moacompress.evaluation.eviction.baseline import PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.key_scores import ExpectedAttention, KeyDiff, later_rotations
from moacompress.evaluation.eviction.kvzip import KVzip
from moacompress.evaluation.eviction.reading import DenseReading, read_prompt
from moacompress.evaluation.eviction.registry import EVICTIONS
from moacompress.evaluation.eviction.stream_cache import stream_cache
from moacompress.evaluation.eviction.streams import H2O, StreamingLLM
from moacompress.evaluation.eviction.window_scores import AdaKV, PyramidKV, SnapKV
from moacompress.runtime.compat.alternates import cache_argument
from tests.evaluation.under_masks import DIM, HEADS, KV_HEADS, LAYERS, PROMPTED, STREAMED, logits_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Build = Callable[..., "PreTrainedModel"]


@pytest.fixture
def model(tiny_model: Build) -> PreTrainedModel:
    """Groups of two query heads."""
    return tiny_model("llama")


@pytest.fixture
def ids(seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(4, 150, 120).tolist()


@pytest.fixture
def reading(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> DenseReading:
    return read_prompt(model, tiny_tokenizer, ids)


@pytest.fixture(params=[0, 1, 2])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@dataclass
class Plain:
    """What a Llama's layer attends with, from its weights and the definitions alone: lists by layer, `[heads, n, dim]`."""

    query: list[Tensor]
    key: list[Tensor]
    value: list[Tensor]
    unturned: list[Tensor]


def turned(vectors: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Turns `[heads, n, dim]`: numbers i and i + dim / 2 are a complex number, turned by p * theta^(-2i / dim)."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    result = torch.complex(vectors[..., :half].double(), vectors[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat([result.real, result.imag], -1)


def plain(model: Any, ids: list[int]) -> Plain:
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    found = Plain([], [], [], [])
    for layer, state in zip(model.model.layers, states, strict=False):
        given, own = layer.input_layernorm(state)[0], layer.self_attn
        query, key, value = (
            part(given).view(len(ids), -1, DIM).transpose(0, 1) for part in (own.q_proj, own.k_proj, own.v_proj)
        )
        at = torch.arange(len(ids))
        found.query.append(turned(query, at))
        found.key.append(turned(key, at))
        found.value.append(value.double())
        found.unturned.append(query.double())
    return found


def weights(query: Tensor, keys: Tensor) -> Tensor:
    """Returns one query's attention to keys, by the definition."""
    raw = torch.tensor([math.exp(float(query @ key) / math.sqrt(DIM)) for key in keys])
    return raw / raw.sum()


def scores_of(baseline: PromptBaseline, reading: DenseReading, end: int) -> Tensor:
    prompt = reading.until(end)
    return baseline.scores(prompt, baseline.prepare(prompt))


def test_snapkv_is_the_smoothed_attention_of_the_last_tokens(
    model: PreTrainedModel, reading: DenseReading, ids: list[int]
) -> None:
    end, window, kernel = 70, 8, 3
    found, by_hand = scores_of(SnapKV(window, kernel), reading, end), plain(model, ids[:end])
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            total = torch.zeros(end - window)
            for own in (2 * head, 2 * head + 1):
                for at in range(end - window, end):
                    row = weights(by_hand.query[layer][own, at], by_hand.key[layer][head, : at + 1])
                    total += row[: end - window]
            total /= 2 * window
            padded = [0.0, *total.tolist(), 0.0]
            smooth = [sum(padded[i : i + 3]) / 3 for i in range(end - window)]
            assert found[layer, head, : end - window].tolist() == pytest.approx(smooth, rel=1e-3, abs=1e-6)
    last = found[:, :, end - window :]
    assert (last > found[:, :, : end - window].amax()).all()
    assert (last.diff(dim=-1) > 0).all()


def test_keydiff_is_the_negative_cosine_with_the_mean_key(
    model: PreTrainedModel, reading: DenseReading, ids: list[int]
) -> None:
    found, by_hand = scores_of(KeyDiff(), reading, 60), plain(model, ids[:60])
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            keys = by_hand.key[layer][head].numpy()
            mean = sum(key / np.linalg.norm(key) for key in keys) / len(keys)
            cosines = [key @ mean / np.linalg.norm(key) / np.linalg.norm(mean) for key in keys]
            assert found[layer, head].tolist() == pytest.approx([-each for each in cosines], rel=1e-3, abs=1e-5)


def test_expected_attention_is_that_of_a_normal_query_at_the_next_positions(
    model: PreTrainedModel, reading: DenseReading, ids: list[int]
) -> None:
    end, future, sinks = 90, 200, 4
    found, by_hand = scores_of(ExpectedAttention(future), reading, end), plain(model, ids[:end])
    basis = torch.eye(DIM, dtype=torch.float64)
    turns = [turned(basis[None], torch.full((DIM,), end + step))[0].T for step in range(future)]
    mean_turn = torch.stack(turns).mean(0)
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            keys, values = by_hand.key[layer][head, sinks:], by_hand.value[layer][head, sinks:]
            total = torch.zeros(len(keys), dtype=torch.float64)
            for own in (2 * head, 2 * head + 1):
                queries = by_hand.unturned[layer][own, sinks:]
                mean = mean_turn @ queries.mean(0)
                covariance = mean_turn @ torch.cov(queries.T, correction=0) @ mean_turn.T
                raw = torch.stack([torch.exp(k @ mean / math.sqrt(DIM) + k @ covariance @ k / (2 * DIM)) for k in keys])
                total += raw / raw.sum() / 2
            expected = total * values.norm(dim=-1)
            torch.testing.assert_close(found[layer, head, sinks:].double(), expected, rtol=2e-3, atol=1e-6)
    assert found[:, :, :sinks].isinf().all()


@pytest.mark.parametrize("known", [2, 5, 40])
def test_later_rotations_go_on_where_the_known_ones_end(known: int) -> None:
    angles = torch.tensor([1.0, 0.1, 0.003]).double()
    at = torch.arange(200)[:, None] * angles
    cos, sin = 1.3 * at.cos().float(), 1.3 * at.sin().float()
    for found, all_of in zip(later_rotations(cos[:known], sin[:known], 100), (cos, sin), strict=True):
        torch.testing.assert_close(found, all_of[known : known + 100], atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_later_rotations_are_rotations_in_16_bits(dtype: torch.dtype) -> None:
    at = torch.arange(712)[:, None] * torch.logspace(0, -4, 32).double()
    cos, sin = (each.to(dtype).float() for each in (at.cos(), at.sin()))
    later = torch.complex(*later_rotations(cos[:200], sin[:200], 512))
    wanted = torch.complex(at.cos(), at.sin())[200:]
    assert (later.abs() - 1).abs().max() < 0.01
    assert (later - wanted).abs().max() < 0.05


@pytest.mark.parametrize(("chunk", "keeps_template"), [(1000, False), (30, False), (30, True)])
def test_kvzip_is_the_most_attention_of_a_repetition(
    chunk: int, keeps_template: bool, model: PreTrainedModel, ids: list[int], tiny_tokenizer: Any
) -> None:
    """The model reads the request, the header of its turn and a chunk: plain attention, over sinks, chunk and repetition."""
    before = 8
    user = "".join(map(chr, np.random.default_rng(ids[0]).integers(33, 126, 70)))
    opening, header = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"

    def tokens(text: str) -> list[int]:
        found: list[int] = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    asked = (
        "\n\nRepeat the previous context exactly.",
        "\n\nRepeat the part of the previous context exactly, starting with",
    )
    read, first = tokens(opening + user), len(tokens(opening))
    assert first > 4
    end, kept = len(read), first if keeps_template else 4
    found = scores_of(KVzip(chunk, before, template=keeps_template), read_prompt(model, tiny_tokenizer, read), end)
    for begin in range(first, end, chunk):
        last = min(begin + chunk, end)
        again = [*tokens(asked[begin > first]), *read[max(begin - before, first) : begin], *tokens(header)]
        again += read[begin:last]
        by_hand = plain(model, [*read, *again])
        for layer in range(LAYERS):
            for head in range(KV_HEADS):
                key = by_hand.key[layer][head]
                most = torch.zeros(last - begin)
                for own in (2 * head, 2 * head + 1):
                    for at in range(end, end + len(again)):
                        seen = torch.cat([key[:kept], key[begin:last], key[end : at + 1]])
                        row = weights(by_hand.query[layer][own, at], seen)
                        most = torch.maximum(most, row[kept : kept + last - begin])
                torch.testing.assert_close(found[layer, head, begin:last], most, rtol=2e-3, atol=1e-6)
    assert found[:, :, :kept].isinf().all()
    assert (found[:, :, kept:first] == 0).all()


def test_kvzip_repeats_all_of_a_prompt_without_a_template(reading: DenseReading) -> None:
    found = scores_of(KVzip(), reading, 60)
    assert found[:, :, :4].isinf().all()
    assert (found[:, :, 4:] > 0).all()


@pytest.mark.parametrize("name", PROMPTED)
@pytest.mark.parametrize("entries", [6, 61, 200, 455, 10_000])
def test_masks_keep_exactly_the_bytes(name: str, entries: int, reading: DenseReading) -> None:
    baseline = EVICTIONS[name]()
    assert isinstance(baseline, PromptBaseline)
    scores = scores_of(baseline, reading, 100)
    mask = baseline.allocate(scores, entries * 32 + 31, 32)
    assert mask.shape == (LAYERS, KV_HEADS, 100)
    assert int(mask.sum()) == min(entries, scores.numel())


def test_even_masks_keep_the_highest_scores(reading: DenseReading) -> None:
    scores = scores_of(KeyDiff(), reading, 100)
    mask = KeyDiff().allocate(scores, 61, 1)
    assert mask.sum(-1).flatten().tolist() == [11, 10, 10, 10, 10, 10]
    for row, kept in zip(scores.flatten(0, 1), mask.flatten(0, 1), strict=True):
        assert set(kept.nonzero().flatten().tolist()) == set(row.argsort(descending=True)[: int(kept.sum())].tolist())


def test_pyramidkv_keeps_less_from_layer_to_layer() -> None:
    """By the paper's numbers: the last layer's part is a beta-th of the mean, the first's twice the mean less that."""
    layers, n, each, window = 11, 1000, 264, 64
    scores = torch.rand(layers, KV_HEADS, n)
    mask = PyramidKV(window, beta=20.0).allocate(scores, each * layers * KV_HEADS, 1)
    counts = mask.sum(-1)
    assert counts[0].tolist() == [window + 390] * 2
    assert counts[-1].tolist() == [window + 10] * 2
    assert counts[:, 0].diff().tolist() == [-38] * 10
    few = PyramidKV(window).allocate(scores, 600 * layers * KV_HEADS, 1).sum(-1)
    assert few[0].tolist() == [n, n]
    assert int(few.sum()) == 600 * layers * KV_HEADS
    small = PyramidKV(window).allocate(scores, 30 * layers * KV_HEADS, 1).sum(-1)
    assert (small == 30).all()


def test_adakv_lets_heads_compete_above_the_safeguard() -> None:
    scores = torch.rand(1, 2, 100, generator=torch.Generator().manual_seed(0))
    scores[0, 0] += 1
    mask = AdaKV(safeguard=0.2).allocate(scores, 80, 1)
    assert mask.sum(-1).tolist() == [[72, 8]]
    for head in range(2):
        best = scores[0, head].argsort(descending=True)[: int(mask[0, head].sum())].tolist()
        assert set(mask[0, head].nonzero().flatten().tolist()) == set(best)
    assert AdaKV(safeguard=0.0).allocate(scores, 80, 1).sum(-1).tolist() == [[80, 0]]


def test_kvzip_shares_among_layers_and_heads() -> None:
    scores = torch.rand(3, 2, 50)
    mask = KVzip().allocate(scores, 77, 1)
    assert scores[mask].amin() >= scores[~mask].amax()


def test_counts_add_up() -> None:
    assert even_counts(11, 4).tolist() == [3, 3, 3, 2]
    assert rounded_counts([1.5, 2.25, 3.25], 7) == [1, 2, 4]
    assert best_of_each(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]]), torch.tensor([1, 2])).tolist() == [
        [False, True, False],
        [True, True, False],
    ]
    assert best_of_all(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), 2).tolist() == [[False, True], [True, False]]


# the model under masks

_VISIBLE: dict[int, Callable[[Tensor, Tensor], Tensor]] = {}


def _by_definition(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **rest: Any
) -> tuple[Tensor, None]:
    """Whole-matrix attention of one row under a mask that may depend on it."""
    key, value = (each.repeat_interleave(2, 1) for each in (key, value))
    raw = query @ key.transpose(2, 3) * scaling
    visible = _VISIBLE[module.layer_idx](raw[0], value[0])
    out = raw.masked_fill(~visible[None], -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2).contiguous(), None


def _always(visible: Tensor, raw: Tensor, value: Tensor) -> Tensor:
    return visible


AttentionInterface.register("eviction_by_definition", _by_definition)
AttentionMaskInterface.register("eviction_by_definition", lambda *args, **kwargs: None)


@torch.no_grad()
def logits_by_definition(model: Any, ids: list[int]) -> Tensor:
    before = model.config._attn_implementation
    model.config._attn_implementation = "eviction_by_definition"
    try:
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        return logits
    finally:
        model.config._attn_implementation = before


@pytest.mark.parametrize("name", PROMPTED)
def test_what_follows_sees_the_kept_tokens_alone(
    name: str, model: PreTrainedModel, reading: DenseReading, ids: list[int]
) -> None:
    end = 90
    baseline = EVICTIONS[name]()
    assert isinstance(baseline, PromptBaseline)
    mask = baseline.allocate(scores_of(baseline, reading, end), 123, 1)
    for layer in range(LAYERS):
        visible = torch.ones(HEADS, len(ids), len(ids), dtype=torch.bool).tril()
        visible[:, end:, :end] = mask[layer].repeat_interleave(2, 0)[:, None]
        _VISIBLE[layer] = partial(_always, visible)
    expected = logits_by_definition(model, ids)[end:]
    found = logits_after(model, ids, end, reading.kept(mask))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    dense = logits_after(model, ids, end, reading.kept(torch.ones_like(mask)))
    assert not torch.allclose(found, dense, atol=1e-2)


def streamed(name: str, room: list[int]) -> Callable[..., Tensor]:
    """Returns the mask of a method that evicts as it reads, by simulating it with sets."""

    def visible(raw: Tensor, value: Tensor) -> Tensor:
        n = raw.shape[1]
        mask = torch.zeros(HEADS, n, n, dtype=torch.bool)
        for head, size in enumerate(room):
            own: set[int] = set()
            got = dict.fromkeys(range(n), 0.0)
            for now in range(n):
                if len(own) == size:
                    if name == "streaming-llm":
                        loser = min(at for at in own if at >= min(4, size - 1))
                    else:
                        newest = set(range(now - max(size // 2, 1) + 1, now))
                        loser = min(own - newest, key=lambda at: (got[at], at))
                    own.remove(loser)
                own.add(now)
                for query in (2 * head, 2 * head + 1):
                    row = torch.full((n,), -torch.inf)
                    row[list(own)] = raw[query, now, list(own)]
                    for at, weight in enumerate(row.softmax(0).tolist()):
                        got[at] += weight / 2
                    mask[query, now, list(own)] = True
        return mask

    return visible


@pytest.mark.parametrize("room", [[20, 20], [13, 12], [3, 2], [1, 1]])
@pytest.mark.parametrize("name", STREAMED)
def test_what_evicts_as_it_reads(
    name: str, room: list[int], model: PreTrainedModel, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_cache_module, "AT_ONCE", 16)
    baseline = EVICTIONS[name]()
    assert isinstance(baseline, StreamBaseline)
    _VISIBLE.update(dict.fromkeys(range(LAYERS), streamed(name, room)))
    expected = logits_by_definition(model, ids)
    store = stream_cache(baseline, torch.tensor([room] * LAYERS))
    found = logits_after(model, ids, 0, store, (50, 1, 30, 1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_positions_alone_decide_as_if_they_were_exchanged_one_by_one(model: PreTrainedModel, ids: list[int]) -> None:
    """With room that differs from layer to layer, and another score of positions than the known one."""

    class Sparse(StreamBaseline):
        """Keeps every third token, and of the others the newest."""

        name = "sparse"

        def scores(self, positions: Tensor, received: Tensor, now: int, room: Tensor) -> Tensor:
            return positions.double() + (positions % 3 == 0) * len(ids)

    class SparseByPosition(Sparse):
        by_position = True

    room = torch.tensor([[7, 30], [30, 8], [200, 7]])
    one_by_one, known = stream_cache(Sparse(), room), stream_cache(SparseByPosition(), room)
    assert type(one_by_one) is not type(known)
    expected, found = (logits_after(model, ids, 0, store, (60, 1, 20, 1)) for store in (one_by_one, known))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_rows_share_the_prompt(model: PreTrainedModel, reading: DenseReading, ids: list[int]) -> None:
    mask = torch.ones(LAYERS, KV_HEADS, 90, dtype=torch.bool)
    store = reading.kept(mask, mask.roll(1), mask)
    with attending(model):
        for size in (50, 1, 1):
            model(input_ids=torch.tensor([ids[:size]] * 3), use_cache=True, **cache_argument(store))
    assert store.get_seq_length() == 142
    held = {size for pair in store._held for each in pair for size in each.shape[:3]}
    assert held == {1, KV_HEADS, 90 + 3 * (50 + MORE)}


def test_streams_take_turns_with_equal_room() -> None:
    assert StreamingLLM().allocate(103, 5, 3, 2).tolist() == [[4, 4], [3, 3], [3, 3]]
    assert H2O().allocate(103, 5, 3, 2).tolist() == [[4, 4], [3, 3], [3, 3]]


def test_other_families(tiny_model: Build, tiny_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Every family either scores and answers, or is refused by its attention."""
    for family in ("qwen2", "qwen3", "granite", "phi3", "olmo2", "smollm3", "gpt_neox"):
        model = tiny_model(family)
        reading = read_prompt(model, tiny_tokenizer, ids)
        for name in PROMPTED:
            baseline = EVICTIONS[name]()
            assert isinstance(baseline, PromptBaseline)
            scores = scores_of(baseline, reading, 100)
            assert not scores.isnan().any()
            found = logits_after(model, ids, 100, reading.kept(torch.ones_like(scores, dtype=torch.bool)))
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 100:]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="GptOssAttention attends with a softcap, sink logits"):
        read_prompt(tiny_model("gpt_oss"), tiny_tokenizer, ids)
