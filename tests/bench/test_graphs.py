"""The proof that a compiled step is one graph, and what takes it away; that steps of all sides are is a benchmark's test."""

import torch

from moacompress.bench.graphs import CompiledForward


def proof_of(function):
    forward = CompiledForward(function)
    forward(x=torch.zeros(3))
    forward.begin()
    forward(x=torch.zeros(3))
    return forward, forward.proof()


def test_a_graph_break_is_seen():
    def broken(x):
        more = x + 1
        torch._dynamo.graph_break()
        return more * 2

    _, proof = proof_of(broken)
    assert proof.graph_breaks > 0
    assert "its graph breaks" in proof.problem
    assert proof.graph_calls > proof.steps


def test_a_graph_that_is_made_while_it_is_timed_is_seen():
    forward, proof = proof_of(lambda x: x + 1)
    assert proof.problem is None
    assert (proof.graphs, proof.graph_calls, proof.steps) == (1, 1, 1)
    forward(x=torch.zeros(3, dtype=torch.float64))
    assert forward.proof().problem == "it was compiled again 1 times while it was timed"


def test_a_step_that_runs_uncompiled_is_seen():
    forward = CompiledForward(lambda x: x + 1)
    forward(x=torch.zeros(3))
    forward.begin()
    with torch.compiler.set_stance("force_eager"):
        forward(x=torch.zeros(3))
    assert forward.proof().problem == "1 steps ran 0 graphs, not one each"
