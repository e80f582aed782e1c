"""The map of a plan's KV heads, and what a click on one of them shows: what spans would cost it, and how it attends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moacompress.calibration.profile.statistics import DISTANCE_BINS, ROBUST
from moacompress.calibration.profile.store import Profile
from moacompress.report.page.findings import EXPLANATIONS, Findings, reading_file
from moacompress.report.page.picture import Picture, axis
from moacompress.rules.budget import format_length
from moacompress.rules.formats import find_format
from moacompress.rules.plan import Plan
from moacompress.rules.rule import SINKS, Rule

DIGITS = 4
"""Significant digits of what the page holds of every KV head."""
LEAST = 1e-6
"""Share of the attention below which a distance is not used: sums leave that much by rounding."""
STEP = 10
"""A colour scale ends at a multiple of this."""
Grid = list[list[float]]


def head_map(found: Findings) -> Picture:
    """Returns the map of layers and KV heads, coloured by the first of `head_shades`."""
    plan, n = found.plan, found.reference
    layers, heads = range(plan.model.layers), range(plan.model.kv_heads)
    shares = [plan.share(layer) for layer in layers]
    first = head_shades(found)[0]
    trace = {
        "type": "heatmap",
        "x": list(layers),
        "y": list(heads),
        "z": first["z"],
        "zmin": 0,
        "zmax": first["top"],
        "customdata": [[rule_text(plan, layer, head, n) for layer in layers] for head in heads],
        "text": [["" if share is None else f"={share.anchor}" for share in shares] for _ in heads],
        "texttemplate": "%{text}",
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorscale": "Cividis",
        "xgap": 1,
        "ygap": 1,
        "colorbar": {"thickness": 10, "title": {"text": first["unit"], "side": "right"}},
    }
    bare = {"showgrid": False, "zeroline": False}
    layout = {
        "xaxis": axis("layer", dtick=max(1, len(layers) // 10), **bare),
        "yaxis": axis("KV head", dtick=max(1, len(heads) // 8), autorange="reversed", **bare),
        "height": 150 + max(90, min(22 * len(heads), 420)),
    }
    note = f"At {format_length(n)} tokens. Choose a KV head to see what it was chosen from."
    return Picture("heads", "What every KV head keeps", [trace], layout, note)


def head_shades(found: Findings) -> list[dict[str, Any]]:
    """Returns what the map can be coloured by: each `name`, `z` `[kv_heads, layers]`, `top` of the scale and `unit`."""
    plan, n, shape = found.plan, found.reference, found.plan.model
    dense = Plan.full(shape).head_bytes(n)
    sizes = [
        [_short(100 * ours / whole) for ours, whole in zip(*rows, strict=True)]
        for rows in zip(plan.head_bytes(n), dense, strict=True)
    ]
    shades: list[tuple[str, Grid, str]] = [
        ("share of its bytes", [list(column) for column in zip(*sizes, strict=True)], "% of dense bytes")
    ]

    def shade(name: str, unit: str, of: Callable[[Rule, int | None], float]) -> None:
        grid = [
            [_short(of(plan.rules[layer][head], shape.native_windows[layer])) for layer in range(shape.layers)]
            for head in range(shape.kv_heads)
        ]
        shades.append((name, grid, unit))

    def kept(rule: Rule, native: int | None) -> int:
        return int(rule.kept(n, plan.min_window, native))

    def bits(name: str) -> float:
        return 8 * find_format(name).vector_bytes(shape.head_dim, shape.dtype) / shape.head_dim

    shade("share of its tokens", "% of tokens", lambda rule, native: 100 * kept(rule, native) / kept(Rule.FULL, native))
    if plan.selects:

        def chosen(rule: Rule, native: int | None) -> float:
            return 100 * (1 - kept(rule.without_choice(), native) / kept(rule, native))

        shade("chosen by its gate", "% of kept tokens", chosen)
    if not all(rule.is_native for row in plan.rules for rule in row):
        shade("bits of its keys", "bits a number", lambda rule, native: bits(rule.key_format))
        shade("bits of its values", "bits a number", lambda rule, native: bits(rule.value_format))
    return [
        {"name": name, "z": grid, "unit": unit, "top": STEP * math.ceil(np.max(grid) / STEP) or STEP}
        for name, grid, unit in shades
    ]


def rule_text(plan: Plan, layer: int, head: int, n: int) -> str:
    """Returns in words what a KV head keeps, with `<br>` between lines."""
    rule, native, share = plan.rules[layer][head], plan.model.native_windows[layer], plan.share(layer)
    kept = int(rule.kept(n, plan.min_window, native))
    lines = [f"<b>layer {layer}, KV head {head}</b>"]
    of = int(Rule.FULL.kept(n, plan.min_window, native))
    lines.append(f"{kept:,} of {of:,} tokens" + ("" if native is None else ", the layer's own window"))
    if kept < of:
        lines.append(f"the first {rule.sink} and the last {_grown(rule.alpha, rule.beta_q, plan.min_window)}")
        if rule.selects:
            lines.append(f"chosen by its gate: {_grown(rule.select_alpha, rule.select_beta_q)}")
    lines.append(
        (f"keys {rule.key_format}, " if share is None else "no keys of its own, ") + f"values {rule.value_format}"
    )
    if share is not None:
        lines.append(str(share))
    return "<br>".join(lines)


def _grown(fixed: int, beta_q: int, least: int = 0) -> str:
    """Returns in words a number of tokens that may grow with those so far."""
    share = f"{beta_q / 1024:.3g} of all so far"
    text = f"{fixed} and {share}" if fixed and beta_q else share if beta_q else str(fixed)
    return f"{text}, {least} at least" if beta_q and least > fixed else text


def head_details(found: Findings) -> dict[str, Any]:
    """Returns what a click on a KV head shows, as JSON values; without a profile only what the plan says.

    It has `text` `[layers, kv_heads]`; `at`, the profiled length nearest to the reference length, and there `curves`: of
    windows and of windows with gates the kept tokens `[layers, rules]` and the predicted KL `[layers, kv_heads, rules]`,
    nats; `chosen` `[layers, kv_heads]` with `kept` and `harm`, by the same prediction, formats included; `distance`:
    `labels` of the bins in tokens, up to the last used one, and the probability `[layers, kv_heads, bins]`; `sinks` with
    the probability on the first tokens.
    """
    plan, profile, n = found.plan, found.profile, found.reference
    layers, heads = range(plan.model.layers), range(plan.model.kv_heads)
    text = [[rule_text(plan, layer, head, n) for head in heads] for layer in layers]
    if profile is None:
        return {"length": n, "text": text, "curves": []}
    at = min(profile.lengths, key=lambda length: (abs(length - n), length))
    influence = profile.influence(ROBUST)[profile.lengths.index(at)]
    kinds = {
        name: [number for number, rule in enumerate(profile.rules) if rule.selects == selects]
        for name, selects in (("windows", False), ("windows and a gate", True))
    }
    whole = profile.offering(profile.profiled_formats)
    costs, places = whole.influence(ROBUST)[whole.lengths.index(at)], {rule: i for i, rule in enumerate(whole.rules)}
    data: dict[str, Any] = {
        "length": n,
        "text": text,
        "curves": [{"name": name, **_curve(profile, some, influence, at)} for name, some in kinds.items() if some],
        "at": at,
        "chosen": [[_chosen(plan, layer, head, at, costs, places) for head in heads] for layer in layers],
    }
    arrays = profile.statistics.arrays
    if "distance" in arrays:
        samples = [index for index, length in enumerate(profile.sample_lengths) if length == at]
        distance, sinks = (np.asarray(arrays[name], np.float64)[samples].mean(0) for name in ("distance", "sink_mass"))
        used = 1 + int(np.flatnonzero((distance > LEAST).any((0, 1))).max(initial=0))
        data["distance"] = {"labels": _bins()[:used], "share": _nested(distance[..., :used])}
        data["sinks"] = {"tokens": list(SINKS), "share": _nested(sinks)}
    return data


def _chosen(plan: Plan, layer: int, head: int, n: int, costs: Any, places: Mapping[Rule, int]) -> dict[str, Any]:
    """Returns the tokens that a KV head keeps at `n` tokens, and what its own rule costs; None where it was not profiled."""
    rule = plan.rules[layer][head]
    kept = int(rule.kept(n, plan.min_window, plan.model.native_windows[layer]))
    return {"kept": kept, "harm": _short(costs[layer, head, places[rule]]) if rule in places else None}


@reading_file(EXPLANATIONS)
def most_worth(found: Findings) -> list[int]:
    """Returns the layer and the KV head whose bytes are worth most, which the page shows first."""
    rows = (found.explanation or {}).get("heads") or [{"layer": 0, "kv_head": 0}]
    return [int(rows[0]["layer"]), int(rows[0]["kv_head"])]


def _curve(profile: Profile, numbers: list[int], influence: Any, n: int) -> dict[str, Any]:
    """Returns the kept tokens and the KL of some rules of a profile, by layer; rules in the order of what they keep."""
    kept, kl = [], []
    for layer, native in enumerate(profile.shape.native_windows):
        sizes = {number: int(profile.rules[number].kept(n, profile.min_window, native)) for number in numbers}
        order = sorted(numbers, key=sizes.__getitem__)
        kept.append([sizes[number] for number in order])
        kl.append(_nested(influence[layer][:, order]))
    return {"kept": kept, "harm": kl}


def _bins() -> list[str]:
    """Returns the names of the bins of distances: 0, 1, 2-3, 4-7 and so on."""
    starts = [2**power for power in range(DISTANCE_BINS - 1)]
    ranges = [f"{low}" if low == 1 else f"{low}-{2 * low - 1}" for low in starts[:-1]]
    return ["0", *ranges, f"{format_length(starts[-1])}+"]


def _nested(values: Any) -> Any:
    """Returns an array as lists of numbers with few digits."""
    return [_nested(part) for part in values] if np.ndim(values) else _short(float(values))


def _short(value: float) -> float:
    return float(f"{float(value):.{DIGITS}g}")
