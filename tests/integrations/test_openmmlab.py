"""The plugin registry of OpenMMLab: the real mmengine and mmcv-lite."""

import sys

import pytest
import torch
from mmcv.cnn import build_plugin_layer
from mmengine.config import ConfigDict
from mmengine.model import BaseModule, Sequential
from mmengine.registry import MODELS, Registry
from torch import nn

from da_triton.integrations import ResidualDoubleAttention, insert_double_attention
from da_triton.integrations.openmmlab import NAME, PluginDoubleAttention, register_openmmlab

CONFIG = {"type": NAME, "c_m": 8, "heads": 2}


@pytest.fixture(autouse=True)
def _registry():
    """Each test finds the registry as a fresh process has it."""
    MODELS.module_dict.pop(NAME, None)
    yield
    MODELS.module_dict.pop(NAME, None)


class Residual(BaseModule):
    """A residual block with plugins, as the backbones of OpenMMLab make them."""

    def __init__(self, channels, plugins, init_cfg=None):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.names = []
        for plugin in plugins:
            plugin = plugin.copy()
            postfix = plugin.pop("postfix", "")
            name, layer = build_plugin_layer(plugin, in_channels=channels, postfix=postfix)
            self.add_module(name, layer)
            self.names.append(name)

    def forward(self, x):
        out = self.norm(self.conv(x))
        for name in self.names:
            out = getattr(self, name)(out)
        out += x
        return self.relu(out)


def test_the_block_is_a_plugin_layer():
    assert register_openmmlab() is PluginDoubleAttention
    name, layer = build_plugin_layer(CONFIG, in_channels=32, postfix=1)
    assert name == "double_attention1"
    assert isinstance(layer, ResidualDoubleAttention)
    attention = layer.attention
    assert (attention.in_channels, attention.c_m, attention.c_n) == (32, 8, 16)
    assert attention.heads == 2
    x = torch.randn(2, 32, 5, 6)
    assert torch.equal(layer(x), x)
    assert not torch.allclose(MODELS.build({**CONFIG, "in_channels": 32, "zero_init": False})(x), x)


def test_a_registry_of_another_library_knows_it():
    child = Registry("models of a library", parent=MODELS, scope="a_library")
    try:
        assert child.get(NAME) is None
        register_openmmlab()
        assert child.get(NAME) is PluginDoubleAttention
    finally:
        del MODELS.children["a_library"]


def test_without_registration_the_name_is_unknown():
    with pytest.raises(KeyError):
        build_plugin_layer(CONFIG, in_channels=32)


def test_a_second_registration_does_nothing():
    register_openmmlab()
    size = len(MODELS)
    assert register_openmmlab() is PluginDoubleAttention
    assert len(MODELS) == size


def test_a_taken_name_is_rejected():
    MODELS.register_module(name=NAME, module=nn.Identity)
    with pytest.raises(RuntimeError, match=r"Identity.*module_dict\.pop"):
        register_openmmlab()
    assert MODELS.get(NAME) is nn.Identity


def test_missing_mmengine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmengine.registry", None)
    with pytest.raises(ImportError, match="pip install mmengine"):
        register_openmmlab()


def test_a_backbone_with_plugins_trains():
    register_openmmlab()
    model = Sequential(Residual(16, [{**CONFIG, "postfix": 1}, {**CONFIG, "postfix": 2}]))
    assert {"0.double_attention1.norm.weight", "0.double_attention2.attention.convA.weight"} <= set(
        model.state_dict()
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 16, 5, 6)).square().mean().backward()
        optimizer.step()
    for layer in (model[0].double_attention1, model[0].double_attention2):
        assert layer.norm.weight.any()
        assert layer.attention.convA.weight.grad.any()


KAIMING = [
    {"type": "Kaiming", "layer": "Conv2d"},
    {"type": "Constant", "val": 1, "layer": ["_BatchNorm", "GroupNorm"]},
]


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("zero_init", [True, False])
def test_the_block_is_the_identity_after_the_model_is_initialised(norm, zero_init):
    """``KAIMING`` initialises all convolutions and norms in mmdet's and mmseg's ResNets."""
    register_openmmlab()
    plugin = {**CONFIG, "norm": norm, "zero_init": zero_init}
    model = Sequential(Residual(16, [plugin]), init_cfg=KAIMING)
    before = model[0].double_attention.attention.convA.weight.clone()
    model.init_weights()
    layer = model[0].double_attention
    assert not torch.equal(layer.attention.convA.weight, before)
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(layer(x), x) == zero_init


