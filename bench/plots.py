"""Plots of measurements: bars of ratios, the roofline, cost against size."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .measure import RATIOS
from .problems import MODES
from .providers import EAGER, GRAPH, OURS
from .roofline import Ceilings

# A palette that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
LEGENDS = {name: ratio.legend for name, ratio in RATIOS.items() if ratio.legend}
LAUNCHES = {EAGER: "eager launches", GRAPH: "CUDA graph"}
GREY = "#555555"


def best_of_ours(timed: pd.DataFrame) -> pd.DataFrame:
    """The fastest of our uncompiled rows per workload, mode, launch mode and dtype.

    Where ours was only timed compiled, of those. On a GPU ours is Triton, what users get there,
    and not the operations of the ``torch`` backend where these happen to be faster.
    """
    ours = timed[timed["provider"].isin(OURS)].copy()
    kernels = ours["provider"].str.contains("triton")
    ours = ours[kernels] if kernels.any() else ours
    ours["compiled"] = ours["provider"].str.startswith("compile")
    keys = ["workload", "mode", "launch", "dtype"]
    return ours.sort_values(["compiled", "median_ms"]).drop_duplicates(keys).sort_index()


def bars(timed: pd.DataFrame, title: str) -> Figure:
    """Ours against eager and against its compilation: a panel per dtype, launch mode and mode."""
    sizes = timed.drop_duplicates("workload").set_index("workload")
    names = [f"{w}\n{row.n}×{row.c}\n{row.positions}" for w, row in sizes.iterrows()]
    panels = list(best_of_ours(timed).groupby(["dtype", "launch", "mode"], sort=False))
    size = (max(8.0, 3.0 + 0.85 * len(names)), 0.8 + 2.6 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title}\nours, in its better memory format; above 1 it is faster", size=11)
    axes = figure.subplots(max(1, len(panels)), 1, squeeze=False)[:, 0]
    for panel, ((dtype, launch, mode), part) in zip(axes, panels, strict=False):
        values = part.set_index("workload")[[*LEGENDS]].dropna(axis=1, how="all")
        values = values.astype(float).reindex(sizes.index).rename(columns=LEGENDS)
        values.plot.bar(ax=panel, width=0.8, color=COLOURS, xlabel="", ylabel="times as fast")
        for drawn in panel.containers:
            panel.bar_label(drawn, fmt="{:.2f}", fontsize=7, padding=1)
        panel.axhline(1.0, color=GREY, linewidth=1, linestyle="--", zorder=0.9)
        panel.margins(x=0.01, y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        panel.set_title(f"{mode}, {LAUNCHES[launch]}, {dtype}", size=10)
        panel.set_xticks(np.arange(len(names)), names, fontsize=7, rotation=0)
    return figure


def _by_mode(timed: pd.DataFrame, title: str, size: float) -> tuple[Figure, dict[str, Any]]:
    """A figure with a panel per mode, side by side."""
    modes = [m for m in MODES if (timed["mode"] == m).any()]
    figure = Figure(figsize=(size * len(modes) + 0.6, 0.85 * size), layout="constrained")
    figure.suptitle(title, size=11)
    axes = figure.subplots(1, len(modes), squeeze=False)[0]
    return figure, dict(zip(modes, axes, strict=True))


def roofline(timed: pd.DataFrame, ceilings: Ceilings, title: str) -> Figure:
    """Operations per second against operations per byte, of ours and of the fastest eager row.

    Both have the same useful operations and compulsory bytes, so one is above the other.
    """
    timed = timed.dropna(subset="tflop_s")  # no networks
    dtype = timed["dtype"].iloc[0]  # the one that the matrix rate was measured in
    timed = timed[timed["dtype"] == dtype].assign(reuse=1e3 * timed["tflop_s"] / timed["gb_s"])
    numbers = {name: str(n) for n, name in enumerate(timed["workload"].unique(), 1)}
    figure, panels = _by_mode(timed, f"{title}: roofline, {dtype}", 6.2)
    for mode, panel in panels.items():
        part = timed[timed["mode"] == mode]
        launch = part["launch"].iloc[0]
        part = part[part["launch"] == launch]
        eager = part[part["baseline"].astype(bool)].sort_values("median_ms")
        eager = eager.drop_duplicates("workload").set_index("workload")
        ours = best_of_ours(part).set_index("workload")
        _roof(panel, part, ceilings)
        marks = {"eager": (eager, "o", COLOURS[1]), "ours": (ours, "^", COLOURS[0])}
        for name, (frame, look, colour) in marks.items():
            label = f"{name}, better memory format"
            panel.plot(frame["reuse"], frame["tflop_s"], look, color=colour, label=label, zorder=3)
        for name, row in ours.join(eager["tflop_s"].rename("eager")).iterrows():
            panel.annotate(
                numbers[name], (row["reuse"], row["tflop_s"]), (0, 6), fontsize=7, color=GREY,
                textcoords="offset points", ha="center",
            )  # fmt: skip
            ends = row[["eager", "tflop_s"]].astype(float)
            panel.plot([row["reuse"]] * 2, ends, color=GREY, linewidth=0.7)
        panel.set_title(f"{mode}, {LAUNCHES[launch]}", size=10)
        panel.legend(fontsize=8, loc="lower right", frameon=False)
    listed = "\n".join(f"{number}  {name}" for name, number in numbers.items())
    panel.text(1.02, 1.0, listed, transform=panel.transAxes, fontsize=8, va="top", color=GREY)
    return figure


def _roof(panel: Any, part: pd.DataFrame, ceilings: Ceilings) -> None:
    x = np.geomspace(0.5 * part["reuse"].min(), 2 * part["reuse"].max(), 100)
    slope, top = ceilings.bandwidth / 1e12, ceilings.matrix_rate / 1e12
    text: dict[str, Any] = {"fontsize": 7, "color": GREY}
    panel.loglog(x, x * slope, "--", color=GREY, linewidth=1)
    panel.axhline(top, linestyle="--", color=GREY, linewidth=1)
    panel.text(x[0], top, f" {top:.3g} TFLOP/s measured", va="bottom", **text)
    panel.annotate(
        f"{1e3 * slope:.3g} GB/s measured", (x[33], x[33] * slope), (4, -10),
        textcoords="offset points", **text,
    )  # fmt: skip
    panel.set_ylim(0.4 * min(part["tflop_s"].min(), top), 2.5 * max(part["tflop_s"].max(), top))
    panel.set(xlabel="useful operations per compulsory byte", ylabel="useful TFLOP/s")


def scaling(timed: pd.DataFrame, axis: str, title: str) -> Figure:
    """Time against a size on log axes, with a line of slope one through the last point of ours."""
    figure, panels = _by_mode(timed, title, 5.6)
    for mode, panel in panels.items():
        part = timed[timed["mode"] == mode].sort_values("size", kind="stable")
        series = part["provider"] + " " + part["layout"] + ", " + part["launch"]
        series = series.str.replace(" nchw", "").str.replace(", eager", "")
        for index, (name, one) in enumerate(part.groupby(series, sort=False)):
            colour = COLOURS[index % len(COLOURS)]
            panel.plot(one["size"], one["median_ms"], "o-", markersize=4, color=colour, label=name)
            panel.fill_between(one["size"], one["p20_ms"], one["p80_ms"], color=colour, alpha=0.2)
        last = part[part["provider"].isin(OURS)]
        if len(last):
            size, ms = last["size"].to_numpy(), last["median_ms"].to_numpy()
            panel.plot(size, ms[-1] * size / size[-1], ":", color=GREY, label="linear", zorder=0.9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(xlabel=axis, ylabel="median ms")
        panel.set_title(mode, size=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
    return figure
