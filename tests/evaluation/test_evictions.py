"""Known ways to evict tokens: every formula against a plain computation, what they keep, and the model under that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moacompress.core.errors import ModelError
from moacompress.evaluation.eviction import stream_cache as stream_cache_module
from moacompress.evaluation.eviction.allocation import best_of_all, best_of_each, even_counts, rounded_counts
from moacompress.evaluation.eviction.attention import MORE, attending
from moacompress.evaluation.eviction.baseline import PromptBaseline, StreamBaseline
from moacompress.evaluation.eviction.key_scores import ExpectedAttention, KeyDiff, later_rotations
from moacompress.evaluation.eviction.kvzip import KVzip
from moacompress.evaluation.eviction.reading import PromptReading, read_prompt
from moacompress.evaluation.eviction.registry import EVICTIONS
from moacompress.evaluation.eviction.stream_cache import stream_cache
from moacompress.evaluation.eviction.window_scores import AdaKV, PyramidKV, SnapKV
from moacompress.runtime.compat.alternates import cache_argument
from tests import oracle
from tests.evaluation.conftest import DIM, KV_HEADS, LAYERS, PROMPTED, STREAMED, logits_after

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tests.evaluation.conftest import Models

Attended = list[tuple[Tensor, Tensor, Tensor]]
Masks = Callable[[int, Tensor, Tensor], Tensor]


@pytest.fixture
def ids() -> list[int]:
    return np.random.default_rng(0).integers(4, 150, 120).tolist()


@pytest.fixture
def reading(model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> PromptReading:
    return read_prompt(model, tiny_tokenizer, ids)


@contextmanager
def by_definition(model: Any, masks: Masks) -> Iterator[Attended]:
    """Has a model attend as the oracle does, under masks by layer, query and key; yields what the layers attend with."""
    found: Attended = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **rest: Any
    ) -> tuple[Tensor, None]:
        found.append((query[0], key[0], value[0]))
        visible = masks(module.layer_idx, query[0], key[0])
        out = oracle.attend(query, key, value, visible, scaling)
        return out.transpose(1, 2).to(value.dtype).contiguous(), None

    with oracle.attends_by(model, attention), torch.no_grad():
        yield found


def all_before(layer: int, query: Tensor, key: Tensor) -> Tensor:
    n = query.shape[1]
    return torch.ones(n, n, dtype=torch.bool).tril()


def plain(model: Any, ids: list[int]) -> Attended:
    """Returns what each layer of the dense model attends with, `[heads, n, dim]`."""
    with by_definition(model, all_before) as attended:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    return attended


def logits_by_definition(model: Any, ids: list[int], masks: Masks) -> Tensor:
    with by_definition(model, masks):
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits


def group_of(query: Tensor, head: int) -> Tensor:
    """Returns the queries of a KV head's group, `[2, n, dim]`."""
    return query[2 * head : 2 * head + 2]


