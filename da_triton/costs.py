"""What each association order of the block costs on the split route: operations and bytes.

One sample, multiply-adds as in the table of the derivation:

    AZ  gather from A, distribute to Z    L(C·c_m + 2C·c_n + 2c_m·c_n/h + c_m·C)
    XZ  gather from X, then G = Wa·M      L(3C·c_n + c_m·c_n/h + c_m·C) + c_m·C·c_n/h
    AH  distribute H = Wo·G               L(C·c_m + 2C·c_n + c_m·c_n/h + C·c_n) + C·c_m·c_n/h
    XH  both                              L·4C·c_n + 2·c_m·C·c_n/h

Bytes are those of the split route's own launches: every feature-map-sized tensor that a launch
reads or writes, once.
"""

from typing import NamedTuple


class Cost(NamedTuple):
    """Of one sample, forward."""

    multiply_adds: int  # in products that run over positions
    small_multiply_adds: int  # in products of small matrices, float32
    elements: int  # of feature maps read and written


def order_cost(
    order: str, channels: int, c_m: int, c_n: int, heads: int, length: int, reconstruct: bool = True
) -> Cost:
    """The cost of one sample's forward pass in ``order`` on the split route."""
    small = channels * c_m * c_n // heads
    core = c_m * c_n // heads
    # V: read X, write V, read V again in distribute. B: likewise with gather.
    per_position, elements, small_total = 2 * channels * c_n, 2 * channels + 4 * c_n, 0
    if order[0] == "A":
        per_position += channels * c_m + core
        elements += channels + 2 * c_m  # X read, A written and read again
    else:
        per_position += channels * c_n
        elements += channels * heads
        small_total += small
    if order[1] == "Z":
        per_position += core + (channels * c_m if reconstruct else 0)
        elements += c_m + (c_m + channels if reconstruct else 0)
    else:
        per_position += channels * c_n
        # Each head's share of the output is written, then they are added.
        elements += channels if heads == 1 else channels * (2 * heads + 1)
        small_total += small
    return Cost(per_position * length, small_total, elements * length)
