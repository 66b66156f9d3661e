"""Double attention in the ResNets of torchvision, timm and transformers."""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from da_triton.integrations import (
    ResidualDoubleAttention,
    a2_resnet50,
    a2_resnet50_video,
    a2_resnet101,
    a2_resnet152,
    insert_double_attention,
)
from support.copies import WAYS
from support.numerics import relative_rms

PLACES = ["layer2.0", "layer2.2", "layer3.0", "layer3.2", "layer3.4"]


def small_transformers():
    return transformers.ResNetForImageClassification(
        transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 4, 6, 1], num_labels=5
        )
    )


def small_torchvision(**options):
    return torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [1, 4, 6, 1],
        num_classes=5,
        width_per_group=8,
        **options,
    )


def small_timm(**options):
    return timm.models.resnet.ResNet(
        timm.models.resnet.Bottleneck, [1, 4, 6, 1], num_classes=5, base_width=8, **options
    )


def inserted(model):
    return [
        name.removesuffix(".double_attention")
        for name, m in model.named_modules()
        if isinstance(m, ResidualDoubleAttention)
    ]


def logits(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


LIBRARIES = {
    "torchvision": (small_torchvision, PLACES),
    "timm": (small_timm, PLACES),
    "transformers": (
        small_transformers,
        [
            f"resnet.encoder.stages.{stage}.layers.{place}"
            for stage, places in ((1, (0, 2)), (2, (0, 2, 4)))
            for place in places
        ],
    ),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("training", [True, False])
def test_paper_places_keys_and_outputs(library, training):
    make, places = LIBRARIES[library]
    model = make()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    plain = copy.deepcopy(model)
    assert insert_double_attention(model) is model
    assert inserted(model) == places
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(logits(model.train(training), x), logits(plain.train(training), x))
    found = model.load_state_dict(plain.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all(".double_attention." in key for key in found.missing_keys)
    assert set(plain.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_block_has_an_effect_and_learns(library):
    model = insert_double_attention(LIBRARIES[library][0](), zero_init=False)
    x = torch.randn(4, 3, 64, 64)
    blocks = [m for m in model.modules() if isinstance(m, ResidualDoubleAttention)]
    logits(model, x).square().sum().backward()
    for block in blocks:
        assert block.attention.convA.weight.grad.abs().sum() > 0
    with torch.no_grad():
        before = logits(model.eval(), x)
        blocks[0].norm.weight.mul_(2)
        assert not torch.allclose(logits(model, x), before, rtol=1e-3)


def test_block_follows_the_whole_residual_block():
    """After its ReLU, as in figure 2 of the paper; the next block gets the sum."""
    model = insert_double_attention(small_torchvision().eval(), ["layer2.1"], zero_init=False)
    seen = {}
    block = model.layer2[1]
    block.double_attention.register_forward_hook(
        lambda m, args, out: seen.update(inside=args[0], out=out)
    )
    model.layer2[2].register_forward_pre_hook(lambda m, args: seen.update(next=args[0]))
    model(torch.randn(2, 3, 64, 64))
    assert (seen["inside"] >= 0).all()
    assert seen["next"] is seen["out"]
    a = block.double_attention
    assert relative_rms(seen["out"], seen["inside"] + a.norm(a.attention(seen["inside"]))) < 1e-6


def test_after_a_sequential_the_block_runs_once():
    model = insert_double_attention(small_torchvision().eval(), ["layer2"], zero_init=False)
    calls = []
    model.layer2.double_attention.register_forward_hook(lambda *_: calls.append(1))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    model(x)
    assert len(calls) == 1
    nn.init.zeros_(plain.layer2.double_attention.norm.weight)
    nn.init.zeros_(plain.layer2.double_attention.norm.bias)
    assert not torch.allclose(model(x), plain(x), rtol=1e-3)


@pytest.mark.parametrize("layer", ["eca", "se", "cbam"])
def test_channel_attention_does_not_count_as_the_output(layer):
    model = small_timm(block_args={"attn_layer": layer})
    plain = copy.deepcopy(model).eval()
    insert_double_attention(model)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain(x))


def test_sizes_and_options():
    model = insert_double_attention(
        small_torchvision(), c_m=8, c_n=4, norm=None, heads=2, backend="eager"
    )
    block = model.layer2[0].double_attention
    assert (block.attention.c_m, block.attention.c_n, block.attention.heads) == (8, 4, 2)
    assert block.norm is None
    assert block.attention.backend == "eager"
    half = insert_double_attention(small_torchvision()).layer3[4].double_attention.attention
    assert (half.in_channels, half.c_m, half.c_n) == (1024, 512, 512)


def test_dtype_and_mode_follow_the_network():
    model = small_torchvision().to(torch.bfloat16).eval()
    insert_double_attention(model)
    block = model.layer2[0].double_attention
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}
    assert not block.training
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_named_places_and_given_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Identity()), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"output channels of '1' .* positions=\{'1': channels\}"):
        insert_double_attention(model, ["1"])
    insert_double_attention(model, {"1": 8})
    insert_double_attention(model, ["0"])
    assert inserted(model) == ["0", "1"]
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("axes", [1, 3])
def test_other_numbers_of_position_axes(axes):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    model = insert_double_attention(nn.Sequential(conv(3, 8, 3), nn.ReLU()), ["0"])
    assert model(torch.randn(2, 3, *[5] * axes)).shape == (2, 8, *[3] * axes)


