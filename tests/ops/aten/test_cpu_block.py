"""The public block on a CPU: every path through it against the definition, and when it is used.

A few constants decide how samples and positions are cut up; setting them reaches every way with
small tensors.
"""

import functools
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from da_triton import double_attention_block
from da_triton.ops.aten import cpu_block, cpu_products, cpu_small
from da_triton.planning import planner
from da_triton.planning.costs import AZ, XH
from support.cases import ORDERS
from support.compare import check_against_reference, step
from support.numerics import check, peaky

C, C_M, C_N, POSITIONS = 20, 12, 8, (5, 7)
WANTED = ("x", "weight_a", "bias_a", "weight_b", "weight_v", "bias_v", "weight_out", "bias_out")
eager = functools.partial(double_attention_block, backend="eager")
EVERYTHING = {
    "heads": 2, "logit_scale": 0.5, "logit_scale_v": 0.7, "scale": 1.3, "softmax_v": False,
}  # fmt: skip
WAYS = {
    "small": {"MOST_ELEMENTS": 2**18},
    "small, convolved": {"MOST_ELEMENTS": 2**18, "CONVOLVED_MULTIPLICATIONS": 0, "NARROW": 0},
    "samples together": {},
    "copied one by one": {"FEW_ELEMENTS": 0},
    "samples apart": {"FEW_POSITIONS": 1},
    "tiles": {"FEW_POSITIONS": 1, "TILE": 12 * C, "LEAST_POSITIONS": 1},
    "large n": {"FEW_POSITIONS": 1, "NARROW": 1},
}


@pytest.fixture(autouse=True)
def _however_few_descriptors_and_elements(monkeypatch):
    monkeypatch.setattr(cpu_products, "FEW_DESCRIPTORS", 0)
    monkeypatch.setattr(cpu_small, "MOST_ELEMENTS", 0)


