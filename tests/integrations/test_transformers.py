"""Blocks in a model class of transformers: its loading and initialisation give the identity."""

import functools
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from da_triton.integrations import ResidualDoubleAttention, insert_double_attention


def config():
    return ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 4, 6, 1], num_labels=5
    )


class Plain(ResNetForImageClassification):
    """The library's own network, whose batch normalisations are not at their start."""

    def __init__(self, config):
        super().__init__(config)
        with torch.no_grad():
            for norm in (m for m in self.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.weight.uniform_(0.5, 1.0)
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 1.0)


class WithBlocks(ResNetForImageClassification):
    norm: Any = "batch"
    zero_init = True

    def __init__(self, config):
        super().__init__(config)
        insert_double_attention(self, norm=self.norm, zero_init=self.zero_init)


class WithBlocksBefore(WithBlocks):
    """Initialises once it is complete, as models with layers of their own do."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()


class WithoutNorm(WithBlocks):
    norm = None


class WithAnUnknownNorm(WithBlocks):
    """The library has no initialisation for it."""

    norm = functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)


class WithoutZeros(WithBlocks):
    zero_init = False


CLASSES = [WithBlocks, WithBlocksBefore, WithoutNorm, WithAnUnknownNorm]


def blocks(model):
    return [m for m in model.modules() if isinstance(m, ResidualDoubleAttention)]


def logits(model, dtype=torch.float32):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        return model.eval()(x).logits


def moved(model):
    """The model with different values in every parameter and statistic of its blocks."""
    for block in blocks(model):
        for name, t in block.state_dict().items():
            if t.is_floating_point():
                nn.init.uniform_(t, 0.5, 1.0) if "running_var" in name else nn.init.normal_(t)
            else:
                t.fill_(7)
    return model


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return Plain(config()).eval()


@pytest.fixture(scope="module")
def path(plain, tmp_path_factory):
    plain.save_pretrained(path := tmp_path_factory.mktemp("plain"))
    return path


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", CLASSES)
def test_weights_without_blocks_give_the_answers_of_the_network_without_blocks(kind, plain, path):
    model = kind.from_pretrained(path)
    assert len(blocks(model)) == 5
    assert torch.equal(logits(model), logits(plain))
    assert all(t.isfinite().all() for t in model.state_dict().values())
    for block in blocks(model):
        for norm in block.children():
            if getattr(norm, "running_mean", None) is not None:
                assert not norm.running_mean.any()
                assert (norm.running_var == 1).all()
                assert norm.num_batches_tracked == 0
        assert block.attention.convA.weight.std() > 0.01


@pytest.mark.parametrize("kind", CLASSES)
def test_a_network_from_a_configuration_starts_with_the_identity(kind):
    for model in (kind(config()), kind._from_config(config())):
        model.init_weights()
        x = torch.randn(2, 16, 5, 6)
        assert torch.equal(blocks(model)[0](x), x)


def test_without_zero_init_the_block_has_an_effect(plain, path):
    model = WithoutZeros.from_pretrained(path)
    assert all((block.norm.weight == 1).all() for block in blocks(model))
    assert not torch.allclose(logits(model), logits(plain), rtol=1e-2)


@pytest.mark.parametrize("kind", [*CLASSES, WithoutZeros])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_trained_blocks_come_back(kind, size, tmp_path):
    trained = moved(kind(config()))
    trained.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    model = kind.from_pretrained(tmp_path)
    for key, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    model.init_weights()
    assert torch.equal(logits(model), logits(trained))


def test_weights_in_several_files(plain, tmp_path):
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(WithBlocks.from_pretrained(tmp_path)), logits(plain))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, path):
    expected = logits(ResNetForImageClassification.from_pretrained(path, dtype=dtype), dtype)
    model = WithBlocks.from_pretrained(path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, dtype), expected)


def test_only_weights_missing_from_a_file_are_initialised(tmp_path):
    trained = moved(WithBlocks(config()))
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    place = "resnet.encoder.stages.1.layers.0.double_attention."
    lacking = {place + "norm.bias", place + "norm.running_mean", place + "attention.convB.weight"}
    kept = {key: value for key, value in weights.items() if key not in lacking}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    state = WithBlocks.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(state[key], value) for key, value in kept.items())
    assert not state[place + "norm.bias"].any()
    assert not state[place + "norm.running_mean"].any()
    assert 0 < state[place + "attention.convB.weight"].std() < 1  # of moved: 1


def test_blocks_inserted_after_the_weights_are_loaded(plain, path, tmp_path):
    model = insert_double_attention(ResNetForImageClassification.from_pretrained(path))
    assert torch.equal(logits(model), logits(plain))
    moved(model).save_pretrained(tmp_path)
    assert torch.equal(logits(WithBlocks.from_pretrained(tmp_path)), logits(model))


class Small(transformers.PreTrainedModel):
    """A model whose own initialisation knows linear layers only."""

    config_class = ResNetConfig

    def __init__(self, config):
        super().__init__(config)
        self.block = ResidualDoubleAttention(8)
        self.head = nn.Linear(8, 2)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)


@pytest.mark.usefixtures("poisoned")
def test_a_model_that_initialises_nothing_in_the_block(tmp_path):
    save_file({"head.bias": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    config().save_pretrained(tmp_path)
    model = Small.from_pretrained(tmp_path)
    assert torch.equal(model.head.bias, torch.ones(2))
    x = torch.randn(2, 8, 3, 4)
    for training in (True, False):
        assert torch.equal(model.train(training).block(x), x)
    assert model.block.attention.convA.weight.std() > 0.1
