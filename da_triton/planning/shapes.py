"""Types of the cost model: the sizes of a block, its steps, and the kernels' limits."""

import math
from typing import NamedTuple


class Shape(NamedTuple):
    """A block on an input: sizes, bytes per element, memory format."""

    batch: int
    channels: int
    c_m: int
    c_n: int
    heads: int
    length: int
    itemsize: int
    reconstruct: bool
    channels_last: bool = False

    @property
    def alignment(self) -> int:
        """Bytes to which rows of X are aligned, at most 16."""
        rows = self.channels if self.channels_last or self.length == 1 else self.length
        return math.gcd(16, rows * self.itemsize)

    @property
    def out_channels(self) -> int:
        return self.channels if self.reconstruct else self.c_m


class Step(NamedTuple):
    """A launch, or a few that belong together: costs per sample, but launches per batch."""

    name: str
    library: bool  # a vendor GEMM, not a kernel of this package
    macs: int
    elements: int = 0  # of tensors with positions, in the input's dtype
    fp32_elements: int = 0  # float32
    launches: int = 1
    requested: int = 0  # elements, where kernels load more than ``elements``

    def bytes(self, itemsize: int) -> int:
        return self.elements * itemsize + self.fp32_elements * max(4, itemsize)


class Cost(NamedTuple):
    """Per-sample forward cost on the unfused route with ATen operations."""

    macs: int  # in products that run over positions
    small_macs: int  # in products of small matrices, float32
    elements: int  # of activations read and written

    @property
    def all_macs(self) -> int:
        return self.macs + self.small_macs


class CoreLimits(NamedTuple):
    """Tile limits of the unfused route's kernels for a shape."""

    tile: int  # the largest G, in either direction, that one program of the core holds
    full_n: int  # positions in a tile with the full n of a head; 0 where no program holds them
    full_n_backward: int


class PerSM(NamedTuple):
    """Programs that an SM should hold at once, of kernels whose partials are merged."""

    gather_from_x: int = 1
    gather_from_a: int = 1
    block_bwd_distribute: int = 1


class Limits(NamedTuple):
    """Limits of the kernels for a shape on a GPU, from ``ops.triton.plan``."""

    num_sms: int
    gather_from_x: int  # positions in a tile; 0 where the kernel does not fit
    gather_from_a: int
    project_distribute: int
    backward: int  # of the pass that writes dX
    block_bwd_distribute: int  # of the pass before it
    blocks_of_n: int  # of gather_from_x
    channels_fit: bool  # project_distribute holds all channels of a tile
    core: CoreLimits
    per_sm: PerSM = PerSM()
