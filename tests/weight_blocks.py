"""Models of random weights in blocks of any type, and `.gguf` files of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moacompress.kernels.weight_blocks import WEIGHT_TYPES, WeightType, dequantized
from moacompress.models.block_layers import block_weights, put_block_layer

SCALES = {"Q8_0": [0], "Q5_0": [0], "Q4_1": [0, 2], "Q4_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "Q5_K": [0, 2]}
"""Where in a block of weights there are float16; all other bytes may have any value."""
SIZE = {"Q8_0": 1e-3, "Q5_0": 6e-3, "Q4_1": 1e-2, "Q4_0": 1e-2, "Q4_K": 2e-4, "Q6_K": 5e-5, "Q5_K": 1e-4}
"""Of scales with which random codes are numbers of a usual size."""
VOCABULARY = 320
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def random_blocks(kind: WeightType, *shape: int, inputs: int, scale: float = 1 / 64) -> torch.Tensor:
    """Returns random weights in blocks, uint8 `[..., bytes]`.

    Args:
        kind: of the blocks.
        *shape: sizes before the last.
        inputs: numbers of a row.
        scale: size of the scales.
    """
    blocks = torch.randint(0, 256, (*shape, inputs // kind.numbers, kind.nbytes), dtype=torch.uint8)
    for at in SCALES[kind.name]:
        scales = (torch.randn(blocks.shape[:-1]) * scale).half()
        blocks[..., at : at + 2] = scales[..., None].view(torch.uint8)
    return blocks.flatten(-2)


def write_gguf(
    path: Path,
    types: dict[str, str],
    *,
    architecture: str = "llama",
    layers: int = 2,
    hidden: int = 256,
    intermediate: int = 512,
    head: str | None = None,
    seed: int = 0,
    keys: dict[str, str | int | float] | None = None,
    more: dict[str, np.ndarray] | None = None,
    **changed: Any,
) -> Path:
    """Writes a model of random weights.

    Args:
        path: the file.
        types: type of blocks of each of `MATRICES` and of `token_embd`; "F32" where there is none.
        architecture: llama, qwen2 or gemma3.
        layers: how many.
        hidden: of the residual stream; four heads of a quarter of it, two KV heads.
        intermediate: of the feed-forward.
        head: type of the output's blocks; None where it is the embedding.
        seed: of the numbers.
        keys: of the architecture beside those that it needs.
        more: tensors that it does not need.
        **changed: tensors in the place of some, by the file's names; None leaves one out.
    """
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(seed)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(hidden // 4)
    writer.add_value_length(hidden // 4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    if architecture == "gemma3":
        writer.add_sliding_window(64)
    letters = [*sorted(ByteLevel.alphabet()), "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*letters, *(f"<{i}>" for i in range(len(letters), VOCABULARY))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)

    def add(name: str, shape: tuple[int, ...], kind: str = "F32") -> None:
        name = name if name.endswith(".bias") else f"{name}.weight"
        if name in changed:
            if changed[name] is not None:
                writer.add_tensor(name, changed[name])
        elif kind == "F32":
            offset = 1.0 if "norm" in name else 0.0
            writer.add_tensor(name, (offset + 0.1 * torch.randn(shape)).numpy())
        else:
            of_type = WEIGHT_TYPES[kind]
            blocks = random_blocks(of_type, shape[0], inputs=shape[1], scale=SIZE[kind]).numpy()
            writer.add_tensor(name, np.ascontiguousarray(blocks), raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd", (VOCABULARY, hidden), types["token_embd"])
    add("output_norm", (hidden,))
    if head is not None:
        add("output", (VOCABULARY, hidden), head)
    rows = {"attn_k": hidden // 2, "attn_v": hidden // 2, "ffn_gate": intermediate, "ffn_up": intermediate}
    norms = {"gemma3": ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")}
    for layer in range(layers):
        for norm in norms.get(architecture, ("attn_norm", "ffn_norm")):
            add(f"blk.{layer}.{norm}", (hidden,))
        if architecture == "gemma3":
            add(f"blk.{layer}.attn_q_norm", (hidden // 4,))
            add(f"blk.{layer}.attn_k_norm", (hidden // 4,))
        for name in MATRICES:
            inputs = intermediate if name == "ffn_down" else hidden
            add(f"blk.{layer}.{name}", (rows.get(name, hidden), inputs), types[name])
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", (rows.get(name, hidden),))
    adding: dict[type, Any] = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
    for key, value in (keys or {}).items():
        adding[type(value)](f"{architecture}.{key}", value)
    for name, numbers in (more or {}).items():
        writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def types_of(kind: str, **others: str) -> dict[str, str]:
    """Returns one type for all matrices and the embedding, but for some."""
    return {**dict.fromkeys((*MATRICES, "token_embd"), kind), **others}


def put_random_blocks(model: Any, types: dict[str, str]) -> Any:
    """Puts random blocks in the place of the weights of a model's layers, in place.

    Args:
        model: dense.
        types: type of blocks by the last part of a layer's name; the embedding may be there.

    Returns:
        A dense copy of the same numbers.
    """
    drawn: dict[Any, torch.Tensor] = {}
    for name, module in [*model.named_modules()]:
        kind = WEIGHT_TYPES.get(types.get(name.rpartition(".")[2], ""))
        if kind is not None:
            rows, inputs = module.weight.shape
            if module.weight not in drawn:  # of weights that are one tensor there is one parameter
                drawn[module.weight] = random_blocks(kind, rows, inputs=inputs, scale=SIZE[kind.name])
            put_block_layer(model, name, kind, drawn[module.weight])
    model.tie_weights()
    return dense_copy(model)


def dense_copy(model: Any) -> Any:
    """Returns a copy of a model with the numbers of its weights in the place of blocks."""
    dense = type(model)(copy.deepcopy(model.config)).eval().requires_grad_(False)
    kinds = block_weights(model)
    dense.load_state_dict(
        {
            name: dequantized(tensor, kinds[name]) if name in kinds else tensor
            for name, tensor in model.state_dict().items()
        }
    )
    return dense.to(model.dtype)
