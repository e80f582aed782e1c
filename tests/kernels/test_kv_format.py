"""A format of an installed package: kept by the reference as it says, refused by compiled kernels by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from moacompress.calibration.profile.precision import rotate_quickly, rounding_errors
from moacompress.core.errors import UnsupportedError
from moacompress.kernels import dispatch
from moacompress.kernels.kv_format import KVFormat
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.rounding import rounded
from moacompress.models.source import model_shape
from moacompress.recipe import Recipe
from moacompress.rules import formats
from moacompress.rules.formats import OUTSIDE_CODE, Outside
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.run_checks import check_recipe
from moacompress.runtime import attach
from moacompress.serving.vllm.classes import kv_heads
from tests.runtime.forwards import in_parts, logits


class Coarse(KVFormat):
    """Thirds of a unit between -42 and 42, a byte each, and a byte that says whether all is finite."""

    name, bits = "coarse", 8

    def vector_bytes(self, dim: int, dtype: str) -> int:
        return dim + 1

    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        whole = (vectors.float().nan_to_num(0, 0, 0) * 3).round().clamp(-127, 127) + 127
        finite = vectors.isfinite().all(-1, keepdim=True)
        return torch.cat((whole, finite), -1).to(torch.uint8)

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        found = (kept[:, :dim].float() - 127) / 3
        return found.masked_fill(kept[:, dim:] == 0, torch.nan)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coarse]:
    given = Coarse()
    monkeypatch.setattr(formats, "outside_formats", lambda: {"coarse": Outside(given, OUTSIDE_CODE)})
    yield given
    dispatch.forget()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("dim", [5, 16])
def test_blocks_keep_what_the_format_says(coarse: Coarse, dim: int, values: bool) -> None:
    torch.manual_seed(dim)
    part = KVPart(OUTSIDE_CODE, dim, torch.float32, values)
    assert part.nbytes == 16 * (dim + 1)
    memory, vectors = part.new(4, torch.device("cpu")), torch.randn(50, dim) * 5
    slots = torch.randperm(64)[:50]
    part.write(memory, slots, vectors)
    assert part.fits(memory)
    wanted = coarse.decode(coarse.encode(vectors), dim)
    assert torch.equal(part.read(memory, slots // 16, slots % 16), wanted)
    other, to = part.new(4, torch.device("cpu")), torch.randperm(64)[:50]
    part.move(memory, slots, other, to)
    assert torch.equal(part.read(other, to // 16, to % 16), wanted)


def test_rounding_passes_the_gradient(coarse: Coarse) -> None:
    x = torch.randn(2, 3, 7, 8, requires_grad=True)
    found = rounded(x, [0, OUTSIDE_CODE, 1])
    assert torch.equal(found[:, 0], x[:, 0])
    assert torch.equal(found[:, 1].reshape(-1, 8), coarse.decode(coarse.encode(x[:, 1].reshape(-1, 8).detach()), 8))
    assert not torch.equal(found[:, 2], x[:, 2])
    cotangent = torch.randn_like(x)
    found.backward(cotangent)
    assert torch.equal(torch.as_tensor(x.grad), cotangent)
    nonfinite = torch.full((1, 1, 1, 8), torch.inf)
    assert rounded(nonfinite, [OUTSIDE_CODE]).isnan().all()


def test_a_profile_prices_its_errors(coarse: Coarse) -> None:
    x = torch.randn(3, 9, 16)
    found = rounding_errors(x, (8, coarse))
    wanted = coarse.decode(coarse.encode(x.view(-1, 16)), 16).view(x.shape) - x
    assert torch.allclose(found[1], rotate_quickly(wanted))
    assert torch.equal(found[0], rounding_errors(x, (8,))[0])


def test_a_model_attends_to_what_is_kept(tiny_model: Callable[..., PreTrainedModel], use_backend: Any) -> None:
    use_backend("reference")
    model: Any = tiny_model("llama").double()  # so that no number is rounded to another code in another order of sums
    shape = model_shape(model)
    plan = Plan.uniform(shape, Rule(4, 40, 0, "coarse", "int8"), 32)
    ids = torch.randint(3, 150, (2, 120), generator=torch.Generator().manual_seed(0))
    attach(model, plan)
    assert shape.token_bytes(plan.rules[0][0]) == 16 + 1 + 16 + 4
    whole = logits(model, ids)
    assert torch.allclose(whole, in_parts(model, ids, (77, 43)), atol=1e-3)
    attach(model, Plan.uniform(shape, Rule(4, 40, 0, "native", "int8"), 32))
    assert not torch.allclose(whole, logits(model, ids), atol=1e-3)


def test_compiled_kernels_refuse_it_by_name(tiny_model: Callable[..., PreTrainedModel]) -> None:
    dispatch.forget()
    if dispatch.chosen().name == "reference":
        pytest.skip("the reference runs, which keeps it")
    model: Any = tiny_model("llama")
    plan = Plan.uniform(model_shape(model), Rule(4, 40, 0, "coarse", "native"), 32)
    with pytest.raises(UnsupportedError, match="the format coarse is of an installed package, and the kernel .* keeps"):
        attach(model, plan)
    assert getattr(model, "_moacompress", None) is None
    with pytest.raises(UnsupportedError, match="set MOACOMPRESS_KERNEL=reference"):
        check_recipe(Recipe().override(profile__formats="coarse,int8"))
    with pytest.raises(UnsupportedError, match="vLLM's plugin keeps native, int8, int6, int4 alone"):
        kv_heads(plan, torch.float32)


def test_plans_recipes_and_tables_know_it() -> None:
    recipe = Recipe().override(profile__formats="coarse,int4,int8")
    assert recipe.profile.formats == ("int8", "int4", "coarse")
    assert Recipe().profile.formats == ("int8", "int6", "int4")
    rules = (Rule.FULL, Rule(4, 40, 0, "coarse", "int4"))
    assert RuleTable.of(rules, 32).rules == rules
    assert [Rule.from_list(rule.to_list()) for rule in rules] == list(rules)
    assert formats.at_least_as_exact("native", "coarse")
    assert not formats.at_least_as_exact("int8", "coarse")
    assert not formats.at_least_as_exact("coarse", "int4")


class Wrong(Coarse):
    """Keeps another number of bytes than it says."""

    def vector_bytes(self, dim: int, dtype: str) -> int:
        return dim


class Narrow(Coarse):
    """Decodes to another dtype."""

    def decode(self, kept: torch.Tensor, dim: int) -> torch.Tensor:
        return super().decode(kept, dim).half()


@pytest.mark.parametrize(("kind", "message"), [(Wrong, "encodes 2 vectors as"), (Narrow, "decodes 2 vectors as")])
def test_what_breaks_its_word_is_refused(kind: type[Coarse], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "outside_formats", lambda: {"coarse": Outside(kind(), OUTSIDE_CODE)})
    with pytest.raises(UnsupportedError, match=message):
        rounded(torch.randn(1, 1, 2, 8), [OUTSIDE_CODE])
