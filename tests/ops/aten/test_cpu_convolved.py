"""The public block on several CPU threads: large products of small inputs are convolutions.

Constants of zero convolve every product, however small; convolutions need no second thread.
"""

import functools

import pytest
import torch

from da_triton import double_attention_block
from da_triton.ops.aten import cpu_small
from support.cases import ORDERS
from support.compare import check_against_reference, widened
from support.numerics import check

C, C_M, C_N = 20, 12, 8
NAMES = ("x", "weight_a", "bias_a", "weight_b", "weight_v", "bias_v", "weight_out", "bias_out")
eager = functools.partial(double_attention_block, backend="eager")


@pytest.fixture(autouse=True)
def _however_few_multiplications(monkeypatch):
    monkeypatch.setattr(cpu_small, "CONVOLVED_MULTIPLICATIONS", 0)
    monkeypatch.setattr(cpu_small, "NARROW", 0)
    monkeypatch.setattr(cpu_small, "FEW_COLUMNS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def convolved(monkeypatch):
    """Grows by one for each convolution."""
    made = []
    for original in (torch.conv2d, torch.conv_transpose2d):

        def convolve(*args, original=original):
            made.append(args)
            return original(*args)

        monkeypatch.setattr(torch, original.__name__, convolve)
    return made


def leaves(batch=1, size=6, channels_last=False, left_out=()):
    """x and the weights, as the block takes them."""
    sizes = (C_M, C), C_M, (C_N, C), (C_N, C), C_N, (C, C_M), C
    found = [torch.randn(batch, C, size, size), *(torch.randn(s) / 4 for s in sizes)]
    if channels_last:
        found[0] = found[0].contiguous(memory_format=torch.channels_last)
    found = [None if n in left_out else z for n, z in zip(NAMES, found, strict=True)]
    return [*found[:4], None, *found[4:]]


def compare(given, trained=NAMES, upstream=None, order="auto", heads=1):
    """Returns the results of the ``torch`` backend."""
    ours = functools.partial(double_attention_block, backend="torch", order=order)
    return check_against_reference(
        ours, eager, given, upstream, only_tolerance=("out", *NAMES), wanted=trained, heads=heads,
        residual=True,
    )  # fmt: skip


@pytest.mark.parametrize("size", [2, 6], ids=["fewer positions than descriptors", "more"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("order", "heads"), [*((order, 1) for order in ORDERS), ("AZ", 2)])
def test_matches_the_definition(order, heads, batch, channels_last, size, convolved):
    given = leaves(batch, size, channels_last)
    results = compare(given, order=order, heads=heads)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert results["out"].is_contiguous(memory_format=layout)
    assert results["x"].is_contiguous(memory_format=layout)
    assert all(results[name].is_contiguous() for name in NAMES[1:])
    assert convolved


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ORDERS)
def test_without_biases(order, channels_last, convolved):
    left_out = [n for n in NAMES if "bias" in n]
    compare(leaves(channels_last=channels_last, left_out=left_out), order=order)
    assert convolved


@pytest.mark.parametrize("wanted", NAMES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ORDERS)
def test_one_gradient_alone(order, channels_last, wanted, convolved):
    compare(leaves(channels_last=channels_last), [wanted], order=order)
    assert convolved


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ORDERS)
def test_upstream_gradients_of_any_strides(order, channels_last, batch, convolved):
    given = leaves(batch, channels_last=channels_last)
    dense = torch.randn(batch, C, 6, 6)
    shared = torch.randn(1, C, 1, 1)
    for upstream in (
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        dense.mT.contiguous().mT,
        shared.expand_as(dense),
        torch.ones(()).expand_as(dense),
    ):
        compare(given, upstream=upstream, order=order)
    assert convolved


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ORDERS)
def test_no_matrix_is_copied_for_few_columns(order, channels_last, convolved, monkeypatch):
    compare(leaves(channels_last=channels_last), order=order)
    all_of_them = len(convolved)
    monkeypatch.setattr(cpu_small, "FEW_COLUMNS", 2**8)
    compare(leaves(channels_last=channels_last), order=order)
    assert len(convolved) < 2 * all_of_them


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_smaller_products_are_not(channels_last, batch, convolved, monkeypatch):
    monkeypatch.setattr(cpu_small, "CONVOLVED_MULTIPLICATIONS", C * C_M * 36)
    compare(leaves(batch, channels_last=channels_last), order="AZ")
    # By Wa and Wo, forward and backward; the gradients of these, where there is one sample.
    assert len(convolved) == (6 if batch == 1 else 4)


def test_narrow_products_are_not(convolved, monkeypatch):
    monkeypatch.setattr(cpu_small, "NARROW", C_M)
    compare(leaves(), order="AZ")
    assert not convolved


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("order", ORDERS)
def test_second_derivatives(order, channels_last):
    given = leaves(channels_last=channels_last)

    def penalty(given, **options):
        x, *weights = (None if z is None else z.detach().requires_grad_() for z in given)
        out = double_attention_block(x, *weights, **options)
        (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    expected = penalty(widened(given), backend="eager")
    check(penalty(given, backend="torch", order=order), expected, torch.float32)
