"""accelerate() on layers written from published formulas."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import accelerate, restore
from da_triton.integrations.accelerate.patterns import EfficientAttention
from da_triton.integrations.accelerate.search import Accelerated
from support import published
from support.numerics import relative_rms

X = (2, 12, 6, 7)
SAME = {
    **{
        f"double_{last}_{residual}": lambda last=last, residual=residual: (
            published.DoubleAttentionCopy(12, 12 if last is None else 8, 5, last, residual)
        )
        for last in ("conv_reconstruct", "proj", "convC", "convZ", None)
        for residual in (False, True)
    },
    "efficient": lambda: published.EfficientAttention(12, 8, 2, 10),
    "efficient_plain": lambda: published.EfficientAttention(12, 8, 1, 10, residual=False),
    "latent": lambda: published.LatentLinearAttention(12),
    "image": lambda: published.ImageLinearAttention(12),
    "image_raw_queries": lambda: published.ImageLinearAttention(12, norm_queries=False),
    "context_both": lambda: published.ContextBlock(12, 4),
    "context_add": lambda: published.ContextBlock(12, 4, multiply=False),
    "context_multiply": lambda: published.ContextBlock(12, 4, add=False),
}


def net(layer):
    return nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), layer)


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("name", SAME)
def test_layer_is_replaced_by_the_same_function(name):
    model = net(SAME[name]()).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    before, keys = gradients(model, x), list(model.state_dict())
    parameters, layer = list(model.parameters()), model[2]
    report = accelerate(model, x)
    assert [f.name for f in report.replaced] == ["2"]
    assert not report.skipped
    assert report.replaced[0].error < 1e-12
    assert model[2] is layer
    assert isinstance(layer, Accelerated)
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for found, expected in zip(gradients(model, x), before, strict=True):
        # bias_b's gradient is zero, the original's up to rounding
        assert (found - expected).norm() <= 1e-10 * (1 + expected.norm())
    assert restore(model) == ["2"]
    assert type(layer) is type(SAME[name]())
    assert all(map(torch.equal, gradients(model, x)[:1], before[:1]))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_positions_of_one_and_three_axes(kind):
    layer = published.DoubleAttentionCopy(6, 4, 3, "proj", conv=kind)
    x = torch.randn(2, 6, *((9,) if kind is nn.Conv1d else (2, 3, 4)))
    model = nn.Sequential(layer)
    before = model(x)
    assert len(accelerate(model, x).replaced) == 1
    assert relative_rms(model(x), before) < 1e-5


@pytest.mark.parametrize("residual", [False, True])
def test_softmax_over_the_batch_is_rejected_and_explained(residual):
    layer = published.SoftmaxOverTheBatch(12, 8, 5, residual=residual)
    with pytest.warns(UserWarning, match="replaced nothing"):
        report = accelerate(net(layer))
    (finding,) = report.skipped
    assert "run over the batch" in finding.note
    assert "trained again" in finding.note
    assert type(layer) is published.SoftmaxOverTheBatch
    assert "run over the batch" in str(report)


def test_two_softmaxes_over_positions_are_rejected_and_explained():
    with pytest.warns(UserWarning, match="second softmax runs over positions"):
        accelerate(net(published.SoftmaxOverPositionsTwice(12, 8, 5)))


class HalfTheLogits(published.DoubleAttentionCopy):
    def weights(self, b, v):
        return (b / 2).softmax(2), v.softmax(1)


class DifferentInTraining(published.DoubleAttentionCopy):
    def weights(self, b, v):
        b, v = super().weights(b, v)
        return F_dropout(b, self.training), v


def F_dropout(x, training):  # noqa: N802
    return nn.functional.dropout(x, 0.5, training)


class NoGradientForB(published.DoubleAttentionCopy):
    def weights(self, b, v):
        return super().weights(b.detach(), v)


class OtherOnLargeInputs(published.DoubleAttentionCopy):
    """Double attention on small inputs, and something else on large ones."""

    def weights(self, b, v):
        if b.shape[2] > 100:
            b = b.masked_fill(b < b.mean(2, keepdim=True), -torch.inf)
        return super().weights(b, v)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (HalfTheLogits, "nearest formula's relative error"),
        (DifferentInTraining, "nearest formula's relative error"),
        (NoGradientForB, "differ by"),
    ],
)
def test_what_is_only_similar_is_rejected(kind, why):
    with pytest.warns(UserWarning, match="replaced nothing"):
        (finding,) = accelerate(net(kind(12, 8, 5))).skipped
    assert why in finding.note
    assert finding.error > 1e-4


def test_the_example_shows_what_random_inputs_do_not():
    layer = OtherOnLargeInputs(12, 8, 5)
    model = net(layer)
    with pytest.warns(UserWarning, match="answer to the example"):
        accelerate(model, torch.randn(1, 3, 12, 12))
    assert len(accelerate(model, torch.randn(1, 3, 6, 6)).replaced) == 1


def test_arguments_that_ours_lacks_are_rejected():
    class WithTemperature(published.DoubleAttentionCopy):
        def forward(self, x, temperature=1.0):
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WithTemperature(12, 8, 5)

        def forward(self, x):
            return self.layer(x, temperature=2.0)

    with pytest.warns(UserWarning, match="it gets temperature, which the formula lacks"):
        accelerate(Net(), torch.randn(X))


def test_without_an_example_other_arguments_are_rejected_too():
    class WithTemperature(published.DoubleAttentionCopy):
        def forward(self, x, temperature=1.0):
            return super().forward(x)

    with pytest.warns(UserWarning, match="also takes temperature: give an example"):
        accelerate(net(WithTemperature(12, 8, 5)))


class SeveralCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = OtherOnLargeInputs(12, 8, 5)

    def forward(self, x):
        return self.layer(nn.functional.avg_pool2d(x, 2)).mean() + self.layer(x)


def test_every_form_of_call_in_the_example_is_compared():
    with pytest.warns(UserWarning, match="answer to the example"):
        accelerate(SeveralCalls(), torch.randn(2, 12, 12, 12))


class LogOfInput(published.DoubleAttentionCopy):
    def forward(self, x):
        return super().forward(x.log())


class WithBuffer(published.DoubleAttentionCopy):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("temperature", torch.ones(()))

    def weights(self, b, v):
        return super().weights(b * self.temperature, v)


class WithAverage(published.DoubleAttentionCopy):
    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.mean().detach(), 0.1)
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (LogOfInput, "not finite"),
        (WithBuffer, "nearest formula's relative error"),
        (WithAverage, "changes its own state"),
    ],
)
def test_what_proves_nothing_is_not_believed(kind, why):
    with pytest.warns(UserWarning, match=why):
        accelerate(nn.Sequential(kind(12, 8, 5)))


class Merging(nn.Module):
    """train() does more than set a flag, as low-rank adapters merge their weights."""

    def __init__(self):
        super().__init__()
        self.layer = published.DoubleAttentionCopy(12, 8, 5)
        self.merged = False
        self.register_buffer("calls", torch.zeros(()))

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        self.calls += 1
        return self.layer(x + 0.1 * torch.randn_like(x))


def test_the_example_leaves_modes_buffers_and_generators():
    model = Merging()
    state = torch.get_rng_state()
    assert len(accelerate(model, torch.randn(X, generator=torch.Generator())).replaced) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.merged, model.calls.item()) == (True, False, 0)


def test_a_class_that_changed_since_is_not_restored():
    layer = published.EfficientAttention(12, 8, 2, 10)
    model = net(layer)
    accelerate(model)
    layer.register_parameter("gain", nn.Parameter(torch.ones(2)))
    torch.nn.utils.parametrize.register_parametrization(layer, "gain", nn.Identity())
    with pytest.raises(RuntimeError, match="was changed after accelerate"):
        restore(model)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "gain")
    assert restore(model) == ["2"]


def test_hooks_that_cannot_be_copied():
    layer = published.EfficientAttention(12, 8, 2, 10)
    calls = []
    with open(__file__) as file:
        layer.register_forward_hook(lambda *_, file=file: calls.append(file))
        layer.register_full_backward_pre_hook(lambda *_: calls.append(1))
        assert len(accelerate(net(layer)).replaced) == 1
    assert not calls
    assert len(layer._forward_hooks) == 1


def test_signature_and_export():
    layer = published.DoubleAttentionCopy(12, 8, 5)
    accelerate(layer)
    x = torch.randn(X)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    assert relative_rms(program.module()(x), layer(x)) < 1e-5


@pytest.mark.parametrize("make", [published.LatentLinearAttention, published.ImageLinearAttention])
def test_traced(make):
    layer = make(12)
    accelerate(layer)
    x = torch.randn(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, x)
    assert relative_rms(traced(x), layer(x)) < 1e-5


def test_a_model_without_such_layers_warns():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DoubleAttention(4))
    with pytest.warns(UserWarning, match="no layer that looks like double attention"):
        report = accelerate(model)
    assert (report.replaced, report.skipped) == ([], [])
    with pytest.warns(UserWarning, match="no accelerated layer"):
        assert restore(model) == []


def test_instance_forward_is_rejected():
    layer = published.DoubleAttentionCopy(12, 8, 5)
    layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="replaced on the instance"):
        accelerate(net(layer))


def test_wrong_backend_is_rejected():
    with pytest.raises(ValueError, match="backend"):
        accelerate(net(SAME["latent"]()), backend="cuda")


def test_the_model_is_left_as_it_was():
    model = net(published.LatentLinearAttention(12))
    model[0].eval()
    model[2].to_out.requires_grad_(False)
    x = torch.randn(2, 3, 6, 7)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    accelerate(model, x)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_hooks_on_the_layer_and_its_children_run():
    seen = []
    layer = published.DoubleAttentionCopy(12, 8, 5)
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    layer.convB.register_forward_hook(lambda *_: seen.append("child"))
    model = net(layer)
    accelerate(model)
    seen.clear()
    model(torch.randn(2, 3, 6, 7))
    assert seen == ["child", "layer"]


def test_copies_and_files():
    model = nn.Sequential(published.EfficientAttention(12, 8, 2, 10))
    accelerate(model)
    x = torch.randn(X)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    )
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert isinstance(twin[0], Accelerated)
        assert twin[0] is not model[0]
        restore(twin)
        assert type(twin[0]) is published.EfficientAttention
    assert isinstance(model[0], Accelerated)


def test_a_layer_in_two_places_is_one_layer():
    layer = published.DoubleAttentionCopy(12, 8, 5)
    model = nn.Sequential(layer, layer)
    assert len(accelerate(model).replaced) == 1
    assert len(restore(model)) == 1


def test_the_model_itself_may_be_the_layer():
    layer = published.LatentLinearAttention(12)
    x = torch.randn(X)
    expected = layer(x)
    assert "(the model)" in str(accelerate(layer, (x,)))
    assert relative_rms(layer(x), expected) < 1e-5
    with pytest.warns(UserWarning, match="1 layers are accelerated already"):
        accelerate(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_of_low_precision(dtype):
    model = nn.Sequential(published.DoubleAttentionCopy(12, 8, 5)).to(dtype)
    x = torch.randn(X, dtype=dtype)
    expected = model(x)
    assert len(accelerate(model, x).replaced) == 1
    assert model(x).dtype == dtype
    assert relative_rms(model(x), expected) < 0.03


def test_zero_weights_prove_nothing_and_are_not_believed():
    layer = published.SoftmaxOverTheBatch(12, 8, 5, residual=True)
    nn.init.zeros_(layer.conv_reconstruct.weight)
    nn.init.zeros_(layer.conv_reconstruct.bias)
    with pytest.warns(UserWarning, match="run over the batch"):
        accelerate(net(layer), torch.randn(2, 3, 6, 7))


def test_interpreted_kernels_are_proved_too():
    layer = published.EfficientAttention(4, 4, 2, 4)
    model = nn.Sequential(layer)
    x = torch.randn(2, 4, 3, 4)
    expected = model(x)
    assert len(accelerate(model, backend="triton").replaced) == 1
    assert layer._accelerated.backend == "triton"
    assert relative_rms(model(x), expected) < 1e-5


def test_compiled_in_one_graph():
    model = net(published.EfficientAttention(12, 8, 2, 10)).eval()
    x = torch.randn(2, 3, 6, 7)
    expected = model(x)
    accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(x), expected) < 1e-5


def test_what_is_right_in_float64_alone_is_rejected(monkeypatch):
    exact = EfficientAttention.forward

    def rough(module, x, **options):
        out = exact(module, x, **options)
        return out if x.dtype == torch.float64 else 1.001 * out

    monkeypatch.setattr(EfficientAttention, "forward", rough)
    with pytest.warns(UserWarning, match=r"in torch.float32 its relative error would be 1.0e-03"):
        accelerate(net(published.EfficientAttention(12, 8, 2, 10)))
