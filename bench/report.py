"""What a run leaves behind: ``results.csv``, ``environment.json``, pictures and ``report.md``.

The CSV and the environment are rewritten whenever something is added, so that a run that is cut
short leaves what it measured.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from . import plots, roofline, tables
from .environment import columns, environment
from .measure import CONDITIONS, OK, ContextLostError, Row
from .observe import Timer
from .roofline import Ceilings

IDENTITY = (
    "workload", "n", "c", "positions", "c_m", "c_n", "heads", "device", "dtype", "layout", "mode",
    "launch", "provider",
)  # fmt: skip
MEASURED = (
    "baseline", "status", "median_ms", "p20_ms", "p80_ms", "repetitions", "ratio_to_eager",
    "ratio_same_format", "ratio_to_compiled", "ratio_to_max_autotune", "ratio_to_rivals",
    "failed_references", "kernels_not_used", "added", "gb_s", "tflop_s", "floor_ms", "bound",
    "share_of_floor", "peak_bytes", "saved_bytes", "launches", "cpu_us", "first_call_cold_s",
    "first_call_warm_s", "error", "error_gradient",
)  # fmt: skip
MACHINE = (
    "machine", "driver", "cuda", "torch", "triton", "commit", "code", "date", "clock_mhz",
)  # fmt: skip
COLUMNS = (*IDENTITY, *MEASURED, *MACHINE)
PARTIAL = ".part"  # ends the name of a file while it is written
INTERRUPTED = "Interrupted: these are the measurements until then."


class Report:
    """Rows, notes and environment of one run, in one folder.

    ``status`` is the exit status of the command that measures.
    """

    def __init__(
        self,
        out: Path,
        title: str,
        metrics: Sequence[str] = tables.DEFAULT_METRICS,
        csv: bool = True,
        png: bool = True,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.title = title
        self.metrics = metrics
        self.csv, self.png = csv, png
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.with_ratios = True
        self.status = 0
        self.ceilings: Ceilings | None = None
        self.environment: dict[str, Any] = {}

    @contextlib.contextmanager
    def ending_early(self) -> Iterator[None]:
        """Ends the block at an interrupt or a lost CUDA context, so that a report can follow."""
        try:
            yield
        except KeyboardInterrupt:
            self.notes.append(INTERRUPTED)
        except ContextLostError as lost:
            self.notes.append(str(lost))
            self.status = 1

    def record(self, **facts: Any) -> None:
        self.environment |= facts
        text = json.dumps(self.environment, indent=2, ensure_ascii=False, default=str)
        replace(self.out / "environment.json", text + "\n")

    def measure_ceilings(self, timer: Timer, device: torch.device, dtype: torch.dtype) -> None:
        self.ceilings, found = roofline.measure(timer, device, dtype)
        self.record(ceilings=found)
        self.notes.append("Ceilings: " + ", ".join(f"{k} {v}" for k, v in found.items()))

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if "conditions" not in self.environment and any(r["device"] == "cuda" for r in rows):
            self.record(conditions=CONDITIONS)
        if self.csv:
            replace(self.out / "results.csv", self.frame().to_csv(index=False))

    def frame(self) -> pd.DataFrame:
        machine = columns(self.environment)
        frame = pd.DataFrame([machine | row for row in self.rows], columns=list(COLUMNS))
        untrusted = [not self.trusts(row) for row in self.rows]
        frame.loc[untrusted, [*tables.RATIOS, "share_of_floor"]] = np.nan
        return frame

    def trusts(self, row: Row) -> bool:
        """Whether the row may have ratios."""
        return self.with_ratios

    @property
    def shows_ratios(self) -> bool:
        return any(map(self.trusts, self.rows)) if self.rows else self.with_ratios

    def timed(self) -> pd.DataFrame:
        frame = self.frame()
        return frame[frame["status"] == OK]

    def finish(self, *, short: bool) -> str:
        """Writes report and plots; returns what to print, ``short`` without a line per timing."""
        timed = self.timed()
        pictures = self._pictures(tables.merged(timed))
        head = "\n".join([self.title, *self.notes])
        ending = [
            tables.untimed(self.frame()), self.summary(), tables.unused_kernels(timed),
            tables.noise(timed),
        ]  # fmt: skip
        everything = [head, self.table(), *ending]
        replace(self.out / "report.md", page(self, timed, pictures))
        shown = [head, *ending] if short else everything
        return "\n\n".join(filter(None, [*shown, f"Written to {self.out}."]))

    def _pictures(self, timed: pd.DataFrame) -> list[tuple[str, str]]:
        """``(file, caption)`` of those that there is something to draw for."""
        if not self.png or timed.empty:
            return []
        if not self.shows_ratios:
            drawn = [("bars.png", "Milliseconds, by workload", plots.times(timed, self.title))]
        else:
            drawn = [("bars.png", "Times as fast, by workload", plots.bars(timed, self.title))]
        if self.ceilings and self.shows_ratios:
            figure = plots.roofline(timed, self.ceilings, self.title)
            drawn.append(("roofline.png", "Roofline: operations a second, against reuse", figure))
        for name, _, figure in drawn:
            figure.savefig(self.out / name, dpi=120)
        return [(name, caption) for name, caption, _ in drawn]

    def table(self) -> str:
        """A line for each timing."""
        shown, formats = tables.shown(self.timed(), self._metrics())
        return shown.to_string(index=False, formatters=formats, na_rep="")

    def _metrics(self) -> list[str]:
        return [m for m in self.metrics if self.shows_ratios or m not in ("ratio", "floor")]

    def summary(self) -> str:
        """Ratios over all workloads, or without ratios the raw times."""
        return tables.ratios(self.timed()) if self.shows_ratios else self.table()


def started(out: Path, device: torch.device, **options: Any) -> Report:
    """A report with the machine's environment and what it has to warn of."""
    facts = environment(device)
    name = (facts.get("card") or {}).get("name", facts["cpu"])
    report = Report(out, f"Double attention on {name}", **options)
    report.record(**facts)
    if device.type == "cpu" and (facts["load"] or 0) > facts["cpus"] / 2:
        report.notes.append(
            f"The machine was busy (load {facts['load']:.1f} on {facts['cpus']} CPUs) before the "
            "run: expect noise and bias."
        )
    return report


