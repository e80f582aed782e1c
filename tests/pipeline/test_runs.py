"""The whole way on a tiny model: what is left on disk, what is reused, and what is refused before anything runs."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from moacompress import pipeline
from moacompress.calibration.data.held_out import held_out_rows
from moacompress.core.artefact_names import of_compress
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.progress import SILENT, Progress
from moacompress.evaluation.runner import evaluate
from moacompress.exporter.card import state_measured
from moacompress.exporter.exporting import export
from moacompress.models.source import load_source
from moacompress.models.weight_bytes import most_checkpoint_bytes
from moacompress.pipeline import compress, measured_kv_bytes
from moacompress.recipe import Recipe
from moacompress.recipe_sections import SourceRecipe
from moacompress.report.summary_tables import closing_lines, summary_tables
from moacompress.rules.plan import Plan
from moacompress.run_folder import StepClock
from moacompress.search.baselines.families import FAMILIES
from moacompress.search.study import find_plan


def test_every_file_of_a_run_has_the_mode_of_any_other(finished, tmp_path):
    out, _ = finished
    (tmp_path / "any").touch()
    files = [path for path in out.rglob("*") if path.is_file()]
    assert out / "model" / "model.safetensors" in files
    assert {path.stat().st_mode for path in files} == {(tmp_path / "any").stat().st_mode}


def test_summary_and_artefacts(finished):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert {path.name for path in out.iterdir()} >= {"profile", "plan.json", "model", "eval.json", "summary.json"}
    plan = Plan.load(out / "plan.json")
    assert summary["reference_length"] == 800
    assert summary["kv_bytes"]["planned"] == plan.kv_bytes(800) == summary["kv_bytes"]["measured"]
    assert summary["kv_bytes"]["planned"] <= 0.5 * summary["kv_bytes"]["dense"]
    assert plan.kv_bytes(700) <= 0.5 * plan.model.dense_kv_bytes(700)
    assert summary["kv_bytes"]["measured_at"]["length"] == 800
    assert set(summary["quality"]["needle-noise@700"]) >= {"dense", "plan", "prompts", "nll", "kind"}
    assert set(summary["seconds"]) == {"profile", "search", "export", "eval"}
    assert plan.provenance["recipe"]["calibration"]["samples"] == 4


def test_what_no_calibration_has_is_said_first(finished):
    """In the summary, in the lines that the command ends with, in the evaluation and on the checkpoint's card."""
    out, summary = finished
    kinds = ["unseen kinds", "calibrated kinds"]
    assert [row["kind"] for row in summary["kept"]] == kinds
    assert [(task, row["kind"]) for task, row in summary["quality"].items()] == [
        ("code-question@700", kinds[0]),
        ("needle-noise@700", kinds[1]),
    ]
    evaluation = json.loads((out / "eval.json").read_text())
    assert evaluation["kinds"] == dict(zip(("code-question", "needle-noise"), kinds, strict=True))
    assert list(dict.fromkeys(row["task"] for row in evaluation["pooled"]["results"])) == kinds
    shown = [line for line in summary_tables(summary) if isinstance(line, str)]
    first, second, missing = shown[1:4]
    assert first.startswith(
        "Kinds of prompts that no calibration has (code-question; 700 tokens): dense answers none of 2"
    )
    assert second.startswith("Kinds that the plan was calibrated on (needle-noise; 700 tokens): ")
    assert missing == (
        "Not measured: prompts beyond 700 tokens, a second question, tables, dialogues, tool calls, long text, long answers."
    )
    card = (out / "model" / "README.md").read_text()
    assert card.index(first) < card.index(second) < card.index(missing) < card.index("| tokens |")
    state_measured(out / "model", [first, second, missing])
    assert (out / "model" / "README.md").read_text() == card


def test_own_rows_that_are_held_out_are_evaluated_and_come_first(recipe, tmp_path):
    rows = [
        {"prompt": f"In box {n} there are {n * n} pens. " * 17 + f"Box {n} holds", "answer": str(n * n)}
        for n in range(24)
    ]
    mine = tmp_path / "mine.jsonl"
    mine.write_text("\n".join(map(json.dumps, rows)))
    summary = compress(recipe.override(calibration__sources=(SourceRecipe(path=str(mine)),)), tmp_path / "out")
    assert [row["kind"] for row in summary["kept"]] == ["own rows", "unseen kinds", "calibrated kinds"]
    assert next(iter(summary["quality"])) == "mine@700"
    held = {rows[index]["answer"] for index in held_out_rows(rows, "prompt", "mine")}
    answers = json.loads((tmp_path / "out" / "eval.json").read_text())["answers"]
    asked = [row["references"][0] for row in answers if row["task"] == "mine"]
    assert len(asked) == 2
    assert {*asked} <= held
    shutil.copy(mine, tmp_path / "out")
    mine = str(tmp_path / "out" / "mine.jsonl")
    again = evaluate(tmp_path / "out", sources=[mine], tasks=(), lengths=(700,), prompts=99, against=())
    assert len(again["answers"]) == len(held) < len(rows)


