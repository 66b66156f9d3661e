"""The one tolerance table, and the comparisons every numerical test uses."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
HALVES = [torch.float16, torch.bfloat16]
# Fused kernels have tiles for half precision only; the interpreter takes any. With the variable
# set, interpreted tests choose dtypes and sizes as on a GPU.
AS_ON_A_GPU = DEVICE == "cuda" or "DA_TRITON_AS_ON_A_GPU" in os.environ

# Relative RMS against the definition in float64. Averages over many positions hide errors from an
# element-wise tolerance; a root mean square relative to the true answer does not forgive them.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


# Below this, errors are those of single roundings and of the order of sums. Eager's own falls under
# it where it keeps P in memory: its roundings then cancel in dP − Σ P∘dP, which no recomputation
# can have.
ROUNDING = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3}


def route_dtype(route):
    """float32; in half precision on a GPU where a step of the route is fused."""
    fused = "fused" in (route.gather, route.distribute, route.backward)
    return torch.bfloat16 if fused and AS_ON_A_GPU else torch.float32


def relative_rms(actual, expected):
    """‖actual − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check(actual, expected, dtype, eager=None, what="", slack=1):
    """Asserts the tolerance of ``dtype``, and at most twice the error of ``eager``.

    ``expected``: the definition in float64. ``eager``: the definition run in ``dtype``. ``slack``:
    factor on the tolerance, for code that rounds every intermediate as eager does.
    """
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert not actual.isnan().any(), f"{what}: NaN"
    if not expected.any():
        largest = actual.abs().max().item()  # rounding of terms of order 100 that cancel
        assert largest <= 100 * TOLERANCE[dtype], f"{what}: {largest:.1e} instead of zero"
        return 0.0
    error = relative_rms(actual, expected)
    assert error <= slack * TOLERANCE[dtype], f"{what}: relative RMS {error:.2e}"
    if eager is not None and dtype != torch.float64:
        allowed = 2 * relative_rms(eager, expected)
        assert error <= max(allowed, ROUNDING[dtype]), (
            f"{what}: relative RMS {error:.2e}, eager's own {allowed / 2:.2e}"
        )
    return error


def blockwise(actual, expected, size=64):
    """The largest relative error of any ``size`` × ``size`` block of the last two axes.

    ``relative_rms`` does not see a tile with a wrong corner. A block's error is relative to its own
    norm, but at least to a tenth of the average block's: where terms cancel, the error is that of
    the terms.
    """
    expected = expected.double()
    squares = (actual.double() - expected).square(), expected.square(), torch.ones_like(expected)
    wrong, right, count = (_block_sums(x, size) for x in squares)
    usual = right.sum() / count.sum() * count
    return (wrong / right.maximum(usual / 100)).max().sqrt().item()


def _block_sums(x, size):
    x = x[None] if x.dim() == 1 else x
    height, width = x.shape[-2:]
    x = torch.nn.functional.pad(x, (0, -width % size, 0, -height % size))
    return x.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-3, -1))


def check_blocks(actual, expected, dtype, eager, what="", tolerance=None):
    """Like ``check`` for the worst block: at most twice the tolerance, or twice eager's error."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert not actual.isnan().any(), f"{what}: NaN"
    if not expected.any():
        return check(actual, expected, dtype, what=what)
    error = blockwise(actual, expected)
    allowed = 2 * max(tolerance or TOLERANCE[dtype], blockwise(eager, expected))
    assert error <= allowed, f"{what}: a block is off by {error:.2e}, allowed {allowed:.2e}"
    return error


def peaky(*shape, dtype, deviation=3.0, channels_last=False):
    """Random activations, rounded to ``dtype``; logits of deviation ≥ 2 give a softmax a few peaks.

    ``channels_last``: axes (N, heads, channels, positions) in memory as (N, positions, heads,
    channels).
    """
    x = (deviation * torch.randn(shape, dtype=torch.float64)).to(dtype=dtype, device=DEVICE)
    if channels_last:
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    return x
