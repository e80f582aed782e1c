"""The scheduler's side: what a class of KV heads takes of the cache, and when a sequence frees blocks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.freed_blocks import FreedBlocks, freed_blocks
from moacompress.serving.vllm.selected_blocks import SelectedBlocks, selected_blocks


@dataclass(frozen=True, kw_only=True)
class ClassSpec(AttentionSpec):
    """What vLLM knows of a class: a layer of its own with one head, whose token takes a share of a block's bytes.

    Attributes:
        rules: what its blocks follow from, see `KVClass.rules`.
        in_flight: tokens of a sequence that a step computes at most beside other sequences.
    """

    index: int
    rules: tuple[tuple[int, ...], ...]
    in_flight: int

    @property
    def blocks(self) -> FreedBlocks | SelectedBlocks:
        """Which blocks a sequence holds."""
        return freed_blocks(self.rules)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Returns the most bytes that a sequence takes when it is alone, and a step may compute as much of it as fits."""
        longest = vllm_config.model_config.max_model_len
        return int(self.page_size_bytes * self.blocks.most_held(longest, vllm_config.max_in_flight_tokens))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Returns whether all are of this class: each has a block table of its own."""
        return all(spec == self for spec in kv_cache_specs.values())


@dataclass(frozen=True, kw_only=True)
class SelectedSpec(ClassSpec):
    """What vLLM knows of a class whose blocks have the tokens that gates select.

    Attributes:
        units: in a block, see `KVClass`.
    """

    units: int

    @property
    def blocks(self) -> SelectedBlocks:
        """How many blocks a sequence holds."""
        return selected_blocks(self.rules, self.units)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Returns the width of a row of the block table: many KV heads may need more blocks than there are for tokens."""
        return max(int(super().max_num_blocks_per_req(vllm_config, max_len)), self.blocks.held(max_len))

    @property
    def prefix_cacheable(self) -> bool:
        """Returns False: who is selected changes from token to token, in the same block."""
        return False

    @property
    def uses_slot_mapping(self) -> bool:
        """Returns False: no token lies where its position says."""
        return False


class ClassManager(SingleTypeKVCacheManager):
    """The blocks of a class: sinks and the widest window of its heads stay, what lies between is freed."""

    def __init__(self, kv_cache_spec: ClassSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._rule = freed_blocks(kv_cache_spec.rules)
        self._in_flight = kv_cache_spec.in_flight
        self._done: dict[str, tuple[int, int]] = {}

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Returns how many blocks a request needs; for admission, the most that it holds while `num_tokens` are computed."""
        if not apply_admission_cap:
            needed: int = super().get_num_blocks_to_allocate(
                request_id, num_tokens, new_computed_blocks, *args, **kwargs
            )
            return needed
        held = [*new_computed_blocks, *self.req_to_blocks.get(request_id, ())]
        there = sum(block.ref_cnt > 0 and not block.is_null for block in held)
        return max(self._rule.most_held(num_tokens, self._in_flight) - int(there), 0)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Frees what no query after the first `processed_computed_tokens` sees; null blocks take the places."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks or processed_computed_tokens <= 0:
            return
        now = self._rule.at(processed_computed_tokens + 1)
        front, gap_end = self._done.get(request_id, (0, 0))
        if (now.front, now.gap_end) == (front, gap_end):
            return
        self._done[request_id] = now.front, now.gap_end
        gone = [*range(front, now.front), *range(max(now.gap, gap_end), now.gap_end)]
        freed = [index for index in gone if index < len(blocks) and not blocks[index].is_null]
        if freed:
            self._free(request_id, freed)

    def _free(self, request_id: str, indices: Sequence[int]) -> None:
        blocks = self.req_to_blocks[request_id]
        freed = [blocks[index] for index in indices]
        for index in indices:
            blocks[index] = self.block_pool.null_block
        self.block_pool.free_blocks(reversed(freed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Returns the blocks of a request that ends, or is preempted."""
        self._done.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: ClassSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Returns the longest prefix whose sinks and window are cached, null blocks in the places of what lies between."""
        groups = range(len(kv_cache_group_ids))
        block_hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, BLOCK)
        most = min(max_length // BLOCK, len(block_hashes))
        cached = [block_pool.get_cached_block(block_hashes[index], kv_cache_group_ids) for index in range(most)]
        missing = [0]
        for found in cached:
            missing.append(missing[-1] + (not found))
        for blocks in range(most, 0, -1):
            if blocks * BLOCK % alignment_tokens:
                continue
            freed = freed_blocks(kv_cache_spec.rules).at(blocks * BLOCK + 1)
            front, gap, gap_end = (min(bound, blocks) for bound in freed)
            if missing[max(gap, front)] - missing[front] or missing[blocks] - missing[max(gap_end, front)]:
                continue
            null = block_pool.null_block
            rows = [
                [null if freed.holds(index) else cached[index][group] for index in range(blocks)] for group in groups
            ]
            return tuple(rows), blocks * BLOCK
        return tuple([] for _ in groups), 0


class SelectedManager(SingleTypeKVCacheManager):
    """The blocks of a class of selected tokens: as many as there are places, until the request ends."""

    def __init__(self, kv_cache_spec: SelectedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._blocks = kv_cache_spec.blocks

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any) -> int:
        """Returns how many blocks a request of so many tokens lacks."""
        return max(self._blocks.held(num_tokens) - len(self.req_to_blocks.get(request_id, ())), 0)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Gives a request of so many tokens the blocks that it lacks, and returns them."""
        found: list[KVCacheBlock] = self.block_pool.get_new_blocks(
            self.get_num_blocks_to_allocate(request_id, num_tokens)
        )
        self.req_to_blocks[request_id].extend(found)
        if self.records_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in found)
        return found

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: BlockHashList, max_length: int, kv_cache_group_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Returns nothing: selected tokens are in no prefix cache."""
        return tuple([] for _ in kv_cache_group_ids), 0


def register() -> None:
    """Tells vLLM which managers classes have."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # or it takes what is registered here for all that there is
    KVCacheSpecRegistry.register(ClassSpec, ClassManager, uniform_type_base_spec=ClassSpec)
    KVCacheSpecRegistry.register(SelectedSpec, SelectedManager, uniform_type_base_spec=SelectedSpec)