def test_the_best_baseline_of_the_search_is_evaluated(finished):
    out, summary = finished
    noted = Plan.load(out / "plan.json").quality["baselines"]
    family = min((name for name in noted if FAMILIES[name]), key=lambda name: noted[name]["harm"])
    for row in summary["quality"].values():
        assert set(FAMILIES[family]) & row.keys()


def test_everything_that_is_left_is_listed(finished):
    """What a new step leaves is to be in `artefact_names`: else `--overwrite` would leave it."""
    out, _ = finished
    listed = of_compress(out)
    for path in out.rglob("*"):
        inside = path.is_relative_to(out / "profile") and path.is_dir()
        assert inside or any(path.is_relative_to(one) for one in listed), path
    assert {path.name for path in listed if not path.exists()} == {
        "bench.json", "bench.cells.jsonl",  # of other commands
        "audit.json", "audit.html", "audit.ledger.jsonl", "plan.scouts", "weights.json",  # of other flags
        "gates.safetensors", "plan.gates.safetensors",  # of --gates
        "plan.study.journal.lock",  # of a killed run
    }  # fmt: skip


class Heard(Progress):
    """Keeps the sentences that a person should read."""

    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.mark.heavy
def test_a_budget_far_beyond_what_a_run_reads_is_measured_where_it_reads(recipe, tmp_path, monkeypatch):
    longest = []
    forward = LlamaForCausalLM.forward

    def noted(self, input_ids=None, **rest):
        if input_ids is not None:
            assert input_ids.shape[1] < 2048
            longest.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", noted)
    heard = Heard()
    summary = compress(recipe.override(budget=["1MiB@128k"]), tmp_path / "out", progress=heard)
    plan = Plan.load(tmp_path / "out" / "plan.json")
    assert longest[-1] == 800
    assert summary["reference_length"] == 128 * 1024
    sizes = summary["kv_bytes"]
    assert (sizes["planned"], sizes["measured"]) == (plan.kv_bytes(128 * 1024), None)
    assert sizes["measured_at"] == {"length": 800, "planned": plan.kv_bytes(800), "measured": plan.kv_bytes(800)}
    assert any("the cache is measured at 800 tokens" in text and "128k" in text for text in heard.said)
    assert any("Measured at 800 tokens" in str(part) for part in summary_tables(summary))


@pytest.mark.heavy
def test_a_loss_finds_the_budget_of_a_run(recipe, tmp_path):
    out = tmp_path / "out"
    asked = recipe.override(budget=[], max_loss="30%", calibration__validation_samples=5)
    summary = compress(asked, out)
    plan = Plan.load(out / "plan.json")
    assert (summary["max_loss"], summary["budget"]) == ("30%", plan.budget["asked"])
    assert 0 < plan.kv_share(700) <= float(plan.budget["asked"][0][:-1]) / 100
    assert plan.quality["measured_harm"]["plan"] <= math.log(1.3)
    assert "the smallest for a loss of 30%" in str(summary_tables(summary)[0])
    names = {path.name for path in out.iterdir()}
    assert names <= {path.name for path in of_compress(out)} | {"profile", ".moacompress.owner"}
    again = compress(asked, out)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}


def test_the_snippet_that_a_run_ends_with_runs(finished, capsys):
    out, _ = finished
    (snippet_lines, *others) = closing_lines(out)
    exec(snippet_lines.partition("\n\n")[2], {})
    assert capsys.readouterr().out.strip()
    assert any("report.html" in line for line in others)


def test_second_run_reuses_everything(finished, recipe):
    out, summary = finished
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"}
    begun = time.perf_counter()
    again = compress(recipe, out)
    assert time.perf_counter() - begun < 60
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in summary.items() if k != "seconds"}
    rewritten = {path.name for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp}
    assert rewritten <= {"summary.json", "seconds.json", "eval.json", "plan.json", "profile.json", "report.html"}


def texts_in(value):
    """Yields every text in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    for item in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from texts_in(item)


BINARY = (".safetensors", ".shingles")


def places_in(folder, places):
    """Returns what in the files that may be shared names one of the places, or is an absolute path."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in BINARY):
        text = file.read_text("utf-8")
        found += [(file.name, place) for place in places if str(place) in text]
        if file.suffix == ".json" and not file.name.startswith("tokenizer"):
            found += [(file.name, text) for text in texts_in(json.loads(text)) if len(text) > 1 and text[0] == "/"]
    return found


