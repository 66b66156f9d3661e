"""What a call costs the host, in a process where kernels are not interpreted."""

import functools
import importlib.util
import time

import pandas as pd
import pytest
import torch

import da_triton
from bench import cli, host
from bench.host import CALL, ISSUE, Measured
from bench.problems import FORWARD, STEP
from bench.workloads import select
from support.processes import python

CPU = torch.device("cpu")
# Fused, and vendor GEMMs around the core, with an odd number of positions.
NAMES = ("small_16_8x8", "small_512_7x7")
CORE = ("gather", "distribute", "double_attention")
LAYERS = ("layer", "functional", "recorded", "operator", "launchers", "launches")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The rows, and what the command printed."""
    out = tmp_path_factory.mktemp("host") / "new"
    command = "-m", "bench", "host", "--seconds", "0", "--out", str(out)
    ran = python(*command, "--workload", ",".join(NAMES), CUDA_VISIBLE_DEVICES="")
    assert ran.returncode == 0, ran.stderr
    assert not ran.stderr
    return pd.read_csv(out / host.FILE), ran.stdout


def test_there_is_a_row_for_everything_that_is_measured(measured):
    frame, _ = measured
    rows = []
    for mode, core in ((FORWARD, CORE), (STEP, ())):
        rows += [("triton", mode, what, ISSUE) for what in (*LAYERS, *core)]
        rows += [("torch", mode, what, CALL) for what in (*LAYERS[:2], *core)]
        rows += [("eager", mode, "layer", kind) for kind in (ISSUE, CALL)]
    found = frame[["workload", "provider", "mode", "what", "measured"]]
    expected = sorted((name, *row) for name in NAMES for row in rows)
    assert sorted(found.itertuples(index=False, name=None)) == expected
    assert (frame["quartile_us"] > 0).all()
    assert (frame["quartile_us"] <= frame["median_us"]).all()
    assert (frame["batches"] == host.ROUNDS[0]).all()
    assert (frame["threads"] == 1).all()
    assert frame["machine"].notna().all()
    row = frame[frame["workload"] == NAMES[0]].iloc[0]
    assert (row["n"], row["c"], row["c_n"], row["positions"]) == (1, 16, 8, "8x8")


@pytest.mark.parametrize("name", NAMES)
def test_launches_are_those_of_the_plan(measured, name):
    frame, _ = measured
    (work,) = select([name], "all")
    plan = da_triton.plan((work.n, work.c, *work.positions), work.c_m, work.c_n).chosen
    forward, backward = (
        sum(step.launches for step in way) for way in (plan.forward, plan.backward)
    )
    rows = frame[(frame["workload"] == name) & (frame["provider"] == "triton")]
    counts = rows.set_index(["mode", "what"])["launches"]
    for what in LAYERS[:-1]:
        assert counts[FORWARD, what] == forward
        assert counts[STEP, what] == forward + backward
    products = 0 if plan.route.gather == "fused" else 2
    assert counts[FORWARD, "launches"] == forward - products  # of kernels
    assert counts[FORWARD, "double_attention"] == sum(counts[FORWARD, what] for what in CORE[:2])


def test_every_layer_costs_more_than_its_launches(measured):
    frame, printed = measured
    rows = frame[frame["provider"] == "triton"].set_index(["workload", "mode", "what"])
    costs_of = rows["quartile_us"].sort_index()
    for name in NAMES:
        for mode in (FORWARD, STEP):
            costs = costs_of[name, mode]
            assert costs["recorded"] < costs["layer"]
            assert max(costs["launches"], costs["recorded"]) < costs["launchers"]
    assert len([line for line in printed.splitlines() if line.startswith("| small_")]) == 16


def test_products_are_replaced_for_a_while():
    a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    start = torch.full((2, 3, 5), 7.0)
    host.NoKernel.launched = 0
    with host.no_products():
        assert torch.bmm(a, b).shape == (2, 3, 5)
        assert torch.baddbmm(start, a, b).shape == (2, 3, 5)
        assert start.baddbmm_(a, b) is start
        assert (a[0] @ b[0]).shape == (3, 5)
        assert torch.addmm(start[0], a[0], b[0], beta=0.5).shape == (3, 5)
    assert host.NoKernel.launched == 5
    assert torch.equal(start, torch.full((2, 3, 5), 7.0))
    assert torch.equal(torch.bmm(a, b), torch.full((2, 3, 5), 4.0))
    assert host.NoKernel.launched == 5


def test_calls_take_turns_in_batches():
    made = []
    calls = [Measured(functools.partial(made.append, name), *[""] * 4) for name in "ab"]
    found = host.in_turns(calls, CPU, 0)
    assert [len(times) for times in found] == [host.ROUNDS[0]] * 2
    turn = host.LARGEST_BATCH + 1  # one of them before the clock starts
    assert "".join(made).endswith(("a" * turn + "b" * turn) * host.ROUNDS[0])


def test_long_calls_have_no_batch():
    long = Measured(lambda: time.sleep(2e-3), *[""] * 4)
    assert host.batch_size(long, CPU) == 1


def test_process_without_triton_is_rejected(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["host"]) == 2
    assert "host` launches kernels, and Triton is not installed" in capsys.readouterr().err
