"""What a plan's gates select, beside other scores of tokens at the same budgets, and beside other plans.

    python benchmarks/gate_scores.py MODEL gates=plan.json --others windows=windows.json --tasks needle-prose --prompts 20

The first plan has gates. Its budgets stay as they are, and tokens are scored by

- `gate`: its gates, linear probes of what enters a layer;
- `value-norm`: the norm of a token's value (as in VATP, arXiv 2406.12335);
- `repetition`: the most attention that a token gets as the prompt is read again behind itself, with a request to repeat it (as
  in KVzip, arXiv 2505.23416): the whole prompt must be known, so it cannot be used as tokens come;
- `random`: a random number.

The other plans are run as they are. `kept` is the share of the prompts that the dense model gets right, all tokens of the
answer being the likeliest when the answer is given, that are right too, with its 95% interval; `nll` is that of the answer's
tokens, less the dense model's. Everything is computed in float32. For models with a `v_proj` of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import listed, options  # beside this script
from torch import Tensor, nn

from moacompress.calibration.profile.passes import all_attended
from moacompress.core.statistics import estimate_row, mean, rate
from moacompress.core.tables import estimate_text
from moacompress.evaluation.scoring.result_rows import retained
from moacompress.evaluation.tasks.cases import Case
from moacompress.evaluation.tasks.registry import Resources, make_cases
from moacompress.kernels.gate_scores import rounded_scores
from moacompress.models.modules import attention_modules
from moacompress.models.source import SourceModel, load_source
from moacompress.prompts.pools import Prose
from moacompress.rules.budget import parse_lengths
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach
from moacompress.runtime.gate import TokenGate

SCORES = ("gate", "value-norm", "repetition", "random")
REQUEST = "\n\nRepeat the text above, word for word.\n\n"


class Given(TokenGate):
    """A gate whose scores, `[1, kv_heads, tokens]`, are made elsewhere from what enters the layer, `[1, tokens, inputs]`."""

    def __init__(self, scores: Callable[[Tensor], Tensor]) -> None:
        nn.Module.__init__(self)
        self._scores = scores

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns scores in 1/256, int16."""
        return rounded_scores(self._scores(hidden).float())


def by_value_norm(module: nn.Module, kv_heads: int) -> Callable[[Tensor], Tensor]:
    """Returns the score of a layer's tokens by the logarithm of the norm of their values."""
    project = module.get_submodule("v_proj")

    def scores(hidden: Tensor) -> Tensor:
        value: Tensor = project(hidden).unflatten(-1, (kv_heads, -1))
        norm: Tensor = value.norm(dim=-1)
        return norm.clamp_min(1e-12).log().transpose(1, 2)

    return scores


