"""Sums over positions of products with X, and of rows: dtypes, layouts, tails, large tiles."""

import pytest
import torch

from da_triton.kernels import weight_gradients
from da_triton.precision import accumulator
from da_triton.runtime import guard, launch, stand_ins
from support import triton_internals
from support.numerics import DEVICE, check

SIZES = [(2, 40, 300, 49), (2, 160, 260, 100), (3, 20, 24, 96)]  # batch, rows, channels, positions


def random(shape, dtype, channels_last):
    batch, channels, length = shape
    if channels_last:
        return torch.randn(batch, length, channels, device=DEVICE).to(dtype).transpose(1, 2)
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_partials_add_up_to_the_products_and_to_the_sums(dtype, sizes, channels_last):
    torch.manual_seed(0)
    batch, rows, channels, length = sizes
    t = random((batch, rows, length), dtype, channels_last)
    x = random((batch, channels, length), dtype, channels_last)
    partials, sums = weight_gradients.outer_product(t, x)
    assert partials.dtype == sums.dtype == accumulator(dtype)
    tolerance = {"rtol": 0, "atol": 1e-11 if dtype == torch.float64 else 1e-4}
    products = torch.einsum("nrl,ncl->rc", t.double(), x.double())
    torch.testing.assert_close(partials.double().sum(0), products, **tolerance)
    torch.testing.assert_close(sums.double().sum(0), t.double().sum((0, 2)), **tolerance)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gradients_of_all_weights_with_large_and_with_small_tiles(dtype, heads, few, monkeypatch):
    """n of 19, and several samples: blocks of the products cross from one sample to the next."""
    monkeypatch.setattr(launch, "num_sms", lambda device: 132 if few else 1)
    torch.manual_seed(0)
    batch, channels, c_m, c_n, c_out, length = 5, 40, 36, 19, 70, 30
    rows = -(-heads * c_n // 16) * 16
    t, x = (random((batch, c, length), dtype, False) for c in (2 * rows, channels))
    acc = accumulator(dtype)
    shapes = (c_out, heads * c_n), (heads, c_m, c_n), (heads, c_m, c_n), (channels, heads * c_n)
    dh, g, dg, m = (torch.randn(batch, *shape, dtype=acc, device=DEVICE) for shape in shapes)
    like = torch.empty(0, dtype=dtype, device=DEVICE)
    with launch.forgetting():
        found = weight_gradients.weight_gradients(t, x, dh, g, dg, m, like, scale=1.3)
        again = weight_gradients.weight_gradients(t, x, dh, g, dg, m, like, scale=1.3)
    wide = (y.double() for y in (t, x, dh, g, dg, m, like))
    expected = stand_ins.weight_gradients(*wide, scale=1.3)
    for value, wanted, repeated in zip(found, expected, again, strict=True):
        check(value, wanted, dtype)
        assert torch.equal(value, repeated)


@pytest.mark.skipif(DEVICE == "cuda", reason="a table of its own")
@pytest.mark.parametrize("small", [False, True])
def test_tiles_of_the_products_are_small_where_large_ones_leave_sms_idle(small, monkeypatch):
    """A proof, though its few samples say nothing of it, takes those of its call."""
    monkeypatch.setattr(launch, "num_sms", lambda device: 13 if small else 12)  # of 12 tiles
    x, dh = torch.randn(1, 96, 9).bfloat16(), torch.randn(1, 70, 19)
    g = torch.randn(1, 1, 64, 19)
    assert guard.LAUNCHERS["weight_gradients"].choice(x=x, dh=dh, g=g) == small
    given = torch.randn(1, 38, 9).bfloat16(), x, dh, g, g, torch.randn(1, 96, 19), x
    sizes = []

    def launched(original, kernel, *args, **kwargs):
        sizes.append(kwargs.get("BLOCK_R"))
        return original(kernel, *args, **kwargs)

    with triton_internals.around(interpreted_launch=launched), launch.forgetting():
        weight_gradients.weight_gradients(*given, scale=1.0)
        launch.forget()
        with launch.trial(2, [], not small):
            weight_gradients.weight_gradients(*given, scale=1.0)
    assert sizes == [None, 16 if small else 32, None, 32 if small else 16]
