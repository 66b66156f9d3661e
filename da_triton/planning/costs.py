"""Cost of a block by association order and route: operations, bytes and launches, from shapes.

MACs of one sample:

    AZ  gather from A, distribute to Z    L(C·c_m + 2C·c_n + 2c_m·c_n/h + c_m·C)
    XZ  gather from X, then G = Wa·M      L(3C·c_n + c_m·c_n/h + c_m·C) + c_m·C·c_n/h
    AH  distribute H = Wo·G               L(C·c_m + 2C·c_n + c_m·c_n/h + C·c_n) + C·c_m·c_n/h
    XH  both                              L·4C·c_n + 2·c_m·C·c_n/h

A step is a launch, or a few that belong together. ``elements`` are the tensors with positions that
it moves to and from memory, once each; what a step reads again while it is still in the L2 cache is
not counted twice. ``requested`` is what its programs load from that cache: a tile of positions
loads all weights that it is multiplied with, so short tiles load more.
"""

from typing import NamedTuple

from .shapes import CoreLimits, Cost, Limits, Shape, Step

BLOCK = 128  # tile size along m and n of kernels that loop over these, half precision
L2 = 50e6  # bytes, of an H200; half of it is assumed to hold X
POSITIONS = 64  # per block of the core's gather, in most of its tiles
FEW = 8  # partials that are merged in the launch of the products of descriptors
STATISTICS = 64  # rows of B in a program for the statistics of P
SMALL_M = 128  # c_m of a head, up to which one launch has all products of backward


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
ORDERS = {order.name: order for order in (AZ, XZ, AH, XH)}  # ties go to the first


def orders(reconstruct: bool) -> tuple[Order, ...]:
    """The orders of a block with a last convolution, or without one."""
    return tuple(order for order in ORDERS.values() if reconstruct or not order.through_h)


def order_cost(
    order: Order,
    channels: int,
    c_m: int,
    c_n: int,
    heads: int,
    length: int,
    reconstruct: bool = True,
) -> Cost:
    """The cost of one sample's forward pass in ``order`` on the unfused route."""
    small = channels * c_m * c_n // heads
    core = c_m * c_n // heads
    # V: read X, write V, read V again in distribute. B: the same with gather.
    per_position, elements, small_total = 2 * channels * c_n, 2 * channels + 4 * c_n, 0
    if order.from_x:
        per_position += channels * c_n
        elements += channels * heads
        small_total += small
    else:
        per_position += channels * c_m + core
        elements += channels + 2 * c_m  # X read, A written and read again
    if order.through_h:
        per_position += channels * c_n
        # Each head's partial output is written, then they are added.
        elements += channels if heads == 1 else channels * (2 * heads + 1)
        small_total += small
    else:
        per_position += core + (channels * c_m if reconstruct else 0)
        elements += c_m + (c_m + channels if reconstruct else 0)
    return Cost(per_position * length, small_total, elements * length)


def order_macs(s: Shape, order: Order) -> int:
    """MACs of the whole batch, forward."""
    cost = order_cost(order, s.channels, s.c_m, s.c_n, s.heads, s.length, s.reconstruct)
    return s.batch * cost.all_macs


def least_macs(s: Shape) -> int:
    """The same in the cheapest order."""
    return min(order_macs(s, order) for order in orders(s.reconstruct))


def fused_tiles(order: Order, limits: Limits) -> tuple[int, int]:
    """Positions per tile of the fused gather and the fused distribute; 0 without such a kernel."""
    gather = limits.gather_from_x if order.from_x else limits.gather_from_a
    return gather, limits.project_distribute if order.through_h else 0


def compulsory_bytes(s: Shape, cache: float = L2, backward: bool = False) -> int:
    """Bytes that a pass over the whole batch has to move.

    Forward reads X and writes the output; backward reads X and the output's gradient, and writes
    X's gradient. Both read X twice where a sample does not fit half the cache between two passes.
    Weights are small next to activations, but count; backward also writes their gradients.
    """
    x, out = s.channels * s.length * s.itemsize, s.out_channels * s.length * s.itemsize
    reads = 1 if x <= cache / 2 else 2
    c_out = s.channels if s.reconstruct else 0
    weights = s.itemsize * (s.channels * (s.c_m + 2 * s.c_n) + c_out * s.c_m)
    if backward:
        return s.batch * ((reads + 1) * x + out) + 2 * weights
    return s.batch * (reads * x + out) + weights


