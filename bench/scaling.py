"""How cost grows with one size: positions, batch, channels or descriptors; the others as in
``BASE``.

Our time against positions is fitted with ``a + b·L``, weighted so that short inputs count as much
as long ones.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from . import plots
from .groups import Sweeper
from .measure import OK, Row
from .providers import OURS, Provider
from .report import COLUMNS, Report, replace
from .workloads import Workload

BASE = Workload("scaling", 1, 128, (64, 64), 64, 64)
AXES = {
    "L": [2**k for k in range(10, 22)],
    "N": [2**k for k in range(9)],
    "C": [16, 32, 64, 128, 256, 512, 1024, 2048],
    "c_n": [8, 16, 32, 64, 128, 256, 512],
}
TITLES = {"L": "positions", "N": "samples", "C": "channels", "c_n": "descriptors"}


def workload(axis: str, size: int) -> Workload:
    side = 2 ** (size.bit_length() // 2)  # sizes are powers of two
    changes: dict[str, dict[str, Any]] = {
        "L": {"positions": (size // side, side)}, "N": {"n": size, "cpu_n": size},
        "C": {"c": size}, "c_n": {"c_n": size},
    }  # fmt: skip
    return dataclasses.replace(BASE, name=f"scaling {axis}={size}", **changes[axis])


def run(
    sweeper: Sweeper,
    axis: str,
    sizes: Sequence[int],
    sweeps: Sequence[Sequence[Provider]],
    modes: Sequence[str],
    report: Report,
) -> None:
    """Measures, and writes ``scaling.csv`` whenever something is added."""

    def add(rows: list[Row]) -> None:
        report.rows += rows
        replace(report.out / "scaling.csv", frame(report, axis).to_csv(index=False))

    sweeper.run([workload(axis, size) for size in sizes], sweeps, add, modes)


def finish(report: Report, axis: str) -> str:
    """Writes ``scaling.png``; returns what to print."""
    found = frame(report, axis)
    timed = found[found["status"] == OK]
    if len(timed):
        title = f"{report.title}: time against {TITLES[axis]}"
        plots.scaling(timed, TITLES[axis], title).savefig(report.out / "scaling.png", dpi=120)
    lines = [report.title, *report.notes, report.table(report.metrics)]
    lines += [fitted(timed)] if axis == "L" else []
    return "\n\n".join(filter(None, [*lines, f"Written to {report.out}."]))


def frame(report: Report, axis: str) -> pd.DataFrame:
    found = report.frame()
    sizes = found["workload"].str.rsplit("=", n=1).str[-1].astype(int)
    return found.assign(axis=axis, size=sizes)[["axis", "size", *COLUMNS]]


def fit(length: np.ndarray, ms: np.ndarray) -> tuple[float, float]:
    """``(a in microseconds, b in nanoseconds per position)`` of the least relative squares."""
    b, a = np.polyfit(length, ms, 1, w=1 / ms)
    return 1e3 * a, 1e6 * b


def fitted(timed: pd.DataFrame) -> str:
    """A line for each of our series with at least three sizes."""
    lines = []
    ours = timed[timed["provider"].isin(OURS)]
    for key, part in ours.groupby(["provider", "layout", "launch", "mode"], sort=False):
        if len(part) < 3:
            continue
        a, b = fit(part["size"].to_numpy(float), part["median_ms"].to_numpy(float))
        each = part["median_ms"] / part["size"]
        long = each[part["size"] >= 2**19].max() / each.min() - 1
        tail = "" if np.isnan(long) else f", from 2^19 on within {long:.0%} of its best"
        lines.append(f"  {' '.join(key)}: {a:.1f} µs + {b:.3f} ns per position{tail}")
    return "\n".join(["Time against positions:", *lines]) if lines else ""
