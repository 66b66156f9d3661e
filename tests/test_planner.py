"""The choice of the association order, and the cost model it stands on."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import da_triton
from da_triton.checks import ORDERS
from da_triton.costs import order_cost
from da_triton.planner import choose_order, intervals, seconds
from support.numerics import DEVICE


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_operations_are_those_that_run(order, heads, backend):
    """PyTorch's own counter, which counts a multiply-add as two, over the block as it runs."""
    c, c_m, c_n, length, batch = 24, 12, 8, 30, 3
    x = torch.randn(batch, c, length, device=DEVICE)
    weights = [torch.randn(s, device=DEVICE) for s in ((c_m, c), (c_n, c), (c_n, c), (c, c_m))]
    w = [None] * 8
    w[::2] = weights
    with FlopCounterMode(display=False) as counter:
        da_triton.double_attention_block(x, *w, heads=heads, order=order, backend=backend)
    cost = order_cost(order, c, c_m, c_n, heads, length)
    counted = 2 * batch * (cost.multiply_adds + cost.small_multiply_adds)
    assert counter.get_total_flops() == counted


def test_costs_are_those_of_the_derivation():
    c, m, n, h, length = 24, 12, 8, 2, 30
    table = {
        "AZ": length * (c * m + 2 * c * n + 2 * m * n // h + m * c),
        "XZ": length * (3 * c * n + m * n // h + m * c) + m * c * n // h,
        "AH": length * (c * m + 2 * c * n + m * n // h + c * n) + c * m * n // h,
        "XH": length * 4 * c * n + 2 * m * c * n // h,
    }
    for order, expected in table.items():
        cost = order_cost(order, c, m, n, h, length)
        assert cost.multiply_adds + cost.small_multiply_adds == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("reconstruct", [True, False])
def test_the_cheapest_order_is_chosen(itemsize, reconstruct):
    """By brute force over shapes and lengths."""
    orders = ORDERS if reconstruct else ORDERS[:2]
    for c, m, n, heads, length in itertools.product(
        (64, 512), (32, 256), (16, 256), (1, 4), (1, 49, 196, 784, 6400, 10**6)
    ):
        times = {
            o: seconds(order_cost(o, c, m, n, heads, length, reconstruct), itemsize) for o in orders
        }
        chosen = choose_order(c, m, n, heads, length, itemsize, reconstruct)
        assert times[chosen] == pytest.approx(min(times.values()), rel=1e-9)


def test_intervals_cover_every_length_once():
    found = intervals(512, 256, 256, 1, 2, True)
    assert found[0][0] == 1
    assert found[-1][1] == float("inf")
    for (_, end, _), (start, _, _) in itertools.pairwise(found):
        assert end == start


def test_short_maps_take_the_papers_order_and_few_maps_the_fused_one():
    """The two ends that the derivation names: conv4 of a ResNet, and 19 maps for segmentation."""
    assert choose_order(1024, 512, 512, 1, 196, 2, True) == "AZ"
    assert choose_order(512, 512, 19, 1, 8192, 2, True) == "XH"
