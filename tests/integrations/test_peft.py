"""PEFT's adapters on the block and its convolutions: the same effect as on the plain block."""

import copy

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from da_triton.streaming import StreamingDoubleAttention
from support.cases import RANKS
from support.numerics import DEVICE
from support.plain import PlainBlock, PlainResidual, randomize

peft = pytest.importorskip("peft")

CHILDREN = ["convA", "convB", "convV", "conv_reconstruct"]
each_rank = pytest.mark.parametrize("positions", RANKS, ids=["1d", "2d", "3d"])
each_kind = pytest.mark.parametrize("kind", ["layer", "residual"])


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.block(x).movedim(1, -1))


def nets(kind, axes=2, backend="auto"):
    """The network with the block and with the plain one, with the same weights."""
    if kind == "layer":
        blocks = DoubleAttention(16, 8, 6, heads=2, backend=backend), PlainBlock(16, 8, 6, heads=2)
    else:
        blocks = (
            ResidualDoubleAttention(16, 8, 6, heads=2, position_axes=axes, backend=backend),
            PlainResidual(16, 8, 6, heads=2, position_axes=axes),
        )
    return [randomize(Net(block)).to(DEVICE) for block in blocks]


def lora(**options):
    return peft.LoraConfig(**{"target_modules": CHILDREN, "r": 2, **options})