def turned(vectors: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Turns `[heads, n, dim]`: numbers i and i + dim / 2 are a complex number, turned by p * theta^(-2i / dim)."""
    half = vectors.shape[-1] // 2
    angles = positions[:, None].double() * theta ** (-torch.arange(half).double() / half)
    result = torch.complex(vectors[..., :half].double(), vectors[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat([result.real, result.imag], -1)


def scores_of(baseline: PromptBaseline, reading: PromptReading, end: int) -> Tensor:
    prompt = reading.until(end)
    return baseline.scores(prompt, baseline.prepare(prompt))


def prompted(name: str) -> PromptBaseline:
    baseline = EVICTIONS[name]()
    assert isinstance(baseline, PromptBaseline)
    return baseline


def test_snapkv_is_the_smoothed_attention_of_the_last_tokens(
    model: PreTrainedModel, reading: PromptReading, ids: list[int]
) -> None:
    end, window = 70, 8
    found = scores_of(SnapKV(window, kernel=3), reading, end)
    for layer, (query, key, _) in enumerate(plain(model, ids[:end])):
        for head in range(KV_HEADS):
            seen = all_before(layer, query, key)[-window:]
            weights, _ = oracle.weigh(group_of(query, head)[:, -window:], key[head], seen)
            mean = [0.0, *weights.mean((0, 1))[:-window].tolist(), 0.0]
            smooth = [sum(mean[i : i + 3]) / 3 for i in range(end - window)]
            assert found[layer, head, :-window].tolist() == pytest.approx(smooth, rel=1e-3, abs=1e-6)
    last = found[:, :, -window:]
    assert (last > found[:, :, :-window].amax()).all()
    assert (last.diff(dim=-1) > 0).all()


def test_keydiff_is_the_negative_cosine_with_the_mean_key(
    model: PreTrainedModel, reading: PromptReading, ids: list[int]
) -> None:
    found = scores_of(KeyDiff(), reading, 60)
    for layer, (_, key, _) in enumerate(plain(model, ids[:60])):
        for head, keys in enumerate(key.numpy()):
            mean = sum(each / np.linalg.norm(each) for each in keys) / len(keys)
            cosines = [each @ mean / np.linalg.norm(each) / np.linalg.norm(mean) for each in keys]
            assert found[layer, head].tolist() == pytest.approx([-each for each in cosines], rel=1e-3, abs=1e-5)


def test_expected_attention_is_that_of_a_normal_query_at_the_next_positions(
    model: PreTrainedModel, reading: PromptReading, ids: list[int]
) -> None:
    end, future, sinks = 90, 200, 4
    found = scores_of(ExpectedAttention(future), reading, end)
    basis = torch.eye(DIM, dtype=torch.float64)
    turns = [turned(basis[None], torch.full((DIM,), end + step))[0].T for step in range(future)]
    mean_turn = torch.stack(turns).mean(0)
    for layer, (query, key, value) in enumerate(plain(model, ids[:end])):
        unturned = turned(query, -torch.arange(end))[:, sinks:]
        for head in range(KV_HEADS):
            keys = key[head, sinks:].double()
            total = torch.zeros(len(keys), dtype=torch.float64)
            for queries in group_of(unturned, head):
                mean = mean_turn @ queries.mean(0)
                covariance = mean_turn @ torch.cov(queries.T, correction=0) @ mean_turn.T
                raw = torch.stack([torch.exp(k @ mean / math.sqrt(DIM) + k @ covariance @ k / (2 * DIM)) for k in keys])
                total = total + raw / raw.sum() / 2
            expected = total * value[head, sinks:].double().norm(dim=-1)
            torch.testing.assert_close(found[layer, head, sinks:].double(), expected, rtol=2e-3, atol=1e-6)
    assert found[:, :, :sinks].isinf().all()


@pytest.mark.parametrize("known", [2, 40])
def test_later_rotations_go_on_where_the_known_ones_end(known: int) -> None:
    angles = torch.tensor([1.0, 0.1, 0.003]).double()
    at = torch.arange(200)[:, None] * angles
    cos, sin = 1.3 * at.cos().float(), 1.3 * at.sin().float()
    for found, all_of in zip(later_rotations(cos[:known], sin[:known], 100), (cos, sin), strict=True):
        torch.testing.assert_close(found, all_of[known : known + 100], atol=2e-4, rtol=0)


def test_later_rotations_are_rotations_in_16_bits() -> None:
    at = torch.arange(712)[:, None] * torch.logspace(0, -4, 32).double()
    cos, sin = (each.bfloat16().float() for each in (at.cos(), at.sin()))
    later = torch.complex(*later_rotations(cos[:200], sin[:200], 512))
    wanted = torch.complex(at.cos(), at.sin())[200:]
    assert (later.abs() - 1).abs().max() < 0.01
    assert (later - wanted).abs().max() < 0.05


@pytest.mark.parametrize(("chunk", "keeps_template"), [(1000, False), (30, True)])
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
        at = torch.arange(end + len(again))
        seen = ((at < kept) | ((at >= begin) & (at < last)) | (at >= end)) & (at <= at[end:, None])
        for layer, (query, key, _) in enumerate(plain(model, [*read, *again])):
            for head in range(KV_HEADS):
                weights, _ = oracle.weigh(group_of(query, head)[:, end:], key[head], seen)
                most = weights.amax((0, 1))[begin:last].float()
                torch.testing.assert_close(found[layer, head, begin:last], most, rtol=2e-3, atol=1e-6)
    assert found[:, :, :kept].isinf().all()
    assert (found[:, :, kept:first] == 0).all()


def test_kvzip_repeats_all_of_a_prompt_without_a_template(reading: PromptReading) -> None:
    found = scores_of(KVzip(), reading, 60)
    assert found[:, :, :4].isinf().all()
    assert (found[:, :, 4:] > 0).all()


@pytest.mark.parametrize("name", PROMPTED)
def test_masks_keep_exactly_the_bytes_and_the_highest_scores(name: str, reading: PromptReading) -> None:
    baseline = prompted(name)
    scores = scores_of(baseline, reading, 100)
    for entries in (6, 61, 455, 10_000):
        mask = baseline.allocate(scores, entries * 32 + 31, 32)
        assert mask.shape == (LAYERS, KV_HEADS, 100)
        assert int(mask.sum()) == min(entries, scores.numel())
        best, rest = scores.masked_fill(~mask, torch.inf), scores.masked_fill(mask, -torch.inf)
        assert (best.amin(-1) >= rest.amax(-1)).all()


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


@pytest.mark.parametrize("name", PROMPTED)
def test_what_follows_sees_the_kept_tokens_alone(
    name: str, model: PreTrainedModel, reading: PromptReading, ids: list[int]
) -> None:
    end = 90
    baseline = prompted(name)
    mask = baseline.allocate(scores_of(baseline, reading, end), 123, 1)

    def visible(layer: int, query: Tensor, key: Tensor) -> Tensor:
        masks = all_before(layer, query, key).repeat(KV_HEADS, 1, 1)
        masks[:, end:, :end] = mask[layer][:, None]
        return masks

    expected = logits_by_definition(model, ids, visible)[end:]
    found = logits_after(model, ids, end, reading.kept(mask))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    dense = logits_after(model, ids, end, reading.kept(torch.ones_like(mask)))
    assert not torch.allclose(found, dense, atol=1e-2)


def streamed(name: str, room: list[int]) -> Masks:
    """Returns the masks of a method that evicts as it reads, by simulating it with sets."""

    def visible(layer: int, query: Tensor, key: Tensor) -> Tensor:
        n = query.shape[1]
        mask = torch.zeros(KV_HEADS, n, n, dtype=torch.bool)
        for head, size in enumerate(room):
            own: set[int] = set()
            got = torch.zeros(n, dtype=torch.float64)
            for now in range(n):
                if len(own) == size:
                    if name == "streaming-llm":
                        loser = min(at for at in own if at >= min(4, size - 1))
                    else:
                        newest = set(range(now - max(size // 2, 1) + 1, now))
                        loser = min(own - newest, key=lambda at: (float(got[at]), at))
                    own.remove(loser)
                own.add(now)
                mask[head, now, list(own)] = True
                asked = group_of(query, head)[:, now : now + 1]
                got += oracle.weigh(asked, key[head], mask[head, now : now + 1])[0].mean((0, 1))
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
    expected = logits_by_definition(model, ids, streamed(name, room))
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


def test_rows_share_the_prompt(model: PreTrainedModel, reading: PromptReading, ids: list[int]) -> None:
    mask = torch.ones(LAYERS, KV_HEADS, 90, dtype=torch.bool)
    store = reading.kept(mask, mask.roll(1), mask)
    with attending(model):
        for size in (50, 1, 1):
            model(input_ids=torch.tensor([ids[:size]] * 3), use_cache=True, **cache_argument(store))
    assert store.get_seq_length() == 142
    held = {size for pair in store._held for each in pair for size in each.shape[:3]}
    assert held == {1, KV_HEADS, 90 + 3 * (50 + MORE)}


def test_streams_take_turns_with_equal_room() -> None:
    for name in STREAMED:
        baseline = EVICTIONS[name]()
        assert isinstance(baseline, StreamBaseline)
        assert baseline.allocate(103, 5, 3, 2).tolist() == [[4, 4], [3, 3], [3, 3]]


def test_other_families(tiny_model: Models, tiny_tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Every family either scores and answers, or is refused by its attention."""
    for family in ("qwen3", "granite", "phi3", "smollm3", "gpt_neox"):
        model = tiny_model(family)
        reading = read_prompt(model, tiny_tokenizer, ids)
        for name in PROMPTED:
            scores = scores_of(prompted(name), reading, 100)
            assert not scores.isnan().any()
            found = logits_after(model, ids, 100, reading.kept(torch.ones_like(scores, dtype=torch.bool)))
            expected = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 100:]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match="GptOssAttention attends with a softcap, sink logits"):
        read_prompt(tiny_model("gpt_oss"), tiny_tokenizer, ids)
