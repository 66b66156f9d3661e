import dataclasses
import json
import sys

import pandas as pd
import pytest
import torch

from bench import ceilings, gpu, networks, providers
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

    def run(
        test_command=PASSING, seconds=1e9, sweeps=(uncaptured, plain), clock=None, afterwards=()
    ):
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
            afterwards=afterwards,
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


def test_what_comes_after_has_time_of_its_own(run, capsys, timer):
    """A sweep that would use everything up leaves a quarter; what then has none is named."""
    late_by = [0]

    def clock():
        return 10 * len(timer.calls) + late_by[0]

    def early(report, bench, workloads):
        assert bench.budget.left > 0
        report.notes.append("the first part ran")
        late_by[0] += 1e6

    def late(report, bench, workloads):
        raise AssertionError

    _, frame = run(seconds=1000, clock=clock, afterwards=(early, late))
    assert OUT_OF_TIME in set(frame["status"])
    printed = capsys.readouterr().out
    assert "the first part ran" in printed
    assert "Not run for lack of time: late." in printed


def test_parts_that_come_after(run, tmp_path, monkeypatch, table):
    """On the CPU, with the torch backend for Triton."""
    real = providers.select

    def select(names, launch, *rest):
        return real([n.replace("triton", "torch") for n in names], "eager", *rest)

    monkeypatch.setattr(gpu.providers, "select", select)
    monkeypatch.setattr(gpu, "seconds", lambda *args: (2.0, 1.0))
    monkeypatch.setitem(gpu.scaling.AXES, "L", [8, 16, 32])
    original = networks.variants
    monkeypatch.setattr(networks, "variants", lambda *_: original("torch", False))
    network = networks.Network(
        "net", lambda block: torch.nn.Sequential(*([block(4)] if block else [torch.nn.ReLU()])),
        lambda net, x: net(x).square().mean(), (1, 4, 5, 5), (1, 4, 5, 5),
    )  # fmt: skip
    monkeypatch.setattr(networks, "NETWORKS", {"net": network})
    _, frame = run(afterwards=gpu.AFTERWARDS)
    called = frame.dropna(subset="first_call_cold_s")
    assert set(called["provider"]) == {"torch"}
    assert set(called["workload"]) == {table[0].name}
    scaled = pd.read_csv(tmp_path / "scaling" / "scaling.csv")
    assert set(scaled["size"]) == {8, 16, 32}
    assert (scaled["status"] == OK).all()
    nets = frame[frame["workload"] == "net"]
    assert len(nets) == 2 * 6


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
