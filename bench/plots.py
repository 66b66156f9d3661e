"""Plots of measurements: bars of ratios, the roofline, cost against size."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .problems import MODES
from .providers import OURS
from .roofline import Ceilings

# A palette that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
KINDS = {
    "ratio_to_eager": "against eager",
    "ratio_to_compiled": "against torch.compile of eager",
    "ratio_to_max_autotune": "against its mode max-autotune",
}
GREY = "#555555"


def best_of_ours(timed: pd.DataFrame) -> pd.DataFrame:
    """Of each workload, mode, launch mode and dtype the fastest of our uncompiled rows.

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
    """Ours against eager and against its compilation: a panel for each launch mode and mode."""

    def draw(panel: Any, part: pd.DataFrame) -> None:
        kinds = [kind for kind in KINDS if part[kind].notna().any()]
        _grouped(panel, part.set_index("workload")[kinds].rename(columns=KINDS), "{:.2f}")
        panel.axhline(1.0, color=GREY, linewidth=1, linestyle="--", zorder=0.9)
        panel.set_ylabel("times as fast")

    title = f"{title}\nours, in its better memory format; above 1 it is faster"
    return _by_workload(timed, best_of_ours(timed), title, draw)


def times(timed: pd.DataFrame, title: str) -> Figure:
    """Milliseconds of every provider, where ratios must not be shown."""

    def draw(panel: Any, part: pd.DataFrame) -> None:
        values = part.pivot(index="workload", columns="series", values="median_ms")
        order = part["series"].dropna().unique()
        _grouped(panel, values.loc[part["workload"].unique(), order], "{:.3g}")
        panel.set_yscale("log")
        panel.set_ylabel("median ms")

    series = timed["provider"] + " " + timed["layout"]
    return _by_workload(timed, timed.assign(series=series), title, draw)


def _by_workload(timed: pd.DataFrame, frame: pd.DataFrame, title: str, draw: Any) -> Figure:
    """A panel for each dtype, launch mode and mode of ``frame``, with all workloads in order."""
    sizes = timed.drop_duplicates("workload").set_index("workload")
    names = [f"{w}\n{row.n}×{row.c}\n{row.positions}" for w, row in sizes.iterrows()]
    panels = list(frame.groupby(["dtype", "launch", "mode"], sort=False))
    size = (max(8.0, 3.0 + 0.85 * len(names)), 0.8 + 2.6 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, size=11)
    axes = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for panel, ((dtype, launch, mode), part) in zip(axes, panels, strict=True):
        every = pd.DataFrame({"workload": sizes.index}).merge(part, how="left")
        draw(panel, every)
        panel.set_title(f"{mode}, {_launches(launch)}, {dtype}", size=10)
        panel.set_xticks(np.arange(len(names)), names, fontsize=7)
    return figure


def _launches(launch: str) -> str:
    return "CUDA graph" if launch == "graph" else "eager launches"


