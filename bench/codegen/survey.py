"""Compiles every kernel with every shipped tile for one architecture; one row a compilation.

    python -m bench.codegen.survey sm_90 [--sample] < digests

prints a JSON object a line. Rows whose digest is in the input, an array in JSON, are known and come
without figures; with ``--sample`` one row of each kernel is compiled, known or not, and no other.
Runs in a process of its own, without TRITON_INTERPRET, on a machine without a GPU. Which kernels
there are is found from the launches that calls make.

    core        tiles by features and maps, in each dtype and layout
    all maps    the kernel that holds them, by maps: without and with a gradient, bias and mask
    fused       each block of the tile table: NCHW with all that the kernel can do beside, also with
                an odd number of positions, and channels-last memory without
    workloads   what the named ones launch besides: several heads, maps that fill no block, and
                kernels that neither of the above reaches
"""

import dataclasses
import json
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch

from bench.codegen import compiler, fused, launches
from bench.codegen.launches import LAYOUTS, Variant
from bench.workloads import WORKLOADS
from da_triton.planning import planner
from da_triton.planning.costs import Shape
from da_triton.planning.planner import Route
from da_triton.runtime import configs, tiles

BLOCKED_SHAPES = ((512, 512), (32, 512), (512, 32))
# Features or maps: each side reaches a tile of its own in the tables of the core.
SIDES = {2: (32, 64, 128), 4: (32,), 8: (16, 32)}
OPTIONS = {
    "ACC", "PRECISION", "enable_fp_fusion", "num_warps", "num_stages", "P_SCALE",
}  # fmt: skip

Row = dict[str, Any]
Found = tuple[compiler.Launch, Variant, tuple[int, int, int]]  # C (0: the core), features, maps


def survey(arch: str, known: Collection[str] = (), sample: bool = False) -> Iterator[Row]:
    """Yields a description of every distinct compilation."""
    distinct = list(_distinct(arch))
    wanted = {digest for *_, digest in distinct} - set(known)
    if sample:
        wanted = set({launch.name: d for launch, *_, d in sorted(distinct, key=_digest)}.values())
    for launch, variant, sizes, digest in distinct:
        code = _compile(launch, arch) if digest in wanted else None
        yield describe(launch, variant, sizes, digest, code)


def _compile(launch, arch):
    try:
        return compiler.compile_launch(launch, arch)
    except compiler.OutOfSharedMemoryError as error:
        return compiler.Code.none(error.needed)


def _digest(found):
    return found[-1]


def _distinct(arch):
    """Launches with their digests, one of each."""
    same, digests = set(), set()
    with launches.on(arch):
        for launch, variant, sizes in found(arch):
            key = compiler.identity(launch, arch)
            if key in same:
                continue
            same.add(key)
            digest = compiler.digest(launch, arch)
            if digest not in digests:
                digests.add(digest)
                yield launch, variant, sizes, digest


def found(arch: str) -> list[Found]:
    """Launches of every kernel with every tile; to be called where ``launches.on(arch)`` is."""
    known = [*_core(), *_all_maps(arch), *_fused(arch)]
    return known + list(_workloads(arch, {launch.name for launch, *_ in known}))


def describe(
    launch: compiler.Launch,
    variant: Variant,
    sizes: tuple[int, int, int],
    digest: str,
    code: compiler.Code | None,
) -> Row:
    """What is compiled, and what became of it."""
    constants = launch.constants
    flags = [
        name if value == "True" else f"{name}={value}"
        for name, value in constants.items()
        if value not in ("False", "None") and not name.startswith("BLOCK") and name not in OPTIONS
    ]
    blocks = [f"{k.removeprefix('BLOCK_')}={x}" for k, x in constants.items() if k[:6] == "BLOCK_"]
    return {
        "kernel": launch.name.removesuffix("_kernel"),
        "dtype": str(variant.dtype).removeprefix("torch."),
        "layout": variant.layout,
        "L": variant.length,
        "C": sizes[0],
        "m": sizes[1],
        "n": sizes[2],
        "call": variant.flags,
        "flags": " ".join(flags),
        "products": int("PRECISION" in constants),  # whether it multiplies matrices
        "blocks": " ".join(blocks),
        "warps": int(constants.get("num_warps", 4)),
        "stages": int(constants.get("num_stages", 1)),
        "digest": digest,
        **(dataclasses.asdict(code) if code else {}),
    }


