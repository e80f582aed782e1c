"""Models that read images beside text: the plan is for the text decoder, and what reads images attends as it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from moacompress.core.errors import UnsupportedError
from moacompress.models.source import model_shape
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.runtime import attach, detach
from tests.runtime.forwards import GREEDY, in_parts, plan_of

TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
    "initializer_range": 0.2,
}
IMAGE, PATCHES = 150, 16


def llava() -> Any:
    parts: dict[str, Any] = {"vision_config": CLIPVisionConfig(**VISION), "text_config": LlamaConfig(**TEXT)}
    config = LlavaConfig(**parts, image_token_index=IMAGE, vision_feature_layer=-1)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT, sliding_window=80, layer_types=kinds),
        vision_config=SiglipVisionConfig(**VISION),
        mm_tokens_per_image=PATCHES,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)


def with_plan(model: Any) -> Any:
    return attach(model, Plan.uniform(model_shape(model), Rule(4, 20, 0), min_window=16))


def read(ids: torch.Tensor) -> dict[str, Any]:
    """Returns what a model is called with; the image takes the place of some tokens."""
    ids = ids.clone()
    ids[:, 20 : 20 + PATCHES] = IMAGE
    torch.manual_seed(1)
    return {"input_ids": ids, "pixel_values": torch.randn(len(ids), 3, 28, 28)}


def attention_of(model: Any) -> dict[str, str | None]:
    parts = {"tower": model.model.vision_tower, "text": model.model.language_model, "whole": model}
    return {name: part.config._attn_implementation for name, part in parts.items()}


def test_llava_steps_are_its_prompt(token_ids: Callable[..., torch.Tensor]) -> None:
    model = llava()
    given = read(token_ids(1, 150).clamp(3, 140))
    dense = model(**given).logits
    attach(model, Plan.full(model_shape(model)))
    torch.testing.assert_close(model(**given).logits, dense, atol=1e-4, rtol=1e-4)
    with_plan(model)
    whole = model(**given, use_cache=False).logits
    assert (whole - dense).abs().max() > 0.1
    out = model(**{**given, "input_ids": given["input_ids"][:, :140]})
    found = torch.cat((out.logits, in_parts(model, given["input_ids"][:, 140:], [], out.cache)), dim=1)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)
    cached, uncached = (model.generate(**given, **GREEDY, max_new_tokens=6, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    torch.testing.assert_close(detach(model)(**given).logits, dense)


def test_llava_is_saved_and_loaded(token_ids: Callable[..., torch.Tensor], tmp_path: Any) -> None:
    model = llava()
    before = attention_of(model)
    with_plan(model)
    assert attention_of(model) == {"tower": before["tower"], "text": "moacompress", "whole": "moacompress"}
    model.save_pretrained(tmp_path / "model")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    assert attention_of(loaded) == attention_of(model)
    plan = plan_of(loaded)
    assert plan.key() == Plan.uniform(plan.model, Rule(4, 20, 0), min_window=16).key()
    given = read(token_ids(1, 150).clamp(3, 140))
    torch.testing.assert_close(loaded(**given).logits, model(**given).logits)
    detach(loaded)
    assert attention_of(loaded) == before


def test_gemma_reads_text_and_refuses_images(token_ids: Callable[..., torch.Tensor]) -> None:
    model = gemma()
    ids = token_ids(2, 150).clamp(3, 140)
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    text = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    dense = model(**text).logits
    attach(model, Plan.full(model_shape(model)))
    torch.testing.assert_close(model(**text).logits[:, 30:], dense[:, 30:], atol=1e-4, rtol=1e-4)
    with_plan(model)
    whole = model(**text, use_cache=False).logits
    assert (whole - dense)[:, 30:].abs().max() > 0.1
    alone = model(input_ids=ids[1:, 30:]).logits
    torch.testing.assert_close(whole[1:, 30:], alone, atol=1e-4, rtol=1e-4)
    told = model.generate(**text, **GREEDY, max_new_tokens=6)
    assert torch.equal(told, model.generate(ids, attention_mask=mask, **GREEDY, max_new_tokens=6))
    longer = {"input_ids": told[:, :-1], "attention_mask": torch.nn.functional.pad(mask, (0, 5), value=1)}
    steps = model(**longer).logits[:, 149:].argmax(-1)
    assert torch.equal(steps, told[:, 150:])

    given = read(ids)
    seen = {**given, "token_type_ids": (given["input_ids"] == IMAGE).long()}
    for call in (model, lambda **given: model.generate(**given, max_new_tokens=2)):
        with pytest.raises(UnsupportedError, match="tokens of an image see each other in both directions, which a"):
            call(**seen)
    torch.testing.assert_close(model(**text, use_cache=False).logits, whole)
