"""The real small model finds a needle in the formats made here."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.real
def test_dense_finds_needles(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from moacompress.evaluation.scoring import score_case
    from moacompress.evaluation.tasks import make_cases

    model = AutoModelForCausalLM.from_pretrained(smollm2).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for case in make_cases("needle-noise", 512, 3, 0, tokenizer):
        score = score_case(model, tokenizer, case)
        assert (score.exact_match, score.accuracy) == (1.0, 1.0)
        assert score.nll < 0.2
