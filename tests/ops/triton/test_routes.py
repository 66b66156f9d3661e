"""Every route of the block, forward and backward, against the definition in float64."""

import pytest
import torch

from da_triton import reference
from da_triton.ops.triton import routes
from support.block import CASES, FUSED, NAMES, ROUTES, definition, inputs, run
from support.numerics import (
    AS_ON_A_GPU,
    DEVICE,
    HALVES,
    TOLERANCE,
    check,
    relative_rms,
    route_dtype,
)


def compare(route, case, channels_last, dtype=None):
    dtype = dtype or route_dtype(ROUTES[route])
    given = inputs(CASES[case], dtype, channels_last)
    expected = definition(CASES[case], *given, torch.float64)
    own = definition(CASES[case], *given, dtype)
    found = run(ROUTES[route], CASES[case], *given)
    # Vendor GEMMs round the tensors between them, as in eager; fused kernels do not.
    slack = 1 if route.startswith("fused_xh") else 2
    for name, ours, truth, theirs in zip(NAMES, found, expected, own, strict=True):
        what, limit = f"{route} {case} {name}", slack
        if name in ("v", "bias_v"):  # terms cancel: eager's own error may exceed the tolerance
            limit = max(slack, relative_rms(theirs, truth) / TOLERANCE[dtype])
        if name == "bias_v" and dtype.itemsize > 2:
            theirs = None
        check(ours, truth, dtype, theirs, what, limit)


MIXED = ("fused_gather_h", "fused_gather_a_h", "fused_distribute_x")  # combinations of the others


RUNS = [
    (route, case)
    for route in ROUTES
    for case in CASES
    if route not in MIXED
    if case != "no_tile"
    if case != "large_n" or route.startswith("unfused") or not AS_ON_A_GPU  # no tile of n = 256
]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("route", "case"), RUNS)
def test_matches_the_definition(route, case, channels_last):
    compare(route, case, channels_last)


@pytest.mark.parametrize(("case", "channels_last"), [("odd", True), ("wide", False)])
@pytest.mark.parametrize("route", MIXED)
def test_mixed_routes(route, case, channels_last):
    compare(route, case, channels_last)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("route", ["unfused_AZ", "unfused_XH"])
def test_more_descriptors_than_a_program_holds(route, channels_last):
    """In half precision; in float32, that is more than 32."""
    compare(route, "no_tile", channels_last, torch.bfloat16)


@pytest.mark.parametrize(("case", "channels_last"), [("plain", False), ("odd", True)])
@pytest.mark.parametrize(
    ("route", "dtype"),
    [
        pytest.param(route, dtype, id=f"{route}-{dtype}")
        for route in ROUTES
        for dtype in (torch.float64, *HALVES)
        if route not in MIXED
        if dtype in HALVES or route.startswith("unfused") or not AS_ON_A_GPU
    ],
)
def test_dtypes(route, case, channels_last, dtype):
    compare(route, case, channels_last, dtype)


