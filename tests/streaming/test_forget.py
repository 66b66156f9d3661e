"""``Descriptors.forget`` is exact, however far logits are from zero and however often it runs."""

import math

import pytest
import torch

from da_triton import streaming
from da_triton.streaming import Descriptors
from support.numerics import DEVICE, DTYPES, TOLERANCE, check

FAR = [-1e5, -5000.0, 0.0, 5000.0, 1e5]
DECAYS = [1.0, 0.9999, 0.5, 1e-3, 1e-30]
each_distance = pytest.mark.parametrize("logit", FAR)
each_decay = pytest.mark.parametrize("decay", DECAYS)


def frame(feature, logit, dtype=torch.float32):
    return (torch.full((1, 1, 1), x, dtype=dtype, device=DEVICE) for x in (feature, logit))


def start(dtype=torch.float32):
    return Descriptors.init(1, 1, 1, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@each_distance
@each_decay
def test_a_frame_after_one_that_fades(decay, logit, backend, dtype):
    state = start(dtype).update(*frame(1.0, logit, dtype), backend=backend).forget(decay)
    g = state.update(*frame(0.0, logit, dtype), backend=backend).read().item()
    assert g == pytest.approx(decay / (1 + decay), rel=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_distance
@pytest.mark.parametrize("total", [1e-3, 0.5])
def test_what_fades_in_ten_thousand_steps(total, logit, dtype):
    """Each step is about the size of a rounding of the pivot."""
    decay, state = total**1e-4, start(dtype).update(*frame(1.0, logit, dtype))
    for _ in range(10_000):
        state = state.forget(decay)
    g = state.update(*frame(0.0, logit, dtype)).read().item()
    right = decay**10_000
    assert g == pytest.approx(right / (1 + right), rel=10 * TOLERANCE[dtype], abs=0)


def test_devices_without_float64(monkeypatch):
    """The meta device takes the place of MPS."""
    assert streaming._pivot_dtype(torch.device("mps")) == torch.float32
    dtypes = {"meta": torch.float32}
    monkeypatch.setattr(
        streaming, "_pivot_dtype", lambda device: dtypes.get(device.type, torch.float64)
    )
    there = start().update(*frame(0.5, 1.0)).to("meta")
    assert there.maximum.dtype == there.forget(0.5).maximum.dtype == torch.float32
    assert Descriptors.init(1, 2, 2, device="meta").maximum.dtype == torch.float32
    dtypes[DEVICE] = torch.float32
    assert Descriptors.of(*frame(0.5, 1.0)).maximum.dtype == torch.float32


@each_distance
def test_forgetting_rounds_no_sum(logit):
    state = start().update(*frame(1 / 3, logit))
    faded = state.forget(0.7).forget(1e-30)
    assert torch.equal(faded.read(), state.read())
    assert torch.equal(faded.total, state.total)


@each_distance
@each_decay
def test_a_video_that_fades(decay, logit):
    """Against weights of the definition in float64, by the age of each frame."""
    a = torch.rand(12, 2, 3, 5, device=DEVICE) + 0.5
    b = torch.randn(12, 2, 4, 5, device=DEVICE) + logit
    state = Descriptors.init(2, 3, 4, device=DEVICE)
    for x, y in zip(a, b, strict=True):
        state = state.forget(decay).update(x, y)
    age = torch.arange(11, -1, -1, device=DEVICE).double()
    logits = b.double() - logit + age.view(-1, 1, 1, 1) * math.log(decay)
    weights = logits.movedim(0, -2).flatten(-2).softmax(-1)
    right = a.double().movedim(0, -2).flatten(-2) @ weights.mT
    check(state.read()[:, 0], right, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logit", [0.0, 3000.0, -1e5])
def test_gradients_through_forgetting(dtype, logit):
    """The reference starts from the rounded inputs; float16 has no 1e5."""
    logit = max(logit, -6e4) if dtype == torch.float16 else logit
    a, b = (torch.randn(4, 2, 3, 5, device=DEVICE) + shift for shift in (1.0, logit))
    a, b = (x.to(dtype).requires_grad_() for x in (a, b))
    high = torch.promote_types(dtype, torch.float32)
    state = Descriptors.init(2, 3, 3, dtype=high, device=DEVICE)
    for x, y in zip(a, b, strict=True):
        state = state.forget(0.3).update(x, y)
    found = torch.autograd.grad(state.read().square().sum(), [a, b])

    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    age = torch.arange(3, -1, -1, device=DEVICE).double()
    logits = (b - logit) + age.view(-1, 1, 1, 1) * math.log(0.3)
    weights = logits.movedim(0, -2).flatten(-2).softmax(-1)
    g = a.movedim(0, -2).flatten(-2) @ weights.mT
    for actual, expected in zip(found, torch.autograd.grad(g.square().sum(), [a, b]), strict=True):
        check(actual, expected, dtype)


def test_an_empty_state_and_a_masked_attention_map_have_nothing_to_forget():
    nothing = torch.zeros(1, 1, dtype=torch.bool, device=DEVICE)
    for state in (start(), start().update(*frame(1.0, 1e5), mask=nothing)):
        faded = state.forget(1e-30)
        assert torch.equal(faded.read(), torch.zeros_like(state.weighted))
        assert faded.update(*frame(2.0, -1e5)).read().item() == 2
