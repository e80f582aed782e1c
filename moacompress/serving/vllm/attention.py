"""The worker's side: attention layers under a plan, by moacompress's kernels over vLLM's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType

from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.kernels.arguments import Scores, SelectedView, as_tensors
from moacompress.kernels.centred_keys import centred
from moacompress.kernels.dispatch import backend_for
from moacompress.rules.rule_table import RuleTable
from moacompress.serving.vllm.class_layers import ClassLayer, PlanBackend, class_layers
from moacompress.serving.vllm.gates import LayerGate, holder_of
from moacompress.serving.vllm.layer_memory import LayerMemory
from moacompress.serving.vllm.selection import Selection
from moacompress.serving.vllm.served_plan import ServedPlan
from moacompress.serving.vllm.step import Steps

_LIBRARY = torch.library.Library("moacompress_vllm", "FRAGMENT")


class PlanAttention(Attention):
    """What an `Attention` becomes. It has no cache of its own: its KV heads are in classes.

    Attributes:
        plan_classes: the model's classes as layers, by their indices.
        plan_table: rules of the KV heads.
        plan_scores: how scores are made.
        plan_centre: what keys lie less, float32 `[kv_heads, head_dim]`; None for nothing.
        plan_gate: what scores tokens; None where no rule selects.
        plan_view: the KV heads' memory; None until vLLM has made it.
    """

    plan_classes: Sequence[ClassLayer]
    plan_table: RuleTable
    plan_scores: Scores
    plan_centre: torch.Tensor | None
    plan_gate: LayerGate | None
    plan_view: LayerMemory | None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Looks whether the gate's weights are there.

        Raises:
            PlanError: they are not.
        """
        super().process_weights_after_loading(act_dtype)
        if self.plan_gate is not None:
            self.plan_gate.check_loaded(self.layer_name)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> None:
        """Returns None: the classes have specs."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """Returns attention of new tokens, `[tokens, heads * head_dim]`; their keys and values are put into the cache."""
        out = torch.empty_like(query.view(-1, self.num_heads, self.head_size))
        keys = key.view(-1, self.num_kv_heads, self.head_size)
        torch.ops.moacompress_vllm.attend(
            query.view(-1, self.num_heads, self.head_size),
            centred(keys.transpose(0, 1)[None], self.plan_centre)[0].transpose(0, 1),
            value.view(-1, self.num_kv_heads, self.head_size_v),
            None if self.plan_gate is None else self.plan_gate.take(len(query)),
            out,
            self.layer_name,
        )
        return out.view(-1, self.num_heads * self.head_size)


_steps = Steps()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_gate: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """Attends from new tokens to what their sequences hold, and puts them into the cache.

    The query is `[tokens, heads, head_dim]`, and so is the output; key and value are `[tokens, kv_heads, dim]`. `of_gate` are
    the tokens' scores, int16 `[tokens, kv_heads]`, None where no rule selects.
    """
    context = get_forward_context()
    metadata: Any = context.attn_metadata
    layer: PlanAttention = context.no_compile_layers[layer_name]
    if metadata is None:  # vLLM tries the model out before there is a cache
        output.zero_()
        return
    rules, scores, value_dim = layer.plan_table, layer.plan_scores, layer.head_size_v
    if layer.plan_view is None:
        layer.plan_view = LayerMemory.of(extract_layer_index(layer_name), layer.plan_classes, rules)
    memory, step = layer.plan_view, _steps.of(metadata, layer.plan_classes)
    tokens = len(step.slots)
    if tokens < len(query):
        output[tokens:].zero_()  # padding
    backend = backend_for(query)
    tables = step.table_of(memory.of_class, memory.first)
    # first, because a row may begin with blocks that another one fills in this very step
    slots = step.slots[:, memory.of_class]
    backend.put(memory.key_parts, memory.keys, slots, key[:tokens])
    backend.put(memory.value_parts, memory.values, slots, value[:tokens])
    chunks = step.chunks
    selected: SelectedView | None = None
    selection: Selection | None = None
    if memory.selected is not None and of_gate is not None:
        memory.selected.put_scores(slots.numpy(), of_gate[:tokens].numpy())
        selected = memory.selected.view(step.tables)
        if not backend.capabilities.decode_selecting:
            chunks = step.spans
        if chunks:
            at = torch.tensor([row for row, *_ in chunks])
            of_windows, of_selected, past, lengths = (
                of[at].numpy() for of in (tables, selected.table, step.past, step.lengths)
            )
            selection = Selection(memory.selected, of_windows, of_selected, past, lengths, backend)
    for number, (row, begin, end) in enumerate(chunks):
        chunk = slice(begin, end)
        found, _ = backend.prefill(
            query[None, chunk].transpose(1, 2),
            key[None, chunk].transpose(1, 2),
            value[None, chunk].transpose(1, 2),
            cache=memory.view(tables[row : row + 1], value_dim),
            past=step.past[row : row + 1],
            valid=torch.tensor([end - begin]),
            rules=rules,
            scores=scores,
            transient=None if selection is None else selection.transient(number),
        )
        output[chunk] = found[0].transpose(0, 1)
    if selection is not None:
        selection.commit()
    if len(step.single) == 0 or chunks is step.spans:
        return
    alone = len(step.single) == len(tables)
    rows, where = (slice(None), slice(tokens)) if alone else (step.single, step.single_at)
    cache, now = memory.view(tables[rows], value_dim), step.lengths[rows]
    if selected is None:
        found, _ = backend.decode(query[where], cache=cache, lengths=now, rules=rules, scores=scores)
    else:
        of_rows = SelectedView(selected.table[rows].contiguous(), selected.scores)
        found = backend.decode_selecting(
            query[where], cache=cache, selected=of_rows, lengths=now, rules=rules, scores=scores
        )
    output[where] = found


_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? of_gate, Tensor(a!) output, str layer_name) -> ()"
)
_LIBRARY.impl("attend", attend, "CPU")
torch.library.register_fake(
    "moacompress_vllm::attend", lambda query, key, value, of_gate, output, layer_name: None, lib=_LIBRARY
)


def take_over(layer: Attention, prefix: str, served: ServedPlan) -> None:
    """Turns a freshly made attention layer into one under the plan; vLLM asks twice for each.

    Raises:
        PlanError: the plan is for another model.
        UnsupportedError: the layer does what the kernels cannot.
    """
    if isinstance(layer, PlanAttention):
        return
    vllm_config = get_current_vllm_config()
    plan, index = served.plan, extract_layer_index(prefix)
    if index >= plan.model.layers:
        raise PlanError(f"the plan is for {plan.model.layers} layers, and the model has a layer {index}")
    layers = getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", None)
    if layers not in (None, plan.model.layers):
        raise PlanError(f"the plan is for {plan.model.layers} layers, and the model has {layers}")
    native = plan.model.native_windows[index]
    for name, ours, theirs in (
        ("KV heads", plan.model.kv_heads, layer.num_kv_heads),
        ("query heads", plan.model.heads, layer.num_heads),
        ("numbers a head", plan.model.head_dim, layer.head_size),
        ("tokens in its sliding window", native, layer.sliding_window),
    ):
        if ours != theirs:
            raise PlanError(f"the plan is for a model with {ours} {name} in layer {index}, and vLLM's has {theirs}")
    impl = layer.impl
    for lacks, what in (
        (type(layer) is not Attention, f"layers of the kind {type(layer).__name__}"),
        (layer.attn_type != AttentionType.DECODER, f"{layer.attn_type} layers"),
        (getattr(impl, "alibi_slopes", None) is not None, "biases by distance (ALiBi)"),
        (layer.kv_sharing_target_layer_name is not None, "layers that take keys and values from another"),
        (layer.head_size_v != layer.head_size, "values of another size than keys"),
        (
            layer.use_mm_prefix,
            "images whose tokens see each other (`--limit-mm-per-prompt '{\"image\": 0}'` serves its text alone)",
        ),
    ):
        if lacks:
            raise UnsupportedError(
                f"vLLM cannot serve this model under a plan: it has {what}, and plans are for none such"
            )
    layer.__class__ = PlanAttention
    layer.attn_backend = PlanBackend  # vLLM asks it for the layouts of memory that it reads
    layer.plan_table = as_tensors(RuleTable.of(plan.rules[index], plan.min_window, native))
    sinks = getattr(impl, "sinks", None)
    layer.plan_scores = Scores(impl.scale, float(impl.logits_soft_cap or 0.0), sinks)
    centre = plan.key_centre(index)
    layer.plan_centre = None if centre is None else torch.from_numpy(centre)
    if centre is not None and (layer.plan_scores.softcap or sinks is not None):
        raise PlanError(
            f"vLLM cannot serve this plan: layer {index} has learned sink logits or bounds its scores, and the plan has "
            "centres of its keys; profile with `profile: {centres: false}`"
        )
    layer.plan_view = layer.plan_gate = None
    if any(rule.selects for rule in plan.rules[index]):
        inputs = vllm_config.model_config.get_hidden_size()
        layer.plan_gate = served.gates[holder_of(prefix)] = LayerGate(
            layer.num_kv_heads, inputs, layer.kv_cache_torch_dtype
        )
    if served.class_layers is None:
        served.class_layers = class_layers(served, layer.kv_cache_torch_dtype, vllm_config, impl)
    object.__setattr__(layer, "plan_classes", served.class_layers)  # no submodules: they have no weights
