"""``python -m bench model``: modelled times of the named workloads' launches, without a GPU.

    passes       the launches of a forward and of a backward pass, a row each
    launches     the time of a launch: compiled, disassembled, followed, run on one SM
    operations   PyTorch's own operations, by tiles and bytes; what the L2 holds
    sass, registers, integers, warp
                 a program's instructions, and what one warp of it executes
    machine, simulate
                 the assumed GPU; throughput of its pipes, and time with latencies and barriers
    tiles        ranks tiles of a kernel
    anchors      kernels whose speed is public

and here the table of rows: its CSV file, its summary, and the comparison with another one. All
times are modelled, in bfloat16, and none was measured: the ranking is worth more than the figures.

Modules that compile need Triton, in a process without TRITON_INTERPRET; the others do not.
"""

import io
import itertools
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import geometric_mean

import pandas as pd

from bench.codegen import Row, rows_of
from bench.environment import ROOT
from da_triton.planning.planner import LAUNCH

from . import machine

GPUS = tuple(machine.GPUS)
KEPT = ROOT / "bench" / "results" / "model.csv"
LAUNCH_GAP = 1e6 * LAUNCH  # µs between dependent launches in a CUDA graph
LARGE = 5.0  # µs of a floor, from which on a workload counts in the means
PASS = ["gpu", "workload", "layout", "pass"]
RESOURCES = ("tensor", "issue", "fma", "alu", "xu", "mio", "uniform", "shared", "L2", "DRAM")
COLUMNS = [
    *PASS, "number", "kernel", "us", "binding", "waiting_us", *(f"{r}_us" for r in RESOURCES),
    "programs", "resident", "warps", "registers", "shared", "spills", "instructions", "issue",
    "waits", "loop", "unknown", "floor_us", "planner_us", "route", "digest",
]  # fmt: skip
TEXTS = [
    "gpu", "workload", "layout", "pass", "kernel", "binding", "waits", "loop", "unknown", "route",
    "digest",
]  # fmt: skip
Job = tuple[str, str]  # workload and layout


def update(gpus: Sequence[str], jobs: Sequence[Job], path: Path, against: str = "") -> None:
    """Models the jobs, replaces their rows in the file, and prints what was found.

    ``against``: compares with the rows of another file, or of a revision; else with the replaced.
    """
    before = kept(against or str(path))
    found = frame(row for gpu in gpus for row in modelled(gpu, jobs))
    old = kept(str(path)) if against else before
    mine = {(gpu, *job) for gpu in gpus for job in jobs}
    others = [tuple(key) not in mine for key in old[PASS[:3]].itertuples(index=False)]
    write(pd.concat([old[others], found]), path)
    print("Modelled times in µs; nothing was measured.\n", listing(found), "", sep="\n")
    print(summary(found), "", sep="\n")
    if changes := comparison(before, found):
        print(f"against {against or 'the rows before'}:\n", changes, "", sep="\n")
    print(f"{len(found)} rows in {path}")


def modelled(gpu: str, jobs: Sequence[Job], untimed: bool = False) -> list[Row]:
    """Rows of ``passes``, from processes of their own without TRITON_INTERPRET, in order.

    Raises:
        RuntimeError: with the end of a process's errors.
    """
    workers = os.cpu_count() or 1
    parts = [part for i in range(workers) if (part := list(jobs[i::workers]))]
    arguments = gpu, *["--untimed"] * untimed
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda part: rows_of("bench.model.passes", part, *arguments), parts)
        rows = list(itertools.chain.from_iterable(found))
    place = {tuple(job): i for i, job in enumerate(jobs)}
    return sorted(rows, key=lambda row: place[row["workload"], row["layout"]])


# --- rows and their file --------------------------------------------------------------------------


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    found = pd.DataFrame(list(rows), columns=COLUMNS)
    numbers = found.columns.difference(TEXTS)
    found[numbers] = found[numbers].astype(float).fillna(0).round(3)
    return found


