"""Tiles of many values: E made in parts or read again, and tiles for few programs and for rows."""

import pytest
import torch

from da_triton import reference
from da_triton.kernels import core_full_n, distribute, gather
from da_triton.ops.triton import core
from da_triton.runtime import guard, launch, tiles
from support.compare import check_against_reference
from support.numerics import DEVICE, TOLERANCE, peaky, relative_rms

each_layout = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
N, LONG = 300, 200  # four blocks of positions


def constants(n, length, backward, monkeypatch, num_sms=2):
    """Of the launch that writes Z, or Q and dV."""
    monkeypatch.setattr(launch, "num_sms", lambda device: num_sms)
    x, g = torch.empty(1, 1, n, length).bfloat16(), torch.empty(1, 1, 64, n).bfloat16()
    z = launch.empty_activations_like(x, 64)
    y, out, e, dx = (z, None, x, x) if backward else (x, z, None, x)
    made = core_full_n._full_n(x, g, y, out, e, dx, *[None] * 6, backward, True)
    return made.constants


@pytest.mark.skipif(DEVICE == "cuda", reason="a table of its own")
def test_a_program_of_many_values_makes_e_in_parts_or_reads_it(monkeypatch):
    forward = constants(N, LONG, False, monkeypatch)
    assert forward["PART_N"] < forward["BLOCK_N"] == 512
    assert constants(N, LONG, True, monkeypatch)["READ_E"]
    narrow = constants(100, LONG, False, monkeypatch)
    assert narrow["PART_N"] == narrow["BLOCK_N"]
    assert not constants(100, LONG, True, monkeypatch)["READ_E"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.skipif(DEVICE == "cuda", reason="a table of its own")
def test_few_programs_have_a_tile_of_their_own(backward, monkeypatch):
    many, few = (constants(N, LONG, backward, monkeypatch, sms) for sms in (2, 132))
    assert many["PART_N"] * many["BLOCK_L"] != few["PART_N"] * few["BLOCK_L"]
    assert not few["READ_E"]
    names = tiles.PLAIN, "gradient"
    assert (
        few["BLOCK_L"]
        == tiles.find("full_n", "half", 64, N, names[backward] + tiles.FEW, "sm_90").block_l
    )


def test_a_table_without_a_tile_for_few_programs_has_the_variant_itself():
    for arch in tiles.ARCHITECTURES:
        own = tiles.find("full_n", "half", 64, 128, "gradient", arch)
        assert tiles.find("full_n", "half", 64, 128, "gradient" + tiles.FEW, arch) == own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "linear"])
@each_layout
def test_many_values_match_the_definition(channels_last, softmax, dtype, monkeypatch, poisoned):
    monkeypatch.setattr(launch, "num_sms", lambda device: 2)
    layout = {"dtype": dtype, "channels_last": channels_last}
    g = peaky(1, 1, 70, N, dtype=dtype)
    v, upstream = peaky(1, 1, N, LONG, **layout), peaky(1, 1, 70, LONG, **layout)
    options = {"softmax": softmax, "logit_scale": 0.7, "scale": 1.3}
    check_against_reference(core.distribute, reference.distribute, (g, v), upstream, **options)


