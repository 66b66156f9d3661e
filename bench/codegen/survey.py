"""The launches that are compiled: of every kernel, with every shipped tile.

    python -m bench.codegen.survey sm_90 [--sample] < digests

prints a JSON object a line. Rows whose digest is in the input, an array in JSON, are known and come
without figures; with ``--sample`` one row of each kernel is compiled, known or not, and no other.

Runs in a process of its own, without TRITON_INTERPRET, on a machine without a GPU. Which kernels
there are is found from the launches that calls make, on meta tensors:

    core        tiles by m and n, in each dtype and layout; those of the kernel that holds all n,
                also with a mask
    blocks      each block of the tile table, for the fused kernels: NCHW with all that the kernel
                can do beside, also with an odd number of positions, and channels-last memory
                without
    one sample  kernels that merge many partials
    workloads   what the named ones launch besides: several heads, an n that fills no block, and
                kernels that neither of the above reaches
"""

import contextlib
import json
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.codegen import ODD, Row, compile
from bench.codegen.compile import Launch
from bench.warm import always
from bench.workloads import WORKLOADS
from da_triton.kernels import distribute, gather, gather_backward, prologue
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_routes
from da_triton.planning.costs import AH, AZ, XH
from da_triton.planning.planner import Route
from da_triton.planning.shapes import Shape
from da_triton.precision import matmul_precision
from da_triton.runtime import launch, tiles

NUM_SMS = 132
BATCH = 64
FUSED = Route(XH, "fused", "fused", "fused", XH, BATCH)
FROM_A = Route(AH, "fused", "fused", "unfused", AZ, BATCH)
UNFUSED = Route(AZ, "unfused", "unfused", "unfused", AZ, BATCH)
OPTIONS = {"ACC", "PRECISION", "enable_fp_fusion", "num_warps", "num_stages", "P_SCALE"}

Sizes = tuple[int, int, int]  # C (0: the core), m, n


# --- launches of a call ---------------------------------------------------------------------------


class Variant(NamedTuple):
    """Facts that a launch depends on beside sizes."""

    layout: str = "nchw"
    length: int = 196
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    save_v: bool = False  # forward writes V, backward reads it
    softmax: bool = True
    extra: bool = False  # gather tokens beside the positions; of the core
    tf32: bool = False  # PyTorch's switch; of the core
    heads: int = 1  # of the block

    @property
    def title(self) -> str:
        words = [self.layout, f"L={self.length}", str(self.dtype)[6:], self.flags]
        return " ".join(filter(None, words))

    @property
    def flags(self) -> str:
        """The switches that are not as in a plain call, by name."""
        names = [name for name in ("masked", "save_v", "extra", "tf32") if getattr(self, name)]
        names += [] if self.softmax else ["no_softmax"]
        names += [f"heads={self.heads}"] if self.heads > 1 else []
        return " ".join(names)


WIDE = Variant("nchw", 784)  # 28×28
NARROW = Variant("nchw", 196)  # 14×14: rows are not a multiple of 16
LAST = Variant("nhwc", 196)  # either, in channels-last memory
ODD_ROWS = Variant("nchw", ODD)  # 7×7: every load is of one element
FLOAT32, FLOAT64 = (NARROW._replace(dtype=dtype) for dtype in (torch.float32, torch.float64))

Made = tuple[list[Launch], Variant, Sizes]
Found = tuple[Launch, Variant, Sizes]


@contextlib.contextmanager
def on(arch: str, num_sms: int = NUM_SMS) -> Iterator[None]:
    """Launchers choose as on a GPU of this architecture."""
    with (
        launch.forgetting(),
        mock.patch.object(tiles, "architecture", always(arch)),
        mock.patch.object(launch, "num_sms", always(num_sms)),
    ):
        yield


