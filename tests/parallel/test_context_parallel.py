"""Positions split over gloo ranks, against one process."""

import copy
import pickle

import pytest
import torch
from torch import distributed, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import da_triton
from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from da_triton.ops.aten import core as aten
from da_triton.parallel.context_parallel import WireBytes, wire_bytes
from support import ranks
from support.numerics import check, relative_rms
from support.splits import CUTS, LENGTH, activations, block, image, leaves, own, trained

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="no gloo"
)
each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
each_count = pytest.mark.parametrize("count", CUTS)


# --- the core -------------------------------------------------------------------------------------


def problems():
    """Options by name. Of "masked", sample 1 has no position anywhere, and sample 2 on no rank but
    the last."""
    generator = torch.Generator().manual_seed(4)
    mask = torch.rand(3, LENGTH, generator=generator) > 0.4
    mask[1], mask[2, :-2] = False, False
    tokens = [torch.randn(1, c, 3, generator=generator, dtype=torch.float64) for c in (6, 8)]
    scales = {"logit_scale": 0.7, "logit_scale_v": 0.6, "scale": 1.3}
    return {
        "plain": {},
        "masked": {"heads": 2, "mask": mask, **scales},
        "tokens": {"heads": 2, "mask": mask, "extra": tokens, "softmax_v": False, **scales},
    }


def core(a, b, v, extra=None, mask=None, **options):
    """Z and all gradients, for a loss that is a sum over positions."""
    if mask is not None:  # masked positions may hold anything
        with torch.no_grad():
            for x in (a, b):
                x.masked_fill_(~mask[:, None], torch.nan)
    options["mask"] = mask
    extra = None if extra is None else leaves(extra)
    z = da_triton.double_attention(a, b, v, extra=extra, **options)
    z.square().sum().backward()
    return [z.detach(), a.grad, b.grad, v.grad, *(x.grad for x in extra or ())]


def core_on_a_rank(rank, cuts, backend, dtype):
    found = {}
    for name, options in problems().items():
        if "mask" in options:
            options["mask"] = own(options["mask"], rank, cuts)
        if "extra" in options:
            options["extra"] = [x.to(dtype) for x in options["extra"]]
        group = distributed.group.WORLD
        found[name] = core(
            *leaves(activations(dtype), rank, cuts), process_group=group, backend=backend, **options
        )
    return found


def check_core(found, name, options, dtype):
    """Concatenated shards equal the unsharded result; token gradients are sums, all on rank 0."""
    expected = core(*leaves([x.double() for x in activations(dtype)]), backend="eager", **options)
    for i, whole in enumerate(expected):
        if i < 4:
            check(torch.cat([slices[i] for slices in found], -1), whole, dtype, what=(name, i))
        else:
            check(found[0][i], whole, dtype, what=(name, i))
            assert not any(slices[i].any() for slices in found[1:])


@each_count
@each_backend
def test_ranks_give_what_one_device_gives(backend, count, tmp_path):
    dtype = torch.float64 if count == 4 else torch.float32
    found = ranks.run(count, core_on_a_rank, tmp_path, CUTS[count], backend, dtype)
    for name, options in problems().items():
        if "extra" in options:
            options["extra"] = [x.to(dtype).double() for x in options["extra"]]
        check_core([each[name] for each in found], name, options, dtype)


def test_a_softmax_over_each_slice_alone_is_rejected():
    cuts = CUTS[2]
    for name, options in problems().items():
        local = []
        for rank in range(2):
            given = dict(options)
            if "mask" in given:
                given["mask"] = own(given["mask"], rank, cuts)
            local.append(core(*leaves(activations(), rank, cuts), **given))
        with pytest.raises(AssertionError):
            check_core(local, name, options, torch.float64)


def test_weights_far_from_zero_keep_their_digits():
    logits = 300 + 3 * torch.randn(4, 50)
    lse = logits.double().logsumexp(-1)
    check(aten.weights_from_lse(logits, lse), logits.double().softmax(-1), torch.float32)
    with pytest.raises(AssertionError):
        check(
            aten.weights_from_lse(logits, lse.float()), logits.double().softmax(-1), torch.float32
        )


def bits(rank, cuts):
    a, b, _ = activations(torch.float32)
    shards = leaves([a, b], rank, cuts)
    found = []
    for backend in ("torch", "triton"):
        for _ in range(2):
            g = da_triton.gather(
                *shards, heads=2, backend=backend, process_group=distributed.group.WORLD
            )
            grads = torch.autograd.grad((g * (rank + 1)).sin().sum(), shards)
            found.append([g.detach(), *grads])
    return found


