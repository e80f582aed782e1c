"""Classes of KV heads, which vLLM takes for layers: it gives them memory, block tables and a step's metadata."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionMetadataBuilder, AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.classes import KVClass, KVClasses, kv_classes
from moacompress.serving.vllm.scheduling import in_flight, logger, options_of
from moacompress.serving.vllm.selected_blocks import SelectedBlocks
from moacompress.serving.vllm.served_plan import ServedPlan
from moacompress.serving.vllm.spec import ClassSpec, SelectedSpec

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


def class_layers(served: ServedPlan, dtype: torch.dtype, vllm_config: VllmConfig, impl: Any) -> list[ClassLayer]:
    """Makes the classes, and has vLLM take them for layers."""
    length = min(served.plan.stated_lengths[-1], vllm_config.model_config.max_model_len)
    classes = kv_classes(served.plan, dtype, options_of(vllm_config).classes, length)
    found = []
    for index, one in enumerate(classes.classes):
        kind: Any = partial(SelectedSpec, units=one.units) if one.selected else ClassSpec
        spec = kind(
            block_size=BLOCK,
            num_kv_heads=1,
            head_size=served.plan.model.head_dim,
            dtype=torch.uint8,
            state_content_bytes=classes.block_bytes // BLOCK,
            index=index,
            rules=one.rules,
            in_flight=in_flight(vllm_config),
        )
        found.append(ClassLayer(index, one, spec, impl, vllm_config.model_config.max_model_len))
        vllm_config.compilation_config.static_forward_context[found[-1].layer_name] = found[-1]
    _say(served, classes, length)
    return found


def _say(served: ServedPlan, classes: KVClasses, length: int) -> None:
    plan = served.plan.in_dtype(str(classes.dtype).removeprefix("torch."))
    sizes = classes.held_bytes(length), plan.kv_bytes(length), plan.model.dense_kv_bytes(length)
    logger.info(
        "a sequence of %d tokens holds %.1f MiB of the KV cache, in %d classes of KV heads; by the plan alone it is %.1f MiB, "
        "and without a plan %.1f MiB",
        length,
        sizes[0] / 2**20,
        len(classes.classes),
        *(size / 2**20 for size in sizes[1:]),
    )