def core(m: int, n: int, v: Variant) -> list[Launch]:
    """One forward and backward pass of the core."""
    a, b, logits, dz = (_activations(v, channels).unsqueeze(1) for channels in (m, n, n, m))
    mask = _mask(v)
    sources = [(a, b, mask)]
    if v.extra:
        sources.append((a[..., :4], b[..., :4], None))
    with matmul_precision("tf32" if v.tf32 else "ieee"), compile.record() as made:
        g, lse = gather.gather_forward(sources, 1.0)
        distribute.distribute_forward(g, logits, 1.0, v.softmax, 1.0)
        dg, _ = distribute.distribute_backward(dz, g, logits, 1.0, v.softmax, 1.0, True, True)
        gather_backward.gradients(dg, a, b, mask, g, lse, None, 1.0, True, True)
    return made


def copies(m: int, _: int, v: Variant) -> list[Launch]:
    """Activations into channels-last memory and back, alone and to be added to."""
    x = _activations(v, m)
    with compile.record() as made:
        copied = prologue.formatted(x, True)
        prologue.formatted(copied, False)
        prologue.formatted(copied, False, x, x.new_empty(m))
    return made


def full_n(m: int, n: int, v: Variant) -> list[Launch]:
    """Launches of the kernel that holds all n, which only the block launches."""
    routes_ = UNFUSED, UNFUSED._replace(order=AH)
    made = [each for route in routes_ for each in of_block((64, m, n), route, v)]
    return [each for each in made if each.name == "full_n_kernel"]


def of_block(sizes: Sizes, route: Route, v: Variant, batch: int = BATCH) -> list[Launch]:
    """One training step of the block."""
    x, w, mask, options = block_inputs(sizes, v, batch)
    with compile.record() as made:
        _, lse, g, kept = routes.forward(x, w, mask, options, route, v.save_v)
        routes.backward(torch.empty_like(x), x, w, mask, lse, g, kept, options, route)
    return made


def block_inputs(sizes: Sizes, v: Variant, batch: int = BATCH) -> tuple[Any, ...]:
    """X, weights, mask and options of a block with bias and residual, without data."""
    channels, c_m, c_n = sizes
    x, mask = _activations(v, channels, batch), _mask(v, batch)
    w = routes.Weights(
        _empty(v, c_m, channels), _empty(v, c_m), _empty(v, c_n, channels),
        _empty(v, c_n, channels), _empty(v, c_n), _empty(v, channels, c_m), _empty(v, channels),
    )  # fmt: skip
    return x, w, mask, routes.Options(v.heads, 1.0, 1.0, 1.0, v.softmax, True)


def _activations(v, channels, batch=BATCH):
    """``(N, channels, L)``, without data."""
    if v.layout == "nchw":
        return _empty(v, batch, channels, v.length)
    return _empty(v, batch, v.length, channels).transpose(1, 2)


def _mask(v, batch=BATCH):
    shape = (batch, v.length)
    return torch.empty(shape, dtype=torch.uint8, device="meta") if v.masked else None


def _empty(v, *shape):
    return torch.empty(shape, dtype=v.dtype, device="meta")


# --- launches of a tile ---------------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel of the fused block, whose tiles the search finds."""

    blocks: dict[tuple[int, int], Sizes]  # (block_m, block_n) -> sizes that lead there
    # The variant that may have a tile of its own, and the call's flags that lead to it.
    special: tuple[str, dict[str, Any]] = ("", {})
    holds_channels: bool = False  # all of them, of a tile of X
    route: Route = FUSED  # one that launches the kernel


