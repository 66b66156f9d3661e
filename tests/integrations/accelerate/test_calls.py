"""accelerate() and the ways in which a layer is called: arguments, shapes, hooks, progress."""

import copy

import pytest
import torch
from torch import nn

from da_triton.integrations import accelerate, restore
from da_triton.integrations.accelerate.search import Accelerated
from support import published
from support.numerics import relative_rms

X = (2, 12, 6, 7)


class Masked(published.LatentLinearAttention):
    """Linear attention that takes a mask, and is called without one."""

    def forward(self, x, mask=None, *, scale=1.0, name="none", **options):
        if mask is not None:
            x = x * mask
        return super().forward(x) * scale


class Passing(nn.Module):
    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, x):
        return self.layer(x, mask=self.mask)


def accelerated(layer):
    assert len(accelerate(layer, torch.randn(X)).replaced) == 1
    return layer


def test_arguments_at_their_default_are_accepted_by_position_and_by_keyword():
    layer, x = Masked(12), torch.randn(X)
    expected = layer(x)
    accelerated(layer)
    for args, kwargs in [
        ((x,), {}), ((x, None), {}), ((x,), {"mask": None}), ((), {"x": x}),
        ((), {"x": x, "mask": None, "scale": 1.0, "name": "none"}), ((x,), {"scale": 1}),
    ]:  # fmt: skip
        assert relative_rms(layer(*args, **kwargs), expected) < 1e-5


@pytest.mark.parametrize(
    ("args", "kwargs", "name"),
    [
        ((torch.ones(1, 1, 6, 7),), {}, "mask"),
        ((), {"mask": torch.ones(1, 1, 6, 7)}, "mask"),
        ((), {"mask": False}, "mask"),
        ((), {"scale": 2.0}, "scale"),
        ((), {"name": "other"}, "name"),
        ((), {"position": None}, "position"),
        ((torch.ones(1, 1, 6, 7),), {"scale": 2.0}, "mask, scale"),
    ],
)
def test_other_arguments_raise_an_error_that_names_the_remedy(args, kwargs, name):
    layer = accelerated(Masked(12))
    message = (
        rf"accelerate replaced this Masked by a formula without {name}: leave the argument out, "
        r"or call restore\(model\)\. With an example input in which the layer gets"
    )
    with pytest.raises(TypeError, match=message):
        layer(torch.randn(X), *args, **kwargs)
    restore(layer)
    layer(torch.randn(X), *args, **kwargs)


def test_calls_that_the_original_does_not_take_raise_its_own_error():
    layer = accelerated(Masked(12))
    x = torch.randn(X)
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        layer()
    with pytest.raises(TypeError, match="too many positional arguments"):
        layer(x, None, 1)
    with pytest.raises(TypeError, match="multiple values for argument 'mask'"):
        layer(x, None, mask=None)


def test_an_example_in_which_the_argument_is_at_its_default():
    assert len(accelerate(Passing(Masked(12), None), torch.randn(X)).replaced) == 1


def test_an_example_in_which_the_layer_gets_a_mask():
    with pytest.warns(UserWarning, match="it gets mask, which the formula lacks"):
        accelerate(Passing(Masked(12), torch.ones(2, 1, 6, 7)), torch.randn(X))


def test_arguments_in_compiled_and_exported_code():
    layer, x = accelerated(Masked(12)), torch.randn(X)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(x, mask=None), expected) < 1e-5
    program = torch.export.export(layer, (x,), {"mask": None})
    assert relative_rms(program.module()(x, mask=None), expected) < 1e-5


