"""Compiles launches that the tests' ``support.recorder`` kept. Not under TRITON_INTERPRET.

    python -m bench.codegen.replay sm_90 2 < launches

reads an array in JSON and prints the fields of a ``Compiled`` per line, as an array.
"""

import importlib
import json
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import triton.language as tl

from bench.codegen import compiler

DTYPES = {str(x): x for x in (tl.float16, tl.bfloat16, tl.float32, tl.float64)}
Recorded = dict[str, Any]


class Compiled(NamedTuple):
    """What became of a launch."""

    kernel: str
    test: str  # the first that made it
    shared: int  # bytes of shared memory
    problem: str  # why it cannot be launched; empty if it can


def decoded(recorded: Recorded) -> compiler.Launch:
    module, name = recorded["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    kwargs = {k: _value(x) for k, x in recorded["kwargs"].items()}
    return compiler.Launch(kernel, (1,), tuple(map(_value, recorded["args"])), kwargs)


def _value(x):
    if not isinstance(x, dict):
        return x
    if "dtype" in x:
        return DTYPES[x["dtype"]]
    dtype = getattr(torch, x["tensor"].removeprefix("torch."))
    if x["aligned"]:
        return torch.empty(0, dtype=dtype, device="meta")
    return torch.empty(2, dtype=dtype)[1:]  # an address that 16 does not divide


def distinct(recorded: Sequence[Recorded], arch: str) -> list[Recorded]:
    """One launch of each that Triton compiles separately."""
    return list({compiler.identity(decoded(x), arch): x for x in reversed(recorded)}.values())


def compiled(recorded: Recorded, arch: str) -> Compiled:
    shared, problem = 0, ""
    try:
        shared = compiler.compile_launch(decoded(recorded), arch).shared
    except compiler.OutOfSharedMemoryError as error:
        shared, problem = error.needed, f"needs {error} of shared memory"
    except Exception as error:  # whatever the compiler raises
        problem = f"does not compile: {type(error).__name__} {str(error)[:200]}"
    return Compiled(recorded["kernel"].split(":")[1], recorded["test"], shared, problem)


def compile_all(recorded: Sequence[Recorded], arch: str, jobs: int) -> Iterator[Compiled]:
    """Compiles distinct launches, the widest tiles first."""
    found = sorted(distinct(recorded, arch), key=_elements, reverse=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(compiled, found, [arch] * len(found))


def _elements(recorded):
    return max((x for k, x in recorded["kwargs"].items() if k.startswith("BLOCK")), default=0)


if __name__ == "__main__":
    arch, jobs = sys.argv[1:]
    for found in compile_all(json.load(sys.stdin), arch, int(jobs)):
        print(json.dumps(found), flush=True)
