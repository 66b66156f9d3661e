"""The results of a run: ``results.csv``, ``environment.json``, plots and ``report.md``.

The CSV and the environment are rewritten whenever something is added, so that a run that is cut
short leaves what it measured.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from . import plots, tables
from .environment import columns, environment
from .measure import CONDITIONS, OK, RATIOS, Row
from .roofline import Ceilings

IDENTITY = (
    "workload", "n", "c", "positions", "c_m", "c_n", "heads", "device", "dtype", "layout", "mode",
    "launch", "provider",
)  # fmt: skip
COLUMNS = (
    *IDENTITY, "baseline", "status", "median_ms", "p20_ms", "p80_ms", "repetitions", *RATIOS,
    "failed_references", "kernels_not_used", "added", "gb_s", "tflop_s", "floor_ms", "bound",
    "share_of_floor", "peak_bytes", "saved_bytes", "launches", "cpu_us", "first_call_cold_s",
    "first_call_warm_s", "error", "error_gradient",
    "machine", "driver", "cuda", "torch", "triton", "commit", "code", "date", "clock_mhz",
)  # fmt: skip
PARTIAL = ".part"  # ends the name of a file while it is written
INTERRUPTED = "Interrupted: these are the measurements until then."


@dataclasses.dataclass
class Report:
    """Rows, notes and environment of one run, in one folder.

    ``trusts`` says whether a row may have ratios. Where none may, there are raw times only.
    """

    out: Path
    title: str
    metrics: Sequence[str] = tables.DEFAULT_METRICS
    csv: bool = True
    png: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    ceilings: Ceilings | None = None
    trusts: Callable[[Row], bool] = lambda row: True

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def ending_early(self) -> Iterator[None]:
        """Ends the block at an interrupt, so that a report can follow."""
        try:
            yield
        except KeyboardInterrupt:
            self.notes.append(INTERRUPTED)

    def record(self, **facts: Any) -> None:
        self.environment |= facts
        text = json.dumps(self.environment, indent=2, ensure_ascii=False, default=str)
        replace(self.out / "environment.json", text + "\n")

    def take_ceilings(self, ceilings: Ceilings | None, facts: dict[str, Any]) -> str:
        """Stores and records the ceilings; returns them as a line."""
        self.ceilings = ceilings
        self.record(ceilings=facts)
        return "Ceilings: " + ", ".join(f"{k} {v}" for k, v in facts.items())

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if "conditions" not in self.environment and any(r["device"] == "cuda" for r in self.rows):
            self.record(conditions=CONDITIONS)
        if self.csv:
            replace(self.out / "results.csv", self.frame().to_csv(index=False))

    def frame(self) -> pd.DataFrame:
        machine = columns(self.environment)
        frame = pd.DataFrame([machine | row for row in self.rows], columns=list(COLUMNS))
        untrusted = [not self.trusts(row) for row in self.rows]
        frame.loc[untrusted, [*RATIOS, "share_of_floor"]] = np.nan
        return frame

    @property
    def shows_ratios(self) -> bool:
        return any(map(self.trusts, self.rows or [{}]))

    def timed(self) -> pd.DataFrame:
        frame = self.frame()
        return frame[frame["status"] == OK]

    def finish(self, *, short: bool) -> str:
        """Writes report and plots; returns what to print, ``short`` without a line per timing."""
        timed = self.timed()
        found = {
            "Ratios": tables.ratios(timed), "Not timed": tables.untimed(self.frame()),
            "Warnings": tables.warnings(timed),
        }  # fmt: skip
        everything = found | {
            "Model against measurement": tables.model(timed),
            "Measurements": self.table(tables.METRICS),
            "Environment": self._facts(),
        }
        head = [f"# {self.title}", *self.notes]
        page = _page([*head, *self._plots(tables.merged(timed))], everything)
        replace(self.out / "report.md", page + "\n")
        if "ratio" not in self.metrics:
            del found["Ratios"]
        if not short or not self.shows_ratios:
            found["Measurements"] = self.table(self.metrics)
        return _page(head, found) + f"\n\nWritten to {self.out}."

    def _plots(self, timed: pd.DataFrame) -> list[str]:
        """Captions, with the files, of those that there is something to draw for."""
        if not (self.png and self.shows_ratios and len(timed)):
            return []
        drawn = {"bars.png": ("Times as fast, by workload", plots.bars(timed, self.title))}
        if self.ceilings and timed["tflop_s"].notna().any():
            figure = plots.roofline(timed, self.ceilings, self.title)
            drawn["roofline.png"] = ("Roofline: operations per second, against reuse", figure)
        for name, (_, figure) in drawn.items():
            figure.savefig(self.out / name, dpi=120)
        return [f"![{caption}]({name})" for name, (caption, _) in drawn.items()]

    def table(self, metrics: Iterable[str]) -> str:
        """A line per timing; empty without any."""
        wanted = [m for m in metrics if self.shows_ratios or m not in ("ratio", "floor")]
        return tables.measurements(self.timed(), wanted)

    def _facts(self) -> str:
        gpu = self.environment.get("gpu") or {}
        facts = {k: v for k, v in self.environment.items() if not isinstance(v, dict)} | gpu
        shown = [(name, value) for name, value in facts.items() if value is not None]
        return tables.markdown(pd.DataFrame(shown, columns=["fact", "value"], dtype=object))


def _page(head: Sequence[str], sections: Mapping[str, str]) -> str:
    """Markdown; sections without a text are left out."""
    return "\n\n".join([*head, *(f"## {k}\n\n{text}" for k, text in sections.items() if text)])


def started(out: Path, device: torch.device, **options: Any) -> Report:
    """A report with the machine's environment and what it has to warn of."""
    facts = environment(device)
    report = Report(out, f"Double attention on {columns(facts)['machine']}", **options)
    report.record(**facts)
    if device.type == "cpu" and (facts["load"] or 0) > facts["cpus"] / 2:
        report.notes.append(
            f"The machine was busy (load {facts['load']:.1f} on {facts['cpus']} CPUs) before the "
            "run: expect noise and bias."
        )
    return report


def replace(path: Path, content: str | bytes) -> None:
    """Writes the file in one step: it is never seen half-written, and nothing else is left."""
    partial = path.with_suffix(path.suffix + PARTIAL)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
