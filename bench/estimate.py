"""``python -m bench gpu --estimate``: where the seconds of a GPU run would go. An estimate.

What can be known without a GPU is counted or measured here: groups and providers, the number of
kernels and whether a cache has them, the seconds of an import, and the planner's modelled times.
``ASSUMED`` is all that is not, to be replaced by what the first runs record in
``environment.json`` under ``stages``.
"""

import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import da_triton

from . import providers, tables, warm
from .groups import MOST_AT_ONCE, Spent
from .isolation import Worker
from .observe import FLUSH_BYTES, FLUSHES_AHEAD
from .problems import FORWARD, STEP
from .providers import CHANNELS_LAST, GRAPH, Provider
from .stages import EFFORT, STAGES, order
from .workloads import Workload

ASSUMED = {
    "CUDA context, cuBLAS and cuDNN, s per process": 2.0,
    "setup without compilation, s per provider": 0.15,
    "torch.compile, s per provider and direction": 6.0,
    "max-autotune, s per provider and direction": 25.0,
    "kernel of da_triton, s": 0.4,
    "C launcher of a kernel, s": 0.25,
    "kernels per workload, direction and layout": 130 / (17 * 2 * 2),  # as counted by `warm`
    "input, float64 reference and checks, s per group": 0.3,
    "time of other providers, as a multiple of da_triton's modelled time": 2.5,
    "bandwidth, bytes/s": 3e12,
    "smoke check, s of measuring and of compiling": 15.0,
}


def table(
    stages: Sequence[str],
    workloads: Sequence[Workload],
    budget: float,
    cached: bool,
    imports: float,
) -> pd.DataFrame:
    """Seconds by stage; a sweep that would take longer than its share of the budget is cut there.

    ``cached``: a compile cache was carried along; ``imports``: seconds of a process's imports.
    """
    rows = []
    chosen = [stage for stage in STAGES if stage.name in stages]
    total = sum(stage.seconds for stage in chosen)
    start = imports + ASSUMED["CUDA context, cuBLAS and cuDNN, s per process"]
    for stage in chosen:
        seconds, groups, done = budget * stage.seconds / total, 0, 0
        spent = Spent(imports=start)
        if stage.name in providers.STAGES:
            sweeps = providers.gpu_sweeps(stage.name)
            planned = order(stage.name, workloads, len(sweeps))
            groups = len(planned)
            if stage.name == "eager":
                spent.compilation += start + _kernels(len(workloads), cached) / MOST_AT_ONCE
            for work, mode, group in planned:
                one = _group(sweeps[group], work, mode)
                if sum(vars(spent + one).values()) > seconds:
                    break
                spent, done = spent + one, done + 1
            whole = sum(vars(spent).values())
        elif stage.name == "smoke":
            part = ASSUMED["smoke check, s of measuring and of compiling"]
            spent = Spent(imports=start, compilation=0.0 if cached else part, checking=part)
            whole = sum(vars(spent).values())
        else:  # these take what they are given
            whole = seconds
        parts = {name: round(value, 1) for name, value in vars(spent).items()}
        rows.append(
            {"stage": stage.name, "groups": groups, "done": done, "seconds": round(whole, 1)}
            | parts
            | {"other": round(max(0.0, whole - sum(vars(spent).values())), 1)}
            | {"budget": round(seconds)}
        )
    return pd.DataFrame(rows)


def _kernels(workloads: int, cached: bool) -> float:
    """Seconds that one process takes for workloads in both layouts, forward and backward."""
    count = 4 * workloads * ASSUMED["kernels per workload, direction and layout"]
    each = 0.0 if cached else ASSUMED["kernel of da_triton, s"]
    return count * (each + ASSUMED["C launcher of a kernel, s"])


def _group(sweep: Sequence[Provider], work: Workload, mode: str) -> Spent:
    directions = 1 if mode == FORWARD else 2
    spent = Spent(checking=ASSUMED["input, float64 reference and checks, s per group"])
    a_round = 0.0
    for provider in sweep:
        spent.compilation += ASSUMED["setup without compilation, s per provider"]
        if provider.compiles:
            kind = "max-autotune" if "max-autotune" in provider.name else "torch.compile"
            spent.compilation += directions * ASSUMED[f"{kind}, s per provider and direction"]
        a_round += _one_timing(provider, work, mode)
    rounds = min(EFFORT.rounds_max, max(EFFORT.rounds_min, int(EFFORT.seconds / a_round)))
    spent.timing = rounds * a_round
    spent.checking += (EFFORT.warm_up - 1) * a_round
    return spent


def _one_timing(provider: Provider, work: Workload, mode: str) -> float:
    """Seconds of a measured call with the buffers that are written and read before it."""
    buffers = 1 + (FLUSHES_AHEAD if provider.launch == GRAPH else 1)
    flush = buffers * FLUSH_BYTES / ASSUMED["bandwidth, bytes/s"]
    name = "time of other providers, as a multiple of da_triton's modelled time"
    factor = 1.0 if provider.name in providers.OURS else ASSUMED[name]
    return flush + factor * _modelled(work, mode, provider.layout)


@functools.cache
def _modelled(work: Workload, mode: str, layout: str) -> float:
    from .problems import memory_format

    form = torch.contiguous_format
    if layout == CHANNELS_LAST:
        form = memory_format(len(work.positions))
    shape = (work.n, work.c, *work.positions)
    plan = da_triton.plan(shape, work.c_m, work.c_n, heads=work.heads, memory_format=form)
    chosen = plan.chosen
    return chosen.seconds + (chosen.backward_seconds if mode == STEP else 0.0)


def text(stages: Sequence[str], workloads: Sequence[Workload], budget: float) -> str:
    folder = os.environ.get("TRITON_CACHE_DIR")
    carried = folder is not None and (Path(folder) / warm.FILE).exists()
    found = table(stages, workloads, budget, carried, imports())
    cache = "a warm compile cache" if carried else "an empty compile cache"
    known = "\n".join(f"  {value:g}  {name}" for name, value in ASSUMED.items())
    return (
        f"Seconds of a GPU run with {cache}: an estimate, none of it was measured on a GPU.\n\n"
        f"{tables.markdown(found)}\n\nAssumed:\n{known}"
    )


def imports() -> float:
    """Seconds that a worker of a sweep takes to start, measured here."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder) / "worker.txt")
        worker.run(_nothing, 60.0, print)
        worker.close()
    return worker.imports


def _nothing(send) -> None:
    from . import groups  # noqa: F401
