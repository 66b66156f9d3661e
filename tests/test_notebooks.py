"""Every notebook runs top to bottom and reproduces its committed outputs."""

import importlib.util
import re
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """Text of a cell, without images and object values."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def test_notebooks_are_numbered_one_to_five():
    assert [path.stem[:3] for path in NOTEBOOKS] == ["01_", "02_", "03_", "04_", "05_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_says_the_same(path, monkeypatch):
    committed = nbformat.read(path, as_version=4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    # Warnings of torch 2.11 itself, in torch.export.load and torch.onnx.export.
    theirs = "ignore:The given buffer is not writable,ignore:`isinstance(treespec, LeafSpec)`"
    monkeypatch.setenv("PYTHONWARNINGS", theirs)
    fresh = nbformat.read(path, as_version=4)
    NotebookClient(
        fresh, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    ).execute()
    for then, now in zip(code_cells(committed), code_cells(fresh), strict=True):
        assert "stderr" not in {out.get("name") for out in now.outputs}, now.source
        if "varies" not in then.metadata.get("tags", []):
            assert printed(now) == printed(then), then.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_one_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs) or (
        path.stem.startswith("04")
    )
    assert path.stat().st_size < 1.5e6
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|opt)/", re.sub(r'"image/png": ".*?"', "", text))


@pytest.fixture(scope="module")
def maps():
    """The notebooks' module, on a canvas without a screen."""
    matplotlib.use("Agg")
    spec = importlib.util.spec_from_file_location("maps", ROOT / "notebooks" / "maps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.plt.close("all")


def weights(n=4, height=2, width=3):
    """Attention maps and distribution weights ``(n, height, width)``."""
    gathered, received = torch.randn(2, n, height, width)
    return gathered.flatten(1).softmax(1).view_as(gathered), received.softmax(0)


def test_maps_lie_over_the_whole_picture(maps):
    gathered, received = weights()
    picture = torch.rand(8, 12)
    axes = maps.show_maps(picture, gathered, received, maps=[3, 1])
    assert axes.shape == (2, 2)
    for n, (above, below) in zip([3, 1], axes.T, strict=True):
        for axis in (above, below):
            under, over = axis.images
            assert under.get_array().tolist() == picture.tolist()
            assert under.get_extent() == over.get_extent() == [0, 12, 8, 0]
            assert over.get_alpha() / 0.9 == pytest.approx(over.get_array().data)
        top, bottom = (torch.tensor(axis.images[1].get_array().data) for axis in (above, below))
        torch.testing.assert_close(top, gathered[n] / gathered[n].max())
        torch.testing.assert_close(bottom, received[n] / received[[3, 1]].max())
        assert above.get_title() == f"{n}: gathers from"
        assert below.get_title() == f"{n}: received, ≤ {received[n].max():.2f}"
    (alone,) = axes[0, 0].figure.axes[0].images
    assert alone.get_array().tolist() == picture.tolist()


def test_maps_on_axes_of_the_caller_as_points(maps):
    """Two of six positions are masked in: one point each at its centre, sized by its weight."""
    gathered, received = weights(n=2)
    mask = torch.tensor([[False, True, False], [False, False, True]])
    _, axes = maps.plt.subplots(2, 2)
    drawn = maps.show_maps(
        torch.rand(8, 12), gathered, received, axes=axes, points=(mask, ["red", "blue"])
    )
    assert drawn is axes
    for n, above in enumerate(axes[0]):
        assert len(above.images) == 1
        (points,) = above.collections
        assert points.get_offsets().tolist() == [[6.0, 2.0], [10.0, 6.0]]
        sizes = torch.tensor(points.get_sizes())
        torch.testing.assert_close((sizes - 0.1) / 350, gathered[n][mask], check_dtype=False)


def test_descriptors_that_are_received_most(maps):
    shares = torch.tensor([0.1, 0.4, 0.2, 0.3])[:, None, None].expand(4, 2, 3)
    assert maps.most_received(shares, 3) == [1, 3, 2]


def test_maps_that_cannot_be_shown(maps):
    gathered, received = weights()
    picture = torch.rand(8, 12)
    with pytest.raises(ValueError, match="Choose a sample and a head"):
        maps.show_maps(picture, gathered[None], received[None])
    for wrong in ([], [4], [-1]):
        with pytest.raises(ValueError, match="numbers from 0 to 3"):
            maps.show_maps(picture, gathered, received, maps=wrong)
