"""The stages of ``python -m bench gpu``, in order, each with the seconds that it has by default.

A stage gets what the run shares and a budget, leaves its results in the report and its logs in the
archive, and returns a short text. This process launches nothing on the GPU: kernels run in child
processes. Those of commands have ended, with all that they started, when the next stage begins.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from . import networks, providers, scaling
from .first_call import seconds
from .groups import Sweeper, Where
from .isolation import Ended, Worker, isolated, last_line
from .joined import PTXAS, JoinedReport, assembler
from .measure import OK, Budget, Effort
from .networks import Network
from .observe import CudaTimer, describe
from .problems import FORWARD, STEP
from .providers import EAGER, GRAPH, NCHW, Provider
from .report import Report
from .workloads import Workload

EFFORT = Effort(warm_up=6, rounds_min=20, rounds_max=1000, seconds=1.3)
# Compilation takes the longest, so the workloads that matter most to users of the baselines come
# first, and on the first three of them the baselines that take longest to compile.
COMPILED_FIRST = (
    "r50_conv3", "yolo_p3", "r50_conv4", "hires_256", "ddpm_64", "seg_19", "volume_128",
)  # fmt: skip
COMPLETE = 3
GRACE = 10.0  # seconds that the tests have to say which ones failed, when their time is up
TUNED = 3  # workloads, those with the smallest shares of their rooflines
TEST_ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else every worker starts a pool of its own
    "DA_TRITON_PROVE": "0",  # the kernels themselves are tested, not what replaces wrong ones
    "DA_TRITON_EXAMPLES": "8",  # every example is a new shape, whose kernels are compiled serially
}
# Meanings of the exit statuses of ``da_triton.check``.
CHECKED: dict[int | None, str] = {0: "all right", 1: "WRONG RESULTS", 2: "could not run"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Devices, commands and sizes of a run; the defaults are those of a GPU."""

    where: Where = Where(torch.device("cuda"), torch.bfloat16, CudaTimer, EFFORT)  # noqa: RUF009
    sweeps: Callable[[str], Sequence[Sequence[Provider]]] = providers.gpu_sweeps
    check_command: Sequence[str] = (
        sys.executable, "-m", "da_triton.check", "--thorough", "--jobs", "8",
    )  # fmt: skip
    test_command: Sequence[str] | None = None  # ``test_command()``
    tune_command: Sequence[str] = (sys.executable, "-m", "bench", "tune")
    ptxas: Sequence[str] = ()  # assemblers that the smoke check also uses
    copy_bytes: int | None = None
    matrix_size: int | None = None
    networks: Sequence[Network] = tuple(networks.NETWORKS.values())
    ours: str = "triton"


@dataclasses.dataclass
class Run:
    """State that stages share. ``logs`` is a folder that becomes an archive in the results."""

    report: JoinedReport
    workloads: Sequence[Workload]
    settings: Settings
    worker: Worker
    logs: Path

    def sweeper(self, budget: Budget) -> Sweeper:
        return Sweeper(self.worker, self.settings.where, budget, self.report.ceilings)

    def prepare(self, sweeper: Sweeper) -> None:
        """Compiles kernels and measures the machine's ceilings, unless these are known."""
        if sweeper.ceilings is not None:
            return
        if self.settings.ours == "triton":
            failures = sweeper.warm(self.workloads)
            self.report.remarks += [f"Compiling kernels beforehand: {f}" for f in failures]
        found = sweeper.measure_ceilings(self.settings.copy_bytes, self.settings.matrix_size)
        self.report.remarks.append(self.report.take_ceilings(sweeper.ceilings, found))

    def repeat_warnings(self) -> None:
        """The report repeats what da_triton warned of in its workers."""
        text = self.worker.written()
        for warning in re.findall(r"^.*Warning: (da_triton .*)$", text, re.MULTILINE):
            if warning not in self.report.remarks:
                self.report.remarks.append(warning)


# --- right or wrong -------------------------------------------------------------------------------


def smoke(run: Run, budget: Budget) -> str:
    """Every fused tile at full size against float64, once per assembler."""
    found, said = dict(run.report.environment.get("smoke") or {}), []
    assemblers = (assembler(), *run.settings.ptxas)
    for place, name in enumerate(assemblers):
        log = run.logs / f"smoke-{place}.txt"
        facts = log.with_suffix(".json")
        facts.unlink(missing_ok=True)  # an earlier run's
        options = ["--device", str(run.settings.where.device), "--json", str(facts)]
        environment = dict.fromkeys(PTXAS, name) if place else {}
        limit = budget.left / (len(assemblers) - place)
        ended = isolated([*run.settings.check_command, *options], limit, log, environment)
        status = _smoke_status(ended, facts)
        verdict = CHECKED.get(status, str(ended))
        found[name] = {
            "status": status, "verdict": verdict, "seconds": round(ended.seconds, 1),
            "file": facts.name,
        }  # fmt: skip
        run.report.record(smoke=found)
        said += [f"assembler {name}: {verdict}", *ended.output.strip().splitlines()[-40:]]
    return "\n".join(said)


