"""Graphs are given to no compiler: what is counted is the same, and it takes no minutes."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch):
    from moacompress.bench import graphs

    monkeypatch.setattr(graphs, "BACKEND", "eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def checkpoint(compressed):
    """Returns the tiny compressed checkpoint, loaded again: what is made of it changes it."""
    from moacompress.runtime.checkpoint import load_checkpoint

    return load_checkpoint(compressed / "model", "float32", "cpu")


@pytest.fixture
def models(checkpoint):
    from moacompress.bench.sides import make_models

    return make_models(checkpoint.model, checkpoint.plan)
