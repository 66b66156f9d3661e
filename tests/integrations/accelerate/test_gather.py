"""accelerate() on the spatial gather of OCR heads: a module without parameters or children."""

import pytest
import torch
from torch import nn

from da_triton.integrations import accelerate, restore
from da_triton.integrations.accelerate.search import Accelerated
from support.numerics import relative_rms

FEATS, PROBS = (2, 12, 6, 7), (2, 5, 6, 7)


def inputs(dtype=torch.float32):
    return torch.randn(FEATS).to(dtype), torch.randn(PROBS).to(dtype)


class SpatialGather(nn.Module):
    """Yuan et al., 2020, equation 1: descriptors of classes, by softmax over positions."""

    def __init__(self, scale=None):
        super().__init__()
        if scale is not None:
            self.scale = scale

    def weights(self, probs):
        return (getattr(self, "scale", 1) * probs.flatten(2)).softmax(2)

    def forward(self, feats, probs):
        return (self.weights(probs) @ feats.flatten(2).mT).mT.unsqueeze(3)


class GatherByEinsum(SpatialGather):
    def forward(self, features, probs):
        return torch.einsum("nkl,ncl->nck", self.weights(probs), features.flatten(2))


class OcrGather(SpatialGather):
    def forward(self, feats, probs):
        return torch.bmm(self.weights(probs), feats.flatten(2).permute(0, 2, 1))


class GatherWithTruth(SpatialGather):
    def forward(self, feats, probs, truth=None):
        return super().forward(feats, probs if truth is None else truth)


class Head(nn.Module):
    """A small OCR head: probabilities of classes, their descriptors, and attention to these."""

    def __init__(self, gather, *others):
        super().__init__()
        self.pixels, self.classes = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 5, 1)
        self.gather, self.others = gather, others
        self.keys, self.last = nn.Conv2d(12, 12, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x):
        x = self.pixels(x)
        context = self.gather(x, self.classes(x), *self.others)
        weights = (x.flatten(2).mT @ self.keys(context).flatten(2)).softmax(2)
        seen = (weights @ context.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return self.last(torch.cat([x, seen], 1))


def gradients(module, *args):
    args = [x.clone().requires_grad_() for x in args]
    module.zero_grad()
    out = module(*args)
    out.square().sum().backward()
    return [out.detach(), *(x.grad for x in (*args, *module.parameters()))]


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("scale", [None, 1, 0.3, 2.0])
@pytest.mark.parametrize("kind", [SpatialGather, GatherByEinsum, OcrGather])
def test_gather_is_replaced_by_the_same_function(kind, scale, example):
    layer, args = kind(scale), inputs(torch.float64)
    before = gradients(layer, *args)
    (finding,) = accelerate(layer, args if example else None).replaced
    assert finding.family == "spatial gather (OCR)"
    assert finding.error < 1e-12
    for found, expected in zip(gradients(layer, *args), before, strict=True):
        assert found.shape == expected.shape
        assert relative_rms(found, expected) < 1e-12
    assert restore(layer) == [""]
    assert type(layer) is kind
    assert torch.equal(layer(*args), before[0])


@pytest.mark.parametrize("example", [False, True])
def test_a_whole_head(example):
    model, x = Head(SpatialGather(0.5)).double(), torch.randn(2, 3, 6, 7, dtype=torch.float64)
    before = [t.clone() for t in gradients(model, x)]
    report = accelerate(model, x if example else None)
    assert [f.name for f in report.replaced] == ["gather"]
    assert not report.skipped
    for found, expected in zip(gradients(model, x), before, strict=True):
        assert (found - expected).norm() <= 1e-10 * (1 + expected.norm())


@pytest.mark.parametrize("axes", [(9,), (2, 3, 4)])
def test_positions_of_one_and_three_axes(axes):
    layer = OcrGather(0.5)
    args = torch.randn(2, 12, *axes), torch.randn(2, 5, *axes)
    expected = layer(*args)
    assert len(accelerate(layer, args).replaced) == 1
    assert relative_rms(layer(*args), expected) < 1e-5


def test_the_scale_is_read_at_each_call():
    layer, args = SpatialGather(1), inputs()
    accelerate(layer)
    layer.scale = 3.0
    assert relative_rms(layer(*args), SpatialGather(3.0)(*args)) < 1e-5


def test_results_of_the_ocr_form_are_contiguous():
    layer, args = OcrGather(), inputs()
    accelerate(layer)
    assert layer(*args).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [SpatialGather, OcrGather])
def test_half_precision(kind, dtype):
    layer, args = kind(0.5), inputs(dtype)
    expected = layer(*args)
    exact = layer(*(x.double() for x in args))
    assert len(accelerate(layer, args).replaced) == 1
    found = layer(*args)
    assert found.dtype == dtype
    assert relative_rms(found, exact) <= 2 * relative_rms(expected, exact)


