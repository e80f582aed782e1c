"""Evaluation of a compressed checkpoint, beside the dense model and uniform windows at the plan's bytes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moacompress.artefacts import fingerprint, read_json, write_json
from moacompress.errors import DataError, InfeasibleBudgetError, ModelError, UsageError
from moacompress.evaluation.ledger import Ledger
from moacompress.evaluation.scoring import Score, score_case
from moacompress.evaluation.stats import Interval, bootstrap_mean, paired_difference, wilson
from moacompress.evaluation.tasks import Case, make_cases, mean_tokens
from moacompress.plan import DTYPE_BYTES, SINKS, Plan
from moacompress.progress import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASELINES = ("dense", "uniform", *(f"uniform:{sink}" for sink in SINKS))
METRICS = ("exact_match", "nll")
SCORE_VERSION = 1
"""Part of every ledger key: raised when the same prompt would be scored in another way."""


@dataclass(frozen=True)
class Contender:
    """A model to be measured on one task and length.

    Attributes:
        name: as in the results; uniform windows of which only the best is reported share one.
        plan: what it runs under, None for dense.
        kv_bytes: at the mean number of tokens of the prompts.
    """

    name: str
    plan: Plan | None
    kv_bytes: int

    @property
    def sink(self) -> int | None:
        """The sink of a uniform window, None for others."""
        return self.plan.rules[0][0].sink if self.plan is not None and self.name != "plan" else None


@dataclass(frozen=True)
class _Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    identity: tuple[str, ...]  # what scores depend on besides plan and prompt


def evaluate(
    target: str | Path,
    *,
    against: Sequence[str] = ("dense", "uniform"),
    tasks: Sequence[str] = ("needle-noise",),
    lengths: Sequence[int] = (1024,),
    prompts: int = 20,
    text: str | Path | None = None,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "cpu",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a compressed model on held-out prompts.

    All models are the same loaded weights, with the plan, without it (dense), or under a uniform window that takes at
    most the plan's KV bytes at the prompts' mean length. `uniform` has the sink that the search found best; where the
    plan does not say, every sink is run and the one with the lowest mean NLL is reported.

    Args:
        target: a compressed checkpoint, or a run's folder with one under `model/`.
        against: what to measure beside the plan: `dense`, `uniform`, `uniform:4`, `uniform:16`, `uniform:64`.
        tasks: names of tasks.
        lengths: prompt lengths, tokens, template and answer included.
        prompts: prompts of each task and length.
        text: file or folder of the prose of prose tasks.
        seed: of prompts and intervals.
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
        device: torch device.
        out: where to write the result as JSON, atomically. Finished scores are kept beside it (`eval.scores.jsonl` for
            `eval.json`) and not computed again.
        progress: told about every score.

    Returns:
        `results`: rows of `model, task, length, metric, value, ci95, prompts, kv_bytes` (and `tokens`, the mean; `sink`
            of a
        uniform window); `exact_match` with Wilson's interval, `nll` in nats a token with a bootstrap interval.
        `differences`: rows of plan minus each other `model`, with paired bootstrap intervals.

    Raises:
        UsageError: `target` is not compressed, an unknown task or baseline, or no prompts.
        DataError: prompts can not be made at a length.
        PlanError, ModelError, ArtefactError: the checkpoint is damaged, or `out` can not be written.
        InfeasibleBudgetError: no uniform window is small enough.
    """
    from moacompress.calibration.generators import find_task
    from moacompress.calibration.pools import Prose

    progress = progress or SILENT
    folder = compressed_folder(Path(target))
    for name in against:
        _check_baseline(name)
    for task in tasks:
        find_task(task)
    if prompts < 1 or not tasks or not lengths:
        raise UsageError(f"nothing to evaluate: {len(tasks)} tasks, {len(lengths)} lengths, {prompts} prompts")
    prose = Prose.load(text) if text is not None else None
    loaded = _load(folder, dtype, device)
    _check_context(loaded.model, lengths)
    cells = [make_cases(t, n, prompts, seed, loaded.tokenizer, prose) for t in tasks for n in lengths]
    fields = [_contenders(loaded.plan, against, mean_tokens(cases)) for cases in cells]
    ledger = Ledger(Path(out).with_name(f"{Path(out).stem}.scores.jsonl") if out is not None else None)
    progress.start("evaluating", sum(len(contenders) * prompts for contenders in fields))
    results: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for cases, contenders in zip(cells, fields, strict=True):
        scored = [(c, _score_all(loaded, c, cases, ledger, progress)) for c in contenders]
        best = _best_of_each_name(scored)
        results += [row for contender, scores in best for row in _result_rows(contender, scores, cases, seed)]
        differences += _difference_rows(best, cases, seed)
    progress.done()
    report = {"results": results, "differences": differences}
    if out is not None:
        write_json(Path(out), report)
    return report


def compressed_folder(target: Path) -> Path:
    """Returns the compressed checkpoint that `target` is or holds under `model/`.

    Raises:
        UsageError: there is none; says what `target` is instead.
    """
    for folder in (target, target / "model"):
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json", "config")
            quantization = config.get("quantization_config") if isinstance(config, dict) else None
            if isinstance(quantization, dict) and quantization.get("quant_method") == "moacompress":
                return folder
            raise UsageError(
                f"{folder} is a model but not a compressed one; compress it first (`moacompress compress {folder} "
                "--budget 25% -o OUT`) and evaluate OUT, which measures the dense model too"
            )
    raise UsageError(f"{target} is no compressed checkpoint and holds none under model/; no config.json was found")