MASK, V = ("mask", {"masked": True}), ("v", {"save_v": True})
SIDES = (32, 64, 128)
ANY_TILE = (32, 4, 1, 1)  # of these kernels, where they are launched on the way
COMBINED = {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)}
HELD = {(c, n): (c, 64, n) for c in (64, 128, 256, 512) for n in SIDES if c * n <= 128 * 128}
FULL_C = [(64, 32), (64, 64), (128, 128), (256, 64)]
BY_CHANNELS = {(64, n): (1024, 64, n) for n in (32, 64, 128, 256, 512)}
FROM_A_BLOCKS = {(m, n): (4 * m * n // 64, m, n) for m, n in product(SIDES, SIDES)}
OUTER = {(c, n): (c, 64, n // 2) for c in (64, 128) for n in (64, 128)}
OUTER[256, 128] = (512, 64, 64)  # several tiles: a single one is split in two
KERNELS = {
    "combine": Kernel(COMBINED),
    "combine_backward": Kernel(COMBINED),
    "gather_from_x": Kernel(HELD, MASK, holds_channels=True),
    "block_bwd_gather": Kernel({(64, n): (512, 64, n) for n in (32, 64, 128, 256)}, MASK),
    "block_bwd_gather_full_c": Kernel({(c, n): (c, 64, n) for c, n in FULL_C}, MASK),
    "block_bwd_distribute": Kernel(HELD, V, holds_channels=True),
    "project_distribute": Kernel(HELD, V, holds_channels=True),
    "project_distribute_blocks": Kernel(BY_CHANNELS, V),
    "outer_product": Kernel(OUTER),
    "weight_gradients": Kernel({(32, 32): (256, 64, 64)}),
    "gather_from_a": Kernel(FROM_A_BLOCKS, MASK, route=FROM_A),
}


def record(
    kernel: str, sizes: Sizes, variant: Variant, tile: tuple[int, int, int, int] | None = None
) -> list[Launch]:
    """Launches of a kernel with its tile, or another one, whatever others of its route have."""
    launched = kernel.removesuffix("_blocks").removesuffix("_full_c") + "_kernel"
    return [each for each in _around(kernel, sizes, variant, tile) if each.name == launched]


def merging(sizes: Sizes, variant: Variant) -> list[Launch]:
    """Launches that merge the many partials of a single sample."""
    return [m for m in _around("combine_backward", sizes, variant, None, 1) if m.name in MERGING]


def _around(kernel, sizes, variant, tile, batch=BATCH):
    """All launches of a kernel's route, where other fused kernels have any tile, fitting or not."""
    original = tiles.tile

    def chosen(name, x, m, n, variant=tiles.PLAIN):
        entry = tile if name == kernel else ANY_TILE if name in KERNELS else None
        if entry is None:
            return original(name, x, m, n, variant)
        return tiles.Tile(*tiles.blocks(name, "half", m, n), *entry)

    with launch.forgetting(), mock.patch.object(tiles, "tile", chosen):
        return of_block(sizes, KERNELS[kernel].route, variant, batch)


# --- everything that ships ------------------------------------------------------------------------

Launches = Callable[[int, int, Variant], list[Launch]]
# Partials of one sample: with few and with many features, and an n that fills no tile.
ONE_SAMPLE = [(256, 64, 64), (512, 512, 19)]
MERGED = [
    WIDE, LAST._replace(length=WIDE.length), WIDE._replace(masked=True, dtype=torch.float16)
]  # fmt: skip
MERGING = {f"{name}_kernel" for name in ("gather_combine", "add", "product", "combine_backward")}
BY_BLOCKS = [(512, 512), (32, 512), (512, 32)]
SQUARES = [(n, n) for n in (32, 64, 128, 256, 512)]
SWITCHED = [
    WIDE._replace(masked=True, extra=True),
    WIDE._replace(softmax=False),
    WIDE._replace(dtype=torch.float16),
]
# Sizes (m, n) that reach every tile in the tables of the core, with the variants to compile.
CORE: list[tuple[Launches, list[tuple[int, int]], list[Variant]]] = [
    (core, [*product(SIDES, SIDES), *BY_BLOCKS], [WIDE, NARROW, LAST]),
    (core, [(32, 32), (512, 512)], [FLOAT32]),
    (core, [*product((16, 32), (16, 32)), (512, 512)], [FLOAT64]),
    (core, [(128, 128), (512, 512)], SWITCHED),
    (full_n, SQUARES, [WIDE, NARROW, LAST, NARROW._replace(masked=True)]),
    (full_n, SQUARES[-2:], [v._replace(length=56) for v in (NARROW, LAST)]),  # few programs
    (full_n, [(32, 32)], [FLOAT32, FLOAT64]),
    (copies, [(64, 64)], [NARROW, ODD_ROWS]),
]


def survey(arch: str, known: Collection[str] = (), sample: bool = False) -> Iterator[Row]:
    """Yields a description of every distinct compilation, of the first launch with its digest."""
    same: dict[tuple, Found] = {}
    distinct: dict[str, Found] = {}
    with on(arch):
        for each in found(arch):
            same.setdefault(compile.identity(each[0], arch), each)
        for each in same.values():
            distinct.setdefault(compile.digest(each[0], arch), each)
    wanted = distinct.keys() - set(known)
    if sample:  # the last digest of each kernel
        wanted = set({distinct[digest][0].name: digest for digest in sorted(distinct)}.values())
    for digest, (made, variant, sizes) in distinct.items():
        figures = compile.compile_launch(made, arch)._asdict() if digest in wanted else {}
        yield {"arch": arch, **describe(made, variant, sizes), "digest": digest, **figures}


def found(arch: str) -> list[Found]:
    """Launches of every kernel with every tile; to be called where ``on(arch)`` is."""
    runs: list[Made] = [
        (launches(m, n, variant), variant, (0, m, n))
        for launches, shapes, variants in CORE
        for (m, n), variant in product(shapes, variants)
    ]
    for name, kernel in KERNELS.items():
        flags = kernel.special[1]
        variants = [NARROW._replace(**flags), LAST, ODD_ROWS, ODD_ROWS._replace(**flags)]
        runs += [
            (record(name, sizes, variant), variant, sizes)
            for (block, sizes), variant in product(kernel.blocks.items(), variants)
            if tiles.Key(name, tiles.PLAIN, "half", *block) in tiles.shipped(arch)
        ]
        runs += [
            (record(name, sizes, WIDE), WIDE, sizes)
            for block, sizes in kernel.blocks.items()
            if tiles.Key(name, tiles.ALIGNED, "half", *block) in tiles.shipped(arch)
        ]
    runs += [(merging(*one), one[1], one[0]) for one in product(ONE_SAMPLE, MERGED)]
    runs += _workloads(arch, {each.name for made, *_ in runs for each in made})
    return [(each, variant, sizes) for made, variant, sizes in runs for each in made]


def _workloads(arch: str, known: set[str]) -> Iterator[Made]:
    """Launches of the named workloads on their route, and on the unfused one, that are new.

    Not of small ones, whose time is that of launches, whatever a kernel's code.
    """
    for work in WORKLOADS:
        if work.small:
            continue
        sizes = work.c, work.c_m, work.c_n
        special = work.heads > 1 or work.c_n % 16 > 0
        old = known - {f"{name}_kernel" for name in KERNELS} if special else known
        for layout in (NARROW, LAST):
            s = Shape(work.n, *sizes, work.heads, work.length, 2, True, layout == LAST)
            planned = kernel_routes(s, work.c, arch, NUM_SMS)[0].route._replace(batch_chunk=BATCH)
            variant = layout._replace(heads=work.heads)
            for route in (planned, UNFUSED):
                made = of_block(sizes, route, variant)
                yield [each for each in made if each.name not in old], variant, sizes


def describe(made: Launch, variant: Variant, sizes: Sizes) -> Row:
    """The row of a launch, without figures."""
    constants = {k: str(x) for k, x in made.kwargs.items()}
    flags = [
        name if value == "True" else f"{name}={value}"
        for name, value in constants.items()
        if value not in ("False", "None") and not name.startswith("BLOCK") and name not in OPTIONS
    ]
    blocks = [f"{k.removeprefix('BLOCK_')}={x}" for k, x in constants.items() if k[:6] == "BLOCK_"]
    return {
        "kernel": made.name.removesuffix("_kernel"),
        "dtype": str(variant.dtype).removeprefix("torch."),
        "layout": variant.layout,
        "L": variant.length,
        **dict(zip("Cmn", sizes, strict=True)),
        "call": variant.flags,
        "flags": " ".join(flags),
        "products": int("PRECISION" in constants),  # whether it multiplies matrices
        "blocks": " ".join(blocks),
        "warps": int(constants.get("num_warps", 4)),
        "stages": int(constants.get("num_stages", 1)),
    }


if __name__ == "__main__":
    arch, *flags = sys.argv[1:]
    for row in survey(arch, json.load(sys.stdin), "--sample" in flags):
        print(json.dumps(row), flush=True)