def test_a_part_may_hold_nothing_but_minus_infinity(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 2)
    g, v = (peaky(1, 1, *shape, dtype=torch.bfloat16) for shape in ((70, N), (N, LONG)))
    v[:, :, :256, 3:70] = -float("inf")
    found = core.distribute(g, v)
    torch.testing.assert_close(found, reference.distribute(g, v), rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(DEVICE == "cuda", reason="a table of its own")
def test_gather_of_several_tiles_runs_in_pairs_on_rows_of_positions(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 2)

    def options(m, n, transposed=False):
        a, b = (torch.empty(1, 1, size, 64).bfloat16() for size in (m, n))
        a, b = (x.mT.contiguous().mT if transposed else x for x in (a, b))
        g, lse = torch.empty(m, n), torch.empty(n)
        rest = gather.apart(a, b), 1, 1, 0, 1, True
        return gather._gathering(a, b, None, g, lse, lse, *[None] * 4, *rest).options

    assert options(200, 200)["maxnreg"] == 128
    assert "maxnreg" not in options(200, 30, transposed=True)
    assert "maxnreg" not in options(100, 100)
    monkeypatch.setattr(launch, "num_sms", lambda device: 4)  # which single programs fill
    assert "maxnreg" not in options(200, 200)
    monkeypatch.setattr(tiles, "architecture", lambda device: "gfx942")
    launch.forget()
    assert "maxnreg" not in options(32, 32)


def test_sources_of_either_memory_format_are_split_by_their_own_tile(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 8)
    sources, values = [], []
    for length, channels_last in ((200, True), (333, False)):
        layout = {"dtype": torch.bfloat16, "channels_last": channels_last}
        a, b = (peaky(1, 1, 150, length, **layout) for _ in range(2))
        sources.append((a, b, None))
        values.append((a.double(), b.double()))
    g, _ = gather.gather_forward(sources, 0.7)
    a, b = (torch.cat(each, -1) for each in zip(*values, strict=True))
    assert relative_rms(g, a @ (0.7 * b).softmax(-1).mT) < TOLERANCE[torch.bfloat16]


@pytest.mark.skipif(DEVICE == "cuda", reason="a table of its own")
@pytest.mark.parametrize("choice", [False, True])
@pytest.mark.parametrize("name", ["distribute_forward", "distribute_backward", "gather_partials"])
def test_a_proof_takes_the_tile_of_its_call(name, choice, monkeypatch):
    """Though its few programs would choose the other one."""
    given = {
        "g": torch.randn(1, 1, 150, N), "v": torch.randn(1, 1, N, LONG).bfloat16(),
        "dz": torch.randn(1, 1, 150, LONG).bfloat16(), "scale": 1.0, "logit_scale": 1.0,
        "softmax": True, "need_g": True, "need_v": True,
    }  # fmt: skip
    given["sources"] = [(given["dz"], given["v"], None)]
    spec = guard.LAUNCHERS[name]
    given = {key: given[key] for key in spec.signature.parameters if key in given}
    if name == "gather_partials":
        sms = {True: 132, False: 6}  # of six programs
        chosen = tiles.ALIGNED if choice else tiles.PLAIN
        expected = tiles.find("gather", "half", 150, N, chosen, "sm_90")
    else:
        sms = {True: 132, False: 2}
        variant = "gradient" if name == "distribute_backward" else tiles.PLAIN
        expected = tiles.find("full_n", "half", 150, N, variant + tiles.FEW * choice, "sm_90")
    monkeypatch.setattr(launch, "num_sms", lambda device: sms[choice])
    assert spec.choice(**given) == choice
    case = spec.case(given)
    monkeypatch.setattr(launch, "num_sms", lambda device: sms[not choice])
    assert spec.case(given) != case
    made: list[str] = []
    with launch.trial(2, made, choice):
        getattr(gather if name == "gather_partials" else distribute, name)(**given)
    blocks = f"{expected.block_m}x{expected.block_n}x{expected.block_l}"
    assert made[0] == f"{blocks} {expected.num_warps}w {expected.num_stages}s"


def test_gradients_do_not_depend_on_which_of_them_are_needed(monkeypatch, poisoned):
    monkeypatch.setattr(launch, "num_sms", lambda device: 2)
    g, dz = torch.randn(1, 1, 150, N), torch.randn(1, 1, 150, LONG).bfloat16()
    given = dz, g, torch.randn(1, 1, N, LONG).bfloat16(), 1.0, True, 1.0
    dg, dv = distribute.distribute_backward(*given, True, True)
    only_g, none = distribute.distribute_backward(*given, True, False)
    assert none is None
    assert torch.equal(only_g, dg)
    none, only_v = distribute.distribute_backward(*given, False, True)
    assert none is None
    assert torch.equal(only_v, dv)
