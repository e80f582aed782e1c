"""Triton as a backend: decode steps by its kernels, and prompts by the reference."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import numpy as np
import torch

from moacompress.core.errors import UnsupportedError
from moacompress.kernels.arguments import CacheView, Scores
from moacompress.kernels.backend import Capabilities, Status, refuse_gradients
from moacompress.kernels.kv_parts import KVPart
from moacompress.kernels.reference.codes import rotated
from moacompress.kernels.reference.reference_backend import ReferenceBackend
from moacompress.kernels.triton.tile_sizes import APPEND_WARPS, append_constants, padded, split_constants
from moacompress.kernels.triton.work_lists import block_places, first_of, lie_in, work_lists
from moacompress.rules.rule_table import RuleTable
from moacompress.rules.windows import BLOCK

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRET = "TRITON_INTERPRET"
PARTS = 16
"""Results of parts that are added up at once."""


class TritonBackend(ReferenceBackend):
    """Triton on a GPU, for float32, bfloat16 and float16; and on the CPU where its interpreter is asked for."""

    name = "triton"
    known = f"float32, bfloat16 and float16 on CUDA, and on the CPU where {INTERPRET}=1"
    capabilities = Capabilities(prefill_gradients=True)

    def status(self) -> Status:
        """See `Backend`."""
        if importlib.util.find_spec("triton") is None:
            return Status(False, "Triton is not installed: pip install triton")
        if _interpreted():
            return Status(True, f"{INTERPRET} is set: Triton's interpreter runs its kernels, slowly", "interpreter")
        if not torch.cuda.is_available():
            return Status(False, "there is no CUDA device")
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
        from moacompress.kernels.triton import decode_kernels

        rows, heads, head_dim = query.shape
        kv_heads, width = cache.table.shape[1:]
        value_dim = cache.size_of_values
        group, device = heads // kv_heads, query.device
        wide = query.dtype == torch.float32 or _interpreted()
        in_numpy = RuleTable(rules.columns.cpu().numpy())
        plan = work_lists(cache, lengths.numpy(), in_numpy, query.dtype, head_dim, value_dim)
        coded = in_numpy.format_codes != 0
        rotates = bool(coded[1].any())
        out = query.new_empty(rows, heads, value_dim, dtype=torch.float32 if rotates else query.dtype)
        lse = query.new_empty(rows, heads, dtype=torch.float32)
        if not rows:
            return out.to(query.dtype), lse
        numbers = (cache.table.numpy(), lengths.numpy(), in_numpy.columns, plan.begins)
        table, row_lengths, columns, begins, *works = _sent((*numbers, *(each.work for each in plan.launches)), device)
        partial = out.new_empty(int(plan.begins[-1]), group, value_dim, dtype=torch.float32)
        partial_lse = partial.new_empty(partial.shape[:2])
        plain = query.contiguous()
        turned = rotated(plain).to(query.dtype) if coded[0].any() else plain
        for launch, work in zip(plan.launches, works, strict=True):
            if not len(launch.work):
                continue
            key, value = launch.kv_parts
            tiles, constants = split_constants(
                group,
                head_dim,
                value_dim,
                (key.bits, value.bits),
                softcap=bool(scores.softcap),
                wide=wide,
                item_size=query.element_size(),
            )
            keys, values = first_of(cache.keys, key), first_of(cache.values, value)
            decode_kernels.split[(len(launch.work),)](
                turned if key.bits else plain,
                keys,
                values,
                block_places(cache.keys, keys),
                block_places(cache.values, values),
                table,
                row_lengths,
                columns,
                work,
                partial,
                partial_lse,
                float(scores.scaling),
                float(scores.softcap),
                kv_heads,
                width,
                launch.chunk,
                **constants,
                num_warps=tiles.num_warps,
            )
        decode_kernels.merge[(rows * heads,)](
            partial,
            partial_lse,
            lse if scores.sink_logits is None else scores.sink_logits.contiguous(),
            begins,
            out,
            lse,
            kv_heads,
            G=group,
            VALUE_DIM=value_dim,
            VALUE=padded(value_dim),
            LOGITS=scores.sink_logits is not None,
            PARTS=PARTS,
        )
        if rotates:
            back = torch.from_numpy(coded[1].repeat(group)).to(device)[None, :, None]
            out = torch.where(back, rotated(out), out).to(query.dtype)
        return out, lse

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
        from moacompress.kernels.triton import append_kernels

        _, kv_heads, columns, _ = value.shape
        ids, vectors, memory = slots.numpy() // BLOCK, [], []
        for kv_part, given, segments in zip(kv_parts, (key, value), (keys, values), strict=True):
            if kv_part is None or given is None:
                continue
            if not lie_in(segments, kv_part, ids).all():
                raise UnsupportedError("a block that is written to is not in the pool in its formats")
            part = given.detach() if kv_part.bits else given.detach().to(kv_part.dtype)
            vectors.append(part if part.stride(-1) == 1 else part.contiguous())
            base = first_of(segments, kv_part)
            memory.append((base, block_places(segments, base)))
        (work,) = _sent((np.stack((sources.numpy(), slots.numpy())),), value.device)
        # without keys the values stand for them, and are not read
        append_kernels.append[(len(slots),)](
            vectors[0],
            vectors[-1],
            memory[0][0],
            memory[-1][0],
            memory[0][1],
            memory[-1][1],
            work,
            len(slots),
            kv_heads,
            columns,
            *vectors[0].stride()[:3],
            *vectors[-1].stride()[:3],
            **append_constants(*kv_parts),
            num_warps=APPEND_WARPS,
            enable_fp_fusion=False,
        )


def _interpreted() -> bool:
    return os.environ.get(INTERPRET, "").lower() in {"1", "true", "on", "yes"}


def _sent(arrays: tuple[np.ndarray, ...], device: torch.device) -> list[torch.Tensor]:
    """Returns integers on a device, int64 of the arrays' shapes; they go there together."""
    together = torch.from_numpy(np.concatenate([each.ravel().astype(np.int64) for each in arrays])).to(device)
    parts = together.split([each.size for each in arrays])
    return [part.view(each.shape) for part, each in zip(parts, arrays, strict=True)]
