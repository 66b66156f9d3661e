"""What the tests would do on a GPU, without one: ``support.recorder`` keeps the launches that they
make on meta tensors, and each of them is compiled.

    PYTHONPATH=.:tests python -m support.recorded sm_90 tests/test_block.py

prints tests that mix devices or run the CPU's own code, and launches that do not compile or fit;
exit status 1 if there are any. Without files, all that ``pytest --gpu`` runs. Numbers are not
computed; ``interpret=True`` interprets the kernels, which takes an hour for all.
"""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from bench.environment import ROOT
from bench.stages import TEST_ENVIRONMENT
from da_triton.runtime.tiles import ARCHITECTURES

JOBS = 2


@dataclasses.dataclass
class Recorded:
    """``tests`` and ``launches`` are what ``support.recorder`` writes."""

    tests: list
    launches: list

    def names(self, fault):
        """Tests that mix devices (``"mixed"``) or run the CPU's own code (``"cpu"``)."""
        return [test["test"] for test in self.tests if test[fault]]


class Compiled(NamedTuple):
    """What became of a launch."""

    kernel: str
    test: str  # the first that made it
    shared: int  # bytes of shared memory
    problem: str  # why it cannot be launched; empty if it can


def record(*tests, interpret=False):
    """Runs tests, named as for pytest, as on a GPU; the record includes those that fail."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "support.recorder", "--tb=no"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record"
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, **TEST_ENVIRONMENT, "DA_TRITON_RECORD": str(file), "PYTHONPATH": path}
        env |= {"DA_TRITON_INTERPRET": "1"} if interpret else {}
        command = [sys.executable, "-m", "pytest", *options, *tests]
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    assert rows, f"{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    launches = [row for row in rows if "kernel" in row]
    return Recorded([row for row in rows if "kernel" not in row], launches)


def compiled(launches, arch):
    """Compiles one launch of each that Triton compiles separately, in a process without
    TRITON_INTERPRET."""
    code = "import json, sys; from support import recorded; recorded.compile_all(*sys.argv[1:])"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with tempfile.NamedTemporaryFile("w", suffix=".json") as given:
        json.dump(launches, given)
        given.flush()
        command = [sys.executable, "-c", code, given.name, arch]
        ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return [Compiled(*json.loads(line)) for line in ended.stdout.splitlines()]


def compile_all(path, arch):
    """Prints a ``Compiled`` per distinct launch of a file, the widest tiles first."""
    from bench.codegen import compile

    def widest(launch):
        return max((x for k, x in launch["kwargs"].items() if k.startswith("BLOCK")), default=0)

    recorded = json.loads(Path(path).read_text(encoding="utf-8"))
    distinct = {compile.identity(_decoded(x), arch): x for x in reversed(recorded)}
    found = sorted(distinct.values(), key=widest, reverse=True)
    with ProcessPoolExecutor(JOBS, multiprocessing.get_context("spawn")) as pool:
        for done in pool.map(_compile, found, [arch] * len(found)):
            print(json.dumps(done), flush=True)


def _compile(recorded, arch):
    from bench.codegen import compile

    shared, problem = 0, ""
    try:
        shared = compile.compile_launch(_decoded(recorded), arch).shared
        if shared > ARCHITECTURES[arch].shared_memory:
            problem = f"needs {shared} bytes of shared memory"
    except Exception as error:  # whatever the compiler raises
        problem = f"does not compile: {type(error).__name__} {str(error)[:200]}"
    return Compiled(recorded["kernel"].split(":")[1], recorded["test"], shared, problem)


def _decoded(recorded):
    import importlib

    from bench.codegen import compile

    module, name = recorded["kernel"].split(":")
    kernel = getattr(importlib.import_module(module), name)
    kwargs = {k: _value(x) for k, x in recorded["kwargs"].items()}
    return compile.Launch(kernel, tuple(map(_value, recorded["args"])), kwargs)


def _value(x):
    import triton.language as tl

    if not isinstance(x, dict):
        return x
    if "dtype" in x:
        return {str(t): t for t in (tl.float16, tl.bfloat16, tl.float32, tl.float64)}[x["dtype"]]
    dtype = getattr(torch, x["tensor"].removeprefix("torch."))
    if x["aligned"]:
        return torch.empty(0, dtype=dtype, device="meta")
    return torch.empty(2, dtype=dtype)[1:]  # an address that 16 does not divide


def main(arch, *tests):
    found = record(*(tests or ("--gpu", "tests")))
    early = sum(bool(test["ended"]) for test in found.tests)
    print(f"{len(found.tests)} tests, {early} of which did not reach their end without a GPU.")
    wrong = [f"mixes devices: {test}" for test in found.names("mixed")]
    wrong += [f"runs the CPU's own code: {test}" for test in found.names("cpu")]
    launches = compiled(found.launches, arch)
    wrong += [f"{x.kernel} {x.problem}, in {x.test}" for x in launches if x.problem]
    largest = max((x.shared for x in launches if not x.problem), default=0)
    print(
        f"{len(launches)} distinct launches on {arch}, {largest:,} bytes of shared memory at most"
    )
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
