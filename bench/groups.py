"""Groups of providers, measured in a worker process that any of them may crash or hang.

The worker announces each provider before its setup and before each timing. Where the process then
crashes or hangs, or CUDA becomes unusable in it, that provider's row says so and the others are
measured again in a new process, ``ATTEMPTS`` times at most; then eager and da_triton alone. Rows
are sent as soon as they are timed, so that a crash later costs no timing. A crash that cannot be
assigned (while inputs are drawn) leaves eager and da_triton. A rival that hangs is left out of
later groups. Launches are counted at the end, in a process of their own: a profiler slows what
follows.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from . import measure, roofline, warm
from .isolation import SILENCE, SILENT, Worker, in_parallel
from .measure import (
    CONTEXT_LOST,
    OK,
    OUT_OF_TIME,
    SLOW,
    WITHOUT,
    Bench,
    Budget,
    Effort,
    Row,
    Timed,
    new_row,
    progress,
)
from .observe import Timer, on_gpu
from .problems import FORWARD, STEP
from .providers import GRAPH, OURS, Provider
from .roofline import Ceilings

ATTEMPTS = 3  # at a group, each without the provider that ended the one before
MOST_AT_ONCE = 8  # processes that compile, on a machine with twice as many cores
AT_ONCE = max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) // 2))
WARMING_SHARE = 0.2  # of a stage's seconds at most
MARGIN = 3.0  # seconds that a group has to end in after its budget, before it is killed
Add = Callable[[list[Row]], None]


@dataclasses.dataclass(frozen=True)
class Where:
    """Settings of groups in one dtype. Everything in it is picklable."""

    device: torch.device
    dtype: torch.dtype
    make_timer: Callable[[], Timer]
    effort: Effort
    silence: float = SILENCE  # seconds without a result after which a worker is killed


# --- in the worker --------------------------------------------------------------------------------


@functools.cache
def _timer(make: Callable[[], Timer]) -> Timer:
    return make()  # with one buffer for the whole process


def in_worker(
    where: Where,
    ceilings: Ceilings | None,
    seconds: float,
    measured: Callable[..., Any],
    arguments: Sequence[Any],
    send: Callable[[Any], None],
) -> None:
    """Sends what the bench sends, then the result of ``measured(bench, *arguments)``.

    ``seconds``: its budget. A number or None is the place of a provider; all else are results.
    """
    bench = Bench(
        where.device, where.dtype, _timer(where.make_timer), where.effort, Budget(seconds),
        ceilings, send, where.silence,
    )  # fmt: skip
    try:
        send(measured(bench, *arguments))
    finally:
        gc.collect()
    if not measure.usable(where.device):
        raise RuntimeError("CUDA became unusable in this process")


def _group(bench: Bench, workload: Any, mode: str, providers: Sequence[Provider]) -> dict[int, Row]:
    return dict(enumerate(bench.measure(workload, mode, providers)))


def _launches(bench: Bench, timed: Sequence[Timed]) -> list[int | None]:
    """The numbers of launches of timed rows, in their order; None where they cannot be counted."""
    bench.count_launches(timed)
    return [row.get("launches") for row, *_ in timed]


def _warm(bench: Bench, workloads: Sequence[Any]) -> None:
    """Calls that compile da_triton's kernels and their launchers, in the cache of all processes."""
    for work, channels_last in itertools.product(workloads, (False, True)):
        if bench.budget.left > 0:
            warm.step(work, channels_last, bench.dtype, bench.device)
            bench.send(None)


def _ceilings(bench: Bench, copy_bytes: int | None, side: int | None) -> tuple[Any, dict[str, Any]]:
    bench.send(None)
    return roofline.measure(bench.timer, bench.device, bench.dtype, copy_bytes, side)


# --- in the process that starts workers -----------------------------------------------------------


