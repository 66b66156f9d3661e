"""The public block on a CPU: masked positions hold anything, and samples share the work."""

import pytest
import torch
from torch.profiler import profile

from da_triton import double_attention_block
from da_triton.ops.aten import cpu_products
from support.cases import ORDERS
from support.numerics import check

C, C_M, C_N = 20, 12, 6
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


def step(x, weights, **options):
    """The output, and the gradients of x and of the weights."""
    given = [None if z is None else z.detach().requires_grad_() for z in (x, *weights)]
    out = double_attention_block(*given, residual=True, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    wanted = [z for z in given if z is not None]
    return out.detach(), *torch.autograd.grad(out, wanted, upstream)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_step_matches_the_definition(order, heads, size, channels_last, recompute, way):
    x, weights, mask = inputs(SIZES[size])
    x = laid_out(x, channels_last)
    options = {"heads": heads, "mask": mask}
    expected = step(x, weights, backend="eager", **options)
    actual = step(x, weights, backend="torch", order=order, recompute=recompute, **options)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        check(ours, theirs, torch.float64, what=f"result {i}")


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
        double_attention_block(
            laid_out(z, channels_last), *weights, heads=heads, mask=mask, order=order,
            backend="torch",
        ).movedim(1, -1)[mask]
        for z in (x, wild)
    ]  # fmt: skip
    assert torch.equal(*found)
    assert found[0].isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_large_numbers_at_masked_positions_leave_other_gradients_finite(order, way):
    x, weights, mask = inputs((5, 7), torch.float32)
    wild = x.masked_fill(~mask[:, None], 1e30)
    _, dx, *dw = step(wild, weights, mask=mask, order=order, backend="torch")
    assert dx.isfinite().all()
    assert all(z.isfinite().all() for z in dw)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("size", ["long", "short"])
@pytest.mark.parametrize("order", ORDERS)
def test_more_samples_take_no_more_operations(order, size, backward):
    def operations(batch):
        x, weights, mask = inputs(SIZES[size], torch.float32, batch)
        run = step if backward else double_attention_block
        with profile() as recorded:
            run(x, *([weights] if backward else weights), mask=mask, order=order, backend="torch")
        names = [e.name for e in recorded.events() if e.name.startswith("aten::")]
        return sorted(n for n in names if n not in ("aten::view", "aten::as_strided"))

    few = operations(2)
    assert few == operations(16)
    assert len(few) > 10
