"""What is asked for, and whether it fits; what cannot be asked for is in the table of refusals, `tests/cli`."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from moacompress.bench.bench_request import BenchRequest, Cell, check_fits, largest_cell
from moacompress.core.errors import MoaCompressError, UsageError
from moacompress.rules.plan import Plan

REQUEST = BenchRequest((256,), (1,), ("float32",))


def test_cells_of_one_dtype_are_together(compressed):
    request = replace(REQUEST, lengths=(1, 2), batches=(3, 4), dtypes=("float32", "bfloat16"))
    cells = list(request.cells())
    assert cells[0] == Cell("float32", 1, 3)
    assert [cell.dtype for cell in cells] == ["float32"] * 4 + ["bfloat16"] * 4
    plan = Plan.load(compressed / "model" / "plan.json")
    assert replace(REQUEST, dtypes=("auto", "float32")).resolved(plan.model).dtypes == ("float32",)
    with pytest.raises(UsageError, match="no length given"):
        replace(REQUEST, lengths=())


def test_what_does_not_fit(compressed):
    folder = compressed / "model"
    plan = Plan.load(folder / "plan.json")
    check_fits(replace(REQUEST, lengths=(4096,)), plan, folder, 10**12)
    check_fits(REQUEST, plan, folder, 2**40)
    large = replace(REQUEST, batches=(1, 100_000), dtypes=("bfloat16", "float32"))
    with pytest.raises(MoaCompressError) as caught:
        check_fits(large, plan, folder, 2**30)
    # a cache for each of full span, the best dense and, twice, dense; 256 + 16 steps + 2 are 18 blocks
    dense = plan.model.dense_kv_bytes(274, 100_000) / 2**30
    assert str(caught.value).startswith("100000 x 256 tokens, float32 would take about ")
    assert "1.0 GiB is available; choose shorter --lengths, smaller --batch, or fewer --sides" in str(caught.value)
    assert 4 * dense < float(str(caught.value).split("about ")[1].split(" GiB")[0]) < 6 * dense + 4
    with pytest.raises(MoaCompressError, match="would take about"):
        check_fits(replace(large, sides=("plan",)), plan, folder, 2**30)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_weights_in_blocks_take_the_bytes_that_they_have(compressed, tmp_path, dtype, size):
    plan = Plan.load(compressed / "model" / "plan.json")
    shutil.copyfile(compressed / "model" / "config.json", tmp_path / "config.json")
    request = replace(REQUEST, dtypes=(dtype,), prefill_repeats=0, peak=False)
    found = []
    for blocks in (0, 1000):
        weights = {"part.weight": torch.zeros(blocks, 18, dtype=torch.uint8), "norm.weight": torch.ones(blocks, 3)}
        save_file(weights, tmp_path / "model.safetensors")
        found.append(largest_cell(request, plan, tmp_path)[0])
    assert found[1] - found[0] == 1000 * (18 + 3 * size)
