"""DTensors sharded over batch and heads, on gloo ranks, against whole tensors."""

import pytest
import torch
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

import da_triton
from da_triton import reference
from da_triton.parallel.dtensor import register_dtensor
from support import ranks
from support.numerics import check
from support.splits import LENGTH, activations, block, image, trained

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)


def sharded_core(rank, axis, needs):
    register_dtensor()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    whole = [
        x[:2].clone().requires_grad_(need) for x, need in zip(activations(), needs, strict=True)
    ]
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(8)) > 0.4
    z = da_triton.double_attention(*whole, heads=2, mask=mask, backend="eager")
    z.square().sum().backward()
    shards = [
        distribute_tensor(x.detach(), mesh, [Shard(axis)]).requires_grad_(need)
        for x, need in zip(whole, needs, strict=True)
    ]
    mask = distribute_tensor(mask, mesh, [Shard(0) if axis == 0 else Replicate()])
    with CommDebugMode() as sent:
        ours = da_triton.double_attention(*shards, heads=2, mask=mask, backend="triton")
        ours.square().sum().backward()
    assert sent.get_total_counts() == 0
    assert ours.placements == (Shard(axis),)
    check(ours.full_tensor(), z, torch.float64)
    for ours_, expected in zip(shards, whole, strict=True):
        if expected.grad is None:
            assert ours_.grad is None
        else:
            assert ours_.grad.placements == (Shard(axis),)
            check(ours_.grad.full_tensor(), expected.grad, torch.float64)


def sharded_cores(rank):
    for axis in (0, 1):
        # Both in one process: a result for one choice must not be reused for another.
        for needs in ((True, False, True), (True, True, False)):
            sharded_core(rank, axis, needs)
    return True


def test_the_core_on_shards_of_batch_or_heads(tmp_path):
    assert all(ranks.run(2, sharded_cores, tmp_path))


class Sent(TorchDispatchMode):
    """Collectives, and da_triton operators, as they reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.collectives, self.operators = [], set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            self.collectives.append(op.name())
        if op.namespace == "da_triton":
            self.operators.add(op.name().split("::")[1].split(".")[0])
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        return op(*args, **(kwargs or {}))


def sharded_block(rank):
    register_dtensor()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    x = image()
    for recompute in (False, True):
        expected = trained(block(backend="triton", recompute=recompute), x)
        layer = distribute_module(block(backend="triton", recompute=recompute), mesh)
        leaf = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        with Sent() as sent:  # CommDebugMode hooks every module: the convolutions would be called
            y = layer(leaf)
            y.square().sum().backward()
        assert not sent.collectives
        assert {"block", "block_backward"} <= sent.operators
        assert y.placements == leaf.grad.placements == (Shard(0),)
        for ours, whole in zip(
            [y, leaf.grad, *(p.grad for p in layer.parameters())], expected, strict=True
        ):
            check(ours.full_tensor(), whole, torch.float64)
    return True


def test_the_block_on_shards_of_the_batch(tmp_path):
    assert all(ranks.run(2, sharded_block, tmp_path))


def compiled_block(rank):
    register_dtensor()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    counter = CompileCounterWithBackend("aot_eager")
    layer = distribute_module(block(backend="triton"), mesh)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for scale in (0.9, 0.7, 0.6):
        whole = block(backend="triton")
        whole.scale = layer.scale = scale
        leaf = distribute_tensor(image(), mesh, [Shard(0)])
        for ours, expected in zip(
            trained(layer, leaf, call=compiled), trained(whole, image()), strict=True
        ):
            check(ours.full_tensor(), expected, torch.float64)
    return counter.frame_count


def test_a_compiled_block_on_shards_whose_scale_changes(tmp_path):
    assert ranks.run(2, compiled_block, tmp_path) == [2, 2]


def core_of_tensors(rank):
    """The core's operators for scales that are tensors: those of a rank belong to no mesh."""
    register_dtensor()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    scale = torch.tensor(0.7, dtype=torch.float64)
    for axis in (0, 1):
        found = []
        a, b, v = (x[:2].unflatten(1, (2, -1)) for x in activations())
        for tensors in ([a, b, v], [distribute_tensor(x, mesh, [Shard(axis)]) for x in (a, b, v)]):
            with CommDebugMode() as sent:
                found.append(each_of_the_core(*tensors, scale))
            assert sent.get_total_counts() == 0
        for whole, ours in zip(*found, strict=True):
            assert ours.placements == (Shard(axis),)
            check(ours.full_tensor(), whole, torch.float64)
    return True


def each_of_the_core(a, b, v, scale):
    operators = torch.ops.da_triton
    g, lse = operators.gather_of_tensors(a, b, None, None, None, scale)
    z = operators.distribute_of_tensors(g, v, scale, True, scale)
    dg, dv = operators.distribute_backward_of_tensors(z, g, v, scale, True, scale, True, True)
    given = dg, a, b, None, g, lse, None, scale
    return g, lse, z, dg, dv, *operators.gather_backward_of_tensors(*given, True, True)


def test_the_core_on_shards_with_scales_that_change(tmp_path):
    assert all(ranks.run(2, core_of_tensors, tmp_path))


def redistributed(rank):
    register_dtensor()
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    a, b, _ = (distribute_tensor(x, mesh, [Shard(2)]) for x in activations())
    return da_triton.gather(a, b, heads=2, backend="triton").full_tensor()


def test_shards_of_the_positions_are_gathered_first(tmp_path):
    expected = reference.gather(*(x.unflatten(1, (2, -1)) for x in activations()[:2]))
    for g in ranks.run(2, redistributed, tmp_path):
        check(g, expected, torch.float64)