def test_torchvision_video_resnet_by_name():
    model = torchvision.models.video.r3d_18(num_classes=4)
    insert_double_attention(model, ["layer2.0", "layer3.1"])
    assert model(torch.randn(1, 3, 4, 32, 32)).shape == (1, 4)


def test_resnet_inside_a_larger_model():
    model = torchvision.models.segmentation.fcn_resnet50(
        weights=None, weights_backbone=None, num_classes=3
    )
    insert_double_attention(model)
    assert inserted(model) == [f"backbone.{place}" for place in PLACES]


@pytest.mark.parametrize(
    ("make", "positions", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "paper", "found no ResNet in Sequential"),
        (lambda: nn.ModuleList([small_torchvision(), small_torchvision()]), "paper", "2 ResNets"),
        (torchvision.models.resnet18, "paper", "no layer2.2, layer3.2, layer3.4"),
        (small_torchvision, "everywhere", 'must be "paper" or a list'),
        (small_torchvision, [], "nothing would be inserted"),
        (small_torchvision, ["layer9.0"], "'layer9.0', which the model does not have"),
        (lambda: nn.Sequential(small_torchvision()), ["layer2.0"], "Did you mean '0.layer2.0'"),
        (small_torchvision, ["layer2.0", "layer2.0"], "already"),
        (lambda: nn.ModuleDict({"a": small_torchvision()}), [""], "ModuleDict, which is never"),
    ],
)
def test_errors_leave_the_model_unchanged(make, positions, message):
    model = make()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert_double_attention(model, positions)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_hooks for m in model.modules())


def test_twice_is_rejected():
    model = insert_double_attention(small_torchvision())
    with pytest.raises(ValueError, match="has a double attention block already"):
        insert_double_attention(model)


def test_a_module_that_returns_several_tensors_is_loud():
    model = insert_double_attention(nn.Sequential(nn.LSTM(3, 8)), {"0": 8})
    with pytest.raises(TypeError, match=r"after '0' .* got tuple. Name a module"):
        model(torch.randn(2, 5, 3))


def test_copies_files_and_compilation():
    model = insert_double_attention(small_torchvision(), zero_init=False).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for duplicate in WAYS:
            assert torch.equal(duplicate(model)(x), expected)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_rms(compiled(x), expected) < 1e-4
        fresh = insert_double_attention(small_torchvision()).eval()
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), expected)


def test_feature_extraction_with_the_block_as_a_leaf():
    model = insert_double_attention(small_torchvision(), zero_init=False).eval()
    x = torch.randn(1, 3, 64, 64)
    leaf = {"leaf_modules": [ResidualDoubleAttention]}
    extract = create_feature_extractor(model, {"fc": "fc"}, tracer_kwargs=leaf)
    torch.testing.assert_close(extract(x)["fc"], model(x))
    with pytest.raises(TypeError, match="leaf"):
        create_feature_extractor(model, {"fc": "fc"})


def test_channels_last_stays():
    model = insert_double_attention(small_torchvision(), zero_init=False).eval()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    seen = []
    model.layer2[0].register_forward_hook(lambda m, args, out: seen.append(out))
    model(x)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


# -- the shipped networks --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (a2_resnet50, torchvision.models.resnet50),
        (a2_resnet101, torchvision.models.resnet101),
        (a2_resnet152, torchvision.models.resnet152),
    ],
)
def test_shipped_networks(make, plain):
    with torch.device("meta"):
        model, expected = make(num_classes=7), plain(num_classes=7)
    assert inserted(model) == PLACES
    ours = {k: v.shape for k, v in model.state_dict().items() if "double_attention" not in k}
    assert ours == {k: v.shape for k, v in expected.state_dict().items()}
    assert model(torch.randn(2, 3, 64, 64, device="meta")).shape == (2, 7)


def test_options_go_where_they_belong():
    with torch.device("meta"):
        model = a2_resnet50(c_m=64, c_n=32, norm=None, zero_init_residual=True, backend="torch")
    attention = model.layer3[0].double_attention.attention
    assert (attention.c_m, attention.c_n, attention.backend) == (64, 32, "torch")
    with pytest.raises(TypeError, match="colour"):
        a2_resnet50(colour="red")


