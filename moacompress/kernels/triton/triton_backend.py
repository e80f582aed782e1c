"""Triton as a backend: attention by its kernels without gradients, and by the reference with them."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from moacompress.kernels.arguments import CacheView, RingState, Scores, SelectedView, TransientTokens
from moacompress.kernels.backend import refuse_gradients
from moacompress.kernels.bound import BoundRing
from moacompress.kernels.capabilities import Capabilities, Status
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton import toolchain
from moacompress.kernels.triton.work_lists import kinds_of
from moacompress.rules.rule_table import RuleTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = "TRITON_INTERPRET"


class TritonBackend(ReferenceBackend):
    """Triton on a GPU, for float32, bfloat16 and float16; and on the CPU where its interpreter is asked for.

    Triton launches kernels on the current GPU, so its tensors' GPU is that meanwhile: layers may lie on several.
    """

    name = "triton"
    known = f"float32, bfloat16 and float16 on CUDA, and on the CPU where {INTERPRET}=1"
    capabilities = Capabilities(prefill_gradients=True, decode_selecting=True, ring=True)

    def status(self) -> Status:
        """See `Backend`."""
        if not (_interpreted() or torch.cuda.is_available()):
            return Status(False, "there is no CUDA device")
        problem = toolchain.import_problem() or (None if _interpreted() else toolchain.build_problem())
        if problem is not None:
            return Status(False, problem)
        if _interpreted():
            return Status(True, f"{INTERPRET} is set: Triton's interpreter runs its kernels, slowly", "interpreter")
        return Status(True, "Triton and a GPU are there", torch.cuda.get_device_name())

    def supports(self, device: str, dtype: torch.dtype) -> bool:
        """Whether tensors are where kernels can run, in one of the dtypes."""
        return dtype in DTYPES and device == ("cpu" if _interpreted() else "cuda")

    def decode(
        self,
        query: torch.Tensor,
        *,
        cache: CacheView,
        lengths: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.decode`.

        Raises:
            UnsupportedError: the query needs gradients; a visible block is not in the table; a format is not known.
        """
        refuse_gradients(query)
        from moacompress.kernels.triton.decode import attend_step

        in_numpy = RuleTable(rules.columns.cpu().numpy())
        with torch.cuda.device_of(query):
            return attend_step(query, cache, lengths.numpy(), in_numpy, scores, wide=_is_wide(query.dtype))

    def decode_selecting(
        self,
        query: torch.Tensor,
        *,
        cache: CacheView,
        selected: SelectedView,
        lengths: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
    ) -> torch.Tensor:
        """See `Backend.decode_selecting`; attention is as of `decode`, and one more launch for a pair of formats selects.

        Raises:
            UnsupportedError: as of `decode`, of selected tokens too.
        """
        refuse_gradients(query)
        from moacompress.kernels.triton import cache_writes
        from moacompress.kernels.triton.decode import attend_step

        in_numpy, numbers = RuleTable(rules.columns.cpu().numpy()), lengths.numpy()
        counts = in_numpy.selected(numbers)
        kept = CacheView(cache.keys, cache.values, selected.table, cache.value_dim), counts
        with torch.cuda.device_of(query):
            out, _ = attend_step(query, cache, numbers, in_numpy, scores, wide=_is_wide(query.dtype), selected=kept)
            kinds = kinds_of(in_numpy, query.shape[-1], cache.size_of_values, query.dtype)
            cache_writes.select_next(kinds.of_head, cache, selected, numbers, in_numpy)
        return out

    def bind_ring(
        self, ring: RingState, *, rules: RuleTable, kv_dims: tuple[int, int], dtype: torch.dtype
    ) -> BoundRing:
        """See `Backend.bind_ring`."""
        from moacompress.kernels.triton.ring_steps import RingSteps

        return RingSteps(ring, rules, *kv_dims, dtype, wide=_is_wide(dtype))

    def append(
        self,
        kv_parts: tuple[KVPart | None, KVPart],
        key: torch.Tensor | None,
        value: torch.Tensor,
        *,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        sources: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """See `Backend.append`; in one launch.

        Raises:
            UnsupportedError: a block is not in the pool in these formats.
        """
        if not len(slots):
            return
        from moacompress.kernels.triton import cache_writes

        with torch.cuda.device_of(value):
            cache_writes.append(kv_parts, key, value, keys, values, (sources.numpy(), slots.numpy()))

    def move_selected(
        self,
        kv_parts: Sequence[tuple[KVPart, KVPart]],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        scores: Sequence[torch.Tensor],
        *,
        heads: torch.Tensor,
        slots: torch.Tensor,
        to: torch.Tensor,
    ) -> None:
        """See `Backend.move_selected`; in one launch for every pair of formats.

        Raises:
            UnsupportedError: a block is not in the pool in its formats.
        """
        from moacompress.kernels.triton import cache_writes

        with torch.cuda.device_of(values[0]):
            cache_writes.move(kv_parts, (keys, values, scores), heads.numpy(), slots.numpy(), to.numpy())

    def prefill(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        cache: CacheView,
        past: torch.Tensor,
        valid: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
        with_lse: bool = False,
        transient: TransientTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.prefill`; the reference computes it where gradients are needed.

        Raises:
            UnsupportedError: a visible block is not in the table; a format is not known.
        """
        asked = [query, key, value] + ([] if scores.sink_logits is None else [scores.sink_logits])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in asked):
            return super().prefill(
                query,
                key,
                value,
                cache=cache,
                past=past,
                valid=valid,
                rules=rules,
                scores=scores,
                with_lse=with_lse,
                transient=transient,
            )
        from moacompress.kernels.triton.prefill import attend_chunk

        with torch.cuda.device_of(query):
            return attend_chunk(
                query,
                key,
                value,
                cache=cache,
                past=past,
                valid=valid,
                rules=RuleTable(rules.columns.cpu().numpy()),
                scores=scores,
                transient=transient,
                wide=_is_wide(query.dtype),
            )


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether products are in float32: the interpreter does not know those of bfloat16."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _interpreted())


def _interpreted() -> bool:
    return os.environ.get(INTERPRET, "").lower() in {"1", "true", "on", "yes"}
