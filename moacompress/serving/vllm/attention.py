"""The worker's side: attention layers under a plan, by moacompress's kernels over vLLM's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from moacompress.core.arrays import Ints
from moacompress.core.errors import PlanError, UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores, as_tensors
from moacompress.kernels.dispatch import backend_for
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.passing import merged
from moacompress.rules.rule import SCORE_BYTES
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.classes import KVClass, KVClasses, KVHead, kv_classes
from moacompress.serving.vllm.config import PlanConfig
from moacompress.serving.vllm.gates import LayerGate
from moacompress.serving.vllm.options import options_of
from moacompress.serving.vllm.scheduling import in_flight, logger
from moacompress.serving.vllm.selected_blocks import SelectedBlocks
from moacompress.serving.vllm.selection import SelectedMemory, SelectedPart, Selection
from moacompress.serving.vllm.spec import ClassSpec, SelectedSpec

_LIBRARY = torch.library.Library("moacompress_vllm", "FRAGMENT")
_CLASS_NAME = "moacompress.kv_class.{}"
"""Of a class among vLLM's layers; vLLM reads the number."""


class PlanBackend(CPUAttentionBackend):
    """What vLLM asks about attention under a plan."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Returns the tokens of a block."""
        return [BLOCK]

    @staticmethod
    def get_builder_cls() -> type[ClassMetadataBuilder]:
        """Returns what makes the metadata of a class."""
        return ClassMetadataBuilder


