"""Tile choice: which block sizes, warps and pipeline stages a kernel gets, and why.

A host-side table, no measurement at run time: the choice is the same in every process, traceable,
and works interpreted. The entries were found by ahead-of-time compilation: the largest tile of each
kernel that compiles without spills, within the architecture's shared memory, on every layout. Ties
go to more positions a tile, which means wider rows and fewer loop steps. None has been timed yet.
"""

import functools
from typing import NamedTuple

import torch

from . import fused_tiles, measured


class Tile(NamedTuple):
    """One entry: block sizes in features, maps and positions, and compiler options."""

    block_m: int
    block_n: int
    block_l: int
    num_warps: int
    num_stages: int
    per_processor: int  # programs that a multiprocessor should hold at once


# The largest G that one program holds whole, in both directions, by bytes of an element.
ONE_TILE = {2: 128, 4: 32, 8: 32}

# Architectures that start from another's entries: consumer cards (compute capability 8.6, 8.9, 12)
# with 99 KiB of shared memory, and data-centre Blackwell.
FAMILY = {"sm_89": "sm_80", "sm_100": "sm_90"}

# (BLOCK_L, warps, stages) of the kernels that hold all maps and features, by the area of G's tile:
# above 64·64, above 32·32, the rest.
WHOLE = {
    "sm_90": {
        "distribute": ((64, 8, 3), (128, 8, 3), (128, 4, 3)),
        "distribute_backward": ((32, 8, 2), (64, 8, 2), (128, 4, 2)),
        "gather_backward": ((64, 8, 3), (64, 8, 3), (128, 4, 2)),
    },
    # mma.sync keeps the operands in registers that wgmma reads from shared memory.
    "sm_80": {
        "distribute": ((64, 8, 2), (128, 8, 2), (128, 4, 2)),
        "distribute_backward": ((32, 8, 2), (32, 8, 2), (64, 4, 2)),
        "gather_backward": ((64, 8, 2), (64, 8, 2), (128, 4, 2)),
    },
    # 64 KiB of shared memory, wavefronts of 64.
    "gfx942": {
        "distribute": ((64, 8, 2), (64, 8, 2), (32, 4, 2)),
        "distribute_backward": ((16, 8, 2), (16, 4, 2), (32, 4, 2)),
        "gather_backward": ((16, 8, 2), (16, 4, 2), (16, 4, 2)),
    },
}
# (BLOCK_M, BLOCK_N, BLOCK_L, warps, stages) of the kernels that walk over blocks of maps and
# features; the first two are upper limits.
BLOCKED = {
    "sm_90": {
        "gather": (128, 128, 64, 8, 3),
        "descriptor_gradient": (128, 128, 64, 8, 3),
        "mix": (128, 64, 128, 8, 3),
        "map_gradient": (64, 128, 128, 8, 3),
    },
    "sm_80": {
        "gather": (128, 128, 32, 8, 3),
        "descriptor_gradient": (128, 128, 32, 8, 3),
        "mix": (128, 32, 128, 8, 3),
        "map_gradient": (32, 128, 128, 8, 3),
    },
    "gfx942": {
        "gather": (128, 128, 32, 8, 2),
        "descriptor_gradient": (128, 128, 32, 8, 2),
        "mix": (128, 32, 64, 8, 3),
        "map_gradient": (32, 128, 64, 8, 3),
    },
}
# (architecture, kernel, BLOCK_M, BLOCK_N) -> (BLOCK_L, warps, stages), half precision: where the
# rule gives a tile that spills or does not fit this architecture's shared memory.
EXCEPTIONS = {
    ("sm_90", "gather", 128, 32): (64, 8, 2),
    ("sm_80", "gather", 32, 64): (64, 8, 3),
    ("sm_89", "descriptor_gradient", 128, 128): (32, 8, 2),
    ("sm_80", "gather", 32, 32): (64, 4, 3),
    ("sm_89", "gather", 32, 32): (64, 4, 2),
    ("sm_89", "gather", 64, 64): (32, 8, 2),
    ("sm_89", "gather_backward", 128, 128): (32, 8, 2),
    ("sm_89", "gather", 64, 128): (64, 8, 3),
    ("sm_89", "gather", 128, 64): (16, 8, 3),
    ("sm_100", "gather_backward", 128, 32): (64, 8, 2),
    ("sm_100", "gather_backward", 128, 64): (32, 8, 3),
    ("sm_100", "gather", 32, 64): (64, 4, 3),
    ("sm_100", "gather", 32, 128): (32, 8, 2),
    ("sm_100", "gather", 64, 64): (64, 4, 3),
    ("sm_100", "gather", 128, 32): (64, 4, 3),
    ("sm_100", "descriptor_gradient", 32, 128): (64, 8, 3),
    ("sm_100", "mix", 128, 64): (128, 8, 2),
    ("gfx942", "mix", 32, 32): (32, 8, 3),
    ("gfx942", "map_gradient", 32, 32): (32, 8, 3),
}
# float32 in full precision has no tensor cores on NVIDIA and unrolls its sums, float64 has few
# registers: small tiles, the same everywhere.
WIDE_WHOLE = {4: (32, 4, 2), 8: (16, 4, 1)}
WIDE_BLOCKED = {
    4: {
        "gather": (64, 64, 16, 8, 1),
        "descriptor_gradient": (32, 32, 32, 4, 2),
        "mix": (64, 32, 32, 8, 2),
        "map_gradient": (32, 64, 32, 8, 2),
    },
    8: dict.fromkeys(BLOCKED["sm_90"], (32, 32, 16, 4, 1)),
}

