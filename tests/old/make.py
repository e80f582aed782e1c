"""Makes the artefacts that lie here, as moacompress of commit d7e0b9d left them. Run it in a checkout of that commit:

    PYTHONPATH=$PWD python tests/old/make.py

Everything is of one tiny Llama, whose weights are drawn by numpy, so that every torch has the same. From one making to the next
on one machine nothing differs but times, and the marks of processes in owner files and journals.

    dense/          the model, its tokenizer and a licence
    rows.jsonl      prompts that the profiles are made of
    plans/          plans of versions 1, 2 and 3; those of 1 are as moacompress wrote them then
    profile/        finished
    gated/          finished, with gates
    half/           killed between samples
    search/         killed between trials, with a study of its own in study.log
    run/            of `compress`, killed as it profiled around a plan
    models/         checkpoints with gates, with formats and with copies, and in expected.json what each computes

Killed processes leave their owner files, of a machine that is called "elsewhere". Texts that name the folder where this was
made name FOLDER instead.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moacompress.core.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moacompress.calibration.profile.store import Profile
    from moacompress.rules.plan import Plan

HERE = Path(__file__).resolve().parent
FOLDER = "/old"
"""Stands in the artefacts for the folder that they were made in."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "amber",
    "boat",
    "cedar",
    "dune",
    "ember",
    "field",
    "grove",
    "harbour",
    "island",
    "jetty",
    "kiln",
    "lake",
    "meadow",
    "north",
    "oak",
    "pine",
    "quarry",
    "river",
]
LENGTHS = (160, 224)
PROFILED: dict[str, Any] = {
    "calibration": {
        "sources": [{"path": "rows.jsonl"}],
        "lengths": LENGTHS,
        "samples": 6,
        "validation_samples": 4,
        "answer_tokens": 8,
    },
    "profile": {"draws": 1, "anchors": 1, "gate_samples": 4, "sinks": [4, 16], "min_window": 16},
}
SEARCHED: dict[str, Any] = {"trials": 4, "ablations": 1, "rounds": 1, "round_samples": 2, "round_trials": 1, "moves": 1}
RUN: dict[str, Any] = {
    "model": "dense",
    "budget": "60%",
    "calibration": {
        "sources": [{"generator": "needle"}, {"generator": "key-value"}],
        "lengths": [600],
        "samples": 2,
        "validation_samples": 2,
        "longer_samples": 0,
        "answer_tokens": 4,
    },
    "profile": {"draws": 1, "sinks": [4, 16], "min_window": 16},
    "search": SEARCHED,
    "evaluation": {"tasks": ["needle-noise"], "lengths": [600], "prompts": 1},
}
PROMPT, NEW, SHOWN = 120, 5, 8
"""Tokens of the prompt that checkpoints go on from, how many they go on with, and how many largest logits are written down."""
PROMPT_SEED, MARGIN = 27, 0.05
"""The prompt is such that every token is ahead of the next by a margin, so that the last bits of a sum decide nothing."""


class KilledAt(Progress):
    """Kills its process without warning at a step of a task.

    Args:
        task: its name.
        step: the number of the step.
    """

    def __init__(self, task: str, step: int) -> None:
        self.task, self.left, self.now = task, step, ""

    def start(self, what: str, total: int) -> None:
        """Notes which task it is."""
        self.now = what

    def step(self, note: str = "") -> None:
        """Counts, and kills."""
        if self.now == self.task:
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def dense_model() -> PreTrainedModel:
    """Returns the tiny Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=104,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    drawn = np.random.RandomState(0)  # numpy promises that its stream never changes
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:
            parameter.copy_(torch.from_numpy(0.3 * drawn.standard_normal(parameter.shape)).to(parameter.dtype))
        else:
            assert "norm" in name
    return model


def tokenizer() -> PreTrainedTokenizerBase:
    """Returns one with a token for each character."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "\n", *(chr(code) for code in range(32, 127))]
    letters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    letters.decoder = Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


