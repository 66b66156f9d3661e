"""Properties of the whole domain: any shapes, strides and options against the definition in float64.

A few examples each here. Many, of a seed of one's own:

    DA_TRITON_EXAMPLES=10000 DA_TRITON_SEED=1 python -m pytest tests/test_properties.py -k torch
    DA_TRITON_EXAMPLES=500 DA_TRITON_SEED=1 python -m pytest tests/test_properties.py -k triton
"""

import os

import pytest
import torch

import da_triton
from da_triton.checks import ORDERS
from support.numerics import DEVICE, DTYPES, TOLERANCE, relative_rms

hypothesis = pytest.importorskip("hypothesis", reason="a bare machine with a GPU may lack it")
st = hypothesis.strategies

EXAMPLES = int(os.environ.get("DA_TRITON_EXAMPLES", "20"))
SEED = int(os.environ.get("DA_TRITON_SEED", "0"))
LAYOUTS = ("first", "last", "slice", "step", "shared", "transposed")


def thoroughly(function):
    settings = hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    return hypothesis.seed(SEED)(settings(function))


def arranged(layout, batch, channels, positions, random, dtype):
    """Normal numbers with the strides of a layout, in the dtype and on the device of the test."""

    def normal(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(DEVICE, dtype)

    if layout == "last":
        return normal(batch, *positions, channels).movedim(-1, 1)
    if layout == "slice":
        return normal(batch + 1, channels + 3, *positions[:-1], positions[-1] + 5)[1:, 1:-2, ..., 2:-3]
    if layout == "step":
        return normal(batch, 2 * channels, *positions[:-1], 3 * positions[-1])[:, ::2, ..., ::3]
    if layout == "shared":
        return normal(1, channels, *positions).expand(batch, *[-1] * (1 + len(positions)))
    if layout == "transposed":
        return normal(batch, channels, *positions[::-1]).permute(0, 1, *range(1 + len(positions), 1, -1))
    return normal(batch, channels, *positions)


def masks(kind, batch, positions, random):
    if kind == "none":
        return None
    mask = torch.rand(batch, 1, *positions, generator=random) > 0.5
    if kind == "a sample without":
        mask[-1:] = False
    return (mask if kind == "with a channel axis" else mask[:, 0]).to(DEVICE)


dtypes = st.sampled_from(DTYPES)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3)
layouts = st.sampled_from(LAYOUTS)
logit_scales = st.sampled_from([1.0, 0.3, -0.5, 0.0])
scales = st.sampled_from([1.0, 2.0, -0.7])
mask_kinds = st.sampled_from(["none", "some", "with a channel axis", "a sample without"])


def close(found, exact, own, dtype, least):
    """Within the tolerance, or twice the error of the definition in the same dtype.

    ``least``: what an error is relative to at least; a gradient may be zero, or nearly.
    """
    error, scale = (found.double() - exact).norm(), max(exact.norm(), least)
    allowed = max(TOLERANCE[dtype] * scale, 2 * (own.double() - exact).norm())
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def compare(function, inputs, upstream_layout, random, dtype, backend, **options):
    """Result and gradients, of what differentiable ``inputs`` there are."""
    results = []
    for name, kind in ((backend, dtype), ("eager", torch.float64), ("eager", dtype)):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, backend=name, **(options if name == backend else theirs(options)))
        if not results:
            upstream = arranged(upstream_layout, *out.shape[:2], out.shape[2:], random, dtype)
        assert out.dtype == kind
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(kind))])
    for i, (found, exact, own) in enumerate(zip(*results, strict=True)):
        close(found, exact, own, dtype, 0.1 * upstream.double().norm() if i else 0.0)


def theirs(options):
    """What the definition is told: it has one order and keeps what PyTorch keeps."""
    return {k: v for k, v in options.items() if k not in ("order", "recompute")}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@thoroughly
@hypothesis.given(data=st.data())
def test_core(backend, data):
    draw = data.draw
    dtype, heads, batch = draw(dtypes), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    m, n, tokens = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 3))
    here, there = draw(sizes), draw(sizes)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels = (heads * m, heads * n, heads * n)
    inputs = [
        arranged(draw(layouts), batch, c, positions, random, dtype)
        for c, positions in zip(channels, (here, here, there), strict=True)
    ]
    if tokens:
        of = draw(st.sampled_from([1, batch]))
        inputs += [arranged("first", of, c, [tokens], random, dtype) for c in channels[:2]]

    def function(a, b, v, *extra, **options):
        return da_triton.double_attention(a, b, v, extra=extra or None, heads=heads, **options)

    compare(
        function, inputs, draw(layouts), random, dtype, backend,
        mask=masks(draw(mask_kinds), batch, here, random),
        logit_scale=draw(logit_scales), logit_scale_v=draw(logit_scales), scale=draw(scales),
        softmax_v=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@thoroughly
@hypothesis.given(data=st.data())
def test_block(backend, data):
    draw = data.draw
    dtype, heads, batch = draw(dtypes), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    m, n, channels = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 40))
    reconstruct, positions = draw(st.booleans()), draw(sizes)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    c_m, c_n = heads * m, heads * n
    last = draw(st.sampled_from([channels, 5]))
    rows = {"a": (c_m, channels), "b": (c_n, channels), "v": (c_n, channels)}
    if reconstruct:
        rows["out"] = (last, c_m)
    inputs, names = {"x": arranged(draw(layouts), batch, channels, positions, random, dtype)}, []
    for name, shape in rows.items():
        inputs[f"weight_{name}"] = arranged("first", *shape, [], random, dtype) / shape[1] ** 0.5
        if draw(st.booleans()):
            inputs[f"bias_{name}"] = arranged("first", 1, shape[0], [], random, dtype)[0]
    names = list(inputs)
    absent = {f"bias_{name}" for name in ("a", "b", "v")} - set(names)
    out_channels = last if reconstruct else c_m

    def function(*values, **options):
        given = dict(zip(names, values, strict=True)) | dict.fromkeys(absent)
        return da_triton.double_attention_block(**given, heads=heads, **options)

    compare(
        function, list(inputs.values()), draw(layouts), random, dtype, backend,
        mask=masks(draw(mask_kinds), batch, positions, random),
        logit_scale=draw(logit_scales), logit_scale_v=draw(logit_scales), scale=draw(scales),
        softmax_v=draw(st.booleans()),
        residual=draw(st.booleans()) if out_channels == channels else False,
        order=draw(st.sampled_from(["auto", *(ORDERS if reconstruct else ORDERS[:2])])),
        recompute=draw(st.sampled_from(["auto", True, False])),
    )  # fmt: skip


def test_a_wrong_scale_is_found():
    """The comparison itself: 1 % of a logit scale, in half precision."""
    random = torch.Generator().manual_seed(0)
    a, b, v = (arranged("first", 2, c, [5, 6], random, torch.float16) for c in (4, 6, 6))
    exact, own = (
        da_triton.double_attention(*(x.to(d) for x in (a, b, v)), backend="eager")
        for d in (torch.float64, torch.float16)
    )
    wrong = da_triton.double_attention(a, b, v, logit_scale=1.01, backend="torch")
    right = da_triton.double_attention(a, b, v, backend="torch")
    close(right, exact, own, torch.float16, 0.0)
    with pytest.raises(AssertionError, match="allowed"):
        close(wrong, exact, own, torch.float16, 0.0)
    assert relative_rms(wrong, exact) < 0.01
