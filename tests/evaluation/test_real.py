"""The real small model finds needles in the prompts made here, and a published plan keeps what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from moacompress.evaluation.tasks.cases import Case

pytestmark = pytest.mark.real
ROOT = Path(__file__).resolve().parents[2]
PLAN = ROOT / "docs/plans/smollm2-135m-eighth-gates.json"
TASKS = ("needle-noise", "needle-prose", "needle-prose-uuids", "multi-needle-prose")
LENGTH = 768
RIGHT, RETENTION, KL = 0.6, 0.85, 0.02
"""The share of prompts that dense answers, and of those which the plan keeps, at least; nats an answer token, at most."""


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from moacompress.runtime import use_kernels

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval().requires_grad_(False)
    use_kernels(model)
    return model


@pytest.mark.heavy
def test_dense_finds_needles(model: Any, tokenizer: Any) -> None:
    from moacompress.evaluation.scoring.prompts import score_batch
    from moacompress.evaluation.tasks.registry import make_cases

    for case in make_cases("needle-noise", 512, 3, 0, tokenizer):
        score = score_batch(model, tokenizer, [case])[0]
        assert (score.exact_match, score.accuracy) == (1.0, 1.0)
        assert score.nll < 0.2


def read(model: Any, case: Case) -> tuple[int | None, torch.Tensor]:
    """Returns the bytes of a prompt's cache under a plan, and the log-probabilities at the reference answer after it.

    The second is `[answer tokens, vocabulary]`.
    """
    prompt, answer = torch.tensor([case.prompt_ids]), torch.tensor([case.answer_ids])
    with torch.inference_mode():
        first = model(prompt, use_cache=True, logits_to_keep=1)
        held = first.cache.used_bytes() if hasattr(first.cache, "used_bytes") else None
        rest = model(answer[:, :-1], cache=first.cache).logits
    return held, torch.cat((first.logits, rest), 1)[0].log_softmax(-1)


@pytest.mark.parametrize(("prompts", "tasks"), [(2, TASKS[:2]), pytest.param(4, TASKS, marks=pytest.mark.heavy)])
def test_a_published_plan_keeps_what_it_promises(
    prompts: int, tasks: tuple[str, ...], model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """An eighth of the bytes, to the byte, with most right answers kept and little KL, by prefill and cached decode."""
    import moacompress
    from moacompress.demo.smollm2 import articles_to_text
    from moacompress.evaluation.tasks.registry import make_cases
    from moacompress.evaluation.tasks.task import Resources
    from moacompress.prompts.pools import Prose

    articles_to_text(next((ROOT / ".cache").glob("**/squad.json")), tmp_path / "articles")
    resources = Resources(Prose.load(tmp_path / "articles"))
    cases = [case for task in tasks for case in make_cases(task, LENGTH, prompts, 0, tokenizer, resources)]
    dense = [read(model, case)[1] for case in cases]
    plan = moacompress.Plan.load(PLAN)
    moacompress.attach(model, plan)
    rights, kept, kls = 0, 0, list[float]()
    for case, expected in zip(cases, dense, strict=True):
        held, found = read(model, case)
        assert held == plan.kv_bytes(len(case.prompt_ids))
        values = torch.tensor(case.is_value)
        hits: list[bool] = [
            bool((rows.argmax(-1) == torch.tensor(case.answer_ids))[values].all()) for rows in (expected, found)
        ]
        rights, kept = rights + hits[0], kept + all(hits)
        kls.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
    said = f"{kept} of {rights} kept, {sum(kls) / len(kls):.4f} nats"
    assert rights >= RIGHT * len(cases), said
    assert kept >= RETENTION * rights, said
    assert sum(kls) / len(kls) < KL, said
    print(said)