def write_dense() -> None:
    """Writes the model's folder and the rows."""
    dense_model().save_pretrained("dense")
    tokenizer().save_pretrained("dense")
    Path("dense/LICENSE").write_text("Licence of the tiny model.\n")
    drawn = np.random.RandomState(1)
    rows = []
    for number in range(48):
        words = " ".join(drawn.choice(WORDS, 24))[: 85 + 45 * (number // 3 % 2)]
        rows.append(json.dumps({"prompt": f"{number}: {words}"}))
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")


def killed(name: str) -> None:
    """Runs one of the commands that are killed on the way; called in a process of its own."""
    import moacompress
    from moacompress.core import lock_holders

    socket.gethostname = lambda: "elsewhere"
    lock_holders._boot = lock_holders._space = lambda: ""
    recipe = moacompress.Recipe.from_dict({**PROFILED, "search": {**SEARCHED, "storage": "search/study.log"}})
    if name == "half":
        moacompress.profile("dense", "half", recipe, progress=KilledAt("profiling", 4))
    elif name == "search":
        progress = KilledAt("searching", 3)
        moacompress.find_plan("profile", "60%", recipe=recipe, out="search/plan.json", progress=progress)
    else:
        moacompress.compress(
            moacompress.Recipe.from_dict(RUN), "run", progress=KilledAt("profiling around the plan", 1)
        )


def write_plans(gated: Profile) -> dict[str, Plan]:
    """Writes plans of every version, and returns those that checkpoints are made of, by name."""
    from moacompress.models import load_source
    from moacompress.rules.plan import Plan
    from moacompress.rules.rule import Rule
    from moacompress.rules.share import Share

    source = load_source("dense")
    notes: dict[str, Any] = {"budget": {"asked": ["60%"], "bytes": {}}, "provenance": {"source": "dense", "seed": 0}}
    narrow, growing = Rule(4, 16, 0), Rule(16, 0, 256)
    spans = ((narrow, Rule.FULL), (growing, narrow), (Rule(16, 32, 0), growing))
    formats = tuple(
        tuple(replace(rule, key_format=key, value_format=value) for rule, key, value in zip(row, *pair, strict=True))
        for row, pair in zip(
            spans,
            ((("int8", "native"), ("int4", "int8")), (("int8", "int8"), ("native", "int4")), (("int4", "int8"),) * 2),
            strict=True,
        )
    )
    chooses = replace(narrow, select_alpha=16, select_beta_q=128)
    copies = (None, Share(0, (0, 1)), None)
    plans = {
        "formats": Plan(source.shape, 16, formats, **notes),
        "copies": Plan(source.shape, 16, (spans[0], spans[0], spans[2]), shares=copies, **notes),
        "gates": gated.plan(((chooses, Rule.FULL), (growing, chooses), (chooses, growing))).with_notes(**notes),
    }
    plans["formats"].save("plans/2.json")
    plans["gates"].save("plans/3.json")
    native = Plan(replace(source.shape, weights_fingerprint=source.weights_like("0" * 16)), 16, spans, **notes)
    first = native.to_dict() | {"version": 1}
    for layer in first["layers"]:
        del layer["key_format"], layer["value_format"]
        share = layer.pop("share")
        layer |= {"kv_dtype": [None, None], "share": share}
    Path("plans/1.json").write_text(json.dumps(first, indent=1) + "\n")
    return plans


def continuation(folder: Path) -> dict[str, Any]:
    """Returns what a checkpoint computes: of a prompt its `tokens` after it and the largest `logits` of the first, by `id`."""
    import torch
    from transformers import AutoModelForCausalLM

    import moacompress  # noqa: F401  (in case the entry point is switched off)

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(np.random.RandomState(PROMPT_SEED).randint(4, 99, (1, PROMPT)))
    with torch.no_grad():
        largest = model(ids).logits[0, -1].topk(SHOWN)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=NEW,
            max_new_tokens=NEW,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for scores in found.scores:
        first, second = scores[0].topk(2).values.tolist()
        assert first - second > MARGIN, f"{folder}: {first} and {second}; choose another PROMPT_SEED"
    return {
        "ids": largest.indices.tolist(),
        "logits": [round(value, 5) for value in largest.values.tolist()],
        "tokens": found.sequences[0, PROMPT:].tolist(),
    }


def make() -> None:
    """Makes everything in the working directory."""
    import moacompress

    write_dense()
    recipe = moacompress.Recipe.from_dict(PROFILED)
    moacompress.profile("dense", "profile", recipe)
    gated = moacompress.profile("dense", "gated", recipe.override(profile__gates=True))
    for name in ("half", "search", "run"):
        ended = subprocess.run([sys.executable, __file__, name], check=False).returncode
        assert ended == -signal.SIGKILL, f"{name} ended by itself, with {ended}"
    plans = write_plans(gated)
    expected = {"dense": continuation(Path("dense"))}
    for name, plan in plans.items():
        moacompress.export("dense", plan, Path("models") / name)
        expected[name] = continuation(Path("models") / name)
    Path("models/expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    """Makes everything in a temporary folder, and then puts it here in place of what is here."""
    if len(sys.argv) > 1:
        killed(sys.argv[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        os.chdir(work)
        make()
        for path in work.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                path.write_text(path.read_text("utf-8").replace(str(work), FOLDER), "utf-8")
        for path in work.iterdir():
            if (HERE / path.name).is_dir():
                shutil.rmtree(HERE / path.name)
            shutil.move(path, HERE / path.name)


if __name__ == "__main__":
    main()
