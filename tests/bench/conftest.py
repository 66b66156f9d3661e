import dataclasses
import os

import pytest
import torch

from bench import providers
from bench.environment import ROOT
from bench.measure import Bench, Budget, Effort
from bench.workloads import Workload
from support.fakes import ScriptedTimer

TINY = Workload("tiny", 4, 8, (4, 5), 4, 4, 2, "test", cpu_n=2, selection="quick")
TINY_VOLUME = Workload("tiny_volume", 1, 6, (3, 4, 2), 3, 2, 1, "test", selection="default")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def children(monkeypatch):
    """Child processes import this package and ``support``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def table():
    return (TINY, TINY_VOLUME)


@pytest.fixture
def eager():
    """The baseline in NCHW."""
    return next(p for p in providers.plain("torch") if p.baseline and not p.channels_last)


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
def variant(eager):
    """Providers made from the baseline: another name, setup or launch mode; not a baseline."""

    def make(name, setup=None, **changes):
        changes = {"baseline": False, "setup": setup or eager.setup, **changes}
        return dataclasses.replace(eager, name=name, **changes)

    return make