@dataclass
class ClassMetadata:
    """Where a step's tokens are, in the blocks of one class.

    Attributes:
        starts: first token of each row, and their number, `[rows + 1]`.
        lengths: tokens of each row, new ones included, `[rows]`.
        table: block ids, int32 `[rows, width]`.
        slots: block id * 16 + place of each new token, `[tokens]`; means nothing in a class of selected tokens.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor
    slots: torch.Tensor


class ClassMetadataBuilder(AttentionMetadataBuilder[ClassMetadata]):
    """Hands on what vLLM knows of a step."""

    def __init__(
        self, kv_cache_spec: ClassSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> ClassMetadata:
        """See `ClassMetadata`."""
        step = common_attn_metadata
        return ClassMetadata(
            step.query_start_loc_cpu[: step.num_reqs + 1],
            step.seq_lens[: step.num_reqs],
            step.block_table_tensor[: step.num_reqs],
            step.slot_mapping[: step.num_actual_tokens],
        )


class ClassLayer(nn.Module, AttentionLayerBase):
    """A class of KV heads, which vLLM takes for a layer: it gives it memory and a block table."""

    def __init__(self, index: int, one: KVClass, spec: ClassSpec, impl: Any, longest: int) -> None:
        super().__init__()
        self.units = one.blocks.units(longest) if isinstance(one.blocks, SelectedBlocks) else []
        self.layer_name, self.heads, self.spec, self.impl = _CLASS_NAME.format(index), one, spec, impl
        self.attn_type = AttentionType.DECODER
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[PlanBackend]:
        """Returns the backend."""
        return PlanBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ClassSpec:
        """Returns the spec."""
        return self.spec


class PlanAttention(Attention):
    """What an `Attention` becomes. It has no cache of its own: its KV heads are in classes.

    Attributes:
        plan_classes: the model's classes as layers, by their indices.
        plan_table: rules of the KV heads.
        plan_scores: how scores are made.
        plan_gate: what scores tokens; None where no rule selects.
        plan_view: the KV heads' memory; None until vLLM has made it.
    """

    plan_classes: Sequence[ClassLayer]
    plan_table: RuleTable
    plan_scores: Scores
    plan_gate: LayerGate | None
    plan_view: _LayerMemory | None

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
        """Returns attention of new tokens, `[tokens, heads * head_dim]`; theirs are put into the cache.

        Args:
            query: `[tokens, heads * head_dim]`.
            key: `[tokens, kv_heads * head_dim]`.
            value: as `key`.
            output_shape: not used; that of the query.
            output_dtype: not used; that of the query.
        """
        out = torch.empty_like(query.view(-1, self.num_heads, self.head_size))
        torch.ops.moacompress_vllm.attend(
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size_v),
            None if self.plan_gate is None else self.plan_gate.take(len(query)),
            out,
            self.layer_name,
        )
        return out.view(-1, self.num_heads * self.head_size)


@dataclass
class _LayerMemory:
    """Where the KV heads of a layer lie.

    Attributes:
        keys: of each KV head its part of all blocks.
        values: likewise.
        key_parts: how keys are kept.
        value_parts: how values are kept.
        of_class: the class of each, int64 `[kv_heads]`.
        first: what is added to block ids of each, so that they count through the KV heads' memory, int32 `[kv_heads]`.
        selected: what gates select; None where no rule does.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    key_parts: list[KVPart]
    value_parts: list[KVPart]
    of_class: torch.Tensor
    first: torch.Tensor
    selected: SelectedMemory | None

    @staticmethod
    def of(layer: int, classes: Sequence[ClassLayer], rules: RuleTable) -> _LayerMemory:
        """Returns views of what vLLM has made.

        Args:
            layer: index of the layer.
            classes: of the model.
            rules: of the layer's KV heads.
        """
        windows: dict[int, tuple[int, KVHead, _Views]] = {}
        selected: dict[int, tuple[int, list[_Views], Ints]] = {}
        for index, one in enumerate(classes):
            for number, (head, at) in enumerate(one.heads.places()):
                if head.layer == layer and one.heads.selected:
                    starts = range(0, one.heads.units * one.heads.unit_bytes, one.heads.unit_bytes)
                    views = [_views_of(one.kv_cache, head, start) for start in starts]
                    selected[head.index] = index, views, one.units[number]
                elif head.layer == layer:
                    windows[head.index] = index, head, _views_of(one.kv_cache, head, at)
        found = [windows[index] for index in range(len(rules))]
        keys, values = ([views[side] for *_, views in found] for side in (0, 1))
        key_parts, value_parts = [head.key for _, head, _ in found], [head.value for _, head, _ in found]
        parts = {
            head: SelectedPart(views, numbers, index, windows[head][2][2])
            for head, (index, views, numbers) in sorted(selected.items())
        }
        kv_parts = [*zip(key_parts, value_parts, strict=True)]
        return _LayerMemory(
            keys,
            values,
            key_parts,
            value_parts,
            torch.tensor([index for index, *_ in found]),
            torch.arange(len(found), dtype=torch.int32) * len(keys[0]),
            SelectedMemory(RuleTable(rules.columns.numpy()), keys, values, kv_parts, parts) if parts else None,
        )

    def view(self, table: torch.Tensor, value_dim: int) -> CacheView:
        """Returns what attention reads under a table of the windows' blocks, int32 `[rows, kv_heads, width]`."""
        keys, values = (self.keys, self.values) if self.selected is None else (self.selected.keys, self.selected.values)
        return CacheView(keys, values, table.contiguous(), value_dim)


_Views = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _views_of(memory: torch.Tensor, head: KVHead, at: int) -> _Views:
    """Returns keys, values and scores of a KV head, whose part begins at a byte of each block; no scores where it has none."""
    scores = at + head.key.nbytes + head.value.nbytes
    size = BLOCK * SCORE_BYTES if head.rule.selects else 0
    return (
        _part_of(memory, head.key, at),
        _part_of(memory, head.value, at + head.key.nbytes),
        memory.flatten(1)[:, scores : scores + size].view(torch.int16),
    )


def _part_of(memory: torch.Tensor, kv_part: KVPart, at: int) -> torch.Tensor:
    """Returns the K or V part of all blocks that begins at a byte of each, see `KVPart.new`.

    Args:
        memory: bytes, `[blocks, 1, 16, bytes of a token]`, as vLLM lays a class out.
        kv_part: which.
        at: byte.
    """
    part = memory.flatten(1)[:, at : at + kv_part.nbytes]
    return part if kv_part.bits else part.view(kv_part.dtype).unflatten(1, (BLOCK, kv_part.dim))


