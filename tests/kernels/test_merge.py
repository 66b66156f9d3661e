"""Partial results that small launches merge or add: one, a few, many; against float64."""

import pytest
import torch

from da_triton.arguments import Weights
from da_triton.kernels import combine, delta, merge
from da_triton.precision import accumulator, lse_dtype
from da_triton.runtime import stand_ins
from support import launches
from support.numerics import DEVICE, DTYPES, check

HEADS, CHANNELS, C_M, C_N, C_OUT = 2, 70, 10, 38, 130
COUNTS = [1, 5, 8, 9, 31, 70]  # of partials: one, few, a group, one more, many


def partials(num_partials, features, dtype, batch=2):
    acc = accumulator(dtype)
    shape = batch, num_partials, C_N
    mx = 4 * torch.randn(shape, device=DEVICE, dtype=acc)
    return torch.randn(*shape, features, device=DEVICE, dtype=acc), mx, mx.exp().clamp(0.1, 9)


def weights(dtype):
    def normal(*shape):
        return (torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).to(dtype)

    return Weights(
        normal(C_M, CHANNELS), normal(C_M), normal(C_N, CHANNELS), normal(C_N, CHANNELS),
        normal(C_N), normal(C_OUT, C_M), normal(C_OUT),
    )  # fmt: skip