def test_a_wrong_definition_is_rejected():
    dtype = route_dtype(FUSED)
    x, w, mask, upstream = inputs(CASES["plain"], dtype, False)
    scale = 0.69 if dtype == torch.float32 else 0.6  # by more than roundings, for 0.7
    wrong = definition(CASES["plain"], x, w, mask, upstream, torch.float64, logit_scale=scale)
    found = run(FUSED, CASES["plain"], x, w, mask, upstream)
    for name, ours, other in zip(NAMES, found, wrong, strict=True):
        if name not in ("bias_a", "bias_out"):  # they do not depend on B and V
            with pytest.raises(AssertionError, match="relative RMS"):
                check(ours, other, dtype, what=name)


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_needs_initialised_memory_and_runs_repeat_bit_for_bit(route):
    x, w, mask, upstream = inputs(CASES["odd"], route_dtype(ROUTES[route]), False)
    first = run(ROUTES[route], CASES["odd"], x, w, mask, upstream)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    try:
        second = run(ROUTES[route], CASES["odd"], x, w, mask, upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("route", ROUTES)
def test_masked_positions_may_hold_anything_and_nan_stays_in_its_sample(route):
    x, w, mask, upstream = inputs(CASES["odd"], route_dtype(ROUTES[route]), False)
    out, dx, *_ = run(ROUTES[route], CASES["odd"], x, w, mask, upstream)
    spoiled = x.clone()
    spoiled[1].masked_fill_(~mask[1], torch.nan)
    there = mask[1]
    again, dx_again, *_ = run(ROUTES[route], CASES["odd"], spoiled, w, mask, upstream)
    torch.testing.assert_close(again[1][:, there], out[1][:, there])
    assert torch.equal(again[0], out[0])
    assert torch.equal(dx_again[0], dx[0])


@pytest.mark.parametrize("route", ["fused_xh", "unfused_AZ", "unfused_XH"])
@pytest.mark.parametrize("kind", ["stride 0", "channels last", "narrow"])
def test_upstream_gradients_in_any_strides(route, kind):
    dtype = route_dtype(ROUTES[route])
    x, w, mask, upstream = inputs(CASES["odd"], dtype, False)
    if kind == "stride 0":
        upstream = torch.ones((), dtype=dtype, device=DEVICE).expand(x.shape)
    elif kind == "channels last":
        upstream = upstream.mT.contiguous().mT
    else:
        upstream = torch.cat([upstream, upstream], 1)[:, : x.shape[1]]
    dense = run(ROUTES[route], CASES["odd"], x, w, mask, upstream.contiguous())
    for ours, expected in zip(
        run(ROUTES[route], CASES["odd"], x, w, mask, upstream), dense, strict=True
    ):
        assert relative_rms(ours, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bias_out", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("reconstruct", [False, True])
@pytest.mark.parametrize("route", ["unfused_AZ", "unfused_XZ", "fused_gather_a"])
def test_endings_of_the_unfused_route(route, reconstruct, residual, bias_out):
    """With and without the last convolution, its bias, and X; no gradient of X requested."""
    dtype = route_dtype(ROUTES[route])
    x, w, _, upstream = inputs(CASES["plain"], dtype, False)
    x, upstream = x[:, :32], upstream[:, :32]  # as many channels as c_m
    a, b, v, out = (y[:, :32] for y in (w.a, w.b, w.v, w.out[:32]))
    out, bias = (out, w.bias_out[:32]) if reconstruct else (None, None)
    bias = bias if bias_out else None
    w = routes.Weights(*(y.contiguous() for y in (a, w.bias_a, b, v, w.bias_v)), out, bias)
    if out is not None:
        w = w._replace(out=out.contiguous())
    o = routes.Options(1, 1.0, 1.0, 1.0, True, residual)
    found, lse, g, _ = routes.forward(x, w, None, o, ROUTES[route], False)
    needs = routes.EVERY._replace(x=False)
    grads = routes.backward(upstream, x, w, None, lse, g, None, o, ROUTES[route], needs)
    assert grads.x is None

    leaves = [None if y is None else y.double().requires_grad_() for y in (x, *w)]
    wide, a, bias_a, b, v, bias_v, out, bias = leaves
    truth = reference.block(
        wide, a, bias_a, b, None, v, bias_v, out, bias, heads=1, logit_scale=1.0,
        logit_scale_v=1.0, scale=1.0, softmax_v=True, residual=wide if residual else None,
        mask=None,
    )  # fmt: skip
    check(found, truth.detach(), dtype, what="out")
    pairs = [(y, leaf) for y, leaf in zip(grads[1:], leaves[1:], strict=True) if leaf is not None]
    expected = torch.autograd.grad(truth, [leaf for _, leaf in pairs], upstream.double())
    for (ours, _), other in zip(pairs, expected, strict=True):
        check(ours, other, dtype, slack=2)
