"""Rendering, masks, the dense model's greedy answers, and answers on disk: found again, told apart, or left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from moacompress.calibration.data.answers import AnswerStore, SampleDraft, answer_drafts, generate_greedy, stop_tokens
from moacompress.core.errors import DataError
from moacompress.core.progress import Progress
from moacompress.prompts.templates import encode_conversation, encode_prompt
from moacompress.runtime.compat.alternates import returned_cache
from tests.templates import without_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tests.calibration.conftest import Models

PROMPTS = [[1, 2, 3], [4, 5, 6]]


def test_prompts_with_and_without_a_template(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode_prompt(tiny_tokenizer, "hi", "It is")
    assert tiny_tokenizer.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nIt is"
    assert tiny_tokenizer.decode(encode_prompt(without_template(tiny_tokenizer), "hi", "It is")) == "hi\nIt is"


def test_template_that_is_no_prefix(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + str(tiny_tokenizer.chat_template)
    chat = [{"role": role, "content": "sure?"} for role in ("user", "assistant", "user")]
    with pytest.raises(DataError, match=r"first 1 turns of a conversation differently .*token 0 of \d+"):
        encode_conversation(tokenizer, chat)


def test_greedy_is_greedy_and_stops(tiny_model: Models) -> None:
    model = tiny_model("llama")
    prompt = [5, 9, 77, 30]
    ids = torch.tensor([prompt])
    wanted = []
    for _ in range(6):
        token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        wanted.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.do_sample = True
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = wanted
    assert generate_greedy(model, [prompt, prompt], 6) == [wanted, wanted]
    model.generation_config.eos_token_id = [wanted[2], 3]
    assert stop_tokens(model) == {wanted[2], 3}
    first = wanted.index(wanted[2])
    assert generate_greedy(model, [prompt], 6) == [wanted[: first + 1]]


def test_greedy_goes_on_from_a_cache(tiny_model: Models) -> None:
    model = tiny_model("llama", seed=3)
    prompt = list(range(10, 40))
    cache = returned_cache(model(input_ids=torch.tensor([prompt[:-1]]), use_cache=True))
    assert generate_greedy(model, [prompt], 5, cache) == generate_greedy(model, [prompt], 5)


def test_drafts_keep_their_order(tiny_model: Models) -> None:
    class Steps(Progress):
        count = 0

        def step(self, note: str = "") -> None:
            self.count += 1

    model, steps = tiny_model("llama"), Steps()
    sizes = [80, 90, 80, 100]
    drafts = [SampleDraft([7 + i] * n, [False] * n, 6, f"s{i}", 120) for i, n in enumerate(sizes)]
    text = SampleDraft([9] * 120, [False] * 100 + [True] * 20, 0, "text", 120)
    samples = answer_drafts(model, [*drafts, text], steps)
    assert [sample.source for sample in samples] == ["s0", "s1", "s2", "s3", "text"]
    assert steps.count == 5
    for draft, sample in zip(drafts, samples, strict=False):
        (answer,) = generate_greedy(model, [draft.ids], 6)
        assert sample.input_ids.tolist() == [*draft.ids, *answer]
        assert sample.answer_mask.sum() == len(answer)
    assert samples[-1].input_ids.tolist() == [9] * 120
    assert samples[-1].answer_mask.sum() == 20


def store(path: Path, weights: str = "0123", dtype: str = "float32") -> AnswerStore:
    return AnswerStore(path, weights, dtype)


def test_answers_come_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    first = store(path)
    assert first.get(PROMPTS[0], 8) is None
    first.add(PROMPTS, 8, [[7, 8], []])
    for opened in (first, store(path)):
        assert [opened.get(prompt, 8) for prompt in PROMPTS] == [[7, 8], []]
        assert opened.get(PROMPTS[0], 9) is None
        assert opened.get([1, 2], 8) is None
    assert store(path, weights="4567").get(PROMPTS[0], 8) is None
    assert store(path, dtype="bfloat16").get(PROMPTS[0], 8) is None


@pytest.mark.parametrize(
    "damage", [b'{"answers": {"a', b'{"answers": 3}\n', b'{"answers": {"k": "text"}}\n', b'{"answers": {"k": [-1]}}']
)
def test_what_is_damaged_is_left_out(tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "answers.jsonl"
    store(path).add(PROMPTS[:1], 8, [[7]])
    with path.open("ab") as file:
        file.write(damage)
    opened = store(path)
    assert opened.get(PROMPTS[0], 8) == [7]
    assert "answers.jsonl: cannot read line 2" in caplog.text
    opened.add(PROMPTS[1:], 8, [[9]])
    opened.add([[1]], 8, [[3]])
    again = store(path)
    assert [again.get(prompt, 8) for prompt in (*PROMPTS, [1])] == [[7], [9], [3]]
