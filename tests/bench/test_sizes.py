import sys

import pandas as pd
import pytest
import torch
from torch import nn

from bench import __main__ as cli
from bench import pages, sizes

pytest.importorskip("torchvision")
C3, C4, L3, L4 = 512, 1024, 28 * 28, 14 * 14


@pytest.fixture(scope="module")
def table():
    return sizes.table()


@pytest.fixture(scope="module")
def counted(table):
    return table.set_index("network").drop(columns="input")


def parameters_of_block(c, k):
    """A, B, V and the reconstruction with their biases, and the normalisation's two factors."""
    return (c * k + k) + 2 * (c * k + k) + (k * c + c) + 2 * c


def multiply_adds_of_block(c, k, positions):
    """A, B and V; the gather; the distribution; the reconstruction."""
    return positions * (3 * c * k + k * k + k * k + k * c)


def test_committed_table_is_what_is_counted(table):
    committed = pd.read_csv(pages.RESULTS / sizes.FILE)
    pd.testing.assert_frame_equal(committed, table, check_dtype=False)


@pytest.mark.parametrize(("name", "share"), [("A²-ResNet-50", 2), ("A²-ResNet-50, c = C/4", 4)])
def test_five_blocks_as_counted_by_hand(counted, name, share):
    """Two blocks on conv3, three on conv4."""
    added = counted.loc[name] - counted.loc["ResNet-50"]
    k3, k4 = C3 // share, C4 // share
    parameters = 2 * parameters_of_block(C3, k3) + 3 * parameters_of_block(C4, k4)
    assert added["parameters"] == parameters
    products = 2 * multiply_adds_of_block(C3, k3, L3) + 3 * multiply_adds_of_block(C4, k4, L4)
    assert added["multiply_adds"] == products


def test_deeper_networks_have_the_same_blocks(counted):
    counts = counted[["parameters", "multiply_adds"]]
    added = [counts.loc[f"A²-ResNet-{n}"] - counts.loc[f"ResNet-{n}"] for n in (50, 101, 152)]
    assert added[0].equals(added[1])
    assert added[0].equals(added[2])


def test_video_blocks_see_eight_frames(counted):
    """The products of the network without blocks are those of its inflated convolutions."""
    from da_triton import integrations

    with torch.device("meta"):
        network = integrations.a2_resnet50_video(order="AZ")
    blocks = [m for m in network.modules() if isinstance(m, integrations.ResidualDoubleAttention)]
    assert len(blocks) == 5
    for block in blocks:
        block.forward = lambda x: x
    _, without = sizes.count(network, sizes.CLIP)
    products = 2 * multiply_adds_of_block(C3, C3 // 2, 8 * L3)
    products += 3 * multiply_adds_of_block(C4, C4 // 2, 8 * L4)
    assert counted.loc["A²-ResNet-50, video", "multiply_adds"] - without == products


def test_published_figures(counted):
    ours = counted.loc[sizes.A2_RESNET50]
    assert ours["parameters"] == pytest.approx(ours["quoted_m"] * 1e6, rel=0.005)
    assert ours["multiply_adds"] == pytest.approx(ours["quoted_g"] * 1e9, rel=0.03)
    others = counted.loc[["ResNet-50", "ResNet-101", "ResNet-152"]]
    assert others["parameters"].to_numpy() == pytest.approx(others["quoted_m"] * 2**20, rel=2e-4)
    quoted = others["quoted_g"] * 2**30
    assert others["multiply_adds"].to_numpy() == pytest.approx(quoted.to_numpy(), rel=0.015)


def test_count_of_one_layer():
    assert sizes.count(nn.Conv2d(3, 8, 3), (3, 10, 12)) == (3 * 8 * 9 + 8, 3 * 8 * 9 * 8 * 10)


def test_command(tmp_path, capsys, table, monkeypatch):
    monkeypatch.setattr(sizes, "table", lambda: table)
    path = tmp_path / "sizes.csv"
    assert cli.main(["sizes", "--csv", str(path)]) == 0
    assert path.read_bytes() == (pages.RESULTS / sizes.FILE).read_bytes()
    assert "| A²-ResNet-50 | 3×224×224 | 32.92 | 6.66 | 33.00 | 6.50 |" in capsys.readouterr().out


def test_command_without_torchvision(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert cli.main(["sizes", "--csv", str(tmp_path / "sizes.csv")]) == 2
    assert "pip install torchvision" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
