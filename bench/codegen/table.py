"""The kept table: one row a compilation, in an order that does not change, to compare line by line.

Figures belong to the version of Triton that made them, which every row names, and to a program,
whose digest it has: where that has not changed, nothing needs to be compiled again.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from da_triton.runtime.tiles import ARCHITECTURES

KEPT = Path(__file__).parents[1] / "results" / "codegen.csv"
COMMAND = "python -m bench codegen"
# A row of the file is found again by these, whatever tile it has now.
KEY = ("arch", "kernel", "dtype", "layout", "L", "C", "m", "n", "call", "flags")
FIGURES = (
    "registers", "spills", "shared", "matrix", "wgmma", "copy_bytes", "load_bytes", "loads_2",
)  # fmt: skip
COLUMNS = (*KEY, "products", "blocks", "warps", "stages", *FIGURES, "triton", "digest")
NUMBERS = {"L", "C", "m", "n", "products", "warps", "stages", *FIGURES}
ORDER = tuple(ARCHITECTURES)
ODD = 49  # positions of rows that may spill
SLACK = 8  # registers that may come and go

Row = dict[str, Any]


def row(arch: str, surveyed: Row, triton: str) -> Row:
    """A line of the file from a line of the survey."""
    widths = {name: {int(k): x for k, x in surveyed[name].items()} for name in ("copies", "loads")}
    shown = {k: surveyed[k] for k in COLUMNS if k in surveyed}
    return shown | {
        "arch": arch,
        "copy_bytes": max(widths["copies"], default=0),
        "load_bytes": max(widths["loads"], default=0),
        "loads_2": widths["loads"].get(2, 0),
        "triton": triton,
    }


def known(arch: str, surveyed: Row, kept: Row) -> Row:
    """The same for a program whose figures the file has."""
    return kept | {k: surveyed[k] for k in COLUMNS if k in surveyed} | {"arch": arch}


def read(path: Path = KEPT) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: int(x) if k in NUMBERS else x for k, x in line.items()}
            for line in csv.DictReader(file)
        ]


def write(rows: Iterable[Row], path: Path) -> None:
    """All rows, sorted; ``path`` is replaced whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(rows, key=_place))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue(), encoding="utf-8")


def key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def title(row: Row) -> str:
    sizes = f"m={row['m']} n={row['n']}" + (f" C={row['C']}" if row["C"] else "")
    words = (row["arch"], row["kernel"], row["dtype"], row["layout"], f"L={row['L']}", sizes)
    return " ".join(filter(None, (*words, row["call"], f"[{row['flags']}]", row["blocks"])))


def worse(fresh: Sequence[Row], kept: Sequence[Row]) -> list[str]:
    """What got worse against the kept rows of the same version of Triton, a line for each."""
    before = {(key(x), x["triton"]): x for x in kept}
    found = []
    for now in fresh:
        then = before.get((key(now), now["triton"]))
        found += [f"{title(now)}: {what}" for what in _differences(now, then)] if then else []
    return found


def _differences(now, then):
    higher = {"spills": 0, "shared": 0, "registers": SLACK, "loads_2": 0}
    found = [
        f"{name} {then[name]} -> {now[name]}"
        for name, slack in higher.items()
        if now[name] > then[name] + slack
    ]
    if then["copy_bytes"]:
        lower = ["copy_bytes"]
    else:  # a copy may take a load's place
        lower = ["load_bytes"] if now["copy_bytes"] < then["load_bytes"] else []
    lower += [name for name in ("matrix", "wgmma") if now[name] == 0]
    return found + [
        f"{name} {then[name]} -> {now[name]}" for name in lower if now[name] < then[name]
    ]


def summary(rows: Sequence[Row]) -> str:
    """A line for each architecture and kernel: tiles, and the worst of the rest."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for x in sorted(rows, key=_place):
        groups.setdefault((x["arch"], x["kernel"]), []).append(x)
    head = ("arch", "kernel", "rows", "tiles", "registers", "spills", "shared", "least copy")
    lines = [head]
    for (arch, kernel), group in groups.items():
        tiles = {(x["blocks"], x["warps"], x["stages"]) for x in group}
        spilled = [x for x in group if x["spills"]]
        spills = str(max((x["spills"] for x in spilled), default=0))
        if spilled and all(x["L"] == ODD for x in spilled):
            spills += " (odd L)"
        copies = min((x["copy_bytes"] for x in group if x["dtype"] == "bfloat16"), default=0)
        worst = (max(x[name] for x in group) for name in ("registers", "shared"))
        registers, shared = map(str, worst)
        counts = (str(len(group)), str(len(tiles)))
        lines.append((arch, kernel, *counts, registers, spills, shared, str(copies)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            x.ljust(w) if i < 2 else x.rjust(w)
            for i, (x, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _place(row):
    arch = ORDER.index(row["arch"]) if row["arch"] in ORDER else len(ORDER)
    return arch, *(row[name] for name in KEY), row["blocks"], row["triton"]