def _core() -> Iterator[Found]:
    """Launches of the core with every tile of its tables."""
    runs: list[tuple[int, int, Variant, int]] = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        sides = SIDES[dtype.itemsize]
        blocked = BLOCKED_SHAPES if dtype.itemsize == 2 else BLOCKED_SHAPES[:1]
        runs += [
            (m, n, Variant(*layout, dtype), 64)
            for m, n in [*((m, n) for m in sides for n in sides), *blocked]
            for layout in (LAYOUTS if dtype == torch.bfloat16 else LAYOUTS[1:2])
        ]
    for m, n in ((128, 128), (512, 512)):
        wide = Variant("nchw", 784)
        runs += [
            (m, n, dataclasses.replace(wide, masked=True, extra=True), 4),
            (m, n, dataclasses.replace(wide, softmax=False), 64),
            (m, n, dataclasses.replace(wide, dtype=torch.float16), 64),
        ]
    for m, n, variant, batch in runs:
        for launch in launches.core(m, n, variant, batch):
            yield launch, variant, (0, m, n)


def _all_maps(arch: str) -> Iterator[Found]:
    """Launches of the kernel that holds all maps, with every tile of its table."""
    route = Route("AZ", "split", "split", "split", "AZ", 64)
    keys = [key for key in tiles.shipped(arch) if key.tile_class == "half"]
    sizes = sorted({key.block_n for key in keys if key.kernel == "all_maps"}, reverse=True)
    runs = [(n, Variant(*layout)) for n in sizes for layout in LAYOUTS]
    runs += [(n, Variant(*LAYOUTS[1], masked=True)) for n in sizes]
    runs += [(32, Variant(*LAYOUTS[1], dtype)) for dtype in (torch.float32, torch.float64)]
    for n, variant in runs:
        for launch in launches.of_block((64, 64, n, n), route, variant):
            if launch.name == "all_maps_kernel":
                yield launch, variant, (0, n, n)


def _fused(arch: str) -> Iterator[Found]:
    """Launches of the fused kernels, with every block that has a tile on this architecture."""
    for kernel, blocks in fused.BLOCKS.items():
        variants = [Variant(*LAYOUTS[1], **fused.special_flags(kernel)), Variant(*LAYOUTS[2])]
        variants += fused.odd_variants(kernel, False) + fused.odd_variants(kernel, True)
        for block, sizes in blocks.items():
            if tiles.Key(kernel, tiles.PLAIN, "half", *block) not in tiles.shipped(arch):
                continue
            for variant in variants:
                for launch in fused.record(kernel, sizes, variant):
                    yield launch, variant, sizes


def _workloads(arch: str, known: set[str]) -> Iterator[Found]:
    """Launches of the named workloads on their route, and on the split one, that are new.

    Not of small ones, whose time is that of launches, whatever a kernel's code.
    """
    for work in WORKLOADS:
        if work.small:
            continue
        length = torch.Size(work.positions).numel()
        s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True)
        limits = configs.limits(s, work.c, arch, launches.PROCESSORS)
        planned = planner.options(s, limits)[0].route
        split = planned._replace(
            order="AZ", gather="split", distribute="split", backward="split", backward_order="AZ"
        )
        special = work.heads > 1 or work.c_n % 16 > 0
        for route in (planned, split):
            for layout in LAYOUTS[1:]:
                variant = Variant(*layout, heads=work.heads)
                for launch in launches.of_block(s[:4], route, variant):
                    fused_too = launch.name.removesuffix("_kernel") in fused.BLOCKS
                    if launch.name not in known or (special and fused_too):
                        yield launch, variant, (work.c, work.c_m, work.c_n)


if __name__ == "__main__":
    for row in survey(sys.argv[1], json.load(sys.stdin), "--sample" in sys.argv):
        print(json.dumps(row), flush=True)
