"""The fused kernels' blocks: shapes, routes and variants that lead to each.

Read by the search for tiles and by the survey of the tiles that ship.
"""

import dataclasses
from typing import Any
from unittest import mock

import torch

from bench.codegen import compiler, launches
from bench.codegen.launches import LAYOUTS, ODD, Variant
from da_triton.planning.planner import Route
from da_triton.runtime import launch, tiles

BATCH = 64
PAIRS = [(c, n) for c in (64, 128, 256, 512) for n in (32, 64, 128) if c * n <= 128 * 128]
# kernel -> {(block_m, block_n): (C, c_m, c_n) that lead there}
BLOCKS: dict[str, dict[tuple[int, int], tuple[int, int, int]]] = {
    "descriptors": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "descriptors_backward": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "gather_from_x": {(c, n): (c, 64, n) for c, n in PAIRS},
    "gather_side": {(64, n): (256, 64, n) for n in (32, 64, 128, 256)},
    "distribute_side": {(c, n): (c, 64, n) for c, n in PAIRS},
    "project_distribute": {(c, n): (c, 64, n) for c, n in PAIRS},
    "project_distribute_blocks": {(64, n): (1024, 64, n) for n in (32, 64, 128, 256, 512)},
    "outer": {(c, n): (c, 64, n // 2) for c in (64, 128) for n in (64, 128)},
    "weight_gradients": {(32, 32): (256, 64, 64)},
    "gather_from_a": {
        (m, n): (4 * m * n // 64, m, n) for m in (32, 64, 128) for n in (32, 64, 128)
    },
}
ANY_TILE = (32, 4, 1)  # of fused kernels that are launched on the way


def launched(kernel: str) -> str:
    """The name under which a kernel of the table is launched."""
    return kernel.removesuffix("_blocks") + "_kernel"


def route(kernel: str) -> Route:
    """One that launches the kernel."""
    fused = Route("XH", "fused", "fused", "fused", "XH", BATCH)
    from_a = fused._replace(order="AH", backward="split", backward_order="AZ")
    if kernel == "project_distribute_blocks":
        return from_a._replace(gather="split")
    return from_a if kernel == "gather_from_a" else fused


def record(
    kernel: str,
    sizes: tuple[int, int, int],
    variant: Variant,
    tile: tuple[int, ...] | None = None,
) -> list[compiler.Launch]:
    """Launches of a kernel with its tile, or another one, whatever others of its route have."""
    original = tiles.tile

    def chosen(name, x, features, maps, variant=tiles.PLAIN):
        entry = tile if name == kernel else ANY_TILE if name in BLOCKS else None
        if entry is None:
            return original(name, x, features, maps, variant)
        return tiles.Tile._make(
            (*tiles.blocks(name, "half", features, maps), *entry, 1, "pointers")
        )

    with launch.forgetting(), mock.patch.object(tiles, "tile", chosen):
        found = launches.of_block((BATCH, *sizes), route(kernel), variant)
    return [made for made in found if made.name == launched(kernel)]


def variants(kernel: str, special: bool) -> list[Variant]:
    """What a tile must be clean in, the likeliest to spill first."""
    flags = special_flags(kernel) if special else {}
    wide, narrow, last = (Variant(*layout, **flags) for layout in LAYOUTS)
    found = [narrow, last, wide, dataclasses.replace(narrow, dtype=torch.float16)]
    if kernel.startswith(("project", "distribute")) and not special:
        found.append(dataclasses.replace(narrow, heads=4))
    if kernel.startswith("descriptors"):
        found.insert(0, dataclasses.replace(narrow, masked=True))
    return found


def odd_variants(kernel: str, special: bool) -> list[Variant]:
    """An odd number of positions in NCHW, where the kernel has positions."""
    if kernel.startswith(("descriptors", "weight")):
        return []
    return [Variant(*ODD, **(special_flags(kernel) if special else {}))]


def variant_name(kernel: str) -> str:
    """Of the tile that a special launch may have of its own."""
    return "mask" if kernel.startswith("gather") else "v"


def special_flags(kernel: str) -> dict[str, Any]:
    """What makes a launch special, and lets it have a tile of its own; none: nothing does."""
    if kernel.startswith("gather"):
        return {"masked": True}
    return {"keep_v": True} if kernel.startswith(("project", "distribute")) else {}
