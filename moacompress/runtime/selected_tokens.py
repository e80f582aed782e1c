"""Which tokens of a text the gates of a compressed model keep."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moacompress.core.errors import DataError, UsageError
from moacompress.models.kept_logits import kept_logits
from moacompress.models.modules import attention_modules
from moacompress.models.placement import input_device
from moacompress.rules.plan import Plan
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.selection import competing_tokens, eviction_schedule
from moacompress.runtime.checkpoint import load_checkpoint
from moacompress.runtime.gate import TokenGate

MOST_TOKENS = 2048
"""Tokens of a text that are read, at most."""


def selected_tokens(
    folder: Path, plan: Plan, text: Path, device: str = "cpu", *, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Reads a text file with a compressed model, and returns which of its tokens gates keep at its end.

    The result has `tokens`, their texts; `kept`, the share of the KV heads with a gate that keep each, of those from whose
    window it was evicted, None where there are none; `kv_heads` with a gate; and `classes` of tokens: `name`, how many evicted
    `tokens`, and the mean of `kept`.

    Raises:
        UsageError: the plan has no gates.
        DataError: the text cannot be read, or is too short for a token to leave a window.
    """
    if not plan.selects:
        raise UsageError("no rule of this plan keeps tokens by their score, so there is nothing to show of a text")
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {text}: {error}") from error
    if not words.strip():
        raise DataError(f"{text} has no text; give a longer one")
    checkpoint = load_checkpoint(folder, "auto", device, trust_remote_code=trust_remote_code)
    plan = checkpoint.plan
    ids = checkpoint.tokenizer(words, return_tensors="pt").input_ids[:, :MOST_TOKENS]
    scores = _scores(checkpoint.model, ids)
    n = ids.shape[1]
    kept, left = np.zeros(n), np.zeros(n)
    for layer, found in scores.items():
        table = RuleTable.of(plan.rules[layer], plan.min_window, plan.model.native_windows[layer])
        after = table.tokens_left(np.array([n]))
        tokens = competing_tokens(table, np.zeros_like(after), after)
        schedule = eviction_schedule(tokens, table, found[tokens.rows_and_heads[1], tokens.positions])
        np.add.at(left, schedule.positions, 1)
        np.add.at(kept, schedule.newly_selected.positions, 1)
    if not left.any():
        raise DataError(f"{text} has {n} tokens: none of them leaves a window; give a longer text")
    shares = np.divide(kept, left, out=np.full(n, np.nan), where=left > 0)
    pieces = [str(checkpoint.tokenizer.decode([token])) for token in ids[0].tolist()]
    return {
        "tokens": pieces,
        "kept": [None if np.isnan(share) else round(float(share), 4) for share in shares],
        "kv_heads": sum(rule.selects for row in plan.rules for rule in row),
        "classes": _classes(pieces, shares),
    }


def _scores(model: Any, ids: Any) -> dict[int, Any]:
    """Returns the scores that gates give the tokens of one row, by layer, int64 `[kv_heads, tokens]`."""
    found: dict[int, Any] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[layer] = output[0].cpu().numpy().astype(np.int64)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for layer, module in enumerate(attention_modules(model)):
            gate = getattr(module, "gate", None)
            if isinstance(gate, TokenGate):
                stack.callback(gate.register_forward_hook(keep(layer)).remove)
        kept_logits(model, 1, input_ids=ids.to(input_device(model)), use_cache=False)
    return found


def token_class(token: str) -> str:
    """Returns what kind of text a token is: a name for people."""
    bare = token.strip()
    if not bare:
        return "line break" if "\n" in token else "space"
    if any(letter.isdigit() for letter in bare):
        return "digits"
    if not any(letter.isalpha() for letter in bare):
        return "punctuation"
    if bare[0].isupper():
        return "capitalised"
    return "start of a word" if token[0].isspace() else "rest of a word"


def _classes(pieces: Sequence[str], shares: Any) -> list[dict[str, Any]]:
    of_class: dict[str, list[float]] = {}
    for piece, share in zip(pieces, shares.tolist(), strict=True):
        if share == share:  # not NaN
            of_class.setdefault(token_class(piece), []).append(share)
    rows = [{"name": name, "tokens": len(found), "kept": sum(found) / len(found)} for name, found in of_class.items()]
    return sorted(rows, key=lambda row: -row["kept"])
