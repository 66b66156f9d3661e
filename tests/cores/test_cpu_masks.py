"""Masks on the CPU's own path: all samples together, and nothing of what is masked."""

import pytest
import torch

from da_triton import double_attention_block
from da_triton.cores import cpu_products
from support.numerics import check, peaky

ORDERS = ["AZ", "XZ", "AH", "XH"]
C, C_M, C_N = 16, 12, 12
FEW, MANY = (2, 2), (5, 9)  # Q Pᵀ (order AZ) makes Z of few positions, descriptors that of many
each_order = pytest.mark.parametrize("order", ORDERS)


@pytest.fixture(params=["together", "pieces"])
def way(request, monkeypatch):
    if request.param == "pieces":
        for name, value in {"FEW_POSITIONS": 1, "PIECE": 8 * C, "LEAST_POSITIONS": 1}.items():
            monkeypatch.setattr(cpu_products, name, value)


def arguments(positions, batch=3, dtype=torch.float32, channels_last=False):
    x = peaky(batch, 1, C, *positions, dtype=dtype, deviation=1)[:, 0]
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    shapes = ((C_M, C), (C_M,), (C_N, C), None, (C_N, C), (C_N,), (C, C_M), (C,))
    return [x, *(None if shape is None else torch.randn(shape, dtype=dtype) for shape in shapes)]


def run(given, **options):
    """The output and the gradients of x and the weights."""
    leaves = [None if z is None else z.detach().requires_grad_() for z in given]
    out = double_attention_block(*leaves, residual=True, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, [z for z in leaves if z is not None], upstream)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("positions", [FEW, MANY], ids=["few", "many"])
@each_order
def test_against_the_definition(order, positions, heads, channels_last, recompute, way):
    """Of three samples, one has no position left, and one has them all."""
    given = arguments(positions, channels_last=channels_last)
    mask = torch.rand(3, *positions) > 0.5
    mask[:, 0, 0] = True
    mask[1] = False
    mask[2] = True
    options = {"mask": mask, "heads": heads}
    found = run(given, order=order, recompute=recompute, backend="torch", **options)
    wide = [None if z is None else z.double() for z in given]
    own = run(given, backend="eager", **options)
    for i, expected in enumerate(run(wide, backend="eager", **options)):
        check(found[i], expected, torch.float32, own[i], f"{order} {i}")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("positions", [FEW, MANY], ids=["few", "many"])
@each_order
def test_what_is_masked_reaches_no_other_position(order, positions, value, way):
    given = arguments(positions)
    mask = torch.rand(3, *positions) > 0.5
    mask[:, 0, 0], mask[:, 1, 1] = True, False
    options = {"order": order, "mask": mask, "heads": 3, "backend": "torch"}
    expected = double_attention_block(*given, **options)
    given[0] = given[0].masked_fill(~mask[:, None], value)
    found = double_attention_block(*given, **options)
    kept = mask[:, None].expand_as(found)
    assert torch.equal(found[kept], expected[kept])


def operations(batch, order, masked):
    """How many ATen operations a training step takes. Watching them does not change the path."""
    given = arguments(MANY, batch)
    mask = torch.rand(batch, *MANY) > 0.5 if masked else None
    run(given, order=order, mask=mask, backend="torch")
    with torch.autograd.profiler.profile() as profile:
        run(given, order=order, mask=mask, backend="torch")
    return sum(event.name.startswith("aten::") for event in profile.function_events)


@each_order
def test_samples_share_operations(order):
    masked, plain = (operations(16, order, masked) for masked in (True, False))
    assert masked == operations(2, order, True)
    assert masked < 1.2 * plain