def _smoke_status(ended: Ended, facts: Path) -> int | None:
    """The exit status, corrected by what the check has written, if it came to that."""
    try:
        verdicts = json.loads(facts.read_text(encoding="utf-8")).get("verdicts", [])
    except (OSError, ValueError):
        # Python ends with 1, too, where a program cannot even be imported.
        return 2 if ended.status in CHECKED else ended.status
    return ended.status if all(verdict["right"] for verdict in verdicts) else 1


def tests(run: Run, budget: Budget) -> str:
    """The package's own tests. No ratio is given unless they pass."""
    command = run.settings.test_command or test_command()
    grace = min(GRACE, 0.4 * budget.left)
    environment = {"COLUMNS": "200", **TEST_ENVIRONMENT}  # pytest cuts its lines at them
    ended = isolated(command, budget.left, run.logs / "tests.txt", environment, grace)
    outcome = outcome_of(ended)
    run.report.record(tests=outcome)
    failing = re.findall(r"^(?:FAILED|ERROR) .*", ended.output, re.MULTILINE)
    more = [f"and {len(failing) - 20} more, in tests.txt"] * (len(failing) > 20)
    return "\n".join([outcome, *failing[:20], *more])


def test_command() -> list[str]:
    """The command for the tests that say more on a GPU, in ``environment.ROOT``.

    It ends after a hundred failures, not after the first: time on a GPU is short. Tests that fill
    the GPU's memory are one group, which pytest-xdist gives to one worker.
    """
    found = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=100", "-rfE",
        "--durations=15", "--gpu", "-m", "not long and not sanitize",
        "--ignore=tests/integrations",  # other libraries' failures say nothing of the kernels
    ]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        found += ["-n", str(max(1, (os.cpu_count() or 1) - 2)), "--dist", "loadgroup"]
    return [*found, "tests"]


def outcome_of(ended: Ended) -> str:
    """One line that begins with ``passed`` only if the tests did."""
    if ended.status is None or ended.interrupted:
        return str(ended)
    return f"failed with {ended}" if ended.status else f"passed: {last_line(ended.output)}"


# --- how fast -------------------------------------------------------------------------------------


def sweep(run: Run, budget: Budget, stage: str) -> str:
    """The groups of providers of a stage, on every workload."""
    rows = []

    def add(found):
        for row in found:
            row["group"] = f"{stage} {row['group']}"
        rows.extend(found)
        run.report.add(found)

    sweeper = run.sweeper(budget)
    run.prepare(sweeper)
    groups = run.settings.sweeps(stage)
    planned = order(stage, run.workloads, len(groups))
    sweeper.run_groups([(w, mode, groups[g], g) for w, mode, g in planned], add)
    return _counted(rows)


eager, compiled = partial(sweep, stage="eager"), partial(sweep, stage="compiled")


def order(
    stage: str, workloads: Sequence[Workload], groups: int
) -> list[tuple[Workload, str, int]]:
    """Workloads with a mode and the number of a group, in the order in which they are measured.

    Every workload is measured in both modes before the next one. Small ones are the last of the
    eager stage; the compiled stage begins with the main groups on the first workloads, then with
    the default mode on all, then with max-autotune.
    """
    works, numbers = list(workloads), range(groups)
    if stage == "compiled":
        works.sort(key=lambda work: [*COMPILED_FIRST, work.name].index(work.name))
        main = [group for group in providers.COMPILED_MAIN if group in numbers]
        turns = [*itertools.product(works[:COMPLETE], main)]
        turns += [(work, group) for group in numbers for work in works]
    else:
        turns = [*itertools.product(works, numbers)]
        turns.sort(key=lambda turn: (turn[0].small, turn[1]))
    return [(work, mode, group) for work, group in dict.fromkeys(turns) for mode in (FORWARD, STEP)]


def _counted(rows) -> str:
    counts = pd.Series([row["status"] for row in rows], dtype=str).value_counts()
    return "\n".join(f"{count} rows {status}" for status, count in counts.items())


def tuning(run: Run, budget: Budget) -> str:
    """Tiles of the workloads that are furthest from their rooflines, for the processes to come."""
    path = run.logs / "tiles.json"
    path.unlink(missing_ok=True)
    names = ",".join(furthest(run.report, run.workloads))
    within = f"{max(1.0, 0.9 * budget.left):.0f}"
    command = [*run.settings.tune_command, "--workload", names, "--budget", within]
    ended = isolated([*command, "--out", str(path)], budget.left, run.logs / "tune.txt")
    said = f"{names}: {ended}"
    if path.exists():  # it is written after each choice
        from . import tune  # which needs Triton

        target = tune.path_of(json.loads(path.read_text(encoding="utf-8"))["gpu"])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        run.worker.close()  # a process reads the table once
        said += f"\nIn use from now on: {target.name}"
    return said if ended.status == 0 else f"failed: {said}"


