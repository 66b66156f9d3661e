"""Whole networks: their variants, their rows, and the command. Failures are those of any group."""

import dataclasses
import functools
import re
import sys

import pandas as pd
import pytest
import torch

from bench import cli, networks
from bench.measure import OK, WITHOUT, Effort
from bench.networks import Network
from bench.problems import FORWARD, STEP
from bench.providers import NCHW, Provider
from bench.report import Report
from support import fakes

TINY = Network("tiny", fakes.small_network, fakes.loss, (4, 3, 9, 9), (2, 3, 9, 9))
VARIANTS = networks.variants("torch", compiled=False)  # without a block, eager and ours
IN_NCHW = [variant for variant in VARIANTS if variant.layout == NCHW]


class Twice(networks.EagerDoubleAttention):
    def __init__(self, channels):
        super().__init__(channels, channels // 2, channels // 2)

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_variants_are_timed_in_turns(measured, mode):
    rows = measured(VARIANTS, mode, TINY)
    assert [row["status"] for row in rows] == [OK] * 6
    assert {row["provider"] for row in rows} == {WITHOUT, "eager", "torch"}
    assert all(row["ratio_to_eager"] == 1.0 for row in rows)
    assert all(row["n"] == 2 for row in rows)
    assert max(row["error"] for row in rows if row["provider"] != WITHOUT) < 1e-4


def test_cudnn_searches_for_networks(measured):
    seen = []

    def make(block):
        seen.append(torch.backends.cudnn.benchmark)
        return fakes.small_network(block)

    measured(VARIANTS, workload=dataclasses.replace(TINY, make=make))
    assert seen == [True] * 6


def test_share_of_the_added_time(measured):
    milliseconds = iter([10.0, 14.0, 11.0])  # without a block, eager, torch
    once = Effort(0, 1, 1, 0.0)
    timer = lambda closure, *, launches_count: next(milliseconds)  # noqa: E731
    rows = measured(IN_NCHW, workload=TINY, timer=timer, effort=once)
    added = {row["provider"]: row["added"] for row in rows}
    assert added == {WITHOUT: 0.0, "eager": 1.0, "torch": 0.25}


def test_wrong_block_is_not_timed(measured):
    wrong = Provider("torch", functools.partial(networks.Run, block=Twice, compiled=False))
    good, bad = measured([IN_NCHW[1], wrong], workload=TINY)
    assert good["status"] == OK
    assert bad["status"].startswith("disagrees: relative RMS")
    assert "median_ms" not in bad


def test_library_that_is_missing_becomes_rows(measured, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    rows = measured(VARIANTS, workload=networks.NETWORKS["resnet50"])
    assert all("torchvision" in row["status"] for row in rows)


def test_networks_have_no_model(measured, tmp_path, variant):
    """A report of both blocks and networks, timed on a GPU, compares only blocks with the model."""
    rows = [*measured([variant("triton")]), *measured(VARIANTS, workload=TINY)]
    report = Report(tmp_path, "both", png=False)
    report.add([row | {"device": "cuda", "provider": "triton"} for row in rows])
    report.finish(short=True)
    text = (tmp_path / "report.md").read_text()
    (section,) = re.findall(r"## Model against measurement.*?\n## ", text, re.DOTALL)
    assert section.count("\n| ") == 2  # the head, and the block


@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 5), ("yolov8n", 1)])
def test_real_networks(measured, name, blocks):
    """Small images; the variants have the same parameters and give the same answers."""
    network = dataclasses.replace(networks.NETWORKS[name], cpu_shape=(2, 3, 64, 64))
    makes = networks.eager_block, functools.partial(networks.our_block, backend="torch")
    eager, ours = map(network.make, makes)
    assert eager.state_dict().keys() == ours.state_dict().keys()
    assert sum(isinstance(m, networks.WithBlock) for m in ours.modules()) == blocks
    for mode in (FORWARD, STEP):
        rows = measured(IN_NCHW, mode, network)
        assert [row["status"] for row in rows] == [OK] * 3
        assert max(row.get("error", 0.0) for row in rows) < 1e-3


def test_command(tmp_path, monkeypatch, capsys, in_this_process):
    monkeypatch.setattr(networks, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(cli, "DEFAULT", Effort(0, 1, 1, seconds=0.0))
    assert cli.main(["networks", "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert (frame["status"] == OK).all()
    assert len(frame) == 2 * 6
    assert "tiny" in capsys.readouterr().out
