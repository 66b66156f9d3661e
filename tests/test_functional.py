"""The public functions: shapes, layouts, autocast, backends, against the definition."""

import functools

import numpy as np
import pytest
import torch

import da_triton
from da_triton import reference
from support.cases import each_backend
from support.compare import check_against_reference
from support.numerics import DEVICE, check, peaky, relative_rms


def activations(batch, positions, *channels, dtype=torch.float32):
    return [
        peaky(batch, c, 1, torch.Size(positions).numel(), dtype=dtype).reshape(batch, c, *positions)
        for c in channels
    ]


def definition(a, b, v, heads=1, mask=None, extra=None, **options):
    """The definition in float64, on flattened positions."""
    a, b, w = (x.double().flatten(2).unflatten(1, (heads, -1)) for x in (a, b, v))
    mask = None if mask is None else mask.reshape(mask.shape[0], -1)
    if extra is not None:
        extra = [e.double().expand(a.shape[0], -1, -1).unflatten(1, (heads, -1)) for e in extra]
    g = reference.gather(a, b, mask=mask, extra=extra, logit_scale=options.pop("logit_scale", 1.0))
    z = reference.distribute(
        g,
        w,
        scale=options.get("scale", 1.0),
        softmax=options.get("softmax_v", True),
        logit_scale=options.get("logit_scale_v", 1.0),
    )
    return g, z.flatten(1, 2).unflatten(2, v.shape[2:])


@each_backend
@pytest.mark.parametrize("positions", [(11,), (5, 7), (2, 3, 4)])
def test_one_two_and_three_position_axes(backend, positions):
    a, b, v = activations(2, positions, 6, 8, 8)
    g, z = definition(a, b, v, heads=2)
    check(da_triton.gather(a, b, heads=2, backend=backend), g, a.dtype)
    check(da_triton.double_attention(a, b, v, heads=2, backend=backend), z, a.dtype)
    check(da_triton.distribute(g.float(), v, backend=backend), z, a.dtype)


@each_backend
def test_every_option_at_once(backend):
    a, b = activations(2, (5, 6), 6, 8)
    (v,) = activations(2, (3, 4), 8)  # positions of its own: cross-attention
    mask = torch.rand(2, 1, 5, 6, device=DEVICE) > 0.4
    extra = (torch.randn(1, 6, 4, device=DEVICE), torch.randn(1, 8, 4, device=DEVICE))
    options = {
        "heads": 2, "logit_scale": 0.5, "logit_scale_v": 0.7, "scale": 1.3, "softmax_v": False,
        "mask": mask, "extra": extra,
    }  # fmt: skip
    _, expected = definition(a, b, v, **options)
    z = da_triton.double_attention(a, b, v, **options, backend=backend)
    assert z.shape == (2, 6, 3, 4)
    check(z, expected, a.dtype)
    flat = {**options, "mask": mask[:, 0]}
    assert torch.equal(da_triton.double_attention(a, b, v, **flat, backend=backend), z)


@each_backend
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("positions", "memory_format"),
    [
        ((5, 6), torch.contiguous_format),
        ((5, 6), torch.channels_last),
        ((2, 3, 4), torch.channels_last_3d),
    ],
)
def test_memory_format_follows_v(backend, heads, positions, memory_format):
    a, b, v = activations(2, positions, 6, 8, 8)
    v = v.to(memory_format=memory_format)
    z = da_triton.double_attention(a, b, v, heads=heads, backend=backend)
    assert z.is_contiguous(memory_format=memory_format)
    check(z, definition(a, b, v, heads=heads)[1], a.dtype)


@each_backend
def test_token_major_inputs_and_crops(backend):
    tokens = peaky(2, 1, 24, 30, dtype=torch.float32)[:, 0].mT.contiguous()  # (N, L, C)
    a, b, v = tokens.transpose(1, 2).split([8, 8, 8], dim=1)
    z = da_triton.double_attention(a, b, v, backend=backend)
    check(z, definition(a, b, v)[1], a.dtype)
    assert z.transpose(1, 2).is_contiguous()
    cropped = [x[:, :, 1:-1, 2:5] for x in activations(2, (6, 7), 6, 8, 8)]
    check(da_triton.double_attention(*cropped, backend=backend), definition(*cropped)[1], a.dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradients_reach_every_tensor(backend):
    def attention(a, b, v, extra_a, extra_b, backend="eager"):
        extra = extra_a, extra_b
        return da_triton.double_attention(a, b, v, heads=2, extra=extra, backend=backend)

    given = *activations(2, (5, 6), 6, 8), *activations(2, (4, 4), 8)
    extra = (torch.randn(1, c, 3, device=DEVICE) for c in (6, 8))
    check_against_reference(
        functools.partial(attention, backend=backend), attention, (*given, *extra)
    )


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    a, b, v = activations(2, (5, 6), 6, 8, 8)
    with torch.autocast(DEVICE, dtype=dtype):
        g = da_triton.gather(a, b, backend=backend)
        z = da_triton.double_attention(a, b, v, backend=backend)
        y = da_triton.distribute(g, v, backend=backend)
        assert torch.is_autocast_enabled(DEVICE)
    assert g.dtype == z.dtype == y.dtype == dtype
    expected = definition(a.to(dtype), b.to(dtype), v.to(dtype))
    check(z, expected[1], dtype, slack=2)
    check(y, expected[1], dtype, slack=2)
    with torch.autocast(DEVICE, dtype=dtype):
        wide = da_triton.double_attention(a.double(), b.double(), v.double(), backend=backend)
    assert wide.dtype == torch.float64


def test_autocast_lets_mixed_inputs_in():
    a, b, v = activations(2, (5, 6), 6, 8, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert da_triton.double_attention(a.bfloat16(), b, v).dtype == torch.bfloat16


def test_descriptors_stay_in_float32_between_the_steps():
    a, b, v = activations(2, (16, 16), 24, 16, 16, dtype=torch.bfloat16)
    _, z = definition(a, b, v)
    whole = da_triton.double_attention(a, b, v, backend="triton")
    halves = da_triton.distribute(da_triton.gather(a, b, backend="triton"), v, backend="triton")
    assert relative_rms(whole, z) <= relative_rms(halves, z)
    assert da_triton.gather(a, b, backend="triton").dtype == torch.bfloat16
    check(whole, z, torch.bfloat16)


@each_backend
def test_empty_batch(backend):
    a, b, v = activations(0, (5, 6), 6, 8, 8)
    for mask in (None, torch.ones(0, 5, 6, dtype=torch.bool, device=DEVICE)):
        z = da_triton.double_attention(a, b, v, mask=mask, backend=backend)
        assert z.shape == (0, 6, 5, 6)


@pytest.mark.parametrize("backend", ["auto", "torch", "eager"])
def test_meta_tensors(backend):
    a, b, v = (x.to("meta") for x in activations(2, (5, 6), 6, 8, 8))
    z = da_triton.double_attention(a, b, v, backend=backend)
    assert (z.shape, z.device.type) == ((2, 6, 5, 6), "meta")


def test_integers_of_numpy():
    a, b, v = activations(2, (5, 6), 6, 8, 8)
    assert torch.equal(
        da_triton.double_attention(a, b, v, heads=np.int64(2)),
        da_triton.double_attention(a, b, v, heads=2),
    )


def test_auto_takes_the_kernels_on_a_gpu():
    a, b, v = activations(1, (4, 4), 6, 8, 8)
    expected = "triton" if DEVICE == "cuda" else "torch"
    named = da_triton.double_attention(a, b, v, backend=expected)
    assert torch.equal(da_triton.double_attention(a, b, v), named)