# --- the page -------------------------------------------------------------------------------------


def page(report: Report, timed: pd.DataFrame, pictures: Sequence[tuple[str, str]]) -> str:
    """All of a run in Markdown."""
    facts = [
        (name, value)
        for name, value in report.environment.items()
        if value is not None and not isinstance(value, dict)
    ]
    card = report.environment.get("card") or {}
    parts = [f"# {report.title}", *report.notes]
    parts += [f"![{caption}]({name})" for name, caption in pictures]
    found = tables.means(timed)
    if report.shows_ratios and len(found):
        parts.append("## Ratios")
        for ratio, meaning in tables.RATIOS.items():
            part = found[found["against"] == ratio].drop(columns="against")
            if len(part):
                parts.append(f"Times as fast as {meaning}, same launch mode:")
                part = part.rename(columns={"mean": "geometric mean", "worst_workload": "on"})
                parts.append(tables.markdown(part, {"geometric mean": "{:.2f}", "worst": "{:.2f}"}))
        parts += filter(None, [tables.failed_references(timed)])
    modelled = tables.against_model(tables.merged(timed))
    if len(modelled):
        parts += ["## Model against measurement", tables.MODEL_NOTE]
        digits = {"modelled us": "{:.1f}", "measured us": "{:.1f}", "measured / modelled": "{:.2f}"}
        parts.append(tables.markdown(modelled, digits))
    missing = [
        tables.untimed(report.frame()), tables.unused_kernels(timed), tables.noise(timed),
    ]  # fmt: skip
    parts += [f"```\n{text}\n```" for text in missing if text]
    metrics = [m for m in tables.METRICS if report.shows_ratios or m not in ("ratio", "floor")]
    shown, formats = tables.shown(timed, metrics)
    parts += ["## Measurements", tables.markdown(shown, formats)]
    record = pd.DataFrame([*facts, *card.items()], columns=["fact", "value"])
    parts += ["## Environment", tables.markdown(record)]
    return "\n\n".join(parts) + "\n"


def replace(path: Path, content: str | bytes) -> None:
    """Writes the file in one step: it is never seen half-written, and nothing else is left."""
    partial = path.with_suffix(path.suffix + PARTIAL)
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