def test_the_same_bits_on_every_rank_and_every_time(tmp_path):
    found = ranks.run(4, bits, tmp_path, CUTS[4])
    for first, again in ((0, 1), (2, 3)):
        for each in found:
            assert torch.equal(each[first][0], found[0][first][0]), "another G on another rank"
            for x, y in zip(each[first], each[again], strict=True):
                assert torch.equal(x, y), "another answer the second time"


def infinite(rank, cuts):
    a, b, _ = activations()
    b[:, 0, : cuts[1]] = -torch.inf
    b[:, 1] = -torch.inf
    shards = leaves([a, b], rank, cuts)
    found = []
    for backend in ("torch", "triton"):
        g = da_triton.gather(*shards, backend=backend, process_group=distributed.group.WORLD)
        found.append([g.detach(), *torch.autograd.grad(g.square().sum(), shards)])
    return found


def test_logits_of_minus_infinity_in_one_slice_or_in_all(tmp_path):
    cuts = CUTS[2]
    a, b, _ = activations()
    b[:, 0, : cuts[1]] = -torch.inf
    wide = leaves([a, torch.cat([b[:, :1], b[:, 2:]], 1)])
    g = da_triton.gather(*wide, backend="eager")
    # Each rank's loss is of G as a whole: two losses.
    grads = torch.autograd.grad(2 * g.square().sum(), wide)
    for found in zip(*ranks.run(2, infinite, tmp_path, cuts), strict=True):
        for rank, (g_, da, db) in enumerate(found):
            assert not g_[..., 1].any(), "an attention map without weight on any rank"
            assert not db[:, 1].any()
            check(torch.cat([g_[..., :1], g_[..., 2:]], -1), g, torch.float64)
            check(da, own(grads[0], rank, cuts), torch.float64)
            others = torch.cat([db[:, :1], db[:, 2:]], 1)
            check(others, own(grads[1], rank, cuts), torch.float64)


def half_precision(rank, cuts, backend):
    a, b, v = (own(x, rank, cuts) for x in activations(torch.float32))
    group = distributed.group.WORLD
    with torch.autocast("cpu", dtype=torch.bfloat16):
        g = da_triton.gather(a, b, backend=backend, process_group=group)
        z = da_triton.double_attention(a, b, v, backend=backend, process_group=group)
    return g, z


@each_backend
def test_autocast(backend, tmp_path):
    found = ranks.run(2, half_precision, tmp_path, CUTS[2], backend)
    a, b, v = (x.bfloat16().double() for x in activations(torch.float32))
    for g, z in found:
        assert g.dtype == z.dtype == torch.bfloat16
        check(g, da_triton.gather(a, b), torch.bfloat16)
    whole = da_triton.double_attention(a, b, v)
    check(torch.cat([z for _, z in found], -1), whole, torch.bfloat16, slack=2)


def nothing_to_do(rank, cuts):
    empty = leaves([x[:0] for x in activations()], rank, cuts)
    return core(*empty, process_group=distributed.group.WORLD)[:2]


def test_an_empty_batch(tmp_path):
    for z, da in ranks.run(2, nothing_to_do, tmp_path, CUTS[2]):
        assert z.shape[0] == da.shape[0] == 0


