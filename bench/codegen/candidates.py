"""Tiles that the ahead-of-time search and the tuner try: positions, warps, stages."""

CANDIDATES = (
    (128, 8, 3), (128, 8, 2), (64, 8, 3), (64, 4, 3), (64, 8, 2), (64, 4, 2), (128, 8, 1),
    (64, 8, 1), (32, 8, 3), (32, 8, 2), (32, 4, 2), (32, 8, 1), (32, 4, 1), (16, 8, 1), (16, 4, 1),
)  # fmt: skip
# For kernels that have no positions.
SMALL = (
    (64, 4, 3), (64, 8, 3), (64, 4, 2), (64, 8, 2), (32, 4, 2), (32, 8, 2), (32, 8, 1), (16, 8, 1),
)  # fmt: skip
