"""The named workloads: shapes that real models give the block, and one photograph.

The table is in order of importance: a run that ends early has measured the first ones.
"""

import difflib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SELECTIONS = ("quick", "default", "all")
STEM_WIDTHS = (3, 64, 128, 256)
SMALL = 2**17  # elements of the input


@dataclass(frozen=True)
class Workload:
    """One shape of the block: its input, and the channels of A (``c_m``) and of B and V (``c_n``).

    ``cpu_n`` is the batch on a CPU. ``selection`` is the smallest selection that has the workload.
    ``photographs`` are sample images of scikit-learn: the block is timed on features of the first
    and checked on those of the second.
    """

    name: str
    n: int
    c: int
    positions: tuple[int, ...]
    c_m: int
    c_n: int
    heads: int = 1
    cpu_n: int = 1
    selection: str = "all"
    photographs: tuple[str, str] | None = None

    whole = False  # a block, not a network around it

    def draw(self, mode: str, dtype: torch.dtype, device: torch.device) -> Any:
        from . import problems

        return problems.draw(self, mode, dtype, device)

    def columns(self, device: torch.device) -> dict[str, Any]:
        """The columns of a row that identify the workload."""
        return {
            "workload": self.name, "n": self.batch(device), "c": self.c,
            "positions": "x".join(map(str, self.positions)),
            "c_m": self.c_m, "c_n": self.c_n, "heads": self.heads,
        }  # fmt: skip

    @property
    def length(self) -> int:
        return math.prod(self.positions)

    @property
    def small(self) -> bool:
        """Whether the host and the number of launches decide on a GPU, not bytes or operations."""
        return self.n * self.c * self.length <= SMALL

    def batch(self, device: torch.device) -> int:
        return self.cpu_n if device.type == "cpu" else self.n

    def features(self, device: torch.device, seed: int) -> Tensor:
        """``(batch, c, *positions)`` in float32, of unit variance; ``seed`` is 0 or 1."""
        shape = (self.batch(device), self.c, *self.positions)
        if self.photographs is not None:
            return photograph_features(self.photographs[seed]).to(device).expand(shape)
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device)


WORKLOADS = (
    # A²-Net ResNet-50
    Workload("r50_conv3", 64, 512, (28, 28), 256, 256, cpu_n=2, selection="default"),
    Workload("r50_conv4", 64, 1024, (14, 14), 512, 512, cpu_n=2, selection="default"),
    # YOLOv8 at 640, stride 8
    Workload("yolo_p3", 16, 256, (80, 80), 64, 64),
    # Video of 8 frames
    Workload("kinetics_conv3", 8, 512, (8, 28, 28), 256, 256),
    Workload("kinetics_conv4", 8, 1024, (8, 14, 14), 512, 512),
    # A medical volume; high-resolution restoration; segmentation with one descriptor per class;
    # the linear attention of a diffusion U-Net
    Workload("volume_128", 1, 64, (128, 128, 128), 32, 32),
    Workload("hires_256", 4, 128, (256, 256), 128, 128, heads=4),
    Workload("seg_19", 4, 512, (64, 128), 512, 19),
    Workload("ddpm_64", 16, 128, (64, 64), 128, 128, heads=4, selection="default"),
    # YOLOv8 at 640, strides 16 and 32, and its latency
    Workload("yolo_p4", 16, 512, (40, 40), 128, 128, cpu_n=2),
    Workload("yolo_p5", 16, 512, (20, 20), 128, 128, cpu_n=4),
    Workload("yolo_p3_b1", 1, 256, (80, 80), 64, 64),
    Workload("yolo_p5_b1", 1, 512, (20, 20), 128, 128, selection="quick"),
    # ResNet-50 with c_m = c_n = C/4, and its conv5, whose positions are odd in number
    Workload("r50_conv3_q", 64, 512, (28, 28), 128, 128, cpu_n=2),
    Workload("r50_conv4_q", 64, 1024, (14, 14), 256, 256, cpu_n=2),
    Workload("odd_7x7", 32, 2048, (7, 7), 512, 512, cpu_n=4, selection="default"),
    # A photograph after a stem of stride 8
    Workload(
        "photo_china", 1, 256, (54, 80), 128, 128,
        selection="quick", photographs=("china.jpg", "flower.jpg"),
    ),
    # Small ones: what many try first, detectors at batch 1, ResNets of small images
    Workload("yolo_n_p5_b1", 1, 256, (20, 20), 64, 64, selection="default"),
    Workload("small_16_8x8", 1, 16, (8, 8), 8, 8, selection="default"),
    Workload("small_64_14x14", 1, 64, (14, 14), 32, 32, selection="default"),
    Workload("small_128_20x20", 1, 128, (20, 20), 64, 64, selection="default"),
    Workload("small_64_14x14_n8", 8, 64, (14, 14), 32, 32, cpu_n=8, selection="default"),
    Workload("small_256_7x7_n2", 2, 256, (7, 7), 128, 128, cpu_n=2, selection="default"),
    Workload("small_512_14x14", 1, 512, (14, 14), 256, 256, selection="default"),
    Workload("small_512_7x7", 1, 512, (7, 7), 256, 256, selection="default"),
)  # fmt: skip


class UsageError(Exception):
    """A command's arguments are invalid; the message says which ones would be valid."""


def check(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        UsageError: a name is not known, with the nearest one and all of them.
    """
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UsageError(
                f"unknown {kind} {name!r}; did you mean {near!r}? Known: {', '.join(known)}."
            )


def select(chosen: Sequence[str], selection: str) -> list[Workload]:
    """The workloads called ``chosen``, or without names those of a selection, in table order."""
    check("workload", chosen, [w.name for w in WORKLOADS])
    if chosen:
        return [w for w in WORKLOADS if w.name in chosen]
    included = SELECTIONS[: SELECTIONS.index(selection) + 1]
    return [w for w in WORKLOADS if w.selection in included]


def photograph_features(filename: str) -> Tensor:
    """A sample image of scikit-learn after three convolutions of stride 2 with fixed weights.

    Returns ``(1, 256, H/8, W/8)`` in float32; every channel has mean 0 and variance 1.
    """
    try:
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise RuntimeError(
            "the photograph needs scikit-learn and Pillow: pip install 'da_triton[bench]'"
        ) from error
    pixels = torch.tensor(load_sample_image(filename)).permute(2, 0, 1)[None]
    features = pixels.float() / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    for c_in, c_out in itertools.pairwise(STEM_WIDTHS):
        weight = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        features = nn.functional.conv2d(features, weight, stride=2, padding=1).relu()
    return nn.functional.instance_norm(features)
