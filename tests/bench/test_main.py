import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from bench import __main__ as cli
from bench.measure import OK, Effort


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(cli, "DEFAULT", Effort(0, 2, 2, seconds=0.0))
    monkeypatch.setattr(cli, "QUICK", Effort(0, 1, 1, seconds=0.0))


@pytest.fixture
def without_compiling(monkeypatch):
    """The sweep of a CPU with the compiled block replaced by the eager one."""

    def sweep():
        found = original()
        return [dataclasses.replace(p, setup=found[0].setup) if p.compiles else p for p in found]

    original = cli.providers.cpu_sweep
    monkeypatch.setattr(cli.providers, "cpu_sweep", sweep)


def test_run_without_arguments(table, tmp_path, capsys, without_compiling):
    assert cli.main(["--out", str(tmp_path)], table) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(frame["workload"]) == {"tiny", "tiny_volume"}
    assert set(frame["mode"]) == {"forward", "forward+backward"}
    assert set(frame["provider"]) == {
        "eager",
        "eager channels_last",
        "torch",
        "torch channels_last",
        "compile eager",
        "compile eager channels_last",
    }
    assert (frame["status"] == OK).all()
    ratios = ["ratio_to_eager", "ratio_same_format", "ratio_to_compiled"]
    assert (frame[ratios] > 0).all().all()
    assert (frame["repetitions"] == 2).all()
    assert (frame["n"][frame["workload"] == "tiny"] == 2).all()
    printed = capsys.readouterr().out
    assert "Triton latencies need a GPU" in printed
    assert "Triton latencies need a GPU" in (tmp_path / "report.txt").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {
        "environment.json",
        "report.txt",
        "results.csv",
        "results.png",
    }


def test_quick_takes_fewest(table, tmp_path):
    assert cli.main(["--quick", "--out", str(tmp_path)], table) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(frame["workload"]) == {"tiny"}
    assert (frame["repetitions"] == 1).all()


def test_named_workload(table, tmp_path):
    options = ["--workload", "tiny_volume", "--out", str(tmp_path), "--quick"]
    assert cli.main(options, table) == 0
    assert set(pd.read_csv(tmp_path / "results.csv")["workload"]) == {"tiny_volume"}


def test_unknown_workload_exits_with_2(table, tmp_path, capsys):
    assert cli.main(["--workload", "tiny_volum", "--out", str(tmp_path / "o")], table) == 2
    assert "did you mean 'tiny_volume'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_busy_machine_is_told(table, tmp_path, capsys, monkeypatch):
    facts = cli.environment(torch.device("cpu")) | {"load": 100.0}
    monkeypatch.setattr(cli, "environment", lambda device: facts)
    cli.main(["--quick", "--out", str(tmp_path)], table)
    assert "The machine was busy (load 100.0" in capsys.readouterr().out


def test_gpu_without_a_gpu_exits_with_2(tmp_path, capsys):
    assert cli.main(["gpu", "--out", str(tmp_path / "o")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert "needs a CUDA GPU" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "o").exists()


def test_gpu_passes_budget_and_all_workloads(table, tmp_path, monkeypatch):
    asked = {}

    def run_gpu(out, workloads, budget):
        asked.update(out=out, workloads=workloads, seconds=budget.seconds)
        return 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "run_gpu", run_gpu)
    assert cli.main(["gpu", "--budget", "90", "--out", str(tmp_path)], table) == 7
    assert asked == {"out": tmp_path, "workloads": list(table), "seconds": 90}


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_told_otherwise(given):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    program = "import sys, bench, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    root = Path(cli.__file__).parent.parent
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [given or "PASSIVE", "False"]
