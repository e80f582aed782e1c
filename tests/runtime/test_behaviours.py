"""One table of what users of transformers ask of any model, for every family and every kind of plan.

A case is `family x kind of plan x behaviour`. A behaviour is a function in `BEHAVIOURS`, `OF_SOME` or `OF_ONE`; it compares
with the same model without a cache, or as it was before. What plans compute is tested elsewhere (`test_families.py`,
`test_gates.py`, `test_sharing.py`), and single ways at depth in `test_generation.py`, `test_copies.py` and `test_compile.py`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from moacompress.core.errors import UnsupportedError
from moacompress.runtime import attach
from moacompress.runtime.compat.alternates import cache_argument, returned_cache
from tests import plan_kinds
from tests.conftest import TINY, five_layers
from tests.refusals import SENTENCES, sentence
from tests.runtime.forwards import GREEDY, in_parts, logits, plan_of

NEW = 8
"""Tokens that are generated."""
EXACT, FLIPS = 1e-4, 2e-2
"""Largest differences of logits as shares of the largest: of the order of sums, and of codes that it flips by one step."""
SOME = ("llama", "gemma3_text", "gpt_oss")
"""Families that differ most, for behaviours that take long or that a family changes little."""


@dataclass
class Case:
    """A model under a plan, and what it is fed.

    Attributes:
        model: under the plan.
        fresh: makes the same model again.
        exact: whether two ways to the same logits differ by the order of sums alone.
        folder: an empty one.
    """

    model: Any
    fresh: Callable[[], Any]
    exact: bool
    folder: Path

    @property
    def tolerance(self) -> float:
        """Largest difference of logits, as a share of the largest."""
        return EXACT if self.exact else FLIPS

    def ids(self, rows: int = 1, length: int = 60, seed: int = 0) -> torch.Tensor:
        """Random prompts, `[rows, length]`."""
        return torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(seed))

    def generate(self, ids: torch.Tensor, model: Any = None, **given: Any) -> Any:
        """What `generate` gives, with one seed; where samples or beams have to end nowhere."""
        settings = {**GREEDY, "max_new_tokens": NEW, **given}
        settings.setdefault("attention_mask", torch.ones_like(ids))
        torch.manual_seed(0)
        return (model or self.model).generate(ids, **settings)

    def assert_logits(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert (found - expected).abs().max() <= self.tolerance * expected.abs().max()

    def assert_tokens(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        """Rows agree up to the first place where the expected one's two best logits are too near to tell."""
        assert found.shape == expected.shape
        for row, wanted in zip(found, expected, strict=True):
            if torch.equal(row, wanted):
                continue
            at = int((row != wanted).nonzero()[0, 0])
            best = logits(self.model, wanted[None, :at], use_cache=False)[0, -1]
            assert best[row[at]] >= best[wanted[at]] - 2 * self.tolerance * best.abs().max()


def cached_is_uncached(case: Case) -> None:
    ids = case.ids(2, 90)
    case.assert_logits(in_parts(case.model, ids, (50, 1, 1, 30, 1, 7)), logits(case.model, ids, use_cache=False))


def a_cache_is_continued(case: Case) -> None:
    """From the cache that `generate` returned, with more tokens after it, as from scratch."""
    ids = case.ids()
    first = case.generate(ids, return_dict_in_generate=True, max_new_tokens=4)
    longer = torch.cat((first.sequences, case.ids(1, 9, seed=1)), 1)
    case.assert_tokens(case.generate(longer, **cache_argument(returned_cache(first))), case.generate(longer))


def dictionaries_have_all(case: Case) -> None:
    ids = case.ids(2)
    out = case.generate(
        ids, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True
    )
    assert torch.equal(out.sequences, case.generate(ids))
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert [len(step) for step in out.hidden_states] == [case.model.config.num_hidden_layers + 1] * NEW
    for at, (scores, raw) in enumerate(zip(out.scores, out.logits, strict=True)):
        assert torch.equal(scores.argmax(-1), out.sequences[:, ids.shape[1] + at])
        assert scores.shape == raw.shape == (2, 160)
    plain = logits(case.model, out.sequences[:, :-1], use_cache=False)[:, ids.shape[1] - 1 :]
    case.assert_logits(torch.stack(out.logits, 1), plain)


def samples_are_those_without_a_cache(case: Case) -> None:
    ids, given = case.ids(2), {"do_sample": True, "num_return_sequences": 3, "top_k": 20, "max_new_tokens": 4}
    found = case.generate(ids, **given)
    assert found.shape == (6, ids.shape[1] + 4)
    if case.exact:  # a flipped code moves all that is drawn after it
        assert torch.equal(found, case.generate(ids, use_cache=False, **given))