def _check_baseline(name: str) -> None:
    if name not in BASELINES:
        near = difflib.get_close_matches(name, BASELINES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(BASELINES)}"
        raise UsageError(f"can not evaluate against {name!r}; {hint}")


def _check_context(model: PreTrainedModel, lengths: Sequence[int]) -> None:
    context = int(getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", 0) or 0)
    if context and max(lengths) > context:
        raise DataError(
            f"prompts of {max(lengths):,} tokens were asked for; the model was made for at most {context:,}"
        )


def _load(folder: Path, dtype: str, device: str) -> _Loaded:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import moacompress.runtime.loading  # noqa: F401  (in case the entry point is switched off)
    from moacompress.models import weights_fingerprint

    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPE_BYTES)}")
    plan = Plan.load(folder / "plan.json")
    wanted: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted).eval()
        model.to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"can not load the compressed model {folder}: {first}") from error
    identity = (weights_fingerprint(model), str(model.dtype), torch.device(device).type)
    return _Loaded(model, tokenizer, plan, identity)


def _contenders(plan: Plan, against: Sequence[str], tokens: int) -> list[Contender]:
    """Returns the models to run at a length of `tokens`, the plan first, without repeats."""
    from moacompress.search.baselines import uniform_plan

    limit = plan.kv_bytes(tokens)
    found = [Contender("plan", plan, limit)]
    for name in dict.fromkeys(against):
        if name == "dense":
            found.append(Contender(name, None, plan.model.dense_kv_bytes(tokens)))
            continue
        sinks = [int(name.partition(":")[2])] if ":" in name else _uniform_sinks(plan)
        problem = None
        fitting = []
        for sink in sinks:
            try:
                fitting.append(uniform_plan(plan.model, tokens, limit, sink, plan.min_window))
            except InfeasibleBudgetError as error:
                problem = error
        if problem is not None and not fitting:
            raise problem
        found += [Contender(name, uniform, uniform.kv_bytes(tokens)) for uniform in fitting]
    return found


def _uniform_sinks(plan: Plan) -> Sequence[int]:
    """Returns the sink that the search found best for a uniform window, or all where the plan does not say."""
    baselines = plan.quality.get("baselines")
    uniform = baselines.get("uniform") if isinstance(baselines, dict) else None
    sink = uniform.get("sink") if isinstance(uniform, dict) else None
    return (sink,) if sink in SINKS else SINKS


def _score_all(
    loaded: _Loaded, contender: Contender, cases: Sequence[Case], ledger: Ledger, progress: Progress
) -> list[Score]:
    """Returns the contender's score on every case; the model gets the contender's plan only if one is missing."""
    what = contender.plan.key() if contender.plan is not None else "dense"
    scores = []
    for index, case in enumerate(cases):
        key = fingerprint([SCORE_VERSION, what, *loaded.identity, case.prompt_ids, case.answer_ids])
        score = ledger.get(key)
        if score is None:
            _put_on(loaded.model, contender.plan)
            score = score_case(loaded.model, loaded.tokenizer, case)
            ledger.add(key, score, model=contender.name, task=case.task, length=case.length, prompt=index)
        scores.append(score)
        progress.step(f"{contender.name} {case.task} {case.length:,}")
    return scores


def _put_on(model: PreTrainedModel, plan: Plan | None) -> None:
    """Makes the model run under `plan` (None: dense); nothing is done where it does already."""
    from moacompress.runtime import attach, detach
    from moacompress.runtime.attaching import attached_plan

    current = attached_plan(model)
    if plan is None:
        detach(model)
    elif current is None or current.key() != plan.key():
        attach(detach(model), plan)


def _best_of_each_name(scored: list[tuple[Contender, list[Score]]]) -> list[tuple[Contender, list[Score]]]:
    """Of contenders with one name keeps that with the lowest mean NLL."""
    best: dict[str, tuple[Contender, list[Score]]] = {}
    for contender, scores in scored:
        held = best.get(contender.name)
        if held is None or sum(score.nll for score in scores) < sum(score.nll for score in held[1]):
            best[contender.name] = contender, scores
    return list(best.values())


def _values(scores: Sequence[Score], metric: str) -> list[float]:
    return [float(score.hit) if metric == "exact_match" else score.nll for score in scores]


def _row(model: str, cases: Sequence[Case], metric: str, value: float, interval: Interval) -> dict[str, Any]:
    return {
        "model": model,
        "task": cases[0].task,
        "length": cases[0].length,
        "metric": metric,
        "value": value,
        "ci95": list(interval),
        "prompts": len(cases),
    }


def _result_rows(
    contender: Contender, scores: Sequence[Score], cases: Sequence[Case], seed: int
) -> list[dict[str, Any]]:
    rows = []
    for metric in METRICS:
        values = _values(scores, metric)
        hits = sum(score.hit for score in scores)
        interval = wilson(hits, len(values)) if metric == "exact_match" else bootstrap_mean(values, seed)
        row = _row(contender.name, cases, metric, sum(values) / len(values), interval)
        row |= {"kv_bytes": contender.kv_bytes, "tokens": mean_tokens(cases)}
        rows.append(row if contender.sink is None else {**row, "sink": contender.sink})
    return rows


def _difference_rows(
    best: list[tuple[Contender, list[Score]]], cases: Sequence[Case], seed: int
) -> list[dict[str, Any]]:
    (_, ours), *others = best
    rows = []
    for contender, theirs in others:
        for metric in METRICS:
            value, interval = paired_difference(_values(ours, metric), _values(theirs, metric), seed)
            rows.append(_row(contender.name, cases, metric, value, interval))
    return rows
