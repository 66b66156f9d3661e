"""Where the seconds of a GPU run would go; what is known of it without one."""

import pytest
import torch

from bench import cli, estimate
from bench.environment import ROOT
from bench.providers import gpu_sweeps
from bench.stages import STAGES, order
from bench.workloads import WORKLOADS

NAMES = [stage.name for stage in STAGES]


def seconds(*, stages=NAMES, workloads=WORKLOADS, budget=1560.0, cached=True, imports=2.0):
    return estimate.table(stages, workloads, budget, cached, imports).set_index("stage")


def test_parts_add_up_within_the_budget():
    found = seconds()
    parts = found[["imports", "compilation", "checking", "timing", "other"]].sum(axis=1)
    assert parts.to_numpy() == pytest.approx(found["seconds"].to_numpy(), abs=0.4)
    assert (found["seconds"] <= found["budget"] + 0.5).all()
    assert list(found.index) == NAMES
    assert found.loc["eager", "groups"] == 2 * 2 * len(WORKLOADS)


def test_what_the_readme_says_is_reached():
    groups, done = (int(seconds().loc["compiled", name]) for name in ("groups", "done"))
    planned = order("compiled", WORKLOADS, len(gpu_sweeps("compiled")))
    assert len(planned) == groups
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{done} of its {groups} groups" in text
    assert [work.name for work, _, _ in planned[:done]] == ["r50_conv3"] * 6 + ["yolo_p3"] * 5


def test_more_work_takes_longer():
    few, many = (seconds(workloads=WORKLOADS[:n]).loc["eager"] for n in (2, 4))
    assert 1.8 * few["timing"] < many["timing"]
    empty = seconds(cached=False).loc["eager"]
    assert empty["compilation"] > seconds().loc["eager", "compilation"] + 5
    assert seconds(budget=300.0).loc["compiled", "done"] < seconds().loc["compiled", "done"]


def test_timing_has_the_effort_that_runs_have():
    """Groups of a small workload have all their rounds, in no more seconds than allowed."""
    work = next(work for work in WORKLOADS if work.name == "yolo_p5_b1")
    found = seconds(stages=["eager"], workloads=[work], budget=100.0).loc["eager"]
    assert found["done"] == found["groups"] == 4
    assert 0.2 < found["timing"] <= 4 * estimate.EFFORT.seconds


def test_command(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert not torch.cuda.is_available()
    assert cli.main(["gpu", "--estimate", "--stage", "eager", "--budget", "100"]) == 0
    printed = capsys.readouterr().out
    assert "with an empty compile cache: an estimate" in printed
    assert "none of it was measured on a GPU" in printed
    assert all(name in printed for name in estimate.ASSUMED)
