"""PyTorch's and timm's wrappers around the block and around networks: as around a convolution."""

import copy
import functools
import operator
import pickle

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention, insert_double_attention
from support import ranks
from support.plain import PlainBlock, PlainResidual, randomize

X = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(1))
LAYERS = {
    "conv": lambda: nn.Conv2d(8, 8, 1),
    "plain": lambda: PlainResidual(8, 4, 6),
    "layer": lambda: DoubleAttention(8, 4, 6),
    "residual": lambda: ResidualDoubleAttention(8, 4, 6),
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def compiled(module):
    torch._dynamo.reset()
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    torch._dynamo.reset()
    module.compile(backend="eager")
    return module


WRAPS = {
    "none": lambda module: module,
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "checkpointed": checkpoint_wrapper,
    "reentrant": functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    "checkpointed and compiled": lambda module: compiled(checkpoint_wrapper(module)),
}
each_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 3, padding=1)
        self.block = block
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).movedim(1, -1))


def network(make, wrap=WRAPS["none"]):
    return Net(wrap(randomize(make()))).eval()


def shift(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)


# --- copies and averages --------------------------------------------------------------------------


@each_layer
@each_wrap
def test_deep_copies(make, wrap):
    net = network(make, wrap)
    expected = net(X)
    twin = copy.deepcopy(net)
    assert type(twin.block) is type(net.block)
    assert twin.state_dict().keys() == net.state_dict().keys()
    shift(net)
    torch.testing.assert_close(twin(X), expected)
    twin.load_state_dict(net.state_dict())
    torch.testing.assert_close(twin(X), net(X))
    assert not torch.allclose(twin(X), expected)


@each_layer
@each_wrap
@pytest.mark.parametrize("average", ["mean", "ema", "timm"])
def test_averages_of_weights(make, wrap, average):
    """The average of equal weights is the network; training moves one only."""
    net = network(make, wrap)
    expected = net(X)
    if average == "timm":
        from timm.utils import ModelEmaV3

        averaged = ModelEmaV3(net, decay=0.5)
    else:
        options = {"multi_avg_fn": get_ema_multi_avg_fn(0.5)} if average == "ema" else {}
        averaged = AveragedModel(net, **options)
        averaged.update_parameters(net)
    torch.testing.assert_close(averaged.module(X), expected)
    before = copy.deepcopy(net.state_dict())
    shift(net)
    torch.testing.assert_close(averaged.module(X), expected)
    (averaged.update if average == "timm" else averaged.update_parameters)(net)
    halfway = network(make)
    halfway.load_state_dict(
        {
            name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", ""): (
                (value + before[name]) / 2 if value.is_floating_point() else value
            )
            for name, value in net.state_dict().items()
        }
    )
    torch.testing.assert_close(averaged.module(X), halfway(X))


def test_statistics_of_an_average():
    net = network(LAYERS["residual"]).train()
    averaged = AveragedModel(net)
    shift(net)
    averaged.update_parameters(net)
    averaged.update_parameters(net)
    update_bn([X, 2 * X], averaged)
    plain = network(LAYERS["plain"]).train()
    plain.load_state_dict(averaged.module.state_dict())
    update_bn([X, 2 * X], plain)
    torch.testing.assert_close(averaged.module.eval()(X), plain.eval()(X))
    torch.testing.assert_close(averaged.module.block.norm.running_var, plain.block.norm.running_var)


@each_layer
def test_shallow_copies_share_parameters(make):
    layer = compiled_in_place(randomize(make()).eval())
    expected = layer(X)
    twin = copy.copy(layer)
    assert all(map(operator.is_, twin.parameters(), layer.parameters()))
    torch.testing.assert_close(twin(X), expected)
    shift(layer)
    torch.testing.assert_close(twin(X), layer(X))
    assert not torch.allclose(twin(X), expected)


@each_layer
@pytest.mark.parametrize("wrap", [WRAPS["none"], compiled_in_place, checkpoint_wrapper])
def test_pickles_and_files(make, wrap, tmp_path):
    net = network(make, wrap)
    expected = net(X)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    for again in (pickle.loads(pickle.dumps(net)), loaded):
        assert type(again.block) is type(net.block)
        torch.testing.assert_close(again(X), expected)
        shift(again)
        assert not torch.allclose(again(X), expected)
    torch.testing.assert_close(net(X), expected)


