from __future__ import annotations

import numpy as np

from moacompress.search.predict.search_parameters import SearchParameters
from moacompress.search.predict.surrogate import Surrogate
from tests.search.conftest import make_profile


def test_neutral_parameters_leave_the_surrogate_alone() -> None:
    profile = make_profile()
    surrogate = Surrogate.build(profile.influence("robust"), profile.rules, 32, 512)
    parameters = SearchParameters(6, profile.lengths)
    assert list(parameters.neutral) == ["depth_0", "depth_1", "depth_2", "depth_3", "depth_4", "length_256", "exponent"]
    np.testing.assert_array_equal(parameters.bend(surrogate, parameters.neutral), surrogate.costs())
    bent = parameters.bend(surrogate, {**parameters.neutral, "depth_0": 1.0})
    np.testing.assert_allclose(bent[0], surrogate.costs()[0] * np.e)
    np.testing.assert_array_equal(bent[2:], surrogate.costs()[2:])
    bent = parameters.bend(surrogate, {**parameters.neutral, "exponent": np.log(2), "length_256": np.log(3)})
    np.testing.assert_allclose(bent, surrogate.costs([3, 1]) ** 2)


def test_formats_have_a_parameter_of_their_own() -> None:
    profile = make_profile(formats=True).offering(("int8",))
    surrogate = Surrogate.build(profile.influence("robust"), profile.rules, 32, 512)
    parameters = SearchParameters(6, profile.lengths, formats=True)
    assert set(parameters.neutral) - set(SearchParameters(6, profile.lengths).neutral) == {"precision"}
    np.testing.assert_array_equal(parameters.bend(surrogate, parameters.neutral), surrogate.costs())
    bent = parameters.bend(surrogate, {**parameters.neutral, "precision": np.log(3)})
    np.testing.assert_allclose(bent, surrogate.costs(precision=3.0))
    assert (bent != surrogate.costs()).any()
