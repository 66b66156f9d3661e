"""The modelled launches of the named workloads.

    python -m bench.model.passes H200 [--untimed] < jobs

prints a JSON object per launch, without its times if they are not wanted. ``jobs`` is an array of
``[workload, layout]`` in JSON. Runs in a process of its own, without TRITON_INTERPRET, on a machine
without a GPU.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.codegen import Row, compile, survey
from bench.codegen.compile import Launch
from bench.codegen.survey import Variant
from bench.problems import BACKWARD, FORWARD
from bench.providers import CHANNELS_LAST
from bench.roofline import Ceilings, work_of
from bench.workloads import WORKLOADS, Workload
from da_triton.ops.triton import routes
from da_triton.ops.triton.plan import kernel_routes
from da_triton.planning import planner
from da_triton.planning.planner import PlannedRoute, Route
from da_triton.planning.shapes import Shape

from . import launches, operations
from .launches import Timed
from .machine import GPU, GPUS
from .operations import Cache, Operation, recording

Operations = list[Launch | Operation]


class Block(NamedTuple):
    """A workload's block on a GPU, in bfloat16."""

    shape: Shape
    save_v: bool

    def planned(self, gpu: GPU) -> tuple[PlannedRoute, ...]:
        """Its routes, the planner's choice first."""
        s = self.shape
        return kernel_routes(s, s.channels, gpu.arch, gpu.num_sms, None, self.save_v)

    def operations(self, gpu: GPU, route: Route) -> dict[str, Operations]:
        """The launches of a forward and of a backward pass."""
        s = self.shape
        v = Variant("nhwc" if s.channels_last else "nchw", s.length, heads=s.heads)
        with survey.on(gpu.arch, gpu.num_sms):
            sizes = s.channels, s.c_m, s.c_n
            x, w, mask, options = survey.block_inputs(sizes, v, s.batch)
            with recording() as forward:
                _, lse, g, kept = routes.forward(x, w, mask, options, route, self.save_v)
            dout = torch.empty_like(x)
            with recording() as backward:
                routes.backward(dout, x, w, mask, lse, g, kept, options, route)
        return {FORWARD: forward, BACKWARD: backward}


def block_of(work: Workload, layout: str) -> Block:
    sizes = work.c, work.c_m, work.c_n, work.heads
    shape = Shape(work.n, *sizes, work.length, 2, True, layout == CHANNELS_LAST)
    save_v = planner.saves_v(work.c, work.c_m, work.c_n, work.heads, "auto")
    return Block(shape, save_v)


def timed(made: Operations, gpu: GPU) -> list[Timed]:
    """The modelled launches of a pass, in order, with what each leaves in the L2 for the next."""
    cache, found = Cache(gpu.l2_kept), []
    for each in made:
        if isinstance(each, Operation):
            found.append(Timed(*operations.price(each, cache, gpu)))
        else:
            found.append(launches.time(each, cache, gpu))
    return found


def rows_of(work: Workload, layout: str, name: str, untimed: bool) -> Iterator[Row]:
    gpu = GPUS[name]
    block = block_of(work, layout)
    chosen = block.planned(gpu)[0]
    made = block.operations(gpu, chosen.route)
    planned = {FORWARD: chosen.seconds, BACKWARD: chosen.backward_seconds}
    ceilings = Ceilings(gpu.bandwidth, gpu.library)
    for mode, seconds in planned.items():
        floor, _ = work_of(work, work.n, mode, 2).least_time(ceilings)
        times: list[Row] = [{} for _ in made[mode]]
        if not untimed:
            times = [figures(t) for t in timed(made[mode], gpu)]
        for number, (each, figures_) in enumerate(zip(made[mode], times, strict=True)):
            yield {
                "gpu": name, "workload": work.name, "layout": layout, "pass": mode,
                "number": number, **figures_, "floor_us": floor * 1e6,
                "planner_us": seconds * 1e6, "route": str(chosen.route).replace(";", ","),
                "digest": compile.digest(each, gpu.arch) if isinstance(each, Launch) else "",
            }  # fmt: skip


def figures(t: Timed) -> Row:
    facts: dict[str, Any] = dataclasses.asdict(t)
    seconds, busy = facts.pop("seconds"), facts.pop("busy")
    waiting = max(0.0, seconds - max(busy.values()))
    causes = {**busy, "waiting": waiting}
    return {
        **facts, "us": seconds * 1e6, "binding": t.binding,
        **{f"{name}_us": each * 1e6 for name, each in causes.items()},
    }  # fmt: skip


def main(name: str, jobs: Sequence[tuple[str, str]], untimed: bool) -> None:
    known = {work.name: work for work in WORKLOADS}
    for work, layout in jobs:
        for row in rows_of(known[work], layout, name, untimed):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.load(sys.stdin), "--untimed" in sys.argv)
