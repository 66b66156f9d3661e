import dataclasses
import functools
import re
import sys

import pandas as pd
import pytest
import torch
from torch import nn

from bench import cli, measure, networks
from bench.measure import CONTEXT_LOST, OK, OUT_OF_TIME, WITHOUT, Budget, Effort
from bench.networks import Network
from bench.problems import FORWARD, STEP
from bench.providers import Provider
from bench.report import Report

CPU = torch.device("cpu")


def small(block):
    layers = [nn.Conv2d(3, 8, 3), *([block(8)] if block else []), nn.Conv2d(8, 2, 3)]
    return nn.Sequential(*layers)


TINY = Network("tiny", small, lambda net, x: net(x).square().mean(), (4, 3, 9, 9), (2, 3, 9, 9))


@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_variants_are_timed_side_by_side(bench, mode):
    rows = bench.measure(TINY, mode, networks.variants("torch", compiled=False))
    assert [row["status"] for row in rows] == [OK] * 6
    assert {row["provider"] for row in rows} == {WITHOUT, "eager", "torch"}
    assert all(row["ratio_to_eager"] == 1.0 for row in rows)
    assert all(row["n"] == 2 for row in rows)
    errors = [row["error"] for row in rows if row["provider"] != WITHOUT]
    assert max(errors) < 1e-4


def test_share_of_the_added_time(bench):
    milliseconds = {WITHOUT: 10.0, "eager": 14.0, "torch": 11.0}
    order = []

    def timer(closure, *, launches_count):
        if closure not in order:
            order.append(closure)
        return list(milliseconds.values())[order.index(closure)]

    bench = dataclasses.replace(bench, timer=timer)
    chosen = [v for v in networks.variants("torch", compiled=False) if not v.channels_last]
    rows = bench.measure(TINY, FORWARD, chosen)
    added = {row["provider"]: row["added"] for row in rows}
    assert added == {WITHOUT: 0.0, "eager": 1.0, "torch": 0.25}


def test_wrong_block_is_not_timed(bench):
    eager = networks.variants("torch", compiled=False)[2]
    setup = functools.partial(networks.Run, block=Twice, compiled=False)
    wrong = Provider("torch", setup)
    good, bad = bench.measure(TINY, FORWARD, [eager, wrong])
    assert good["status"] == OK
    assert bad["status"].startswith("disagrees: relative RMS")
    assert "median_ms" not in bad


class Twice(networks.EagerDoubleAttention):
    def __init__(self, channels):
        super().__init__(channels, channels // 2, channels // 2)

    def forward(self, x):
        return 2 * super().forward(x)


def test_input_that_cannot_be_placed_becomes_rows(bench, monkeypatch):
    """On a GPU whose memory is full."""
    monkeypatch.setattr(measure, "usable", lambda device: True)
    bench = dataclasses.replace(bench, device=torch.device("cuda"))
    network = dataclasses.replace(TINY, shape=TINY.cpu_shape)
    rows = bench.measure(network, FORWARD, networks.variants("torch", False))
    assert len(rows) == 6
    assert all(row["status"].startswith("failed: ") for row in rows)


def test_lost_context_ends_the_group(bench, monkeypatch):
    """Neither those before nor those after it can be timed in this process."""
    calls = []

    def breaks(block):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return small(block)

    monkeypatch.setattr(measure, "usable", lambda device: len(calls) < 3)
    network = dataclasses.replace(TINY, make=breaks)
    rows = bench.measure(network, FORWARD, networks.variants("torch", False))
    failed = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [row["status"] for row in rows] == [*[CONTEXT_LOST] * 2, failed, *[CONTEXT_LOST] * 3]
    assert len(calls) == 3


def test_networks_have_no_model(bench, tmp_path, tiny, eager):
    """A report of both blocks and networks, timed on a GPU, compares only blocks with the model."""
    block = bench.measure(tiny, FORWARD, [dataclasses.replace(eager, name="triton")])
    rows = bench.measure(TINY, FORWARD, networks.variants("torch", False))
    report = Report(tmp_path, "both", png=False)
    report.add([row | {"device": "cuda", "provider": "triton"} for row in (*block, *rows)])
    report.finish(short=True)
    text = (tmp_path / "report.md").read_text()
    (section,) = re.findall(r"## Model against measurement.*?\n## ", text, re.DOTALL)
    assert section.count("\n| ") == 2  # the head, and the block


def test_library_that_is_missing_becomes_rows(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    rows = bench.measure(networks.NETWORKS["resnet50"], FORWARD, networks.variants("torch", False))
    assert all("torchvision" in row["status"] for row in rows)


def test_used_up_budget(bench):
    bench = dataclasses.replace(bench, budget=Budget(0))
    rows = bench.measure(TINY, FORWARD, networks.variants("torch", False))
    assert {row["status"] for row in rows} == {OUT_OF_TIME}


@pytest.mark.parametrize(("name", "blocks"), [("resnet50", 5), ("yolov8n", 1)])
def test_real_networks(bench, name, blocks):
    """Small pictures; the variants have the same parameters and give the same answers."""
    network = dataclasses.replace(networks.NETWORKS[name], cpu_shape=(2, 3, 64, 64))
    makes = networks.eager_block, functools.partial(networks.our_block, backend="torch")
    eager, ours = map(network.make, makes)
    assert eager.state_dict().keys() == ours.state_dict().keys()
    assert sum(isinstance(m, networks.NearIdentity) for m in ours.modules()) == blocks
    for mode in (FORWARD, STEP):
        chosen = [v for v in networks.variants("torch", False) if not v.channels_last]
        rows = bench.measure(network, mode, chosen)
        assert [row["status"] for row in rows] == [OK] * 3
        assert max(row.get("error", 0.0) for row in rows) < 1e-3


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "NETWORKS", {"tiny": TINY})
    monkeypatch.setattr(cli, "DEFAULT", Effort(0, 1, 1, seconds=0.0))
    assert cli.main(["networks", "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert (frame["status"] == OK).all()
    assert len(frame) == 2 * 6
    assert "tiny" in capsys.readouterr().out
