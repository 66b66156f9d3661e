"""What the planner needs to know of the kernels on a GPU."""

import functools
import math

from ..planning.costs import Core
from ..planning.planner import Limits
from ..precision import POLICIES
from . import tiles

CLASSES = {dtype.itemsize: policy.tile_class for dtype, policy in POLICIES.items()}


@functools.lru_cache(maxsize=4096)
def limits(shape, c_out, arch, processors):
    """What the planner needs to know of the kernels on a GPU."""
    m, n, channels = shape.c_m // shape.heads, shape.c_n // shape.heads, shape.channels
    tile_class = CLASSES[shape.itemsize]
    widest, all_maps = max(channels, c_out), math.prod(tiles.lanes(shape.heads, n))
    whole = tiles.holds_all(widest, all_maps)
    pass_2 = "project_distribute" if whole else "project_distribute_blocks"

    def positions_of(kernel, features, maps, variant=tiles.PLAIN):
        tile = tiles.find(kernel, tile_class, features, maps, variant, arch)
        return 0 if tile is None else tile.block_l

    def positions(last, *others):
        """In a tile of the last kernel, if all fit; short tiles are left to the split route."""
        found = [positions_of(*kernel) for kernel in (*others, last)]
        return found[-1] if all(found) and found[-1] >= 32 else 0

    small, pass_1 = ("descriptors", m, n), ("gather_from_x", channels, shape.c_n)
    backward = (
        ("gather_side", channels, shape.c_n),
        small,
        pass_1,
        ("descriptors_backward", m, n),
        ("distribute_side", widest, all_maps),
        ("outer", channels, 2 * shape.c_n),
        ("weight_gradients", m, n),
    )
    return Limits(
        processors=processors,
        gather_from_x=positions(pass_1, small),
        gather_from_a=positions(("gather_from_a", m, n), small),
        project_distribute=positions((pass_2, widest, all_maps), small),
        backward=positions(*backward) if shape.reconstruct else 0,
        map_blocks=-(-shape.c_n // tiles.blocks(pass_1[0], tile_class, *pass_1[1:])[1]),
        whole=whole,
        core=Core(
            tiles.ONE_TILE[tile_class],
            *(positions_of("all_maps", 1, n, variant) for variant in (tiles.PLAIN, "gradient")),
        ),
    )