def adapted(config, *args):
    """Both networks with adapters of the same random weights, in evaluation."""
    ours, plain = (peft.get_peft_model(net, config).eval() for net in nets(*args))
    trained(ours)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def trained(model):
    """Weights of adapters as after some training: LoRA's start as a difference of zero."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p) / 4)


def images(positions=(5, 6), batch=2):
    return torch.randn(batch, 16, *positions, device=DEVICE)


def core(model):
    """The double attention layer of a model."""
    return next(m for m in model.modules() if isinstance(m, DoubleAttention))


@each_kind
@each_rank
@pytest.mark.parametrize("batch", [2, 16], ids=["two", "as_channels"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_lora_gives_values_and_gradients_of_the_plain_block(kind, positions, batch, training):
    ours, plain = (m.train(training) for m in adapted(lora(), kind, len(positions)))
    x = images(positions, batch)
    results = []
    for model in (ours, plain):
        y = model(x)
        (y * y.detach().cos()).mean().backward()
        results.append((y, {name: p.grad for name, p in model.named_parameters()}))
    (y, found), (expected, gradients) = results
    torch.testing.assert_close(y, expected)
    for name, p in ours.named_parameters():
        assert (found[name] is not None) == p.requires_grad == ("lora_" in name), name
        torch.testing.assert_close(found[name], gradients[name])
    with ours.disable_adapter():
        assert not torch.allclose(ours(x), y, atol=1e-2)


@each_rank
def test_lora_around_the_kernels(positions):
    ours, plain = adapted(lora(), "layer", len(positions), "triton")
    x = images(positions, 16)
    torch.testing.assert_close(ours(x), plain(x))


OTHERS = {
    "dora": lambda: lora(use_dora=True),
    "loha": lambda: peft.LoHaConfig(target_modules=CHILDREN, r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=CHILDREN, r=2),
    "oft": lambda: peft.OFTConfig(target_modules=CHILDREN, oft_block_size=4),
    "hra": lambda: peft.HRAConfig(target_modules=CHILDREN, r=2),
    "ia3": lambda: peft.IA3Config(target_modules=CHILDREN, feedforward_modules=[]),
}


@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS.keys())
def test_other_adapters_take_any_number_of_position_axes(config):
    ours, plain = adapted(config(), "layer")
    with ours.disable_adapter():
        before = ours(images())
    assert not torch.allclose(ours(images()), before)
    for positions in RANKS:
        x = images(positions, 16)
        torch.testing.assert_close(ours(x), plain(x))


@each_kind
def test_merged_adapters_leave_plain_convolutions(kind, monkeypatch):
    ours, _ = adapted(lora(), kind)
    x = images()
    expected = ours(x)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours(x), expected)
    merged = ours.merge_and_unload()
    assert type(merged) is Net
    assert {type(child) for child in core(merged).children()} == {nn.Conv2d}
    torch.testing.assert_close(merged(x), expected)
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # one operation again: none of them is called
    torch.testing.assert_close(merged(x), expected)


@each_kind
def test_saved_adapters_load_into_a_network_as_it_was(kind, tmp_path):
    ours, _ = adapted(lora(), kind)
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nets(kind)[0], tmp_path).eval()
    x = images()
    torch.testing.assert_close(again(x), ours(x))


@each_kind
def test_two_adapters_and_copies(kind):
    ours, plain = adapted(lora(), kind)
    for model in (ours, plain):
        model.add_adapter("other", lora(r=4, init_lora_weights=False))
        model.set_adapter("other")
    plain.load_state_dict(ours.state_dict())
    twin, x = copy.deepcopy(ours), images((2, 3, 5)) if kind == "layer" else images()
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(twin(x), plain(x))
    before = twin(x).detach()
    trained(twin)
    assert not torch.allclose(twin(x), before)
    torch.testing.assert_close(ours(x), before)
    ours.set_adapter("default")
    plain.set_adapter("default")
    torch.testing.assert_close(ours(x), plain(x))
    assert not torch.allclose(ours(x), before)


@each_rank
def test_attention_maps_and_streams_with_lora(positions):
    """As with weights that the adapters were merged into."""
    ours, _ = adapted(lora(), "layer")
    merged = core(copy.deepcopy(ours).merge_and_unload())
    layer, x = core(ours), images(positions, 16)
    for found, expected in zip(layer.attention_maps(x), merged.attention_maps(x), strict=True):
        torch.testing.assert_close(found, expected)
    streams = [StreamingDoubleAttention(one) for one in (layer, merged)]
    for frame in (x, images(positions, 16)):
        torch.testing.assert_close(*(stream(frame) for stream in streams))


def test_the_layer_knows_its_sizes_with_lora():
    layer = core(adapted(lora(), "layer")[0])
    assert (layer.in_channels, layer.c_m, layer.c_n) == (16, 8, 6)
    assert layer.extra_repr().startswith("16, c_m=8, c_n=6,")
    with pytest.raises(ValueError, match=r"x must have 16 channels"):
        layer(torch.randn(2, 12, 5, 6, device=DEVICE))


@each_kind
@pytest.mark.parametrize("target", [["convV"], ["conv_reconstruct"], ["convA", "convB"]])
def test_lora_on_some_of_the_convolutions(kind, target):
    ours, plain = adapted(lora(target_modules=target), kind)
    for positions in RANKS if kind == "layer" else RANKS[1:2]:
        x = images(positions, 16)
        torch.testing.assert_close(ours(x), plain(x))


@each_kind
def test_compiled_with_lora(kind):
    torch._dynamo.reset()
    ours, plain = adapted(lora(), kind)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = images()
    y, expected = compiled(x), plain(x)
    torch.testing.assert_close(y, expected)
    for out, model in ((y, ours), (expected, plain)):
        out.square().mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    grads = [[p.grad for p in m.parameters() if p.requires_grad] for m in (ours, plain)]
    torch.testing.assert_close(*grads)


def whole(kind):
    """The network whose block is trained and saved as a whole, beside LoRA on the head."""
    config = lora(target_modules=["head"], modules_to_save=["block"])
    return peft.get_peft_model(nets(kind)[0], config)


@each_kind
def test_a_block_that_is_saved_as_a_whole(kind, tmp_path):
    """PEFT trains a copy of it, in a wrapper that keeps the original."""
    model = whole(kind)
    wrapper, x = model.base_model.model.block, images()
    assert type(wrapper).__name__ == "ModulesToSaveWrapper"
    original, copied = wrapper.original_module, wrapper.modules_to_save["default"]
    assert type(original) is type(copied) in (DoubleAttention, ResidualDoubleAttention)
    assert not {id(p) for p in original.parameters()} & {id(p) for p in copied.parameters()}
    model(x).square().mean().backward()
    assert all(p.grad is None and not p.requires_grad for p in original.parameters())
    assert all(p.grad is not None for p in copied.parameters())

    trained(model)
    model.eval()
    y = model(x)
    torch.testing.assert_close(wrapper(x), copied(x))
    with model.disable_adapter():
        torch.testing.assert_close(wrapper(x), original(x))
        assert not torch.allclose(model(x), y)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(nets(kind)[0], tmp_path).eval()
    torch.testing.assert_close(again(x), y)
    twin = copy.deepcopy(model)
    assert type(twin.base_model.model.block) is type(wrapper)
    assert twin.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(twin(x), y)
    merged = model.merge_and_unload()
    assert type(merged.block) is type(original)
    torch.testing.assert_close(merged(x), y)


def test_attributes_of_a_wrapped_block_are_those_of_the_active_copy():
    model, x = whole("layer"), images()
    trained(model)
    wrapper = model.base_model.model.block
    copied, original = wrapper.modules_to_save["default"], wrapper.original_module
    assert (wrapper.in_channels, wrapper.c_m, wrapper.heads) == (16, 8, 2)
    found = wrapper.attention_maps(x)
    torch.testing.assert_close(found, copied.attention_maps(x))
    assert not torch.allclose(found[0], original.attention_maps(x)[0])
    torch.testing.assert_close(StreamingDoubleAttention(copied)(x), wrapper(x))


def test_a_block_compiled_in_place_is_saved_as_a_whole():
    """The copy that PEFT trains must not run the weights of the original."""
    torch._dynamo.reset()
    net, _ = nets("layer")
    net.block.compile(backend="eager")
    x = images()
    before = net(x)
    model = peft.get_peft_model(net, lora(target_modules=["head"], modules_to_save=["block"]))
    torch.testing.assert_close(model(x), before)
    with torch.no_grad():
        for p in model.base_model.model.block.modules_to_save.parameters():
            p.zero_()
    torch.testing.assert_close(model.base_model.model.block(x), torch.zeros_like(x))


def test_inserted_blocks_take_lora():
    from torchvision.models import resnet18

    from da_triton.integrations import insert_double_attention

    net = insert_double_attention(resnet18(num_classes=7), ["layer1.0", "layer2.1"])
    randomize(net)
    model = peft.get_peft_model(net, lora(modules_to_save=["fc"])).eval()
    names = [n for n, p in model.named_parameters() if "lora_A" in n]
    assert len(names) == 8
    trained(model)
    x = torch.randn(2, 3, 32, 32)
    y = model(x)
    y.square().mean().backward()
    assert all(
        p.grad.any() for n, p in model.named_parameters() if "lora_" in n and "convB" not in n
    )
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=1e-3, atol=1e-3)
