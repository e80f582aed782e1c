"""The page of a run: its numbers are those of the artefacts, a browser draws it, and what is missing is said."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moacompress.core.tables import readable_bytes
from moacompress.recipe import Recipe
from moacompress.report.page.figures import answer_table, peak_picture, quality_pictures, side_names
from moacompress.report.page.findings import Findings
from moacompress.report.page.heads import head_map, head_shades, rule_text
from moacompress.report.page.picture import OTHERS, Picture, roles_of
from moacompress.report.page.report_page import (
    embedded,
    missing_parts,
    page_sections,
    seen_from,
    tiles,
    verdict,
    write_page,
    write_pictures,
)
from moacompress.rules.cost import kept_bits
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.share import Share, with_shared_rules
from tests.browser import needs_browser
from tests.cli.commands import answer, invoke, problem

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=15000", "--dump-dom",
)  # fmt: skip
SPY = """
<pre id="spy"></pre><script>
  const spied = {}, map = document.querySelector('[data-figure="heads"]');
  for (const each of document.querySelectorAll(".plot[data-figure]")) {
    spied[each.dataset.figure] = each.data ? each.data.map((t) => ({ x: t.x, y: t.y, z: t.z })) : null;
  }
  map.emit("plotly_click", { points: [{ x: 1, y: 0 }] });
  spied.curve = document.getElementById("curve").data.map((t) => ({ name: t.name, x: t.x, y: t.y }));
  spied.distance = document.getElementById("distance").data[0].y;
  spied.text = document.getElementById("head-text").textContent;
  const shade = document.getElementById("shade");
  shade.value = 1;
  shade.dispatchEvent(new Event("change"));
  spied.tokens = map.data[0].z;
  const light = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  spied.themes = [light, getComputedStyle(document.body).backgroundColor];
  for (const tab of document.querySelectorAll("[data-tab]")) tab.click();
  spied.drawn = [...document.querySelectorAll(".plot")].map((each) => each.querySelectorAll("svg").length);
  const inside = (each) => each.getBoundingClientRect().right <= document.body.getBoundingClientRect().right + 1;
  spied.fits = [];
  for (const width of ["390px", "1000px"]) {
    document.body.style.width = width;
    document.getElementById("theme").click();
    spied.fits.push([...document.querySelectorAll("figure, p, .tile, nav, .scroll, .tabs, h1")].every(inside));
  }
  document.getElementById("spy").textContent = JSON.stringify(spied);
