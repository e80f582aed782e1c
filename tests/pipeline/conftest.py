"""A whole run on a tiny model, which the tests of the pipeline share."""

import pytest
import torch

from moacompress.pipeline import compress
from moacompress.recipe import Recipe


@pytest.fixture(scope="session")
def recipe(tiny_folder, small_run):
    return Recipe.from_dict({**small_run, "model": str(tiny_folder)})


@pytest.fixture(scope="session")
def finished(recipe, tmp_path_factory):
    torch.set_num_threads(1)  # as in the processes below: the last bits of a sum depend on it
    out = tmp_path_factory.mktemp("run") / "out"
    return out, compress(recipe, out)