def test_video_gives_a_still_clip_the_answer_of_its_image():
    torch.manual_seed(1)
    image = a2_resnet50(num_classes=5).eval()
    torch.manual_seed(1)  # the same image weights, which the inflation keeps
    video = a2_resnet50_video(num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    with torch.no_grad():
        assert relative_rms(video(clip), image(x)) < 1e-5


def test_video_rejects_norms_that_have_no_time():
    with pytest.raises(ValueError, match="Leave norm_layer out"):
        a2_resnet50_video(norm_layer=torchvision.ops.FrozenBatchNorm2d)


def test_video_sees_time_and_keeps_it():
    video = a2_resnet50_video(num_classes=5)
    sizes = {}
    for name in ("layer2.0", "layer3.0"):
        video.get_submodule(name).double_attention.register_forward_hook(
            lambda m, args, out, name=name: sizes.update({name: tuple(out.shape[1:])})
        )
    kernels = [m.kernel_size[0] for m in video.modules() if isinstance(m, nn.Conv3d)]
    assert (kernels.count(5), kernels.count(3)) == (1, 9)
    with torch.no_grad():
        for conv in (m for m in video.modules() if isinstance(m, nn.Conv3d)):
            nn.init.kaiming_normal_(conv.weight)
        clip = torch.randn(1, 3, 8, 64, 64)
        one, other = video.eval()(clip), video(clip.flip(2))
    assert sizes == {"layer2.0": (512, 8, 8, 8), "layer3.0": (1024, 8, 4, 4)}
    assert not torch.allclose(one, other, rtol=1e-3)


def test_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        a2_resnet50()


# -- added parameters, MACs ------------------------------------------------------------------------

IMAGE, CLIP = (3, 224, 224), (3, 8, 224, 224)
C3, C4, L3, L4 = 512, 1024, 28 * 28, 14 * 14
# Millions of parameters and billions of MACs with the products in the paper's order.
# ECA-Net (Wang et al., CVPR 2020, table 3) quotes 33.00 and 6.50 for the A²-ResNet-50.
SIZES = [
    (torchvision.models.resnet50, IMAGE, 25.56, 4.09),
    (torchvision.models.resnet101, IMAGE, 44.55, 7.80),
    (torchvision.models.resnet152, IMAGE, 60.19, 11.51),
    (a2_resnet50, IMAGE, 32.92, 6.66),
    (a2_resnet101, IMAGE, 51.91, 10.37),
    (a2_resnet152, IMAGE, 67.55, 14.08),
    (a2_resnet50_video, CLIP, 36.42, 66.27),
]


def count(make, shape):
    """Parameters, and MACs of one input in evaluation mode."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make().eval()
        model(torch.empty(1, *shape))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


def of_blocks(share, frames=1):
    """Parameters and MACs of the paper's five blocks by hand: two on conv3, three on conv4."""
    parameters = macs = 0
    for blocks, c, positions in ((2, C3, L3), (3, C4, L4)):
        k = c // share
        # A, B, V and the reconstruction with their biases, and the normalisation's two factors
        parameters += blocks * (3 * (c * k + k) + (k * c + c) + 2 * c)
        # A, B and V; the gather; the distribution; the reconstruction
        macs += blocks * frames * positions * (4 * c * k + 2 * k * k)
    return parameters, macs


@pytest.mark.parametrize(("make", "shape", "millions", "billions"), SIZES)
def test_parameters_and_macs(make, shape, millions, billions):
    options = {"order": "AZ"} if make.__module__.startswith("da_triton") else {}
    parameters, macs = count(lambda: make(**options), shape)
    assert (round(parameters / 1e6, 2), round(macs / 1e9, 2)) == (millions, billions)


@pytest.mark.parametrize("share", [2, 4])
@pytest.mark.parametrize("depth", [50, 101, 152])
def test_five_blocks_add_what_is_counted_by_hand(depth, share):
    """At the paper's c_m = c_n = C/2, and at the C/4 of its ablations."""
    plain = getattr(torchvision.models, f"resnet{depth}")

    def with_blocks():
        model = plain()
        for place in PLACES:
            c = model.get_submodule(place).bn3.num_features // share
            insert_double_attention(model, [place], c, c, order="AZ")
        return model

    before, after = count(plain, IMAGE), count(with_blocks, IMAGE)
    assert tuple(y - x for x, y in zip(before, after, strict=True)) == of_blocks(share)


def test_video_blocks_see_eight_frames():
    def without_blocks():
        model = a2_resnet50_video()
        for place in PLACES:
            model.get_submodule(place).double_attention.forward = lambda x: x
        return model

    (_, without), (_, with_blocks) = (
        count(make, CLIP) for make in (without_blocks, lambda: a2_resnet50_video(order="AZ"))
    )
    assert with_blocks - without == of_blocks(2, frames=8)[1]
