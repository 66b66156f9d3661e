import sys

import pytest
import torch

from bench import workloads
from bench.workloads import WORKLOADS, UsageError, select

CPU = torch.device("cpu")


def test_table_is_consistent():
    assert len({w.name for w in WORKLOADS}) == len(WORKLOADS)
    for w in WORKLOADS:
        assert w.c_m % w.heads == 0
        assert w.c_n % w.heads == 0
        assert 1 <= w.cpu_n <= w.n
        assert w.selection in workloads.SELECTIONS


def test_selections_grow():
    quick, default, everything = (select([], s) for s in workloads.SELECTIONS)
    assert set(quick) < set(default) < set(everything)
    assert everything == list(WORKLOADS)
    assert any(w.photographs for w in quick)


def test_small_workloads_are_in_the_default_selection_and_have_one_batch():
    small = [w for w in WORKLOADS if w.small]
    assert len(small) == 8
    assert all(w.selection == "default" and w.cpu_n == w.n for w in small)


def test_named_workloads_in_table_order(table):
    chosen = select(["tiny_volume", "tiny"], "quick")
    assert [w.name for w in chosen] == ["tiny", "tiny_volume"]


@pytest.mark.parametrize(
    ("name", "near"), [("yolo_p3b1", "yolo_p3_b1"), ("r50conv3", "r50_conv3"), ("r50", "r50_conv4")]
)
def test_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        select([name], "default")


def test_batch_depends_on_the_device(tiny):
    assert (tiny.batch(CPU), tiny.batch(torch.device("cuda"))) == (2, 4)


@pytest.mark.parametrize("name", ["small_64_14x14_n8", "photo_china"])
def test_features(name):
    pytest.importorskip("sklearn")
    (work,) = select([name], "all")
    first, again, other = (work.features(CPU, seed) for seed in (0, 0, 1))
    assert first.shape == other.shape == (work.cpu_n, work.c, *work.positions)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.mean().abs() < (1e-4 if work.photographs else 1e-2)
    assert 0.9 < first.std() < 1.1


def test_input_that_cannot_be_made_becomes_rows(measured, eager, variant, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    rows = measured([eager, variant("other")], workload=select(["photo_china"], "all")[0])
    assert len(rows) == 2
    assert all("needs scikit-learn" in row["status"] for row in rows)
