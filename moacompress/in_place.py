"""A loaded model, compressed where it is: for notebooks and programs that have one in their hands."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from moacompress.calibration.profile.profiler import profile
from moacompress.core.artefact_names import PLAN_FILE, PROFILE_FOLDER
from moacompress.core.errors import DataError, UsageError, one_line
from moacompress.core.files import fingerprint, write_text
from moacompress.core.progress import Progress
from moacompress.efforts import Effort, effort_recipe
from moacompress.models.modules import check_unwrapped
from moacompress.models.placement import input_device
from moacompress.models.source import SourceModel, context_length, model_shape
from moacompress.recipe import Recipe
from moacompress.runtime.hf.attaching import attach, attached_plan, detach
from moacompress.runtime.hf.prefixes import keep_prefixes, kept_limit
from moacompress.search.plan_sets import find_asked
from moacompress.search.result.search_result import SearchResult

ROWS = "rows-{}.jsonl"
"""Name of the file that rows in memory are calibration data from."""


def compress_(
    model: PreTrainedModel,
    budget: str | Sequence[str] | None = None,
    data: Sequence[str | Mapping[str, Any]] | str | Path | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_loss: str | None = None,
    lengths: str | int | Sequence[int] | None = None,
    text: str | Path | None = None,
    effort: Effort | None = None,
    recipe: Recipe | None = None,
    work: str | Path | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Profiles a loaded model, searches a plan, and puts it on the model; no weight changes.

    `detach` takes the plan off again, `save_pretrained` writes a compressed checkpoint, and `evaluate` measures that.

    Args:
        model: a dense causal LM that transformers loaded, on its device and in its dtype. It is in `eval` mode meanwhile.
        budget: such as "25%", or several that must all hold; by default the recipe's.
        data: calibration rows: prompts as texts, or mappings such as `{"prompt": ...}`, `{"messages": [...]}`,
            `{"context": ..., "question": ...}` or `{"text": ...}`, all of one kind; or a file of such rows. By default the
            effort's synthetic tasks.
        tokenizer: the model's; by default the one at `model.name_or_path`.
        max_loss: in place of a budget, such as "1%": the smallest budget whose plan raises the perplexity of the model's own
            answers by at most that.
        lengths: of the samples, such as "512,1k", or tokens.
        text: file or folder of long prose, for samples of plain text.
        effort: how much is measured: "quick", the default, "standard" or "thorough".
        recipe: all other settings, in place of the effort's.
        work: a folder to work in, where the same call resumes; by default a temporary one.
        progress: told of the steps.

    Returns:
        The result of the search, its plan included.

    Raises:
        UsageError: the model has a plan already, its tokenizer is not to be found, or there are both a recipe and an effort.
        MoaCompressError: as `profile` and `find_plan`. The model is then as it was.
    """
    check_unwrapped(model)
    if attached_plan(model) is not None:
        raise UsageError("the model runs under a plan already; take it off first: moacompress.detach(model)")
    if recipe is not None and effort is not None:
        raise UsageError("a recipe says how much is measured, and so does an effort; give one of them")
    source = _source_of(model, tokenizer)
    if isinstance(lengths, int):
        lengths = [lengths]
    with ExitStack() as around:
        folder = Path(work) if work is not None else Path(around.enter_context(tempfile.TemporaryDirectory()))
        around.enter_context(_in_eval(model))
        around.enter_context(torch.inference_mode(False))
        around.enter_context(torch.autocast(input_device(model).type, enabled=False))
        resolved = (recipe or effort_recipe(effort or "quick", prose=text is not None)).override(
            budget=[budget] if isinstance(budget, str) else budget,
            max_loss=max_loss,
            device=str(input_device(model)),
            calibration__lengths=lengths if isinstance(lengths, str) or lengths is None else list(lengths),
            calibration__text=None if text is None else str(text),
            calibration__sources=None if data is None else [{"path": str(_file_of(data, folder))}],
        )
        if not resolved.budget and resolved.max_loss is None:
            raise UsageError('no budget given; give budget="25%", or max_loss="1%" to have it found')
        profiled = profile(source, folder / PROFILE_FOLDER, resolved, progress=progress)
        plan_file = folder / PLAN_FILE
        found = find_asked(profiled, recipe=resolved, out=plan_file, model=source, progress=progress)
    attach(model, found.plan)
    return found if work is not None else replace(found, path=None)


@contextmanager
def applied(model: PreTrainedModel, plan: Any) -> Iterator[PreTrainedModel]:
    """Has a loaded model run under a plan within a `with` block; after it the model is as it was, its kept prefixes empty.

    Args:
        model: a causal LM that transformers loaded, dense or under another plan.
        plan: a plan, or its file.

    Yields:
        The same model.

    Raises:
        MoaCompressError: as `attach`.
    """
    before, limit = attached_plan(model), kept_limit(model)
    attach(model, plan)
    try:
        yield model
    finally:
        detach(model)
        if before is not None:
            attach(model, before)
            keep_prefixes(model, limit)


def _source_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> SourceModel:
    name = str(getattr(model, "name_or_path", "") or "")
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name) if name else None
        except Exception as error:  # whatever the files there are damaged by
            raise UsageError(f"no tokenizer at {name} ({one_line(error)}); give it as tokenizer=") from error
    if tokenizer is None:
        raise UsageError("the model does not say where it came from; give its tokenizer as tokenizer=")
    return SourceModel(model, tokenizer, name or type(model).__name__, model_shape(model), context_length(model))


def _file_of(data: Sequence[str | Mapping[str, Any]] | str | Path, folder: Path) -> Path:
    """Returns the file of calibration rows: the given one, or one in `folder`.

    Rows are written to a file that is named by what they are: those of another call, maybe at work, are left alone.

    Raises:
        DataError: a row that JSON cannot hold.
    """
    if isinstance(data, str | Path):
        return Path(data)
    lines = []
    for number, row in enumerate(data):
        try:
            lines.append(json.dumps({"prompt": row} if isinstance(row, str) else dict(row), ensure_ascii=False) + "\n")
            lines[-1].encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"row {number} of data cannot be written as JSON: {one_line(error)}") from error
    file = folder / ROWS.format(fingerprint(lines))
    if not file.exists():
        write_text(file, "".join(lines))
    return file


@contextmanager
def _in_eval(model: PreTrainedModel) -> Iterator[None]:
    """Has a model in `eval` mode and its weights frozen for a while; each part is put back as it was."""
    training = {name: module.training for name, module in model.named_modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, model.training)
        for parameter in trained:
            parameter.requires_grad_(True)
