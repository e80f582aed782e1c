"""The proof that a compiled step is one graph, and what takes it away."""

import pytest
import torch

from moacompress.bench.bench_request import Cell
from moacompress.bench.graphs import CompiledForward
from moacompress.bench.sides import STATIC, DecodeTurn, filled_cache, random_ids


def turn_of(side, models, plan, tokens=3):
    cell = Cell("float32", 96, 2)
    model = models["dense" if side == STATIC else side]
    filled = filled_cache(side, model, plan, cell, tokens, 0, "cpu")
    ids = random_ids((tokens + 1, cell.batch, 1), 160, 0, "cpu")
    return DecodeTurn(CompiledForward(model.forward), filled, ids, cell.length, "cpu")


def proof_of(turn, warm=2):
    for _ in range(warm):
        turn.prepare()
        turn.run()
    turn.forward.begin()
    for _ in range(2):
        turn.prepare()
        turn.run()
    return turn.forward.proof()


@pytest.mark.parametrize("side", [STATIC, "plan", "full_span"])
def test_a_step_is_one_graph(side, models, checkpoint):
    proof = proof_of(turn_of(side, models, checkpoint.plan))
    assert proof.problem is None
    assert (proof.graph_breaks, proof.recompiles) == (0, 0)
    assert proof.steps == proof.graph_calls == 8
    assert proof.graphs <= 2  # a plan's cache counts in Python: the first count, then any


def test_a_graph_break_is_seen(models, checkpoint, monkeypatch):
    mlp = type(models["dense"].model.layers[1].mlp)
    original = mlp.forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return original(self, x)

    monkeypatch.setattr(mlp, "forward", broken)
    proof = proof_of(turn_of(STATIC, models, checkpoint.plan))
    assert proof.graph_breaks > 0
    assert "its graph breaks" in proof.problem
    assert proof.graph_calls > proof.steps


def test_a_graph_that_is_made_while_it_is_timed_is_seen():
    forward = CompiledForward(lambda x: x + 1)
    forward(x=torch.zeros(3))
    forward.begin()
    forward(x=torch.zeros(3))
    assert forward.proof().problem is None
    forward(x=torch.zeros(3, dtype=torch.float64))
    assert forward.proof().problem == "it was compiled again 1 times while it was timed"


def test_a_step_that_runs_uncompiled_is_seen():
    forward = CompiledForward(lambda x: x + 1)
    forward(x=torch.zeros(3))
    forward.begin()
    with torch.compiler.set_stance("force_eager"):
        forward(x=torch.zeros(3))
    assert forward.proof().problem == "1 steps ran 0 graphs, not one each"