# (architecture, with a gradient of the maps, maps rounded up) -> (BLOCK_M, BLOCK_L, warps, stages)
# of the kernel that holds all maps of its positions, half precision.
ALL_MAPS: dict[tuple, tuple] = {
    ("sm_90", True, 512): (64, 32, 8, 2),
    ("sm_90", True, 256): (64, 64, 8, 3),
    ("sm_90", True, 128): (64, 128, 8, 3),
    ("sm_90", True, 64): (64, 128, 8, 3),
    ("sm_90", True, 32): (64, 128, 4, 2),
    ("sm_90", False, 512): (64, 64, 8, 2),
    ("sm_90", False, 256): (64, 128, 8, 3),
    ("sm_90", False, 128): (64, 128, 8, 3),
    ("sm_90", False, 64): (64, 128, 4, 3),
    ("sm_90", False, 32): (64, 128, 4, 3),
    ("sm_80", True, 512): (32, 32, 8, 3),
    ("sm_80", True, 256): (64, 32, 8, 3),
    ("sm_80", True, 128): (64, 64, 8, 3),
    ("sm_80", True, 64): (64, 128, 8, 3),
    ("sm_80", True, 32): (64, 128, 4, 2),
    ("sm_80", False, 512): (64, 64, 8, 2),
    ("sm_80", False, 256): (64, 128, 8, 3),
    ("sm_80", False, 128): (64, 128, 8, 3),
    ("sm_80", False, 64): (64, 128, 4, 3),
    ("sm_80", False, 32): (64, 128, 4, 3),
    ("gfx942", True, 512): (64, 16, 4, 1),
    ("gfx942", True, 256): (64, 16, 8, 2),
    ("gfx942", True, 128): (64, 128, 8, 1),
    ("gfx942", True, 64): (64, 16, 8, 2),
    ("gfx942", True, 32): (64, 64, 4, 1),
    ("gfx942", False, 512): (64, 64, 4, 1),
    ("gfx942", False, 256): (64, 64, 8, 1),
    ("gfx942", False, 128): (64, 128, 8, 3),
    ("gfx942", False, 64): (64, 128, 4, 2),
    ("gfx942", False, 32): (64, 128, 4, 2),
    ("sm_89", True, 512): (32, 32, 8, 3),
    ("sm_89", True, 256): (64, 32, 8, 3),
    ("sm_89", True, 128): (64, 64, 8, 3),
    ("sm_89", True, 64): (64, 128, 8, 3),
    ("sm_89", True, 32): (64, 128, 4, 2),
    ("sm_89", False, 512): (32, 64, 8, 1),
    ("sm_89", False, 256): (64, 64, 8, 2),
    ("sm_89", False, 128): (64, 128, 8, 3),
    ("sm_89", False, 64): (64, 128, 4, 3),
    ("sm_89", False, 32): (64, 128, 4, 3),
    ("sm_100", True, 512): (32, 32, 8, 3),
    ("sm_100", True, 256): (64, 64, 8, 3),
    ("sm_100", True, 128): (64, 128, 8, 3),
    ("sm_100", True, 64): (64, 128, 4, 2),
    ("sm_100", True, 32): (64, 128, 4, 2),
    ("sm_100", False, 512): (64, 64, 8, 2),
    ("sm_100", False, 256): (64, 128, 8, 3),
    ("sm_100", False, 128): (64, 128, 8, 3),
    ("sm_100", False, 64): (64, 128, 4, 3),
    ("sm_100", False, 32): (64, 128, 4, 3),
}
WIDE_ALL_MAPS = {4: (32, 32, 4, 2), 8: (32, 16, 4, 1)}  # up to 32 maps

BLOCK_C = 64  # channels in a step of gather_from_a
# float32 and float64: the fused kernels run interpreted only, and in tests.
INTERPRETED_TILE = (32, 4, 1)


