"""Tiles that were measured on a card: one JSON file for each, written by ``python -m bench tune``.

A card without a file takes the tiles of its architecture. So does one whose file cannot be read,
is of another version of Triton, or has an entry that no kernel could take; that is warned of once.
"""

import functools
import json
import re
import warnings
from pathlib import Path

import torch
import triton

FOLDER = Path(__file__).parents[1] / "kernels" / "data"
FIELDS = ("kernel", "block_m", "block_n", "tile")
WARPS = (1, 2, 4, 8, 16)


def slug(card):
    """A file's name for a card's."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def tile(device, kernel, blocks):
    """``(BLOCK_L, warps, stages)`` that was measured on a device, or None."""
    if device.type != "cuda":
        return None
    return tiles(torch.cuda.get_device_name(device)).get((kernel, *blocks))


@functools.cache
def tiles(card):
    """``{(kernel, block_m, block_n): (BLOCK_L, warps, stages)}`` of a card."""
    path = FOLDER / f"{slug(card)}.json"
    if not path.exists():
        return {}
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")), card)
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"da_triton ignores the measured tiles in {path.name}: {error}. The tiles of the "
            "architecture are used; `python -m bench tune` measures and writes the file again.",
            stacklevel=2,
        )
        return {}


def _read(table, card):
    if table["card"] != card:
        raise ValueError(f"they are of {table['card']!r}, not of {card!r}")
    if table["triton"] != triton.__version__:
        raise ValueError(f"they are of Triton {table['triton']}, not of {triton.__version__}")
    found = {}
    for entry in table["tiles"]:
        kernel, block_m, block_n, values = (entry[name] for name in FIELDS)
        block_l, warps, stages = values
        power = block_l >= 16 and block_l & (block_l - 1) == 0
        if not (isinstance(block_l, int) and power and warps in WARPS and stages in range(1, 9)):
            raise ValueError(f"{kernel} has the impossible tile {values}")
        found[(kernel, block_m, block_n)] = block_l, warps, stages
    return found
