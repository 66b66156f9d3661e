"""``python -m bench codegen [--arch ARCH] [--out FILE]``: compiles, prints and keeps the table."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import table

EXAMPLES = """
examples:
  python -m bench codegen                        every architecture, into bench/results/codegen.csv
  python -m bench codegen --arch sm_90           one, whose rows replace those in the file
  python -m bench codegen --arch gfx942 --out /tmp/codegen.csv
  git diff bench/results/codegen.csv             what a change made of the generated code

It needs no GPU. Programs that have not changed are not compiled again; all of them take minutes for
each architecture. Tiles are found by python -m bench.codegen.tiles.
"""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench codegen",
        description="Registers, spills, shared memory and loads of every kernel with its tiles.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", action="append", choices=table.ORDER, help="repeatable; all without"
    )
    parser.add_argument("--out", type=Path, default=table.KEPT, help="a CSV file, kept in order")
    options = parser.parse_args(argv)
    if refusal := cannot_compile():
        print(refusal, file=sys.stderr)
        return 2
    import triton

    kept = table.read(options.out) if options.out.exists() else []
    before, found = kept, []
    for arch in options.arch or table.ORDER:
        same = {x["digest"]: x for x in before if x["arch"] == arch}
        rows: list[table.Row] = []
        for line in surveyed(arch, same):
            figures = same.get(line["digest"])
            rows.append(
                table.known(arch, line, figures)
                if figures
                else table.row(arch, line, triton.__version__)
            )
            if sys.stderr.isatty():
                print(f"\r{arch}: {len(rows)} programs ", end="", file=sys.stderr)
        found += rows
        kept = [x for x in kept if x["arch"] != arch]
        kept += rows
        table.write(kept, options.out)  # a run that is cut short leaves what it has
    print(f"Triton {triton.__version__}, generated code, not timed", table.summary(found), sep="\n")
    print(*(f"worse: {line}" for line in table.worse(found, before)), sep="\n")
    print(f"{len(found)} rows in {options.out}")
    return 0


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


def surveyed(
    arch: str, known: Iterable[str] = (), *, sample: bool = False
) -> Iterator[dict[str, Any]]:
    """Rows of ``survey``, from a process of its own without TRITON_INTERPRET.

    Raises:
        RuntimeError: with the end of the process's errors.
    """
    root = str(Path(__file__).parents[2])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench.codegen.survey", arch, *(["--sample"] * sample)]
    with subprocess.Popen(
        command, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        json.dump(list(known), process.stdin)
        process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        errors = process.stderr.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors[-4000:]}")
