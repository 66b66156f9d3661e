"""The public functions: any shapes, strides and options against the definition in float64.

A few examples each here. Many, of a seed of one's own:

    DA_TRITON_EXAMPLES=10000 DA_TRITON_SEED=1 python -m pytest tests/test_properties.py -k torch
    DA_TRITON_EXAMPLES=500 DA_TRITON_SEED=1 python -m pytest tests/test_properties.py -k triton
"""

import functools
import os

import pytest
import torch

import da_triton
from da_triton.planning.costs import orders
from support.numerics import DEVICE, DTYPES, TOLERANCE

hypothesis = pytest.importorskip("hypothesis")
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
        return normal(batch + 1, channels + 3, *positions[:-1], positions[-1] + 5)[
            1:, 1:-2, ..., 2:-3
        ]
    if layout == "step":
        return normal(batch, 2 * channels, *positions[:-1], 3 * positions[-1])[:, ::2, ..., ::3]
    if layout == "shared":
        return normal(1, channels, *positions).expand(batch, *[-1] * (1 + len(positions)))
    if layout == "transposed":
        return normal(batch, channels, *positions[::-1]).permute(
            0, 1, *range(1 + len(positions), 1, -1)
        )
    return normal(batch, channels, *positions)


def masks(kind, batch, positions, random):
    if kind == "none":
        return None
    mask = torch.rand(batch, 1, *positions, generator=random) > 0.5
    if kind == "a sample without":
        mask[-1:] = False
    return (mask if kind == "with a channel axis" else mask[:, 0]).to(DEVICE)


dtypes = st.sampled_from(DTYPES)
sizes = st.one_of(
    *(
        st.lists(st.integers(1, most), min_size=k, max_size=k)
        for k, most in ((1, 70), (2, 8), (3, 4))
    )
)
layouts = st.sampled_from(LAYOUTS)
logit_scales = st.sampled_from([1.0, 0.3, -0.5, 0.0])
scales = st.sampled_from([1.0, 2.0, -0.7])
mask_kinds = st.sampled_from(["none", "some", "with a channel axis", "a sample without"])


def compare(function, inputs, upstream_layout, random, dtype, backend, **options):
    """Result, and gradients of the differentiable ``inputs``."""

    def run(inputs, kind, name):
        leaves = [x.detach().to(kind).requires_grad_() for x in inputs]
        out = function(*leaves, backend=name, **(theirs(options) if name == "eager" else options))
        assert out.dtype == kind
        return [out, *torch.autograd.grad(out, leaves, upstream(out.shape).to(kind))]

    @functools.cache
    def upstream(shape):
        return arranged(upstream_layout, *shape[:2], shape[2:], random, dtype)

    @functools.cache
    def nearby():
        """The exact results for inputs that differ by a rounding: where terms cancel, they are as
        far from the truth as any algorithm may be."""
        results = []
        for _ in range(16):
            noise = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in inputs]
            moved = [
                x.double() * (1 + torch.finfo(dtype).eps * n.to(DEVICE))
                for x, n in zip(inputs, noise, strict=True)
            ]
            results.append(run(moved, torch.float64, "eager"))
        return results

    found = run(inputs, dtype, backend)
    exact, own = (run(inputs, kind, "eager") for kind in (torch.float64, dtype))
    # A gradient may be zero, or nearly: its error is not relative to itself, but to the largest.
    scale = max(x.double().norm() for x in (upstream(found[0].shape), *exact[1:]))
    for i, (ours, truth, rounded) in enumerate(zip(found, exact, own, strict=True)):
        error = (ours.double() - truth).norm()
        allowed = TOLERANCE[dtype] * max(truth.norm(), scale if i else 0.0)
        allowed = max(allowed, 2 * (rounded.double() - truth).norm())
        if error > allowed:
            allowed = 2 * max((other[i] - truth).norm() for other in nearby())
        assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


def theirs(options):
    """Options of the reference: it has one order, and autograd decides what is saved."""
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
        order=draw(st.sampled_from(["auto", *(o.name for o in orders(reconstruct))])),
        recompute=draw(st.sampled_from(["auto", True, False])),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wrong_scale_is_found(dtype):
    random = torch.Generator().manual_seed(0)
    inputs = [arranged("first", 2, c, [5, 6], random, dtype) for c in (4, 6, 6)]

    def function(a, b, v, backend, logit_scale=1.0):
        wrong = logit_scale * (1.0 if backend == "eager" else 1.0 + 50 * torch.finfo(dtype).eps)
        return da_triton.double_attention(a, b, v, logit_scale=wrong, backend=backend)

    compare(da_triton.double_attention, inputs, "first", random, dtype, "torch")
    with pytest.raises(AssertionError, match="allowed"):
        compare(function, inputs, "first", random, dtype, "torch")
