"""``python -m bench gpu``: runs stages within a budget.

It always writes a report, even if a stage crashes.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import warm
from .environment import environment, gpu
from .isolation import Worker, terminable
from .joined import JoinedReport
from .measure import Budget
from .observe import describe
from .report import INTERRUPTED
from .stages import Run, Settings, Stage
from .workloads import Workload

FINISH = 10.0  # seconds that the report and its plots have at the end


def run_gpu(
    out: Path,
    workloads: Sequence[Workload],
    budget: Budget,
    stages: Sequence[Stage],
    settings: Settings,
) -> int:
    """Runs stages and prints the short report; 1 if kernels, tests or a stage failed, else 0.

    Each stage has a share of what is left, by its default seconds.
    """
    failed = False
    reserved = min(FINISH, 0.1 * budget.seconds)
    with terminable(), tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        report = _report(out, logs, environment(settings.where.device) | _warm_cache())
        name = (report.environment.get("gpu") or {}).get("name", settings.where.device.type)
        report.title = f"Double attention on {name}, bfloat16"
        number = len([*logs.glob("worker-*.txt")])  # of earlier invocations
        worker = Worker(logs / f"worker-{number}.txt")
        run = Run(report, workloads, settings, worker, logs)
        try:
            for place, stage in enumerate(stages):
                left = max(0.0, budget.left - reserved)
                share = left * stage.seconds / sum(s.seconds for s in stages[place:])
                failed |= not _run_stage(run, stage, Budget(share, budget.clock))
        except KeyboardInterrupt:
            report.remarks.append(INTERRUPTED)
        finally:
            worker.close()
            used = round(budget.seconds - budget.left, 1)
            report.record(gpu_afterwards=gpu(), seconds_used=used)
            print(report.written())
    return int(failed)


def _run_stage(run: Run, stage: Stage, budget: Budget) -> bool:
    """Returns True if the stage succeeded. Its seconds and its result are recorded and printed."""
    start, result = time.monotonic(), "interrupted"
    try:
        result = stage.run(run, budget) if budget.left > 0 else "not run, for lack of time"
    except Exception as error:
        (run.logs / f"{stage.name}-error.txt").write_text(traceback.format_exc())
        result = f"failed: {describe(error)}"
    finally:
        run.repeat_warnings()
        seconds = round(time.monotonic() - start, 1)
        recorded = run.report.environment
        done = {stage.name: {"seconds": seconds, "result": result}}
        run.report.record(stages=(recorded.get("stages") or {}) | done)
    print(f"== {stage.name}: {seconds} s\n{result}\n", flush=True)
    run.report.written()
    return {
        "smoke": all(x["status"] == 0 for x in recorded.get("smoke", {}).values()),
        "tests": str(recorded.get("tests")).startswith("passed"),
    }.get(stage.name, True) and not result.startswith("failed: ")


def _report(out: Path, logs: Path, facts: dict[str, Any]) -> JoinedReport:
    """The report of a folder. Where earlier results cannot be read or are of other code, they are
    left as they are, and the report is in a folder inside."""
    problems = []
    for folder in (out, out / str(facts["code"])):
        try:
            report = JoinedReport(folder, "", logs, facts)
            break
        except Exception as error:
            problems.append(f"Earlier results in {folder} are not joined: {describe(error)}")
            for path in logs.iterdir():  # what could be unpacked
                path.unlink()
    else:
        report = JoinedReport(Path(tempfile.mkdtemp(prefix="new-", dir=out)), "", logs, facts)
    report.remarks += [f"{problem}. These are in {report.out}." for problem in problems]
    return report


def _warm_cache() -> dict[str, Any]:
    """Checks and relocates a prebuilt compile cache; facts about it."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR", ""))
    if not os.environ.get("TRITON_CACHE_DIR") or not (folder / warm.FILE).exists():
        return {}
    try:
        warm.relocate(folder)
        found = "; ".join(warm.differences(folder)) or "of this Triton and these kernels"
    except Exception as error:
        found = f"failed: {describe(error)}"
    return {"warm_cache": found}
