"""Batches split over gloo ranks: DDP and FSDP train like one process, compiled and checkpointed.

``convB.bias``, which cannot change a result, has a gradient of zeros: DDP would stop without one.
"""

import contextlib
import functools

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from support import ranks
from support.numerics import check, relative_rms

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)
BLOCKS = {
    "plain": functools.partial(DoubleAttention, 8, 4, 6, heads=2, residual=True),
    "residual": functools.partial(
        ResidualDoubleAttention, 8, 4, 6, heads=2, norm=functools.partial(nn.GroupNorm, 2)
    ),
}
ALL = [(kind, backend) for kind in BLOCKS for backend in ("torch", "triton")]
SOME = ALL[1:3]  # each block, and each backend, once


class Net(nn.Module):
    def __init__(self, kind, backend, dtype, recompute=False):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = BLOCKS[kind](backend=backend)
        self.head = nn.Linear(8, 5)
        self.recompute = recompute
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) / 2)  # zeros would hide a wrong gradient
        self.to(dtype)

    def forward(self, x):
        x = self.stem(x)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return self.head(x.flatten(2).mean(-1))


def batch(dtype, rank=0, count=1):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return (t.to(dtype).chunk(count)[rank] for t in (x, y))


def train(net, call, x, y, context):
    """By name: gradients of the first of two steps, and the parameters after both."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    found = {}
    for _ in range(2):
        optimizer.zero_grad()
        with context():
            out = call(x)
        nn.functional.mse_loss(out.to(y.dtype), y).backward()
        if not found:
            found |= {f"gradient of {name}": _whole(p.grad) for name, p in _named(net)}
        optimizer.step()
    return found | {name: _whole(p.detach()) for name, p in _named(net)}


def _named(net):
    return [(n.replace("_checkpoint_wrapped_module.", ""), p) for n, p in net.named_parameters()]


def _whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x.clone()


# --- ways to train: net -> callable ---------------------------------------------------------------


def ddp(net):
    return DistributedDataParallel(net)


def ddp_compiled(net):
    return torch.compile(DistributedDataParallel(net), backend="aot_eager")


def fsdp(net, **options):
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for part in (net.block, net):
        fully_shard(part, mesh=mesh, **options)
    return net


def fsdp_whole(net):
    return fully_shard(net, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))


def fsdp_compiled(net):
    return torch.compile(fsdp(net), backend="aot_eager")


def fsdp_checkpointed(net):
    def is_block(module):
        return isinstance(module, (DoubleAttention, ResidualDoubleAttention))

    apply_activation_checkpointing(net, check_fn=is_block)
    return fsdp(net)


def fsdp_mixed(net):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return fsdp(net, mp_policy=policy)


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


# --- against one process --------------------------------------------------------------------------


def on_a_rank(rank, way, settings, dtype, recompute, context):
    found = []
    for kind, backend in settings:
        net = Net(kind, backend, dtype, recompute)
        x, y = batch(dtype, rank, distributed.get_world_size())
        found.append(train(net, way(net), x, y, context))
    return found


@functools.cache
def alone(kind, backend, dtype, context=contextlib.nullcontext):
    net = Net(kind, backend, dtype)
    return train(net, net, *batch(dtype), context)


def compare(way, settings, folder, recompute=False):
    """In float64, where one process and two agree but for the order of sums."""
    given = (way, settings, torch.float64, recompute, contextlib.nullcontext)
    for each in ranks.run(2, on_a_rank, folder, *given):
        for setting, found in zip(settings, each, strict=True):
            expected = alone(setting[0], "eager", torch.float64)
            assert found.keys() == expected.keys()
            for name, exact in expected.items():
                if name.startswith("gradient") and name.endswith("convB.bias"):
                    assert not found[name].any()  # eager's own are roundings
                else:
                    check(found[name], exact, torch.float64, what=(setting, name))


each_way = functools.partial(pytest.mark.parametrize, "way", ids=lambda way: way.__name__)


@each_way([ddp, fsdp, fsdp_whole])
def test_two_ranks_train_as_one_process(way, tmp_path):
    compare(way, ALL, tmp_path)


@each_way([ddp_compiled, fsdp_compiled])
def test_compiled(way, tmp_path):
    compare(way, SOME, tmp_path)


@each_way([ddp, fsdp, ddp_compiled])
def test_checkpointed(way, tmp_path):
    compare(way, SOME, tmp_path, recompute=True)


def test_wrapped_in_a_checkpoint_and_sharded(tmp_path):
    compare(fsdp_checkpointed, SOME, tmp_path)


@pytest.mark.parametrize(
    ("way", "context"),
    [(ddp, autocast), (fsdp, autocast), (fsdp_mixed, contextlib.nullcontext)],
    ids=["ddp", "fsdp", "fsdp_policy"],
)
def test_mixed_precision(way, context, tmp_path):
    """Parameters and gradients stay float32; as near to float64 as one process under autocast."""
    settings = [("plain", "torch"), ("residual", "triton")]
    given = (way, settings, torch.float32, False, context)
    for each in ranks.run(2, on_a_rank, tmp_path, *given):
        for (kind, backend), found in zip(settings, each, strict=True):
            exact = alone(kind, "eager", torch.float64)
            single = alone(kind, backend, torch.float32, autocast)
            assert all(x.dtype == torch.float32 for x in found.values())
            assert _distance(found, exact) <= 2 * _distance(single, exact)


def _distance(found, exact):
    return relative_rms(*(torch.cat([x.flatten() for x in t.values()]) for t in (found, exact)))


def test_half_a_batch_is_rejected():
    """Results of two ranks without communication."""
    net = Net("plain", "torch", torch.float64)
    found = train(net, net, *batch(torch.float64, 0, 2), contextlib.nullcontext)
    assert _distance(found, alone("plain", "eager", torch.float64)) > 0.05
