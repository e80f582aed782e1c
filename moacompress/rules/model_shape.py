"""What a plan must know of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moacompress.rules.formats import find_format
from moacompress.rules.kv_bytes import dense_kv_bytes
from moacompress.rules.rule import Rule

MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 4096, 4096, 4096


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of its model.

    Attributes:
        model_type: `config.model_type`.
        layers: number of decoder layers.
        heads: query heads of a layer.
        kv_heads: KV heads of a layer; divides `heads`.
        head_dim: numbers in a key and in a value.
        dtype: dtype of the checkpoint's weights, which is that of its cache.
        native_windows: per layer the model's own sliding window in tokens, or None.
        weights_fingerprint: of the weights, in any version that is known; see `moacompress.models.fingerprint`. Empty for a
            config alone.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    native_windows: tuple[int | None, ...]
    weights_fingerprint: str

    def token_bytes(self, rule: Rule, *, reuses: bool = False) -> int:
        """Returns the bytes of one token of one KV head under a rule; where the layer reuses keys, of its value alone."""
        if reuses:
            return find_format(rule.value_format).vector_bytes(self.head_dim, self.dtype)
        return rule.token_bytes(self.head_dim, self.head_dim, self.dtype)

    def dense_kv_bytes(self, n: int, batch: int = 1) -> int:
        """Returns the KV bytes of the dense model at `n` tokens, native windows respected, in whole blocks."""
        return batch * int(dense_kv_bytes(self, n))

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form, `plan_form.ModelForm`, which says sizes of every layer."""
        return {
            "model_type": self.model_type,
            "layers": self.layers,
            **{name: [getattr(self, name)] * self.layers for name in ("kv_heads", "heads", "head_dim")},
            "native_windows": list(self.native_windows),
            "kv_owners": [None] * self.layers,
            "dtype": self.dtype,
            "weights_fingerprint": self.weights_fingerprint,
        }
