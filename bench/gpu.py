"""``python -m bench gpu``: tests, ceilings, then every workload for every provider, in a budget.

No ratio is given unless the tests pass.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import ceilings, providers
from .environment import ROOT, card, environment
from .measure import Bench, Budget, CudaTimer, Effort, Timer
from .providers import Provider
from .report import Report
from .workloads import Workload

# What needs no GPU is tested elsewhere; compilation of the kernels is what takes time here.
WITHOUT_A_GPU = (
    "bench", "kernels/test_aot.py", "test_checks.py", "test_export.py", "test_notebooks.py",
)  # fmt: skip
TEST_COMMAND = (
    sys.executable, "-m", "pytest", "-q", "-x", "-n", str(max(1, (os.cpu_count() or 1) - 2)),
    "-p", "no:cacheprovider", "tests", *(f"--ignore=tests/{name}" for name in WITHOUT_A_GPU),
)  # fmt: skip
TEST_SHARE = 0.45
EFFORT = Effort(warm_up=5, rounds_min=20, rounds_max=100, seconds=1.0)
METRICS = ("time", "ratio", "floor", "memory", "launches")


def run_gpu(
    out: Path,
    workloads: Sequence[Workload],
    budget: Budget,
    *,
    device: torch.device | None = None,
    timer: Timer | None = None,
    sweeps: Sequence[Sequence[Provider]] | None = None,
    test_command: Sequence[str] = TEST_COMMAND,
    effort: Effort = EFFORT,
    copy_bytes: int | None = None,
    matrix_size: int | None = None,
) -> int:
    """Runs everything and prints the short report; 0 if the tests passed, else 1."""
    device = device or torch.device("cuda")
    facts = environment(device)
    name = (facts.get("card") or {}).get("name", device.type)
    report = Report(out, f"Double attention on {name}, bfloat16", METRICS)
    report.record(**facts, budget_seconds=budget.seconds)

    outcome = run_tests(test_command, TEST_SHARE * budget.left, out / "tests.txt")
    report.record(tests=outcome)
    passed = outcome.startswith("passed")
    if not passed:
        report.with_ratios = False
        report.notes.append(f"THE TESTS DID NOT PASS, so there are raw times only: {outcome}")

    timer = timer or CudaTimer()
    report.ceilings, found = ceilings.measure(
        timer, device, torch.bfloat16, copy_bytes, matrix_size
    )
    report.record(ceilings=found)
    report.notes.append("Ceilings: " + ", ".join(f"{k} {v}" for k, v in found.items()))

    bench = Bench(device, torch.bfloat16, timer, effort, budget, report.ceilings)
    try:
        bench.run(workloads, providers.gpu_sweeps() if sweeps is None else sweeps, report.add)
    except KeyboardInterrupt:
        report.notes.append("Interrupted: these are the measurements until then.")
    report.record(card_afterwards=card(), seconds_used=round(budget.seconds - budget.left, 1))
    print(report.finish(short=True))
    return 0 if passed else 1


def run_tests(command: Sequence[str], limit: float, log: Path) -> str:
    """How the tests ended, in one line that begins with ``passed`` only if they did."""
    with log.open("w", encoding="utf-8") as file:
        try:
            ended = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    if ended.returncode == 0:
        return f"passed: {lines[-1]}"
    return f"failed with exit status {ended.returncode}: {lines[-1]}"
