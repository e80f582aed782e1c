"""What each rank of `test_tensor_parallel.py` does: `torchrun ... ranks_of_tensor_parallelism.py FOLDER`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

from moacompress.core.errors import MoaCompressError
from moacompress.rules.plan import Plan
from moacompress.runtime import attach, detach, generate_on_device
from moacompress.runtime.compat.alternates import returned_cache
from moacompress.runtime.hf.attaching import attached_plan


def split(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_plan="auto"))


def said(folder: Path, plan: Plan | None = None) -> str:
    """Returns what is said where a model cannot run under its plan."""
    try:
        model = split(folder)
        if plan is not None:
            attach(model, plan)
    except MoaCompressError as error:
        return str(error)
    return ""


def of_kind(folder: Path, kind: str, source: str = "dense") -> dict[str, Any]:
    torch.manual_seed(0)
    ids = torch.randint(3, 150, (2, 50))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = split(folder / kind)
    with torch.no_grad():
        logits, whole = (
            each(ids, attention_mask=mask).logits
            for each in (model, AutoModelForCausalLM.from_pretrained(folder / kind))
        )
        cache = returned_cache(model(ids[:, :40], use_cache=True))
    apart = (logits - whole).abs()[mask.bool()].max()
    tokens = model.generate(ids, **asked)
    plan = attached_plan(model)
    assert plan is not None
    model.save_pretrained(folder / f"{kind} again")
    attached = attach(split(folder / source), plan)
    again = attached.generate(ids, **asked)
    found = {
        "apart": float(apart / whole.abs().max()),
        "tokens": tokens.tolist(),
        "again": again.tolist(),
        "on device": generate_on_device(attached, ids, mask, max_new_tokens=6).tolist(),
        "bytes": cache.kv_bytes(),
        "key": plan.key(),
    }
    model = detach(attached)
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(folder / source)(ids).logits
        found["dense"] = float((model(ids).logits - dense).abs().max() / dense.abs().max())
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    found = {kind: of_kind(folder, kind) for kind in ("windows", "formats", "gates", "centres")}
    found["fused"] = of_kind(folder, "fused", "dense phi3")
    found["refusals"] = {
        "uneven": said(folder / "uneven"),
        "shared": said(folder / "dense", Plan.load(folder / "shared.json")),
    }
    (folder / f"rank {dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


main()
