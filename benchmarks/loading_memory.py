"""Anonymous memory that loading takes at its peak, of a checkpoint with random weights in the shape of an 8B model.

    python benchmarks/loading_memory.py FOLDER
    python benchmarks/loading_memory.py FOLDER --type Q8_0 --layers 8

Writes the checkpoint into FOLDER, which must not exist (5 GB in Q4_1), loads it with `from_pretrained` in a process of its own,
and removes it. What a process maps of files is not counted: the system takes that back where it needs memory.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import options, run_alone  # beside this script

from moacompress.core.errors import UsageError
from moacompress.core.memory import available_bytes
from moacompress.kernels.weight_blocks import WEIGHT_TYPES

SHAPE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
"""Llama 3.1 8B's, but for the layers."""
SCALES = {"Q8_0": {0: 3e-4}, "Q4_1": {0: 4e-3, 2: -3e-2}, "Q4_0": {0: 4e-3}}
"""Where in a block there are float16, and what they are: numbers are then a few hundredths."""
NUMBERS = "bfloat16"
SHARD = 1 << 30
"""Bytes of a file, about."""


def write_checkpoint(folder: Path, layers: int, type_name: str) -> None:
    """Writes a compressed checkpoint of random weights, all matrices in blocks of a type or in `NUMBERS`."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from moacompress.models.block_layers import put_block_layers
    from moacompress.models.shape import config_shape
    from moacompress.rules.plan import Plan
    from moacompress.runtime.hf.config import MoaCompressConfig

    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype=NUMBERS, **SHAPE)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    types = {
        name: type_name
        for name, module in model.named_modules()
        if type_name != NUMBERS and isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    put_block_layers(model, types)
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(model.state_dict(), type_name)):
        from safetensors.torch import save_file

        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        places |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    plan = Plan.full(config_shape(config, dtype=NUMBERS))
    config.quantization_config = MoaCompressConfig(plan=plan, weights=types)
    config.save_pretrained(folder)


def _shards(state: dict[str, torch.Tensor], type_name: str) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    for name, like in state.items():
        shard[name] = _blocks(like, type_name) if like.dtype == torch.uint8 else _numbers(like)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            yield shard
            shard = {}
    if shard:
        yield shard


def _blocks(like: torch.Tensor, type_name: str) -> torch.Tensor:
    kind = WEIGHT_TYPES[type_name]
    blocks = torch.randint(0, 256, (like.shape[0], like.shape[1] // kind.nbytes, kind.nbytes), dtype=torch.uint8)
    for at, scale in SCALES[type_name].items():
        blocks[..., at : at + 2] = torch.tensor([scale]).half().view(torch.uint8)
    return blocks.flatten(1)


def _numbers(like: torch.Tensor) -> torch.Tensor:
    return (
        torch.ones(like.shape, dtype=like.dtype)
        if like.ndim == 1
        else torch.randn(like.shape).mul_(0.02).to(like.dtype)
    )


def loaded(folder: Path) -> dict[str, Any]:
    """Loads a checkpoint in this process; returns bytes of anonymous memory that it took at its peak and holds, and seconds."""
    from transformers import AutoModelForCausalLM

    import moacompress.runtime.hf.loading  # noqa: F401  before what is measured

    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - begun
    held = _anonymous()
    done.set()
    watcher.join()
    with torch.inference_mode():
        finite = bool(model(torch.arange(2)[None]).logits.isfinite().all())
    return {"peak": max(peak, held) - before, "held": held - before, "seconds": seconds, "finite": finite}


def _anonymous() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Prints bytes of the files, and of memory at the peak and afterwards."""
    parser = options(__doc__)
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, help="where the checkpoint is written for the time being"
    )
    parser.add_argument("--type", choices=[*SCALES, NUMBERS], default="Q4_1", help="of all matrices")
    parser.add_argument("--layers", type=int, default=32, help="of the model")
    parser.add_argument("--load", action="store_true", help="load what is in FOLDER, and nothing else")
    given = parser.parse_args()
    if given.load:
        print(json.dumps(loaded(given.folder)))
        return
    if given.folder.exists():
        raise UsageError(f"{given.folder} exists already; choose another folder")
    try:
        write_checkpoint(given.folder, given.layers, given.type)
        size = sum(file.stat().st_size for file in given.folder.glob("*.safetensors"))
        if available_bytes() < 1.2 * size:
            raise UsageError(f"{size:,} bytes of weights do not fit; choose fewer --layers")
        found = run_alone(__file__, given.folder, "--load")
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)
    assert found["finite"]
    print(
        f"{given.type}, {given.layers} layers: files {size / 1e9:.3f} GB; anonymous memory at the peak "
        f"{found['peak'] / 1e9:.3f} GB ({found['peak'] / size:.3f} of the files), afterwards {found['held'] / 1e9:.3f} GB; "
        f"{found['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