def repetition_scores(source: SourceModel, ids: Sequence[int]) -> list[Tensor]:
    """Returns of every layer the logarithm of the most attention that tokens get, `[1, kv_heads, tokens]`."""
    between = source.tokenizer(REQUEST, add_special_tokens=False)["input_ids"]
    n, found = len(ids), []
    whole = np.array([*ids, *between, *ids])
    for _, attended in sorted(all_attended(source.model, source.shape, whole).items()):
        query, key = attended.query[0, :, n + len(between) :], attended.key[0]
        heads, again, _ = query.shape
        group = heads // len(key)
        most = torch.zeros(len(key), n)
        for head in range(heads):
            scores = query[head] @ key[head // group].T * attended.spec.scaling
            hidden = torch.ones(again, len(whole), dtype=torch.bool).triu(len(whole) - again + 1)
            weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1)[:, :n].amax(0)
            most[head // group] = torch.maximum(most[head // group], weights)
        found.append(most.clamp_min(1e-12).log()[None])
    return found


def ready(scores: Tensor) -> Callable[[Tensor], Tensor]:
    """Returns the scores of a prompt's tokens; those of the answer behind it get the least."""
    return lambda hidden: nn.functional.pad(scores, (0, hidden.shape[1] - scores.shape[2]), value=-100.0)


def choosing_modules(model: nn.Module) -> list[tuple[int, Any]]:
    """Returns the attention modules that have a gate, each with its layer."""
    modules = enumerate(attention_modules(model))
    return [(layer, module) for layer, module in modules if isinstance(getattr(module, "gate", None), TokenGate)]


def put_scores(source: SourceModel, name: str, case: Case, dense: SourceModel) -> None:
    """Puts gates of some other score on the model under the plan."""
    repeated = repetition_scores(dense, case.prompt_ids) if name == "repetition" else []
    generator = torch.Generator().manual_seed(len(case.prompt_ids))
    for layer, module in choosing_modules(source.model):
        if name == "value-norm":
            module.gate = Given(by_value_norm(module, source.shape.kv_heads))
        elif name == "repetition":
            module.gate = Given(ready(repeated[layer]))
        else:
            size = 1, source.shape.kv_heads, len(case.prompt_ids)
            module.gate = Given(ready(torch.randn(size, generator=generator)))


def answered(model: nn.Module, case: Case) -> tuple[float, float]:
    """Returns whether all tokens of the answer's value are the likeliest as it is given, and their mean NLL."""
    ids = torch.tensor([case.prompt_ids + case.answer_ids])
    values = torch.tensor([index for index, counts in enumerate(case.is_value) if counts])
    with torch.no_grad():
        logits = (
            model(input_ids=ids, use_cache=False, logits_to_keep=len(case.answer_ids) + 1)
            .logits[0, :-1][values]
            .float()
        )
    targets = torch.tensor(case.answer_ids)[values]
    return float((logits.argmax(-1) == targets).all()), float(nn.functional.cross_entropy(logits, targets))


def main() -> None:
    """Runs the benchmark."""
    parser = options(__doc__)
    parser.add_argument("model", help="MODEL, dense")
    parser.add_argument("plan", metavar="NAME=PLAN", help="a plan with gates")
    parser.add_argument("--others", nargs="*", default=[], metavar="NAME=PLAN", help="other plans")
    parser.add_argument(
        "--scores", type=partial(listed, known=SCORES), default=SCORES, help=f"some of {', '.join(SCORES)}"
    )
    parser.add_argument("--tasks", default="needle-prose,needle-prose-uuids,multi-needle-prose", help="with commas")
    parser.add_argument("--lengths", default="1k", help="tokens, with commas")
    parser.add_argument("--prompts", type=int, default=20, help="of each task and length")
    parser.add_argument("--text", type=Path, help="long prose, for the tasks that need it")
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    given = parser.parse_args()
    plans = {named: Plan.load(named.partition("=")[2] or named) for named in (given.plan, *given.others)}
    if not plans[given.plan].selects:
        parser.error(f"{given.plan} has no gates")
    dense, source = (load_source(given.model, dtype="float32") for _ in range(2))
    resources = Resources(prose=Prose.load(given.text) if given.text is not None else None)
    cases = [
        case
        for task in given.tasks.split(",")
        for length in parse_lengths(given.lengths)
        for case in make_cases(task, length, given.prompts, 0, source.tokenizer, resources)
    ]
    truth = [answered(dense.model, case) for case in cases]
    right = [index for index, (correct, _) in enumerate(truth) if correct]
    if not right:
        raise SystemExit(f"the dense model gets none of {len(cases)} prompts right")
    sides = [(given.plan, score) for score in given.scores] + [(other, "") for other in given.others]
    rows = []
    for named, score in sides:
        name, plan = named.partition("=")[0], plans[named]
        found = {}
        for index in right:
            attach(source.model, plan.in_dtype("float32"))
            if score not in ("", "gate"):
                put_scores(source, score, cases[index], dense)
            found[index] = answered(source.model, cases[index])
            detach(source.model)
        rows.append(
            side_row(f"{name} {score}".strip(), plan, [truth[i] for i in right], [found[i] for i in right], cases)
        )
        if not given.json:
            row = rows[-1]
            kept, nll = (estimate_text(row[part]["value"], row[part]["ci95"], ".3f") for part in ("kept", "nll"))
            said = f"{row['share']:.1%} of the bytes; keeps {kept} of {row['right']}; NLL {nll} above dense"
            print(f"{row['side']:24} {said}", flush=True)
    if given.json:
        print(json.dumps({"right": len(right), "prompts": len(cases), "rows": rows}))


def side_row(
    name: str,
    plan: Plan,
    truth: Sequence[tuple[float, float]],
    found: Sequence[tuple[float, float]],
    cases: Sequence[Case],
) -> dict[str, Any]:
    """Returns what is said of one side."""
    n = round(float(np.mean([len(case.prompt_ids) for case in cases])))
    kept = retained([each[0] for each in truth], [each[0] for each in found])
    above = mean([ours[1] - theirs[1] for ours, theirs in zip(found, truth, strict=True)])
    return {
        "side": name,
        "share": plan.kv_bytes(n) / plan.model.dense_kv_bytes(n),
        "kept": estimate_row(*rate(kept)) if kept else None,
        "nll": estimate_row(*above),
        "right": len(found),
    }


if __name__ == "__main__":
    main()