def test_copies_of_a_resnet_compiled_in_parts():
    from torchvision.models import resnet18

    net = insert_double_attention(resnet18(num_classes=4), ["layer1.0"], c_m=4, c_n=4)
    net, x = randomize(net).eval(), torch.randn(2, 3, 32, 32)
    torch._dynamo.reset()
    net.layer1.compile(backend="eager")
    net.get_submodule("layer1.0.double_attention").compile(backend="eager")
    expected = net(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        shift(twin.layer1)
        assert not torch.allclose(twin(x), expected)
        twin.load_state_dict(net.state_dict())
        torch.testing.assert_close(twin(x), expected)
    torch.testing.assert_close(net(x), expected)


# --- recomputation --------------------------------------------------------------------------------


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Hooks:
    """A forward hook on every module, for a while."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        self.handles = [m.register_forward_hook(lambda *_: None) for m in self.module.modules()]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


class Nothing(Hooks):
    def __enter__(self):
        self.handles = []


WATCHERS = {
    "nothing": Nothing,
    "flops": lambda module: FlopCounterMode(display=False),
    "mode": lambda module: Watching(),
    "hooks": Hooks,
    "profiler": lambda module: torch.profiler.profile(),
    "anomalies": lambda module: torch.autograd.detect_anomaly(check_nan=False),
}


def recomputed(net, x):
    return checkpoint(net, x, use_reentrant=False)


def recomputed_reentrantly(net, x):
    return checkpoint(net, x, use_reentrant=True)


def recomputed_in_segments(net, x):
    x = checkpoint_sequential([net.stem, net.block], 2, x, use_reentrant=False)
    return net.head(x.movedim(1, -1))


WAYS = [recomputed, recomputed_reentrantly, recomputed_in_segments]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("make", [*LAYERS.values()][1:], ids=[*LAYERS][1:])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_a_watcher_of_one_of_the_two_runs_changes_no_gradient(make, way, watch):
    net = network(make)
    expected = gradients(net, Net.forward, Nothing, Nothing)
    for pair in ((watch, Nothing), (Nothing, watch)):
        torch.testing.assert_close(gradients(net, way, *pair), expected)


def gradients(net, run, forward, backward):
    x = X.clone().requires_grad_()
    net.zero_grad()
    with forward(net):
        y = run(net, x)
    with backward(net):
        y.square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("make", [*LAYERS.values()][1:], ids=[*LAYERS][1:])
@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_activation_checkpointing_by_wrapper(make, implementation):
    net, twin = (network(make) for _ in range(2))
    wrap = functools.partial(checkpoint_wrapper, checkpoint_impl=implementation)
    named = (DoubleAttention, PlainBlock)
    apply_activation_checkpointing(
        twin, checkpoint_wrapper_fn=wrap, check_fn=lambda module: isinstance(module, named)
    )
    assert any("_checkpoint_wrapped_module" in name for name, _ in twin.named_modules())
    assert twin.state_dict().keys() == net.state_dict().keys()
    twin.load_state_dict(net.state_dict())
    x = X.clone().requires_grad_()
    results = []
    for one in (net, twin):
        y = one(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in one.parameters())])
        x.grad = None
    torch.testing.assert_close(*results)


# --- sharded on one rank --------------------------------------------------------------------------


def sharded(rank, version):
    found = []
    for make in LAYERS.values():
        net, x = network(make).train(), X.clone()
        if version == 2:
            mesh = init_device_mesh("cpu", (1,))
            for part in (net.block, net):
                fully_shard(part, mesh=mesh)
            wrapped = net
        else:
            wrapped = FullyShardedDataParallel(
                net, device_id=torch.device("cpu"), use_orig_params=version == "1 original"
            )
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        outs = []
        for _ in range(2):
            optimizer.zero_grad()
            y = wrapped(x)
            y.square().mean().backward()
            optimizer.step()
            outs.append(y.detach().clone())
        found.append(outs)
    return found


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)
@pytest.mark.parametrize("version", [1, "1 original", 2])
def test_sharded_parameters(version, tmp_path):
    (found,) = ranks.run(1, sharded, tmp_path, version)
    for make, outs in zip(LAYERS.values(), found, strict=True):
        net = network(make).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for out in outs:
            optimizer.zero_grad()
            y = net(X)
            y.square().mean().backward()
            optimizer.step()
            torch.testing.assert_close(out, y)