def test_pretrained_weights_are_loaded_after_the_initialisation(tmp_path):
    register_openmmlab()
    plain = Sequential(Residual(16, []))
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    pretrained = {"type": "Pretrained", "checkpoint": str(tmp_path / "plain.pth")}
    model = Sequential(Residual(16, [CONFIG]), init_cfg=[*KAIMING, pretrained])
    model.init_weights()
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(model.eval()(x), plain.eval()(x))


# -- norm_cfg --------------------------------------------------------------------------------------

NORMS = [
    ({"type": "GN", "num_groups": 4}, nn.GroupNorm, {"num_groups": 4, "eps": 1e-5}),
    ({"type": "BN", "eps": 1e-3, "momentum": 0.01}, nn.BatchNorm2d, {"eps": 1e-3}),
    ({"type": "SyncBN"}, nn.SyncBatchNorm, {}),
    ({"type": "BN3d"}, nn.BatchNorm3d, {}),
    ({"type": "IN", "affine": True}, nn.InstanceNorm2d, {}),
    (ConfigDict(type="BN", requires_grad=True), nn.BatchNorm2d, {}),
]


@pytest.mark.parametrize(("cfg", "kind", "values"), NORMS)
def test_norm_cfg_as_other_layers_take_it(cfg, kind, values):
    register_openmmlab()
    before = dict(cfg)
    _, layer = build_plugin_layer({**CONFIG, "norm_cfg": cfg}, in_channels=16)
    assert isinstance(layer.norm, kind)
    assert {name: getattr(layer.norm, name) for name in values} == values
    assert dict(cfg) == before
    x = torch.randn(2, 16, 3, 5, 6) if kind is nn.BatchNorm3d else torch.randn(2, 16, 5, 6)
    assert torch.equal(layer.eval()(x), x)


def test_norm_cfg_none_is_no_norm_and_none_given_is_a_batch_norm():
    register_openmmlab()
    assert MODELS.build({**CONFIG, "in_channels": 16, "norm_cfg": None}).norm is None
    assert type(MODELS.build({**CONFIG, "in_channels": 16}).norm) is nn.BatchNorm2d


@pytest.mark.parametrize("norm", ["batch", None])
def test_norm_and_norm_cfg_exclude_each_other(norm):
    message = r"norm and norm_cfg both choose the norm, got norm=.* and norm_cfg=\{'type': 'BN'\}"
    with pytest.raises(ValueError, match=message):
        PluginDoubleAttention(16, norm=norm, norm_cfg={"type": "BN"})


def test_a_frozen_norm_needs_a_start_other_than_zero():
    cfg = {"type": "BN", "requires_grad": False}
    with pytest.raises(ValueError, match="got BatchNorm2d, whose weight is missing or frozen"):
        PluginDoubleAttention(16, norm_cfg=cfg)
    layer = PluginDoubleAttention(16, norm_cfg=cfg, zero_init=False)
    assert not any(p.requires_grad for p in layer.norm.parameters())
    assert (layer.norm.weight == 1).all()


def test_norm_cfg_of_an_unknown_norm_gets_the_message_of_the_library():
    with pytest.raises(KeyError, match="Cannot find"):
        PluginDoubleAttention(16, norm_cfg={"type": "NoNorm"})


def test_norm_cfg_without_mmcv_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv.cnn", None)
    with pytest.raises(ImportError, match="pip install mmcv-lite"):
        PluginDoubleAttention(16, norm_cfg={"type": "BN"})


@pytest.mark.parametrize("cfg", [{"type": "GN", "num_groups": 4}, {"type": "SyncBN"}])
def test_norm_cfg_and_the_initialisation_of_the_model(cfg):
    register_openmmlab()
    model = Sequential(Residual(16, [{**CONFIG, "norm_cfg": cfg}]), init_cfg=KAIMING)
    model.init_weights()
    x = torch.randn(2, 16, 5, 6)
    layer = model[0].double_attention.eval()
    assert torch.equal(layer(x), x)


def test_an_inserted_block_is_the_identity_after_the_model_is_initialised():
    model = Sequential(Residual(16, []), init_cfg=KAIMING)
    insert_double_attention(model, ["0"])
    model.init_weights()
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(model[0].double_attention(x), x)


def test_a_stage_that_is_frozen_before_the_initialisation():
    """The backbones of OpenMMLab freeze their first stages when they are built."""
    register_openmmlab()
    model = Sequential(Residual(16, [CONFIG]), init_cfg=KAIMING).requires_grad_(False)
    model.init_weights()
    x = torch.randn(2, 16, 5, 6)
    assert torch.equal(model[0].double_attention(x), x)
