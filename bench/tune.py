"""``python -m bench tune``: measures tiles of all kernels, and writes the table of this GPU.

For each kernel that a workload launches, on its planned route, there with a mask and V kept, and
unfused, all candidates are compiled in parallel, captured as CUDA graphs of the whole block and
timed in turns, so that only the GPU's time counts. A candidate that cannot be launched or gives
another result than the present tile is not timed; one that spills is slow and loses. A candidate
replaces the present tile only where its 80th percentile is below the present one's 20th.
``da_triton.runtime.tiles`` reads the table.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from da_triton import plan
from da_triton.ops.triton import routes
from da_triton.runtime import folders, launch, tiles
from da_triton.runtime.tiles import Key as Site

from .codegen.survey import UNFUSED
from .measure import Budget, progress
from .observe import Timer, describe, usable
from .providers import Closure, Replay
from .report import replace
from .warm import without_launches
from .workloads import Workload

# Tiles that the tuner and the ahead-of-time search try: positions, warps, stages, programs per SM.
CANDIDATES = (
    (128, 8, 3, 1), (128, 8, 2, 1), (128, 4, 2, 2), (64, 8, 3, 1), (64, 4, 3, 1), (64, 4, 3, 2),
    (64, 8, 2, 1), (64, 4, 2, 1), (64, 4, 2, 2), (64, 4, 2, 4), (128, 8, 1, 1), (64, 8, 1, 1),
    (32, 8, 3, 1), (32, 8, 2, 1), (32, 4, 3, 2), (32, 4, 2, 1), (32, 8, 1, 1), (32, 4, 1, 1),
    (16, 8, 1, 1), (16, 4, 1, 1),
)  # fmt: skip
# For kernels that have no positions.
SMALL = (
    (64, 4, 3, 1), (64, 8, 3, 1), (64, 4, 2, 1), (64, 8, 2, 1), (32, 4, 2, 1), (32, 8, 2, 1),
    (32, 8, 1, 1), (16, 8, 1, 1),
)  # fmt: skip
# Kernels with a program for each tile, however many an SM holds.
UNSPLIT = ("full_n", "apply_weights", "grad_logits", "position_lse")

ROUNDS = 15
ROUNDS_MIN = 5  # below which percentiles say nothing of the noise
# Relative RMS between two tiles' results in bfloat16; they differ in the order of sums alone.
TOLERANCE = 2e-2
Entry = tuple[int, int, int, int]  # positions of a tile, warps, stages, programs per SM


class Choice(NamedTuple):
    """The measurement of a site: the present tile, the best, and both in microseconds."""

    site: Site
    workload: str
    present: Entry
    best: Entry
    present_us: float
    best_us: float
    candidates: int


def tune(
    workloads: Sequence[Workload], device: torch.device, timer: Timer, budget: Budget
) -> Iterator[Choice]:
    """Yields the choice of each site, on its first workload, until the budget is used up.

    One by one, so that a run that is killed keeps the choices made so far. It ends early where a
    candidate makes CUDA unusable in this process.
    """
    found: set[Site] = set()
    for work in progress(workloads):
        if budget.left <= 0:
            break
        for site, (present, run) in sites(work, device).items():
            if site in found or budget.left <= 0:
                continue
            entries = [present, *(c for c in candidates_of(site.kernel) if c != present)]
            ready = prepared(site, entries, run, device, budget)
            if not usable(device):
                print(f"{site}: CUDA became unusable, so tuning ends here.")
                return
            if ready:
                found.add(site)
                choice = choose(site, work.name, present, _times(ready, timer, budget))
                yield choice
                print(choice)


def sites(work: Workload, device: torch.device) -> dict[Site, tuple[Entry, Closure]]:
    """Every kernel that the workload launches, with its present tile and the step to time."""
    found: dict[Site, tuple[Entry, Closure]] = {}
    for run in steps(work, device):

        def see(site, tile, run=run):
            found.setdefault(site, (tile[2:6], run))
            return tile

        with replaced(see):
            run()
    return found


def steps(work: Workload, device: torch.device) -> Iterator[Closure]:
    """Passes of the block, each with all its results; forward first, which takes less time."""
    x, w = _problem(work, device)
    options = routes.Options(work.heads, 1.0, 1.0, 1.0, True, True)
    planned = plan(x.shape, work.c_m, work.c_n, heads=work.heads).route
    mask = torch.ones(x.shape[0], x.shape[2], dtype=torch.uint8, device=device)
    unfused = UNFUSED._replace(batch_chunk=planned.batch_chunk)

    def step(route, mask, backward):
        out, lse, g, v = routes.forward(x, w, mask, options, route, mask is not None)
        if not backward:
            return (out,)
        grads = routes.backward(out, x, w, mask, lse, g, v, options, route)
        return out, *(grad for grad in grads if grad is not None)

    for route, masking in ((planned, None), (unfused, None), (planned, mask)):
        for backward in (False, True):
            yield functools.partial(step, route, masking, backward)


def _problem(work, device):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    x = normal(work.batch(device), work.c, work.length)
    sizes = ((work.c_m, work.c), (work.c_n, work.c), (work.c_n, work.c), (work.c, work.c_m))
    a, b, v, out = (normal(o, i) / i**0.5 for o, i in sizes)
    return x, routes.Weights(a, normal(work.c_m), b, v, normal(work.c_n), out, normal(work.c))


@contextlib.contextmanager
def replaced(choose: Callable[[Site, tiles.Tile], tiles.Tile]) -> Iterator[None]:
    """Launches take the tile that ``choose`` makes of theirs."""
    original = tiles.tile

    def chosen(kernel, x, c_m, c_n, variant=tiles.PLAIN):
        tile = original(kernel, x, c_m, c_n, variant)
        return choose(Site(kernel, variant, "half", *tile[:2]), tile)

    with launch.forgetting(), mock.patch.object(tiles, "tile", chosen):
        yield


def tile_of(site: Site, entry: Entry) -> contextlib.AbstractContextManager[None]:
    """The site's launches take a tile."""

    def choose(key, tile):
        return tiles.Tile._make((*tile[:2], *entry, *tile[6:])) if key == site else tile

    return replaced(choose)


