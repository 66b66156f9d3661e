"""Attention maps over the image that they belong to, for the notebooks."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor


def most_received(received: Tensor, count: int) -> list[int]:
    """The descriptors with the largest share over all positions, of weights ``(n, H, W)``."""
    return received.mean((1, 2)).argsort(descending=True, stable=True)[:count].tolist()


def show_maps(
    image: Tensor,
    gathered: Tensor,
    received: Tensor,
    maps: Sequence[int] | None = None,
    axes: np.ndarray | None = None,
    points: tuple[Tensor, Any] | None = None,
) -> np.ndarray:
    """A column for each descriptor: where it gathers from, and below, who receives it.

    The maps are stretched over the image, a patch for each of their positions, which hides the
    image the more, the larger the weight. Each attention map has its own scale, up to its largest
    weight; the weights below share one.

    Args:
        image: grey, ``(height, width)``, from 0 to 1.
        gathered, received: results of ``DoubleAttention.attention_maps``, of one sample and one
            head, ``(n, H, W)``.
        maps: which descriptors, by number; all of them by default.
        axes: two rows with a column for each map, to draw on. By default a new figure, with the
            image alone at the left.
        points: the mask ``(H, W)`` of the positions in the gather, where these are few, and their
            colours. They are drawn as points, as large as their weight.

    Returns:
        The axes.

    Raises:
        ValueError: maps of several samples or heads, or numbers out of range.
    """
    if gathered.dim() != 3 or gathered.shape != received.shape:
        raise ValueError(
            "show_maps takes gathered and received as (n, H, W), got "
            f"{tuple(gathered.shape)} and {tuple(received.shape)}. Choose a sample and a head."
        )
    chosen = list(range(len(gathered))) if maps is None else list(maps)
    if not chosen or not set(chosen) <= set(range(len(gathered))):
        raise ValueError(f"maps must be numbers from 0 to {len(gathered) - 1}, got {chosen}.")
    height, width = image.shape
    extent = (0, width, height, 0)
    grey = {"X": image, "cmap": "gray", "vmin": 0, "vmax": 1, "extent": extent}
    if axes is None:
        columns = 1 + len(chosen)
        _, axes = plt.subplots(2, columns, figsize=(1.6 * columns, 3.7), layout="constrained")
        axes[0, 0].imshow(**grey)
        axes[0, 0].axis("off")
        axes[1, 0].axis("off")
        axes = axes[:, 1:]
    greatest = received[chosen].max()
    for n, (above, below) in zip(chosen, axes.T, strict=True):
        if points is None:
            above.imshow(**grey)
            _lay_over(above, gathered[n] / gathered[n].max(), extent)
        else:
            above.imshow(**grey, alpha=0.4)
            mask, colours = points
            y, x = (mask.nonzero() + 0.5).T
            x, y = x * width / mask.shape[1], y * height / mask.shape[0]
            size = 350 * gathered[n][mask] + 0.1
            above.scatter(x, y, s=size, c=colours, edgecolors="black", linewidths=0.3)
        above.set_title(f"{n}: gathers from", size=9)
        below.imshow(**grey)
        _lay_over(below, received[n] / greatest, extent)
        below.set_title(f"{n}: received, ≤ {received[n].max():.2f}", size=9)
        above.axis("off")
        below.axis("off")
    return axes


def _lay_over(axis: Axes, weights: Tensor, extent: tuple[int, int, int, int]) -> None:
    """Weights from 0 to 1, the larger the brighter and the more opaque."""
    axis.imshow(weights, "inferno", alpha=0.9 * weights, vmin=0, vmax=1, extent=extent)
