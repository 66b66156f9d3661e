import pandas as pd
import pytest
import torch

from bench import __main__ as cli
from bench import digits, pages
from da_triton import DoubleAttention
from da_triton.integrations import insert_double_attention

pytest.importorskip("sklearn")
MEASURED = ["network", "parameters", "seed", "epoch", "first_loss", "training_loss"]


@pytest.fixture(scope="module")
def trained():
    """Three epochs of each network with the same seed."""
    return {name: digits.train(name, seed=0, epochs=3) for name in digits.NETWORKS}


def test_loss_falls_and_digits_are_told_apart(trained):
    for _, rows in trained.values():
        losses = [row["training_loss"] for row in rows]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0] / 4
        assert rows[-1]["test_accuracy"] > 0.5
        assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_first_loss_is_the_same_and_later_ones_are_not(trained):
    without, with_blocks = ([row["first_loss"] for row in rows] for _, rows in trained.values())
    assert without[0] == with_blocks[0]
    assert without[1] != with_blocks[1]


def test_blocks_take_part(trained):
    model, _ = trained[digits.WITH]
    assert sum(isinstance(m, DoubleAttention) for m in model.modules()) == len(digits.PLACES)
    for place in digits.PLACES:
        assert model.get_submodule(place).double_attention.norm.weight.abs().max() > 1e-3
    plain, _ = trained[digits.WITHOUT]
    assert not any(isinstance(m, DoubleAttention) for m in plain.modules())


def test_run_is_repeatable_and_seeds_differ(trained):
    model, rows = trained[digits.WITH]
    torch.randn(7)  # whatever was drawn before does not matter
    again, same = digits.train(digits.WITH, seed=0, epochs=3)
    assert rows == same
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    _, (other,) = digits.train(digits.WITHOUT, seed=1, epochs=1)
    assert other["first_loss"] != rows[0]["first_loss"]


def test_held_out_digits_are_not_trained_on(monkeypatch):
    """With other pictures held out, everything but the accuracy stays."""
    x, y = digits.pictures()
    assert x.shape == (1797, 1, 8, 8)
    assert (x.min(), x.max()) == (0, 1)
    _, (row,) = digits.train(digits.WITHOUT, seed=0, epochs=1)
    changed = x.clone()
    changed[digits.TRAINING :] = 0
    monkeypatch.setattr(digits, "pictures", lambda: (changed, y))
    _, (blind,) = digits.train(digits.WITHOUT, seed=0, epochs=1)
    assert all(row[name] == blind[name] for name in MEASURED)
    assert row["test_accuracy"] != blind["test_accuracy"]


def test_sizes_inside_the_network():
    model, shapes = digits.network(), {}
    for place in digits.PLACES:
        part = model.get_submodule(place)
        part.register_forward_hook(lambda m, args, y, at=place: shapes.update({at: y.shape[1:]}))
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert list(shapes.values()) == [(16, 8, 8), (32, 4, 4)]
    before = sum(p.numel() for p in model.parameters())
    insert_double_attention(model, digits.PLACES)
    added = sum(4 * c * c // 2 + 3 * c // 2 + c + 2 * c for c in (16, 32))
    assert sum(p.numel() for p in model.parameters()) == before + added


def test_committed_run_is_whole():
    frame = pd.read_csv(pages.RESULTS / digits.FILE)
    assert len(frame) == len(digits.NETWORKS) * digits.SEEDS * digits.EPOCHS
    assert (
        not frame[[*MEASURED, "test_accuracy", "machine", "torch", "commit", "date"]]
        .isna()
        .any(axis=None)
    )
    first = frame[frame["epoch"] == 1].pivot(index="seed", columns="network", values="first_loss")
    assert (first[digits.WITHOUT] == first[digits.WITH]).all()
    for name in digits.NETWORKS:
        model = digits.network()
        if name == digits.WITH:
            insert_double_attention(model, digits.PLACES)
        counted = sum(p.numel() for p in model.parameters())
        assert (frame[frame["network"] == name]["parameters"] == counted).all()
    assert (pages.RESULTS / digits.PICTURE).stat().st_size > 10_000


def test_summary_is_of_the_last_epoch():
    rows = [
        {"network": name, "parameters": 7, "seed": seed, "epoch": epoch, "training_loss": loss,
         "test_accuracy": accuracy}
        for name in digits.NETWORKS
        for seed, epoch, loss, accuracy in [
            (0, 1, 9.0, 0.1), (1, 1, 9.0, 0.2), (0, 2, 0.1, 0.9), (1, 2, 0.3, 0.8),
        ]
    ]  # fmt: skip
    *_, last = digits.summary(pd.DataFrame(rows)).splitlines()
    assert last == "| with two blocks | 7 | 0.2000 | 85.00 | 80.00 | 90.00 |"


def test_command(tmp_path, capsys):
    out = tmp_path / "results"
    assert cli.main(["digits", "--seeds", "2", "--epochs", "1", "--out", str(out)]) == 0
    frame = pd.read_csv(out / digits.FILE)
    assert len(frame) == 4
    assert set(frame["seed"]) == {0, 1}
    assert (frame["threads"] == torch.get_num_threads()).all()
    assert {path.name for path in out.iterdir()} == {digits.FILE, digits.PICTURE}
    assert digits.summary(frame) in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--seeds", "--epochs"])
def test_nothing_to_train(tmp_path, capsys, option):
    assert cli.main(["digits", option, "0", "--out", str(tmp_path / "o")]) == 2
    assert "at least one seed and one epoch" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
