"""Tables of measurements: columns of a metric, means of ratios, what was not timed, Markdown."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import tabulate  # noqa: F401  # of to_markdown: missing, it shows before anything is measured
import torch

import da_triton

from .measure import OK
from .problems import BACKWARD, FORWARD
from .providers import CHANNELS_LAST, OURS

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
        "ratio_to_max_autotune": ("x max-autotune", 2),
        "ratio_to_rivals": ("x best other", 2),
    },
    "rate": {"gb_s": ("GB/s", 1), "tflop_s": ("TFLOP/s", 2)},
    "floor": {"floor_ms": ("floor ms", 3), "share_of_floor": ("of floor", 2)},
    "memory": {"peak_bytes": ("peak B", 0), "saved_bytes": ("saved B", 0)},
    "launches": {"launches": ("launches", 0), "cpu_us": ("CPU us", 1)},
    "added": {"added": ("added time", 2)},
    "first_call": {"first_call_cold_s": ("cold s", 2), "first_call_warm_s": ("warm s", 2)},
}
DEFAULT_METRICS = ("time", "ratio")
RATIOS = {
    "ratio_to_eager": "the better of eager NCHW and channels_last",
    "ratio_same_format": "eager in the same memory format",
    "ratio_to_compiled": "torch.compile of eager, the better of NCHW and channels_last",
    "ratio_to_max_autotune": (
        "torch.compile of eager in mode max-autotune, the better of NCHW and channels_last"
    ),
    "ratio_to_rivals": "the fastest of all other implementations",
}
NOISY = 1.5
UNUSED, MARK = "kernels_not_used", " *"  # the column, and the mark of rows that have it
MODEL_NOTE = (
    "Modelled: the planner's time for its route, from counted bytes, operations and launches, with "
    "stated assumptions. Measured: the median."
)


def shown(timed: pd.DataFrame, metrics: Iterable[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Columns of some metrics that have a value, under their titles, and how to print them."""
    wanted = {k: v for m in metrics for k, v in METRICS[m].items() if timed[k].notna().any()}
    several = {k: v for k, v in SHOWN.items() if k != "dtype" or timed[k].nunique() > 1}
    if timed["dtype"].nunique() > 1:
        several |= {"dtype": "dtype"}
    found = marked(timed)[[*several, *wanted]].rename(
        columns=several | {k: title for k, (title, _) in wanted.items()}
    )
    formats = {title: f"{{:.{digits}f}}".format for title, digits in wanted.values()}
    return found, formats


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


def merged(timed: pd.DataFrame) -> pd.DataFrame:
    """One row per provider and problem: the first measurement, with the least of each ratio.

    Every group times eager and da_triton again, next to what it compares them with.
    """
    keys = ["workload", "dtype", "mode", "layout", "launch", "provider"]
    kept = dict.fromkeys(timed.columns.intersection(list(RATIOS)), "min")
    kept |= {UNUSED: "first"} if UNUSED in timed else {}
    found = timed.drop_duplicates(keys)
    if not kept:
        return found
    return found.assign(**timed.groupby(keys, sort=False).agg(kept).set_index(found.index))


def marked(timed: pd.DataFrame) -> pd.DataFrame:
    """The timings with a mark after providers some kernels of which were not used."""
    if UNUSED not in timed:
        return timed
    marks = timed[UNUSED].notna().map({True: MARK, False: ""})
    return timed.assign(provider=timed["provider"] + marks)


def unused_kernels(timed: pd.DataFrame) -> str:
    """What the mark means; empty if nothing is marked."""
    if UNUSED not in timed or timed[UNUSED].isna().all():
        return ""
    names = sorted({name for text in timed[UNUSED].dropna() for name in text.split(", ")})
    return (
        f"{MARK.strip()} measured in a process where PyTorch operations replaced kernels that gave "
        f"wrong results on first use: {', '.join(names)}."
    )


def means(timed: pd.DataFrame) -> pd.DataFrame:
    """A row for each ratio and provider of ours: geometric mean, worst case, what loses."""
    timed = merged(timed)
    ours = timed[timed["provider"].isin(OURS)]
    found = []
    for ratio in timed.columns.intersection(list(RATIOS)):
        keys = ["dtype", "launch", "mode", "provider", "layout"]
        for key, group in ours.dropna(subset=ratio).groupby(keys, sort=False):
            replaced = UNUSED in group and group[UNUSED].notna().any()
            values = group.set_index("workload")[ratio].astype(float)
            losing = values[values < 1].sort_values()
            found.append(
                dict(zip(keys, key, strict=True))
                | {"provider": key[3] + MARK if replaced else key[3]}
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
    return "\n".join(filter(None, [*lines, failed_references(timed)]))


def failed_references(timed: pd.DataFrame) -> str:
    """What failed of those that ratios refer to, with its workloads."""
    found: dict[str, dict[str, None]] = {}
    for row in timed.dropna(subset="failed_references").to_dict("records"):
        for name in row["failed_references"].split(", "):
            found.setdefault(name, {})[row["workload"]] = None
    parts = [f"{name} on {', '.join(workloads)}" for name, workloads in found.items()]
    return f"The ratios do not consider what failed: {'; '.join(parts)}." if parts else ""


def noise(timed: pd.DataFrame) -> str:
    """A warning where timings vary too much for a ratio to mean anything."""
    noisy = (timed["p80_ms"] > NOISY * timed["p20_ms"]).sum()
    text = f"{noisy} of {len(timed)} timings vary: 80th percentile over {NOISY} times the 20th."
    return f"{text} Their ratios mean little." if noisy else ""


def against_model(timed: pd.DataFrame) -> pd.DataFrame:
    """What the planner's model says of a route beside what was measured of it on a GPU."""
    rows = []
    ours = timed[(timed["provider"] == "triton") & (timed["device"] == "cuda")]
    ours = ours.dropna(subset="c_m").astype({"c_m": int, "c_n": int, "heads": int})  # no networks
    for row in ours.to_dict("records"):
        shape = (row["n"], row["c"], *map(int, row["positions"].split("x")))
        form = torch.contiguous_format
        if row["layout"] == CHANNELS_LAST:
            form = torch.channels_last
        plan = da_triton.plan(
            shape, row["c_m"], row["c_n"], heads=row["heads"], dtype=getattr(torch, row["dtype"]),
            memory_format=form,
        )  # fmt: skip
        backward = plan.chosen.backward_seconds
        forward = 0.0 if row["mode"] == BACKWARD else plan.chosen.seconds
        modelled = 1e6 * (forward + (0.0 if row["mode"] == FORWARD else backward))
        measured = 1e3 * row["median_ms"]
        names = ("workload", "mode", "layout", "launch")
        rows.append(
            {k: row[k] for k in names}
            | {"route": str(plan.route), "modelled us": modelled, "measured us": measured}
            | {"measured / modelled": measured / modelled}
        )
    return pd.DataFrame(rows)


def markdown(frame: pd.DataFrame, formats: dict[str, Any] | None = None) -> str:
    """A table in Markdown; ``formats``: of some columns, functions or format strings."""

    def cells(column: pd.Series) -> list[str]:
        form = (formats or {}).get(str(column.name), str)
        text = form.format if isinstance(form, str) else form
        return ["" if pd.isna(x) else text(x).replace("|", "\\|") for x in column]

    shown = pd.DataFrame({name: cells(frame[name]) for name in frame.columns})
    align = ["right" if pd.api.types.is_numeric_dtype(x) else "left" for x in frame.dtypes]
    return shown.to_markdown(index=False, colalign=align, disable_numparse=True)