def test_nothing_that_is_shared_names_a_place(recipe, tiny_folder, tmp_path, monkeypatch):
    work = tmp_path / "work"
    model, prose, notes = work / "models" / "dense", work / "texts" / "prose", work / "texts" / "notes.txt"
    shutil.copytree(tiny_folder, model)
    prose.mkdir(parents=True)
    for file in (prose / "a.txt", prose / "b.txt", prose / "c.txt", notes):
        file.write_text(" ".join(f"On day {n} there were {n * n} of them in {file.stem}." for n in range(800)))
    monkeypatch.chdir(work)
    recipe = recipe.override(
        model="models/dense",
        calibration__text="texts/prose",
        calibration__sources=[{"generator": "needle", "haystack": "prose"}, {"path": "texts/notes.txt"}],
        search__storage="study.log",
    )
    out = work / "out"
    summary = compress(recipe, out)
    plan = Plan.load(out / "plan.json")
    assert summary["model"] == plan.provenance["source"] == plan.provenance["recipe"]["model"] == "dense"
    assert plan.provenance["recipe"]["calibration"]["text"] == "prose"
    assert plan.provenance["recipe"]["calibration"]["sources"][1]["path"] == "notes.txt"
    assert json.loads((out / "model" / "recipe.json").read_text()) == plan.provenance["recipe"]
    assert Recipe.from_dict(plan.provenance["recipe"]).override(model=recipe.model) != recipe
    card = (out / "model" / "README.md").read_text()
    assert "# dense, compressed" in card
    assert "base_model" not in card

    shared = tmp_path / "shared"
    shutil.copytree(out / "model", shared / "model")
    shutil.copytree(out / "plan.baselines", shared / "baselines")
    for file in ("plan.json", "plan.explain.json", "summary.json"):
        shutil.copyfile(out / file, shared / file)
    assert len(list(shared.rglob("*.json"))) > 8
    assert places_in(shared, [tmp_path, work.name + "/", "models/", "texts/", Path.cwd(), Path.home()]) == []

    monkeypatch.chdir(tmp_path)  # the profile knows where its model is, and the steps resume from anywhere
    found = find_plan(out / "profile", "60%", out=shared / "other.json")
    assert found.plan.provenance["source"] == "dense"
    export(model, shared / "other.json", shared / "exported")
    assert places_in(shared, [tmp_path, work.name + "/", "models/", "texts/", Path.cwd(), Path.home()]) == []


@pytest.mark.heavy
def test_shared_attention_is_repaired_where_the_search_assumed_it(recipe, tmp_path, caplog):
    of_search = {"search__share": "1", "search__alternatives": False, "search__assume_repaired": True}
    recipe = recipe.override(profile__anchors=2, **of_search)
    summary = compress(recipe, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "model" / "plan.json")
    assert sum(share is not None for share in plan.shares) == 1
    assert plan.quality["assumed_repaired"] is True
    assert plan.provenance["repair"]["profile"] == plan.provenance["profile"]
    assert summary["quality"]["needle-noise@700"]["nll"]["dense"] is not None
    assert "repaired weights" not in caplog.text
    again = compress(recipe, tmp_path / "out")
    assert again["seconds"]["export"] == summary["seconds"]["export"]  # it is reused
    assert {**again, "seconds": summary["seconds"]} == summary
    with caplog.at_level("WARNING"):
        export(recipe.model, tmp_path / "out" / "plan.json", tmp_path / "raw")
    assert "export with --repair PROFILE" in caplog.text


