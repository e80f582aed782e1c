"""Kept prefixes: a turn of a conversation reads what is new, says what it would say from scratch, and memory is bounded."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share
from moacompress.runtime import PlanCache, attach, detach, keep_prefixes
from moacompress.runtime.cache.kept_prefixes import KeptPrefixes
from moacompress.runtime.compat.alternates import CHUNKS_CONTINUE, cache_argument, returned_cache
from moacompress.runtime.hf.prefixes import LEAST_SHARED
from tests.plan_kinds import KINDS, windows, with_shares
from tests.runtime.forwards import fed

MUCH = 2**30


def generate(model: Any, ids: torch.Tensor, tokens: int = 12, **more: Any) -> list[int]:
    """Returns what a model says to a prompt, `[1, tokens]`, greedy."""
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, **more
    )
    return list(said[0, ids.shape[1] :].tolist())


def prefixes(model: Any) -> KeptPrefixes:
    found: KeptPrefixes = model._moacompress.prefixes
    return found


def joined(*parts: Any) -> torch.Tensor:
    return torch.cat([torch.as_tensor(part).reshape(1, -1) for part in parts], 1)


@pytest.fixture
def pair(model: Any) -> Callable[..., tuple[Any, Any]]:
    """Makes two models under the same plan: one that keeps prefixes, and one that does not."""
    plans = {**KINDS, "copies": lambda made: with_shares(windows(made), (None, None, Share(0, (1, 0))))}

    def make(kind: str = "windows") -> tuple[Any, Any]:
        return keep_prefixes(model(plan=plans[kind]), MUCH), model(plan=plans[kind])

    return make


@pytest.mark.parametrize("kind", ["formats", "gates", "copies"])
def test_a_turn_reads_what_is_new_and_answers_as_from_scratch(kind: str, pair: Any, token_ids: Any) -> None:
    keeping, plain = pair(kind)
    prompt = token_ids(1, 150)
    for turn in range(1, 4):
        with fed(keeping) as counts:
            answer = generate(keeping, prompt)
        if kind != "formats":  # codes are of what was read in other chunks
            assert answer == generate(plain, prompt)
        assert counts[0] == (150 if turn == 1 else 31)  # the last token of an answer was never fed
        prompt = joined(prompt, answer, token_ids(1, 30, seed=turn))
    with fed(keeping) as counts:  # as where a template leaves out thoughts: the prompt before the answer is there
        generate(keeping, joined(prompt[:, :-30], token_ids(1, 40, seed=9)))
    assert counts[0] == 41


def test_a_prompt_that_differs_anywhere_is_read_from_scratch(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair()
    prompt = token_ids(1, 150)
    generate(keeping, prompt)
    for at in (0, LEAST_SHARED - 1):
        other = joined(prompt, token_ids(1, 20, seed=1))
        other[0, at] = (other[0, at] + 1) % 150 + 3
        with fed(keeping) as counts:
            assert generate(keeping, other) == generate(plain, other)
        assert counts[0] == 170


def test_a_text_that_prompts_begin_with(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair("gates")
    beginning = token_ids(1, 160, seed=9)
    read = []
    for seed in range(3):
        prompt = joined(beginning, [seed + 3], token_ids(1, 20, seed=seed))
        with fed(keeping) as counts:
            assert generate(keeping, prompt) == generate(plain, prompt)
        read.append(counts[:2])
    assert read == [[181, 1], [160, 21], [21, 1]]
    for seed, expected in ((5, [100, 100, 11]), (6, [100, 51, 60] if CHUNKS_CONTINUE else [100, 100, 11])):
        prompt = joined(token_ids(1, 151, seed=8), token_ids(1, 60, seed=seed))
        with fed(keeping) as counts:
            assert generate(keeping, prompt, prefill_chunk_size=100) == generate(plain, prompt)
        assert counts[:3] == expected
    prompt = token_ids(1, 150)
    for expected in ([150, 1], [149, 1], [1, 1]):  # a token must be fed to have an answer
        with fed(keeping) as counts:
            assert generate(keeping, prompt) == generate(plain, prompt)
        assert counts[:2] == expected


def test_an_answer_that_is_broken_off(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair()
    prompt = token_ids(1, 150)

    class Gone:
        left = 6

        def put(self, tokens: torch.Tensor) -> None:
            self.left -= 1
            if not self.left:
                raise ConnectionError("the client has gone")

        def end(self) -> None:
            raise AssertionError

    with pytest.raises(ConnectionError):
        generate(keeping, prompt, streamer=Gone())
    answer = generate(plain, prompt)
    again = joined(prompt, answer[:5], token_ids(1, 9, seed=1))
    with fed(keeping) as counts:
        assert generate(keeping, again) == generate(plain, again)
    assert counts[0] == 10
    broken = keeping.get_decoder().layers[1].register_forward_pre_hook(lambda *given: 1 / 0)
    again = joined(again, token_ids(1, 9, seed=2))
    with pytest.raises(ZeroDivisionError):  # in the midst of a forward
        generate(keeping, again)
    broken.remove()
    assert generate(keeping, again) == generate(plain, again)


def test_several_conversations_in_threads(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair("gates")
    beginning = token_ids(1, 60, seed=50)
    wrong: list[Any] = []

    def talk(number: int) -> None:
        prompt = joined(beginning, token_ids(1, 50 + number, seed=number))
        for turn in range(3):
            answer = generate(keeping, prompt)
            if answer != generate(plain, prompt):
                wrong.append((number, turn))
            prompt = joined(prompt, answer, token_ids(1, 20, seed=number + turn))

    generate(keeping, beginning)
    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(prefixes(keeping)) == 2 + 4 * 3 * 2


def test_other_calls_are_as_before(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair()
    prompt = token_ids(1, 40)
    holes = torch.ones_like(prompt)
    holes[0, :5] = 0
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (token_ids(2, 40), {}),
        (prompt, {"num_beams": 3}),
        (prompt, {"num_beams": 2, "num_return_sequences": 2}),
        (prompt, {"attention_mask": holes}),
        (prompt, {"use_cache": False}),
        (prompt, {"prompt_lookup_num_tokens": 3}),
        (prompt, {"position_ids": torch.arange(7, 47).unsqueeze(0)}),
    ]
    for ids, options in calls:
        said = [model.generate(ids, max_new_tokens=6, eos_token_id=None, **options) for model in (keeping, plain)]
        assert torch.equal(*said), options
    own = returned_cache(keeping(prompt, use_cache=True))
    keeping.generate(joined(prompt, token_ids(1, 5)), max_new_tokens=4, **cache_argument(own))
    assert len(prefixes(keeping)) == 0
    torch.manual_seed(0)
    sampled = keeping.generate(prompt, max_new_tokens=6, do_sample=True, top_k=20)
    torch.manual_seed(0)
    assert torch.equal(sampled, plain.generate(prompt, max_new_tokens=6, do_sample=True, top_k=20))
    assert len(prefixes(keeping)) == 2


def test_weights_that_change_and_autocast_are_noticed(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair()
    prompt = token_ids(1, 60)
    generate(keeping, prompt)
    prompt = joined(prompt, token_ids(1, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(keeping, prompt) == generate(plain, prompt)
    for model in (keeping, plain):
        model.get_decoder().layers[0].mlp.down_proj.weight.mul_(-1.5)
    assert generate(keeping, prompt) == generate(plain, prompt)
    assert [len(kept.tokens) for kept in prefixes(keeping)._kept] == [69, 80]


def test_keys_that_depend_on_the_length_are_refused(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(rope_parameters=rotary)
    plan = KINDS["windows"](model)
    with pytest.raises(UnsupportedError, match="rotary embeddings of the type 'dynamic'"):
        keep_prefixes(attach(model, plan), MUCH)
    detach(model)
    monkeypatch.setenv("MOACOMPRESS_PREFIXES", "1MiB")
    with pytest.raises(UnsupportedError, match="leave keep_prefixes and MOACOMPRESS_PREFIXES out"):
        attach(model, plan)


def test_memory_is_bounded_and_given_back(pair: Any, token_ids: Any) -> None:
    keeping, plain = pair()
    generate(keeping, token_ids(1, 300))
    of_one = prefixes(keeping)._kept[-1]
    assert of_one.nbytes == of_one.cache.kv_bytes() == of_one.cache.used_bytes()  # no slack, and nothing shared
    limit = of_one.nbytes * 5 // 2
    keep_prefixes(keeping, limit)
    for seed in range(6):
        generate(keeping, token_ids(1, 300, seed=seed))
        assert 0 < prefixes(keeping).nbytes <= limit
    assert len(prefixes(keeping)) == 2
    assert all(np.array_equal(kept.tokens[:300], token_ids(1, 300, seed=5)[0]) for kept in prefixes(keeping)._kept)
    keep_prefixes(keeping, of_one.nbytes // 2)
    generate(keeping, token_ids(1, 300))
    assert len(prefixes(keeping)) == 0
    assert len(copy.deepcopy(keep_prefixes(keeping, MUCH))._moacompress.prefixes) == 0
    keep_prefixes(keeping, None)
    assert prefixes(keeping) is None
    assert "generate" not in vars(keeping)
    detach(keep_prefixes(plain, MUCH))
    assert "generate" not in vars(plain)
    with pytest.raises(PlanError, match="under no plan|under none"):
        keep_prefixes(plain, MUCH)


def test_the_prefix_used_longest_ago_goes_first(tiny_model: Any) -> None:
    plan = Plan.uniform(model_shape(tiny_model()), Rule(4, 20, 0), min_window=16)
    model = attach(tiny_model(), plan)

    def cache_of(tokens: list[int]) -> PlanCache:
        cache = PlanCache(plan)
        model(torch.tensor([tokens]), cache=cache)
        return cache

    tokens = [np.arange(first, first + 40) for first in (3, 50, 100)]
    caches = [cache_of(each.tolist()) for each in tokens]
    kept = KeptPrefixes(2 * caches[0].compact().kv_bytes())
    kept.keep(tokens[0], caches[0], "w")
    kept.keep(tokens[1], caches[1], "w")
    assert kept.longest(np.append(tokens[0], 9), "w")[0] is not None
    with pytest.raises(UnsupportedError, match="a cache of 40 tokens cannot be kept for 39"):
        kept.keep(tokens[2][:39], caches[2], "w")
    kept.keep(tokens[2], caches[2], "w")
    found = [kept.longest(np.append(each, 9), "w") for each in tokens]
    assert [cache is not None for cache, _ in found] == [True, False, True]
    assert [shared for _, shared in found] == [40, 0, 40]
    assert kept.longest(tokens[0], "w") == (None, 39)
    assert kept.longest(np.append(tokens[0], 9), "others") == (None, 0)
    assert len(kept) == 0


def test_the_environment_asks_for_it(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setenv("MOACOMPRESS_PREFIXES", "1.5MiB")
    assert prefixes(model()).limit == 3 * 2**19
    monkeypatch.delenv("MOACOMPRESS_PREFIXES")
    assert prefixes(model()) is None
