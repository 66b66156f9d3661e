"""Groups of providers, measured in a worker process that any of them may crash or hang.

The worker announces each provider before its setup and before each timing. Where the process then
crashes or hangs, or CUDA becomes unusable in it, that provider's row says so and the others are
measured again in a new process, ``ATTEMPTS`` times at most; then eager and da_triton alone. Rows
are sent as soon as they are timed, so that a crash later costs no timing. A crash that cannot be
assigned (while inputs are drawn, or while whole networks are timed) leaves eager and da_triton.
A rival that hangs is left out of later groups. Launches are counted at the end, in a process of
their own: a profiler slows what follows.
"""

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import measure
from .floors import Ceilings
from .isolation import SILENT, Worker, in_parallel
from .jobs import (
    SLOW,
    CeilingsJob,
    Compared,
    Group,
    Job,
    LaunchCount,
    NetworkGroup,
    Planned,
    Spent,
    Timed,
    Using,
    Warming,
    Where,
)
from .measure import (
    CONTEXT_LOST,
    OK,
    OUT_OF_TIME,
    Bench,
    Budget,
    Row,
    on_gpu,
    progress,
)
from .networks import Network, Variant
from .problems import FORWARD, STEP
from .providers import GRAPH, Closure, Provider
from .workloads import Workload

ATTEMPTS = 3  # at a group, each without the provider that ended the one before
MOST_AT_ONCE = 8  # processes that compile, on a machine with twice as many cores
AT_ONCE = max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) // 2))
WARMING_SHARE = 0.2  # of a stage's seconds at most
MARGIN = 3.0  # seconds that a group has to end in after its budget, before it is killed