def _grouped(panel: Any, values: pd.DataFrame, form: str) -> None:
    """Bars side by side, a column each, with their values above."""
    thickness = 0.8 / max(1, values.shape[1])
    for index, (name, series) in enumerate(values.astype(float).items()):
        places = np.arange(len(series)) + (index - (values.shape[1] - 1) / 2) * thickness
        colour = COLOURS[index % len(COLOURS)]
        drawn = panel.bar(places, series, thickness, label=name, color=colour)
        labels = ["" if np.isnan(x) else form.format(x) for x in series]
        panel.bar_label(drawn, labels=labels, fontsize=7, padding=1)
    panel.margins(x=0.01, y=0.15)
    panel.set_xlim(-0.6, len(values) - 0.4)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def roofline(timed: pd.DataFrame, ceilings: Ceilings, title: str) -> Figure:
    """Operations a second against operations a byte, of ours and of the fastest eager row.

    Both have the same useful operations and compulsory bytes, so they stand above each other.
    """
    dtypes, modes = list(timed["dtype"].unique()), [m for m in MODES if (timed["mode"] == m).any()]
    dtype = dtypes[0]  # the one that the matrix rate was measured in
    numbers = {name: str(n + 1) for n, name in enumerate(timed["workload"].unique())}
    figure = Figure(figsize=(6.2 * len(modes) + 1.6, 5.4), layout="constrained")
    figure.suptitle(f"{title}: roofline, {dtype}", size=11)
    for panel, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        part = timed.query("mode == @mode and dtype == @dtype")
        part = part[part["launch"] == part["launch"].iloc[0]]
        ours = best_of_ours(part).set_index("workload")
        eager = part[part["baseline"].astype(bool)].sort_values("median_ms")
        eager = eager.drop_duplicates("workload").set_index("workload")
        _roof(panel, part, ceilings)
        for marker, frame, colour, label in (
            ("o", eager, COLOURS[1], "eager, better memory format"),
            ("^", ours, COLOURS[0], "ours, better memory format"),
        ):
            reuse = 1e3 * frame["tflop_s"] / frame["gb_s"]
            panel.plot(reuse, frame["tflop_s"], marker, color=colour, label=label, zorder=3)
        for name, row in ours.iterrows():
            reuse = 1e3 * row["tflop_s"] / row["gb_s"]
            panel.annotate(
                numbers[name], (reuse, row["tflop_s"]), (0, 6), textcoords="offset points",
                fontsize=7, color=GREY, ha="center",
            )  # fmt: skip
            if name in eager.index:
                ends = [eager["tflop_s"][name], row["tflop_s"]]
                panel.plot([reuse, reuse], ends, color=GREY, linewidth=0.7)
        rates = [*part["tflop_s"], ceilings.matrix_rate / 1e12]
        panel.set_ylim(0.4 * min(rates), 2.5 * max(rates))
        panel.set_title(f"{mode}, {_launches(part['launch'].iloc[0])}", size=10)
        panel.set_xlabel("useful operations a compulsory byte")
        panel.set_ylabel("useful TFLOP/s")
        panel.legend(fontsize=8, loc="lower right", frameon=False)
    listed = "\n".join(f"{number}  {name}" for name, number in numbers.items())
    panel.text(1.02, 1.0, listed, transform=panel.transAxes, fontsize=8, va="top", color=GREY)
    return figure


def _roof(panel: Any, part: pd.DataFrame, ceilings: Ceilings) -> None:
    reuse = 1e3 * part["tflop_s"] / part["gb_s"]
    x = np.geomspace(0.5 * reuse.min(), 2 * reuse.max(), 100)
    panel.loglog(x, x * ceilings.bandwidth / 1e12, "--", color=GREY, linewidth=1)
    panel.axhline(ceilings.matrix_rate / 1e12, linestyle="--", color=GREY, linewidth=1)
    panel.text(
        x[0], ceilings.matrix_rate / 1e12, f" {ceilings.matrix_rate / 1e12:.3g} TFLOP/s measured",
        fontsize=7, va="bottom", color=GREY,
    )  # fmt: skip
    middle = x[len(x) // 3]
    panel.annotate(
        f"{ceilings.bandwidth / 1e9:.3g} GB/s measured",
        (middle, middle * ceilings.bandwidth / 1e12), (4, -10), textcoords="offset points",
        fontsize=7, color=GREY,
    )  # fmt: skip


def scaling(timed: pd.DataFrame, axis: str, title: str) -> Figure:
    """Time against a size on log axes, with a line of slope one through the last point of ours."""
    modes = [m for m in MODES if (timed["mode"] == m).any()]
    figure = Figure(figsize=(5.6 * len(modes), 4.6), layout="constrained")
    figure.suptitle(title, size=11)
    for panel, mode in zip(figure.subplots(1, len(modes), squeeze=False)[0], modes, strict=True):
        part = timed[timed["mode"] == mode]
        series = part["provider"] + " " + part["layout"] + ", " + part["launch"]
        series = series.str.replace(" nchw", "").str.replace(", eager", "")
        for index, name in enumerate(series.unique()):
            one = part[series == name].sort_values("size")
            colour = COLOURS[index % len(COLOURS)]
            panel.plot(one["size"], one["median_ms"], "o-", markersize=4, color=colour, label=name)
            panel.fill_between(one["size"], one["p20_ms"], one["p80_ms"], color=colour, alpha=0.2)
        last = part[part["provider"].isin(OURS)].sort_values("size")
        if len(last):
            size, ms = last["size"].to_numpy(), last["median_ms"].to_numpy()
            panel.plot(size, ms[-1] * size / size[-1], ":", color=GREY, label="linear", zorder=0.9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xlabel(axis)
        panel.set_ylabel("median ms")
        panel.set_title(mode, size=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, frameon=False)
    return figure