def two_groups(rank, cuts):
    """Ranks 0 and 1 share the positions of sample 0, ranks 2 and 3 those of sample 1."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2, 3])]
    sample = rank // 2
    shards = [own(x[sample : sample + 1], rank % 2, cuts) for x in activations()]
    with pytest.raises(TypeError, match="this rank belongs to"):
        da_triton.double_attention(*shards, process_group=groups[1 - sample])
    tokens = problems()["tokens"]["extra"]
    return core(*leaves(shards), extra=tokens, process_group=groups[sample])


def test_a_group_of_some_of_the_ranks(tmp_path):
    found = ranks.run(4, two_groups, tmp_path, CUTS[2])
    tokens = problems()["tokens"]["extra"]
    for sample in range(2):
        one = [x[sample : sample + 1] for x in activations()]
        z, *grads = core(*leaves(one), extra=tokens)
        first, second = found[2 * sample : 2 * sample + 2]
        check(torch.cat([first[0], second[0]], -1), z, torch.float64)
        check(first[4], grads[3], torch.float64, what="tokens: the first rank of the group")
        assert not second[4].any()


def differentiated_twice(rank):
    a, b, _ = leaves(activations())
    g = da_triton.gather(a, b, process_group=distributed.group.WORLD)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(g.sum(), a, create_graph=True)
    return True


def test_a_second_derivative_is_rejected(tmp_path):
    assert all(ranks.run(2, differentiated_twice, tmp_path))


# --- the block ------------------------------------------------------------------------------------


def block_on_a_rank(rank, cuts, backend):
    x = own(image(), rank, cuts)
    mask = own(problems()["masked"]["mask"][:2], rank, cuts)
    layer = block(distributed.group.WORLD, backend)
    hooked = copy.deepcopy(layer)
    hooked.convA.register_forward_hook(lambda *_: None)
    ways = {
        "plain": lambda x, mask: layer(x, mask),
        "recompute": block(distributed.group.WORLD, backend, recompute=True),
        "hooked": hooked,
        "checkpoint": lambda x, mask: checkpoint(layer, x, mask, use_reentrant=False),
    }
    found = {}
    for name, way in ways.items():
        owner = way if isinstance(way, nn.Module) else layer
        result, dx, *grads = trained(owner, x, mask, way)
        for grad in grads:
            distributed.all_reduce(grad)
        found[name] = [result, dx, *grads]
    return found


@each_count
@each_backend
def test_gradients_of_the_weights_are_sums_over_ranks(backend, count, tmp_path):
    expected = trained(block(), image(), problems()["masked"]["mask"][:2])
    found = ranks.run(count, block_on_a_rank, tmp_path, CUTS[count], backend)
    for name in found[0]:
        for i, whole in enumerate(expected):
            slices = [each[name][i] for each in found]
            actual = torch.cat(slices, -1) if i < 2 else slices[0]
            check(actual, whole, torch.float64, what=(name, i))


def with_ddp(rank, cuts):
    layer = nn.parallel.DistributedDataParallel(block(distributed.group.WORLD))
    y = layer(own(image(), rank, cuts))
    (distributed.get_world_size() * y.square().sum()).backward()
    return [p.grad for p in layer.parameters()]


def test_with_distributed_data_parallel(tmp_path):
    """As the docstring says: the loss times the number of ranks. One of them has no position."""
    expected = trained(block(), image())[2:]
    for grads in ranks.run(4, with_ddp, tmp_path, CUTS[4]):
        for grad, whole in zip(grads, expected, strict=True):
            check(grad, whole, torch.float64)


def residual_layer(group=None):
    torch.manual_seed(7)
    layer = ResidualDoubleAttention(
        8, 4, 6, zero_init=False, process_group=group, dtype=torch.float64, position_axes=1
    )
    nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer.eval()


def residual_on_a_rank(rank, cuts):
    return residual_layer(distributed.group.WORLD)(own(image(), rank, cuts)).detach()


def test_a_folded_normalisation(tmp_path):
    found = ranks.run(2, residual_on_a_rank, tmp_path, CUTS[2])
    check(torch.cat(found, -1), residual_layer()(image()), torch.float64)


def looked_at(rank, cuts):
    mask = own(problems()["masked"]["mask"][:2], rank, cuts)
    x = own(image(), rank, cuts)[:, :, None]
    return block(distributed.group.WORLD).attention_maps(x, mask[:, None])


def test_attention_maps_sum_to_one_over_all_ranks(tmp_path):
    found = ranks.run(4, looked_at, tmp_path, CUTS[4])
    expected = block().attention_maps(image(), problems()["masked"]["mask"][:2])
    for slices, whole in zip(zip(*found, strict=True), expected, strict=True):
        check(torch.cat(slices, -1).squeeze(3), whole, torch.float64)
    assert not found[0][0].requires_grad


def compiled_on_a_rank(rank, backend):
    layer = block(distributed.group.WORLD, backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    same = []
    for length in (5, 7, 8):
        layer.scale = layer.logit_scale = 1 / length
        x = image()[..., rank : rank + length]
        found = [trained(layer, x, call=call) for call in (compiled, layer)]
        same.append(all(relative_rms(x, y) < 1e-13 for x, y in zip(*found, strict=True) if y.any()))
    return *same, counter.frame_count == 2


@each_backend
def test_compiled_without_a_break_and_once_for_all_sizes_and_scales(backend, tmp_path):
    assert all(map(all, ranks.run(2, compiled_on_a_rank, tmp_path, backend)))


# --- copies, errors -------------------------------------------------------------------------------


def copied(rank):
    layer = block(distributed.group.WORLD)
    twin = copy.deepcopy(layer)
    assert twin.process_group is layer.process_group
    assert twin.convA.weight is not layer.convA.weight
    assert torch.equal(twin.convA.weight, layer.convA.weight)
    assert copy.copy(layer).process_group is layer.process_group
    assert "process_group of 2 ranks" in repr(nn.Sequential(twin))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(layer)
    assert layer.state_dict().keys() == block().state_dict().keys()
    twin.process_group = None
    loaded = pickle.loads(pickle.dumps(twin))
    return loaded(image()), copy.deepcopy(loaded).process_group


def test_copies_share_the_group_and_pickles_are_rejected(tmp_path):
    for alone, group in ranks.run(2, copied, tmp_path):
        assert group is None
        check(alone, block()(image()), torch.float64)


def rejected(rank):
    a, b, v = activations()
    group = distributed.group.WORLD
    for call, message in (
        (lambda: da_triton.gather(a, b, backend="eager", process_group=group), "not support"),
        (lambda: DoubleAttention(8, order="XH", process_group=group), "paper's order"),
        (lambda: DoubleAttention(8, backend="eager", process_group=group), "not support"),
        (lambda: da_triton.double_attention(a, b, v[:, :, :0]), "one position"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    return True


def test_choices_that_cannot_be_split_are_rejected(tmp_path):
    assert all(ranks.run(1, rejected, tmp_path))


@pytest.mark.parametrize("group", ["world", 0, object()])
def test_something_else_than_a_group_is_rejected(group):
    a, b, v = activations()
    for call in (
        lambda: da_triton.gather(a, b, process_group=group),
        lambda: da_triton.double_attention(a, b, v, process_group=group),
        lambda: DoubleAttention(8, process_group=group),
    ):
        with pytest.raises(TypeError, match=r"mesh\.get_group"):
            call()


# --- network traffic ------------------------------------------------------------------------------


class Received(TorchDispatchMode):
    """Bytes of other ranks' data that collectives bring, in order."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.namespace in ("c10d", "_c10d_functional") and "wait" not in op.name():
            assert op.name() == "_c10d_functional::all_gather_into_tensor"
            self.bytes.append(out.nbytes - args[0].nbytes)
        return out


