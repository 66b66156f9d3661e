"""The README's figures, from committed results and nothing else.

Between ``<!-- figures: NAME -->`` and ``<!-- -->`` stands what a function here makes of
``bench/results``; ``python -m bench readme`` writes it, and a test fails where it differs.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from . import digits, sizes
from .environment import ROOT
from .floors import SHEETS, table
from .measure import OK
from .names import check
from .problems import FORWARD
from .tables import RATIOS, markdown, means, unused_kernels
from .workloads import WORKLOADS

README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
MARK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- -->)", re.DOTALL)
NOTHING = "Nothing was measured yet.\n"


def filled(text: str, results: Path) -> str:
    """The text with every marked part made anew.

    Raises:
        UnknownNameError: a mark that names no figures.
    """
    check("figures", [m[1] for m in MARK.findall(text)], list(FIGURES))
    return MARK.sub(lambda m: m[1] + FIGURES[m[2]](results) + m[3], text)


def _runs(results: Path, *, gpu: bool) -> list[tuple[Path, pd.DataFrame, dict]]:
    """Committed runs on GPUs, or on CPUs: folder, timed rows, environment."""
    found = []
    for path in sorted(results.glob("*/results.csv")):
        frame = pd.read_csv(path)
        frame = frame[frame["status"] == OK]
        if len(frame) and (frame["device"].iloc[0] != "cpu") == gpu:
            facts = json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))
            found.append((path.parent, frame, facts))
    return found


def _summary(folder: Path, timed: pd.DataFrame, facts: dict) -> str:
    machine, dtypes = timed["machine"].iloc[0], ", ".join(timed["dtype"].unique())
    lines = [
        f"{machine}, {dtypes}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['date'][:10]}; every row in "
        f"[`{folder.name}/report.md`](bench/results/{folder.name}/report.md).",
    ]
    found = means(timed)
    for ratio, meaning in RATIOS.items():
        part = found[found["against"] == ratio].drop(columns=["against", "dtype", "timed"])
        if len(part):
            part = part.rename(
                columns={
                    "mean": "geometric mean", "worst_workload": "on", "slower_on": "slower on",
                }
            )  # fmt: skip
            lines.append(f"Times as fast as {meaning}:")
            lines.append(markdown(part, {"geometric mean": "{:.2f}", "worst": "{:.2f}"}))
    lines += filter(None, [unused_kernels(timed)])
    lines.append(f"![Times as fast, by workload](bench/results/{folder.name}/bars.png)")
    return "\n\n".join(lines) + "\n"


def measured_on(*, gpu: bool) -> Callable[[Path], str]:
    def make(results: Path) -> str:
        parts = [_summary(*run) for run in _runs(results, gpu=gpu)]
        return "\n".join(parts) or NOTHING

    return make


def model(results: Path) -> str:
    """Modelled floors of the forward pass on cards that were not available.

    Small workloads have none worth a row: launches take longer.
    """
    frame = table([work for work in WORKLOADS if not work.small], [FORWARD])
    wide = frame.pivot_table(index="workload", columns="card", values="floor_us", sort=False)
    wide = wide[list(SHEETS)].reset_index()
    return markdown(wide, dict.fromkeys(SHEETS, "{:.0f}")) + "\n"


def network_sizes(results: Path) -> str:
    return sizes.shown(pd.read_csv(results / sizes.FILE)) + "\n"


def training(results: Path) -> str:
    frame = pd.read_csv(results / digits.FILE)
    first = frame.iloc[0]
    lines = [
        f"{first['machine']}, float32, torch {first['torch']}, {first['date'][:10]}; "
        f"{first['threads']} threads, {frame['epoch'].max()} epochs, means over "
        f"{frame['seed'].nunique()} seeds; every epoch in "
        f"[`{digits.FILE}`](bench/results/{digits.FILE}).",
        digits.summary(frame),
        f"![Training loss and test accuracy](bench/results/{digits.PICTURE})",
    ]
    return "\n\n".join(lines) + "\n"


FIGURES: dict[str, Callable[[Path], str]] = {
    "gpu": measured_on(gpu=True),
    "cpu": measured_on(gpu=False),
    "model": model,
    "sizes": network_sizes,
    "digits": training,
}
