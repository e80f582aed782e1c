"""Full and streaming heads as DuoAttention (arXiv 2410.10819) finds them: by training a weight for every KV head.

    python benchmarks/duo_attention.py MODEL --text prose/ --steps 1000 -o pattern/
    moacompress convert pattern/ --from duo-attention --model MODEL --sparsity 0.8 -o duo.json

Every KV head attends to all tokens and, beside that, to sinks and a window alone, and its weight mixes the two. Weights
begin at 1. Their loss is the squared distance of the last hidden states from the dense model's, where it repeats pass
phrases that stand in a long text, plus a price on the mean of the weights. What is the paper's: this loss, the price, Adam
with its learning rate that rises in the first fifth of the steps and falls in the last, weights held between 0 and 1. What
is smaller, as the model and the machine are: lengths, pass phrases of fewer words, one prompt a step, sinks and window.
Prompts go through the chat template, and are of the text's part for calibration.

Writes the pattern in the form of DuoAttention's own files, every so many steps; the same command goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import options  # beside this script
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from moacompress.calibration.profile.passes import attending_as
from moacompress.cli.convert import write_pattern
from moacompress.models.source import SourceModel, load_source
from moacompress.prompts.pools import Prose, draw_keys
from moacompress.prompts.templates import encode_prompt, encode_text
from moacompress.rules.foreign_plans import DuoPattern

MIXED = "duo_attention_mixed"
STATE_FILE = "state.safetensors"
RATE = 0.02
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def make_prompt(
    source: SourceModel, prose: Prose, rng: np.random.Generator, length: int, phrases: int, words: int
) -> tuple[list[int], int]:
    """Returns a prompt of about `length` tokens with its answer, and how many tokens at its end are the answer."""
    said = [" ".join(draw_keys(rng, "calibration", words)) for _ in range(phrases)]
    told = [f"The {name} pass phrase is: {phrase}." for name, phrase in zip(ORDINALS, said, strict=False)]
    answer = encode_text(source.tokenizer, " " + " ".join(told), special=False)
    text = prose.words(rng, "calibration")

    def write(count: int) -> list[int]:
        places = sorted(rng.integers(0, count + 1, phrases).tolist())
        parts = [
            part
            for begin, end, line in zip([0, *places], [*places, count], [*told, ""], strict=True)
            for part in (*text[begin:end], line)
        ]
        request = f"{' '.join(parts)}\n\nRepeat all pass phrases that the text above tells."
        return encode_prompt(source.tokenizer, request)

    bare = len(write(0))
    room = max(length - len(answer) - bare, 0)
    count = int(room * length / (len(write(length)) - bare))
    return [*write(count), *answer], len(answer)


def streaming_attention(query: Tensor, key: Tensor, value: Tensor, sink: int, window: int, scaling: float) -> Tensor:
    """Returns attention to the first `sink` and the last `window` tokens, `[1, heads, tokens, value_dim]`.

    Queries are taken in blocks as long as the window, whose keys are the sinks, the block before and their own.

    Query, key and value are `[1, heads, tokens, head_dim]`. There are at most as many sinks as the window has tokens, which
    include the query's own; `scaling` is a factor on the scores.
    """
    n = query.shape[2]
    pad = -n % window
    padded = [functional.pad(each, (0, 0, 0, pad)).unflatten(2, (-1, window))[0] for each in (query, key, value)]

    def around(blocks: Tensor) -> Tensor:
        first = blocks[:, :1, :sink].expand(-1, blocks.shape[1], -1, -1)
        return torch.cat((first, functional.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1], blocks), 2)

    begins = torch.arange(0, n + pad, window, device=query.device)[:, None]
    at = begins + torch.arange(window, device=query.device)  # [blocks, window], as places of queries
    places = torch.cat((torch.arange(sink, device=query.device).expand(len(at), -1), at - window, at), 1)
    back = at[:, :, None] - places[:, None]
    seen = (back >= 0) & (back < window) & (places >= sink)[:, None]
    seen[..., :sink] = back[..., :sink] >= 0
    blocks = functional.scaled_dot_product_attention(
        padded[0], around(padded[1]), around(padded[2]), attn_mask=seen, scale=scaling
    )
    return blocks.flatten(1, 2)[None, :, :n]


class Heads:
    """The weight of every KV head, `[layers, kv_heads]`, and the attention that mixes by it.

    Every KV head sees the first `sink` tokens, and when it streams the last `window`, the query's own included.
    """

    def __init__(self, shape: tuple[int, int], sink: int, window: int) -> None:
        self.weights = torch.ones(shape, requires_grad=True)
        self.sink, self.window = sink, window

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The attention function that transformers calls in each layer."""
        group = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(group, 1) for each in (key, value))
        full = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        streaming = streaming_attention(query, key, value, self.sink, self.window, scaling)
        weight = self.weights[module.layer_idx].repeat_interleave(group)[:, None, None].to(query.dtype)
        return (streaming + weight * (full - streaming)).transpose(1, 2).contiguous(), None