def prepared(
    site: Site, entries: Sequence[Entry], run: Closure, device: torch.device, budget: Budget
) -> dict[Entry, Closure]:
    """A captured graph for each tile that gives the first one's results.

    Empty if the first one fails. Tiles that the budget has no time for are left out.
    """
    compile_in_parallel(site, entries, run, budget)
    ready: dict[Entry, Closure] = {}
    expected: list[Tensor] = []
    for entry in entries:
        if budget.left <= 0:
            print(f"{site}: tile {entry} and those after it are left out, for lack of time.")
            break
        try:
            with tile_of(site, entry):
                closure = Replay(run)
            results = closure()
            expected = expected or [t.clone() for t in results]
            off = max(_distance(t, e) for t, e in zip(results, expected, strict=True))
            if not off <= TOLERANCE:
                raise ValueError(f"its results differ by {off:.1e} from those of {entries[0]}")
        except Exception as error:
            print(f"{site}, tile {entry} is left out: {describe(error)}")
            if not usable(device) or entry == entries[0]:
                break
        else:
            ready[entry] = closure
    return ready


class _Timely(ThreadPoolExecutor):
    """Compilations that have not begun when the budget is used up fail instead."""

    def __init__(self, threads: int | None, budget: Budget) -> None:
        super().__init__(threads)
        self.budget = budget

    def submit(self, fn, /, *args, **kwargs):
        def timely():
            if self.budget.left <= 0:
                raise TimeoutError("there was no time to compile it")
            return fn(*args, **kwargs)

        return super().submit(timely)


def compile_in_parallel(site: Site, entries: Sequence[Entry], run: Closure, budget: Budget) -> None:
    """Fills the JIT's cache, under the keys of the launches that follow, while there is time.

    A tile that does not compile is left to fail when it is launched.
    """
    from triton.runtime._async_compile import AsyncCompileMode

    with (
        _Timely(os.cpu_count(), budget) as threads,
        without_launches(),
        AsyncCompileMode(threads, ignore_errors=True),
    ):
        for entry in entries:
            with contextlib.suppress(Exception), tile_of(site, entry):
                run()


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _times(
    ready: Mapping[Entry, Closure], timer: Timer, budget: Budget
) -> dict[Entry, list[float]]:
    """Milliseconds of each, in turns; every one has been called before."""
    times: dict[Entry, list[float]] = {entry: [] for entry in ready}
    for turn in range(ROUNDS):
        if turn >= ROUNDS_MIN and budget.left <= 0:
            break
        for entry, closure in ready.items():
            times[entry].append(timer(closure, launches_count=False))
    return times


def choose(
    site: Site, workload: str, present: Entry, times: Mapping[Entry, Sequence[float]]
) -> Choice:
    """The candidate with the least median, if it beats the present tile beyond the noise."""
    medians = {entry: 1e3 * float(np.median(taken)) for entry, taken in times.items()}
    best = min(medians, key=medians.__getitem__)
    if np.percentile(times[best], 80) >= np.percentile(times[present], 20):
        best = present
    return Choice(site, workload, present, best, medians[present], medians[best], len(times))


def candidates_of(kernel: str) -> Sequence[Entry]:
    if kernel.startswith(("combine", "weight")):
        return SMALL
    if kernel in UNSPLIT:
        return list(dict.fromkeys((*c[:3], 1) for c in CANDIDATES))
    return CANDIDATES


def write(path: Path, gpu_name: str, choices: Sequence[Choice]) -> None:
    """The table, with what was measured of each entry."""
    import triton

    header = {"gpu": gpu_name, "triton": triton.__version__}
    table = {}
    for c in choices:
        note = f"{c.best_us:.2f} us on {c.workload}; {c.present} took {c.present_us:.2f} us"
        table[c.site] = tiles.Entry(*c.best, note=note)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, tiles.text(header, table))


def path_of(gpu_name: str) -> Path:
    """The file in which the package looks for the table of a GPU."""
    return folders.tiles() / tiles.file_name(gpu_name)
