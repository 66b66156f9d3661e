"""How much longer the parts of a block take than their roofline, by shape.

The table, ``calibration.json``, has a row for each part of a route and each shape at which it was
modelled: the logarithm to base 2 of modelled time over ``planner.Part.roofline``. Between shapes it
is interpolated, by an inverse power of the distance in the logarithms of the sizes (Shepard's
method), which is exact at the shapes of the table. ``python -m bench.model.calibrate`` writes it,
from a model of an H200 and blocks in bfloat16 with a last convolution; other dtypes and blocks take
the same ratios. Nothing in it was measured, and how much unaligned rows slow vendor GEMMs down,
which decides what is copied to channels-last memory, is a guess.
"""

import functools
import json
import math
from pathlib import Path

from .shapes import Shape

FILE = Path(__file__).with_name("calibration.json")
COLUMNS = ["part", "C", "m", "n", "heads", "samples", "positions", "channels_last", "log2_ratio"]
APART = 2.0  # distance between memory formats, and between alignments of rows that differ by 2
POWER = 3  # of the squared distance

Place = tuple[float, ...]  # of a shape: logarithms to base 2 of its sizes


def place_of(s: Shape, samples: int) -> Place:
    """``samples``: those that a launch takes."""
    sizes = s.channels, s.c_m, s.c_n, s.heads, samples, max(1, samples * s.length)
    return *map(math.log2, sizes), APART * math.log2(s.alignment), APART * s.channels_last


@functools.cache
def points() -> dict[str, dict[Place, float]]:
    """The table: ratios by part and place.

    Raises:
        ValueError: the file has other columns.
    """
    table = json.loads(FILE.read_text(encoding="utf-8"))
    if table["columns"] != COLUMNS:
        raise ValueError(f"the columns of {FILE} are {table['columns']}, and not {COLUMNS}")
    found: dict[str, dict[Place, float]] = {}
    for part, c, m, n, heads, samples, positions, channels_last, ratio in table["rows"]:
        s = Shape(samples, c, m, n, heads, positions // samples, 2, True, bool(channels_last))
        found.setdefault(part, {})[place_of(s, samples)] = ratio
    return found


@functools.lru_cache(maxsize=1024)
def weights(place: Place) -> dict[Place, float]:
    """Of every other place in the table."""
    known = {other for each in points().values() for other in each} - {place}
    return {
        other: sum((a - b) ** 2 for a, b in zip(place, other, strict=True)) ** -POWER
        for other in known
    }


def ratio(part: str, s: Shape, samples: int) -> float:
    """Modelled time over the roofline's; that of all parts, if this one is not in the table.

    1 with an empty table, to make one from.
    """
    place = place_of(s, samples)
    known = points().get(part)
    if known and place in known:
        return 2 ** known[place]
    near = weights(place)
    total = weight = 0.0
    for each in [known] if known else points().values():
        for other, log2_ratio in each.items():
            if other != place:
                total += near[other] * log2_ratio
                weight += near[other]
    return 2 ** (total / weight) if weight else 1.0