def num_partials(length: int, block_l: int, wanted: int) -> int:
    """Partial sums of a pass over tiles of ``block_l`` positions, ``wanted`` at most."""
    blocks = max(1, -(-length // max(1, block_l)))
    per_split = -(-blocks // min(max(1, wanted), blocks))
    return -(-blocks // per_split)


def _combine_launches(partials: int, products: int, whole: bool = False) -> int:
    """Launches that merge partials and multiply descriptors.

    ``whole``: M, which many partials make, is not written.
    """
    if products and partials <= FEW:
        return 1
    return 2 if whole else 1 + products


def gather_steps(
    s: Shape, order: Order, block_l: int, num_splits: int, blocks: int = 1, with_v: bool = False,
    statistics: bool = False,
) -> list[Step]:  # fmt: skip
    """Forward steps up to G, or up to H in an order that goes through it.

    ``block_l``: positions per tile of the fused kernel, 0 for the unfused route. ``num_splits``:
    partial sums per sample. ``blocks``: of n, in a gather from X. ``with_v``: on the unfused route,
    V comes from the same product. ``statistics``: the core's gather takes those of P from a launch.
    """
    c, length, small = s.channels, s.length, s.channels * s.c_m * s.c_n // s.heads
    features = c if order.from_x else s.c_m // s.heads
    products = order.from_x + order.through_h
    partials = (2 * num_splits + 1) * s.c_n * features
    descriptors = Step("combine", False, products * small, 0, partials)
    whole = products == 2 and s.c_m // s.heads > SMALL_M
    if block_l:
        wanted = num_splits // (blocks if order.from_x else s.heads)
        launches = _combine_launches(num_partials(length, block_l, wanted), products, whole)
        descriptors = descriptors._replace(launches=launches)
    if block_l and order.from_x:
        pass_1 = Step("gather from X", False, 2 * length * c * s.c_n, c * length)
        return [pass_1._replace(requested=blocks * c * length), descriptors]
    if block_l:
        macs = length * (c * (s.c_m + s.c_n) + s.c_m * s.c_n // s.heads)
        requested = length * c * (s.heads + (s.c_m + s.c_n) // block_l)
        return [Step("gather from A", False, macs, c * length, 0, 1, requested), descriptors]
    rows = s.c_n * (1 + with_v) + (0 if order.from_x else s.c_m)
    steps = [Step("project", True, length * c * rows, (c + rows) * length)]
    if rows > s.c_n:
        steps.insert(0, _operands(s, rows))
    if statistics:
        steps.append(Step("statistics", False, 0, s.c_n * length))
    values = c * s.heads if order.from_x else s.c_m
    blocks_of_g = -(-features // BLOCK) * -(-s.c_n // s.heads // BLOCK)
    core_splits = max(1, min(num_splits // (s.heads * blocks_of_g), -(-length // POSITIONS)))
    parts = 0 if core_splits == 1 else 2 * core_splits * s.c_n * features
    own_h = order is AH and s.heads == 1  # a GEMM on G, where the core's gather has merged it
    combined = core_splits > 1 and (own_h or not products)
    core = Step(
        "gather", False, length * s.c_n * features, (values + s.c_n) * length, parts,
        1 + combined, 0 if _g_fits_one_tile(s, features, BLOCK) else _requested(s, features, BLOCK),
    )  # fmt: skip
    if own_h:
        return [*steps, core, Step("H", True, small, 0, (s.c_m + c) * s.c_n // 2)]
    if not products:
        return [*steps, core]
    launches = _combine_launches(core_splits, products, whole)
    return [*steps, core, descriptors._replace(launches=launches)]


def has_statistics(s: Shape, order: Order, num_sms: int) -> bool:
    """Whether the core's gather, in half precision, takes statistics of P from a launch."""
    features, n = s.channels if order.from_x else s.c_m // s.heads, s.c_n // s.heads
    programs = s.batch * s.heads * -(-n // STATISTICS)
    return s.channels_last and features > BLOCK and n > 32 and programs >= num_sms


def distribute_steps(
    s: Shape, order: Order, block_l: int, core: CoreLimits, cached: bool, channels_fit: bool = True,
    v_is_there: bool = False, copied: bool = False,
) -> list[Step]:  # fmt: skip
    """Forward steps from G or H to the output. ``cached``: X is still in the L2 cache.

    ``block_l``: positions per tile of the fused kernel, 0 for the unfused route. ``channels_fit``:
    that kernel keeps all channels resident. ``v_is_there``: the gather's product made V too.
    ``copied``: bias and X are added in the copy of the result.
    """
    c, length, out = s.channels, s.length, s.out_channels
    x = 0 if cached else c
    if block_l:
        macs = length * s.c_n * (c + out)
        requested = (c + out) * length
        if not channels_fit:
            requested += length * (c + s.c_n * (c + out) // block_l)
        return [Step("project and distribute", False, macs, (x + out) * length, 0, 1, requested)]
    features = out * s.heads if order.through_h else s.c_m
    macs = length * s.c_n * features // s.heads
    elements = (s.c_n + features) * length
    if core.full_n:
        requested = elements + -(-length // core.full_n) * features * s.c_n // s.heads
        steps = [Step("distribute", False, macs, elements, 0, 1, requested)]
    elif _g_fits_one_tile(s, features // s.heads, core.tile):
        steps = [Step("distribute", False, macs, elements)]
    else:
        requested = s.c_n * length + _requested(s, features // s.heads, core.tile)
        steps = [Step("distribute", False, macs, elements, 0, 2, requested)]
    if not v_is_there:
        steps.insert(0, Step("project V", True, length * c * s.c_n, (x + s.c_n) * length))
    if order.through_h and s.heads == 1 and core.full_n:
        steps[-1] = steps[-1]._replace(elements=elements + (0 if copied else x * length))
    elif order.through_h:
        extra = (out * (s.heads + 1) if s.heads > 1 else 0) + x + 2 * out
        steps.append(Step("bias, residual, heads", True, 0, extra * length, 0, 2))
    elif s.reconstruct:
        if not copied:
            # The last product adds to X + bo, which the launch before the first product wrote.
            steps.insert(0, Step("X + bo", False, 0, (c + out) * length, 0, 0 if v_is_there else 1))
        read = s.c_m + (0 if copied else c)
        steps.append(Step("reconstruct", True, length * s.c_m * c, (read + c) * length))
    return steps


def fused_backward_steps(
    s: Shape, num_splits: int, block_l: int, blocks: int = 1, saved_v: bool = False,
    partials: tuple[int, int] = (1, 1),
) -> list[Step]:  # fmt: skip
    """Backward steps in order XH: pass 1 again, two passes over X and dO, the weights.

    ``block_l``: positions per tile of the second of those passes. ``blocks``: of n in pass 1.
    ``saved_v``: V is read instead of projected from X. ``partials``: of M and of dH.
    """
    c, k, length, out = s.channels, s.c_n, s.length, s.out_channels
    small = c * s.c_m * k // s.heads
    parts = 2 * num_splits * k * c
    again = 1 if partials[1] <= FEW else 2 if s.c_m // s.heads <= SMALL_M else 4
    return [
        Step("gather from X", False, 2 * length * c * k, c * length, 0, 1, blocks * c * length),
        Step("combine", False, 2 * small, 0, parts + 2 * k * c, _combine_launches(partials[0], 2)),
        Step(
            "dV and dH",
            False,
            length * k * ((0 if saved_v else c) + 2 * out),
            ((k if saved_v else c) + out + k) * length,
        ),
        Step("combine, backward", False, 2 * small, 0, parts + 2 * k * c, again),
        Step(
            "dB and dX",
            False,
            5 * length * c * k,
            (2 * c + out + 2 * k) * length,
            0,
            1,
            length * (2 * c + out + 2 * k + 5 * c * k // block_l),
        ),
        Step(
            "dWv and dWb",
            False,
            2 * length * c * k,
            (c + 2 * k) * length,
            parts,
            1,
            length * (c * -(-2 * k // BLOCK) + 2 * k * -(-c // BLOCK)),
        ),
        Step("other weights", False, 2 * small, 0, parts + 4 * k * c),
    ]


def unfused_backward_steps(
    s: Shape, order: Order, core: CoreLimits, saved_v: bool = False
) -> list[Step]:
    """Backward steps in vendor GEMMs around the core's kernels.

    Where a program holds neither all of G nor the full n of its positions, tiles of n read the
    features again and blocks of features read the logits again, and rowsum_v is a product of its
    own.
    """
    c, k, m, length, out = s.channels, s.c_n, s.c_m, s.length, s.out_channels
    product, small = length * m * k // s.heads, c * m * k // s.heads
    rows = 2 * k + (0 if order.from_x else m)
    made = rows - k if saved_v else rows
    steps = [_operands(s, rows), Step("project", True, length * c * made, (c + made) * length)]

    def requested(elements: int, features: int) -> int:
        if not core.full_n_backward:
            return elements
        return elements + -(-length // core.full_n_backward) * features * k // s.heads

    if not order.through_h:
        again = 0 if core.full_n_backward or _g_fits_one_tile(s, m // s.heads, core.tile) else 1
        z = product if s.reconstruct else 0
        if s.reconstruct:
            steps.append(Step("dZ", True, length * c * m, (c + m) * length))
        elements = ((1 + s.reconstruct) * m + 3 * k) * length
        steps.append(
            Step("dV and Z", False, z + (1 + again) * product, elements, 0, 1 + 3 * again,
                 requested(elements, m))
        )  # fmt: skip
        steps.append(Step("dG", False, product, (m + k) * length, 2 * m * k // s.heads))
        if s.reconstruct:
            steps.append(Step("dWo", False, length * c * m, (c + m) * length, 0, 2))
    else:
        again = 0 if core.full_n_backward or _g_fits_one_tile(s, out, core.tile) else 1
        elements = (out * s.heads + 3 * k) * length
        steps.append(
            Step("dV", False, (1 + again) * length * out * k, elements, 0, 1 + 2 * again,
                 requested(elements, out * s.heads))
        )  # fmt: skip
        steps.append(Step("dH", False, length * out * k, (out * s.heads + k) * length, 0, 2))
        steps.append(Step("H, dG, dWo, dbo", True, 3 * small, out * length, 4 * k * c, 8))
    if not order.from_x:
        steps.append(Step("delta", False, 0, 0, 3 * m * k // s.heads))
        elements = (2 * m + 2 * k) * length
        steps.append(Step("dA and dB", False, 2 * product, elements, 0, 1, requested(elements, m)))
    else:
        elements = (3 * c * s.heads + 3 * k) * length
        steps.append(
            Step("M, dX, dB", False, 3 * length * c * k, elements, 0, 5, requested(elements, c))
        )
        steps.append(Step("dM, dWa", True, 2 * small, 0, 4 * k * c, 5))
    last = (rows + 2 * c + out) * length
    steps.append(Step("dX", True, length * c * rows, last))
    steps.append(Step("weights of A, B, V", False, length * c * rows, (c + rows) * length, 0, 2))
    return steps


def _operands(s: Shape, rows: int) -> Step:
    """The launch that concatenates the weights of one product."""
    return Step("stacked weights", False, 0, 2 * rows * s.channels // max(1, s.batch))


def _g_fits_one_tile(s: Shape, features: int, tile: int) -> bool:
    return max(features, s.c_n // s.heads) <= tile


def _requested(s: Shape, features: int, tile: int) -> int:
    """Elements that a tiled product of G with activations loads: each tile loads the other's."""
    per_n, per_feature = -(-features // tile), -(-s.c_n // s.heads // tile)
    return s.length * s.heads * (s.c_n // s.heads * per_n + features * (per_feature + 1))
