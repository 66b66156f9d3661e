"""Routes and core operators with shipped tiles at full width, against float64 block by block.

Small shapes do not fill a tile, and an error averaged over a whole result hides a tile with a wrong
corner. Without a GPU the same tests interpret small shapes.
"""

import functools
import pathlib
import re

import pytest
import torch

import da_triton
from da_triton import reference
from da_triton.ops.triton import core
from da_triton.ops.triton.plan import kernel_limits
from da_triton.planning import planner
from da_triton.planning.costs import AZ, XH
from da_triton.planning.planner import Route
from da_triton.planning.shapes import Shape
from da_triton.runtime import launch, tiles
from support import launches
from support.block import NAMES, Case, definition, inputs, run
from support.numerics import (
    AS_ON_A_GPU,
    DEVICE,
    DTYPES,
    TOLERANCE,
    check,
    check_blocks,
    peaky,
    relative_rms,
)

REPETITIONS = 20 if DEVICE == "cuda" else 2
# Positions of 28×28 and 14×14 images; interpreted, fewer with the same powers of two as factors.
LONG, SHORT = (784, 196) if DEVICE == "cuda" else (80, 20)
# (C, c_m, c_n, heads) of blocks; (m, n) of the core: one tile of G, and blocks of it.
WIDTHS = [
    (64, 32, 64, 1), (128, 64, 128, 1), (256, 64, 64, 1), (256, 128, 128, 4), (512, 64, 32, 1),
    (512, 128, 128, 1), (512, 512, 512, 1), (1024, 64, 256, 1),
]  # fmt: skip
CORES = [(24, 19), (200, 20), (64, 64), (32, 128), (128, 128), (256, 256), (512, 512)]
VARIANTS = {
    "bf16": (torch.bfloat16, False, LONG, {}),
    "bf16-masked-nhwc": (torch.bfloat16, True, SHORT, {"masked": True}),
    "fp16-masked": (torch.float16, False, SHORT, {"masked": True, "save_v": True}),
    "fp16-nhwc": (torch.float16, True, LONG, {}),
}


def routes(width):
    """Every forward route with tiles for this width, with an unfused backward pass in the same
    order; and the fused backward pass if it has tiles."""
    channels, c_m, c_n, heads = width
    s = Shape(2, channels, c_m, c_n, heads, LONG, 2, True)
    limits = kernel_limits(s, channels, tiles.architecture(torch.device(DEVICE)), 132)
    found = {}
    for option in planner.routes(s, limits):
        route = option.route._replace(
            backward="unfused", backward_order=option.route.order, batch_chunk=1
        )
        found[f"{route.order}-{route.gather}-{route.distribute}"] = route
    found["AZ-copied"] = Route(AZ, "unfused", "unfused", "unfused", AZ, 2, True, True)
    if limits.backward:
        found["XH-backward"] = Route(XH, "unfused", "unfused", "fused", XH, 2)
    return found


RUNS = [
    pytest.param(width, route, variant, id=f"{'x'.join(map(str, width))}-{name}-{variant}")
    for width in (WIDTHS if AS_ON_A_GPU else WIDTHS[:1])
    for name, route in routes(width).items()
    for variant in (VARIANTS if AS_ON_A_GPU else [*VARIANTS][1:2])
]


def case_of(width, variant):
    channels, c_m, c_n, heads = width
    _, _, length, options = VARIANTS[variant]
    return Case(heads, channels, c_m, c_n, length, **options)


@functools.lru_cache(maxsize=2)
def problem(width, variant):
    """The case, its inputs, and the definition's results in float64 and in their dtype."""
    case, (dtype, channels_last, *_) = case_of(width, variant), VARIANTS[variant]
    given = inputs(case, dtype, channels_last)
    return case, given, *(definition(case, *given, kind) for kind in (torch.float64, dtype))


