"""The test suite on a GPU: its files, the command that runs them, and its environment.

``python -m bench suite`` checks without a GPU what it would do on one: ``record`` runs the tests on
meta tensors, and ``compiled`` compiles the launches they make.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .environment import ROOT

TESTS = ROOT / "tests"
# Files that a GPU adds nothing to, by what they test.
LEFT_OUT = (
    # the benchmark, other libraries, notebooks and documents
    "bench", "integrations", "test_export.py", "test_export_formats.py", "test_notebooks.py",
    "test_readme.py",
    # code of CPUs, and ranks that are CPU processes
    "ops/aten/test_cpu_block.py", "ops/aten/test_cpu_convolved.py", "ops/aten/test_cpu_masks.py",
    "parallel/test_context_parallel.py", "parallel/test_data_parallel.py",
    "parallel/test_dtensor.py",
    # host code: checks, tables, names, parameters, the reference implementation, modules
    "runtime/test_tiles.py", "runtime/test_launch.py", "runtime/test_prepared.py",
    "arguments/test_checks.py", "arguments/test_hints.py", "modules/test_checkpointing.py",
    "modules/test_children.py", "modules/test_copies.py", "modules/test_state_dicts.py",
    "streaming/test_errors.py", "test_default_device.py", "test_package.py", "test_reference.py",
    # ahead-of-time compilation, what only the interpreter can count, what ``da_triton.check`` says,
    # which the smoke stage runs, and what runs under compute-sanitizer
    "kernels/test_aot.py", "kernels/test_layouts.py", "kernels/test_sanitize.py",
    "test_selfcheck.py",
    "ops/triton/test_routes_launches.py", "ops/triton/test_routes_traffic.py",
    "kernels/test_traffic.py",
)  # fmt: skip
NEEDS = {"test_properties.py": "hypothesis"}  # optional packages
# A worker takes one test at a time, so whatever takes longest starts first.
FIRST = ("test_properties.py", "ops/triton/test_large.py", "ops/triton/test_gpu_numerics.py")
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else every worker starts a pool of its own
    "DA_TRITON_PROVE": "0",  # the kernels themselves are tested, not what replaces wrong ones
    "DA_TRITON_EXAMPLES": "8",  # every example is a new shape, whose kernels are compiled serially
}


def files() -> list[Path]:
    """The files that run on a GPU with the installed packages, in the order they start in."""
    first = [TESTS / name for name in FIRST]
    found = sorted(set(TESTS.rglob("test_*.py")) - set(_left_out()))
    return [f for f in first if f in found] + [f for f in found if f not in first]


def _left_out() -> Iterator[Path]:
    missing = [name for name, package in NEEDS.items() if not find_spec(package)]
    for name in (*LEFT_OUT, *missing):
        path = TESTS / name
        yield from path.rglob("test_*.py") if path.is_dir() else [path]


def command() -> list[str]:
    """The command that runs the suite on a GPU, to be run in ``environment.ROOT``.

    The run ends after a hundred failures, not after the first: time on a GPU is short. Tests that
    fill the GPU's memory are one group, which pytest-xdist gives to one worker.
    """
    found = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=100", "-rfE",
        "--durations=15",
    ]  # fmt: skip
    if find_spec("xdist"):
        found += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "loadgroup"]
    return found + [str(file.relative_to(ROOT)) for file in files()]


@dataclasses.dataclass
class Recorded:
    """What tests would do on a GPU; see the tests' ``support.recorder``."""

    tests: list[dict[str, Any]]
    launches: list[dict[str, Any]]

    def names(self, fault: str) -> list[str]:
        """Tests that mix devices (``"mixed"``) or run the CPU's own code (``"cpu"``)."""
        return [test["test"] for test in self.tests if test[fault]]


def record(tests: Sequence[str], *, interpret: bool = False) -> Recorded:
    """Runs tests, named as for pytest, as on a GPU; the record includes those that fail.

    Raises:
        RuntimeError: nothing was run, with the end of pytest's output.
    """
    options = ["-q", "-p", "no:cacheprovider", "-p", "support.recorder", "--tb=no"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record"
        path = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, **ENVIRONMENT, "DA_TRITON_RECORD": str(file), "PYTHONPATH": path}
        env |= {"DA_TRITON_INTERPRET": "1"} if interpret else {}
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=ROOT, env=env, capture_output=True, text=True,
        )  # fmt: skip
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise RuntimeError(f"{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}")
    launches = [row for row in rows if "kernel" in row]
    return Recorded([row for row in rows if "kernel" not in row], launches)


def compiled(
    launches: Sequence[dict[str, Any]], arch: str, jobs: int
) -> Iterator[tuple[str, str, int, str]]:
    """``codegen.compile.Compiled`` of each distinct launch, as it is compiled."""
    command = [sys.executable, "-m", "bench.codegen.compile", arch, str(jobs)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile("w+") as given, subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=given, stdout=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        json.dump(launches, given)
        given.seek(0)
        assert process.stdout is not None
        for line in process.stdout:
            yield tuple(json.loads(line))
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")


def run(tests: Sequence[str], arch: str, jobs: int, interpret: bool) -> bool:
    """Records tests, compiles their launches and prints what is wrong; whether anything is."""
    found = record(tests or [str(file.relative_to(ROOT)) for file in files()], interpret=interpret)
    early = sum(bool(test["ended"]) for test in found.tests)
    print(f"{len(found.tests)} tests, {early} of which did not reach their end without a GPU.")
    faults = {"mixes devices": found.names("mixed"), "runs the CPU's own code": found.names("cpu")}
    for title, faulty in faults.items():
        print(*(f"{title}: {test}\n" for test in faulty), sep="", end="")
    launches = list(compiled(found.launches, arch, jobs))
    wrong = [(kernel, test, problem) for kernel, test, _, problem in launches if problem]
    largest = max((shared for *_, shared, problem in launches if not problem), default=0)
    print(
        f"{len(launches)} distinct launches on {arch}: {len(launches) - len(wrong)} "
        f"compile and fit, with {largest:,} bytes of shared memory at most."
    )
    print(*(f"{kernel} {problem}, in {test}\n" for kernel, test, problem in wrong), sep="", end="")
    return bool(wrong or any(faults.values()))
