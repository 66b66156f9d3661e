"""The launches that are compiled: of every kernel, with every shipped tile.

    python -m bench.codegen.survey sm_90 [--sample] < digests

prints a JSON object a line. Rows whose digest is in the input, an array in JSON, are known and come
without figures; with ``--sample`` one row of each kernel is compiled, known or not, and no other.

Runs in a process of its own, without TRITON_INTERPRET, on a machine without a GPU. Which kernels
there are is found from the launches that calls make, on meta tensors:

    core        tiles by m and n, in each dtype and layout
    full_n      the kernel that holds all n, by n: without and with a mask
    fused       each block of the tile table: NCHW with all that the kernel can do beside, also with
                an odd number of positions, and channels-last memory without
    workloads   what the named ones launch besides: several heads, an n that fills no block, and
                kernels that neither of the above reaches
"""

import contextlib
import json
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.codegen import compile
from bench.codegen.compile import Launch
from bench.warm import always
from bench.workloads import WORKLOADS
from da_triton.kernels import distribute, gather, gather_backward
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_routes
from da_triton.planning.costs import AH, AZ, XH
from da_triton.planning.planner import Route
from da_triton.planning.shapes import Shape
from da_triton.precision import matmul_precision
from da_triton.runtime import launch, tiles

# Positions of 28×28, of 14×14 (rows not a multiple of 16), and of either in
# channels-last memory.
LAYOUTS = (("nchw", 784), ("nchw", 196), ("nhwc", 196))
ODD = ("nchw", 49)  # 7×7: every load is of one element
NUM_SMS = 132
BATCH = 64
UNFUSED = Route(AZ, "unfused", "unfused", "unfused", AZ, BATCH)
ANY_TILE = (32, 4, 1)  # of fused kernels that are launched on the way
PAIRS = [(c, n) for c in (64, 128, 256, 512) for n in (32, 64, 128) if c * n <= 128 * 128]
# kernel -> {(block_m, block_n): (C, c_m, c_n) that lead there}
BLOCKS: dict[str, dict[tuple[int, int], tuple[int, int, int]]] = {
    "combine": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "combine_backward": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "gather_from_x": {(c, n): (c, 64, n) for c, n in PAIRS},
    "block_bwd_gather": {(64, n): (256, 64, n) for n in (32, 64, 128, 256)},
    "block_bwd_distribute": {(c, n): (c, 64, n) for c, n in PAIRS},
    "project_distribute": {(c, n): (c, 64, n) for c, n in PAIRS},
    "project_distribute_blocks": {(64, n): (1024, 64, n) for n in (32, 64, 128, 256, 512)},
    "outer_product": {(c, n): (c, 64, n // 2) for c in (64, 128) for n in (64, 128)},
    "weight_gradients": {(32, 32): (256, 64, 64)},
    "gather_from_a": {
        (m, n): (4 * m * n // 64, m, n) for m in (32, 64, 128) for n in (32, 64, 128)
    },
}
BLOCKED_SHAPES = ((512, 512), (32, 512), (512, 32))
# m or n: each side reaches a tile of its own in the tables of the core.
SIDES = {2: (32, 64, 128), 4: (32,), 8: (16, 32)}
OPTIONS = {"ACC", "PRECISION", "enable_fp_fusion", "num_warps", "num_stages", "P_SCALE"}

Row = dict[str, Any]


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


Found = tuple[Launch, Variant, tuple[int, int, int]]  # C (0: the core), m, n


@contextlib.contextmanager
def on(arch: str, num_sms: int = NUM_SMS) -> Iterator[None]:
    """Launchers choose as on a GPU of this architecture."""
    with (
        launch.forgetting(),
        mock.patch.object(tiles, "architecture", always(arch)),
        mock.patch.object(launch, "num_sms", always(num_sms)),
    ):
        yield


def core(m: int, n: int, v: Variant, batch: int = BATCH) -> list[Launch]:
    """One forward and backward pass of the core."""

    def activations(channels):
        if v.layout == "nchw":
            return _empty(v, batch, 1, channels, v.length)
        return _empty(v, batch, v.length, 1, channels).permute(0, 2, 3, 1)

    a, b, logits, dz = (activations(c) for c in (m, n, n, m))
    mask = _mask(v, batch)
    sources = [(a, b, mask)]
    if v.extra:
        sources.append((a[..., :4], b[..., :4], None))
    with matmul_precision("tf32" if v.tf32 else "ieee"), compile.record() as made:
        g, lse = gather.gather_forward(sources, 1.0)
        distribute.distribute_forward(g, logits, 1.0, v.softmax, 1.0)
        dg, _ = distribute.distribute_backward(dz, g, logits, 1.0, v.softmax, 1.0, True, True)
        gather_backward.gradients(dg, a, b, mask, g, lse, None, 1.0, True, True)
    return made


def of_block(sizes: tuple[int, int, int, int], route: Route, v: Variant) -> list[Launch]:
    """One training step of the block; ``sizes``: batch, channels, c_m, c_n."""
    batch, channels, c_m, c_n = sizes
    x = _empty(v, batch, channels, v.length)
    if v.layout == "nhwc":
        x = _empty(v, batch, v.length, channels).transpose(1, 2)
    w = routes.Weights(
        _empty(v, c_m, channels), _empty(v, c_m), _empty(v, c_n, channels),
        _empty(v, c_n, channels), _empty(v, c_n), _empty(v, channels, c_m), _empty(v, channels),
    )  # fmt: skip
    options = routes.Options(v.heads, 1.0, 1.0, 1.0, v.softmax, True)
    mask = _mask(v, batch)
    with compile.record() as made:
        _, lse, g, kept = routes.forward(x, w, mask, options, route, v.save_v)
        routes.backward(torch.empty_like(x), x, w, mask, lse, g, kept, options, route)
    return made


def _empty(v, *shape):
    return torch.empty(shape, dtype=v.dtype, device="meta")


def _mask(v, batch):
    shape = (batch, v.length)
    return torch.empty(shape, dtype=torch.uint8, device="meta") if v.masked else None


# --- launches of a tile ---------------------------------------------------------------------------


def route(kernel: str) -> Route:
    """One that launches the kernel."""
    fused = Route(XH, "fused", "fused", "fused", XH, BATCH)
    from_a = fused._replace(order=AH, backward="unfused", backward_order=AZ)
    if kernel == "project_distribute_blocks":
        return from_a._replace(gather="unfused")
    return from_a if kernel == "gather_from_a" else fused


def record(
    kernel: str,
    sizes: tuple[int, int, int],
    variant: Variant,
    tile: tuple[int, int, int] | None = None,
) -> list[Launch]:
    """Launches of a kernel with its tile, or another one, whatever others of its route have."""
    original = tiles.tile

    def chosen(name, x, m, n, variant=tiles.PLAIN):
        entry = tile if name == kernel else ANY_TILE if name in BLOCKS else None
        if entry is None:
            return original(name, x, m, n, variant)
        blocks = tiles.blocks(name, "half", m, n)
        return tiles.Tile(*blocks, *entry, 1)

    with launch.forgetting(), mock.patch.object(tiles, "tile", chosen):
        found = of_block((BATCH, *sizes), route(kernel), variant)
    launched = kernel.removesuffix("_blocks") + "_kernel"
    return [made for made in found if made.name == launched]


def special(kernel: str) -> tuple[str, dict[str, Any]]:
    """The variant that may have a tile of its own, and the call's flags that lead to it."""
    if "gather" in kernel:
        return "mask", {"masked": True}
    return ("v", {"save_v": True}) if "distribute" in kernel else ("", {})


def odd_variants(kernel: str, flags: dict[str, Any]) -> list[Variant]:
    """An odd number of positions in NCHW, where the kernel has positions."""
    return [] if kernel.startswith(("combine", "weight")) else [Variant(*ODD, **flags)]


# --- everything that ships ------------------------------------------------------------------------


def survey(arch: str, known: Collection[str] = (), sample: bool = False) -> Iterator[Row]:
    """Yields a description of every distinct compilation."""
    distinct = _distinct(arch)
    wanted = distinct.keys() - set(known)
    if sample:  # the last digest of each kernel
        wanted = set({distinct[digest][0].name: digest for digest in sorted(distinct)}.values())
    for digest, (made, variant, sizes) in distinct.items():
        figures = compile.compile_launch(made, arch)._asdict() if digest in wanted else {}
        yield {"arch": arch, **describe(made, variant, sizes), "digest": digest, **figures}


def _distinct(arch: str) -> dict[str, Found]:
    """Launches by their digests, the first of each."""
    same: dict[tuple, Found] = {}
    digests: dict[str, Found] = {}
    with on(arch):
        for each in found(arch):
            same.setdefault(compile.identity(each[0], arch), each)
        for each in same.values():
            digests.setdefault(compile.digest(each[0], arch), each)
    return digests


def found(arch: str) -> list[Found]:
    """Launches of every kernel with every tile; to be called where ``on(arch)`` is."""
    known = [*_core(), *_full_n(arch), *_fused(arch)]
    return known + list(_workloads(arch, {made.name for made, *_ in known}))


def describe(made: Launch, variant: Variant, sizes: tuple[int, int, int]) -> Row:
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


def _core() -> Iterator[Found]:
    """Launches of the core with every tile of its tables."""
    runs: list[tuple[int, int, Variant, int]] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sides = SIDES[dtype.itemsize]
        blocked = BLOCKED_SHAPES if dtype.itemsize == 2 else BLOCKED_SHAPES[:1]
        runs += [
            (m, n, Variant(*layout, dtype), BATCH)
            for m, n in [*((m, n) for m in sides for n in sides), *blocked]
            for layout in (LAYOUTS if dtype == torch.bfloat16 else LAYOUTS[1:2])
        ]
    wide = Variant(*LAYOUTS[0])
    for m, n in ((128, 128), (512, 512)):
        runs += [
            (m, n, wide._replace(masked=True, extra=True), 4),
            (m, n, wide._replace(softmax=False), BATCH),
            (m, n, wide._replace(dtype=torch.float16), BATCH),
        ]
    for m, n, variant, batch in runs:
        for made in core(m, n, variant, batch):
            yield made, variant, (0, m, n)


def _full_n(arch: str) -> Iterator[Found]:
    """Launches of the kernel that holds all n, with every tile of its table."""
    keys = [key for key in tiles.shipped(arch) if key.tile_class == "half"]
    sizes = sorted({key.block_n for key in keys if key.kernel == "full_n"}, reverse=True)
    runs = [(n, Variant(*layout)) for n in sizes for layout in LAYOUTS]
    runs += [(n, Variant(*LAYOUTS[1], masked=True)) for n in sizes]
    runs += [(32, Variant(*LAYOUTS[1], dtype)) for dtype in (torch.float32, torch.float64)]
    for n, variant in runs:
        for made in of_block((BATCH, 64, n, n), UNFUSED, variant):
            if made.name == "full_n_kernel":
                yield made, variant, (0, n, n)


def _fused(arch: str) -> Iterator[Found]:
    """Launches of the fused kernels, with every block that has a tile on this architecture."""
    for kernel, blocks in BLOCKS.items():
        _, flags = special(kernel)
        variants = [Variant(*LAYOUTS[1], **flags), Variant(*LAYOUTS[2])]
        variants += odd_variants(kernel, {}) + odd_variants(kernel, flags)
        for block, sizes in blocks.items():
            if tiles.Key(kernel, tiles.PLAIN, "half", *block) not in tiles.shipped(arch):
                continue
            for variant in variants:
                for made in record(kernel, sizes, variant):
                    yield made, variant, sizes


def _workloads(arch: str, known: set[str]) -> Iterator[Found]:
    """Launches of the named workloads on their route, and on the unfused one, that are new.

    Not of small ones, whose time is that of launches, whatever a kernel's code.
    """
    for work in WORKLOADS:
        if work.small:
            continue
        length = torch.Size(work.positions).numel()
        s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True)
        planned = kernel_routes(s, work.c, arch, NUM_SMS)[0].route
        special = work.heads > 1 or work.c_n % 16 > 0
        for route in (planned, UNFUSED._replace(batch_chunk=planned.batch_chunk)):
            for layout in LAYOUTS[1:]:
                variant = Variant(*layout, heads=work.heads)
                for made in of_block(s[:4], route, variant):
                    fused_too = made.name.removesuffix("_kernel") in BLOCKS
                    if made.name not in known or (special and fused_too):
                        yield made, variant, (work.c, work.c_m, work.c_n)


if __name__ == "__main__":
    arch, *flags = sys.argv[1:]
    for row in survey(arch, json.load(sys.stdin), "--sample" in flags):
        print(json.dumps(row), flush=True)
