"""The page itself, sections of pictures and tables in one HTML file that needs nothing from anywhere; its pictures as PNG."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moacompress.core.artefact_names import BENCH_FILE, EVALUATION_FILE, MODEL_FOLDER, SUMMARY_FILE
from moacompress.core.errors import UsageError
from moacompress.core.files import finite_json, write_bytes, write_text
from moacompress.core.place import check_replaceable
from moacompress.core.tables import Table, readable_bytes, readable_types, rounded_text
from moacompress.core.version import own_version
from moacompress.exporter.card import CARD, WEIGHTS, repair_text
from moacompress.recipe import shared_name
from moacompress.report.evaluation_tables import (
    SAID,
    all_text,
    headline,
    interval_text,
    kept_rows,
    kept_sentence,
    overlap_note,
)
from moacompress.report.heal_tables import heal_sentence
from moacompress.report.page.figures import (
    answer_table,
    audit_picture,
    baselines_picture,
    front_picture,
    history_picture,
    memory_picture,
    quality_pictures,
    speed_pictures,
    trials_picture,
)
from moacompress.report.page.findings import EXPLANATIONS, Finding, Findings, reading_file
from moacompress.report.page.heads import head_details, head_map, head_shades, most_worth
from moacompress.report.page.picture import ROLES, Picture
from moacompress.report.search_tables import baseline_kls, class_lines, steps_table
from moacompress.rules.budget import format_length
from moacompress.rules.memory import memory_lines, plan_memory
from moacompress.rules.plan import Plan
from moacompress.rules.untrusted import reading_notes
from moacompress.rules.worst_share import WorstShare

ASSETS = Path(__file__).parent / "assets"
REQUESTS = 10
"""Dense requests, in whose memory so many more fit."""
GENERATOR = '<meta name="generator" content="moacompress">'
"""In the head of every page, which is known by it."""
CONFIG_NAME = "config.json"
SEARCHED_BY = ("search", "weights", "head_weights", "dtype", "device", "seed")
"""Settings of a recipe that a search goes by, beside its budget."""
PICTURES, HEADING = "pictures", "## Pictures"
"""The folder of a card's pictures, and the heading above them, which ends the card."""
NEEDS = 'the page needs plotly and jinja2; pip install "moacompress[report]" and run `moacompress report` on the folder'


@dataclass(frozen=True)
class PageSection:
    """A section of the page: a heading, a sentence, pictures one below the other, others in tabs, and a table."""

    name: str
    title: str
    text: str = ""
    pictures: list[Picture] = field(default_factory=list)
    tabs: list[Picture] = field(default_factory=list)
    table: Table | None = None


def write_page(found: Findings, out: Path) -> dict[str, Any]:
    """Writes the page, in the place of an earlier one.

    Returns:
        `report`, its path; `sections` that it shows; `missing`, a list of `what` and `command`; `passed_over`; `warnings`.

    Raises:
        UsageError: plotly or jinja2 is not installed.
        ArtefactError: something else than a page is there, or a file beside the plan is not of the form that it has.
        PlanError: the plan's notes are not.
    """
    check_replaceable(out, lambda text: GENERATOR in text, "a page of this command")
    if not all(map(find_spec, ("jinja2", "plotly"))):
        raise UsageError(NEEDS)
    sections = page_sections(found)
    write_text(out, page_html(found, sections))
    missing = [{"what": row.what, "command": row.command} for row in missing_parts(found)]
    shown = [section.name for section in sections if section.pictures or section.tabs or section.table]
    notes = {"passed_over": found.passed_over, "warnings": found.warnings}
    return {"report": str(out), "sections": shown, "missing": missing, **notes}