def beams_are_those_without_a_cache(case: Case) -> None:
    ids = case.ids(2)
    given: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "max_new_tokens": 5}
    given["return_dict_in_generate"] = True
    for more in ({}, {"early_stopping": True, "eos_token_id": [5, 9, 77]}, {"do_sample": True}):
        found, plain = (case.generate(ids, use_cache=cached, **{**given, **more}) for cached in (True, False))
        assert len(found.sequences) == len(found.sequences_scores) == len(found.beam_indices) == 4
        if case.exact:
            assert torch.equal(found.sequences, plain.sequences)
            assert torch.allclose(found.sequences_scores, plain.sequences_scores, atol=1e-3)


def drafts_change_nothing(case: Case) -> None:
    """Prompt lookup, and another model that drafts."""
    ids = case.ids(1, 12).repeat(1, 5)
    plain = case.generate(ids, max_new_tokens=20)
    case.assert_tokens(case.generate(ids, max_new_tokens=20, prompt_lookup_num_tokens=4), plain)
    other = case.fresh()
    other.generation_config.num_assistant_tokens = 4
    case.assert_tokens(case.generate(ids, max_new_tokens=20, assistant_model=other), plain)


def padding_changes_nothing(case: Case) -> None:
    """On the left, on the right, and as holes."""
    lengths = (60, 23)
    rows = [case.ids(1, length, seed=length)[0] for length in lengths]
    alone = [logits(case.model, row[None], use_cache=False)[0] for row in rows]
    for start, hole in ((37, 0), (0, 0), (20, 6)):  # of the shorter row, and in the middle of both
        mask, ids = torch.zeros(2, 66, dtype=torch.long), torch.zeros(2, 66, dtype=torch.long)
        for number, row in enumerate(rows):
            at = torch.arange(len(row)) + (start if number else 0)
            at[len(row) // 2 :] += hole
            ids[number, at], mask[number, at] = row, 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        for cached in (True, False):
            found = logits(case.model, ids, attention_mask=mask, position_ids=positions, use_cache=cached)
            for number, expected in enumerate(alone):
                case.assert_logits(found[number, mask[number].bool()], expected)


def embeddings_are_taken_for_ids(case: Case) -> None:
    ids = case.ids(2)
    embedded = case.model.get_input_embeddings()(ids)
    case.assert_logits(logits(case.model, inputs_embeds=embedded), logits(case.model, ids))
    assert torch.equal(case.generate(ids, inputs_embeds=embedded), case.generate(ids))


def copies_go_their_own_way(case: Case) -> None:
    """Of a model that was never asked for hidden states: the hooks by which transformers collects these are not pickled."""
    model, ids = case.fresh(), case.ids()
    expected = case.generate(ids, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(case.generate(ids, twin), expected)
        with torch.no_grad():
            twin.get_output_embeddings().weight.zero_()
        assert torch.equal(case.generate(ids, model), expected)


def embeddings_are_resized(case: Case) -> None:
    """And the model is saved and loaded."""
    model, ids = case.fresh(), case.ids()
    before = logits(model, ids)
    model.resize_token_embeddings(176)
    assert logits(model, ids).shape[-1] == 176
    case.assert_logits(logits(model, ids)[..., :160], before)
    model.resize_token_embeddings(150)
    assert case.generate(ids.clamp(max=149), model).max() < 150
    model.save_pretrained(case.folder)
    loaded = AutoModelForCausalLM.from_pretrained(case.folder)
    assert plan_of(loaded) == plan_of(model)
    case.assert_logits(logits(loaded, ids.clamp(max=149)), logits(model, ids.clamp(max=149)))


def it_trains(case: Case) -> None:
    """Steps lower the loss, layers that run twice have the same gradients, and a trained model generates as it scores."""
    model, ids = case.fresh().requires_grad_(True), case.ids(2, 40)
    weights = [weight for name, weight in model.named_parameters() if "gate" not in name or "gate_proj" in name]

    def gradients() -> list[torch.Tensor]:
        loss = model(ids, labels=ids, use_cache=False).loss
        return [
            loss.detach(),
            *(part for part in torch.autograd.grad(loss, weights, allow_unused=True) if part is not None),
        ]

    model.train()
    once = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twice = gradients()
    model.gradient_checkpointing_disable()
    for one, other in zip(once, twice, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max() + 1e-9
    optimizer = torch.optim.SGD(weights, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model(ids, labels=ids, use_cache=False).loss < once[0]
    trained = Case(model, case.fresh, case.exact, case.folder)
    trained.assert_tokens(trained.generate(ids), trained.generate(ids, use_cache=False))


def it_is_compiled(case: Case) -> None:
    torch._dynamo.reset()
    ids = case.ids(2)
    compiled = torch.compile(case.model, backend="eager", fullgraph=True)
    case.assert_logits(logits(compiled, ids, use_cache=False), logits(case.model, ids, use_cache=False))
    torch._dynamo.reset()


def it_is_exported(case: Case) -> None:
    """A program of a fixed length, without a cache."""
    ids = case.ids(2)
    with torch.no_grad():
        program = torch.export.export(case.model, (ids,), {"use_cache": False}, strict=False)
    case.assert_logits(program.module()(ids, use_cache=False).logits, logits(case.model, ids, use_cache=False))


def what_cannot_be_is_refused(case: Case) -> None:
    """In the exact words of the one list, and the model answers as before."""
    model, ids = case.model, case.ids(2)
    expected = logits(model, ids)

    def refused(of: str, kind: str, call: Callable[[], Any]) -> str:
        with pytest.raises(UnsupportedError) as caught:
            call()
        assert str(caught.value) == sentence(of, kind)
        return of

    given: dict[str, Any] = {"return_dict_in_generate": True}
    caches: list[Any] = [DynamicCache(), StaticCache(config=model.config, max_cache_len=80)]
    met = {
        refused("attention weights", "", lambda: case.generate(ids, output_attentions=True, **given)),
        refused("another attention", "sdpa", lambda: model.set_attn_implementation("sdpa")),
        refused("not causal", "", lambda: model(ids, is_causal=False)),
        refused("packed sequences", "", lambda: model(ids, use_cache=False, cu_seq_lens_q=ids[0, :2])),
        refused("continuous batching", "", lambda: model.generate_batch(inputs=ids.tolist())),
    }
    for cache in caches:
        met.add(refused("another cache", type(cache).__name__, partial(case.generate, ids, **cache_argument(cache))))
    for name in ("static", "offloaded", "quantized", "offloaded_static"):
        met.add(refused("a cache by name", name, partial(case.generate, ids, cache_implementation=name)))
    met.add(
        refused("a ready-made mask", "(2, 1, 60, 60)", lambda: model(ids, attention_mask=torch.zeros(2, 1, 60, 60)))
    )
    model.save_pretrained(case.folder)
    load = AutoModelForCausalLM.from_pretrained
    met.add(refused("another attention when loading", "sdpa", lambda: load(case.folder, attn_implementation="sdpa")))
    elsewhere = {"a way of generating", "another mask", "missing weights"}  # test_refusals.py, test_hostile.py
    assert met == set(SENTENCES) - elsewhere
    case.assert_logits(logits(model, ids), expected)


BEHAVIOURS: tuple[Callable[[Case], None], ...] = (
    cached_is_uncached,
    a_cache_is_continued,
    padding_changes_nothing,
)
"""Of every family."""
OF_SOME: tuple[Callable[[Case], None], ...] = (
    dictionaries_have_all,
    samples_are_those_without_a_cache,
    beams_are_those_without_a_cache,
    drafts_change_nothing,
    embeddings_are_taken_for_ids,
    copies_go_their_own_way,
    embeddings_are_resized,
    it_trains,
    what_cannot_be_is_refused,
)
"""Of the families in `SOME`."""
OF_ONE: tuple[Callable[[Case], None], ...] = (it_is_compiled, it_is_exported)
"""Of one family: a graph takes seconds, and `test_compile.py` has every family's."""


KINDS = (*plan_kinds.KINDS.values(), plan_kinds.shares)


@pytest.fixture(scope="module")
def made(tiny_model: Callable[..., Any]) -> Callable[[str, Any], Any]:
    """Makes a tiny model of a family under a plan of a kind."""

    def make(family: str, kind: Any) -> Any:
        model = tiny_model(family, **(five_layers(family) if kind is plan_kinds.shares else {}))
        return attach(model, kind(model))

    return make


@pytest.fixture(scope="module")
def kept(made: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """As `made`, but each once: for behaviours that leave the model as it was."""
    models: dict[tuple[str, Any], Any] = {}

    def one(family: str, kind: Any) -> Any:
        if (family, kind) not in models:
            models[family, kind] = made(family, kind)
        return models[family, kind]

    return one


OF_FAMILY: dict[str, tuple[Any, Any]] = {
    "llama": (plan_kinds.gates, plan_kinds.shares),
    "gemma3_text": (plan_kinds.formats, plan_kinds.centres),
    "gpt_oss": (plan_kinds.windows, plan_kinds.gates),
}
"""Kinds of plan for what only the families in `SOME` are asked for."""
TABLE = [
    *((family, plan_kinds.gates, behaviour) for family in TINY if family not in SOME for behaviour in BEHAVIOURS),
    *((family, kind, behaviour) for family in SOME for kind in KINDS for behaviour in BEHAVIOURS),
    *((family, kind, behaviour) for family in SOME for kind in OF_FAMILY[family] for behaviour in OF_SOME),
    *((SOME[0], plan_kinds.shares, behaviour) for behaviour in OF_ONE),
]


@pytest.mark.parametrize(
    ("family", "kind", "behaviour"), TABLE, ids=lambda part: part if isinstance(part, str) else part.__name__
)
def test_behaviour(
    family: str,
    kind: Any,
    behaviour: Callable[[Case], None],
    made: Callable[[str, Any], Any],
    kept: Callable[[str, Any], Any],
    tmp_path: Path,
) -> None:
    behaviour(
        Case(
            kept(family, kind),
            lambda: made(family, kind),
            kind not in (plan_kinds.formats, plan_kinds.centres),
            tmp_path,
        )
    )
