"""Checks in a fresh process, with plain transformers, that a written checkpoint computes what its model computes here.

Two processes, two devices or two kernels never agree to the bit, and where two tokens are nearly tied the last bit decides.
So logits are compared, not tokens: the fresh process reads the same prompt and the same tokens, one at a time and through the
plan's cache, and its logits may differ by a share of their spread that depends on the dtype. A token whose lead over the next
is more than twice that is then the best one in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from moacompress.core.errors import MoaCompressError
from moacompress.models.placement import input_device
from moacompress.models.source import SourceModel
from moacompress.rules.plan import Plan

PROMPT = "The quick brown fox jumps over the lazy dog. " * 24
PROMPT_TOKENS = 160
"""Tokens of the prompt: more than the largest sink and the smallest window together, so that a plan leaves something out."""
NEW_TOKENS = 8
"""Tokens that are generated."""
TOLERANCE = {"float64": 0.01, "float32": 0.01, "float16": 0.02, "bfloat16": 0.1}
"""How far a logit may be off, as a share of how far the best stands above the median.

SmolLM2 on other kernels is off by 2e-6 in float32, 0.003 in float16 and 0.03 in bfloat16 (float32 has room for TF32); with two
neighbouring layers swapped it is off by 0.3 to 0.5.
"""

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "stop_strings": None}
"""What `generate` is told for one sequence of the likeliest tokens, whatever a model's own settings are."""
_SCRIPT = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LogitsProcessor

folder, asked, answer, trusted, named = sys.argv[1:]
asked = load_file(asked)
prompt, tokens = asked["prompt"], asked["tokens"]

class Repeat(LogitsProcessor):
    def __call__(self, ids, scores):
        said = torch.full_like(scores, -torch.inf)
        said[:, tokens[ids.shape[1] - len(prompt)]] = 0
        return said

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted == "True")
out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=len(tokens),
                     min_new_tokens=len(tokens), do_sample=False, num_beams=1, num_return_sequences=1, stop_strings=None,
                     logits_processor=[Repeat()], output_logits=True, return_dict_in_generate=True)
cache = out[named]
notes = {"cache": type(cache).__name__, "plan": str(getattr(cache, "plan_key", ""))}
save_file({"logits": torch.cat(out.logits).float().contiguous()}, answer, metadata=notes)
"""


@dataclass(frozen=True, eq=False)
class Continuation:
    """How a model under a plan continues a prompt: the tokens that it generates greedily.

    `logits` are those that each token was taken from, float32 `[tokens, vocabulary]`; `plan` is the plan's key, `dtype` what
    the model computes in.
    """

    prompt: list[int]
    tokens: list[int]
    logits: npt.NDArray[np.float32]
    plan: str
    dtype: str

    @staticmethod
    def of(source: SourceModel, plan: Plan) -> Continuation:
        """Generates with a model that is under `plan`."""
        import torch

        model: Any = source.model
        longest = min(PROMPT_TOKENS, source.context - NEW_TOKENS) if source.context else PROMPT_TOKENS
        prompt = [int(i) for i in source.tokenizer(PROMPT)["input_ids"]][: max(longest, 1)] or [0]
        ids = torch.tensor([prompt], device=input_device(model))
        out: Any = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            **GREEDY,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.cat(out.logits).float().cpu().numpy()
        return Continuation(prompt, out.sequences[0, len(prompt) :].tolist(), logits, plan.key(), source.computes_in)


def verify_fresh(folder: Path, expected: Continuation, *, trust_remote_code: bool = False) -> None:
    """Loads a compressed checkpoint with plain transformers in a fresh process and compares its logits with this process'.

    Raises:
        MoaCompressError: it did not load, ran without the plan's cache or under another plan, or gave other logits.
    """
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from moacompress.runtime.compat.alternates import CACHE

    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    environment.pop("TORCH_DEVICE_BACKEND_AUTOLOAD", None)
    with TemporaryDirectory(prefix="moacompress-") as place:
        asked, answer = Path(place) / "asked.safetensors", Path(place) / "answer.safetensors"
        save_file({"prompt": np.array(expected.prompt), "tokens": np.array(expected.tokens)}, asked)
        # nothing of the current folder is imported
        script = [sys.executable, "-P", "-c", _SCRIPT]
        arguments = [*map(str, (folder, asked, answer, trust_remote_code)), CACHE]
        done = subprocess.run([*script, *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise MoaCompressError(f"the exported checkpoint did not load and generate in a fresh process: {last}")
        with safe_open(str(answer), framework="numpy") as file:
            logits, notes = file.get_tensor("logits"), file.metadata()
    if notes["cache"] != "PlanCache":
        raise MoaCompressError(
            f"the exported checkpoint ran with a {notes['cache']} in a fresh process: moacompress was not loaded with "
            "transformers; install it there (`pip install moacompress`) so that its entry point is seen"
        )
    if notes["plan"] != expected.plan:
        raise MoaCompressError(
            f"the exported checkpoint runs under another plan in a fresh process: key {notes['plan']}, not {expected.plan}"
        )
    problem = difference(logits, expected)
    if problem is not None:
        raise MoaCompressError(f"the exported checkpoint computes something else in a fresh process: {problem}")


def difference(logits: npt.NDArray[np.float32], expected: Continuation) -> str | None:
    """Returns where logits `[tokens, vocabulary]` are further from the expected ones than `TOLERANCE` allows, or None."""
    ours, allowed = expected.logits, TOLERANCE[expected.dtype]
    if logits.shape != ours.shape:
        return f"logits of shape {list(logits.shape)}, not {list(ours.shape)}"
    with np.errstate(invalid="ignore"):
        # tokens that a model rules out are infinitely far down in both
        apart = np.where(logits == ours, 0, np.abs(logits.astype(np.float64) - ours))
    spread = ours.max(axis=1) - np.median(ours, axis=1)
    if not (np.isfinite(apart).all() and np.isfinite(spread).all()):
        return "logits that are not finite, there or here"
    worst = apart.max(axis=1)
    over = worst - allowed * spread
    step = int(over.argmax())
    if over[step] <= 0:
        return None
    token = int(apart[step].argmax())
    share = worst[step] / max(spread[step], np.finfo(np.float32).tiny)
    return (
        f"at generated token {step + 1} of {len(ours)} the logit of token {token} is {logits[step, token]:.4g} there and "
        f"{ours[step, token]:.4g} here; that is {share:.1%} of how far the best stands above the median "
        f"({spread[step]:.3g}), and {expected.dtype} allows {allowed:.0%}; the best token is {logits[step].argmax()} there and "
        f"{ours[step].argmax()} here"
    )
