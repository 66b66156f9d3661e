"""Parameters of tests: orders, backends, position axes, and shapes that reach every path of the
kernels, small enough to interpret."""

import dataclasses

import pytest

from da_triton.planning import costs

ORDERS = list(costs.ORDERS)
BACKENDS = ["triton", "torch", "eager"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
RANKS = [(30,), (5, 6), (2, 3, 5)]  # positions of signals, images and videos


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    heads: int
    m: int
    n: int
    length: int
    batch: int = 2


CASES = [
    Case("g_fits_one_tile", heads=2, m=24, n=19, length=150),
    Case("one_map", heads=1, m=33, n=1, length=98),
    Case("full_tile", heads=1, m=128, n=128, length=196, batch=1),
    Case("many_features", heads=1, m=200, n=20, length=98),
    Case("large_n", heads=2, m=20, n=150, length=98, batch=1),
    Case("many_of_both", heads=1, m=130, n=130, length=196, batch=1),
]
LARGEST_G_TILE = CASES[0]
LARGEST = Case("largest", heads=1, m=2048, n=512, length=49, batch=1)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
