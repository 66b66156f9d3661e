"""The ``torch`` backend: means over millions of positions, logits that overflow half precision."""

import io

import numpy as np
import pytest
import torch

import da_triton
from da_triton.ops.aten import core as aten
from da_triton.precision import POLICIES
from support.cases import ORDERS
from support.numerics import DEVICE, HALVES, TOLERANCE, check, relative_rms

LONG = 3_000_001  # its inverse is subnormal in float16, and not a power of two
NARROW = [torch.float32, *HALVES]
each_dtype = pytest.mark.parametrize("dtype", NARROW, ids=str)


def features(channels, length, dtype):
    """Almost the same everywhere: nothing cancels, and every rounding goes the same way."""
    rise = torch.linspace(-0.1, 0.1, length, device=DEVICE)
    factors = 1 - torch.arange(channels, device=DEVICE)[:, None] / 8
    return (0.7 + factors * rise)[None].to(dtype)


def in_double(function, tensors, **options):
    wide = [x if x.dtype == torch.bool else x.double() for x in tensors]
    return function(*wide, backend="eager", **options)


@pytest.mark.parametrize("masked", [False, True])
@each_dtype
def test_gather_of_equal_features_and_logits(dtype, masked):
    a, b = torch.full((1, 2, LONG), 0.7), torch.zeros(1, 2, LONG)
    a, b = (x.to(device=DEVICE, dtype=dtype) for x in (a, b))
    mask = torch.arange(LONG, device=DEVICE)[None] % 7 > 0 if masked else None
    g = da_triton.gather(a, b, mask=mask, heads=2, backend="torch")
    assert g.dtype == dtype
    check(g, a[..., :1].double().expand(-1, -1, 1)[..., None], dtype)


@each_dtype
def test_core_with_every_option(dtype):
    a, b, v = (features(c, LONG, dtype) for c in (4, 2, 2))
    mask = torch.arange(LONG, device=DEVICE)[None] % 5 > 0
    # Their logits give the tokens the weight of a million positions.
    extra = [torch.full((1, c, 3), x, device=DEVICE, dtype=dtype) for c, x in ((4, -1.0), (2, 24))]
    options = {"heads": 2, "logit_scale": 0.6, "logit_scale_v": 0.7, "scale": 1.3, "mask": mask}
    for softmax in (True, False):
        given = {**options, "softmax_v": softmax}
        z = da_triton.double_attention(a, b, v, extra=extra, backend="torch", **given)
        wide = [x.double() for x in extra]
        expected = in_double(da_triton.double_attention, (a, b, v), extra=wide, **given)
        check(z, expected, dtype, slack=1 if dtype == torch.float16 else 2)


@each_dtype
def test_gradients_of_a_sum_over_all_positions(dtype):
    """dG is the sum of three million numbers and overflows float16; dA, dB and dV do not."""
    activations = [features(c, LONG, dtype) for c in (3, 2, 2)]

    def run(activations, backend):
        leaves = [x.detach().requires_grad_() for x in activations]
        z = da_triton.double_attention(*leaves, backend=backend)
        return torch.autograd.grad(z, leaves, torch.ones_like(z))

    found, expected = run(activations, "torch"), run([x.double() for x in activations], "eager")
    check(found[0], expected[0], dtype, what="dA")
    # dB is a small difference of two terms, one of them rounded by bfloat16 products, as in eager.
    check(found[1], expected[1], dtype, what="dB", slack=4 if dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ORDERS)