@contextmanager
def mixed(model: PreTrainedModel, heads: Heads) -> Iterator[None]:
    """Lets the model attend as `heads` says."""
    AttentionInterface.register(MIXED, heads.attend)
    AttentionMaskInterface.register(MIXED, lambda *args, **kwargs: None)
    with attending_as(model, MIXED):
        yield


def rate(step: int, steps: int) -> float:
    """Returns the learning rate of a step: up in the first fifth, down in the last."""
    part = max(steps // 5, 1)
    return RATE * min(1.0, max(0.1, (step + 1) / part), max(0.1, (steps - step) / part))


def train(
    model: PreTrainedModel,
    heads: Heads,
    prompt: Callable[[int], tuple[list[int], int]],
    out: Path,
    steps: int,
    price: float,
    every: int,
) -> None:
    """Trains the weights, those in `out` first if there are any, up to `steps`, and writes them every so many steps.

    `prompt` gives for a step a prompt with its answer, and how many tokens are the answer; `price` is of the mean weight.
    """
    optimizer = torch.optim.Adam([heads.weights], RATE)
    first, begun, decoder = resumed(out, heads, optimizer), time.monotonic(), model.get_decoder()
    for step in range(first, steps):
        ids, answer = prompt(step)
        fed = {"input_ids": torch.tensor([ids]), "use_cache": False}
        with torch.no_grad():
            wanted = decoder(**fed).last_hidden_state[0, -answer:].float()
        with mixed(model, heads):
            found = decoder(**fed).last_hidden_state[0, -answer:].float()
        distance = (found - wanted).square().mean()
        optimizer.param_groups[0]["lr"] = rate(step, steps)
        optimizer.zero_grad()
        (distance + price * heads.weights.abs().mean()).backward()
        optimizer.step()
        heads.weights.data.clamp_(0, 1)
        if (step + 1) % every == 0 or step + 1 == steps:
            write(out, heads, step + 1, optimizer)
            at = {
                "step": step + 1,
                "tokens": len(ids),
                "distance": round(distance.item(), 5),
                "mean weight": round(heads.weights.detach().mean().item(), 4),
                "seconds a step": round((time.monotonic() - begun) / (step + 1 - first), 2),
            }
            print(json.dumps(at), flush=True)


def resumed(out: Path, heads: Heads, optimizer: torch.optim.Optimizer) -> int:
    """Puts weights and optimizer where an earlier run left them; returns how many steps it made."""
    step, moments = 0, torch.zeros(2, *heads.weights.shape)
    if (out / STATE_FILE).is_file():
        held = load_file(out / STATE_FILE)
        step, moments = int(held["step"]), held["moments"]
        heads.weights.data.copy_(held["weights"])
    optimizer.state[heads.weights] = {
        "step": torch.tensor(float(step)),
        "exp_avg": moments[0].clone(),
        "exp_avg_sq": moments[1].clone(),
    }
    return step


def write(out: Path, heads: Heads, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Writes the pattern, and what goes on from it."""
    weights, held = heads.weights.detach(), optimizer.state[heads.weights]
    write_pattern(out, DuoPattern(weights.tolist(), heads.sink, heads.window))
    moments = torch.stack((held["exp_avg"], held["exp_avg_sq"]))
    state = {"weights": weights.clone(), "moments": moments, "step": torch.tensor(step)}
    save_file(state, out / (STATE_FILE + ".new"))
    (out / (STATE_FILE + ".new")).replace(out / STATE_FILE)


def main() -> None:
    """Reads the command line and trains."""
    parser = options(__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="file or folder of long prose")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--shortest", type=int, default=256, help="tokens")
    parser.add_argument("--longest", type=int, default=1024, help="tokens")
    parser.add_argument("--phrases", type=int, default=4)
    parser.add_argument("--words", type=int, default=4, help="pairs of words of a pass phrase")
    parser.add_argument("--sink", type=int, default=16)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--price", type=float, default=0.05, help="of the mean of the weights")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--every", type=int, default=20, help="steps between two writes")
    parser.add_argument("-o", "--out", type=Path, required=True)
    arguments = parser.parse_args()
    source = load_source(arguments.model, dtype=arguments.dtype)
    prose = Prose.load(arguments.text)

    def prompt(step: int) -> tuple[list[int], int]:
        rng = np.random.default_rng((0, step))
        length = int(rng.integers(arguments.shortest, arguments.longest + 1))
        return make_prompt(source, prose, rng, length, arguments.phrases, arguments.words)

    heads = Heads((source.shape.layers, source.shape.kv_heads), arguments.sink, arguments.window)
    train(source.model, heads, prompt, arguments.out, arguments.steps, arguments.price, arguments.every)


if __name__ == "__main__":
    main()
