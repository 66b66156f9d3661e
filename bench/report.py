"""What a run leaves behind: ``results.csv``, ``environment.json``, pictures and ``report.md``.

The CSV and the environment are written anew whenever something is added, so that a run that is cut
short leaves what it measured.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import plots
from .environment import columns
from .floors import Ceilings
from .measure import OK, Row
from .providers import OURS

IDENTITY = (
    "workload", "n", "c", "positions", "c_m", "c_n", "heads", "device", "dtype", "layout", "mode",
    "launch", "provider",
)  # fmt: skip
MEASURED = (
    "baseline", "status", "median_ms", "p20_ms", "p80_ms", "repetitions", "ratio_to_eager",
    "ratio_same_format", "ratio_to_compiled", "gb_s", "tflop_s", "floor_ms", "bound",
    "share_of_floor", "peak_bytes", "saved_bytes", "launches", "cpu_us", "first_call_cold_s",
    "first_call_warm_s", "error", "error_gradient",
)  # fmt: skip
MACHINE = ("machine", "driver", "cuda", "torch", "triton", "commit", "date", "clock_mhz")
COLUMNS = (*IDENTITY, *MEASURED, *MACHINE)
SHOWN = {
    "workload": "workload", "n": "N", "mode": "mode", "launch": "launch", "provider": "provider",
    "layout": "layout",
}  # fmt: skip
# What --metric may name: columns, with their title and the digits that are printed.
METRICS: dict[str, dict[str, tuple[str, int]]] = {
    "time": {"median_ms": ("median ms", 3), "p20_ms": ("p20", 3), "p80_ms": ("p80", 3)},
    "ratio": {
        "ratio_to_eager": ("x eager", 2),
        "ratio_same_format": ("same format", 2),
        "ratio_to_compiled": ("x compile", 2),
    },
    "rate": {"gb_s": ("GB/s", 1), "tflop_s": ("TFLOP/s", 2)},
    "floor": {"floor_ms": ("floor ms", 3), "share_of_floor": ("of floor", 2)},
    "memory": {"peak_bytes": ("peak B", 0), "saved_bytes": ("saved B", 0)},
    "launches": {"launches": ("launches", 0), "cpu_us": ("CPU us", 1)},
    "first_call": {"first_call_cold_s": ("cold s", 2), "first_call_warm_s": ("warm s", 2)},
}
DEFAULT_METRICS = ("time", "ratio")
RATIOS = {
    "ratio_to_eager": "the better of eager NCHW and channels_last",
    "ratio_same_format": "eager in the same memory format",
    "ratio_to_compiled": "the best of torch.compile of eager",
}
NOISY = 1.5


class Report:
    """Rows, notes and environment of one run, in one folder."""

    def __init__(
        self, out: Path, title: str, metrics: Sequence[str] = DEFAULT_METRICS, csv: bool = True,
        png: bool = True,
    ) -> None:  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.title = title
        self.metrics = metrics
        self.csv, self.png = csv, png
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.with_ratios = True
        self.ceilings: Ceilings | None = None
        self.environment: dict[str, Any] = {}

    def record(self, **facts: Any) -> None:
        self.environment |= facts
        text = json.dumps(self.environment, indent=2, ensure_ascii=False, default=str)
        replace(self.out / "environment.json", text + "\n")

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        if self.csv:
            replace(self.out / "results.csv", self.frame().to_csv(index=False))

    def frame(self) -> pd.DataFrame:
        machine = columns(self.environment)
        frame = pd.DataFrame([row | machine for row in self.rows], columns=list(COLUMNS))
        if not self.with_ratios:
            frame[[*RATIOS, "share_of_floor"]] = np.nan
        return frame

    def timed(self) -> pd.DataFrame:
        frame = self.frame()
        return frame[frame["status"] == OK]

    def finish(self, *, short: bool) -> str:
        """Writes page and pictures; returns what to print, ``short`` without a line a timing."""
        timed = self.timed()
        pictures = self._pictures(timed)
        head = "\n".join([self.title, *self.notes])
        ending = [untimed(self.frame()), self.summary(), noise(timed)]
        everything = [head, self.table(), *ending]
        replace(self.out / "report.md", page(self, timed, pictures))
        shown = [head, *ending] if short else everything
        return "\n\n".join(filter(None, [*shown, f"Written to {self.out}."]))

    def _pictures(self, timed: pd.DataFrame) -> list[tuple[str, str]]:
        """``(file, caption)`` of those that there is something to draw for."""
        if not self.png or timed.empty:
            return []
        if not self.with_ratios:
            drawn = [("bars.png", "Milliseconds, by workload", plots.times(timed, self.title))]
        else:
            drawn = [("bars.png", "Times as fast, by workload", plots.bars(timed, self.title))]
        if self.ceilings and self.with_ratios:
            figure = plots.roofline(timed, self.ceilings, self.title)
            drawn.append(("roofline.png", "Roofline: operations a second, against reuse", figure))
        for name, _, figure in drawn:
            figure.savefig(self.out / name, dpi=120)
        return [(name, caption) for name, caption, _ in drawn]

    def table(self) -> str:
        """A line for each timing."""
        shown, formats = _shown(self.timed(), self._metrics())
        return shown.to_string(index=False, formatters=formats, na_rep="")

    def _metrics(self) -> list[str]:
        return [m for m in self.metrics if self.with_ratios or m not in ("ratio", "floor")]

    def summary(self) -> str:
        """Ratios over all workloads, or without ratios the raw times."""
        return ratios(self.timed()) if self.with_ratios else self.table()


def _shown(timed: pd.DataFrame, metrics: Iterable[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Columns of some metrics that have a value, under their titles, and how to print them."""
    wanted = {k: v for m in metrics for k, v in METRICS[m].items() if timed[k].notna().any()}
    several = {k: v for k, v in SHOWN.items() if k != "dtype" or timed[k].nunique() > 1}
    if timed["dtype"].nunique() > 1:
        several |= {"dtype": "dtype"}
    shown = timed[[*several, *wanted]].rename(
        columns=several | {k: title for k, (title, _) in wanted.items()}
    )
    formats = {title: f"{{:.{digits}f}}".format for title, digits in wanted.values()}
    return shown, formats


