"""What a run came to, for people: the tables that `compress`, `search` and `demo` end with."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from moacompress.core.artefact_names import MODEL_FOLDER, REPORT_FILE
from moacompress.core.tables import Columns, Table, readable_bytes, readable_number, readable_types
from moacompress.report.evaluation_tables import kept_sentence, not_measured_sentence
from moacompress.report.search_tables import baseline_line, class_lines
from moacompress.rules.budget import format_length
from moacompress.rules.memory import memory_lines


def summary_tables(summary: Mapping[str, Any]) -> list[RenderableType]:
    """Returns the tables of a `summary.json`: KV bytes, quality, seconds."""
    kv_bytes, asked = summary["kv_bytes"], summary["budget"]
    budget = asked if isinstance(asked, str) else ", ".join(asked)
    loss = f", the smallest for a loss of {summary['max_loss']}" if "max_loss" in summary else ""
    title = f"KV cache at {format_length(summary['reference_length'])} tokens, batch 1"
    sizes: Columns = {
        "": lambda name: name,
        "bytes": lambda name: readable_bytes(kv_bytes[name]),
        f"share of {summary.get('dtype', 'the')} dense": lambda name: f"{kv_bytes[name] / kv_bytes['dense']:.1%}",
    }
    measured = [name for name in ("dense", "planned", "measured") if kv_bytes.get(name) is not None]
    seconds = ", ".join(f"{step} {taken:.0f} s" for step, taken in summary["seconds"].items())
    return [
        f"{summary['model']}, budget {budget}{loss}",
        *map(kept_sentence, summary["kept"]),
        not_measured_sentence(summary["not_measured"]),
        "",
        Table.of(title, sizes, measured),
        *_measured_elsewhere(kv_bytes),
        _quality_table(summary["quality"]),
        *memory_lines(summary.get("memory", {})),
        *baseline_line(summary.get("best_baseline")),
        *class_lines(summary),
        *_weights(summary),
        f"Took {seconds}.",
    ]


def _quality_table(quality: Mapping[str, Any]) -> Table:
    def score(model: str) -> Callable[[Any], str]:
        def write(row: tuple[str, Mapping[str, Any]]) -> str:
            nll = row[1].get("nll", {}).get(model)
            return readable_number(row[1].get(model), ".2f") + ("" if nll is None else f" ({nll:.3f})")

        return write

    models = dict.fromkeys(model for row in quality.values() for model in row["nll"] if model != "plan")
    columns: Columns = {
        "task": lambda row: row[0],
        **{model: score(model) for model in models},
        "this plan": score("plan"),
        "prompts": lambda row: str(row[1]["prompts"]),
    }
    title = "Exact match (NLL of the answer, nats per token); baselines have the plan's KV bytes"
    return Table.of(title, columns, quality.items())


def _measured_elsewhere(kv_bytes: Mapping[str, Any]) -> list[str]:
    """Returns what to say where the cache was not measured at the length that the table is of."""
    at = kv_bytes.get("measured_at")
    if at is None or kv_bytes.get("measured") is not None:
        return []
    return [
        f"Measured at {format_length(at['length'])} tokens, the most that the run read: {readable_bytes(at['measured'])}; "
        f"the plan has {readable_bytes(at['planned'])} there."
    ]


def _weights(summary: Mapping[str, Any]) -> list[str]:
    """Returns the bytes of weights by type; and of weights that were rounded what they lose, beside what the plan loses."""
    lines = [f"Weights: {readable_types(summary['weights'])}."] if summary.get("weights") else []
    rounding = summary.get("rounded_weights")
    if rounding is not None:
        plan = readable_number(summary["harm"].get("plan"))
        lines.append(
            f"Rounding them to {rounding['weights']} costs {rounding['kl']:.3g} nats per token by itself (KL to the model "
            f"before); the plan on top of it {plan} (KL to the rounded model)."
        )
    return lines


def closing_lines(out: Path) -> list[str]:
    """Returns what a run ends with: a snippet that loads the model and asks it something, and where to look next."""
    page = out / REPORT_FILE
    return [
        f"Paste this into Python:\n\n{snippet(out / MODEL_FOLDER)}",
        f"Talk to it:   moacompress chat {shlex.quote(str(out))}",
        f"Look inside:  moacompress inspect {shlex.quote(str(out))}",
        *([f"The page:     {page}"] if page.is_file() else []),
    ]


def snippet(model: Path) -> str:
    """Returns lines of Python that load a checkpoint and print an answer of it."""
    place = str(model)
    if (model / "chat_template.jinja").is_file():
        inputs = (
            'messages = [{"role": "user", "content": "What is the capital of France?"}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")\n"
        )
    else:
        inputs = 'inputs = tokenizer("The capital of France is", return_tensors="pt")\n'
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})\n"
        f"{inputs}"
        "output = model.generate(**inputs, max_new_tokens=40)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )
