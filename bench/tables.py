"""Tables of measurements: columns of a metric, means of ratios, what was not timed, Markdown."""

from collections.abc import Iterable, Mapping
from statistics import geometric_mean
from types import MappingProxyType

import pandas as pd
import tabulate  # noqa: F401  # of to_markdown: missing, it shows before anything is measured
import torch

import da_triton

from .measure import OK, RATIOS
from .problems import BACKWARD, FORWARD, memory_format
from .providers import CHANNELS_LAST, OURS

SHOWN = ["workload", "n", "mode", "launch", "provider", "layout"]
# What --metric may name: columns, with their title and the digits that are printed.
METRICS: dict[str, dict[str, tuple[str, int]]] = {
    "time": {"median_ms": ("median ms", 3), "p20_ms": ("p20", 3), "p80_ms": ("p80", 3)},
    "ratio": {name: (ratio.title, 2) for name, ratio in RATIOS.items()},
    "rate": {"gb_s": ("GB/s", 1), "tflop_s": ("TFLOP/s", 2)},
    "floor": {"floor_ms": ("floor ms", 3), "share_of_floor": ("of floor", 2)},
    "memory": {"peak_bytes": ("peak B", 0), "saved_bytes": ("saved B", 0)},
    "launches": {"launches": ("launches", 0), "cpu_us": ("CPU us", 1)},
    "added": {"added": ("added time", 2)},
    "first_call": {"first_call_cold_s": ("cold s", 2), "first_call_warm_s": ("warm s", 2)},
}
DEFAULT_METRICS = ("time", "ratio")
SERIES = ["dtype", "launch", "mode", "provider", "layout"]  # what a mean is over the workloads of
NOISY = 1.5
UNUSED, MARK = "kernels_not_used", " *"  # the column, and the mark of rows that have it
MODEL_NOTE = (
    "Modelled: the planner's time for its route, from counted bytes, operations and launches, and "
    "from the kernels' modelled times on an H200. Measured: the median."
)


def markdown(frame: pd.DataFrame, digits: Mapping[str, int] = MappingProxyType({})) -> str:
    """A table in Markdown, empty without rows; ``digits``: of columns of floats."""
    if frame.empty:
        return ""
    forms = [f".{digits[name]}f" if name in digits else "g" for name in frame]
    texts = [i for i, x in enumerate(frame.dtypes) if not pd.api.types.is_numeric_dtype(x)]
    cells = frame.astype(object).replace(r"\|", r"\\|", regex=True)
    return cells.where(frame.notna(), None).to_markdown(
        index=False, floatfmt=forms, missingval="", disable_numparse=texts
    )


def measurements(timed: pd.DataFrame, metrics: Iterable[str]) -> str:
    """A line per timing, with those columns of some metrics that have a value."""
    wanted = {k: v for m in metrics for k, v in METRICS[m].items() if timed[k].notna().any()}
    dtype = ["dtype"] if timed["dtype"].nunique() > 1 else []
    titles = {"n": "N"} | {name: title for name, (title, _) in wanted.items()}
    shown = marked(timed, timed[UNUSED].notna())[[*SHOWN, *dtype, *wanted]]
    return markdown(shown.rename(columns=titles), dict(wanted.values()))


def marked(rows: pd.DataFrame, replaced: pd.Series) -> pd.DataFrame:
    """Marks providers of rows where PyTorch operations replaced kernels."""
    return rows.assign(provider=rows["provider"].mask(replaced, rows["provider"] + MARK))


def untimed(frame: pd.DataFrame) -> str:
    """Rows that were not timed, and why, with the number of rows that share a reason."""
    others = frame[frame["status"] != OK]
    keys = ["provider", "launch", "status"]
    counts = others.groupby(keys, sort=False)["workload"].agg(rows="size", first="first")
    return markdown(counts.reset_index())


def merged(timed: pd.DataFrame) -> pd.DataFrame:
    """One row per provider and problem: the first measurement, with the least of each ratio.

    Every group times eager and da_triton again, next to what it compares them with.
    """
    keys = ["workload", *SERIES]
    kept = dict.fromkeys(RATIOS, "min") | {UNUSED: "first"}
    found = timed.drop_duplicates(keys)
    return found.assign(**timed.groupby(keys, sort=False).agg(kept).set_index(found.index))


