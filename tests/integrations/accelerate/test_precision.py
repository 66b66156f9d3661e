"""accelerate() on layers that choose the precision of their intermediate results."""

import contextlib

import pytest
import torch
from torch import nn

from da_triton.integrations import accelerate
from da_triton.integrations.accelerate.search import Accelerated
from support.numerics import relative_rms

X = (2, 12, 6, 7)


class LinearAttention(nn.Module):
    """Linear attention, softmax on both; subclasses change a step."""

    def __init__(self, dim=12, heads=2, dim_head=8):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def wide(self, x):
        return x

    def softmax(self, x, dim):
        return x.softmax(dim)

    def scale(self, q):
        return q * q.shape[-2] ** -0.5

    def region(self):
        return contextlib.nullcontext()

    def core(self, q, k, v):
        q, k = self.scale(self.softmax(q, -2)), self.softmax(k, -1)
        return v @ k.transpose(-1, -2) @ q

    def forward(self, x):
        q, k, v = self.to_qkv(x).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        with self.region():
            z = self.core(self.wide(q), self.wide(k), self.wide(v))
        z = z.to(self.to_out.weight.dtype).flatten(1, 2).unflatten(-1, x.shape[2:])
        return self.to_out(z.type_as(x))


class Float(LinearAttention):
    def wide(self, x):
        return x.float()


class ToFloat32(LinearAttention):
    def wide(self, x):
        return x.to(torch.float32)


class ToKeyword(LinearAttention):
    def wide(self, x):
        return x.to(dtype=torch.float32, copy=True)


class Type(LinearAttention):
    def wide(self, x):
        return x.type(torch.float32)


class Double(LinearAttention):
    def wide(self, x):
        return x.double()


class FunctionalSoftmax(LinearAttention):
    def softmax(self, x, dim):
        return nn.functional.softmax(x, dim=dim, dtype=torch.float32).to(x.dtype)


class TorchSoftmax(LinearAttention):
    def softmax(self, x, dim):
        return torch.softmax(x, dim, torch.float32).to(x.dtype)


class WithoutAutocast(Float):
    def region(self):
        return torch.autocast("cpu", enabled=False)


class ScaleTensor(LinearAttention):
    def scale(self, q):
        return q * torch.tensor(q.shape[-2] ** -0.5)


class HalfNorm(Float):
    """The group norm of guided diffusion: parameters and computation in float32."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(3, 12)

    def forward(self, x):
        return super().forward(self.norm.float()(x.float()).to(x.dtype))


WIDE = [
    Float, ToFloat32, ToKeyword, Type, Double, FunctionalSoftmax, TorchSoftmax, WithoutAutocast,
    ScaleTensor, HalfNorm,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WIDE)
def test_computing_in_higher_precision_inside_is_recognised(kind, dtype):
    layer = kind().to(dtype)
    x = torch.randn(X).to(dtype)
    expected = layer(x)
    (finding,) = accelerate(nn.Sequential(layer), x).replaced
    assert finding.error < 1e-12
    found = layer(x)
    assert found.dtype == expected.dtype == dtype
    exact = LinearAttention.forward(layer.double(), x.double())
    if kind is not HalfNorm:
        bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert relative_rms(found, exact) < max(bound, 2 * relative_rms(expected, exact))


def test_without_an_example_too():
    layer = Float()
    assert len(accelerate(nn.Sequential(layer)).replaced) == 1


@pytest.mark.parametrize("kind", [Float, WithoutAutocast])
def test_results_under_autocast(kind):
    layer = kind()
    x = torch.randn(X)
    exact = layer(x)
    accelerate(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
        expected = kind.forward(layer, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_rms(found, exact) < 2 * relative_rms(expected, exact)


class KeepsFloat32(LinearAttention):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def test_a_layer_that_keeps_float32_under_autocast_is_left():
    with pytest.warns(UserWarning, match="it keeps float32 under autocast"):
        accelerate(KeepsFloat32(), torch.randn(X))


class ReturnsFloat32(Float):
    def forward(self, x):
        return super().forward(x).float()


def test_a_layer_that_returns_another_dtype_is_left():
    message = r"parameters in torch.float16 it returns torch.float32, the formula torch.float16"
    with pytest.warns(UserWarning, match=message):
        accelerate(ReturnsFloat32().half(), torch.randn(X).half())


class ScaleOff(Float):
    def scale(self, q):
        return super().scale(q) * (1 + 1e-6)


class ScaleOffByRounding(Float):
    def scale(self, q):
        return super().scale(q) * (1 + 5e-8)


class OtherAxis(Float):
    def softmax(self, x, dim):
        return super().softmax(x, -1)


class Temperature(Float):
    def softmax(self, x, dim):
        return super().softmax(x * (1 + 1e-6), dim)


class WithoutBias(Float):
    def forward(self, x):
        return super().forward(x) - self.to_out.bias.view(1, -1, 1, 1)


class SmallResidual(Float):
    def forward(self, x):
        return super().forward(x) + 1e-6 * x


class CausalMask(Float):
    def core(self, q, k, v):
        k = k.masked_fill(torch.arange(k.shape[-1]) >= k.shape[-1] - 1, -torch.inf)
        return super().core(q, k, v)


class FirstBatch(Float):
    def core(self, q, k, v):
        return super().core(q, k[:1], v)


class DetachedKeys(Float):
    def core(self, q, k, v):
        return super().core(q, k.detach(), v)


class InTrainingOnly(Float):
    def scale(self, q):
        return super().scale(q) * (1 + 1e-6 * self.training)


class Quantised(LinearAttention):
    def wide(self, x):
        return (x * 64).round() / 64


MUTANTS = [
    ScaleOff, ScaleOffByRounding, OtherAxis, Temperature, WithoutBias, SmallResidual, CausalMask,
    FirstBatch, DetachedKeys, InTrainingOnly, Quantised,
]  # fmt: skip


@pytest.mark.parametrize("example", [None, X])
@pytest.mark.parametrize("kind", MUTANTS)
def test_another_formula_cannot_hide_in_the_rounding(kind, example):
    layers = nn.Sequential(Float(), kind())
    report = accelerate(layers, None if example is None else torch.randn(example))
    assert [f.kind for f in report.skipped] == [kind.__name__]
    assert report.skipped[0].error > 1e-9
    assert isinstance(layers[0], Accelerated)
    assert type(layers[1]) is kind


@torch.jit.script
def scripted(q: torch.Tensor) -> torch.Tensor:
    return q.float()


class Scripted(LinearAttention):
    def wide(self, x):
        return scripted(x)


def test_rounding_in_scripted_code_is_named():
    with pytest.warns(UserWarning, match="it may round to float32 in compiled or scripted code"):
        accelerate(Scripted())


def test_small_inputs_are_compared_in_one_thread():
    seen = []

    class Watched(Float):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return super().forward(x)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        accelerate(Watched())
        assert torch.get_num_threads() == 2
        assert set(seen) == {1}
    finally:
        torch.set_num_threads(before)