class TokenAttention(nn.Module):
    """Factor attention with the sizes under another name, and a later argument."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.crpe = PositionTerm()

    def forward(self, tokens, hw, mask=None):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        z = q @ (k.softmax(2).transpose(2, 3) @ v) / 2 + self.crpe(q, v, size=hw)
        return self.proj(z.transpose(1, 2).flatten(2))


class PositionTerm(nn.Module):
    def forward(self, q, v, size):
        return q * v / size[0]


def test_layers_of_two_arguments():
    layer, x = TokenAttention(), torch.randn(2, 1 + 2 * 3, 8)
    expected = layer(x, (2, 3))
    assert len(accelerate(layer, (x, (2, 3))).replaced) == 1
    assert relative_rms(layer(x, hw=(2, 3), mask=None), expected) < 1e-5
    assert relative_rms(layer(hw=(2, 3), tokens=x), expected) < 1e-5
    with pytest.raises(TypeError, match="TokenAttention by a formula without mask"):
        layer(x, (2, 3), x)


class ByFrame(published.LatentLinearAttention):
    """Linear attention of each frame: (N, C, T, H, W), or with ``axis`` 1 (N, T, C, H, W)."""

    def __init__(self, dim, axis=2):
        super().__init__(dim)
        self.axis = axis

    def forward(self, x):
        assert x.dim() == 5
        batch, frames = x.shape[0], x.shape[self.axis]
        y = super().forward(x.movedim(self.axis, 1).flatten(0, 1))
        return y.unflatten(0, (batch, frames)).movedim(1, self.axis)


class ThreeFrames(ByFrame):
    def forward(self, x):
        assert x.shape[self.axis] == 3
        return super().forward(x)


class FramesTogether(ByFrame):
    """One softmax over the positions of all frames."""

    def forward(self, x):
        return published.LatentLinearAttention.forward(self, x.flatten(3)).view_as(x)


@pytest.mark.parametrize("kind", [ByFrame, ThreeFrames])
@pytest.mark.parametrize("axis", [1, 2])
def test_frames_of_a_video(kind, axis):
    layer = kind(12, axis)
    x = torch.randn(2, 12, 3, 6, 7).movedim(2, axis)
    expected = layer(x)
    (finding,) = accelerate(layer, x).replaced
    assert "proved frame by frame on random inputs and on the example" in finding.note
    assert relative_rms(layer(x), expected) < 1e-5
    assert relative_rms(copy.deepcopy(layer)(x), expected) < 1e-5


def test_frames_of_a_batch_of_one():
    layer, x = ByFrame(12), torch.randn(1, 12, 4, 9, 10)
    expected = layer(x)
    assert len(accelerate(layer, x).replaced) == 1
    assert relative_rms(layer(x), expected) < 1e-5


def test_frames_that_see_each_other_are_not_frame_by_frame():
    with pytest.warns(UserWarning, match="nearest formula's relative error is"):
        accelerate(FramesTogether(12), torch.randn(2, 12, 3, 6, 7))


class MeanOverFrames(ByFrame):
    def forward(self, x):
        return super().forward(x) + 1e-6 * x.mean(self.axis, keepdim=True)


def test_a_small_term_between_frames_is_found():
    with pytest.warns(UserWarning, match="nearest formula's relative error is"):
        accelerate(MeanOverFrames(12), torch.randn(2, 12, 3, 6, 7))


class FlattenedFrames(published.LatentLinearAttention):
    """Frames of a clip as its batch, which has to be a multiple of four."""

    def forward(self, x):
        return super().forward(x.unflatten(0, (-1, 4)).flatten(0, 1))


def test_frames_that_arrive_as_a_batch():
    layer, x = FlattenedFrames(12), torch.randn(8, 12, 6, 7)
    expected = layer(x)
    assert len(accelerate(layer, x).replaced) == 1
    assert relative_rms(layer(x), expected) < 1e-5


class FixedPositions(published.LatentLinearAttention):
    def forward(self, x):
        return super().forward(x.view(-1, 12, 8, 8))


@pytest.mark.parametrize("kind", [ByFrame, FlattenedFrames, FixedPositions])
def test_shapes_that_only_an_example_shows(kind):
    message = r"does not take a random input of shape \(2, 12, 5, 6\): give accelerate an example"
    with pytest.warns(UserWarning, match=message):
        accelerate(kind(12))


def test_a_layer_of_fixed_positions():
    layer, x = FixedPositions(12), torch.randn(3, 12, 8, 8)
    expected = layer(x)
    assert len(accelerate(layer, x).replaced) == 1
    assert relative_rms(layer(x), expected) < 1e-5


@pytest.mark.parametrize("example", [None, X])
def test_weights_on_the_meta_device(example):
    with torch.device("meta"):
        model = nn.Sequential(published.LatentLinearAttention(12))
    with pytest.warns(
        UserWarning, match="on the meta device .* load the model onto a CPU or a GPU"
    ):
        accelerate(model, None if example is None else torch.randn(example))


def test_one_layer_on_the_meta_device_leaves_the_others():
    model = nn.Sequential(published.LatentLinearAttention(12), published.LatentLinearAttention(12))
    model[1].to_out.to("meta")
    report = accelerate(model)
    assert ([f.name for f in report.replaced], [f.name for f in report.skipped]) == (["0"], ["1"])


def test_progress(capsys):
    model = nn.Sequential(
        published.LatentLinearAttention(12), published.SoftmaxOverTheBatch(12, 8, 5)
    )
    seen = []
    report = accelerate(model, progress=lambda *args: seen.append(args))
    assert seen == [(1, 2, report.replaced[0]), (2, 2, report.skipped[0])]
    assert capsys.readouterr() == ("", "")
    restore(model)
    accelerate(model, progress=True)
    out, error = capsys.readouterr()
    assert out == ""
    lines = error.splitlines()
    assert lines[0].startswith("accelerate 1/2: 0: proved on random inputs")
    assert lines[1].startswith("accelerate 2/2: 1: its softmaxes run over the batch")


def test_the_formula_of_a_class_is_tried_first_and_still_proved():
    class Off(published.LatentLinearAttention):
        factor = 1.0

        def forward(self, x):
            return super().forward(x) * self.factor

    model = nn.Sequential(Off(12), Off(12), Off(12))
    model[1].factor = 1 + 1e-6
    report = accelerate(model)
    assert [f.name for f in report.replaced] == ["0", "2"]
    assert isinstance(model[2], Accelerated)
    assert type(model[1]) is Off
