"""Seconds of a fresh process to its first result, with empty and with full kernel caches."""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .isolation import Worker
from .measure import OK, Row
from .observe import describe, wait
from .providers import Provider

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "DA_TRITON_CACHE_DIR")
LIMIT = 600.0  # seconds for both calls


def seconds(
    workload: Any,
    provider: Provider,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    limit: float = LIMIT,
) -> tuple[float, float]:
    """With an empty cache, then with what that run left in it; both within ``limit`` seconds.

    Raises:
        RuntimeError: with what happened to the process.
    """
    job = functools.partial(_first_call, workload, provider, mode, dtype, device)
    deadline = time.monotonic() + limit
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: str(Path(folder) / name.lower()) for name in CACHES}
        for _ in range(2):
            worker = Worker(Path(folder) / "log.txt", caches)
            failure = worker.run(job, deadline - time.monotonic(), found.append, silence=limit)
            worker.close()
            if failure:
                raise RuntimeError(f"first call of {provider.name!r}: {failure}")
    cold, warm = found
    return cold, warm


def adding(
    add: Callable[[list[Row]], None],
    workloads: Sequence[Any],
    groups: Sequence[Sequence[Provider]],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[list[Row]], None]:
    """``add`` for rows that are completed with the seconds of their providers' first calls."""
    works = {w.name: w for w in workloads}
    known = {(p.name, p.launch, p.layout): p for group in groups for p in group}

    def completed(rows: list[Row]) -> None:
        for row in rows:
            if row["status"] == OK:
                provider = known[row["provider"], row["launch"], row["layout"]]
                try:
                    found = seconds(works[row["workload"]], provider, row["mode"], dtype, device)
                    row["first_call_cold_s"], row["first_call_warm_s"] = found
                except Exception as error:
                    row["status"] = f"failed: {describe(error)}"
        add(rows)

    return completed


def _first_call(workload, provider, mode, dtype, device, send):
    """Sends the seconds from the ready problem to the end of the first call."""
    problem = provider.problem(workload.draw(mode, dtype, device))
    start = time.perf_counter()
    provider.setup(problem)()
    wait(device)
    send(time.perf_counter() - start)
