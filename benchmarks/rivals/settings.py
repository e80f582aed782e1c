"""The rivals, and in what settings each is measured; another one is a line here, a runner and its requirements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moacompress.core.errors import UsageError, did_you_mean

OURS = "moacompress"
DENSE = ("transformers", "dense")
"""Which rival's which setting the others are compared with: the model as it is."""
REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


@dataclass(frozen=True)
class Setting:
    """One way to run a rival.

    Attributes:
        rival: its name, that of its runner, its environment and its requirements.
        name: of the setting.
        options: what its runner is told.
        once: it evicts once, when the prompt is read, so that it matters whether the question is part of that.
        note: for a reader of the table; empty for none.
        ours: name of our own baseline of the same method, whose kept keys are compared; empty where there is none.
    """

    rival: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False
    note: str = ""
    ours: str = ""

    @property
    def full_name(self) -> str:
        """Rival and setting, as on the command line."""
        return f"{self.rival}:{self.name}"


MASKS = "masks only: the keys stay in memory"
_SAME = {
    "keydiff": "keydiff",
    "snapkv": "snapkv",
    "pyramidkv": "pyramidkv",
    "expected": "expected-attention",
    "adakv-snapkv": "adakv",
    "kvzip": "kvzip",
}
"""Our baselines of the same methods as presses."""
_PRESSES: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "streaming": ({"press": "StreamingLLMPress"}, ""),
    "knorm": ({"press": "KnormPress"}, ""),
    "keydiff": ({"press": "KeyDiffPress"}, ""),
    "lagkv": ({"press": "LagKVPress"}, ""),
    "tova": ({"press": "TOVAPress"}, ""),
    "snapkv": ({"press": "SnapKVPress"}, ""),
    "pyramidkv": ({"press": "PyramidKVPress"}, ""),
    "expected": ({"press": "ExpectedAttentionPress"}, ""),
    "adakv-expected": ({"press": "AdaKVPress", "around": "ExpectedAttentionPress"}, MASKS),
    "adakv-snapkv": ({"press": "AdaKVPress", "around": "SnapKVPress"}, MASKS),
    "kvzip": ({"press": "KVzipPress"}, f"reads the prompt again; {MASKS}"),
    "duo": (
        {"press": "DuoAttentionPress", "ratio_name": "head_compression_ratio", "options": {"on_the_fly_scoring": True}},
        f"heads by its scoring on the fly; {MASKS}",
    ),
}


def _kvpress() -> list[Setting]:
    return [
        Setting(
            "kvpress",
            f"{name}-{kept:g}",
            {**options, "ratio": 1 - kept / 100},
            once=True,
            note=note,
            ours=_SAME.get(name, ""),
        )
        for name, (options, note) in _PRESSES.items()
        for kept in (25, 12.5)
    ]


def _llamacpp() -> list[Setting]:
    return [
        Setting("llamacpp", f"{weights}-{kind}", {"weights": weights, "cache_type": kind})
        for weights in ("bf16", "shipped")
        for kind in ("f16", "q8_0", "q4_0")
    ]


_TRANSFORMERS = [
    Setting(*DENSE),
    Setting("transformers", "hqq-8", {"backend": "hqq", "bits": 8, "axis": 1}),
    Setting("transformers", "hqq-4", {"backend": "hqq", "bits": 4, "axis": 1}),
    Setting("transformers", "quanto-4", {"backend": "quanto", "bits": 4, "axis": 0}),
]
_OPENVINO = [
    *(Setting("openvino", name, {"precision": name}) for name in ("bf16", "u8", "u4")),
    Setting("openvino", "evict-256", {"precision": "u8", "tokens_kept": 256}, note="keeps 256 tokens, in u8"),
]
_ONNX = [
    Setting("onnxruntime", name, {"scheme": scheme}, note=note)
    for name, scheme, note in (
        ("f32", "none", "float32"),
        ("int8", "int8_per_channel", "float32 but for the cache"),
        ("int4", "int4_per_channel", "float32 but for the cache"),
    )
]
SETTINGS: tuple[Setting, ...] = (*_TRANSFORMERS, *_llamacpp(), *_OPENVINO, *_ONNX, *_kvpress())
NEED_GGUF = ("llamacpp", "openvino")
"""Rivals that load a `.gguf` file."""


def chosen(names: Sequence[str], checkpoints: Mapping[str, str]) -> list[Setting]:
    """Returns the settings of some names, each once, in the order asked for.

    A name is a rival's, for all its settings, or `rival:setting`. Checkpoints are folders of our own, the settings of
    `moacompress`, by the names that they are to have.

    Raises:
        UsageError: unknown; names the nearest known one.
    """
    ours = [Setting(OURS, name, {"checkpoint": folder}) for name, folder in checkpoints.items()]
    known = [*SETTINGS, *ours]
    found: dict[str, Setting] = {}
    for name in names:
        some = [setting for setting in known if name in (setting.rival, setting.full_name)]
        if not some:
            everything = [*dict.fromkeys(setting.rival for setting in known), *(one.full_name for one in known)]
            hint = did_you_mean(name, everything, f"known are {', '.join(everything)}")
            raise UsageError(f"there is no rival {name!r}; {hint}")
        found |= {setting.full_name: setting for setting in some}
    return [*found.values()]
