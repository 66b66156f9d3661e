"""accelerate() on the real packages."""

import importlib

import pytest
import torch
from torch import nn

from da_triton.integrations import accelerate, restore
from support.numerics import relative_rms

X = (2, 12, 6, 7)


def test_denoising_diffusion_unet():
    from denoising_diffusion_pytorch import Unet

    model = Unet(dim=16, dim_mults=(1, 2, 4), dropout=0.1)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 500])
    before = model.eval()(x, t)
    report = accelerate(model, (x, t))
    assert [f.name for f in report.replaced] == ["downs.0.2", "downs.1.2", "ups.1.2", "ups.2.2"]
    assert [f.name for f in report.skipped] == ["downs.2.2", "ups.0.2", "mid_attn"]
    assert all("quadratic" in f.note for f in report.skipped)
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
    assert not report.skipped
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


def attention():
    from denoising_diffusion_pytorch.denoising_diffusion_pytorch import LinearAttention

    return nn.Sequential(LinearAttention(16), nn.Conv2d(16, 16, 1))


def test_offloaded_weights():
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, x = attention(), torch.randn(2, 16, 5, 6)
    expected = model(x)
    cpu_offload(model, torch.device("cpu"))
    message = (
        r"on the meta device \(offloaded, or not loaded yet\), where nothing can be compared: call "
        r"remove_hook_from_submodules\(model\) of accelerate.hooks, then accelerate, then offload"
    )
    with pytest.warns(UserWarning, match=message):
        accelerate(model, x)
    remove_hook_from_submodules(model)
    assert len(accelerate(model, x).replaced) == 1
    cpu_offload(model, torch.device("cpu"))
    assert relative_rms(model(x), expected) < 1e-5
    with pytest.raises(RuntimeError, match="forward of '0' was replaced on the instance after"):
        restore(model)
    remove_hook_from_submodules(model)
    assert restore(model) == ["0"]
    assert torch.equal(model(x), expected)


def test_a_layer_with_a_hook_that_moves_its_inputs():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, x = attention(), torch.randn(2, 16, 5, 6)
    expected = model(x)
    add_hook_to_module(model[0], AlignDevicesHook("cpu", io_same_device=True))
    with pytest.warns(UserWarning, match="replaced on the instance by a hook of the accelerate"):
        accelerate(model, x)
    remove_hook_from_module(model[0])
    assert len(accelerate(model, x).replaced) == 1
    add_hook_to_module(model[0], AlignDevicesHook("cpu", io_same_device=True))
    assert relative_rms(model(x), expected) < 1e-5


def test_hooks_that_move_the_inputs_of_children():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, x = attention(), torch.randn(2, 16, 5, 6)
    expected = model(x)
    add_hook_to_module(model[0].to_qkv, AlignDevicesHook("cpu", io_same_device=True))
    assert len(accelerate(model, x).replaced) == 1
    assert relative_rms(model(x), expected) < 1e-5