def test_a_plan_that_became_better_is_exported_again(finished, recipe, tmp_path):
    """A search that its timeout had stopped resumes in the next run, which is of the same recipe."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    plan = Plan.load(out / "plan.json")

    def exported(**notes):
        stored = plan.with_notes(provenance={**plan.provenance, **notes})
        stored.save(out / "model" / "plan.json")
        config = json.loads((out / "model" / "config.json").read_text())
        config["quantization_config"]["plan"] = stored.to_dict()
        (out / "model" / "config.json").write_text(json.dumps(config))

    exported(finished=False, trials=1)
    compress(recipe, out)
    assert Plan.load(out / "model" / "plan.json") == plan
    exported(search="another")
    with pytest.raises(PlanError, match="holds another model"):
        compress(recipe, out)


def test_a_smaller_budget_for_the_same_loss_is_exported_again(finished):
    """Each budget is a search of its own; a run that goes on may end with another."""
    plan = Plan.load(finished[0] / "plan.json")
    other = replace(plan, rules=tuple(reversed(plan.rules)))

    def noted(one, loss, search, profile="p"):
        budget = {**one.budget, "max_loss": loss} if loss else {**one.budget}
        return one.with_notes(budget=budget, provenance={**one.provenance, "search": search, "profile": profile})

    assert other.rules != plan.rules
    for first, second, same in (
        (("5%", "a"), ("5%", "b"), True),
        (("5%", "a"), ("9%", "a"), False),
        (("5%", "a"), ("5%", "b", "q"), False),
        ((None, "a"), (None, "a"), True),
        ((None, "a"), (None, "b"), False),
        ((None, "a"), ("5%", "a"), False),
    ):
        assert pipeline._is_earlier(noted(other, *first), noted(plan, *second)) == same
        assert not pipeline._is_earlier(noted(plan, *first), noted(plan, *first))


def test_what_a_cache_takes_is_measured_whatever_the_model_generates_by(compressed, tmp_path):
    shutil.copytree(compressed / "model", tmp_path / "model")
    settings = {"stop_strings": ["end"], "num_return_sequences": 2, "num_beams": 2}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    plan = Plan.load(tmp_path / "model" / "plan.json")
    assert measured_kv_bytes(tmp_path / "model", 300) == plan.kv_bytes(300)


def test_clock_adds_up_over_runs(tmp_path):
    (tmp_path / "seconds.json").write_text('{"step": 5.0}')
    assert StepClock(tmp_path / "seconds.json", SILENT).run("step", lambda: time.sleep(0.06)) is None
    assert 5.1 <= json.loads((tmp_path / "seconds.json").read_text())["step"] < 10
    for damaged in ("[]", '{"step": "1"}'):
        (tmp_path / "seconds.json").write_text(damaged)
        with pytest.raises(ArtefactError, match=r"seconds\.json does not say what steps took"):
            StepClock(tmp_path / "seconds.json", SILENT)


@pytest.mark.heavy
def test_a_run_on_rounded_weights_says_what_they_cost(recipe, tmp_path):
    """They are stored in the model's own dtype, whatever the run computes in."""
    source = load_source(recipe.model)
    source.model.bfloat16().save_pretrained(tmp_path / "dense")
    source.tokenizer.save_pretrained(tmp_path / "dense")
    rounded = recipe.override(model=str(tmp_path / "dense"), dtype="float32", weights="int8", head_weights="int4")
    summary = compress(rounded, tmp_path / "out")
    note = summary["rounded_weights"]
    assert (note["weights"], note["head_weights"]) == ("int8", "int4")
    assert note["samples"] >= 2
    assert 0 < note["kl"] < 2
    assert set(summary["weights"]) == {"Q8_0", "Q4_1", "bfloat16"}
    assert "Rounding them to int8 costs" in "".join(text for text in summary_tables(summary) if isinstance(text, str))
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "Linear layers were rounded to int8, embedding and output layer to int4: KL(before || rounded)" in card
    written = (tmp_path / "out" / "profile" / "weights.json").stat().st_mtime_ns
    assert compress(rounded, tmp_path / "out")["rounded_weights"] == note
    assert (tmp_path / "out" / "profile" / "weights.json").stat().st_mtime_ns == written
    with pytest.raises(PlanError, match="weights"):
        export(rounded.model, tmp_path / "out" / "plan.json", tmp_path / "plain")
    export(rounded.model, tmp_path / "out" / "plan.json", tmp_path / "same", weights="int8", head_weights="int4")


@pytest.mark.heavy
def test_a_run_keeps_weights_and_cache_within_a_total_of_memory(recipe, tmp_path):
    source = load_source(recipe.model, weights="int8")
    weights, cache = most_checkpoint_bytes(source.model, source.shape.dtype), source.shape.dense_kv_bytes(800) // 2
    size = f"{(weights + cache) / 1024:.6f}KiB"
    asked = recipe.override(weights="int8", budget=[f"memory={size}@800", "90%"])
    summary = compress(asked, tmp_path / "out")
    row = summary["memory"]["800"]
    assert summary["reference_length"] == 800
    assert row["weights"] == weights
    assert row["weights"] + row["kv_bytes"] <= row["limit"] <= weights + cache
    assert summary["kv_bytes"]["measured"] == row["kv_bytes"]
    assert sum(summary["weights"].values()) <= row["weights"]
    texts = "".join(text for text in summary_tables(summary) if isinstance(text, str))
    assert "Memory at 800 tokens: weights" in texts
    assert "Memory at 800 tokens" in (tmp_path / "out" / "report.html").read_text()
    assert compress(asked, tmp_path / "out")["memory"] == summary["memory"]  # all of it is reused
