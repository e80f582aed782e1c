"""The layers that a search may share, from a profile's copies: what they cost, which are chosen, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import MoaCompressError, PlanError, RecipeError, UsageError
from moacompress.recipe import Recipe
from moacompress.rules.asked_shares import AskedShares
from moacompress.rules.share import LayerShares, Share
from moacompress.search.search_request import SearchRequest
from moacompress.search.sharing.copy_costs import CopyCosts
from moacompress.search.sharing.share_choice import HOPE, ShareChoice
from tests.search.conftest import make_profile


def copying(profile: Profile, **costs: Any) -> Profile:
    """The profile with these squares of copies, `[layers, anchors, kv_heads, kv_heads]`, in all its samples."""
    size = len(profile.sample_lengths)
    arrays = {name: np.repeat(np.array(value, np.float32)[None], size, 0) for name, value in costs.items()}
    return replace(profile, statistics=Statistics({**profile.statistics.arrays, **arrays}))


def test_copies_cost_what_the_estimator_says() -> None:
    profile = make_profile(anchors=2)
    squares = profile.statistics.arrays["copy_squares"].copy()
    squares[:4] *= np.array([1, 2, 3, 10])[:, None, None, None, None]  # the samples of the shorter length
    kinds = ("answer", "answer", "answer", "text", *("answer",) * 4)
    profile = replace(
        profile, sample_kinds=kinds, statistics=Statistics({**profile.statistics.arrays, "copy_squares": squares})
    )
    once = squares[4] / 2
    found = CopyCosts.of(profile)
    mean = np.mean(np.array([1, 2, 3]) ** 0.75) ** (4 / 3)
    np.testing.assert_allclose(found.influence, once * ((mean + 1) / 2 + 0.5 * 10) / 1.5, rtol=1e-6)
    np.testing.assert_allclose(CopyCosts.of_kind(profile, "answer").influence, once * (mean + 1) / 2, rtol=1e-6)
    table = found.table()
    assert np.isinf(table[0]).all()
    assert np.isinf(table[4]).all()  # another window of its own
    share = found.share(3, 1)
    assert share.anchor == 1
    of_heads = found.influence[3, 1]
    assert share.head_map == tuple(of_heads.argmin(1).tolist())
    assert found.cost((None, None, None, share, None, None)) == pytest.approx(table[3, 1])


def choice_of(profile: Profile, **search: Any) -> ShareChoice | None:
    return ShareChoice.of(
        profile, profile.recipe.override(**{f"search__{name}": value for name, value in search.items()})
    )


def test_layers_that_are_alike_share_and_the_first_do_not() -> None:
    squares = np.ones((6, 2, 2, 2))
    squares[3, 0] = [[0, 1], [1, 0]]  # just as the layer before
    squares[1, 0] = 0  # so is the second, but it is left alone
    squares[5, 1] = [[1, 0.1], [0.1, 1]]
    profile = copying(make_profile(anchors=2), copy_squares=squares)
    found = choice_of(profile, share="1")
    assert found is not None
    assert found.fixed == (None, None, None, Share(2, (0, 1)), None, None)
    assert found.costs.cost(found.fixed) == 0
    by_hand = choice_of(profile, share="layers=1:0")
    assert by_hand is not None
    assert [share and share.anchor for share in by_hand.fixed] == [None, 0, None, None, None, None]
    auto = choice_of(profile, share="auto")
    assert auto is not None
    assert auto.fixed == ()
    assert auto.most(lambda shares: 0.0) == 1
    assert choice_of(profile) is None
    assert choice_of(profile, share=0) is None


def test_more_layers_share_as_long_as_that_may_pay() -> None:
    profile = copying(make_profile(layers=12, anchors=3), copy_squares=np.full((12, 3, 2, 2), 0.5))
    found = choice_of(profile, share="auto")
    assert found is not None
    asked = []

    def saved(most: int, shares: LayerShares) -> float:
        asked.append(sum(share is not None for share in shares))
        return min(asked[-1], most) * 0.5 * 1.001 / HOPE

    assert [found.most(partial(saved, most)) for most in (1, 2, 3, 9)] == [1, 2, 3, 6]
    assert set(asked) == {2, 3, 4, 5, 6}
    assert sum(share is not None for share in found.shares(4)) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sometimes", "write off, auto, a number of layers such as 3"),
        ("-1", "is not understood"),
        ("layers=", "is not understood"),
        ("layers=3:4", "an anchor is an earlier layer"),
        ("layers=3:3", "an anchor is an earlier layer"),
        ("layers=3:2,3:1", "layer 3 is named twice"),
        ("layers=3:2,2:1", "layer 3 cannot share the attention of layer 2, which shares attention itself"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_recipe(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        AskedShares.parse(text)
    with pytest.raises(RecipeError, match=says):
        Recipe.from_dict({"search": {"share": text}})


def test_what_is_asked_for_is_kept_in_its_shortest_form() -> None:
    shortest = {"0": "off", " OFF ": "off", "03": "3", "layers = 9:7, 3:2": "layers=3:2,9:7"}
    for text, short in shortest.items():
        assert Recipe.from_dict({"search": {"share": text}}).search.share == short
    assert Recipe.from_dict({"search": {"share": False}}).search.share == "off"  # `share: off` in YAML
    assert Recipe.from_dict({"search": {"share": 2}}).search.share == "2"


@pytest.mark.parametrize(
    ("anchors", "share", "error", "says"),
    [
        (0, "auto", UsageError, r"no statistics of copies; profile again with --anchors 2 \(profile.anchors"),
        (
            1,
            "layers=3:1",
            UsageError,
            r"layer 1 is 2 before layer 3; profile again with --anchors 2 \(profile.anchors\)",
        ),
        (2, "layers=7:6", UsageError, "layer 7 is to share attention; the model has the layers 0 to 5"),
        (2, "layers=4:3", PlanError, "whose own sliding window is None, not 64"),
        (2, "5", UsageError, "5 layers cannot share: of 6 the first 2 are left alone"),
    ],
)
def test_what_a_profile_or_a_model_does_not_have(
    anchors: int, share: str, error: type[MoaCompressError], says: str
) -> None:
    profile = make_profile(anchors=anchors)
    with pytest.raises(error, match=says):
        SearchRequest.of(profile, "50%", profile.recipe.override(search__share=share))
