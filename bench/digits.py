"""A small residual network with and without double attention, trained on handwritten digits.

scikit-learn's digits are 1,797 pictures of 8×8 points. The first 1,280 are trained on, the others
held out. Both networks start from the same weights and see the same pictures in the same order; the
blocks are the identity at first, so that the first loss is the same, too. No setting was chosen by
its results. It shows that the block trains inside a network, not what it is good for: at this size
the convolutions see the whole picture as well.
"""

import statistics
from collections import OrderedDict
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from da_triton.integrations import insert_double_attention

from .plots import COLOURS
from .tables import markdown

FILE, PICTURE = "digits.csv", "digits.png"
WITHOUT, WITH = "without blocks", "with two blocks"
NETWORKS = (WITHOUT, WITH)
PLACES = ("conv2.0", "conv3.0")
SEEDS, EPOCHS = 5, 8
TRAINING, BATCH = 1280, 64
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4


class Residual(nn.Module):
    """ResNet's basic block, ``(N, inputs, H, W)`` to ``(N, outputs, H / stride, W / stride)``."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(y)) + self.shortcut(x)).relu()


def network() -> nn.Sequential:
    """``(N, 1, 8, 8)`` to the scores of ten digits: two residual blocks at 8×8, two at 4×4."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    parts = {
        "stem": stem,
        "conv2": nn.Sequential(Residual(16, 16), Residual(16, 16)),
        "conv3": nn.Sequential(Residual(16, 32, stride=2), Residual(32, 32)),
        "pool": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "classifier": nn.Linear(32, 10),
    }
    return nn.Sequential(OrderedDict(parts))


def pictures() -> tuple[Tensor, Tensor]:
    """All digits ``(1797, 1, 8, 8)``, from 0 to 1, and what they are."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train(name: str, seed: int, epochs: int = EPOCHS) -> tuple[nn.Sequential, list[dict[str, Any]]]:
    """The trained network, and a row for each epoch."""
    torch.manual_seed(seed)
    model = network()
    if name == WITH:
        insert_double_attention(model, PLACES)
    x, y = pictures()
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    rows = []
    for epoch in range(1, epochs + 1):
        losses = []
        model.train()
        for chosen in torch.randperm(TRAINING, generator=order).split(BATCH):
            loss = functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        rows.append(
            {
                "network": name, "parameters": sum(p.numel() for p in model.parameters()),
                "seed": seed, "epoch": epoch, "first_loss": losses[0],
                "training_loss": statistics.fmean(losses),
                "test_accuracy": accuracy(model, x[TRAINING:], y[TRAINING:]),
            }
        )  # fmt: skip
    return model, rows


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of pictures that the network, set to evaluation, gets right."""
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def summary(frame: pd.DataFrame) -> str:
    """The last epoch in Markdown: means over the seeds, and the least and greatest accuracy."""
    last = frame[frame["epoch"] == frame["epoch"].max()]
    groups = last.groupby("network", sort=False)
    accuracies = 100 * groups["test_accuracy"].agg(["mean", "min", "max"])
    found = pd.DataFrame(
        {
            "parameters": groups["parameters"].first(),
            "training loss": groups["training_loss"].mean(),
            "test accuracy, %": accuracies["mean"],
            "lowest": accuracies["min"],
            "highest": accuracies["max"],
        }
    )
    formats = dict.fromkeys(["test accuracy, %", "lowest", "highest"], "{:.2f}")
    return markdown(found.reset_index(), formats | {"training loss": "{:.4f}"})


def curves(frame: pd.DataFrame) -> Figure:
    """Training loss and test accuracy against epochs: a thin line a seed, and their means."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    columns = ("training_loss", "test_accuracy")
    for panel, column in zip(figure.subplots(1, 2), columns, strict=True):
        for name, colour in zip(NETWORKS, COLOURS, strict=False):
            rows = frame[frame["network"] == name]
            values = rows.pivot(index="epoch", columns="seed", values=column)
            panel.plot(values, color=colour, linewidth=0.6, alpha=0.5)
            panel.plot(values.mean(axis=1), color=colour, linewidth=2, label=name)
        panel.set_title(column.replace("_", " "), size=10)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(fontsize=8, frameon=False)
    figure.axes[0].set_yscale("log")
    figure.axes[1].set_ylim(0.8, 1.0)
    return figure