def fused_blocks(kernel, features, maps):
    """``(block_m, block_n)`` of a fused kernel for so many features (or channels) and maps."""
    if kernel.startswith("descriptors"):
        return _block(features, 32), 16
    if kernel == "weight_gradients":
        return 32, 32
    if kernel == "gather_from_a":
        return _block(features, 32), _block(maps, 32)
    if kernel == "outer":
        return min(_block(features, 64), 128), min(_block(maps, 64), 128)
    if kernel in ("project_distribute_blocks", "gather_side"):
        return 64, _block(maps, 32)
    m = _block(features, 64)
    if kernel == "gather_from_x":
        return m, min(_block(maps, 32), max(32, ONE_TILE[2] ** 2 // m))
    return m, _block(maps, 32)


def fused_tile(kernel, x, features, maps):
    """The tile of a fused kernel; KeyError if it has none (see ``fits``)."""
    blocks = fused_blocks(kernel, features, maps)
    entry = INTERPRETED_TILE
    if x.element_size() == 2:
        shipped = fused_tiles.TILES[(architecture(x.device), kernel, *blocks)]
        entry = measured.tile(x.device, kernel, blocks) or shipped
    return Tile(*blocks, *entry, per_processor=1)


def fits(kernel, itemsize, features, maps, arch):
    """Whether a fused kernel has a tile that does not spill: bf16, no mask, 28×28 and 14×14 maps.

    With a mask, or rows of odd length, some tiles spill; results do not change.
    """
    return itemsize == 2 and (arch, kernel, *fused_blocks(kernel, features, maps)) in (
        fused_tiles.TILES
    )


def holds_all(features, maps):
    """Whether ``project_distribute`` keeps a tile of X, with all its channels, between products."""
    return _block(features, 64) * _block(maps, 32) <= ONE_TILE[2] ** 2


def lanes(heads, c_n):
    """(heads, maps of a head) in a tile with all maps of all heads: powers of two."""
    head_block = _block(heads, 1)
    return head_block, max(_block(c_n, 1), 32 // head_block)


def packed(heads, c_n, block_n):
    """Whether a tile of all heads has no gaps between them."""
    return heads == 1 or c_n == block_n


def one_tile(x, c_m, c_n):
    """Whether one program can hold all of G."""
    return max(c_m, c_n) <= ONE_TILE[x.element_size()]


def all_maps_tile(x, c_n, gradient=True):
    """The tile of ``all_maps``, with or without a gradient of the maps; None where none fits."""
    entry = _all_maps(x.element_size(), c_n, architecture(x.device), gradient)
    return None if entry is None else Tile(entry[0], _block(c_n, 32), *entry[1:], per_processor=1)


def _all_maps(itemsize, c_n, arch, gradient):
    if itemsize == 2:
        return ALL_MAPS.get((arch, gradient, _block(c_n, 32)))
    return WIDE_ALL_MAPS[itemsize] if c_n <= 32 else None


def positions_of_all_maps(itemsize, c_n, arch, gradient):
    """Positions in the tile of ``all_maps``; 0 where none fits."""
    entry = _all_maps(itemsize, c_n, arch, gradient)
    return 0 if entry is None else entry[1]


def tile(kernel, x, c_m, c_n):
    """The tile of ``kernel`` for maps like ``x`` with c_m features and c_n maps a head."""
    itemsize = x.element_size()
    least = 16 if itemsize == 8 else 32
    return _tile(kernel, itemsize, _block(c_m, least), _block(c_n, least), architecture(x.device))


@functools.cache
def _tile(kernel, itemsize, m, n, arch):
    family = FAMILY.get(arch, arch)
    if kernel == "position_lse":
        return Tile(16, min(n, 32), 64, 4, 1, 8)
    if kernel == "delta":
        return Tile(16, 32, 16, 4, 1, 8)
    if kernel == "gather_combine":
        return Tile(min(m, 32), min(n, 64), 16, 4, 1, 8)
    if kernel in WHOLE[family]:
        by_area = WHOLE[family][kernel]
        rest = by_area[0 if m * n > 64 * 64 else 1 if m * n > 32 * 32 else 2]
        rest = WIDE_WHOLE.get(itemsize, rest)
    else:
        limits = WIDE_BLOCKED.get(itemsize, BLOCKED[family])[kernel]
        m, n, rest = min(m, limits[0]), min(n, limits[1]), limits[2:]
    if itemsize == 2:
        rest = EXCEPTIONS.get((arch, kernel, m, n), rest)
    return Tile(m, n, *rest, per_processor=1 if m * n > 32 * 32 else 2)


def _block(channels, least):
    """The power of two that holds ``channels``."""
    return max(least, 1 << (channels - 1).bit_length())


@functools.cache
def architecture(device):
    """Key of the tables for a GPU; interpreted kernels take an H200's."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability[0] in (9, 10):
        return {9: "sm_90", 10: "sm_100"}[capability[0]]
    return "sm_80" if capability == (8, 0) else "sm_89"


def reads_shared_operands(device):
    """Whether the matrix unit takes both operands from shared memory, transposed or not."""
    return architecture(device) in ("sm_90", "sm_100")


def chains_products(device):
    """Whether several products in a loop may add to one accumulator.

    Triton 3.6 to 3.8 miscompile them for Blackwell's tensor memory: triton-lang/triton#10821.
    """
    return architecture(device) != "sm_100"