</script>
"""
"""Looks at what plotly was given, as a reader would: a click on a KV head, another colouring, the other theme, all tabs."""


@pytest.fixture(scope="module")
def page(run_folder: Path) -> str:
    data = answer("report", run_folder)
    assert (run_folder / "report.html").stat().st_size > 1e6  # plotly is in it
    assert data["missing"] == []
    assert data["sections"] == ["heads", "quality", "costs", "harm", "search"]
    return (run_folder / "report.html").read_text("utf-8")


def page_data(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="page-data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def traces(page: str, figure: str) -> dict[str, Any]:
    return {trace["name"]: trace for trace in page_data(page)["figures"][figure]["data"]}


def test_quality_is_that_of_the_evaluation(run_folder: Path, page: str) -> None:
    evaluation = json.loads((run_folder / "eval.json").read_text())
    rows = [row for row in evaluation["results"] if row["metric"] == "nll"]
    shown = traces(page, "quality-nll")
    assert {row["model"] for row in rows} >= {"plan", "dense", "per-layer"}
    for row in rows:
        trace = shown["this plan" if row["model"] == "plan" else row["model"]]
        assert trace["orientation"] == "h"
        at = trace["y"].index(f"{row['task']}, 700")
        assert trace["x"][at] == row["value"]
        low, high = row["ci95"] or (row["value"],) * 2
        assert trace["x"][at] + trace["error_x"]["array"][at] == pytest.approx(high)
        assert trace["x"][at] - trace["error_x"]["arrayminus"][at] == pytest.approx(low)


def test_the_first_sentence_is_what_it_saves_and_what_it_costs(run_folder: Path) -> None:
    """A kind that no calibration has comes before needles, the plan's own gain beside its kernels'."""
    evaluation = json.loads((run_folder / "eval.json").read_text())
    row = {"model": "plan", "metric": "retention", "length": None, "value": 0.6, "ci95": [0.31, 0.83], "prompts": 10}
    needles = {**row, "task": "calibrated kinds", "value": 1.0}
    evaluation["pooled"]["results"] += [needles, {**row, "task": "unseen kinds"}]
    found = Findings.load(run_folder / "plan.json")
    bench = json.loads((run_folder / "bench.json").read_text())
    prefill = next(row for row in bench["runs"] if row["phase"] == "prefill" and row["length"] == 128)
    prefill |= {"plan_ms": 150.0, "dense_ms": 100.0}
    plan, n = found.plan, 800
    dense, ours = plan.model.dense_kv_bytes(n), plan.kv_bytes(n)
    shown = verdict(replace(found, evaluation=evaluation, bench=bench))
    assert shown == (
        f"At 800 tokens the KV cache of a request takes {readable_bytes(ours)} instead of {readable_bytes(dense)}, so that "
        f"{10 * dense // ours} requests fit where 10 did. Kinds of prompts that no calibration has (code-question; 700 "
        "tokens): dense answers 10 of 2 prompts, and the plan 60% of these (95% interval 31% to 83%); exact match on all 2: "
        "dense 0%, plan 0%. The first token takes 1.50 times as long as dense's (128 tokens, batch 1)."
    )
    bare = verdict(replace(found, evaluation=None, bench=None))
    assert bare.endswith(" What it still answers was not measured. What the first token costs was not measured.")
    for row in bench["runs"]:
        row["full_span_ms"] = 16.3
    first, second, _, speed, kl = tiles(replace(found, evaluation=evaluation, bench=bench))
    assert (first["value"], second["value"]) == ("60%", "100%")
    assert second["what"].startswith("Kinds that the plan was calibrated on")
    assert speed["beside"].endswith("; the same kernels with all keys 16.3 ms")
    assert kl["beside"].endswith(
        f"; n = {plan.quality['samples']} validation samples, which the search chose the plan by"
    )


def test_a_missing_search_can_be_pasted(run_folder: Path, tmp_path: Path) -> None:
    """Once it ran, the page finds the search's notes; the plan is left as it is."""
    folder = tmp_path / "my run"
    shutil.copytree(run_folder, folder)
    (folder / "plan.explain.json").unlink()
    before = (folder / "plan.json").read_bytes()
    found = Findings.load(folder / "plan.json")
    (missing,) = missing_parts(found)
    asked, place = " ".join(f"--budget {budget}" for budget in found.plan.budget["asked"]), shlex.quote(str(folder))
    assert missing.command == f"moacompress search {place[:-1]}/profile' {asked} -o {place[:-1]}/plan-again.json'"
    program, *arguments = shlex.split(missing.command)
    assert program == "moacompress"
    result = invoke(*arguments, "-q")
    assert result.exit_code == 0, result.output
    assert (folder / "plan.json").read_bytes() == before
    assert (folder / "plan-again.json").is_file()
    assert Findings.load(folder / "plan.json").explanation is not None


