import dataclasses
import os
import sys

import pandas as pd
import pytest
import torch

from bench import cli, networks, providers, stages, workloads
from bench.environment import ROOT
from bench.gpu import run_gpu
from bench.measure import Bench, Budget, Effort
from bench.problems import FORWARD
from bench.providers import NCHW
from bench.stages import STAGES, Settings
from bench.workloads import Workload
from support import fakes
from support.fakes import ScriptedTimer
from support.gpu_run import CHECK, PASSING, TUNE, WHERE, uncaptured

TINY = Workload("tiny", 4, 8, (4, 5), 4, 4, 2, cpu_n=2, selection="quick")
TINY_VOLUME = Workload("tiny_volume", 1, 6, (3, 4, 2), 3, 2, selection="default")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def children(monkeypatch):
    """Child processes import this package and ``support``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


@pytest.fixture
def in_this_process(monkeypatch):
    """Commands measure without a process of their own, unless a test needs one."""
    monkeypatch.setattr(cli, "Worker", fakes.ThisProcess)


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(workloads, "WORKLOADS", (TINY, TINY_VOLUME))
    return workloads.WORKLOADS


@pytest.fixture
def eager():
    """The baseline in NCHW."""
    return next(p for p in providers.plain("torch") if p.baseline and p.layout == NCHW)


@pytest.fixture
def timer():
    return ScriptedTimer(3.0, 1.0, 2.0)


@pytest.fixture
def bench(timer):
    """Three rounds on the CPU in float32 with scripted times."""
    effort = Effort(warm_up=1, rounds_min=3, rounds_max=3, seconds=0.0)
    budget = Budget(float("inf"))
    return Bench(torch.device("cpu"), torch.float32, timer, effort, budget)


@pytest.fixture
def measured(bench, tiny):
    """The rows of a group, with changes to the bench."""

    def measured(group, mode=FORWARD, workload=tiny, **changes):
        return dataclasses.replace(bench, **changes).measure(workload, mode, group)

    return measured


@pytest.fixture
def variant(eager):
    """Providers made from the baseline: another name, setup or launch mode; not a baseline."""

    def make(name, setup=None, **changes):
        changes = {"baseline": False, "setup": setup or eager.setup, **changes}
        return dataclasses.replace(eager, name=name, **changes)

    return make


@pytest.fixture
def settings(monkeypatch, children, tmp_path):
    """The settings of a CPU: the torch backend in Triton's place, nothing captured, small sizes."""
    monkeypatch.setitem(stages.scaling.AXES, "L", [8, 16, 32])
    base = dataclasses.replace(stages.scaling.BASE, c=8, c_m=4, c_n=4)
    monkeypatch.setattr(stages.scaling, "BASE", base)
    monkeypatch.setattr(stages, "seconds", lambda *args: (2.0, 1.0))
    monkeypatch.setattr(stages, "compute_sanitizer", lambda: None)
    monkeypatch.setattr("bench.tune.path_of", lambda gpu: tmp_path / "data" / f"{gpu}.json")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    plain = [p for p in providers.plain("torch") if p.layout == NCHW]
    network = networks.Network("net", fakes.small_network, fakes.loss, (2, 3, 9, 9), (2, 3, 9, 9))
    return Settings(
        where=WHERE,
        sweeps=lambda stage: [uncaptured(plain), plain] if stage == "eager" else [plain],
        check_command=(sys.executable, "-c", CHECK),
        test_command=PASSING,
        tune_command=(sys.executable, "-c", TUNE),
        copy_bytes=1024,
        matrix_size=16,
        networks=(network,),
        ours="torch",
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(out, table, settings):
    """Runs stages, named or a test's own; returns the exit status and the results, if any."""
    known = {stage.name: stage for stage in STAGES}

    def run(*stages, seconds=1e9, workloads=table, **changes):
        chosen = [known.get(stage, stage) for stage in stages]
        made = dataclasses.replace(settings, **changes)
        code = run_gpu(out, workloads, Budget(seconds), chosen, made)
        path = out / "results.csv"
        return code, pd.read_csv(path) if path.exists() else None

    return run
