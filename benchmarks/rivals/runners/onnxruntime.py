"""ONNX Runtime GenAI on a CPU: a float32 model of its own builder, with a cache in float32, or in codes of 8 or 4 bits.

Codes have one fixed scale for each channel, which its builder asks for: the largest number of the channel in some text, that of
Python's own help.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rivals.runners.engine import Job, SteppedEngine

SCALE_TOKENS = 1024
LARGEST = 128
"""What the largest number of a channel is as a code of 8 bits; the builder makes the scales of other widths from it."""


class Onnx(SteppedEngine):
    """A model that the builder has written to a folder.

    Args:
        folder: the model.
        task: of the setting.
    """

    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, folder: Path, task: Job) -> None:
        import onnxruntime_genai

        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(folder))
        threads = {"session_options": {"intra_op_num_threads": task["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model: Any = onnxruntime_genai.Model(config)
        shape = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        self.vocabulary, self._layers = shape["vocab_size"], shape["decoder"]["num_hidden_layers"]
        self._tokens = min(task["tokens"], shape["context_length"])  # it takes no more, not even for shorter prompts
        self._generator: Any = None
        self._read = 0

    def read(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        wanted = self._genai.GeneratorParams(self._model)
        wanted.set_search_options(max_length=self._tokens, do_sample=False)
        self._generator, self._read = self._genai.Generator(self._model, wanted), 0
        self.more(ids)

    def more(self, ids: Sequence[int]) -> None:
        """As `SteppedEngine`."""
        import numpy as np

        self._generator.append_tokens(np.array([ids], dtype=np.int32))
        self._read += len(ids)

    def best(self) -> int:
        """As `SteppedEngine`."""
        return int(self._generator.get_logits()[0, -1].argmax())

    def kv_bytes(self) -> int:
        """Returns the bytes of keys and values of the tokens read; the cache is made for all that there will be."""
        found = 0
        for layer in range(self._layers):
            for part in ("key", "value"):
                held = self._generator.get_output(f"present.{layer}.{part}")
                found += held.nbytes // held.shape[2] * self._read
        return found


def write_scales(dense: str, file: Path) -> None:
    """Writes the largest numbers of keys and values of each channel, as the builder reads them."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(dense)("\n".join(topics.values()), return_tensors="pt")["input_ids"]
    model: Any = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.inference_mode():
        layers = next(value for value in model(ids[:, :SCALE_TOKENS]).values() if hasattr(value, "layers")).layers
    largest = {
        f"{name}_scales": [
            (part[0].abs().amax(1).flatten() / LARGEST).tolist() for part in (getattr(layer, whole) for layer in layers)
        ]
        for name, whole in (("k", "keys"), ("v", "values"))
    }
    file.write_text(json.dumps({"scales": largest, "qmax": LARGEST}))


def build(task: Job, folder: Path) -> None:
    """Writes a model; `scheme` is of its cache."""
    folder.mkdir(parents=True, exist_ok=True)
    options = []
    if task["scheme"] != "none":
        scales = folder / "scales.json"
        write_scales(task["dense"], scales)
        options = ["--extra_options", f"kv_cache_quant_scheme={task['scheme']}", f"kv_cache_scale_file={scales}"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", task["dense"], "-o", str(folder)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(folder / "downloads"), *options]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def make(task: Job) -> Onnx:
    """Returns the engine of a setting; builds its model where there is none yet."""
    folder = Path(task["folder"]) / f"{task['dense_key']}-{task['scheme']}"
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        build(task, partial)
        partial.rename(folder)
    return Onnx(folder, task)
