"""``python -m bench gpu``: everything on a GPU, in a budget.

The tests, the ceilings, every workload for every provider; then, in the time that is kept for them,
first calls, cost against positions and whole networks; at last, if asked for, tiles. No ratio is
given unless the tests pass.
"""

import dataclasses
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import ceilings, networks, providers, scaling, suite
from .environment import ROOT, card, environment
from .first_call import seconds
from .measure import OK, Bench, Budget, CudaTimer, Effort, Timer, describe
from .problems import FORWARD, STEP
from .providers import EAGER, GRAPH, Provider
from .report import Report
from .workloads import Workload

TEST_SHARE = 0.4
SWEEP_SHARE = 0.75  # of what the tests leave; the rest is for what comes after
EFFORT = Effort(warm_up=5, rounds_min=20, rounds_max=100, seconds=1.0)
METRICS = ("time", "ratio", "floor", "memory", "launches")


Afterwards = Callable[[Report, Bench, Sequence[Workload]], None]


def first_calls(report: Report, bench: Bench, workloads: Sequence[Workload]) -> None:
    """Of ours and of a compiled eager block, on the first workload, in fresh processes."""
    for provider in providers.select(
        ["triton", "compile eager"], EAGER, bench.device, bench.dtype, ["nchw"]
    ):
        for row in report.rows:
            same = (row["workload"], row["provider"], row["launch"], row["layout"]) == (
                workloads[0].name, provider.name, EAGER, "nchw",
            )  # fmt: skip
            if same and row["mode"] == STEP and row["status"] == OK and bench.budget.left > 0:
                try:
                    cold, warm = seconds(row["workload"], provider, STEP, bench.dtype, bench.device)
                except Exception as error:
                    report.notes.append(f"First call failed: {describe(error)}")
                else:
                    row.update(first_call_cold_s=cold, first_call_warm_s=warm)
    report.add([])


def cost_against_positions(report: Report, bench: Bench, workloads: Sequence[Workload]) -> None:
    """Eager and ours, as CUDA graphs, in a report of its own beside this one."""
    beside = Report(report.out / "scaling", report.title, ("time", "ratio"))
    beside.environment, beside.with_ratios = report.environment, report.with_ratios
    wanted = ["eager", "triton"]
    sweep = providers.select(wanted, GRAPH, bench.device, bench.dtype, ["nchw"])
    scaling.run(bench, "L", scaling.AXES["L"], [sweep], [FORWARD, STEP], beside)


def whole_networks(report: Report, bench: Bench, workloads: Sequence[Workload]) -> None:
    for network in networks.NETWORKS.values():
        for mode in networks.MODES.values():
            report.add(networks.measure(bench, network, mode, networks.variants("triton", True)))


AFTERWARDS = (first_calls, cost_against_positions, whole_networks)


def run_gpu(
    out: Path,
    workloads: Sequence[Workload],
    budget: Budget,
    *,
    device: torch.device | None = None,
    timer: Timer | None = None,
    sweeps: Sequence[Sequence[Provider]] | None = None,
    test_command: Sequence[str] | None = None,
    effort: Effort = EFFORT,
    copy_bytes: int | None = None,
    matrix_size: int | None = None,
    afterwards: Sequence[Afterwards] | None = None,
) -> int:
    """Runs everything and prints the short report; 0 if the tests passed, else 1."""
    device = device or torch.device("cuda")
    facts = environment(device)
    name = (facts.get("card") or {}).get("name", device.type)
    report = Report(out, f"Double attention on {name}, bfloat16", METRICS)
    report.record(**facts, budget_seconds=budget.seconds)

    outcome = run_tests(
        test_command or suite.command(), TEST_SHARE * budget.left, out / "tests.txt"
    )
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

    sweep_budget = Budget(SWEEP_SHARE * budget.left, budget.clock)
    bench = Bench(device, torch.bfloat16, timer, effort, sweep_budget, report.ceilings)
    try:
        bench.run(workloads, providers.gpu_sweeps() if sweeps is None else sweeps, report.add)
        for part in AFTERWARDS if afterwards is None else afterwards:
            if budget.left > 0:
                part(report, dataclasses.replace(bench, budget=budget), workloads)
            else:
                report.notes.append(f"Not run for lack of time: {part.__name__}.")
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
                command, cwd=ROOT, env=os.environ | suite.ENVIRONMENT,
                stdout=file, stderr=subprocess.STDOUT, timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
    if ended.returncode == 0:
        return f"passed: {lines[-1]}"
    return f"failed with exit status {ended.returncode}: {lines[-1]}"
