"""Finds tiles for the fused kernels by compiling candidates, and writes the table that ships.

    python -m support.aot_tiles [arch …]        (from tests/, without TRITON_INTERPRET, no GPU)

For each kernel, block and architecture the first candidate, in order of preference, that neither
spills nor exceeds the shared memory on any layout. A block without one is left out of the table,
and the planner then takes another route. Candidates prefer many positions, then pipeline stages.
"""

import sys
from pathlib import Path

from da_triton.kernels import configs, fused_tiles, launch
from da_triton.planner import Route
from support import aot
from support.aot_survey import LAYOUTS, record_block

CANDIDATES = [
    (128, 8, 3), (128, 8, 2), (64, 8, 3), (64, 4, 3), (64, 8, 2), (64, 4, 2), (128, 8, 1),
    (64, 8, 1), (64, 4, 1), (32, 8, 3), (32, 4, 3), (32, 8, 2), (32, 4, 2), (32, 8, 1),
    (32, 4, 1), (16, 8, 2), (16, 4, 2), (16, 8, 1), (16, 4, 1),
]  # fmt: skip
SMALL = [
    (64, 4, 3),
    (64, 8, 3),
    (64, 4, 2),
    (64, 8, 2),
    (32, 4, 2),
    (32, 8, 2),
    (32, 8, 1),
    (16, 8, 1),
]
PAIRS = [(c, n) for c in (64, 128, 256, 512) for n in (32, 64, 128) if c * n <= 128 * 128]
# kernel -> (launched kernels, route, (block_m, block_n) with the (C, c_m, c_n) that lead there)
FUSED = Route("XH", "fused", "fused", "fused", "XH", 64)
FROM_A = FUSED._replace(order="AH", gather="fused", backward="split", backward_order="AZ")
BLOCKS = {
    "gather_from_x": {(c, n): (c, 64, n) for c, n in PAIRS},
    "gather_from_a": {
        (m, n): (4 * m * n // 64, m, n) for m in (32, 64, 128) for n in (32, 64, 128)
    },
    "project_distribute": {(c, n): (c, 64, n) for c, n in PAIRS},
    "project_distribute_blocks": {(64, n): (1024, 64, n) for n in (32, 64, 128, 256, 512)},
    "distribute_side": {(c, n): (c, 64, n) for c, n in PAIRS},
    "gather_side": {(64, n): (256, 64, n) for n in (32, 64, 128, 256)},
    "descriptors": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "descriptors_backward": {(m, 16): (256, m, 64) for m in (32, 64, 128, 256, 512)},
    "outer": {(c, n): (c, 64, n // 2) for c in (64, 128) for n in (64, 128)},
    "weight_gradients": {(32, n): (256, 64, n) for n in (32, 64)},
}


def routes(kernel):
    """One that launches the kernel."""
    if kernel == "project_distribute_blocks":
        return FROM_A._replace(gather="split")
    return FROM_A if kernel == "gather_from_a" else FUSED


def attempt(arch, kernel, blocks, sizes, candidate):
    """Whether ``candidate`` compiles well on every layout."""
    configs.fused_tile = lambda name, x, *sizes: configs.Tile(
        *configs.fused_blocks(name, *sizes), *(candidate if name == kernel else (32, 4, 1)), 1
    )
    launched = kernel.removesuffix("_blocks") + "_kernel"
    for layout, length in LAYOUTS:
        for found in record_block((64, *sizes), length, layout, routes(kernel)):
            if not found.name.startswith(launched):
                continue
            try:
                code = aot.compile_launch(found, arch)
            except Exception as error:  # the compiler's own limits differ by version
                print("   ", arch, kernel, blocks, candidate, type(error).__name__, flush=True)
                return False
            if code.spills or code.shared > aot.SHARED_LIMIT[arch]:
                return False
    return True


def search(arch):
    table = {}
    for kernel, shapes in BLOCKS.items():
        small = kernel.startswith(("descriptors", "weight"))
        for blocks, sizes in shapes.items():
            for candidate in SMALL if small else CANDIDATES:
                if attempt(arch, kernel, blocks, sizes, candidate):
                    table[(kernel, *blocks)] = candidate
                    break
            print(arch, kernel, blocks, table.get((kernel, *blocks)), flush=True)
    return table


def main(architectures):
    launch.processors = lambda device: 132
    configs.architecture = lambda device: "sm_90"
    table = dict(fused_tiles.TILES)
    for arch in architectures:
        table = {k: v for k, v in table.items() if k[0] != arch}
        table |= {(arch, *k): v for k, v in search(arch).items()}
        lines = [f"    {k!r}: {v!r},\n" for k, v in sorted(table.items())]
        path = Path(fused_tiles.__file__)
        head = path.read_text().split("TILES")[0]
        path.write_text(
            f"{head}TILES: dict[tuple, tuple] = {{\n{''.join(lines)}}}\n".replace("'", '"')
        )


if __name__ == "__main__":
    main(sys.argv[1:] or list(aot.TARGETS))
