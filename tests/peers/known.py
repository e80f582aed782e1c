"""What transformers' own tests ask of a compressed model and do not get, each with the sentence that they must be given.

A test is named by its function, `*` for any text. A test that fails is fine where its error is, word for word, the sentence of
a refusal that it is listed with (`tests/refusals.py`), or what it is listed with in `OTHERWISE`. Any other failure is a fault.
"""

from __future__ import annotations

REFUSED: dict[str, tuple[str, ...]] = {
    "attention weights": (
        "test_assisted_decoding_*",
        "test_attention_outputs",
        "test_beam_s*_generate_dict_output*",
        "test_capture_outputs_decorator",
        "test_greedy_generate_dict_outputs*",
        "test_model_outputs_equivalence",
        "test_retain_grad_hidden_states_attentions",
        "test_sample_generate_dict_output",
        "test_sliding_window_mask",
    ),
    "another cache": (),
    "a cache by name": (
        "test_generate_compilation_all_outputs",
        "test_generate_from_inputs_embeds_with_static_cache",
        "test_generate_with_static_cache",
        "test_static_cache_no_recompile_with_smaller_length",
    ),
    "a way of generating": (),
    "another attention": (),
    "another attention when loading": (
        "test_eager_matches_sdpa_inference_*",
        "test_*_padding_matches_padding_free_with_position_ids",
    ),
    "missing weights": ("test_correct_missing_keys", "test_model_weights_reload_no_missing_tied_weights"),
    "a ready-made mask": ("test_custom_4d_attention_mask",),
    "continuous batching": (),
    "another mask": (),
    "not causal": (),
    "packed sequences": (),
}
"""Tests by the refusal that ends them."""

OTHERWISE: dict[str, tuple[str, str]] = {
    "test_can_set_attention_dynamically": (
        "False is not true",
        "the attention of a config is moacompress's, not eager",
    ),
    "test_sdpa_can_dispatch_non_composite_models": ("False is not true", "the attention is moacompress's, not sdpa"),
    "test_generate_compile_model_forward_fullgraph": (
        "False is not true",
        "generate compiles by itself only where a cache has a fixed size",
    ),
    "test_from_pretrained_no_checkpoint": (
        "assert odict_keys*self_attn.gate.weight*",
        "weights of gates are given to a dense model's config, which has no place for them",
    ),
    "test_can_init_all_missing_weights": (
        "Lists differ*attn.gate.*",
        "as above: a dense model that is made without weights is compared with one that has gates",
    ),
    "test_past_key_values_format": (
        "'NoneType' object has no attribute 'shape'",
        "keys lie in blocks: a layer of the cache has no tensor of all of them",
    ),
}
"""Tests that ask how a dense model is made, by name: the message that ends each, `*` for any text, and why that is no fault."""