class PreciseGather(SpatialGather):
    """Computes and returns float32 for any input."""

    def forward(self, feats, probs):
        return super().forward(feats.float(), probs.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_compared_in_the_dtype_of_the_example(dtype):
    with pytest.warns(UserWarning, match=rf"{dtype} it returns torch.float32, the formula {dtype}"):
        accelerate(PreciseGather(), inputs(dtype))
    assert len(accelerate(PreciseGather(), inputs()).replaced) == 1


class GatherInFloat32(SpatialGather):
    def forward(self, feats, probs):
        with torch.autocast("cpu", enabled=False):
            return super().forward(feats, probs)


def test_a_gather_that_keeps_float32_under_autocast_is_left():
    with pytest.warns(UserWarning, match="it keeps float32 under autocast"):
        accelerate(GatherInFloat32(), inputs())


def test_interpreted_kernels_are_proved_too():
    layer = SpatialGather(0.5)
    args = torch.randn(2, 4, 3, 4), torch.randn(2, 3, 3, 4)
    expected = layer(*args)
    assert len(accelerate(layer, args, backend="triton").replaced) == 1
    assert relative_rms(layer(*args), expected) < 1e-5


def test_compiled_exported_and_traced():
    layer, args = SpatialGather(0.5), inputs()
    expected = layer(*args)
    accelerate(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(*args), expected) < 1e-5
    assert relative_rms(torch.export.export(layer, args).module()(*args), expected) < 1e-5
    assert relative_rms(torch.jit.trace(layer, args)(*args), expected) < 1e-5


class GatherOverClasses(SpatialGather):
    def weights(self, probs):
        return probs.flatten(2).softmax(1)


class GatherAllButScale(SpatialGather):
    def weights(self, probs):
        return (3 * self.scale * probs.flatten(2)).softmax(2)


class GatherWithSum(SpatialGather):
    def forward(self, feats, probs):
        return super().forward(feats, probs) + 1e-6 * feats.mean((2, 3))[:, :, None, None]


class GatherWithoutGradient(SpatialGather):
    def forward(self, feats, probs):
        return super().forward(feats, probs.detach())


class GatherResized(SpatialGather):
    def forward(self, feats, probs):
        return super().forward(feats, nn.functional.interpolate(probs, size=feats.shape[2:]))


class GatherPair(SpatialGather):
    def forward(self, feats, probs):
        return super().forward(feats, probs), probs


class GatherByIndex(SpatialGather):
    def forward(self, feats, index):
        return feats.gather(1, index)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (GatherOverClasses, "nearest formula's relative error is"),
        (GatherAllButScale, "nearest formula's relative error is"),
        (GatherWithSum, "nearest formula's relative error is"),
        (GatherWithoutGradient, "its gradients, .* differ by"),
        (GatherResized, "it also takes arguments of different sizes: its formula does not"),
        (GatherPair, "it returns tuple, not one tensor"),
        (GatherByIndex, r"does not take a random input of shape \(2, 6, 5, 6\): give accelerate"),
        (GatherWithTruth, "its forward also takes truth: give an example"),
    ],
)
def test_other_gathers_are_left(kind, why):
    layer = kind(0.5)
    with pytest.warns(UserWarning, match=why):
        accelerate(layer)
    assert type(layer) is kind


def test_an_example_with_other_positions():
    with pytest.warns(UserWarning, match="it also takes arguments of different sizes"):
        accelerate(GatherResized(), (torch.randn(FEATS), torch.randn(2, 5, 3, 4)))


def test_a_third_argument_at_its_default():
    layer, args = GatherWithTruth(), inputs()
    expected = layer(*args)
    assert len(accelerate(layer, args).replaced) == 1
    assert relative_rms(layer(*args, truth=None), expected) < 1e-5
    with pytest.raises(TypeError, match="GatherWithTruth by a formula without truth"):
        layer(*args, args[1])


def test_a_third_argument_in_the_example():
    with pytest.warns(UserWarning, match="it gets truth, which the formula lacks"):
        accelerate(Head(GatherWithTruth(), torch.randn(PROBS)), torch.randn(2, 3, 6, 7))


class Weighted(SpatialGather):
    """The same formula under an unknown class name."""


class GatherWithChild(SpatialGather):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()


class GatherWithParameter(SpatialGather):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class GatherOfOne(nn.Module):
    def forward(self, x, y=None):
        return x


class GatherOfThree(nn.Module):
    def forward(self, x, y, z):
        return x


@pytest.mark.parametrize(
    "kind",
    [Weighted, GatherWithChild, GatherWithParameter, GatherOfOne, GatherOfThree, nn.Identity],
)
def test_modules_that_are_not_candidates(kind):
    with pytest.warns(UserWarning, match="no layer that looks like double attention"):
        accelerate(nn.Sequential(kind()))


def test_two_scales_of_one_class():
    model = nn.ModuleList([SpatialGather(1), SpatialGather(2.0), GatherWithSum(1)])
    report = accelerate(model)
    assert [f.name for f in report.replaced] == ["0", "1"]
    assert isinstance(model[1], Accelerated)