def kept(source: str) -> pd.DataFrame:
    """The rows of a file, or of the kept file at a revision; an empty table without the file.

    Raises:
        ValueError: it is neither.
    """
    if Path(source).suffix == ".csv":
        if not Path(source).exists():
            return frame([])
        text = Path(source).read_text(encoding="utf-8")
    else:
        place = f"{source}:{KEPT.relative_to(ROOT)}"
        ended = subprocess.run(
            ["git", "show", place], cwd=ROOT, capture_output=True, text=True, check=False
        )  # fmt: skip
        if ended.returncode:
            raise ValueError(
                f"expected a CSV file or a revision of the repository that has "
                f"{KEPT.relative_to(ROOT)}, and got {source!r}: {ended.stderr.strip()}"
            )
        text = ended.stdout
    return pd.read_csv(io.StringIO(text), keep_default_na=False)[COLUMNS]


def write(rows: pd.DataFrame, path: Path) -> None:
    """All rows, sorted; ``path`` is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    order = rows.sort_values([*PASS, "number"], kind="stable")
    whole = dict.fromkeys(("number", *COLUMNS[COLUMNS.index("programs") :][:7]), int)
    order.astype(whole).to_csv(path, index=False, lineterminator="\n")


# --- what is printed ------------------------------------------------------------------------------


def totals(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per pass: the sum of its launches with the gaps between them, floor and planner."""
    groups = rows.groupby(PASS, sort=False)
    found = groups.agg(
        floor=("floor_us", "first"), planner=("planner_us", "first"), modelled=("us", "sum"),
        launches=("us", "size"), unknown=("unknown", "max"),
    )  # fmt: skip
    found["modelled"] += LAUNCH_GAP * found["launches"]
    found["× floor"] = found["modelled"] / found["floor"]
    found["largest"] = [_largest(group) for _, group in groups]
    return found.reset_index()


def _largest(rows: pd.DataFrame) -> str:
    top = rows.nlargest(3, "us")
    facts = zip(top["kernel"], top["us"], top["binding"], strict=True)
    return ", ".join(f"{kernel} {us:.0f} ({binding})" for kernel, us, binding in facts)


def summary(rows: pd.DataFrame) -> str:
    """The passes in Markdown, then the geometric mean of modelled over floor, and its worst."""
    found = totals(rows)
    lines = [found.drop(columns="unknown").round(1).to_markdown(index=False)]
    large = found[found["floor"] >= LARGE]
    for (gpu, layout, mode), group in large.groupby(["gpu", "layout", "pass"], sort=False):
        ratio = group["× floor"]
        agrees = (group["planner"] / group["modelled"]).map(math.log).abs().map(math.exp).max()
        worst = group.loc[ratio.idxmax(), "workload"]
        lines.append(
            f"{gpu} {layout} {mode}: {geometric_mean(ratio):.2f} times the floor in the geometric "
            f"mean of {len(group)}, at most {ratio.max():.1f} ({worst}); the planner, "
            f"fitted to such times, differs by {agrees:.2f} times at most"
        )
    if (unknown := found[found["unknown"] != ""]).size:
        names = ", ".join(sorted(set(unknown["workload"])))
        lines.append(f"instructions or branches that the model does not follow: {names}")
    return "\n".join(lines)


def listing(rows: pd.DataFrame) -> str:
    """Every launch in Markdown: what it runs as, its time by cause, its main loop."""
    names = [
        *PASS[1:], "kernel", "us", "binding", "waiting_us", "tensor_us", "issue_us", "shared_us",
        "L2_us", "DRAM_us", "programs", "resident", "warps", "registers", "spills", "loop",
    ]  # fmt: skip
    return rows[names].round(1).to_markdown(index=False)


def comparison(before: pd.DataFrame, after: pd.DataFrame) -> str:
    """Passes that both have, with their change; empty where nothing changed."""
    both = totals(before).merge(totals(after), on=PASS, suffixes=(" before", " now"))
    if not len(both) or (both["modelled before"] == both["modelled now"]).all():
        return ""
    both["change"] = both["modelled now"] / both["modelled before"] - 1
    names = [
        *PASS, "floor now", "planner before", "planner now", "modelled before", "modelled now",
        "change", "largest now",
    ]  # fmt: skip
    shown = both[names].rename(columns={"floor now": "floor"})
    shown["change"] = shown["change"].map("{:+.1%}".format)
    mean = geometric_mean(both["change"] + 1) - 1
    return f"{shown.round(1).to_markdown(index=False)}\ngeometric mean {mean:+.1%}"
