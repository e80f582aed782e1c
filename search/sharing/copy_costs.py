"""What copies are predicted to cost: for every layer and candidate anchor the best head map and its influence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moacompress.calibration.profile.sharing import best_head_map, copy_influence, copyable
from moacompress.calibration.profile.store import Profile
from moacompress.core.arrays import Floats
from moacompress.core.errors import UsageError
from moacompress.rules.share import LayerShares, Share

PROFILE_AGAIN = "profile again with --anchors {anchors} (profile.anchors)"


@dataclass(frozen=True, eq=False)
class CopyCosts:
    """Predicted KL of copies, one layer at a time.

    The heads of a layer, and layers, are added up as if what they move were independent, as the spans' influence is.

    Attributes:
        influence: nats, `[layers, anchors, kv_heads, anchor's kv_heads]`; the anchor of `[l, k]` is layer `l - 1 - k`.
        may: whether layer `l` may copy layer `l - 1 - k`, `[layers, anchors]`; elsewhere the influence means nothing.
    """

    influence: Floats
    may: npt.NDArray[np.bool_]

    @staticmethod
    def of(profile: Profile) -> CopyCosts:
        """Reads a profile, lengths weighing the same.

        Raises:
            UsageError: a profile without copies.
        """
        kinds = profile.kind_weights
        of_kinds = [CopyCosts.of_kind(profile, kind) for kind in kinds]
        influence = np.average([costs.influence for costs in of_kinds], axis=0, weights=list(kinds.values()))
        return CopyCosts(influence, of_kinds[0].may)

    @staticmethod
    def of_kind(profile: Profile, kind: str) -> CopyCosts:
        """Reads a profile's samples of one kind; raises as `of`."""
        of_lengths = [CopyCosts.at(profile, kind, length) for length in profile.lengths]
        return CopyCosts(np.mean([costs.influence for costs in of_lengths], axis=0), of_lengths[0].may)

    @staticmethod
    def at(profile: Profile, kind: str, length: int) -> CopyCosts:
        """Reads a profile's samples of one kind at one length; raises as `of`."""
        influence = copy_influence(profile.statistics.take(profile.samples_of(length, kind)))
        return CopyCosts(influence, copyable(profile.shape.native_windows, influence.shape[1]))

    @property
    def anchors(self) -> int:
        """Earlier layers that every layer was tried with."""
        return int(self.may.shape[1])

    def less(self, left: Floats) -> CopyCosts:
        """Returns the costs of which a share is left, `[layers, anchors]`."""
        return CopyCosts(self.influence * left[..., None, None], self.may)

    def table(self) -> Floats:
        """Returns the cost of every layer with every anchor by the best head map, nats, `[layers, anchors]`; else infinity."""
        return np.where(self.may, self.influence.min(-1).sum(-1), np.inf)

    def share(self, layer: int, anchor: int) -> Share:
        """Returns the copy of lowest predicted KL.

        Raises:
            UsageError: the profile says nothing of this anchor.
        """
        index = layer - 1 - anchor
        if index >= self.anchors:
            raise UsageError(
                f"the profile has tried every layer with the {self.anchors} before it, and layer {anchor} is "
                f"{layer - anchor} before layer {layer}; {PROFILE_AGAIN.format(anchors=layer - anchor)}, or name a nearer "
                "anchor"
            )
        return Share(anchor, best_head_map(self.influence[layer, index])[0])

    def cost(self, shares: LayerShares) -> float:
        """Returns the predicted KL of all copies, nats."""
        total = 0.0
        for layer, share in enumerate(shares):
            if share is not None:
                of_heads = self.influence[layer, layer - 1 - share.anchor]
                total += float(of_heads[np.arange(len(of_heads)), list(share.head_map)].sum())
        return total