@each_dtype
def test_block(dtype, order, masked):
    x = features(3, 1_000_001, dtype)
    shapes = ((2, 3), 2, (2, 3), (2, 3), 2, (3, 2), 3)
    wa, ba, wb, wv, bv, wo, bo = (torch.randn(s, device=DEVICE).to(dtype) for s in shapes)
    mask = torch.arange(x.shape[-1], device=DEVICE)[None] % 5 > 0 if masked else None
    given = [wa, ba, wb, wv, bv, wo, bo]

    def run(x, given, backend, **options):
        wa, ba, wb, wv, bv, wo, bo = given
        leaves = [z.detach().requires_grad_() for z in (x, wa, wo)]
        leaf, wa, wo = leaves
        y = da_triton.double_attention_block(
            leaf, wa, ba, wb, None, wv, bv, wo, bo, mask=mask, backend=backend, **options
        )
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    expected = run(x.double(), [w.double() for w in given], "eager")
    found = run(x, given, "torch", order=order)
    check(found[0], expected[0], dtype, what="out", slack=2)
    check(found[1], expected[1], dtype, what="dx", slack=2)
    if dtype == torch.float32:  # those of Wb and Wv are small differences
        check(found[2], expected[2], dtype, what="dWa", slack=2)
        check(found[3], expected[3], dtype, what="dWo", slack=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_part_of_a_stream(dtype):
    a, b = features(2, LONG, dtype), torch.zeros(1, 2, LONG, device=DEVICE, dtype=dtype)
    g, _, total = da_triton.functional.gather_partial(a, b, backend="torch")
    assert g.dtype == torch.float32
    check(g, in_double(da_triton.gather, (a, b)), torch.float32)
    assert total.tolist() == [[[LONG, LONG]]]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("length", [20, 20_001])
def test_logits_are_scaled_in_float32(dtype, length):
    """Twice 4·10⁴ overflows float16; bfloat16 would round what a product with 0.3 gives."""
    if dtype == torch.float16:
        b, scale = torch.linspace(-4e4, 4e4, 2 * length).view(1, 2, length), 2.0
    else:
        b, scale = 100 * torch.randn(1, 2, length), 0.3
    a = torch.randn(1, 4, length)
    a, b = (x.to(device=DEVICE, dtype=dtype) for x in (a, b))
    leaves = [a.requires_grad_(), b.requires_grad_()]
    options = {"logit_scale": scale, "logit_scale_v": scale}
    z = da_triton.double_attention(a, b, b, backend="torch", **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = da_triton.double_attention(*wide, wide[1], backend="eager", **options)
    check(z, expected, dtype)
    check(da_triton.gather(*leaves, logit_scale=scale, backend="torch"),
          in_double(da_triton.gather, leaves, logit_scale=scale), dtype)  # fmt: skip
    assert all(x.isfinite().all() for x in torch.autograd.grad(z.sum(), leaves))


def test_float32_logits_are_not_scaled_in_place():
    a, b = torch.randn(1, 2, 9, device=DEVICE), torch.randn(1, 2, 9, device=DEVICE)
    before = b.clone()
    da_triton.double_attention(a, b, b, logit_scale=0.3, logit_scale_v=0.3, backend="torch")
    assert torch.equal(b, before)


def test_few_positions_of_half_precision_are_not_widened():
    """Products of float32 would cost more: weights of so few positions are normal numbers."""
    for dtype in HALVES:
        a = features(3, POLICIES[torch.float16].positions, dtype)[:, None]
        assert aten.gather(a, a).dtype == dtype
    a = features(3, POLICIES[torch.float16].positions + 1, torch.float16)[:, None]
    assert aten.gather(a, a).dtype == torch.float32


def test_an_exported_graph_of_any_length_is_right_for_many_positions():
    block = da_triton.DoubleAttention(3, 2, 2, backend="torch").to(DEVICE, torch.float16).eval()
    dynamic = ({2: torch.export.Dim("length", min=2)},)
    for strict in (False, True):
        program = torch.export.export(
            block, (features(3, 50, torch.float16),), dynamic_shapes=dynamic, strict=strict
        )
        for length in (50, LONG):
            x = features(3, length, torch.float16)
            with torch.no_grad():
                check(program.module()(x), _in_double(block, x), torch.float16, slack=2)


def test_a_traced_graph_is_right_for_many_positions():
    block = da_triton.DoubleAttention(3, 2, 2, backend="torch").to(DEVICE, torch.float16).eval()
    traced = torch.jit.trace(block, features(3, 50, torch.float16))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    x = features(3, LONG, torch.float16)
    with torch.no_grad():
        check(torch.jit.load(file)(x), _in_double(block, x), torch.float16, slack=2)


def _in_double(block, x):
    weights = [w.double() for w in (
        block.convA.weight, block.convA.bias, block.convB.weight, block.convB.bias,
        block.convV.weight, block.convV.bias, block.conv_reconstruct.weight,
        block.conv_reconstruct.bias,
    )]  # fmt: skip
    return da_triton.double_attention_block(x.double(), *weights, backend="eager")


def test_one_sum_over_all_positions_would_be_rejected():
    """Term by term, as some libraries' products add; which of them do depends on the processor."""
    a = torch.full((LONG,), 0.7)
    total = torch.from_numpy(np.add.accumulate((a * a).numpy()))[-1:]
    assert relative_rms(total, (a.double() @ a.double())[None]) > 100 * TOLERANCE[torch.float32]
