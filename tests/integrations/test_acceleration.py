"""accelerate() on layers written from published formulas, and on the real packages."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import accelerate, restore
from da_triton.integrations.acceleration import Accelerated
from da_triton.integrations.families import EfficientAttention
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
    assert not report.refused
    assert report.replaced[0].error < 1e-12
    assert model[2] is layer
    assert isinstance(layer, Accelerated)
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    for found, expected in zip(gradients(model, x), before, strict=True):
        # bias_b's gradient is zero, theirs but for rounding
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
def test_softmax_over_the_batch_is_refused_and_explained(residual):
    layer = published.SoftmaxOverTheBatch(12, 8, 5, residual=residual)
    with pytest.warns(UserWarning, match="replaced nothing"):
        report = accelerate(net(layer))
    (finding,) = report.refused
    assert "run over the batch" in finding.note
    assert "trained again" in finding.note
    assert type(layer) is published.SoftmaxOverTheBatch
    assert "run over the batch" in str(report)


def test_two_softmaxes_over_positions_are_refused_and_explained():
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


class TopOfLargeMaps(published.DoubleAttentionCopy):
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
def test_what_is_only_similar_is_refused(kind, why):
    with pytest.warns(UserWarning, match="replaced nothing"):
        (finding,) = accelerate(net(kind(12, 8, 5))).refused
    assert why in finding.note
    assert finding.error > 1e-4


def test_the_example_shows_what_random_inputs_do_not():
    layer = TopOfLargeMaps(12, 8, 5)
    model = net(layer)
    with pytest.warns(UserWarning, match="answer to the example"):
        accelerate(model, torch.randn(1, 3, 12, 12))
    assert len(accelerate(model, torch.randn(1, 3, 6, 6)).replaced) == 1


def test_arguments_that_ours_lacks_are_refused():
    class WithTemperature(published.DoubleAttentionCopy):
        def forward(self, x, temperature=1.0):
            return super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = WithTemperature(12, 8, 5)

        def forward(self, x):
            return self.layer(x, temperature=2.0)

    with pytest.warns(UserWarning, match="arguments that ours lacks"):
        accelerate(Net(), torch.randn(X))


def test_nothing_there_is_loud():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DoubleAttention(4))
    with pytest.warns(UserWarning, match="no layer that looks like double attention"):
        report = accelerate(model)
    assert (report.replaced, report.refused) == ([], [])
    with pytest.warns(UserWarning, match="no accelerated layer"):
        assert restore(model) == []


def test_instance_forward_is_refused():
    layer = published.DoubleAttentionCopy(12, 8, 5)
    layer.forward = lambda x: x
    with pytest.warns(UserWarning, match="replaced on the instance"):
        accelerate(net(layer))


def test_wrong_backend_is_refused():
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
    with pytest.warns(UserWarning, match="replaced nothing"):  # it is done already
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


def test_what_is_right_in_float64_alone_is_refused(monkeypatch):
    exact = EfficientAttention.forward

    def rough(module, x, **options):
        out = exact(module, x, **options)
        return out if x.dtype == torch.float64 else 1.001 * out

    monkeypatch.setattr(EfficientAttention, "forward", rough)
    with pytest.warns(UserWarning, match=r"in torch.float32 its relative error would be 1.0e-03"):
        accelerate(net(published.EfficientAttention(12, 8, 2, 10)))


# -- the real packages -----------------------------------------------------------------------------


def test_denoising_diffusion_unet():
    from denoising_diffusion_pytorch import Unet

    model = Unet(dim=16, dim_mults=(1, 2, 4), dropout=0.1)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 500])
    before = model.eval()(x, t)
    report = accelerate(model, (x, t))
    assert [f.name for f in report.replaced] == ["downs.0.2", "downs.1.2", "ups.1.2", "ups.2.2"]
    assert [f.name for f in report.refused] == ["downs.2.2", "ups.0.2", "mid_attn"]
    assert all("quadratic" in f.note for f in report.refused)
    assert relative_rms(model(x, t), before) < 1e-5
    model.train()(x, t).square().mean().backward()
    assert model.downs[0][2].mem_kv.grad.abs().sum() > 0
    restore(model)
    assert torch.equal(model.eval()(x, t), before)


@pytest.mark.parametrize(
    "module",
    ["denoising_diffusion_pytorch_1d", "simple_diffusion", "classifier_free_guidance",
     "repaint", "guided_diffusion"],
)  # fmt: skip
def test_every_linear_attention_of_the_package(module):
    found = importlib.import_module(f"denoising_diffusion_pytorch.{module}").LinearAttention(16)
    model = nn.Sequential(found)
    x = torch.randn(2, 16, *((30,) if module.endswith("1d") else (5, 6)))
    before = model(x)
    assert len(accelerate(model, x).replaced) == 1
    assert relative_rms(model(x), before) < 1e-5


def test_coat():
    import timm

    model = timm.create_model(
        "coat_tiny", img_size=32, num_classes=5, serial_depths=(1, 1, 1, 1), parallel_depth=1
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    before = model(x)
    report = accelerate(model, x)
    assert len(report.replaced) == 7
    assert not report.refused
    assert {f.kind for f in report.replaced} == {"FactorAttnConvRelPosEnc"}
    assert relative_rms(model(x), before) < 1e-5


def test_global_context_of_timm():
    from timm.layers import GlobalContext

    layers = nn.Sequential(GlobalContext(64), GlobalContext(64, fuse_add=True, fuse_scale=False))
    nn.init.normal_(layers[1].mlp_add.fc2.weight)
    x = torch.randn(2, 64, 6, 7)
    before = layers(x)
    assert len(accelerate(layers, x).replaced) == 2
    assert relative_rms(layers(x), before) < 1e-5
    with pytest.warns(UserWarning, match="no layer"):
        accelerate(nn.Sequential(GlobalContext(12, use_attn=False)))
