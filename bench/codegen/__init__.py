"""``python -m bench codegen``: generated code of every kernel, for GPUs that are not there.

    survey     the launches that are compiled: of every kernel, with every shipped tile
    compile    one recorded launch -> registers, spills, shared memory, instructions
    tiles      the search for the fused kernels' tiles

and here the table, one row per compilation: its CSV file, its summary, what got worse. The order of
rows does not change, to compare line by line. Figures belong to the version of Triton that made
them, which every row names, and to a program, whose digest it has: where that has not changed,
nothing is compiled again.

The modules need Triton, in a process without TRITON_INTERPRET; importing the package needs neither.
"""

import importlib.metadata
import importlib.util
import json
import operator
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from bench.environment import ROOT
from da_triton.runtime.tiles import ARCHITECTURES


class Code(NamedTuple):
    """The compiler's result for a launch on one architecture."""

    registers: int = 0
    spills: int = 0  # NVIDIA: local loads and stores; AMD: spilled registers
    shared: int = 0  # bytes of shared memory; where there are fewer, the other figures are 0
    matrix: int = 0  # matrix instructions (mma.sync, wgmma, tcgen05, v_mfma)
    wgmma: int = 0
    copy_bytes: int = 0  # the widest asynchronous copy
    load_bytes: int = 0  # the widest direct load from global memory
    loads_2: int = 0  # direct loads of two bytes


KEPT = ROOT / "bench" / "results" / "codegen.csv"
# A row of the file is found again by these, whatever tile it has now.
KEY = ["arch", "kernel", "dtype", "layout", "L", "C", "m", "n", "call", "flags"]
FIGURES = Code._fields
COLUMNS = [*KEY, "products", "blocks", "warps", "stages", *FIGURES, "triton", "digest"]
NUMBERS = {"L", "C", "m", "n", "products", "warps", "stages", *FIGURES}
ORDER = tuple(ARCHITECTURES)
ODD = 49  # positions of rows that may spill
SLACK = 8  # registers that may come and go

Row = dict[str, Any]


def update(archs: Sequence[str], path: Path) -> None:
    """Compiles what has changed, replaces the architectures' rows in the file, and prints both.

    Unchanged programs are those whose digest the file has.
    """
    triton = importlib.metadata.version("triton")
    before = read(path) if path.exists() else []
    kept, found = before, []
    for arch in archs:
        same = {x["digest"]: x for x in before if x["arch"] == arch}
        rows = [{"triton": triton, **same.get(x["digest"], {}), **x} for x in surveyed(arch, same)]
        compiled = sum(x["digest"] not in same for x in rows)
        print(f"{arch}: {len(rows)} programs, {compiled} of them compiled", flush=True)
        kept = [x for x in kept if x["arch"] != arch] + rows
        write(kept, path)  # a run that is cut short leaves what it has
        found += rows
    print(f"Triton {triton}, generated code, not timed\n", summary(found), "", sep="\n")
    print(*(f"worse: {line}\n" for line in worse(found, before)), sep="", end="")
    print(f"{len(found)} rows in {path}")


def surveyed(arch: str, known: Iterable[str] = (), *, sample: bool = False) -> Iterator[Row]:
    """Rows of ``survey``, from a process of its own without TRITON_INTERPRET.

    Raises:
        RuntimeError: with the end of the process's errors.
    """
    yield from rows_of("bench.codegen.survey", list(known), arch, *["--sample"] * sample)


def rows_of(module: str, given: Any, *arguments: str) -> list[Row]:
    """What a module prints, an object per line, for ``given`` on its input.

    It runs in a process of its own without TRITON_INTERPRET.

    Raises:
        RuntimeError: with the end of the process's errors.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(
        command, env=env, cwd=ROOT, text=True, input=json.dumps(given), capture_output=True
    )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr[-4000:]}")
    return [json.loads(line) for line in ended.stdout.splitlines()]


def cannot_compile(command: str = "codegen", does: str = "compiles kernels") -> str:
    """Why Triton cannot compile or launch in this process; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return f"`python -m bench {command}` {does}, and Triton is not installed."
    if os.environ.get("TRITON_INTERPRET"):
        return (
            f"`python -m bench {command}` {does}, and TRITON_INTERPRET is set, which "
            "makes Triton interpret them instead. Unset it."
        )
    return ""


# --- rows and their file --------------------------------------------------------------------------


def read(path: Path = KEPT) -> list[Row]:
    types = {name: int if name in NUMBERS else str for name in COLUMNS}
    return pd.read_csv(path, dtype=types, keep_default_na=False).to_dict("records")


def write(rows: Iterable[Row], path: Path) -> None:
    """All rows, sorted; ``path`` is replaced whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(sorted(rows, key=_place), columns=COLUMNS)
    frame.to_csv(path, index=False, lineterminator="\n")


def _place(row):
    return ORDER.index(row["arch"]), *(row[name] for name in KEY), row["blocks"], row["triton"]


def title(row: Row) -> str:
    sizes = f"m={row['m']} n={row['n']}" + (f" C={row['C']}" if row["C"] else "")
    words = (row["arch"], row["kernel"], row["dtype"], row["layout"], f"L={row['L']}", sizes)
    return " ".join(filter(None, (*words, row["call"], f"[{row['flags']}]", row["blocks"])))


# --- what is printed ------------------------------------------------------------------------------


def worse(fresh: Sequence[Row], kept: Sequence[Row]) -> list[str]:
    """Figures that got worse than in the kept rows of the same version of Triton, a line each."""
    key = operator.itemgetter(*KEY, "triton")
    before = {key(x): x for x in kept}
    found = []
    for now in fresh:
        then = before.get(key(now), now)
        higher = {"spills": 0, "shared": 0, "registers": SLACK, "loads_2": 0}
        names = [name for name, slack in higher.items() if now[name] > then[name] + slack]
        names += [name for name in _lower(now, then) if now[name] < then[name]]
        found += [f"{title(now)}: {name} {then[name]} -> {now[name]}" for name in names]
    return found


def _lower(now, then):
    """Figures that must not fall."""
    units = [name for name in ("matrix", "wgmma") if now[name] == 0]
    if then["copy_bytes"]:
        return ["copy_bytes", *units]
    # A copy may take a load's place.
    return ["load_bytes", *units] if now["copy_bytes"] < then["load_bytes"] else units


def summary(rows: Sequence[Row]) -> str:
    """A row for each architecture and kernel, in Markdown: tiles, and the worst of the rest."""
    frame = pd.DataFrame(sorted(rows, key=_place))
    frame["tile"] = frame[["blocks", "warps", "stages"]].astype(str).agg(" ".join, axis=1)
    frame["even spills"] = frame["spills"].where(frame["L"] != ODD, 0)
    frame["bfloat16 copy"] = frame["copy_bytes"].where(frame["dtype"] == "bfloat16")
    found = frame.groupby(["arch", "kernel"], sort=False).agg(
        **{
            "rows": ("L", "size"), "tiles": ("tile", "nunique"), "registers": ("registers", "max"),
            "spills": ("even spills", "max"), "at odd L": ("spills", "max"),
            "shared": ("shared", "max"), "least copy": ("bfloat16 copy", "min"),
        }
    )  # fmt: skip
    return found.fillna(0).astype(int).reset_index().to_markdown(index=False)
