import dataclasses
import json
import sys

import pandas as pd
import pytest
import torch

from bench import ceilings, providers
from bench.gpu import run_gpu, run_tests
from bench.measure import OK, OUT_OF_TIME, Budget, Effort
from bench.providers import GRAPH

CPU = torch.device("cpu")
PASSING = (sys.executable, "-c", "print('3 passed in 1s')")
FAILING = (sys.executable, "-c", "print('1 failed in 1s'); raise SystemExit(1)")


@pytest.fixture
def run(tmp_path, table, timer):
    """The GPU flow on the CPU: the torch backend stands for Triton, nothing is captured."""
    plain = providers.plain("torch")
    uncaptured = [dataclasses.replace(p, launch=GRAPH) for p in plain]

    def run(test_command=PASSING, seconds=1e9, sweeps=(uncaptured, plain), clock=None):
        code = run_gpu(
            tmp_path,
            table,
            Budget(seconds, **({"clock": clock} if clock else {})),
            device=CPU,
            timer=timer,
            sweeps=sweeps,
            test_command=test_command,
            effort=Effort(warm_up=1, rounds_min=2, rounds_max=2, seconds=0.0),
            copy_bytes=1024,
            matrix_size=16,
        )
        return code, pd.read_csv(tmp_path / "results.csv")

    return run


def test_whole_flow(run, tmp_path, capsys):
    code, frame = run()
    assert code == 0
    assert (frame["status"] == OK).all()
    assert frame.groupby(["workload", "mode", "launch"]).size().eq(4).all()
    assert len(frame) == 2 * 2 * 2 * 4
    assert frame["dtype"].eq("bfloat16").all()
    assert frame["ratio_to_eager"].notna().all()
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["tests"] == "passed: 3 passed in 1s"
    assert set(facts["ceilings"]) == {"copy GB/s", "bfloat16 TFLOP/s"}
    printed = capsys.readouterr().out
    assert "geometric mean" in printed
    assert "Ceilings: copy GB/s" in printed
    assert (tmp_path / "bars.png").stat().st_size > 0


def test_no_ratio_while_tests_fail(run, tmp_path, capsys):
    code, frame = run(FAILING)
    assert code == 1
    assert frame["ratio_to_eager"].isna().all()
    assert frame["median_ms"].notna().all()
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].startswith("THE TESTS DID NOT PASS")
    assert "1 failed in 1s" in printed
    assert "geometric mean" not in printed
    assert "x eager" not in (tmp_path / "report.md").read_text()


def test_failing_provider_does_not_end_the_run(run, variant, capsys):
    def fails(problem):
        raise RuntimeError("out of memory")

    code, frame = run(sweeps=[[*providers.plain("torch"), variant("bad", fails)]])
    assert code == 0
    assert (frame["status"] == OK).sum() == 16
    assert "bad (eager launch), 4x, first tiny: failed: RuntimeError: out of memory" in (
        capsys.readouterr().out
    )


def test_used_up_budget_leaves_what_was_measured(run, capsys):
    ticks = iter(range(10**6))
    code, frame = run(seconds=40, clock=lambda: next(ticks))
    assert code == 0
    assert set(frame["status"]) == {OK, OUT_OF_TIME}
    assert frame["status"].iloc[0] == OK
    assert frame["status"].iloc[-1] == OUT_OF_TIME
    printed = capsys.readouterr().out
    assert OUT_OF_TIME in printed
    assert "geometric mean" in printed


def test_slow_tests_are_stopped(tmp_path):
    log = tmp_path / "tests.txt"
    endless = (sys.executable, "-c", "import time; time.sleep(60)")
    assert run_tests(endless, 0.2, log) == "stopped after 0 s"
    assert run_tests(FAILING, 60, log) == "failed with exit status 1: 1 failed in 1s"
    assert log.read_text() == "1 failed in 1s\n"


def test_ceiling_that_fails_is_told():
    def timer(closure, *, launches_count):
        raise MemoryError("too large")

    found, rates = ceilings.measure(timer, CPU, torch.bfloat16, 1024, 16)
    assert found is None
    assert set(rates.values()) == {"failed: MemoryError: too large"}


def test_ceilings_from_times(timer):
    found, rates = ceilings.measure(timer, CPU, torch.bfloat16, 4_000_000, 1000)
    assert rates == {"copy GB/s": 4.0, "bfloat16 TFLOP/s": 1.0}
    assert (found.bandwidth, found.matrix_rate) == (4e9, 1e12)