@dataclasses.dataclass
class Sweeper:
    """Measures within a budget, in a worker."""

    worker: Worker
    where: Where
    budget: Budget
    ceilings: Ceilings | None = None
    # What happened to providers that hung, by their keys.
    hung: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def of_dtype(self, dtype: torch.dtype) -> "Sweeper":
        """A sweeper for a dtype; for another one without ceilings, which hold for the first."""
        if dtype == self.where.dtype:
            return self
        where = dataclasses.replace(self.where, dtype=dtype)
        return dataclasses.replace(self, where=where, ceilings=None, hung={})

    def run(
        self,
        workloads: Sequence[Any],
        sweeps: Sequence[Sequence[Provider]],
        add: Add,
        modes: Sequence[str] = (FORWARD, STEP),
    ) -> None:
        """Gives ``add`` the rows of each group of ``sweeps``, as soon as they are measured.

        All modes of a workload come before the next: a run that ends early has whole workloads.
        """
        self.run_groups(
            [(w, m, p, place) for place, p in enumerate(sweeps) for w in workloads for m in modes],
            add,
        )

    def run_groups(
        self, groups: Sequence[tuple[Any, str, Sequence[Provider], int]], add: Add
    ) -> None:
        """Measures groups with their numbers, in their order; ``add`` gets the rows of each.

        On a GPU, launches are counted at the end: that completes rows in place, and a last
        ``add([])`` says so.
        """
        timed: list[Timed] = []
        for workload, mode, providers, number in progress(groups):
            rows = self.group(workload, mode, providers)
            for row in rows:
                row["group"] = str(number)
            add(rows)
            timed += [
                (row, workload, mode, provider)
                for row, provider in zip(rows, providers, strict=True)
                if row["status"] == OK and provider.launch != GRAPH and not workload.whole
            ]
        if on_gpu(self.where.device):
            self._count_launches(timed)
            add([])

    def _count_launches(self, timed: Sequence[Timed]) -> None:
        """Completes rows in place, one workload after the other, while there is time."""
        with contextlib.closing(Worker(self.worker.log)) as worker:
            counting = dataclasses.replace(self, worker=worker)
            for _, part in itertools.groupby(timed, key=lambda one: one[1:3]):
                if self.budget.left > 0:
                    items = list(part)
                    found, _, _ = counting._measured(_launches, items)
                    for (row, *_), count in zip(items, found or (), strict=False):
                        row["launches"] = count

    def group(self, workload: Any, mode: str, providers: Sequence[Provider]) -> list[Row]:
        """The rows of all providers, whatever some of them do to their process."""
        rows: dict[int, Row] = {}

        def blank(place: int, status: str) -> Row:
            made = new_row(workload, mode, providers[place], self.where.device, self.where.dtype)
            return made | {"status": status}

        def unmeasured(place: int) -> bool:
            return place not in rows or rows[place]["status"] == CONTEXT_LOST

        keys = [_key(provider, workload) for provider in providers]
        for i, key in enumerate(keys):
            if key in self.hung:
                rows[i] = blank(i, f"not measured again: {self.hung[key]}")
        left = [i for i in range(len(providers)) if i not in rows]
        attempts, why = ATTEMPTS, "there is no eager block to check against"
        while any(map(unmeasured, left)) and attempts >= 0 and self.budget.left > 0:
            # What was timed before CUDA was lost is timed again beside the others.
            left = [i for i in left if unmeasured(i) or rows[i]["status"] == OK]
            if attempts == 0:
                left = [i for i in left if _needed(providers[i])]
            part = [providers[i] for i in left]
            if not part or (workload.whole and not any(p.baseline for p in part)):
                break
            found, failure, using = self._measured(_group, workload, mode, part)
            why = failure or why
            found = found or {}
            if failure and using is not None:
                found.setdefault(using, blank(left[using], failure))
            for place, row in found.items():
                i = left[place]
                if i not in rows or rows[i]["status"] != OK or row["status"] == OK:
                    rows[i] = row
                if SLOW in row["status"] or row["status"].endswith(SILENT):
                    self.hung[keys[i]] = f"on {row['workload']}, {row['status']}"
            attempts = attempts - 1 if found else min(attempts - 1, 0)
        status = f"not measured: {why}" if self.budget.left > 0 else OUT_OF_TIME
        complete = [rows.get(i) or blank(i, status) for i in range(len(providers))]
        measure.compare(complete)  # each process has seen a part of them
        return complete

    def measure_ceilings(
        self, copy_bytes: int | None = None, side: int | None = None
    ) -> dict[str, Any]:
        """Measures the ceilings that later groups are compared with; the facts to be recorded."""
        found, failure, _ = self._measured(_ceilings, copy_bytes, side)
        self.ceilings, facts = found or (None, {"not measured": failure})
        return facts

    def warm(self, workloads: Sequence[Any]) -> list[str]:
        """Compiles da_triton's kernels for workloads in parallel processes, before any timing.

        Returns what went wrong; the measurements will show it again.
        """
        count = min(AT_ONCE, len(workloads))
        seconds = WARMING_SHARE * self.budget.left
        parts = [list(workloads[i::count]) for i in range(count)]
        job = functools.partial(in_worker, self.where, None, seconds, _warm)
        jobs = [functools.partial(job, (part,)) for part in parts]
        return in_parallel(jobs, seconds + MARGIN, self.worker.log)

    def _measured(self, measured: Callable[..., Any], *arguments: Any) -> tuple[Any, str, Any]:
        """The last result if one came, what went wrong, and with which provider if one did."""
        found: Any = None
        using: int | None = None

        def receive(value):
            nonlocal found, using
            if value is None or isinstance(value, int):
                using = value
            else:
                found = value

        seconds = self.budget.left
        inside = max(0.8 * seconds, seconds - MARGIN)
        job = functools.partial(in_worker, self.where, self.ceilings, inside, measured, arguments)
        failure = self.worker.run(job, seconds, receive, self.where.silence)
        return found, failure, using


def _needed(provider: Provider) -> bool:
    """Whether it is measured even where all others are given up."""
    return not provider.compiles and (provider.baseline or provider.name in (*OURS, WITHOUT))


def _key(provider: Provider, workload: Any) -> tuple[str, ...]:
    """The key by which a provider that has hung is not measured again.

    Without eager or da_triton, the rest of a stage would be worth nothing, and a network may hang
    by itself: those are left out on this workload only.
    """
    here = _needed(provider) or workload.whole
    return provider.name, provider.launch, workload.name if here else ""
