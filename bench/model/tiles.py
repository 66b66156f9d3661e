"""Ranks tiles of a kernel by the modelled time of the named workloads that launch it."""

from collections.abc import Iterable
from statistics import geometric_mean

from bench import tune
from bench.workloads import WORKLOADS
from da_triton.runtime.tiles import PLAIN, Tile, shipped

from .machine import GPU, GPUS
from .passes import block_of, timed

WORST = 1.03  # times the present pass: a tile that makes one slower than that is not taken
Blocks = tuple[int, int]
Times = dict[tuple[str, str], float]  # of a workload's pass, in seconds


def gpu_of(arch: str) -> GPU:
    """The modelled GPU of an architecture.

    Raises:
        ValueError: there is none.
    """
    found = [gpu for gpu in GPUS.values() if gpu.arch == arch]
    if not found:
        known = ", ".join(sorted({gpu.arch for gpu in GPUS.values()}))
        raise ValueError(f"the model knows GPUs of {known}, and none of {arch}")
    return found[0]


def best(
    kernel: str, blocks: Blocks, candidates: Iterable[tune.Entry], gpu: GPU
) -> tune.Entry | None:
    """The candidate with the least geometric mean over passes; None if the present tile has it."""
    present = times(kernel, blocks, None, gpu)
    chosen, least = None, 1.0
    for candidate in candidates if present else ():
        found = times(kernel, blocks, candidate, gpu)
        ratios = [found[each] / present[each] for each in present]
        mean = geometric_mean(ratios)
        print(f"    {blocks} {candidate}: {mean:.3f}, at most {max(ratios):.3f}", flush=True)
        if max(ratios) <= WORST and mean < least:
            chosen, least = candidate, mean
    return chosen


def times(kernel: str, blocks: Blocks, entry: tune.Entry | None, gpu: GPU) -> Times:
    """The passes in NCHW of workloads that launch the kernel with these blocks.

    ``entry``: instead of the plain tile; variants with a tile of their own keep it.
    """
    launched = False

    def choose(site: tune.Site, tile: Tile) -> Tile:
        nonlocal launched
        own = site.variant != PLAIN and site in shipped(gpu.arch)
        if own or site.kernel != kernel or site[3:] != blocks:
            return tile
        launched = True
        return tile if entry is None else Tile(*blocks, *entry)

    found = {}
    for work in WORKLOADS:
        if work.small:
            continue
        block = block_of(work, "nchw")
        # Not in channels-last memory, which has a layout of its own.
        route = block.planned(gpu)[0].route._replace(
            to_channels_last=False, backward_to_channels_last=False
        )
        launched = False
        with tune.replaced(choose):
            made = block.operations(gpu, route)
        if launched:
            for name, operations in made.items():
                found[work.name, name] = sum(each.seconds for each in timed(operations, gpu))
    return found