def take(name, monkeypatch):
    for constant, value in WAYS[name].items():
        monkeypatch.setattr(cpu_small if "small" in name else cpu_products, constant, value)
    if name == "small, convolved":  # those are for several threads
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=["small", "tiles"])
def one_tile_or_several(request, monkeypatch):
    take(request.param, monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """Grows by one for each call of the functions that are tested here."""
    made = []
    for kind in (cpu_block.Call, cpu_small.Call):

        def forward(*args, original=kind.forward):
            made.append(1)
            return original(*args)

        monkeypatch.setattr(kind, "forward", forward)
    return made


def leaves(dtype, batch=3, channels_last=False, bias=True, reconstruct=True, positions=POSITIONS):
    """x and the weights, as the block takes them; logits of deviation about 3."""
    length = math.prod(positions)
    x = peaky(batch, 1, C, length, dtype=dtype, deviation=1)[:, 0].reshape(batch, C, *positions)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = [x]
    for i, (o, c) in enumerate([(C_M, C), (C_N, C), (C_N, C), (C, C_M)]):
        gain = 3 if i in (1, 2) else 1
        found += [gain * torch.randn(o, c, dtype=torch.float64) / c**0.5]
        found += [torch.randn(o, dtype=torch.float64) if bias else None]
    if not reconstruct:
        found[7:] = [None, None]
    return [None if z is None else z.to(dtype).requires_grad_() for z in found]


def gradients(given, upstream=None, wanted=WANTED, **options):
    return step(functools.partial(double_attention_block, **options), given, upstream, wanted)


def compare(given, upstream=None, order="auto", recompute="auto", **options):
    ours = functools.partial(
        double_attention_block, backend="torch", order=order, recompute=recompute
    )
    # The terms of bias_v's gradient cancel: in float32 only the tolerance says something.
    only_tolerance = ["bias_v"] if given[0].dtype.itemsize > 2 else []
    check_against_reference(
        ours, eager, given, upstream, only_tolerance=only_tolerance, wanted=WANTED, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("order", ORDERS)
def test_matches_the_definition(order, heads, channels_last, dtype, way, calls):
    given = leaves(dtype, channels_last=channels_last)
    compare(given, order=order, heads=heads, residual=True)
    with torch.no_grad():
        out = double_attention_block(*given, order=order, heads=heads, residual=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)
    assert len(calls) == 2


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["one head", "every option"])
def test_fewer_positions_than_descriptors(options, channels_last, recompute, way, monkeypatch):
    planned = []
    for kind in (cpu_block.Call, cpu_small.Call):

        def plan(call, *args, original=kind.plan):
            found = original(call, *args)
            planned.extend([call] * found)
            return found

        monkeypatch.setattr(kind, "plan", plan)
    given = leaves(torch.float32, channels_last=channels_last, positions=(2, 2))
    compare(given, order="AZ", recompute=recompute, **options)
    assert {call.short for call in planned} == {True}


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("heads", "batch"), [(1, 1), (1, 3), (2, 1), (2, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_one_descriptor_per_head(order, heads, batch, channels_last, way, calls):
    """Both memory formats at once."""
    given = leaves(torch.float64, batch, channels_last)
    for i in (3, 4, 5, 6):
        given[i] = given[i][:heads].detach().requires_grad_()
    compare(given, order=order, heads=heads)
    assert len(calls) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_every_option_at_once(order, way):
    mask = torch.rand(3, *POSITIONS) > 0.4
    compare(leaves(torch.float32), order=order, mask=mask, **EVERYTHING)


@pytest.mark.parametrize("order", ORDERS)
def test_without_biases(order, way):
    compare(leaves(torch.float32, bias=False), order=order)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", ["AZ", "XZ"])
def test_without_reconstruction(order, residual, way):
    given = leaves(torch.float32, reconstruct=False)
    if residual:
        given[1:3] = [torch.randn(C, *shape, requires_grad=True) for shape in ((C,), ())]
    compare(given, order=order, residual=residual)


@pytest.mark.parametrize("order", ORDERS)
def test_masked_positions_take_no_part_whatever_they_hold(order, way):
    given = leaves(torch.float32)
    mask = torch.rand(3, *POSITIONS) > 0.4
    mask[1] = False
    compare(given, order=order, mask=mask, residual=True)
    first = torch.zeros(3, *POSITIONS, dtype=torch.bool)
    first[0, 0, 0] = True
    given[0].data[0, :, 0, 0] = torch.inf
    out = double_attention_block(*given, order=order, mask=mask & ~first, backend="torch")
    assert not out[0, :, 1:].isnan().any()


@pytest.mark.parametrize("order", ORDERS)
def test_weights_have_zero_gradients_when_every_position_is_masked(order):
    mask = torch.zeros(3, *POSITIONS, dtype=torch.bool)
    results = gradients(leaves(torch.float32), order=order, mask=mask, backend="torch")
    for name in ("weight_a", "bias_a", "weight_b", "weight_v"):
        assert not results[name].any(), name


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("order", ORDERS)
def test_one_gradient_alone(order, wanted, one_tile_or_several):
    given = leaves(torch.float64)
    options = {"order": order, "heads": 2, "residual": True, "backend": "torch"}
    expected = gradients(given, **options)
    results = gradients(given, wanted=[wanted], **options)
    assert torch.equal(results[wanted], expected[wanted])


@pytest.mark.parametrize("order", ORDERS)
def test_upstream_gradients_of_any_strides(order, way):
    given = leaves(torch.float64)
    dense = torch.randn(3, C, *POSITIONS, dtype=torch.float64)
    shared = torch.randn(3, C, 1, 1, dtype=torch.float64)
    for upstream in (
        dense.contiguous(memory_format=torch.channels_last),
        dense.mT.contiguous().mT,
        shared.expand_as(dense),
        torch.ones((), dtype=torch.float64).expand_as(dense),
    ):
        compare(given, upstream, order=order)


def test_strides_of_x(way):
    base = torch.randn(3, C, 7, 14)
    for x in (base[..., ::2], base[..., 2:9], base[:1].expand(3, -1, -1, -1), base.mT):
        given = [x.detach().requires_grad_(), *leaves(torch.float32)[1:]]
        compare(given, residual=True)


@pytest.mark.parametrize("order", ORDERS)
def test_an_empty_batch(order):
    results = gradients(leaves(torch.float32, batch=0), order=order, backend="torch")
    assert results["out"].shape == results["x"].shape == (0, C, *POSITIONS)
    assert all(not value.any() for value in results.values())


@pytest.mark.parametrize("order", ORDERS)
def test_a_nan_stays_in_its_sample(order, way):
    given = leaves(torch.float32)
    upstream = torch.randn(3, C, *POSITIONS)
    upstream[1, 0, 0, 0] = torch.nan
    results = gradients(given, upstream, order=order, residual=True, backend="torch")
    assert results["x"][1].isnan().any()
    assert not results["x"][[0, 2]].isnan().any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_first_and_second_derivatives(order, masked, one_tile_or_several):
    mask = None
    if masked:
        mask = torch.rand(1, 35) > 0.4
    given = leaves(torch.float64, batch=1, positions=(35,))
    small = [0.3 * given[0].detach()[:, :3], *(torch.randn(s, dtype=torch.float64) for s in
             ((2, 3), 2, (4, 3), (4, 3), 4, (3, 2), 3))]  # fmt: skip
    small = [z.detach()[..., :6] if i == 0 else z for i, z in enumerate(small)]
    small = [z.requires_grad_() for z in small]
    options = {"order": order, "heads": 2, "residual": True, "backend": "torch"}
    if masked:
        options["mask"] = mask[:, :6]

    def function(x, wa, ba, wb, wv, bv, wo, bo):
        return double_attention_block(x, wa, ba, wb, None, wv, bv, wo, bo, **options)

    assert torch.autograd.gradcheck(function, small)
    assert torch.autograd.gradgradcheck(function, small)


def test_second_derivatives_of_inputs_that_depend_on_each_other():
    x, wa, ba, wb, bb, _, bv, wo, bo = leaves(torch.float64)
    found = []
    for backend in ("torch", "eager"):
        tied = wb.clone().requires_grad_()
        out = double_attention_block(x, wa, ba, tied, bb, 2 * tied, bv, wo, bo, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), tied, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), tied)
        found.append(second)
    check(*found, torch.float64, slack=100)


@pytest.mark.parametrize("order", ORDERS)
def test_recomputation_saves_nothing_and_gives_the_same(order, way):
    given = leaves(torch.float32)
    options = {"order": order, "residual": True, "backend": "torch"}
    results = [gradients(given, recompute=r, **options) for r in (False, True)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert saved_elements(given, recompute=True, **options) == 0


def saved_elements(given, **options):
    """Elements saved for backward beyond x and the weights."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda z: saved.__setitem__(z.data_ptr(), z.untyped_storage().nbytes() // 4) or z,
        lambda z: z,
    ):
        double_attention_block(*given, **options)
    return sum(saved[p] for p in saved if p not in {z.data_ptr() for z in given if z is not None})


@pytest.mark.parametrize("order", ORDERS)
def test_no_more_is_saved_than_by_eager(order):
    """Eager saves A, P, Q, Z and G."""
    x = torch.randn(2, 32, 40, 40, requires_grad=True)
    weights = [torch.randn(16, 32), None, torch.randn(16, 32), None, torch.randn(16, 32), None]
    saved = saved_elements([x, *weights, torch.randn(32, 16), None], order=order, backend="torch")
    assert saved <= 2 * (4 * 16 * 1600 + 16 * 16)
    assert saved > 2 * 2 * 16 * 1600


def test_saved_tensors_are_not_changed():
    given = leaves(torch.float32)
    out = double_attention_block(*given, residual=True, backend="torch")
    first = torch.autograd.grad(out.sum(), given[0], retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(out.sum(), given[0]))


def test_a_tile_without_mass():
    """Every logit of an attention map is -inf in one tile; elsewhere there is something."""
    logits = torch.randn(2, 30, 5)
    logits[0, :10, 2] = logits[1, :, 3] = -torch.inf
    parts = [cpu_products.softmax_and_lse(b.clone(), alone=False) for b in logits.split(10, 1)]
    mass = torch.stack([lse for _, lse in parts]).softmax(0)
    whole = torch.cat([p * s[:, None] for (p, _), s in zip(parts, mass, strict=True)], 1)
    torch.testing.assert_close(whole, logits.softmax(1), equal_nan=True)


def test_long_samples_are_cut_into_equal_tiles():
    x = torch.empty(1, 10_001, cpu_products.TILE // 4000)
    sizes = [x[:, tile].shape[1] for tile in cpu_products.position_tiles(x)]
    assert sizes == [3334, 3334, 3333]


def test_half_precision_and_an_autocast_residual_are_left_alone(calls):
    given = leaves(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert double_attention_block(*given, residual=True).dtype == torch.float32
    double_attention_block(*(z.detach().half() for z in given))
    assert not calls


def test_transforms_are_left_alone(calls):
    x, *weights = (z.detach() for z in leaves(torch.float64))

    def loss(x):
        return double_attention_block(x, *weights, residual=True, backend="torch").square().sum()

    expected = torch.stack([loss(x[:1]), loss(x[1:2]), loss(x[2:])])
    calls.clear()
    torch.testing.assert_close(torch.func.vmap(lambda y: loss(y[None]))(x), expected)
    gradient = torch.func.grad(loss)(x)
    _, derivative = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(derivative, gradient.sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        derivative = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(derivative, gradient.sum())
    assert not calls


def test_observers_are_left_alone(calls):
    given = [z.detach() for z in leaves(torch.float32)]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            return op(*args, **(kwargs or {}))

    class Marked(torch.Tensor):
        pass

    with Watch():
        double_attention_block(*given)
    assert type(double_attention_block(given[0].as_subclass(Marked), *given[1:])) is Marked
    assert double_attention_block(*(z.to("meta") for z in given)).device.type == "meta"
    assert not calls
    traced = torch.jit.trace(lambda x: double_attention_block(x, *given[1:], order="AH"), given[0])
    other = torch.randn(2, C, 4, 3)
    expected = double_attention_block(other, *given[1:], backend="eager")
    torch.testing.assert_close(traced(other), expected, rtol=1e-4, atol=1e-5)


def test_batched_upstream_gradients():
    given = leaves(torch.float64)
    out = double_attention_block(*given, residual=True, backend="torch")
    upstream = torch.randn(2, *out.shape, dtype=torch.float64)
    (together,) = torch.autograd.grad(
        out, given[0], upstream, is_grads_batched=True, retain_graph=True
    )
    for one, alone in zip(together, upstream, strict=True):
        torch.testing.assert_close(
            one, torch.autograd.grad(out, given[0], alone, retain_graph=True)[0]
        )


def test_numpy_integers(calls):
    given = leaves(torch.float32)
    ours = double_attention_block(*given, heads=np.int64(2), backend="torch")
    torch.testing.assert_close(ours, double_attention_block(*given, heads=2, backend="eager"))
    assert calls


def test_auto_takes_the_fewest_macs():
    assert planner.choose_order(512, 128, 128, 1, 400, 4, True, cpu=True) == AZ
    assert planner.choose_order(128, 128, 128, 4, 4096, 4, True, cpu=True) == XH
    assert planner.choose_order(512, 512, 19, 1, 8192, 4, True, cpu=True) == XH


def test_a_wrong_reference_is_rejected():
    given = leaves(torch.float32)
    right = double_attention_block(*given, backend="torch")
    wrong = double_attention_block(*given, backend="torch", scale=1.01)
    with pytest.raises(AssertionError):
        check(right, wrong.double(), torch.float32)


def test_a_tile_is_an_eighth_of_the_last_level_cache_within_bounds(tmp_path):
    assert cpu_products.tile_for(None) == cpu_products.tile_for(2**20) == 2**20
    assert cpu_products.tile_for(64 * 2**20) == 2 * 2**20
    assert cpu_products.tile_for(480 * 2**20) == 2**22
    assert cpu_products.last_level_cache(tmp_path) is None
    for index, size in enumerate(["48K", "64K", "2048K", "32768K"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert cpu_products.last_level_cache(tmp_path) == 32 * 2**20
    (tmp_path / "index0" / "size").write_text("what\n")
    assert cpu_products.last_level_cache(tmp_path) is None


@pytest.mark.parametrize(
    ("c_n", "length", "channels_last", "ours"),
    [
        (8, 64, False, False),  # short: copied, and then channels are adjacent
        (8, 256, True, False),
        (8, 256, False, True),
        (9, 64, False, True),
        (9, 256, True, True),
    ],
)
def test_few_descriptors_that_are_adjacent_take_the_other_path(
    c_n, length, channels_last, ours, monkeypatch, calls
):
    monkeypatch.setattr(cpu_products, "FEW_DESCRIPTORS", 8)
    x = torch.randn(2, 16, 4, length // 4)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    a, b, v = (torch.randn(c, 16) for c in (12, c_n, c_n))
    given = (x, a, None, b, None, v, None)
    out = double_attention_block(*given, backend="torch")
    assert bool(calls) == ours
    expected = double_attention_block(
        *(z if z is None else z.double() for z in given), backend="eager"
    )
    check(out, expected, torch.float32)