def merged(function, parts, w, like, **options):
    """lse, G, M and H, or those of them that there are."""
    lse = torch.full((2, C_N), torch.nan, device=DEVICE, dtype=lse_dtype(like))
    g = torch.full((2, HEADS, C_M // HEADS, C_N // HEADS), torch.nan, device=DEVICE).to(parts[0])
    m, h = function(parts, w, lse, g, heads=HEADS, scale=0.7, **options)
    return {"lse": lse, "g": g, "m": m, "h": h}


def masked(parts, gone):
    """The partials where masks leave no position to some attention maps."""
    acc, mx, total = (t.clone() for t in parts)
    for index in gone:
        acc[index], mx[index], total[index] = 0, -torch.inf, 0
    return acc, mx, total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_x", [False, True], ids=["G", "M"])
@pytest.mark.parametrize("num_partials", COUNTS)
def test_partials(num_partials, from_x, dtype):
    parts = partials(num_partials, CHANNELS if from_x else C_M // HEADS, dtype)
    gone = (0, 0), (1, slice(None), 3)  # one partial; all of them, for one n
    for parts_, mask in ((parts, False), (masked(parts, gone), True)):
        w = weights(dtype)
        options = {"mask": mask, "from_x": from_x, "want_m": from_x}
        wide = Weights(*(t.double() for t in w))
        expected = merged(
            stand_ins.merge_partials, [t.double() for t in parts_], wide, torch.float64, **options
        )
        found = merged(combine.merge_partials, parts_, w, dtype, **options)
        again = merged(combine.merge_partials, parts_, w, dtype, **options)
        for name, value in expected.items():
            if value is None:
                assert found[name] is None, name
                continue
            assert torch.equal(found[name], again[name]), name
            inf = value == torch.inf
            assert torch.equal(found[name] == torch.inf, inf), name
            check(found[name].masked_fill(inf, 0), value.masked_fill(inf, 0), dtype)


@pytest.mark.parametrize("num_partials", [3, 20])
def test_g_alone(num_partials):
    parts, w = partials(num_partials, C_M // HEADS, torch.float32), weights(torch.float32)
    options = {"mask": False, "from_x": False}
    expected = merged(combine.merge_partials, parts, w, torch.float32, **options)
    found = merged(combine.merge_partials, parts, w, torch.float32, want_h=False, **options)
    assert found["h"] is None
    check(found["g"], expected["g"].double(), torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted without a GPU, which would run")
@pytest.mark.parametrize("want_h", [False, True], ids=["G alone", "H"])
@pytest.mark.parametrize("from_x", [False, True], ids=["G", "M"])
@pytest.mark.parametrize("num_partials", COUNTS)
def test_launches(num_partials, from_x, want_h):
    parts = partials(num_partials, CHANNELS if from_x else C_M // HEADS, torch.float32)
    options = {"mask": False, "from_x": from_x, "want_h": want_h}
    with launches.count() as made:
        merged(combine.merge_partials, parts, weights(torch.float32), torch.float32, **options)
    kernels = [name for name in made if name.endswith("_kernel")]
    if num_partials <= combine.FEW and (from_x or want_h):
        expected = ["combine_kernel"]
    else:
        expected = ["gather_combine_kernel"] + ["product_kernel"] * (from_x + want_h)
    assert kernels == expected


def test_nan_stays_in_its_attention_map():
    """A logit that is NaN makes its partial's maximum, sum and features NaN."""
    parts = partials(20, C_M // HEADS, torch.float32)
    acc = parts[0]
    g = acc.new_empty((2, HEADS, C_M // HEADS, C_N // HEADS))
    lse = acc.new_empty((2, C_N), dtype=torch.float64)
    merge.merge(parts, g, lse, mask=False)
    clean, place = g.clone(), (1, 17, 3)
    for t in parts:
        t[place] = torch.nan
    merge.merge(parts, g, lse, mask=False)
    assert g[1, 0, :, 3].isnan().all()
    assert lse[1, 3].isnan()
    g[1, 0, :, 3] = clean[1, 0, :, 3]
    assert torch.equal(g, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("large", [False, True], ids=["", "large m"])
@pytest.mark.parametrize("num_partials", COUNTS)
def test_partials_of_the_gradient_of_h(num_partials, large, dtype, monkeypatch):
    if large:  # a launch for each product, where partials are many
        monkeypatch.setattr(combine, "SMALL_M", 1)
    w, acc = weights(dtype), accumulator(dtype)
    wide = Weights(*(t.double() for t in w))
    parts = torch.randn(2, num_partials, C_N, C_OUT, device=DEVICE, dtype=acc)
    m = torch.randn(2, CHANNELS, C_N, device=DEVICE, dtype=acc)
    lse = torch.randn(2, C_N, device=DEVICE, dtype=lse_dtype(dtype))
    lse[1, 3] = torch.inf
    options = {"heads": HEADS, "scale": 0.7}
    names = ("dh", "dg", "dm", "delta", "lse")
    wanted = stand_ins.combine_backward(parts.double(), lse.double(), m.double(), wide, **options)
    found = combine.combine_backward(parts, lse, m, w, **options)
    again = combine.combine_backward(parts, lse, m, w, **options)
    for name, *pair, expected in zip(names, found, again, wanted, strict=True):
        assert torch.equal(*pair), name
        if name == "lse":
            assert torch.equal(pair[0], lse)
        elif name == "delta":  # of dM as it is rounded
            expected = (found[2].double() * m.double()).sum(1)
            check(pair[0], expected, torch.float32 if acc == torch.float32 else dtype)
        else:
            check(pair[0], expected, dtype, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_partials", COUNTS)
def test_partials_of_the_gradient_of_g(num_partials, dtype):
    acc = accumulator(dtype)
    shape = 2, HEADS, 67, 19
    parts = torch.randn(num_partials, 19, *shape[:3], device=DEVICE, dtype=acc).permute(
        2, 3, 0, 4, 1
    )
    g = torch.randn(shape, device=DEVICE, dtype=acc)
    bias = torch.randn(HEADS * shape[2], device=DEVICE).to(dtype)
    lse = torch.randn(2, HEADS, 19, device=DEVICE, dtype=lse_dtype(dtype))
    dlse = torch.randn_like(lse)
    lse[1, 1, 3] = torch.inf
    options = {"bias": bias, "mask": True, "dlse": dlse}
    lowp, found, shifted = delta.lowp_and_delta(parts, g, dtype, lse, **options)
    again = delta.lowp_and_delta(parts, g, dtype, lse, **options)
    assert all(map(torch.equal, (lowp, found, shifted), again))
    assert torch.equal(shifted, lse)
    expected = parts.double().sum(2)
    expected[1, 1, :, 3] = 0
    check(lowp, expected, dtype)
    without_bias = g.double() - bias.double().view(1, HEADS, -1, 1)
    expected = (lowp.double() * without_bias).sum(2) - dlse.double()
    check(found, expected, torch.float32 if acc == torch.float32 else dtype)


@pytest.mark.parametrize("c_m", [300, 512])
def test_many_features_are_merged_a_partial_at_a_time(c_m):
    """A tile of all features of G leaves no room for several partials at once."""
    parts = partials(3, c_m, torch.float32, batch=1)
    w = Weights(
        torch.randn(c_m, 32, device=DEVICE), None, torch.randn(C_N, 32, device=DEVICE),
        torch.randn(C_N, 32, device=DEVICE), None, torch.randn(16, c_m, device=DEVICE), None,
    )  # fmt: skip
    lse = torch.empty(1, C_N, device=DEVICE, dtype=lse_dtype(torch.float32))
    g = torch.empty(1, 1, c_m, C_N, device=DEVICE)
    combine.merge_partials(parts, w, lse, g, heads=1, scale=1.0, mask=False, from_x=False)
    acc, mx, total = (t.double() for t in parts)
    weight = (mx - mx.amax(1, keepdim=True)).exp()
    expected = (acc * weight[..., None]).sum(1) / (total * weight).sum(1)[..., None]
    torch.testing.assert_close(g[0, 0].mT.double(), expected[0], rtol=1e-5, atol=1e-5)