def counted(rank, length, dtype, backend):
    a, b = (torch.randn(2, c, length, dtype=dtype, requires_grad=True) for c in (6, 8))
    with Received() as received:
        group = distributed.group.WORLD
        g = da_triton.gather(a, b, heads=2, backend=backend, process_group=group)
        g.sum().backward()
    return received.bytes


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [(torch.float64, "torch"), (torch.float32, "triton"), (torch.bfloat16, "torch")],
)
def test_bytes_on_the_wire_do_not_depend_on_positions(dtype, backend, tmp_path):
    expected = wire_bytes(2, 2, 3, 4, ranks=3, dtype=dtype)
    for length in (5, 50):
        for received in ranks.run(3, counted, tmp_path, length, dtype, backend):
            assert received == list(expected)


def counted_in_a_block(rank, cuts, recompute):
    layer, x = block(distributed.group.WORLD, recompute=recompute), own(image(), rank, cuts)
    with Received() as forward:
        y = layer(x)
    with Received() as backward:
        y.sum().backward()
    return len(forward.bytes), len(backward.bytes)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_gathers_again_only_if_it_recomputes(recompute, tmp_path):
    for found in ranks.run(2, counted_in_a_block, tmp_path, CUTS[2], recompute):
        assert found == (1, 2 if recompute else 1)


def test_bytes_of_a_large_image():
    """128 features, 128 descriptors; x of 256 channels at 2²⁴ positions, in float32."""
    assert wire_bytes(1, 1, 128, 128, ranks=4) == WireBytes(199_680, 196_608)
    assert 40_000 * sum(wire_bytes(1, 1, 128, 128, ranks=4)) < 4 * 256 * 2**24
    assert wire_bytes(1, 1, 128, 128, ranks=1) == (0, 0)
    for count, megabytes in (
        (8, 0.9),
        (64, 8.3),
        (512, 67),
    ):  # the table of da_triton.parallel.context_parallel
        assert sum(wire_bytes(1, 1, 128, 128, ranks=count)) == pytest.approx(1e6 * megabytes, 0.03)
