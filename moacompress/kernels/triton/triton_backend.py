"""Triton as a backend: all attention by its kernels; gradients of what is cached or selected are the reference's."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch

from moacompress.kernels.arguments import CacheView, Choices, Passing, RingState, Scores, SelectedView, as_tensors
from moacompress.kernels.backend import refuse_gradients
from moacompress.kernels.bound import BoundRing
from moacompress.kernels.capabilities import Capabilities, Status
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.reference.rounding import as_kept
from moacompress.kernels.triton import toolchain
from moacompress.kernels.triton.work_lists import kinds_of
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = "TRITON_INTERPRET"


class TritonBackend(ReferenceBackend):
    """Triton on a GPU, for float32, bfloat16 and float16; and on the CPU where its interpreter is asked for.

    Triton launches kernels on the current GPU, so its tensors' GPU is that meanwhile: layers may lie on several.
    """

    name = "triton"
    known = f"float32, bfloat16 and float16 on CUDA, and on the CPU where {INTERPRET}=1"
    capabilities = Capabilities(prefill_gradients=True, decode_selecting=True, ring=True, profile_sums=True)

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
        passing: Passing | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.prefill`; gradients of rows with a past, or with selected tokens, are the reference's.

        Raises:
            UnsupportedError: a visible block is not in the table; a format is not known.
        """
        asked = [query, key, value] + ([] if scores.sink_logits is None else [scores.sink_logits])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in asked):
            if passing is not None or bool(past.any()):
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
                    passing=passing,
                )
            return self._with_gradients(query, key, value, valid, rules, scores)
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
                passing=passing,
                wide=_is_wide(query.dtype),
            )

    def _with_gradients(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: torch.Tensor,
        rules: RuleTable,
        scores: Scores,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns attention of rows without a past; codes are rounded to before it, so that gradients pass straight through."""
        from moacompress.kernels.triton.gradients import attend_whole

        in_numpy = RuleTable(rules.columns.cpu().numpy())
        kinds_of(in_numpy, query.shape[3], value.shape[3], query.dtype)  # refuses what is not known
        dtype = query.dtype
        codes = in_numpy.format_codes
        if codes.any():
            query, key, value = as_kept(query, key, value, (codes[0].tolist(), codes[1].tolist()))
        rules = RuleTable(torch.from_numpy(in_numpy.native().columns))

        def again(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: torch.Tensor | None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = super(TritonBackend, self).prefill(
                query,
                key,
                value,
                cache=CacheView.empty(key),
                past=torch.zeros_like(valid),
                valid=valid,
                rules=rules,
                scores=scores._replace(sink_logits=logits),
                with_lse=True,
            )
            assert lse is not None
            return out, lse

        wide, native = _is_wide(query.dtype), RuleTable(rules.columns.numpy())
        with torch.cuda.device_of(query):
            out, lse = attend_whole(query, key, value, valid=valid, rules=native, scores=scores, wide=wide, again=again)
        return out.to(dtype), lse

    def profile_sums(
        self,
        dout: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        rules: RuleTable,
        scores: Scores,
        choices: Choices | None = None,
    ) -> torch.Tensor:
        """See `Backend.profile_sums`; one pass over keys and values, after a forward pass for the denominators.

        Where rules select it is two.
        """
        from moacompress.kernels.triton.profile import rule_sums

        native = int(rules.span.native_window[0])
        full = as_tensors(RuleTable.of([Rule.FULL] * key.shape[1], 1).in_layer(native))
        tokens = torch.full((1,), query.shape[2], dtype=torch.int64, device="cpu")
        query, key, value = query.detach(), key.detach(), value.detach()
        out, lse = self.prefill(
            query,
            key,
            value,
            cache=CacheView.empty(key),
            past=torch.zeros_like(tokens),
            valid=tokens,
            rules=full,
            scores=scores,
            with_lse=True,
        )
        assert lse is not None
        in_numpy = RuleTable(np.asarray(rules.columns))
        with torch.cuda.device_of(query):
            return rule_sums(dout, query, key, value, (out, lse), in_numpy, scores, choices, wide=_is_wide(query.dtype))


def _is_wide(dtype: torch.dtype) -> bool:
    """Whether products are in float32: the interpreter does not know those of bfloat16."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and _interpreted())


def _interpreted() -> bool:
    return os.environ.get(INTERPRET, "").lower() in {"1", "true", "on", "yes"}