def untimed(frame: pd.DataFrame) -> str:
    """What was not timed, and why, with the number of rows that share a reason."""
    others = frame[frame["status"] != OK]
    if others.empty:
        return ""
    counts = others.groupby(["provider", "launch", "status"], sort=False)["workload"]
    lines = [
        f"  {provider} ({launch} launch), {len(names)}x, first {names.iloc[0]}: {status}"
        for (provider, launch, status), names in counts
    ]
    return "\n".join(["Not timed:", *lines])


def means(timed: pd.DataFrame) -> pd.DataFrame:
    """A row for each ratio and provider of ours: geometric mean, worst case, what loses."""
    ours = timed[timed["provider"].isin(OURS)]
    found = []
    for ratio in RATIOS:
        keys = ["dtype", "launch", "mode", "provider", "layout"]
        for key, group in ours.dropna(subset=ratio).groupby(keys, sort=False):
            values = group.set_index("workload")[ratio].astype(float)
            losing = values[values < 1].sort_values()
            found.append(
                dict(zip(keys, key, strict=True))
                | {
                    "against": ratio,
                    "mean": float(np.exp(np.log(values).mean())),
                    "worst": values.min(),
                    "worst_workload": values.idxmin(),
                    "timed": len(values),
                    "slower_on": ", ".join(f"{name} {x:.2f}" for name, x in losing.items()),
                }
            )
    return pd.DataFrame(found)


def ratios(timed: pd.DataFrame) -> str:
    """Geometric mean, worst, and the workloads that lose, in text."""
    lines = []
    found = means(timed)
    for ratio, meaning in RATIOS.items():
        part = found[found["against"] == ratio] if len(found) else found
        if part.empty:
            continue
        lines.append(f"Times as fast as {meaning}, same launch mode:")
        for row in part.itertuples():
            lines.append(
                f"  {row.launch:5}  {row.mode:16}  {row.provider + ' ' + row.layout:28}  "
                f"geometric mean {row.mean:.2f}, worst {row.worst:.2f} ({row.worst_workload}), "
                f"{row.timed} timed"
            )
            if row.slower_on:
                lines.append(f"         slower on {row.slower_on}")
    return "\n".join(lines)


def noise(timed: pd.DataFrame) -> str:
    """A warning where timings vary too much for a ratio to mean anything."""
    noisy = (timed["p80_ms"] > NOISY * timed["p20_ms"]).sum()
    text = f"{noisy} of {len(timed)} timings vary: 80th percentile over {NOISY} times the 20th."
    return f"{text} Their ratios mean little." if noisy else ""


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
    found = means(timed)
    if report.with_ratios and len(found):
        parts.append("## Ratios")
        for ratio, meaning in RATIOS.items():
            part = found[found["against"] == ratio].drop(columns="against")
            if len(part):
                parts.append(f"Times as fast as {meaning}, same launch mode:")
                part = part.rename(columns={"mean": "geometric mean", "worst_workload": "on"})
                parts.append(markdown(part, {"geometric mean": "{:.2f}", "worst": "{:.2f}"}))
    missing = [untimed(report.frame()), noise(timed)]
    parts += [f"```\n{text}\n```" for text in missing if text]
    metrics = [m for m in METRICS if report.with_ratios or m not in ("ratio", "floor")]
    shown, formats = _shown(timed, metrics)
    parts += ["## Measurements", markdown(shown, formats)]
    record = pd.DataFrame([*facts, *card.items()], columns=["fact", "value"])
    parts += ["## Environment", markdown(record)]
    return "\n\n".join(parts) + "\n"


def markdown(frame: pd.DataFrame, formats: dict[str, Any] | None = None) -> str:
    """A table in Markdown; ``formats``: of some columns, functions or format strings."""

    def text(name: str, value: Any) -> str:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        form = (formats or {}).get(name, str)
        return form.format(value) if isinstance(form, str) else form(value)

    names = [str(name) for name in frame.columns]
    numeric = [pd.api.types.is_numeric_dtype(frame[name]) for name in frame.columns]
    lines = ["| " + " | ".join(names) + " |"]
    lines.append("|" + "|".join("---:" if right else "---" for right in numeric) + "|")
    for values in frame.itertuples(index=False):
        cells = (text(name, value) for name, value in zip(names, values, strict=True))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def replace(path: Path, text: str) -> None:
    """Writes the file in one step: it is never seen half-written."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