def furthest(report: Report, workloads: Sequence[Workload]) -> list[str]:
    """Names of those with the smallest shares of the floor; without any, the first ones.

    Not the small ones, where tiles decide little.
    """
    names = [w.name for w in workloads if not w.small] or [w.name for w in workloads]
    frame = pd.DataFrame(report.rows, columns=["workload", "provider", "share_of_floor"])
    ours = frame[frame["provider"].isin(providers.OURS) & frame["workload"].isin(names)]
    shares = ours.dropna().groupby("workload")["share_of_floor"].max().sort_values()
    return list(shares.index[:TUNED]) or names[:TUNED]


# --- the rest -------------------------------------------------------------------------------------


def first_calls(run: Run, budget: Budget) -> str:
    """First calls of da_triton and of a compiled eager block, on the first workload."""
    where, said = run.settings.where, []
    work = run.workloads[0]
    names = [run.settings.ours, "compile eager"]
    for provider in providers.select(names, EAGER, where.device, where.dtype, [NCHW]):
        wanted = (work.name, provider.name, EAGER, NCHW, STEP, OK)
        keys = ("workload", "provider", "launch", "layout", "mode", "status")
        row = next((r for r in run.report.rows if tuple(r[k] for k in keys) == wanted), None)
        if row is None:
            said.append(f"{provider.name} has no step of {work.name} that was timed")
            continue
        try:
            cold, warm = seconds(work, provider, STEP, where.dtype, where.device, budget.left)
        except Exception as error:
            said.append(f"{provider.name} failed: {describe(error)}")
        else:
            row.update(first_call_cold_s=cold, first_call_warm_s=warm)
            said.append(f"{provider.name} {cold:.1f} s, with a warm cache {warm:.1f} s")
    run.report.add([])
    return "; ".join(said)


def cost_against_positions(run: Run, budget: Budget) -> str:
    """Eager and da_triton, as CUDA graphs, in files of their own."""
    where = run.settings.where
    beside = Report(run.report.out, run.report.title, ("time", "ratio"))
    beside.environment, beside.trusts = run.report.environment, run.report.trusts
    launch = GRAPH if where.device.type == "cuda" else EAGER
    wanted = ["eager", run.settings.ours]
    group = providers.select(wanted, launch, where.device, where.dtype, [NCHW])
    sizes, modes = scaling.AXES["L"], [FORWARD, STEP]
    try:
        scaling.run(run.sweeper(budget), "L", sizes, [group], modes, beside)
    finally:
        scaling.finish(beside, "L")
    return _counted(beside.rows)


def whole_networks(run: Run, budget: Budget) -> str:
    rows, sweeper = [], run.sweeper(budget)
    variants = networks.variants(run.settings.ours, run.settings.ours == "triton")
    for network, mode in itertools.product(run.settings.networks, networks.MODES.values()):
        rows += (found := sweeper.group(network, mode, variants))
        run.report.add(found)
    return _counted(rows)


def memory_checks(run: Run, budget: Budget) -> str:
    """A part of ``pytest -m sanitize`` under memcheck, for which every tensor is an allocation."""
    tool = compute_sanitizer()
    if tool is None:
        return "compute-sanitizer is not installed"
    command = [
        tool, "--tool", "memcheck", "--error-exitcode", "86", sys.executable, "-m", "pytest", "-q",
        "-p", "no:cacheprovider", "-m", "sanitize", "-k", "one_tile or block-fused",
        "tests/kernels/test_sanitize.py",
    ]  # fmt: skip
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DA_TRITON_PROVE": "0"}
    ended = isolated(command, budget.left, run.logs / "sanitize.txt", environment)
    found = re.search(r"ERROR SUMMARY: (\d+ errors?)", ended.output)
    return f"{found[1] if found else 'no summary'}, {ended}"


def compute_sanitizer() -> str | None:
    """Its path: from PATH, the CUDA toolkit, or NVIDIA's wheels."""
    places = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", "/opt/cuda/bin"]
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        places += [str(path.parent) for path in Path(folder).rglob("compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*os.get_exec_path(), *places]))


class Stage(NamedTuple):
    name: str
    seconds: float
    run: Callable[[Run, Budget], str]
    title: str


STAGES = (
    Stage("smoke", 60, smoke, "every fused tile at full size against float64, per assembler"),
    Stage("tests", 110, tests, "the package's tests"),
    Stage("eager", 290, eager, "every workload: eager, da_triton and other formulations"),
    Stage("compiled", 560, compiled, "the same beside torch.compile"),
    Stage("tune", 300, tuning, "tiles of the workloads that are furthest from their rooflines"),
    Stage("first", 60, first_calls, "first calls in fresh processes"),
    Stage("scaling", 40, cost_against_positions, "cost against positions"),
    Stage("networks", 100, whole_networks, "a ResNet-50 and a YOLOv8"),
    Stage("memory", 40, memory_checks, "kernels under compute-sanitizer"),
)
