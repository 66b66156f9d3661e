"""Writes the planner's calibration: modelled time over roofline, by part of a route and by shape.

    python -m bench.model.calibrate          (without TRITON_INTERPRET; no GPU)

Shapes are those of the named workloads in bfloat16, in both memory formats. Every route that the
kernels can take is modelled on an H200.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench import model
from bench.codegen import cannot_compile, survey
from bench.codegen.compile import Launch
from bench.problems import BACKWARD, FORWARD
from bench.providers import LAYOUTS
from bench.workloads import WORKLOADS, select
from da_triton.ops.triton.plan import kernel_limits
from da_triton.planning import calibration, planner
from da_triton.planning.costs import XZ
from da_triton.planning.planner import Part, Route

from .launches import Timed
from .machine import H200
from .passes import Block, Operations, block_of, timed

AGAIN = ("statistics", "gather", "gather_combine")
GATHERING = ("gather", "combine", "product")  # what the kernels of a fused gather begin with
DISTRIBUTING = "project_distribute", "distribute", "full_n", "position_lse", "apply_weights"
Row = tuple[Any, ...]  # of ``calibration.COLUMNS``


def rows_of(job: model.Job) -> list[Row]:
    """The rows of a workload in a memory format, one per part."""
    work = next(w for w in WORKLOADS if w.name == job[0])
    block = block_of(work, job[1])
    found: dict[tuple[str, int, bool], list[float]] = {}
    for part, seconds in _parts(block):
        key = part.name, part.samples, part.shape.channels_last
        found.setdefault(key, []).append(math.log2(seconds / part.roofline))
    s = block.shape
    sizes = s.channels, s.c_m, s.c_n, s.heads
    return [
        (name, *sizes, samples, samples * s.length, int(last), round(statistics.mean(ratios), 3))
        for (name, samples, last), ratios in found.items()
    ]


def _parts(block: Block) -> Iterator[tuple[Part, float]]:
    """Every part with its modelled seconds, again with each new partner.

    A backward pass in the other memory format is left to that format's rows.
    """
    s = block.shape
    limits = kernel_limits(s, s.channels, H200.arch, H200.num_sms)
    route = survey.UNFUSED._replace(batch_chunk=s.batch)
    known: set[tuple[str, int]] = set()
    for order in planner.orders(s.reconstruct):
        for way in planner.forwards(s, limits, order, block.save_v):
            keys = {(part.name, part.samples) for part in way.parts}
            if keys <= known:
                continue
            known |= keys
            taken = route._replace(**way.fields)
            made = block.operations(H200, taken)[FORWARD]
            times = timed(made, H200)
            if taken.to_channels_last:
                copies = 1 + block.save_v
                yield way.parts[-1], _seconds([times[0], *times[-copies:]])
                made, times = made[1:-copies], times[1:-copies]
            gathers = _gathers(made, taken)
            for part, first in zip(way.parts[:2], (True, False), strict=True):
                own = [t for t, is_first in zip(times, gathers, strict=True) if is_first == first]
                yield part, _seconds(own)
    if limits.gather_from_x:
        route = route._replace(order=XZ, gather="fused")
    for way in planner.backwards(s, limits, block.save_v):
        if way.parts[0].shape != s:
            continue
        times = timed(block.operations(H200, route._replace(**way.fields))[BACKWARD], H200)
        extra = planner.gathering_again(way, limits).parts[len(way.parts) :]
        again = [t for t in times if extra and limits.gather_from_x and t.kernel in AGAIN]
        yield way.parts[0], _seconds(t for t in times if t not in again)
        if again:
            yield extra[0], _seconds(again)


def _seconds(launches: Iterable[Timed]) -> float:
    return sum(t.seconds + planner.LAUNCH for t in launches)


def _gathers(made: Operations, route: Route) -> list[bool]:
    """Which launches of a forward pass belong to the gather; the rest is the distribute's."""
    if route.gather == "fused":
        return [isinstance(each, Launch) and each.name.startswith(GATHERING) for each in made]
    first = next(
        i for i, each in enumerate(made)
        if isinstance(each, Launch) and each.name.startswith(DISTRIBUTING)
    )  # fmt: skip
    return [i < first for i in range(len(made))]


def write(rows: Sequence[Row], path: Path) -> None:
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(set(rows)))
    columns = json.dumps(calibration.COLUMNS)
    text = f'{{\n "gpu": "H200, modelled",\n "columns": {columns},\n "rows": [\n{lines}\n ]\n}}\n'
    path.write_text(text, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.model.calibrate", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=calibration.FILE)
    add("--workload", action="append", default=[], help="repeatable; else all")
    options = parser.parse_args(argv)
    works = select(options.workload, "all")
    wanted = [(work.name, layout) for work in works for layout in LAYOUTS]
    if options.workload and options.out == calibration.FILE:
        parser.error("--workload: expected --out with it, since the table is replaced whole")
    if reason := cannot_compile():
        parser.error(reason)
    spawn = multiprocessing.get_context("spawn")
    rows: list[Row] = []
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        for job, found in zip(wanted, pool.map(rows_of, wanted), strict=True):
            print(*job, f"{len(found)} parts", flush=True)
            rows += found
    write(rows, options.out)


if __name__ == "__main__":
    main()
