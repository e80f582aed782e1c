"""What must stay the same while code is moved: a plan found from a finished profile, and logits of a published plan.

    python tests/golden/record.py

in a checkout prints its record as one line of JSON. `benchmarks/checkouts.py` compares two checkouts by it, to the bit;
`test_golden.py` holds this checkout against the files that lie here. Only what a user would import is imported, so that the
script runs in older and newer checkouts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moacompress.models import SourceModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROFILE = HERE / "profile"
"""A finished profile of `tiny_source`."""
BUDGET = "10%"
PUBLISHED = "docs/plans/smollm2-135m-quarter.json"
"""In a checkout: each reads its own, which may be of an older version."""
DENSE = ROOT / ".cache/smollm2-135m-dense"
"""The model of the published plan, as the tests leave it."""
PROMPT, STEPS, SHOWN = 300, 8, 16
"""Tokens of the prompt, decode steps after it, and how many of the largest logits of each step are recorded."""


def tiny_source(tokenizer: Any = None) -> SourceModel:
    """Returns a tiny Llama, as `load_source` gives a real one; its weights are the same with every version of torch."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moacompress.models import SourceModel, model_shape

    config = LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    drawn = np.random.RandomState(0)  # numpy promises that its stream never changes
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            parameter.copy_(torch.from_numpy(0.2 * drawn.standard_normal(parameter.shape)).to(parameter.dtype))
        else:
            assert "norm" in name
    return SourceModel(model, tokenizer, "tiny", model_shape(model), 4096)


def found_plan() -> dict[str, Any]:
    """Returns the rules of the plan that a search finds from the profile here, and what it measured on the way."""
    import moacompress

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        found = moacompress.find_plan(PROFILE, BUDGET, model=tiny_source(), out=out)
        plan = json.loads(out.read_text("utf-8"))
        explained = json.loads(out.with_suffix(".explain.json").read_text("utf-8"))
    columns = ("sink", "alpha", "beta_q")
    return {
        "min_window": plan["min_window"],
        "layers": [{name: layer[name] for name in columns} for layer in plan["layers"]],
        "stages": [[stage["name"], stage["kept"]] for stage in explained["stages"]],
        "harm": {name: value for name, value in found.harm.items() if value is not None},
    }


def published_logits(model: PreTrainedModel, checkout: Path = ROOT) -> list[torch.Tensor]:
    """Returns the logits of SmolLM2-135M under the published plan: of a prompt's last token, and of each decode step.

    The dense model, in float32, is dense again when this returns. There are `STEPS + 1` tensors `[vocabulary]`.
    """
    import torch

    import moacompress

    ids = torch.from_numpy(np.random.RandomState(0).randint(100, 40_000, (1, PROMPT + STEPS)))
    return logits_under(model, moacompress.Plan.load(checkout / PUBLISHED), ids, STEPS)


def logits_under(model: PreTrainedModel, plan: Any, ids: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Returns the logits of a model under a plan: of a prompt's last token, and of each decode step.

    The dense model is dense again when this returns. Of the ids, `[1, tokens]`, so many as there are steps are fed one by one.
    There are `steps + 1` tensors `[vocabulary]`.
    """
    import torch

    import moacompress

    prompt = ids.shape[1] - steps
    moacompress.attach(model, plan)
    try:
        with torch.no_grad():
            out: Any = model(ids[:, :prompt], logits_to_keep=1)
            logits = [out.logits[0, -1]]
            for at in range(prompt, prompt + steps):
                step: Any = model(ids[:, at : at + 1], cache=out.cache)
                logits.append(step.logits[0, -1])
    finally:
        moacompress.detach(model)
    return logits


def shown_logits(logits: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Returns the largest logits of each step with their token ids, and a digest of all of them."""
    found = []
    for row in logits:
        top = row.topk(SHOWN)
        digest = hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()
        found.append({"tokens": top.indices.tolist(), "logits": top.values.tolist(), "sha256": digest})
    return found


def record(dense: Path, checkout: Path) -> dict[str, Any]:
    """Returns the whole record, of SmolLM2-135M-Instruct in float32 and of what a checkout publishes."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(dense).eval()
    return {"plan": found_plan(), "logits": shown_logits(published_logits(model, checkout))}


def main() -> None:
    """Prints the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dense", type=Path, default=DENSE, help="folder of the dense SmolLM2-135M-Instruct in float32"
    )
    print(json.dumps(record(parser.parse_args().dense, Path.cwd()), sort_keys=True))


if __name__ == "__main__":
    main()
