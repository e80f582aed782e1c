"""What of a `.gguf` file's model transformers does not read: put into the config, or refused.

That is how the rotary embedding is scaled, and what Gemma's largest models divide their scores by. A file names linear scaling
or YaRN in its keys. That of Llama 3 is only there as what each frequency is divided by, in a tensor `rope_freqs.weight`, from
which the numbers of the config are found again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moacompress.core.errors import ModelError

FREQUENCIES = "rope_freqs.weight"
LONG_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")
ORIGINAL_LENGTHS = (8192, 4096, 2048, 16384, 32768, 65536, 131072)
"""Tokens that a model of Llama 3's scaling may have been trained with at first; the published ones have the first."""
LOW_FREQUENCY, HIGH_FREQUENCY = 1.0, 4.0
"""Llama 3's numbers of turns within the original length, below and above which a frequency is scaled whole and not at all."""
SCALING = ".rope.scaling."
OLD_FACTOR = ".rope.scale_linear"
"""Key of older files for the factor of linear scaling."""
SCORES_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the models whose scores are divided by the root of the hidden size of a head, and not of the size of its keys."""
NEUTRAL = {"attn_factor": (1.0,), "yarn_attn_factor": (1.0,), "yarn_ext_factor": (1.0, -1.0)}
"""Keys that no config has, and what they may say: what holds where they say nothing."""


def complete_config(config: Any, reader: Any, file: Path) -> None:
    """Gives a config what its file, which is not trusted, says and transformers does not read.

    Raises:
        ModelError: the scaling is one that no config has, or its numbers are none.
    """
    text = config.get_text_config(decoder=True)
    layers = SCORES_BY_WIDTH.get(text.model_type)
    if layers is not None:
        by_width = text.num_hidden_layers == layers
        text.query_pre_attn_scalar = text.hidden_size // text.num_attention_heads if by_width else text.head_dim
    _put_scaling(text, reader, file)


def _put_scaling(text: Any, reader: Any, file: Path) -> None:
    of_all = getattr(text, "rope_parameters", None)
    if not isinstance(of_all, dict):
        return
    # layers with windows of their own are not scaled
    parameters = of_all.get("full_attention", of_all)
    if parameters.get("rope_type", "default") != "default":
        return
    if {str(tensor.name) for tensor in reader.tensors}.intersection(LONG_ROPE):
        raise ModelError(
            f"{file} has factors of LongRoPE, which are not read from .gguf files; give the checkpoint that it was made from"
        )
    parameters |= _named_scaling(reader, file) or _scaling_of_frequencies(reader, file, parameters)


def _named_scaling(reader: Any, file: Path) -> dict[str, Any]:
    """Returns what the keys of a file say, {} for nothing."""
    found = {key.partition(SCALING)[2]: _value(field) for key, field in reader.fields.items() if SCALING in key}
    older = next((_value(field) for key, field in reader.fields.items() if key.endswith(OLD_FACTOR)), None)
    found.setdefault("factor", older)
    # llama.cpp takes a factor for one of linear scaling where there is no type; 0 and 1 are none
    kind = str(found.get("type", "linear" if found["factor"] not in (None, 0.0, 1.0) else "none"))
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"{file} scales its rotary embedding by {kind!r}, and only linear and yarn are read from .gguf files; give the "
            "checkpoint that it was made from"
        )
    for name, neutral in NEUTRAL.items() if kind == "yarn" else ():
        if found.get(name, 1.0) not in neutral:
            raise ModelError(
                f"{file} has rope.scaling.{name} = {found[name]}, which transformers cannot compute with; give the checkpoint "
                "that it was made from"
            )
    scaling: dict[str, Any] = {"rope_type": kind, "factor": _positive(found, "factor", file)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = round(_positive(found, "original_context_length", file))
        for name in ("beta_fast", "beta_slow"):
            if f"yarn_{name}" in found:
                scaling[name] = _positive(found, f"yarn_{name}", file)
    return scaling


def _scaling_of_frequencies(reader: Any, file: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Returns Llama 3's scaling where a file divides its frequencies by that, {} where it divides by nothing."""
    from gguf import dequantize

    tensor = next((each for each in reader.tensors if each.name == FREQUENCIES), None)
    if tensor is None:
        return {}
    factors = np.array(dequantize(tensor.data, tensor.tensor_type), np.float64).reshape(-1)
    if np.array_equal(factors, np.ones_like(factors)):
        return {}
    most = float(factors.max()) if len(factors) else math.nan
    theta = float(parameters.get("rope_theta", 10000.0))
    for length in ORIGINAL_LENGTHS if math.isfinite(most) and most > 1 else ():
        if np.allclose(factors, llama3_factors(theta, 2 * len(factors), most, length), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": float(f"{most:.6g}"),
                "low_freq_factor": LOW_FREQUENCY,
                "high_freq_factor": HIGH_FREQUENCY,
                "original_max_position_embeddings": length,
            }
    raise ModelError(
        f"{file} divides the frequencies of its rotary embedding by numbers of its own ({FREQUENCIES}), which are not those of "
        "Llama 3's scaling; give the checkpoint that it was made from"
    )


def llama3_factors(theta: float, dim: int, factor: float, length: int) -> npt.NDArray[np.float64]:
    """Returns what Llama 3's scaling divides each frequency by, `[dim / 2]`, of `dim` rotated numbers of a head.

    Frequencies that turn less than once within the original `length`, tokens, are divided by the factor, those that turn more
    than four times by nothing, and the reciprocals of those between lie on a line. `theta` is the base of the frequencies.
    """
    turns = length * theta ** (-np.arange(0, dim, 2) / dim) / (2 * math.pi)
    kept = np.clip((turns - LOW_FREQUENCY) / (HIGH_FREQUENCY - LOW_FREQUENCY), 0, 1)
    return 1 / ((1 - kept) / factor + kept)


def _positive(found: dict[str, Any], name: str, file: Path) -> float:
    value = found.get(name)
    if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise ModelError(
            f"{file} scales its rotary embedding with rope.scaling.{name} = {value!r}, and it must be above 0"
        )
    return float(value)


def _value(field: Any) -> Any:
    """Returns what a key of a file says, text or a number; None for a list."""
    if len(field.data) != 1 or len(field.types) != 1:
        return None
    part = field.parts[field.data[0]]
    return bytes(part).decode(errors="replace") if field.types[0].name == "STRING" else part[0].item()
