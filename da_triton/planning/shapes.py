"""The types of planning: a block's sizes, the association orders, steps and routes, their costs."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A block on an input: sizes, and bytes of an element."""

    batch: int
    channels: int
    c_m: int
    c_n: int
    heads: int
    length: int
    itemsize: int
    reconstruct: bool
    wide: bool = True  # kernels can load at least 8 bytes at once

    @property
    def out_channels(self) -> int:
        return self.channels if self.reconstruct else self.c_m


class Order(NamedTuple):
    """How the block's products associate: what G is gathered from, and what is distributed."""

    name: str  # as users give it
    from_x: bool  # M is gathered from X, and G = Wa M: A is never made
    through_h: bool  # H = Wo G is distributed: Z is never made

    def __str__(self) -> str:
        return self.name


AZ = Order("AZ", from_x=False, through_h=False)  # the paper's
XZ = Order("XZ", from_x=True, through_h=False)
AH = Order("AH", from_x=False, through_h=True)
XH = Order("XH", from_x=True, through_h=True)
ORDERS = {order.name: order for order in (AZ, XZ, AH, XH)}  # of equal costs, the first runs


def orders(reconstruct: bool) -> tuple[Order, ...]:
    """Those of a block with a last convolution, or without one."""
    return tuple(order for order in ORDERS.values() if reconstruct or not order.through_h)


class Step(NamedTuple):
    """Costs of one sample; launches of all samples together. A launch, or a few that belong
    together."""

    name: str
    library: bool  # a library's matrix product, or a kernel of ours
    macs: int
    elements: int = 0  # of tensors with positions, in the input's dtype
    fp32_elements: int = 0  # float32
    launches: int = 1
    requested: int = 0  # elements, where kernels load more than ``elements``


class Cost(NamedTuple):
    """One sample's, forward, on the unfused route with ATen operations."""

    macs: int  # in products that run over positions
    small_macs: int  # in products of small matrices, float32
    elements: int  # of feature maps read and written


class Route(NamedTuple):
    """How a block runs in kernels."""

    order: Order
    gather: str  # "fused" or "unfused"
    distribute: str
    backward: str
    backward_order: Order  # of an unfused backward pass; XH of a fused one
    batch_chunk: int  # samples that go through both passes before the next ones start

    def __str__(self) -> str:
        forward = f"{self.order}: gather {self.gather}, distribute {self.distribute}"
        return f"{forward}; backward {self.backward} {self.backward_order}"


class PlannedRoute(NamedTuple):
    """A route with its modelled costs for the whole batch."""

    route: Route
    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    seconds: float  # forward
    backward_seconds: float


class CoreLimits(NamedTuple):
    """Tile limits of the unfused route's kernels for a shape."""

    tile: int  # the largest G, in either direction, that one program of the core holds
    full_n: int  # positions in a tile with the full n of a head; 0 where no program holds them
    full_n_backward: int


class Limits(NamedTuple):
    """Limits of the kernels for a shape on a GPU, from ``ops.triton.plan``."""

    num_sms: int
    gather_from_x: int  # positions in a tile; 0 where the kernel does not fit
    gather_from_a: int
    project_distribute: int
    backward: int  # of the pass that writes dX
    blocks_of_n: int  # of gather_from_x
    channels_fit: bool  # project_distribute holds all channels of a tile
    core: CoreLimits