def means(timed: pd.DataFrame) -> pd.DataFrame:
    """A row per ratio and series of ours: geometric mean, worst case, where ours is slower."""
    ours = merged(timed[timed["provider"].isin(OURS)])
    ours = marked(ours, ours.groupby(SERIES)[UNUSED].transform("count") > 0)
    each = ours.melt(["workload", *SERIES], list(RATIOS), "against", "ratio").dropna(subset="ratio")
    keys = ["against", *SERIES]
    rows = []
    for key, part in each.groupby(keys, sort=False):
        found = part.set_index("workload")["ratio"].sort_values(kind="stable")
        slower = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found[found < 1].items())
        mean = geometric_mean(found)
        rows.append((*key, mean, found.iloc[0], found.index[0], len(found), slower))
    columns = ["geometric mean", "worst", "on", "timed", "slower on"]
    return pd.DataFrame(rows, columns=[*keys, *columns])


def ratios(timed: pd.DataFrame) -> str:
    """The means, what each ratio is against, and the references that failed; empty without any."""
    found = means(timed)
    if found.empty:
        return ""
    titles = {name: RATIOS[name].title for name in found["against"].unique()}
    meant = [f"* {title}: {RATIOS[name].meaning}" for name, title in titles.items()]
    table = markdown(found.replace({"against": titles}), {"geometric mean": 2, "worst": 2})
    said = "Times as fast as these, in the same launch mode:\n\n" + "\n".join(meant)
    return "\n\n".join(filter(None, [said, table, failed_references(timed)]))


def failed_references(timed: pd.DataFrame) -> str:
    """The references that failed, with their workloads."""
    names = timed["failed_references"].astype(object).str.split(", ")
    groups = timed.assign(name=names).explode("name").groupby("name", sort=False)["workload"]
    parts = [f"{name} on {', '.join(found.unique())}" for name, found in groups]
    return f"The ratios do not consider what failed: {'; '.join(parts)}." if parts else ""


def warnings(timed: pd.DataFrame) -> str:
    """Warnings about the timings: kernels that were not used, and noise."""
    found = []
    if names := sorted({name for text in timed[UNUSED].dropna() for name in text.split(", ")}):
        found.append(
            f"{MARK.strip()} measured in a process where PyTorch operations replaced kernels that "
            f"gave wrong results on first use: {', '.join(names)}."
        )
    if noisy := (timed["p80_ms"] > NOISY * timed["p20_ms"]).sum():
        found.append(
            f"{noisy} of {len(timed)} timings vary: 80th percentile over {NOISY} times the 20th. "
            "Their ratios mean little."
        )
    return "\n\n".join(found)


def against_model(timed: pd.DataFrame) -> pd.DataFrame:
    """The planner's modelled time of a route beside the time measured on a GPU."""
    rows = []
    ours = timed[(timed["provider"] == "triton") & (timed["device"] == "cuda")]
    for row in ours.dropna(subset="c_m").to_dict("records"):  # no networks
        shape = (row["n"], row["c"], *map(int, row["positions"].split("x")))
        plan = da_triton.plan(
            shape, int(row["c_m"]), int(row["c_n"]), heads=int(row["heads"]),
            dtype=getattr(torch, row["dtype"]),
            memory_format=memory_format(len(shape) - 2, row["layout"] == CHANNELS_LAST),
        )  # fmt: skip
        passes = {FORWARD: plan.chosen.seconds, BACKWARD: plan.chosen.backward_seconds}
        modelled = 1e6 * passes.get(row["mode"], sum(passes.values()))
        measured = 1e3 * row["median_ms"]
        rows.append({
            **{k: row[k] for k in ("workload", "mode", "layout", "launch")},
            "route": str(plan.route), "modelled us": modelled, "measured us": measured,
            "measured / modelled": measured / modelled,
        })  # fmt: skip
    return pd.DataFrame(rows)


def model(timed: pd.DataFrame) -> str:
    """``against_model`` in Markdown; empty without a GPU."""
    found = against_model(merged(timed))
    digits = {"modelled us": 1, "measured us": 1, "measured / modelled": 2}
    return f"{MODEL_NOTE}\n\n{markdown(found, digits)}" if len(found) else ""
