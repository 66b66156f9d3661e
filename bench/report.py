"""What a run leaves behind: ``results.csv``, ``results.png``, ``report.txt``, ``environment.json``.

The CSV and the environment are written anew whenever something is added, so that a run that is cut
short leaves what it measured.
"""

import importlib.metadata
import json
import os
import platform
import subprocess
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .measure import OK, Row
from .problems import MODES

COLUMNS = (
    "workload", "n", "c", "positions", "c_m", "c_n", "heads", "device", "dtype", "mode", "launch",
    "provider", "baseline", "status", "median_ms", "p20_ms", "p80_ms", "repetitions",
    "ratio_to_eager", "ratio_same_format", "ratio_to_compiled", "error", "error_gradient",
    "peak_bytes",
)  # fmt: skip
SHOWN = {
    "workload": "workload", "n": "N", "mode": "mode", "launch": "launch", "provider": "provider",
    "median_ms": "median ms", "p20_ms": "p20", "p80_ms": "p80", "repetitions": "reps",
    "ratio_to_eager": "x eager",
}  # fmt: skip
RATIOS = {
    "ratio_to_eager": "the better of eager NCHW and channels_last",
    "ratio_same_format": "eager in the same memory format",
    "ratio_to_compiled": "the best of torch.compile of eager",
}
CARD_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu",
)  # fmt: skip
NOISY = 1.5
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
ROOT = Path(__file__).parent.parent


