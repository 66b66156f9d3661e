"""``python -m bench tune``: measures tiles of the fused kernels, and writes the table of this GPU.

For each fused kernel on the planned route of each workload: candidates that a compilation for this
architecture shows to be free of spills and within its shared memory, timed in turns inside the
whole block. Another tile replaces the present one only where its 80th percentile is below the
present one's 20th. The table is named after the card and read by ``kernels.measured``; a table of
another Triton or with entries that make no sense is ignored there, with a warning.
"""

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from da_triton import planner
from da_triton.costs import Shape
from da_triton.kernels import block, configs, launch, measured

from .measure import Budget, Timer, progress
from .report import replace
from .workloads import Workload

FORWARD_KERNELS = (
    "gather_from_x", "gather_from_a", "descriptors", "project_distribute",
    "project_distribute_blocks",
)  # fmt: skip
BACKWARD_KERNELS = (
    "gather_side", "distribute_side", "descriptors_backward", "outer", "weight_gradients",
)  # fmt: skip
ROUNDS = 15
Entry = tuple[int, int, int]  # positions of a tile, warps, stages


class Site(NamedTuple):
    """A kernel with the block that it has on a workload."""

    kernel: str
    block_m: int
    block_n: int


class Choice(NamedTuple):
    """What was measured of a site: the present tile, the best, and both in microseconds."""

    site: Site
    workload: str
    present: Entry
    best: Entry
    present_us: float
    best_us: float
    candidates: int


Pruned = Callable[[Site, Workload, Sequence[Entry]], Sequence[Entry]]


def tune(
    workloads: Sequence[Workload],
    device: torch.device,
    timer: Timer,
    budget: Budget,
    pruned: Pruned,
    tell: Callable[[str], Any] = print,
) -> list[Choice]:
    """The choices made until the budget is used up; one for each site, on its first workload."""
    found: dict[Site, Choice] = {}
    for work in progress(list(workloads)):
        for site, present in sites(work, device):
            if site in found or budget.left <= 0:
                continue
            candidates = [
                present,
                *(c for c in pruned(site, work, candidates_of(site)) if c != present),
            ]
            run = step(work, device, backward=site.kernel in BACKWARD_KERNELS)
            times = _times(site, candidates, run, timer, budget)
            found[site] = choose(site, work.name, candidates, times)
            tell(str(found[site]))
    return list(found.values())


def sites(work: Workload, device: torch.device) -> list[tuple[Site, Entry]]:
    """Every fused kernel that the planned route launches, with its present tile."""
    seen: dict[Site, Entry] = {}
    original = configs.fused_tile

    def spied(kernel, x, features, maps):
        tile = original(kernel, x, features, maps)
        entry = (tile.block_l, tile.num_warps, tile.num_stages)
        seen[Site(kernel, tile.block_m, tile.block_n)] = entry
        return tile

    with mock.patch.object(configs, "fused_tile", spied):
        step(work, device, backward=True)()
    return list(seen.items())


def step(work: Workload, device: torch.device, *, backward: bool) -> Callable[[], Any]:
    """The block's forward pass on its planned route, or forward and backward."""
    x, w, options, route = _problem(work, device)

    def run():
        out, lse, g, v = block.forward(x, w, None, options, route, False)
        if backward:
            block.backward(out, x, w, None, lse, g, v, options, route, True)
        return (out,)

    return run


def _problem(work, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    batch = work.batch(device)
    x = normal(batch, work.c, work.length)
    sizes = ((work.c_m, work.c), (work.c_n, work.c), (work.c_n, work.c), (work.c, work.c_m))
    a, b, v, out = (normal(o, i) / i**0.5 for o, i in sizes)
    w = block.Weights(a, normal(work.c_m), b, v, normal(work.c_n), out, normal(work.c))
    options = block.Options(work.heads, 1.0, 1.0, 1.0, True, True)
    s = Shape(batch, work.c, work.c_m, work.c_n, work.heads, work.length, 2, True)
    limits = configs.limits(s, work.c, configs.architecture(device), launch.processors(device))
    return x, w, options, planner.options(s, limits)[0].route


@contextlib.contextmanager
def tile_of(site: Site, entry: Entry) -> Iterator[None]:
    """The site's launches take a tile; those with a mask or a kept V have their own."""
    original = configs.fused_tile

    def chosen(kernel, x, features, maps):
        tile = original(kernel, x, features, maps)
        if Site(kernel, tile.block_m, tile.block_n) != site:
            return tile
        return tile._replace(block_l=entry[0], num_warps=entry[1], num_stages=entry[2])

    with mock.patch.object(configs, "fused_tile", chosen):
        yield


def _times(site, candidates, run, timer, budget):
    """Milliseconds of each candidate, in turns."""
    times: list[list[float]] = [[] for _ in candidates]
    for turn in range(ROUNDS + 1):  # the first compiles
        if turn > 1 and budget.left <= 0:
            break
        for entry, taken in zip(candidates, times, strict=True):
            with tile_of(site, entry):
                ms = timer(run, launches_count=False)
            if turn:
                taken.append(ms)
    return times


def choose(
    site: Site, workload: str, candidates: Sequence[Entry], times: Sequence[Sequence[float]]
) -> Choice:
    """The candidate with the least median, if it is faster than the first beyond the noise."""
    medians = [float(np.median(taken)) for taken in times]
    best = int(np.argmin(medians))
    if np.percentile(times[best], 80) >= np.percentile(times[0], 20):
        best = 0
    return Choice(
        site, workload, candidates[0], candidates[best], 1e3 * medians[0], 1e3 * medians[best],
        len(candidates),
    )  # fmt: skip


def candidates_of(site: Site) -> Sequence[Entry]:
    from .codegen import tiles

    small = site.kernel.startswith(("descriptors", "weight"))
    return tiles.SMALL if small else tiles.CANDIDATES


def compiled_clean(arch: str) -> Pruned:
    """Candidates that do not spill and fit, by compilation for an architecture."""
    from .codegen import compiler, fused, launches

    def pruned(site: Site, work: Workload, candidates: Sequence[Entry]) -> list[Entry]:
        clean = []
        variant = launches.Variant("nchw", work.length, heads=work.heads)
        for entry in candidates:
            with launches.on(arch):
                recorded = fused.record(
                    site.kernel, (work.c, work.c_m, work.c_n), entry, variant, special={}
                )
            try:
                codes = [compiler.compile_launch(r, arch) for r in recorded]
            except Exception:  # too much shared memory, or one of the compiler's own limits
                continue
            if codes and not any(code.spills for code in codes):
                clean.append(entry)
        return clean

    return pruned


def write(path: Path, card: str, choices: Sequence[Choice]) -> None:
    """The table, with what was measured of each entry."""
    table = {
        "card": card,
        "triton": importlib.metadata.version("triton"),
        "tiles": [
            {
                "kernel": c.site.kernel, "block_m": c.site.block_m, "block_n": c.site.block_n,
                "tile": list(c.best), "workload": c.workload, "us": round(c.best_us, 2),
                "replaces": list(c.present), "replaced_us": round(c.present_us, 2),
            }
            for c in sorted(choices)
        ],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, json.dumps(table, indent=1) + "\n")


def path_of(card: str) -> Path:
    """Where the package looks for the table of a card."""
    return measured.FOLDER / f"{measured.slug(card)}.json"