@pytest.mark.parametrize(("width", "route", "variant"), RUNS)
def test_block(width, route, variant):
    case, given, exact, own = problem(width, variant)
    found = run(route, case, *given)
    for name, *results in zip(NAMES, found, exact, own, strict=True):
        check_blocks(*results[:2], given[0].dtype, results[2], name)
    repeat(functools.partial(run, route, case, *given), found)


def repeat(function, first):
    for _ in range(REPETITIONS - 1):
        for one, other in zip(first, function(), strict=True):
            assert torch.equal(one, other)


def core_inputs(m, n, dtype, masked, length):
    a, b, v, dz = (peaky(2, 2, c, length, dtype=dtype) for c in (m, n, n, m))
    mask = None
    if masked:
        mask = torch.rand(2, length, device=DEVICE) > 0.4
        mask[1] = False
    return a, b, v, mask, dz


def core_run(backend, a, b, v, mask, dz, dtype):
    """Z and the gradients of A, B and V."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (a, b, v)]
    g = backend.gather(*leaves[:2], mask=mask, logit_scale=0.7)
    z = backend.distribute(g, leaves[2], scale=1.3)
    return z.detach(), *torch.autograd.grad(z, leaves, dz.to(dtype))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), CORES if AS_ON_A_GPU else CORES[:1])
def test_core(m, n, dtype, masked):
    given = core_inputs(m, n, dtype, masked, LONG)
    exact, own = (core_run(reference, *given, kind) for kind in (torch.float64, dtype))
    found = core_run(core, *given, dtype)
    for name, *results in zip(("Z", "dA", "dB", "dV"), found, exact, own, strict=True):
        check_blocks(*results[:2], dtype, results[2], name)
    repeat(functools.partial(core_run, core, *given, dtype), found)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


TF32 = 2 * 2.0**-10  # both operands of a product are cut to 10 bits of mantissa


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(("m", "n"), CORES[:5] if AS_ON_A_GPU else CORES[:3])
def test_core_in_tf32(m, n, masked):
    given = core_inputs(m, n, torch.float32, masked, LONG)
    exact, own = (core_run(reference, *given, kind) for kind in (torch.float64, torch.float32))
    found = core_run(core, *given, torch.float32)
    for name, *results in zip(("Z", "dA", "dB", "dV"), found, exact, own, strict=True):
        check_blocks(*results[:2], torch.float32, results[2], name, TF32)
    error = max(map(relative_rms, found, exact))
    assert error > 10 * TOLERANCE[torch.float32], "not in TF32"
    repeat(functools.partial(core_run, core, *given, torch.float32), found)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter, not on a GPU")
def test_every_kernel_is_among_them():
    folder = pathlib.Path(da_triton.__file__).parent / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    with launches.count() as names:
        for width in WIDTHS:
            for variant in VARIANTS:
                case = case_of(width, variant)
                given = inputs(case, *VARIANTS[variant][:2])
                for route in routes(width).values():
                    run(route, case, *given)
        case = case_of(WIDTHS[0], "bf16")._replace(length=13 * 128)
        given = inputs(case, torch.bfloat16, False)
        with launch.trial(13, []):  # partials, as many as on a GPU
            run(routes(WIDTHS[0])["XH-backward"], case, *given)
        for m, n in CORES:
            core_run(core, *core_inputs(m, n, torch.float32, True, SHORT), torch.float32)
    assert {*re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)} <= {*names}


@pytest.mark.parametrize("place", [(0, 0), (60, 500), (120, 992)])
def test_a_wrong_patch_is_detected(place):
    """8 × 8 of two million numbers: in one tile, across tiles, in a tile at the edge."""
    right = torch.randn(16, 128, 1000, dtype=torch.float64, device=DEVICE)
    found = right.to(torch.bfloat16)
    check_blocks(found, right, torch.bfloat16, found)
    i, j = place
    found[3, i : i + 8, j : j + 8] = torch.randn(8, 8, device=DEVICE)
    assert relative_rms(found, right) < 4e-2
    check(found, right, torch.bfloat16)
    with pytest.raises(AssertionError, match="a block is off by"):
        check_blocks(found, right, torch.bfloat16, right.to(torch.bfloat16))