class Report:
    """Rows, notes and environment of one run, in one folder."""

    def __init__(self, out: Path, title: str) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.title = title
        self.notes: list[str] = []
        self.rows: list[Row] = []
        self.with_ratios = True
        self.environment: dict[str, Any] = {}

    def record(self, **facts: Any) -> None:
        self.environment |= facts
        text = json.dumps(self.environment, indent=2, ensure_ascii=False, default=str)
        _replace(self.out / "environment.json", text + "\n")

    def add(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        _replace(self.out / "results.csv", self.frame().to_csv(index=False))

    def frame(self) -> pd.DataFrame:
        frame = pd.DataFrame(self.rows, columns=list(COLUMNS))
        if not self.with_ratios:
            frame[list(RATIOS)] = np.nan
        return frame

    def timed(self) -> pd.DataFrame:
        frame = self.frame()
        return frame[frame["status"] == OK]

    def finish(self, *, short: bool) -> str:
        """Writes text and figure; returns what to print, ``short`` without a line a timing."""
        self.figure().savefig(self.out / "results.png", dpi=120)
        head = "\n".join([self.title, *self.notes])
        ending = [self.untimed(), self.summary(), self.noise()]
        everything = [head, self.table(), *ending]
        _replace(self.out / "report.txt", "\n\n".join(filter(None, everything)) + "\n")
        shown = [head, *ending] if short else everything
        return "\n\n".join(filter(None, [*shown, f"Written to {self.out}."]))

    def table(self) -> str:
        """A line for each timing."""
        shown = self.timed()[list(SHOWN)].rename(columns=SHOWN)
        shown["reps"] = shown["reps"].astype("Int64")
        if not self.with_ratios:
            shown = shown.drop(columns="x eager")
        digits = {"median ms": 3, "p20": 3, "p80": 3, "x eager": 2}
        formats = {name: f"{{:.{count}f}}".format for name, count in digits.items()}
        return shown.to_string(index=False, formatters=formats, na_rep="")

    def untimed(self) -> str:
        """What was not timed, and why, with the number of rows that share a reason."""
        others = self.frame()
        others = others[others["status"] != OK]
        if others.empty:
            return ""
        counts = others.groupby(["provider", "launch", "status"], sort=False)["workload"]
        lines = [
            f"  {provider} ({launch} launch), {len(names)}x, first {names.iloc[0]}: {status}"
            for (provider, launch, status), names in counts
        ]
        return "\n".join(["Not timed:", *lines])

    def summary(self) -> str:
        """Ratios over all workloads, or without ratios the raw times."""
        if not self.with_ratios:
            return self.table()
        ours = self.timed().query("not baseline")
        lines = []
        for ratio, meaning in RATIOS.items():
            frame = ours.dropna(subset=ratio)
            if ratio == "ratio_to_compiled":
                frame = frame[~frame["provider"].str.startswith("compile eager")]
            if frame.empty:
                continue
            lines.append(f"Times as fast as {meaning}, same launch mode:")
            for key, group in frame.groupby(["launch", "mode", "provider"], sort=False):
                lines += self._ratios(key, group.set_index("workload")[ratio])
        return "\n".join(lines)

    @staticmethod
    def _ratios(key: tuple, ratios: pd.Series) -> list[str]:
        """Geometric mean, worst, and the workloads that lose."""
        losing = ratios[ratios < 1].sort_values()
        lines = [
            f"  {key[0]:5}  {key[1]:16}  {key[2]:28}  geometric mean "
            f"{np.exp(np.log(ratios).mean()):.2f}, worst {ratios.min():.2f} "
            f"({ratios.idxmin()}), {len(ratios)} timed"
        ]
        if len(losing):
            named = ", ".join(f"{name} {ratio:.2f}" for name, ratio in losing.items())
            lines.append(f"         slower on {named}")
        return lines

    def noise(self) -> str:
        """A warning where timings vary too much for a ratio to mean anything."""
        timed = self.timed()
        noisy = (timed["p80_ms"] > NOISY * timed["p20_ms"]).sum()
        text = f"{noisy} of {len(timed)} timings vary: 80th percentile over {NOISY} times the 20th."
        return f"{text} Their ratios mean little." if noisy else ""

    def figure(self) -> Figure:
        """A panel for each launch mode and each of forward and forward + backward."""
        timed = self.timed()
        if self.with_ratios:
            value, label = "ratio_to_eager", "times as fast as eager\n(better memory format)"
            timed = timed.query("not baseline").dropna(subset=value)
        else:
            value, label = "median_ms", "median milliseconds"
        launches = list(timed["launch"].unique()) or ["eager"]
        width = max(9.0, 2.5 + 1.1 * timed["workload"].nunique())
        figure = Figure(figsize=(width, 1 + 3 * len(MODES) * len(launches)), layout="constrained")
        lines = [line for note in self.notes for line in textwrap.wrap(note, int(10 * width))]
        figure.suptitle("\n".join([self.title, *lines]), fontsize=10)
        panels = figure.subplots(len(launches) * len(MODES), 1, squeeze=False)[:, 0]
        colours = {name: f"C{index}" for index, name in enumerate(timed["provider"].unique())}
        keys = [(launch, mode) for launch in launches for mode in MODES]
        for panel, (launch, mode) in zip(panels, keys, strict=True):
            part = timed[(timed["launch"] == launch) & (timed["mode"] == mode)]
            _bars(panel, part.drop_duplicates(["workload", "provider"]), value, colours)
            panel.set_title(f"{mode}, {'CUDA graph' if launch == 'graph' else 'eager launches'}")
            panel.set_ylabel(label)
            if self.with_ratios:
                panel.axhline(1.0, color="black", linewidth=1, linestyle="--", zorder=0.9)
            else:
                panel.set_yscale("log")
        return figure


def _bars(panel: Any, part: pd.DataFrame, value: str, colours: dict[str, str]) -> None:
    """Bars of ``value``, grouped by workload."""
    if part.empty:
        panel.text(0.5, 0.5, "nothing was timed", ha="center", transform=panel.transAxes)
        return
    workloads, providers = part["workload"].unique(), part["provider"].unique()
    table = part.pivot(index="workload", columns="provider", values=value)
    table = table.loc[workloads, providers]
    thickness = 0.8 / len(providers)
    for index, provider in enumerate(providers):
        places = np.arange(len(workloads)) + (index - (len(providers) - 1) / 2) * thickness
        bars = panel.bar(
            places, table[provider], thickness, label=provider, color=colours[provider]
        )
        panel.bar_label(
            bars,
            fmt="%.3g" if value == "median_ms" else "%.2f",
            fontsize=6,
            padding=2,
            bbox=LABEL_BOX,
        )
    sizes = part.drop_duplicates("workload")
    names = [
        f"{w}\n{n}x{c}\n{p}" for w, n, c, p in sizes[["workload", "n", "c", "positions"]].values
    ]
    panel.set_xticks(np.arange(len(workloads)), names, fontsize=8)
    panel.margins(x=0.01, y=0.15)
    panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def environment(device: torch.device) -> dict[str, Any]:
    """Everything a figure depends on besides the code, and the code's commit."""
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "card": card()}
    return facts


def card() -> dict[str, str] | None:
    """Name, driver, clocks in MHz and the like, as ``nvidia-smi`` reads them."""
    query = f"--query-gpu={','.join(CARD_FIELDS)}"
    text = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    if text is None:
        return None
    values = (value.strip() for value in text.splitlines()[0].split(","))
    return dict(zip(CARD_FIELDS, values, strict=False))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing, fails or prints nothing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def _replace(path: Path, text: str) -> None:
    """Writes the file in one step: it is never seen half-written."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
