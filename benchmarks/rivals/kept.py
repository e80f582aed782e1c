"""Whether a rival's method and our baseline of it keep the same keys of the same prompts, where both keep as many."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack

from moacompress.core.files import fingerprint
from moacompress.evaluation.eviction.registry import known_evictions
from rivals.measures import Bench, Failures, attempt
from rivals.prompts import SEEN, UNSEEN, Prompt
from rivals.settings import OURS, Setting

DTYPE = "float32"
"""Both compute in it, so that what differs is the method and not rounding."""
Kept = Sequence[Sequence[Sequence[int]]]
"""Positions by layer and KV head."""


def measure_kept(
    bench: Bench, settings: Sequence[Setting], prompts: Sequence[Prompt], questions: Sequence[str]
) -> Failures:
    """Compares the kept keys of settings that have a counterpart among our baselines.

    Returns:
        What could not be measured.
    """
    failures: Failures = {}

    def rows(setting: Setting) -> None:
        mine = Setting(OURS, setting.ours, {"baseline": setting.ours})
        counterpart = known_evictions()[setting.ours]()
        of = fingerprint([bench.key(setting, "kept", DTYPE), counterpart.key()])
        wanted = [
            (fingerprint([of, way, prompt.case.prompt_ids, prompt.question_at]), way, prompt)
            for way in (SEEN, UNSEEN)
            if way in questions
            for prompt in prompts
        ]
        left = [one for one in wanted if bench.records.get(one[0]) is None]
        if not left or bench.late():
            return
        with ExitStack() as stack:
            theirs, own = (stack.enter_context(bench.started(one, 0, dtype=DTYPE)) for one in (setting, mine))
            for key, way, prompt in left:
                if bench.late():
                    return
                case = prompt.case
                read = case.prompt_ids[: prompt.question_at if way == UNSEEN else -1]
                kept = theirs.do("kept", prompt=read)["kept"]
                count = sum(len(row) for layer in kept for row in layer)
                numbers = {
                    "same": same(kept, own.do("kept", prompt=read, count=count)["kept"]),
                    "share": count / (len(read) * sum(len(layer) for layer in kept)),
                }
                where = {"task": case.task, "length": case.length, "index": prompt.index}
                what = {"measure": "kept", "question": way, "ours": setting.ours, "patch_points": of}
                bench.file(key, numbers, theirs, setting, **what, **where)
                print(
                    f"{setting.full_name} {way} {case.task}: {numbers['same']:.3f} of the keys are the same",
                    file=sys.stderr,
                )

    for setting in settings:
        if setting.ours:
            attempt(failures, setting, rows)
    return failures


def same(theirs: Kept, ours: Kept) -> float:
    """Returns the share of the keys that they keep which we keep too."""
    pairs = [pair for layers in zip(theirs, ours, strict=True) for pair in zip(*layers, strict=True)]
    return sum(len({*one} & {*other}) for one, other in pairs) / sum(len(one) for one, _ in pairs)