def test_a_search_with_settings_of_its_own_is_repeated_with_them(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    shutil.copytree(run_folder / "profile", folder / "profile")
    plan = Plan.load(run_folder / "plan.json")
    recipe = Recipe.from_dict(plan.provenance["recipe"]).override(search__trials=5, search__floors={0: 0.5})
    plan.with_notes(provenance={**plan.provenance, "recipe": recipe.shared("dense")}).save(folder / "half.json")
    found = Findings.load(folder / "half.json")
    (command,) = [part.command for part in missing_parts(found) if part.section == "search"]
    shown, search = command.split(" && ")
    first, file = shown.split(" > ")
    text = invoke(*shlex.split(first)[1:]).stdout
    Path(shlex.split(file)[0]).write_text(text)
    profile, yaml, again = (
        shlex.quote(f"{folder}/{name}") for name in ("profile", "half-again.yaml", "half-again.json")
    )
    asked = " ".join(f"--budget {budget}" for budget in plan.budget["asked"])
    assert search == f"moacompress search {profile} {asked} --recipe {yaml} -o {again}"
    assert Recipe.load(folder / "half-again.yaml").search == recipe.search


def test_sample_answers_are_those_of_the_evaluation(run_folder: Path) -> None:
    evaluation = json.loads((run_folder / "eval.json").read_text())
    assert len(evaluation["answers"]) == 4
    for row in evaluation["answers"]:
        assert "?" in row["question"]
        assert row["references"]
        assert row.keys() >= {"dense", "plan", "dense_match", "plan_match"}
    first = evaluation["answers"][0]
    assert re.fullmatch(r"(What|Which) .*\? Answer with .* alone\.", first["question"])
    pairs = ((0, 0), (1, 1), (1, 1), (1, 0))
    scored = [{**first, "dense_match": a, "plan_match": b, "plan": f"{a}{b}"} for a, b in pairs]
    found = answer_table({"answers": scored})
    assert found is not None
    assert [row[-1] for row in found.rows] == ["10", "11", "00"]


def test_what_dense_cannot_do_is_marked(run_folder: Path) -> None:
    evaluation = json.loads((run_folder / "eval.json").read_text())
    assert all("*" not in picture.note for picture in quality_pictures({**evaluation, "at_floor": []}))
    floor = [{"task": "needle-noise", "length": 700}]
    for picture in quality_pictures({**evaluation, "at_floor": floor}):
        assert "* Dense cannot do this itself" in picture.note
        assert any("needle-noise *, 700" in trace["y"] for trace in picture.traces)


def test_memory_is_that_of_the_plan_and_latency_that_of_the_bench(run_folder: Path, page: str) -> None:
    plan = Plan.load(run_folder / "plan.json")
    shown = traces(page, "memory")["this plan"]
    assert dict(zip(shown["x"], shown["y"], strict=True)) == {n: plan.kv_bytes(n) / 2**20 for n in shown["x"]}
    assert {256, 800, 32768} <= set(shown["x"])
    dense, eight, four = (
        traces(page, "memory")[name]["y"][-1]
        for name in (f"dense, {plan.model.dtype}", "all keys, 8 bits", "all keys, 4 bits")
    )
    assert dense > 1.5 * eight > 2 * four
    runs = [row for row in json.loads((run_folder / "bench.json").read_text())["runs"] if row["phase"] == "decode"]
    decode = traces(page, f"decode-1-{runs[0]['dtype']}")
    assert decode["this plan"]["y"] == [row["plan_ms"] for row in runs]
    assert decode["dense"]["x"] == [64, 128]
    assert "times as fast as dense" in page


def test_the_map_is_that_of_the_plan(run_folder: Path, page: str) -> None:
    plan, data = Plan.load(run_folder / "plan.json"), page_data(page)
    shape = plan.model
    trace = data["figures"]["heads"]["data"][0]
    full = shape.token_bytes(Rule.FULL) * Rule.FULL.slots(800, plan.min_window, None)
    rows = [
        [shape.token_bytes(rule) * rule.slots(800, plan.min_window, None) / full for rule in row] for row in plan.rules
    ]
    assert np.allclose(np.array(trace["z"]).T, 100 * np.array(rows), rtol=1e-3)
    assert float(np.sum(rows)) * full == pytest.approx(plan.kv_bytes(800))
    tokens = {shade["name"]: np.array(shade["z"]) for shade in data["shades"]}["share of its tokens"]
    assert tokens.mean() / 100 == pytest.approx(plan.density(800), rel=1e-3)
    bits = {shade["name"]: np.array(shade["z"]) for shade in data["shades"]}.get("bits of its keys")
    kept = np.array([[rule.kept(800, plan.min_window, None) for rule in row] for row in plan.rules]).T
    assert bits is None or (bits * kept).sum() / kept.sum() == pytest.approx(kept_bits(plan, 800)["keys"], rel=1e-3)


def test_a_click_shows_the_profile(run_folder: Path, page: str) -> None:
    heads, found = page_data(page)["heads"], Findings.load(run_folder / "plan.json")
    profile = found.profile
    assert profile is not None
    influence = profile.influence("robust")[1, 1, 0]
    (curve,) = heads["curves"]
    assert sorted(curve["harm"][1][0]) == pytest.approx(sorted(influence), rel=1e-3)
    assert curve["kept"][1] == sorted(rule.kept(800, profile.min_window, None) for rule in profile.rules)
    share = np.asarray(profile.statistics.arrays["distance"])[np.asarray(profile.sample_lengths) == 800].mean(0)
    used = len(heads["distance"]["labels"])
    assert np.allclose(heads["distance"]["share"], share[..., :used], rtol=2e-3)
    assert share[..., used:].max(initial=0) < 1e-6
    assert heads["distance"]["labels"][-1] == "512-1023"  # of 800 tokens
    plan = found.plan
    assert heads["chosen"][1][0]["kept"] == plan.rules[1][0].kept(800, plan.min_window, None)
    whole = profile.offering(profile.profiled_formats)  # the star is on the scale of the curve, with its formats
    costs = whole.influence("robust")[1]
    for layer, row in enumerate(plan.rules):
        for head, rule in enumerate(row):
            assert heads["chosen"][layer][head]["harm"] == pytest.approx(
                costs[layer, head, whole.rules.index(rule)], rel=1e-3
            )


def test_kl_and_history_are_those_of_the_search(run_folder: Path, page: str) -> None:
    explanation = json.loads((run_folder / "plan.explain.json").read_text())
    (kl,) = page_data(page)["figures"]["baselines"]["data"]
    there = {name: value for name, value in explanation["harm"].items() if value is not None and name != "trial0"}
    assert sorted(kl["x"]) == sorted(there.values())
    trials = {row["trial"]: row["harm"] for row in explanation["trials"]}
    shown = traces(page, "history")
    plotted = [shown[name] for name in ("measured on all samples", "pruned") if name in shown]
    assert {x: y for trace in plotted for x, y in zip(trace["x"], trace["y"], strict=True)} == trials
    ended = [row["harm"] for row in explanation["trials"] if not row["pruned"]]
    assert shown["best so far"]["y"][-1] == min(ended)
    audit = traces(page, "audit")
    assert audit["one KV head's span"]["y"] == [0.4, 0.03]
    assert "whole plans" not in audit  # a KL of 0 has no place on a logarithmic axis


@pytest.mark.heavy
def test_a_browser_draws_it(page: str, run_folder: Path, tmp_path: Path) -> None:
    browser = needs_browser()
    (tmp_path / "page.html").write_text(page.replace("</body>", SPY + "</body>"), "utf-8")
    url = f"file://{tmp_path / 'page.html'}"
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={tmp_path / 'user'}", url], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="spy">(.*?)</pre>', done.stdout, re.S)
    assert found is not None, done.stdout[-2000:]
    spied, data = json.loads(unescape(found[1])), page_data(page)
    assert all(count > 0 for count in spied["drawn"])
    assert spied["fits"] == [True, True]
    assert len(set(spied["themes"])) == 2
    for name, figure in data["figures"].items():
        for trace, drawn in zip(
            figure["data"], spied[name] or figure["data"], strict=True
        ):  # hidden tabs are drawn later
            assert (drawn.get("x"), drawn.get("y"), drawn.get("z")) == (trace.get("x"), trace.get("y"), trace.get("z"))
    assert spied["tokens"] == data["shades"][1]["z"]
    assert spied["distance"] == data["heads"]["distance"]["share"][1][0]
    assert "layer 1, KV head 0" in spied["text"]
    kls = [kl for kl in data["heads"]["curves"][0]["harm"][1][0] if kl > 0]
    assert spied["curve"][0]["y"] == kls


def test_what_is_missing_names_its_command(run_folder: Path, tmp_path: Path) -> None:
    shutil.copy(run_folder / "plan.json", tmp_path / "plan.json")
    result = invoke("report", tmp_path / "plan.json", "-o", tmp_path / "page.html")
    assert result.exit_code == 0
    for command in ("eval", "bench", "search", "report", "profile"):
        assert f"moacompress {command} " in result.stdout
    assert str(tmp_path.parent) not in (tmp_path / "page.html").read_text("utf-8")  # a page may be shared


def test_commands_of_a_shared_page_fit_together(tmp_path: Path) -> None:
    place = seen_from(tmp_path / "mine")
    assert place(str(tmp_path / "mine")) == "mine"
    assert place(str(tmp_path / "mine" / "profile")) == "mine/profile"
    assert place("/somewhere/else/profile") == "profile"
    assert place("runs/mine") == "runs/mine"


def test_layers_that_share_take_what_the_plan_says(run_folder: Path, tmp_path: Path) -> None:
    plan = Plan.load(run_folder / "plan.json")
    shares = (None, Share(0, tuple(range(plan.model.kv_heads))), *[None] * (plan.model.layers - 2))
    shared = replace(plan, rules=with_shared_rules(plan.rules, shares), shares=shares)
    shared.save(tmp_path / "plan.json")
    found = Findings.load(tmp_path / "plan.json")
    picture, shades = head_map(found), head_shades(found)
    dense = plan.model.dense_kv_bytes(800) / (plan.model.layers * plan.model.kv_heads)
    assert np.sum(shades[0]["z"]) / 100 * dense == pytest.approx(shared.kv_bytes(800), rel=1e-3)
    assert picture.traces[0]["text"][0][1] == "=0"
    assert "no keys of its own" in rule_text(shared, 1, 0, 800)
    assert "no keys of its own" not in rule_text(shared, 0, 0, 800)


def test_sides_are_told_apart() -> None:
    names = side_names(["plan", "dense", "/runs/a/model", "/runs/b/model", "c/model", "d/healed"])
    assert list(names.values()) == ["this plan", "dense", "a", "b", "c", "healed"]
    assert list(side_names(["x/a/healed", "y/a/healed"]).values()) == ["x/a/healed", "y/a/healed"]


def test_commands_have_whole_places_on_the_terminal_and_names_on_the_page(run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    shutil.copytree(run_folder, out)
    (out / "bench.json").unlink()
    (missing,) = answer("report", out)["missing"]
    assert missing["command"] == f"moacompress bench '{out}' -o '{out}'/bench.json"
    page = (out / "report.html").read_text("utf-8")
    assert "moacompress bench &#39;my run&#39; -o &#39;my run&#39;/bench.json" in page


def test_a_checkpoint_alone_has_a_page(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "model", tmp_path / "model")
    found = Findings.load(tmp_path / "model" / "plan.json")
    data = write_page(found, tmp_path / "page.html")
    assert data["sections"] == ["heads", "costs", "harm"]
    assert Findings.load(run_folder / "model" / "plan.json").folder == run_folder


def test_no_plotly_is_one_sentence(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moacompress.report.page.report_page.find_spec", lambda name: None)
    said = problem("report", run_folder, "-o", tmp_path / "page.html", exit_code=2)
    assert 'pip install "moacompress[report]"' in said
    assert not (tmp_path / "page.html").exists()


def test_text_from_files_ends_no_element() -> None:
    text = embedded({"name": "</script><script>alert(1)</script>", "bad": float("nan")})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><script>alert(1)</script>", "bad": None}


def test_tags_in_files_are_text(run_folder: Path, tmp_path: Path) -> None:
    """Plotly makes a link of `<a href>` and takes any `style`, which could fetch something."""
    plan = Plan.load(run_folder / "plan.json")
    plan.with_notes(provenance={**plan.provenance, "source": "<b>bold"}).save(tmp_path / "plan.json")
    evil = "<a href='https://example.com' style='cursor:url(https://example.com)'>task</a>\ud800"
    evaluation = json.loads((run_folder / "eval.json").read_text())
    for row in (*evaluation["results"], *evaluation["answers"]):
        row |= {"task": evil, "prompts": evil}
    evaluation["answers"][0]["question"] = evil
    (tmp_path / "eval.json").write_text(json.dumps(evaluation))
    write_page(Findings.load(tmp_path / "plan.json"), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "&lt;b&gt;bold" in page
    assert "<a href='https" not in page
    figures = json.dumps(page_data(page)["figures"])
    assert "&lt;a href='https://example.com'" in figures
    assert {tag.lower() for tag in re.findall(r"<(/?\w+)", figures)} <= {"b", "/b", "br", "extra", "/extra"}


def test_every_side_has_a_colour_of_its_own() -> None:
    roles = roles_of(["plan", "dense", "uniform:4", "uniform-elastic", "split", "quantized:hqq-4", "plan"])
    assert roles["uniform:4"] == "uniform"
    assert [roles[name] for name in ("uniform-elastic", "split", "quantized:hqq-4")] == list(OTHERS[:3])
    assert len(set(roles.values())) == len(roles)


def test_rules_in_words(run_folder: Path) -> None:
    plan = Plan.load(run_folder / "plan.json")
    rules = ((Rule(4, 32, 128, "int8", "int4", 16, 64), Rule(16, 64, 0)), (Rule.FULL, Rule.FULL))
    made = Plan(plan.model, 32, (*rules, *plan.rules[2:]))
    text = rule_text(made, 0, 0, 800)
    assert "the first 4 and the last 32 and 0.125 of all so far" in text
    assert "chosen by its gate: 16 and 0.0625 of all so far" in text
    assert "keys int8, values int4" in text
    assert "the first 16 and the last 64" in rule_text(made, 0, 1, 800)
    assert "800 of 800 tokens" in rule_text(made, 1, 0, 800)


def test_pictures_for_a_card(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def to_image(self: Any, form: str, scale: float) -> bytes:
        drawn.append(self.layout.title.text)
        return b"\x89PNG"

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", to_image)
    asked = ("report", run_folder, "-o", tmp_path / "p.html", "--pictures", tmp_path / "png")
    answer(*asked)
    wanted = [p.title for s in page_sections(Findings.load(run_folder / "plan.json")) for p in (*s.pictures, *s.tabs)]
    assert drawn == wanted
    assert len(list((tmp_path / "png").glob("*.png"))) == len(wanted)

    model = tmp_path / "model"
    shutil.copytree(run_folder / "model", model)
    texts = []
    for _ in range(2):
        answer("report", model, "-o", tmp_path / "p.html", "--card")
        texts.append((model / "README.md").read_text("utf-8"))
    assert texts[0] == texts[1]
    assert texts[0].count("## Pictures") == 1
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", texts[0])
    assert "pictures/heads.png" in links
    assert all((model / link).is_file() for link in links)
    assert invoke("report", run_folder / "plan.explain.json", "--card").exit_code != 0

    def refuse(self: Any, form: str, scale: float) -> bytes:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", refuse)
    assert "PNG files need kaleido and a Chrome" in problem(*asked, exit_code=2)


def test_a_picture_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [RuntimeError("kaleido_scopes is not defined"), b"png"]

    def now_and_then(self: Any, form: str, scale: float) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return bytes(answer)

    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", now_and_then)
    assert Picture("one", "One", [{"type": "bar", "y": [1]}], {}).png() == b"png"


def test_pictures_stay_in_their_folder(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a benchmark's file calls its phases."""
    monkeypatch.setattr(Picture, "png", lambda picture: b"")
    found = Findings.load(run_folder / "plan.json")
    assert found.bench is not None
    runs = [{**row, "phase": "../../evil", "batch": "/etc\0.png"} for row in found.bench["runs"]]
    folder = tmp_path / "a" / "b" / "png"
    files = write_pictures(replace(found, bench={**found.bench, "runs": runs}), folder)
    assert folder / f"______evil-_etc__png-{runs[0]['dtype']}.png" in files
    assert {path.parent for path in tmp_path.rglob("*") if path.is_file()} == {folder}


def test_a_page_replaces_pages_alone(run_folder: Path, tmp_path: Path) -> None:
    plan, other, page = tmp_path / "plan.json", tmp_path / "other.html", tmp_path / "page.html"
    shutil.copyfile(run_folder / "plan.json", plan)
    other.write_text("<!DOCTYPE html><title>mine</title>")
    for file, match in ((plan, "is not a page"), (other, "is not a page"), (tmp_path, "cannot be replaced")):
        assert match in problem("report", run_folder, "-o", file)
    assert plan.read_bytes() == (run_folder / "plan.json").read_bytes()
    page.write_text("")
    for _ in range(2):
        answer("report", run_folder, "-o", page)


def test_a_benchmark_of_a_server_alone_has_no_peaks(run_folder: Path) -> None:
    assert peak_picture({"runs": []}) is None
    found = Findings.load(run_folder / "plan.json")
    assert found.bench is not None
    assert page_sections(replace(found, bench={**found.bench, "runs": [], "ratios": []}))
