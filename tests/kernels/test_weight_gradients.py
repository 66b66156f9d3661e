"""Sums over positions of products with X, and of rows: dtypes, layouts, tails, large tiles."""

import pytest
import torch

from da_triton.kernels import weight_gradients
from da_triton.precision import accumulator
from support.numerics import DEVICE

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