@dataclass
class _Step:
    """A step's tokens in all classes, as the kernels take them.

    Attributes:
        chunks: of each row with more than one new token its index, first token and end.
        single: rows with one new token, int64 `[n]`.
        single_at: that token of each.
        past: tokens of each row before the step, int64 `[rows]`.
        lengths: tokens of each row, new ones included, likewise.
        tables: block ids of each class, int32 `[rows, any]`.
        windows: those of the classes of windows, which come first, together, int32 `[classes, rows, width]`.
        slots: of the same classes, int64 `[tokens, classes]`.
    """

    chunks: list[tuple[int, int, int]]
    single: torch.Tensor
    single_at: torch.Tensor
    past: torch.Tensor
    lengths: torch.Tensor
    tables: list[torch.Tensor]
    windows: torch.Tensor
    slots: torch.Tensor

    @staticmethod
    def of(metadata: dict[str, ClassMetadata], classes: Sequence[ClassLayer]) -> _Step:
        """Puts the metadata of the classes together."""
        found = [metadata[one.layer_name] for one in classes]
        of_windows = [one for one, of in zip(found, classes, strict=True) if not of.heads.selected]
        starts, lengths = found[0].starts.tolist(), found[0].lengths.to(torch.int64)
        spans = [*pairwise(starts)]
        width = -(-int(lengths.max()) // BLOCK)
        single = [row for row, (begin, end) in enumerate(spans) if end - begin == 1]
        return _Step(
            [(row, *span) for row, span in enumerate(spans) if span[1] - span[0] > 1],
            torch.tensor(single, dtype=torch.int64),
            torch.tensor([starts[row] for row in single], dtype=torch.int64),
            lengths - torch.tensor([end - begin for begin, end in spans]),
            lengths,
            [one.table for one in found],
            torch.stack([one.table[:, :width] for one in of_windows]),
            torch.stack([one.slots for one in of_windows], 1).to(torch.int64),
        )

    def table_of(self, classes: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Returns block ids of windows that count through the memory of KV heads, int32 `[rows, kv_heads, width]`.

        Args:
            classes: that of each KV head, int64 `[kv_heads]`.
            first: what is added to its block ids, int32 `[kv_heads]`.
        """
        return self.windows[classes].transpose(0, 1) + first[:, None]


class _Steps:
    """The last step that was put together: all layers of a forward pass have the same."""

    def __init__(self) -> None:
        self._made_of: object = None
        self._step: _Step | None = None

    def of(self, metadata: dict[str, ClassMetadata], classes: Sequence[ClassLayer]) -> _Step:
        if self._step is None or self._made_of is not metadata:
            self._made_of, self._step = metadata, _Step.of(metadata, classes)
        return self._step


_steps = _Steps()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    of_gate: torch.Tensor | None,
    output: torch.Tensor,
    layer_name: str,
) -> None:
    """Attends from new tokens to what their sequences hold, and puts them into the cache.

    Args:
        query: `[tokens, heads, head_dim]`.
        key: `[tokens, kv_heads, head_dim]`.
        value: likewise.
        of_gate: the tokens' scores, int16 `[tokens, kv_heads]`; None where no rule selects.
        output: as `query`; written to.
        layer_name: of a `PlanAttention`.
    """
    context = get_forward_context()
    metadata: Any = context.attn_metadata
    layer: PlanAttention = context.no_compile_layers[layer_name]
    if metadata is None:  # vLLM tries the model out before there is a cache
        output.zero_()
        return
    rules, scores, value_dim = layer.plan_table, layer.plan_scores, layer.head_size_v
    if layer.plan_view is None:
        layer.plan_view = _LayerMemory.of(extract_layer_index(layer_name), layer.plan_classes, rules)
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
    selection = None
    if memory.selected is not None and of_gate is not None:
        memory.selected.put_scores(slots, of_gate[:tokens])
        lengths = step.lengths.numpy()
        selected = memory.selected.table_of(step.tables, lengths)
        selection = Selection(memory.selected, tables, selected, step.past.numpy(), lengths, backend)
    for row, begin, end in step.chunks:
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
            passing=None if selection is None else selection.passing(row),
        )
        output[chunk] = found[0].transpose(0, 1)
    if len(step.single):
        alone = len(step.single) == len(tables)
        rows, at = (slice(None), slice(tokens)) if alone else (step.single, step.single_at)
        found, lse = backend.decode(
            query[at],
            cache=memory.view(tables[rows], value_dim),
            lengths=step.lengths[rows],
            rules=rules,
            scores=scores,
            with_lse=selection is not None,
        )
        if selection is not None and lse is not None:
            found, _ = merged((found, lse), selection.attend(query[at], rows, scores, value_dim))
        output[at] = found
    if selection is not None:
        selection.commit()


_LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? of_gate, Tensor(a!) output, str layer_name) -> ()"
)
_LIBRARY.impl("attend", attend, "CPU")
torch.library.register_fake(
    "moacompress_vllm::attend", lambda query, key, value, of_gate, output, layer_name: None, lib=_LIBRARY
)


def take_over(layer: Attention, prefix: str, config: PlanConfig) -> None:
    """Turns a freshly made attention layer into one under the plan; vLLM asks twice for each.

    Raises:
        PlanError: the plan is for another model.
        UnsupportedError: the layer does what the kernels cannot.
    """
    if isinstance(layer, PlanAttention):
        return
    vllm_config = get_current_vllm_config()
    plan, index = config.plan, extract_layer_index(prefix)
    if index >= plan.model.layers:
        raise PlanError(f"the plan is for {plan.model.layers} layers, and the model has a layer {index}")
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
    layer.plan_view = layer.plan_gate = None
    if any(rule.selects for rule in plan.rules[index]):
        inputs = vllm_config.model_config.get_hidden_size()
        layer.plan_gate = config.gates[index] = LayerGate(layer.num_kv_heads, inputs, layer.kv_cache_torch_dtype)
    if config.class_layers is None:
        config.class_layers = _class_layers(config, layer.kv_cache_torch_dtype, vllm_config, impl)
    object.__setattr__(layer, "plan_classes", config.class_layers)  # no submodules: they have no weights


def _class_layers(config: PlanConfig, dtype: torch.dtype, vllm_config: VllmConfig, impl: Any) -> list[ClassLayer]:
    """Makes the classes, and has vLLM take them for layers."""
    length = min(config.plan.stated_lengths[-1], vllm_config.model_config.max_model_len)
    classes = kv_classes(config.plan, dtype, options_of(vllm_config).classes, length)
    found = []
    for index, one in enumerate(classes.classes):
        kind: Any = partial(SelectedSpec, units=one.units) if one.selected else ClassSpec
        spec = kind(
            block_size=BLOCK,
            num_kv_heads=1,
            head_size=config.plan.model.head_dim,
            dtype=torch.uint8,
            state_content_bytes=classes.block_bytes // BLOCK,
            index=index,
            rules=one.rules,
            in_flight=in_flight(vllm_config),
        )
        found.append(ClassLayer(index, one, spec, impl, vllm_config.model_config.max_model_len))
        vllm_config.compilation_config.static_forward_context[found[-1].layer_name] = found[-1]
    _say(config, classes, length)
    return found


def _say(config: PlanConfig, classes: KVClasses, length: int) -> None:
    plan = config.plan.in_dtype(str(classes.dtype).removeprefix("torch."))
    sizes = classes.held_bytes(length), plan.kv_bytes(length), plan.model.dense_kv_bytes(length)
    logger.info(
        "a sequence of %d tokens holds %.1f MiB of the KV cache, in %d classes of KV heads; by the plan alone it is %.1f MiB, "
        "and without a plan %.1f MiB",
        length,
        sizes[0] / 2**20,
        len(classes.classes),
        *(size / 2**20 for size in sizes[1:]),
    )
