"""The norm of a block: one that cannot learn, one of another rank, and resets."""

import functools

import pytest
import timm.layers
import torch
import torchvision
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from transformers.models.rt_detr.modeling_rt_detr import RTDetrFrozenBatchNorm2d

from da_triton.integrations import ResidualDoubleAttention, insert_double_attention

INPUTS = {1: (2, 8, 5), 2: (2, 8, 3, 4), 3: (2, 8, 3, 4, 4)}


class FrozenByBuffers(nn.Module):
    """As in detectors: the values of a batch normalisation as buffers, without parameters."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.5), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        weight, bias = self.weight * self.var.rsqrt(), self.bias
        return x * weight[:, None, None] + (bias - self.mean * weight)[:, None, None]


def frozen(make):
    return lambda channels: make(channels).requires_grad_(False)


def with_frozen_weight(channels):
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad = False
    return norm


CANNOT_LEARN = {
    "torchvision": torchvision.ops.FrozenBatchNorm2d,
    "timm": timm.layers.FrozenBatchNormAct2d,
    "transformers": RTDetrFrozenBatchNorm2d,
    "buffers": FrozenByBuffers,
    "batch": frozen(nn.BatchNorm2d),
    "group": frozen(functools.partial(nn.GroupNorm, 2)),
    "weight": with_frozen_weight,
    "not affine": functools.partial(nn.BatchNorm2d, affine=False),
    "instance": nn.InstanceNorm2d,
    "nothing": lambda channels: nn.Identity(),
}


@pytest.mark.parametrize("kind", CANNOT_LEARN)
def test_a_norm_that_cannot_learn_is_an_error_and_stays_as_it_is(kind):
    norm = CANNOT_LEARN[kind](8)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    message = f"weight that learns, got {type(norm).__name__}.*missing or frozen.*zero_init=False"
    with pytest.raises(ValueError, match=message):
        ResidualDoubleAttention(8, norm=lambda channels: norm)
    assert all(torch.equal(norm.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", CANNOT_LEARN)
def test_a_norm_that_cannot_learn_serves_without_zero_init(kind):
    block = ResidualDoubleAttention(8, norm=CANNOT_LEARN[kind], zero_init=False)
    x = torch.randn(INPUTS[2])
    for training in (True, False):
        y = block.train(training)(x)
        torch.testing.assert_close(y, x + block.norm(block.attention(x)))
    block(x).square().sum().backward()
    assert block.attention.convA.weight.grad.any()


def test_a_network_with_frozen_norms_is_left_alone_by_the_error():
    model = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="got FrozenBatchNorm2d"):
        insert_double_attention(model, norm=torchvision.ops.FrozenBatchNorm2d)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    "norm", [timm.layers.RmsNorm2d, timm.layers.LayerNorm2d, functools.partial(nn.GroupNorm, 2)]
)
def test_norms_with_a_weight_that_learns(norm):
    block = ResidualDoubleAttention(8, norm=norm)
    x = torch.randn(INPUTS[2])
    assert torch.equal(block(x), x)
    (block(x) * torch.randn(x.shape)).sum().backward()
    assert block.norm.weight.grad.any()


def test_a_block_that_is_frozen_later_keeps_its_start():
    """Detectors freeze their first stages before they initialise their weights."""
    block = ResidualDoubleAttention(8).requires_grad_(False)
    nn.init.ones_(block.norm.weight)
    block.init_weights()
    assert not block.norm.weight.any()


def freeze(block):
    block.norm.requires_grad_(False)


def convert(block):
    block.norm = FrozenByBuffers(8)
    block.norm.weight.zero_()
    block.norm.bias.zero_()


@pytest.mark.parametrize("late", [freeze, convert])
def test_a_norm_that_is_frozen_while_it_is_zero_is_an_error_in_training(late):
    block, x = ResidualDoubleAttention(8), torch.randn(INPUTS[2])
    late(block)
    with pytest.raises(ValueError, match=f"got {type(block.norm).__name__}.*missing or frozen"):
        block(x)
    with pytest.raises(ValueError, match="missing or frozen"):
        checkpoint(block, x, use_reentrant=False)
    assert torch.equal(block.eval()(x), x)
    block.train()
    with torch.no_grad():
        assert torch.equal(block(x), x)
    nn.init.ones_(block.norm.weight)
    for _ in range(2):
        block(x).square().sum().backward()
    assert block.attention.convA.weight.grad.any()
    block.norm.weight.zero_()
    with pytest.raises(ValueError, match="missing or frozen"):
        block(x)
    with torch.device("meta"):
        assert block.to("meta")(torch.empty(INPUTS[2])).shape == INPUTS[2]


def test_values_of_a_frozen_norm_are_read_once():
    """On a GPU, each time would be a synchronisation."""
    block, x = ResidualDoubleAttention(8, zero_init=True), torch.randn(INPUTS[2])
    nn.init.ones_(block.norm.weight)
    freeze(block)
    with torch.profiler.profile() as profile:
        for _ in range(3):
            block(x)
    assert sum(event.name == "aten::any" for event in profile.events()) == 1


def test_the_weight_of_a_wrapped_or_sharded_norm_is_not_judged():
    block, x = ResidualDoubleAttention(8), torch.randn(INPUTS[2])
    freeze(block)
    block.norm = nn.Sequential(block.norm)
    assert torch.equal(block(x), x)
    block.norm = FrozenByBuffers(8)
    block.norm.weight = torch.empty(0)  # a rank that has no part of it
    block._check_learns()


def test_tracers_do_not_read_a_frozen_norm():
    block, x = ResidualDoubleAttention(8), torch.randn(INPUTS[2])
    freeze(block)
    state = dict(block.named_parameters()) | dict(block.named_buffers())

    def call(state, x):
        return torch.func.functional_call(block, state, x)

    assert torch.equal(make_fx(call)(state, x)(state, x), x)
    with pytest.raises(TypeError, match="make the layer a leaf"):
        torch.fx.symbolic_trace(ResidualDoubleAttention(8))


def test_a_block_that_is_frozen_whole_is_no_error():
    block, x = ResidualDoubleAttention(8).requires_grad_(False), torch.randn(INPUTS[2])
    assert torch.equal(block(x), x)


def test_a_norm_that_is_frozen_later_is_not_overwritten():
    block = ResidualDoubleAttention(8)
    block.norm = FrozenByBuffers(8)
    with pytest.raises(ValueError, match="got FrozenByBuffers"):
        block.zero_init_last()
    assert (block.norm.weight == 1).all()


# -- axes ------------------------------------------------------------------------------------------

BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("built", BATCH)
def test_position_axes_count_in_both_modes(training, given, built):
    block = ResidualDoubleAttention(8, position_axes=built).train(training)
    x = torch.randn(INPUTS[given])
    if given == built:
        assert torch.equal(block(x), x)
        return
    message = rf"shape .*norm is a BatchNorm{built}d, which takes {built} .*axes={given}"
    with pytest.raises(ValueError, match=message):
        block(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [BATCH, INSTANCE])
def test_the_norm_that_the_block_has_counts_not_the_one_that_it_was_built_with(training, kind):
    block = ResidualDoubleAttention(8).train(training)
    block.norm = kind[3](8)
    assert block(torch.randn(INPUTS[3])).shape == INPUTS[3]
    with pytest.raises(ValueError, match=rf"is a {kind[3].__name__}, which takes 3"):
        block(torch.randn(INPUTS[2]))


@pytest.mark.parametrize("training", [True, False])
def test_a_missing_axis_is_not_taken_for_a_missing_batch(training):
    """InstanceNorm2d takes ``(8, 8, 5)`` for one sample of 8 channels."""
    norm = functools.partial(nn.InstanceNorm2d, affine=True)
    block = ResidualDoubleAttention(8, norm=norm).train(training)
    with pytest.raises(ValueError, match=r"\(8, 8, 5\).*InstanceNorm2d.*position_axes=1"):
        block(torch.randn(8, 8, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [None, functools.partial(nn.GroupNorm, 2), nn.SyncBatchNorm])
def test_norms_of_any_number_of_axes(norm, training):
    block = ResidualDoubleAttention(8, norm=norm).train(training)
    for shape in INPUTS.values():
        if not (training and norm is nn.SyncBatchNorm):  # which trains on GPUs only
            assert torch.equal(block(torch.zeros(shape)), torch.zeros(shape))


def test_a_subclass_decides_for_itself():
    class Any(nn.BatchNorm2d):
        def _check_input_dim(self, x):
            pass

    block = ResidualDoubleAttention(8, norm=Any)
    for training in (True, False):
        x = torch.randn(INPUTS[3])
        assert torch.equal(block.train(training)(x), x)


@pytest.mark.parametrize("wrong", [torch.randn(2, 8), torch.randn(2, 8, 1, 2, 3, 4)])
def test_input_that_is_not_a_feature_map_gets_the_usual_message(wrong):
    for training in (True, False):
        with pytest.raises(ValueError, match=r"must be \(N, channels, \*positions\)"):
            ResidualDoubleAttention(8).train(training)(wrong)


# -- reset -----------------------------------------------------------------------------------------


def reset(module):
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


NORMS = {
    "batch": "batch",
    "group": functools.partial(nn.GroupNorm, 2),
    "instance": functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "none": None,
}


def moved(norm, **options):
    block = ResidualDoubleAttention(8, norm=NORMS[norm], **options)
    for name, value in block.state_dict().items():
        value.fill_(7) if "tracked" in name else nn.init.uniform_(value, 2.0, 3.0)
    return block


def test_a_block_marked_as_not_initialised_keeps_its_weights():
    block = ResidualDoubleAttention(8, zero_init=False)
    before = [t.clone() for t in block.state_dict().values()]
    block._is_hf_initialized = False
    assert all(map(torch.equal, block.state_dict().values(), before))


def test_a_reset_that_cannot_end_in_zeros_changes_nothing():
    block = ResidualDoubleAttention(8, norm=None)
    parametrizations.weight_norm(block.attention.conv_reconstruct)
    before = [t.clone() for t in block.state_dict().values()]
    with pytest.raises(ValueError, match="or remove the parametrisation"):
        block.reset_parameters()
    assert all(map(torch.equal, block.state_dict().values(), before))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("zero_init", [True, False])
def test_reset_parameters_gives_what_the_constructor_gives(norm, zero_init):
    block = moved(norm, zero_init=zero_init)
    torch.manual_seed(3)
    block.reset_parameters()
    torch.manual_seed(3)
    fresh = ResidualDoubleAttention(8, norm=NORMS[norm], zero_init=zero_init).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in block.state_dict().items())


@pytest.mark.parametrize("norm", NORMS)
def test_applying_a_reset_to_a_network_gives_the_identity(norm):
    model = nn.Sequential(moved(norm))
    model.apply(reset)
    x = torch.randn(INPUTS[2])
    for training in (True, False):
        assert torch.equal(model.train(training)(x), x)
    assert model[0].attention.convA.weight.abs().max() < 1


def test_a_block_without_memory_gets_its_start():
    block = ResidualDoubleAttention(8, device="meta").to_empty(device="cpu")
    for value in block.state_dict().values():
        value.fill_(7)
    block.reset_parameters()
    x = torch.randn(INPUTS[2])
    assert torch.equal(block.eval()(x), x)
    assert block.norm.num_batches_tracked == 0


def test_replaced_children_are_reset_too():
    block = moved("batch")
    block.attention = nn.Sequential(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1))
    nn.init.constant_(block.attention[1].weight, 7.0)
    block.reset_parameters()
    assert block.attention[1].weight.abs().max() < 1


@pytest.mark.parametrize("norm", NORMS)
def test_init_weights_changes_nothing_but_the_end(norm):
    block = moved(norm)
    before = block.attention.convA.weight.clone()
    block.init_weights()
    x = torch.randn(INPUTS[2])
    assert torch.equal(block(x), x)
    assert torch.equal(block.attention.convA.weight, before)
