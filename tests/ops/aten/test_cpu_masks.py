"""The public block on a CPU: masked positions hold anything, samples are computed together."""

import functools

import pytest
import torch
from torch.profiler import profile

from da_triton import double_attention_block
from da_triton.ops.aten import cpu_products
from support.cases import ORDERS
from support.compare import check_against_reference, step

C, C_M, C_N = 20, 12, 6
block, eager = (
    functools.partial(double_attention_block, backend=backend) for backend in ("torch", "eager")
)
WAYS = {
    "one tile": {},
    "samples apart": {"FEW_POSITIONS": 1},
    "tiles": {"FEW_POSITIONS": 1, "TILE": 12 * C, "LEAST_POSITIONS": 1},
}
SIZES = {"long": (5, 7), "short": (2, 2), "line": (35,), "video": (3, 3, 4)}


@pytest.fixture(autouse=True)
def _however_few_descriptors(monkeypatch):
    monkeypatch.setattr(cpu_products, "FEW_DESCRIPTORS", 0)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(cpu_products, name, value)


def inputs(positions, dtype=torch.float64, batch=4):
    """x, the weights, and a mask that leaves nothing of the second sample."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    weights = [normal(C_M, C), normal(C_M), normal(C_N, C), None, normal(C_N, C), normal(C_N),
               normal(C, C_M), normal(C)]  # fmt: skip
    mask = torch.rand(batch, *positions, generator=generator) > 0.4
    mask.flatten(1)[:, 0] = True
    mask[1] = False
    return normal(batch, C, *positions), weights, mask


def laid_out(x, channels_last):
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_step_matches_the_definition(order, heads, size, channels_last, recompute, way):
    x, weights, mask = inputs(SIZES[size])
    ours = functools.partial(block, order=order, recompute=recompute)
    given = laid_out(x, channels_last), *weights
    check_against_reference(ours, eager, given, heads=heads, mask=mask, residual=True)


@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_what_masked_positions_hold_changes_no_bit_elsewhere(
    order, heads, size, channels_last, held, way
):
    x, weights, mask = inputs(SIZES[size], torch.float32)
    wild = x.masked_fill(~mask[:, None], held)
    found = [
        block(laid_out(z, channels_last), *weights, heads=heads, mask=mask, order=order)
        .movedim(1, -1)[mask]
        for z in (x, wild)
    ]  # fmt: skip
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_large_numbers_at_masked_positions_leave_other_gradients_finite(order, way):
    x, weights, mask = inputs((5, 7), torch.float32)
    wild = x.masked_fill(~mask[:, None], 1e30)
    found = step(block, (wild, *weights), mask=mask, order=order, residual=True)
    assert all(found[name].isfinite().all() for name in found if name != "out")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("size", ["long", "short"])
@pytest.mark.parametrize("order", ORDERS)
def test_more_samples_take_no_more_operations(order, size, backward):
    def operations(batch):
        x, weights, mask = inputs(SIZES[size], torch.float32, batch)
        given, options = (x, *weights), {"mask": mask, "order": order, "residual": True}
        with profile() as recorded:
            step(block, given, **options) if backward else block(*given, **options)
        names = [e.name for e in recorded.events() if e.name.startswith("aten::")]
        return sorted(n for n in names if n not in ("aten::view", "aten::as_strided"))

    few = operations(2)
    assert few == operations(16)
    assert len(few) > 10