class Sweeper:
    """Measures within a budget, in a worker; ``run`` takes what ``Bench.run`` takes."""

    def __init__(
        self, worker: Worker, where: Where, budget: Budget, ceilings: Ceilings | None = None
    ) -> None:
        self.worker, self.where, self.budget = worker, where, budget
        self.ceilings = ceilings
        self.spent = Spent()
        self.hung: dict[tuple[str, ...], str] = {}  # what happened, by the keys of members

    def run(
        self,
        workloads: Sequence[Workload],
        sweeps: Sequence[Sequence[Provider]],
        add: Callable[[list[Row]], None],
        modes: Sequence[str] = (FORWARD, STEP),
    ) -> None:
        # Both modes of a workload, before the next: a run that ends early has whole workloads.
        self.run_groups(
            [(w, m, p, place) for place, p in enumerate(sweeps) for w in workloads for m in modes],
            add,
        )

    def run_groups(self, groups: Sequence[Planned], add: Callable[[list[Row]], None]) -> None:
        """Measures groups in their order; ``add`` gets the rows of each."""
        timed: list[Timed] = []
        for workload, mode, providers, place in progress(groups):
            rows = self.group(workload, mode, providers)
            for row in rows:
                row["group"] = str(place)
            add(rows)
            timed += [
                (row, workload, mode, provider)
                for row, provider in zip(rows, providers, strict=True)
                if row["status"] == OK and provider.launch != GRAPH
            ]
        if on_gpu(self.where.device):
            self._count_launches(timed)
            add([])

    def _count_launches(self, timed: Sequence[Timed]) -> None:
        """Completes rows in place, one workload after the other, while there is time."""
        worker, self.worker = self.worker, Worker(self.worker.log)
        try:
            for _, part in itertools.groupby(timed, key=lambda one: one[1:3]):
                if self.budget.left > 0:
                    items = list(part)
                    job = LaunchCount(self.where, None, 0.0, items)
                    found, _, _ = self._measured(job)
                    for (row, *_), count in zip(items, found, strict=False):
                        row["launches"] = count
        finally:
            self.worker.close()
            self.worker = worker

    def group(self, workload: Workload, mode: str, providers: Sequence[Provider]) -> list[Row]:
        """The rows of a group, one for each provider."""
        return self._compared(Group(self.where, self.ceilings, 0.0, workload, mode, providers))

    def network(self, network: Network, mode: str, variants: Sequence[Variant]) -> list[Row]:
        return self._compared(NetworkGroup(self.where, self.ceilings, 0.0, network, mode, variants))

    def _compared(self, job: Compared) -> list[Row]:
        """The rows of all members, whatever some of them do to their process."""
        members, bench = job.members, self._bench()
        rows: dict[int, Row] = {}

        def blank(place: int, status: str) -> Row:
            return job.row(bench, members[place]) | {"status": status}

        for i, member in enumerate(members):
            if (key := job.key(member)) in self.hung:
                rows[i] = blank(i, f"not measured again: {self.hung[key]}")
        left = [i for i in range(len(members)) if i not in rows]
        attempts, why = ATTEMPTS, "there is no eager block to check against"
        while attempts >= 0 and self.budget.left > 0:
            if attempts == 0:
                left = [i for i in left if job.needed(members[i])]
            part = dataclasses.replace(job, members=[members[i] for i in left])
            if not part.complete():
                break
            found, failure, using = self._measured(part)
            why = failure or why
            found = {left[place]: row for place, row in (found or {}).items()}
            culprit = None if using is None else left[using]
            known = bool(found) or culprit is not None
            if failure and culprit is not None and culprit not in found:
                found[culprit] = blank(culprit, failure)
            for i, row in found.items():
                if i not in rows or rows[i]["status"] != OK or row["status"] == OK:
                    rows[i] = row
                if row["status"].startswith(SLOW) or row["status"].endswith(SILENT):
                    self.hung[job.key(members[i])] = f"on {row['workload']}, {row['status']}"
            lost = any(row["status"] == CONTEXT_LOST for row in found.values())
            missing = [
                i for i in left if rows.get(i, {}).get("status", CONTEXT_LOST) == CONTEXT_LOST
            ]
            if not missing:
                break
            # What is timed again is compared with those that were timed before.
            left = [i for i in left if i in missing or (lost and rows[i]["status"] == OK)]
            attempts = attempts - 1 if known else min(attempts - 1, 0)
        status = f"not measured: {why}" if self.budget.left > 0 else OUT_OF_TIME
        found = [rows.get(i) or blank(i, status) for i in range(len(members))]
        for row in found:  # each process has seen a part of them
            for name in [name for name in row if name.startswith("ratio_")]:
                del row[name]
        measure.compare(found)
        return found

    def measure_ceilings(self, copy_bytes: int | None, size: int | None) -> dict[str, Any]:
        """Measures the ceilings that later groups are compared with; the facts to be recorded."""
        job = CeilingsJob(self.where, None, 0.0, copy_bytes, size)
        found, failure, _ = self._measured(job)
        self.ceilings, facts = found or (None, {"ceilings": failure})
        return facts

    def warm(self, workloads: Sequence[Workload], log: Path) -> list[str]:
        """Compiles da_triton's kernels for workloads in parallel processes, before any timing.

        Returns what went wrong; the measurements will show it again.
        """
        start, count = time.perf_counter(), min(AT_ONCE, len(workloads))
        jobs = [
            Warming(self.where, None, WARMING_SHARE * self.budget.left, list(workloads[i::count]))
            for i in range(count)
        ]
        failures = in_parallel(jobs, WARMING_SHARE * self.budget.left + MARGIN, log)
        self.spent.compilation += time.perf_counter() - start
        return failures

    def _measured(self, job: Job) -> tuple[Any, str, int | None]:
        """Results (empty if none came), what went wrong, and with which provider if one did."""
        found: Any = []
        using: int | None = None

        def receive(value):
            nonlocal found, using
            if isinstance(value, Using):
                using = value.place
            elif isinstance(value, Spent):
                self.spent += value
            else:
                found = value

        seconds, before = self.budget.left, self.worker.imports
        job = dataclasses.replace(job, seconds=max(0.8 * seconds, seconds - MARGIN))
        failure = self.worker.run(job, seconds, receive, self.where.silence)
        self.spent.imports += self.worker.imports - before
        return found, failure, using

    def _bench(self) -> Bench:
        """Only for what it knows of rows: this process measures nothing."""
        where = self.where
        return Bench(
            device=where.device, dtype=where.dtype, timer=_no_timer, effort=where.effort,
            budget=self.budget,
        )  # fmt: skip


def _no_timer(closure: Closure, *, launches_count: bool) -> float:
    raise RuntimeError("groups are measured in a worker")
