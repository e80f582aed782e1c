"""What `inspect --show-tokens` prints: which tokens of a text the gates of a compressed model keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from moacompress.core.printable import printable
from moacompress.core.tables import Columns, Table

MARKED = 0.5
"""Share of the KV heads with a gate that keep a token, from which on it is marked."""
DIM = 0.1
"""Share below which it is shown dim."""
CLASSES: Columns = {
    "tokens": lambda row: row["name"],
    "how many": lambda row: str(row["tokens"]),
    "kept": lambda row: f"{row['kept']:.0%}",
}


def token_tables(data: Mapping[str, Any]) -> Group:
    """Returns what is kept of each class of tokens, and the text: those in brackets are kept by most gates."""
    title = (
        f"What the gates of {data['kv_heads']} KV heads keep of the tokens that have left their windows, mean over them"
    )
    text = Text()
    for token, share in zip(map(printable, data["tokens"]), data["kept"], strict=True):
        if share is None:
            text.append(token)
        elif share >= MARKED:
            bare = token.strip() or token
            before, _, after = token.partition(bare)
            text.append(f"{before}[{bare}]{after}", style="bold")
        else:
            text.append(token, style="dim" if share < DIM else "")
    head = Text(f"\nThe text; [tokens] in brackets are kept by at least {MARKED:.0%} of the gates:", style="bold")
    return Group(Table.of(title, CLASSES, data["classes"]), head, text)