def page_html(found: Findings, sections: list[PageSection]) -> str:
    """Returns the page as HTML."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    html, css, js = ((ASSETS / name).read_text("utf-8") for name in ("page.html.j2", "page.css", "page.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    data = {
        "figures": {picture.name: picture.figure() for picture in _pictures(sections)},
        "shades": head_shades(found),
        "heads": head_details(found),
        "first": most_worth(found),
        "colours": {role: {"light": light, "dark": dark} for role, (light, dark, _) in ROLES.items()},
    }
    return environment.from_string(html).render(
        title=f"{found.model_name}, compressed",
        verdict=verdict(found),
        about=about(found),
        tiles=tiles(found),
        sections=sections,
        missing=missing_parts(found, seen_from(found.folder)),
        provenance=provenance(found),
        recipe=json.dumps(found.plan.provenance.get("recipe"), indent=1, ensure_ascii=False),
        passed_over=found.passed_over,
        warnings=found.warnings,
        made=f"moacompress {own_version()}, {date.today():%d %B %Y}",
        css=css,
        js=js,
        plotly=get_plotlyjs(),
        data=embedded(data),
    )


def _pictures(sections: list[PageSection]) -> list[Picture]:
    return [picture for section in sections for picture in (*section.pictures, *section.tabs)]


def write_pictures(found: Findings, folder: Path) -> dict[Path, str]:
    """Writes every picture of the page as `NAME.png`, in the place of earlier ones, and returns the files with their titles.

    Raises:
        UsageError: kaleido is not installed, or it finds no browser.
        ArtefactError: the folder cannot be made, or written to.
    """
    files = {}
    for picture in _pictures(page_sections(found)):
        path = folder / f"{picture.file_stem}.png"
        write_bytes(path, picture.png())
        files[path] = picture.title
    return files


def illustrate_card(found: Findings) -> dict[Path, str]:
    """Writes the pictures into the checkpoint's folder and shows them in its card, in the place of earlier ones.

    Raises:
        UsageError: there is no checkpoint, or no picture can be drawn.
    """
    folder = found.folder / MODEL_FOLDER if (found.folder / MODEL_FOLDER).is_dir() else found.folder
    card = folder / CARD
    if not card.is_file():
        raise UsageError(f"{found.folder} has no checkpoint with a card; export the plan with `moacompress export`")
    files = write_pictures(found, folder / PICTURES)
    shown = "".join(f"![{title}]({PICTURES}/{file.name})\n\n" for file, title in files.items())
    before = card.read_text("utf-8").partition(f"\n{HEADING}\n")[0].rstrip("\n")
    write_text(card, f"{before}\n\n{HEADING}\n\n{shown}")
    return files


def embedded(data: Any) -> str:
    """Returns JSON that can stand in a script element: nothing in it ends one."""
    return json.dumps(finite_json(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


@reading_file(EVALUATION_FILE)
def quality_text(evaluation: Finding) -> str:
    """Returns what was kept of each kind of prompts, and what was not measured, in sentences."""
    return " ".join([*headline(evaluation), overlap_note(evaluation["results"])])


def page_sections(found: Findings) -> list[PageSection]:
    """Returns the sections of the page, in order.

    Raises:
        ArtefactError: a file beside the plan is not of the form that it has.
        PlanError: the plan's notes are not.
    """
    heads = PageSection("heads", "What is kept", pictures=[head_map(found)])
    quality = PageSection("quality", "What it still answers")
    if found.evaluation is not None:
        quality = replace(
            quality,
            text=quality_text(found.evaluation),
            tabs=quality_pictures(found.evaluation),
            table=answer_table(found.evaluation),
        )
    costs = PageSection("costs", "Memory and speed", pictures=[memory_picture(found)])
    if found.bench is not None:
        costs = replace(costs, text=machine_text(found.bench), pictures=[*costs.pictures, *speed_pictures(found.bench)])
    harm = [baselines_picture(found), None if found.audit is None else audit_picture(found.audit)]
    steps, text, table = list[Picture | None](), "", None
    if found.explanation is not None:
        with reading_file(EXPLANATIONS):
            text, table = " ".join(class_lines(found.explanation)), steps_table(found.explanation)
        harm.append(trials_picture(found.explanation))
        steps = [history_picture(found.explanation), None if found.front is None else front_picture(found.front)]
    harm_there, steps_there = ([picture for picture in some if picture is not None] for some in (harm, steps))
    return [
        heads,
        quality,
        costs,
        PageSection("harm", "Quality loss: predicted vs measured", pictures=harm_there),
        PageSection("search", "How it was found", text, steps_there, table=table),
    ]


@reading_file(BENCH_FILE)
def machine_text(bench: Finding) -> str:
    """Returns where times were taken."""
    machine = bench["environment"]
    isa = f" ({machine['isa']})" if machine.get("isa") else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, kernels {machine['kernel']}{isa}."
    )


@dataclass(frozen=True)
class MissingPart:
    """Something that was not measured: the section that lacks it, a sentence that says so, and the command that fills it."""

    section: str
    what: str
    command: str


def seen_from(folder: Path) -> Callable[[str], str]:
    """Returns how a page that may be shared writes paths: absolute ones from the folder above `folder`, or by their name."""
    above = folder.absolute().parent

    def place(path: str) -> str:
        inside = Path(path).is_absolute() and Path(path).is_relative_to(above)
        return str(Path(path).relative_to(above)) if inside else shared_name(path)

    return place


def missing_parts(found: Findings, place: Callable[[str], str] = str) -> list[MissingPart]:
    """Returns what is not there, in the order of the sections; `place` says how a folder is written in commands."""

    def quoted(path: Path) -> str:
        return shlex.quote(place(str(path)))

    def measuring(command: str, file: str) -> str:
        folder = found.folder
        if (folder / MODEL_FOLDER).is_dir() or (folder / CONFIG_NAME).is_file():
            return f"moacompress {command} {quoted(folder)} -o {quoted(folder)}/{file}"
        return f"moacompress {command} DIR -o {file} (where DIR is what `moacompress export` makes of the plan)"

    parts, profile = [], found.profile
    if profile is None:
        what = "The profile is not here: what a KV head was chosen from cannot be shown."
        parts.append(MissingPart("heads", what, f"moacompress report {quoted(found.folder)} --profile PROFILE"))
    elif "distance" not in profile.statistics.arrays:
        what = "How far back each KV head attends was not profiled."
        parts.append(MissingPart("heads", what, f"moacompress profile -o {quoted(profile.path)} --heads"))
    if found.evaluation is None:
        parts.append(MissingPart("quality", "Nothing was evaluated yet.", measuring("eval", EVALUATION_FILE)))
    if found.bench is None:
        parts.append(MissingPart("costs", "Nothing was timed yet.", measuring("bench", BENCH_FILE)))
    if found.audit is None:
        what = "Predicted KL was not audited on held-out samples."
        where = "PROFILE" if profile is None else quoted(profile.path)
        parts.append(MissingPart("harm", what, f"moacompress profile -o {where} --audit 50"))
    if found.explanation is None:
        parts.append(MissingPart("search", "The search's notes are not here.", _search_again(found, quoted)))
    return parts


@reading_notes("its search")
def _search_again(found: Findings, quoted: Callable[[Path], str]) -> str:
    """Returns the command that searches a plan again as it was searched, and writes another file than the plan's.

    The settings are the profile's unless the plan notes others, which are then read from the plan.
    """
    again = found.folder / f"{found.file.stem}-again.json"
    where = "PROFILE" if found.profile is None else quoted(found.profile.path)
    asked = found.plan.budget.get("asked") or ["BUDGET"]
    search = " ".join(["moacompress search", where, *(f"--budget {shlex.quote(budget)}" for budget in asked)])
    noted = found.plan.provenance.get("recipe")
    usual = None if found.profile is None else found.profile.recipe.shared(found.profile.source)
    if noted is None or (usual is not None and all(noted.get(name) == usual[name] for name in SEARCHED_BY)):
        return f"{search} -o {quoted(again)}"
    recipe = quoted(again.with_suffix(".yaml"))
    return f"moacompress recipe show {quoted(found.file)} > {recipe} && {search} --recipe {recipe} -o {quoted(again)}"


def verdict(found: Findings) -> str:
    """Returns what the plan saves at the reference length, and what that costs."""
    plan, n = found.plan, found.reference
    dense, ours = plan.model.dense_kv_bytes(n), plan.kv_bytes(n)
    return (
        f"At {format_length(n)} tokens the KV cache of a request takes {readable_bytes(ours)} instead of "
        f"{readable_bytes(dense)}, so that {REQUESTS * dense // ours} requests fit where {REQUESTS} did. "
        f"{_quality_cost(found.evaluation)} {_first_token_cost(found.bench, n)}"
    )


@reading_file(EVALUATION_FILE)
def _quality_cost(evaluation: Finding | None) -> str:
    rows = [row for row in kept_rows(evaluation) if row.get("dense_right")] if evaluation is not None else []
    return kept_sentence(rows[0]) if rows else "What it still answers was not measured."


@reading_file(BENCH_FILE)
def _first_token_cost(bench: Finding | None, n: int) -> str:
    runs = (bench or {}).get("runs", ())
    rows = [row for row in runs if row["phase"] == "prefill" and row["dense_ms"] and row["plan_ms"]]
    if not rows:
        return "What the first token costs was not measured."
    row = min(rows, key=lambda row: (abs(row["length"] - n), row["batch"]))
    where = f"{format_length(row['length'])} tokens, batch {row['batch']}"
    return f"The first token takes {row['plan_ms'] / row['dense_ms']:.2f} times as long as dense's ({where})."


def about(found: Findings) -> str:
    """Returns what the plan is made of."""
    plan = found.plan
    asked = ", ".join(map(str, plan.budget.get("asked", []))) or "no budget in particular"
    parts = ["span and formats"] + (["tokens chosen by a gate"] if plan.selects else [])
    shared = sum(share is not None for share in plan.shares)
    also = f"; {shared} layers attend as an earlier one does" if shared else ""
    return " ".join(
        (
            f"Asked for: {asked}. Each of {plan.model.layers} x {plan.model.kv_heads} KV heads has its own "
            f"{' and '.join(parts)}{also}. It has {WEIGHTS[plan.changed_weights]}.",
            *memory_lines(plan_memory(plan)),
        )
    )


def tiles(found: Findings) -> list[dict[str, str]]:
    """Returns the numbers at the top of the page: `value`, `what` and `beside`."""
    plan, n = found.plan, found.reference
    dense, ours = plan.model.dense_kv_bytes(n), plan.kv_bytes(n)
    return [
        *_quality_tiles(found.evaluation),
        {
            "value": f"{ours / dense:.1%}",
            "what": f"of the KV bytes at {format_length(n)} tokens",
            "beside": f"{readable_bytes(ours)} of {readable_bytes(dense)}; {WorstShare.of(plan)}",
        },
        *_speed_tiles(found.bench or {}),
        *_kl_tiles(plan),
    ]


@reading_file(EVALUATION_FILE)
def _quality_tiles(evaluation: Finding | None) -> list[dict[str, str]]:
    shown = []
    for row in kept_rows(evaluation) if evaluation is not None else ():
        what = f"{SAID[row['kind']]}: kept of what dense gets right"
        if row.get("dense_right"):
            beside = (
                f"{interval_text(row)}, n = {row['dense_right']} of {row['prompts']} prompts: {', '.join(row['tasks'])}; "
                f"{all_text(row)}"
            )
            shown.append({"value": rounded_text(row["kept"], ".0%"), "what": what, "beside": beside})
        elif "dense_right" in row:
            shown.append({"value": "-", "what": what, "beside": f"dense answers none of {row['prompts']} prompts"})
    return shown


@reading_file(BENCH_FILE)
def _speed_tiles(bench: Finding) -> list[dict[str, str]]:
    steps = [row for row in bench.get("runs", ()) if row["phase"] == "decode" and "dense" in row["speedup"]]
    if not steps:
        return []
    row = max(steps, key=lambda row: (row["length"], row["batch"]))
    where = f"a decode step of dense at {format_length(row['length'])} tokens, batch {row['batch']}"
    found = row["speedup"]["dense"]
    beside = "median of the turns' ratios"
    if found["ci95"] is not None:
        beside += ", 95% interval {:.2f} to {:.2f}".format(*found["ci95"])
    beside += f"; median times {row['plan_ms']:.3g} ms for {row['dense_ms']:.3g} ms"
    if row["full_span_ms"] is not None:
        beside += f"; the same kernels with all keys {row['full_span_ms']:.3g} ms"
    return [{"value": f"{found['value']:.2f} x", "what": f"as fast as {where}", "beside": beside}]


@reading_notes("measured KL")
def _kl_tiles(plan: Plan) -> list[dict[str, str]]:
    kl: dict[str, Any] = plan.quality.get("measured_harm") or {}
    others = baseline_kls(kl)
    if kl.get("plan") is not None:
        beside = f"best baseline {min(others):.3g}" if others else "no baseline was measured"
        beside += f"; n = {plan.quality['samples']} validation samples, which the search chose the plan by"
        return [{"value": f"{kl['plan']:.3g}", "what": "KL to the dense model, nats per token", "beside": beside}]
    if "plan" in kl:
        beside = "the search was stopped before it was measured"
        return [{"value": "not measured", "what": "KL of the plan", "beside": beside}]
    return []


@reading_notes("where it comes from")
def provenance(found: Findings) -> list[tuple[str, str]]:
    """Returns where the plan comes from, as names and values."""
    plan, notes = found.plan, found.plan.provenance
    with reading_file(SUMMARY_FILE):
        summary = found.summary or {}
        types = readable_types(summary.get("weights") or {})
        seconds = ", ".join(f"{step} {taken:.0f} s" for step, taken in summary.get("seconds", {}).items())
    rows: list[tuple[str, Any]] = [
        ("plan", plan.key()),
        ("model", f"{found.model_name}, weights {plan.model.weights_fingerprint}"),
        ("types of weights", types),
        ("profile", notes.get("profile")),
        ("calibration samples", notes.get("calibration")),
        ("lengths", ", ".join(format_length(n) for n in notes.get("lengths", []) if isinstance(n, int))),
        ("seed", notes.get("seed")),
        ("trials", notes.get("trials")),
        ("plans measured", notes.get("measured_plans")),
        ("the plan is from", notes.get("stage")),
        ("repair", repair_text(plan)),
        ("healed", heal_sentence(notes["heal"]) if isinstance(notes.get("heal"), dict) else ""),
        ("time", seconds),
        ("versions", ", ".join(f"{name} {number}" for name, number in (notes.get("versions") or {}).items())),
    ]
    return [(name, str(value)) for name, value in rows if value not in (None, "")]
