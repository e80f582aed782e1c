"""What a search is asked for about layers that share attention: `off`, `auto`, a number of layers, or which ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moacompress.core.errors import UsageError

FORMS = "off, auto, a number of layers such as 3, or layers such as layers=12:11,18:17 (each with its anchor)"


@dataclass(frozen=True)
class AskedShares:
    """Which layers are to copy the attention of an earlier one.

    Attributes:
        text: as it was given, in its shortest form.
        auto: the search decides how many do.
        count: so many do; None where it is not said.
        pairs: each layer and its anchor; empty where the search chooses them.
    """

    text: str = "off"
    auto: bool = False
    count: int | None = None
    pairs: tuple[tuple[int, int], ...] = ()

    @property
    def off(self) -> bool:
        """Whether no layer shares."""
        return not self.auto and not self.count and not self.pairs

    @staticmethod
    def parse(text: str) -> AskedShares:
        """Reads one of `FORMS`.

        Raises:
            UsageError: something else; an anchor that is no earlier layer; a layer that is named twice; an anchor that shares
                itself.
        """
        given = re.sub(r"\s+", "", str(text)).lower()
        if given in ("off", "0"):
            return AskedShares()
        if given == "auto":
            return AskedShares(given, auto=True)
        if re.fullmatch(r"\d{1,4}", given):
            return AskedShares(str(int(given)), count=int(given)) if int(given) else AskedShares()
        if not re.fullmatch(r"layers=\d{1,4}:\d{1,4}(,\d{1,4}:\d{1,4})*", given):
            raise UsageError(f"sharing {text!r} is not understood; write {FORMS}")
        pairs = [tuple(map(int, pair.split(":"))) for pair in given.removeprefix("layers=").split(",")]
        layers = [layer for layer, _ in pairs]
        for layer, anchor in pairs:
            if anchor >= layer:
                raise UsageError(
                    f"layer {layer} cannot share the attention of layer {anchor}: an anchor is an earlier layer; write "
                    "LAYER:ANCHOR, such as layers=12:11"
                )
            if layers.count(layer) > 1:
                raise UsageError(f"layer {layer} is named twice in {text!r}; a layer has one anchor")
            if anchor in layers:
                raise UsageError(
                    f"layer {layer} cannot share the attention of layer {anchor}, which shares attention itself; name the "
                    "layer that it shares with"
                )
        ordered = tuple(sorted((layer, anchor) for layer, anchor in pairs))
        return AskedShares("layers=" + ",".join(f"{layer}:{anchor}" for layer, anchor in ordered), pairs=ordered)
