import sys

import pytest
import torch

from bench import workloads
from bench.measure import OK
from bench.problems import FORWARD
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
    for work in small:
        assert work.selection == "default"
        assert work.cpu_n == work.n


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
    assert tiny.batch(CPU) == 2
    assert tiny.batch(torch.device("cuda")) == 4
    assert tiny.features(CPU, seed=0).shape == (2, 8, 4, 5)


def test_features_are_reproducible(tiny):
    first, again, other = (tiny.features(CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_photograph_features():
    pytest.importorskip("sklearn")
    (photo,) = (w for w in WORKLOADS if w.photographs)
    china, again, flower = (photo.features(CPU, seed) for seed in (0, 0, 1))
    assert china.shape == flower.shape == (1, photo.c, *photo.positions)
    assert torch.equal(china, again)
    assert not torch.equal(china, flower)
    assert china.mean().abs() < 1e-4
    assert 0.9 < china.std() < 1.1


def test_missing_photograph_is_a_row(bench, eager, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    (photo,) = (w for w in WORKLOADS if w.photographs)
    (row,) = bench.measure(photo, FORWARD, [eager])
    assert row["status"] != OK
    assert "needs scikit-learn" in row["status"]
