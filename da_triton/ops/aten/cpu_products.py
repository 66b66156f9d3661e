"""Helpers of the block on a CPU: layouts, tiles of positions, products.

Activations are ``(g, l, channels)``: g samples, l positions of each.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ...projection import channels_last
from .core import POSITIONS_PER_PRODUCT

SMALLEST_TILE, LARGEST_TILE = 2**20, 2**22  # elements of x, float32
LEAST_POSITIONS = 2048  # per tile: with fewer, reading weights again dominates the products
MOST_POSITIONS = 2**16  # per tile: with more, the sum in a softmax loses digits
FEW_POSITIONS = 256  # with fewer, one product for all samples is faster than one per sample
FEW_ELEMENTS = 2**14  # per sample: with fewer, copying sample by sample costs more than it saves
# Where no more than these are adjacent in memory, a softmax over positions is slow.
FEW_DESCRIPTORS = 8
NARROW = 32  # n so small that positions, not channels, are kept adjacent in memory


def tile_for(cache: int | None) -> int:
    """Elements of x in a tile, for a last-level cache of this size in bytes: an eighth of it.

    The rest is for A, B, V and other processes. If the size is unknown: the smallest tile.
    """
    return min(max(SMALLEST_TILE, (cache or 0) // 8 // 4), LARGEST_TILE)


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the processor's largest cache, as Linux reports them; None elsewhere."""
    try:
        sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
        return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=None)
    except (OSError, ValueError):
        return None


TILE = tile_for(last_level_cache())


def position_major(x: Tensor) -> Tensor:
    """``(N, C, L)`` as ``(N, L, C)``, copied where products of x in its layout would be slow."""
    tokens = x.transpose(1, 2)
    return tokens if x.stride(1) == 1 or _long_rows(x) else dense(tokens)


def few_descriptors(x: Tensor, c_n: int) -> bool:
    """Whether too few channels of B or V would be adjacent in memory, as those of x are."""
    return c_n <= FEW_DESCRIPTORS and not (_long_rows(x) and x.stride(1) != 1)


def _long_rows(x: Tensor) -> bool:
    return x.shape[2] >= FEW_POSITIONS and x.stride(2) == 1


def restore_layout(y: Tensor, x: Tensor) -> Tensor:
    """``y (N, L, c)`` as ``(N, c, L)`` in the memory format of x."""
    y = y.transpose(1, 2)
    return y if channels_last(x) else dense(y)


def dense(x: Tensor) -> Tensor:
    """``x.contiguous()``; matrix by matrix, because only those are transposed block by block."""
    if x.is_contiguous() or x[0].numel() <= FEW_ELEMENTS:
        return x.contiguous()
    y = x.new_empty(x.shape)
    for to, given in zip(y, x, strict=True):
        to.copy_(given)
    return y


def match_layout(x: Tensor, other: Tensor) -> Tensor:
    """``x (g, l, c)`` with the memory order of ``other``."""
    return dense(x) if other.stride(-1) == 1 else dense(x.mT).mT


def empty_as(x: Tensor, channels: int) -> Tensor:
    """``(g, l, channels)`` with the memory order of ``x (g, l, C)``."""
    g, length, _ = x.shape
    if x.stride(-1) == 1:
        return x.new_empty(g, length, channels)
    return x.new_empty(g, channels, length).mT


def samples(tokens: Tensor) -> Iterator[slice]:
    """Samples that are computed together: as many as fill a tile, if they are dense in memory."""
    together = 1
    if tokens.is_contiguous() or tokens.mT.is_contiguous():
        together = max(1, _tile_elements(tokens) // (tokens.shape[1] * tokens.shape[2]))
    return (slice(n, n + together) for n in range(0, len(tokens), together))


def gathered_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x (g, l, C)``, but zeros where ``mask (g, l)`` is False, whatever x holds there.

    Zero times NaN is NaN, and a select is five times as slow as a bitwise operation.
    """
    if mask is None:
        return x
    bits = torch.int32 if x.dtype == torch.float32 else torch.int64
    return (x.view(bits) & -mask[..., None].to(bits)).view(x.dtype)


def position_tiles(x: Tensor) -> list[slice]:
    """Equal tiles of the positions of ``x (g, L, C)``."""
    length = x.shape[1]
    count = max(1, -(-x.numel() // _tile_elements(x)), -(-length // MOST_POSITIONS))
    step = -(-length // count)
    return [slice(start, start + step) for start in range(0, length, step)]


def _tile_elements(x: Tensor) -> int:
    """Elements in a tile of ``x (g, L, C)``."""
    return max(TILE, LEAST_POSITIONS * x.shape[2])


def split(x: Tensor, heads: int) -> Tensor:
    """``(g, l, heads·c)`` to ``(g, heads, l, c)``."""
    return x.unsqueeze(1) if heads == 1 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """``(g, heads, l, c)`` to ``(g, l, heads·c)``."""
    return x.squeeze(1) if x.shape[1] == 1 else x.transpose(1, 2).flatten(2)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` in the memory order of x."""
    return x @ matrix if x.stride(-1) == 1 else (matrix.mT @ x.mT).mT


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias`` for ``x (g, l, C)`` and ``weight (out, C)``, in the memory order of x."""
    if x.stride(-1) != 1:
        shared = weight.expand(len(x), -1, -1)
        if bias is None:
            return (shared @ x.mT).mT
        return torch.baddbmm(bias[:, None], shared, x.mT).mT
    rows = x.flatten(0, 1)
    if len(weight) <= NARROW and len(x) == 1:
        y = torch.nn.functional.linear(weight, rows).T
        y = y if bias is None else y.add_(bias)
    else:
        y = torch.nn.functional.linear(rows, weight, bias)
    return y.unflatten(0, x.shape[:2])


def add_product(total: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Adds ``x @ matrix`` to ``total (g, l, c)``; one matrix for all samples, or one per sample."""
    if matrix.dim() == 2 and (total.is_contiguous() or len(total) == 1):
        total.flatten(0, 1).addmm_(x.flatten(0, 1), matrix)
    elif total.stride(-1) == 1:
        total.baddbmm_(x, matrix.expand(len(x), -1, -1))
    else:
        total.mT.baddbmm_(matrix.mT.expand(len(x), -1, -1), x.mT)


def accumulate(total: Tensor | None, grad: Tensor, x: Tensor) -> None:
    """Adds ``gradᵀ x``, summed over samples and positions."""
    if total is None:
        return
    if x.is_contiguous() and grad.is_contiguous():
        grad, x = grad.flatten(0, 1)[None], x.flatten(0, 1)[None]
    for here, rows in zip(grad, x, strict=True):
        whole = len(rows) // POSITIONS_PER_PRODUCT * POSITIONS_PER_PRODUCT
        if whole:
            left, right = (
                z[:whole].unflatten(0, (-1, POSITIONS_PER_PRODUCT)) for z in (here, rows)
            )
            total.add_((left.mT @ right).sum(0))
        total.addmm_(here[whole:].T, rows[whole:])


def softmax_(logits: Tensor, heads: int) -> None:
    """In place, over n in each head of ``(g, l, heads·n)``."""
    apart, dim = _per_head(logits, heads)
    torch.softmax(apart, dim, out=apart)


def softmax_backward(grad: Tensor, q: Tensor, heads: int) -> Tensor:
    """The gradient of the logits; ``q`` is the result of ``softmax_``."""
    apart, dim = _per_head(q, heads)
    grad = match_layout(grad, q)  # with n = 1 both layouts match; q decides
    grad = grad.unflatten(-1, (heads, -1)) if dim == 3 else grad.mT.unflatten(1, (heads, -1))
    found = torch._softmax_backward_data(grad, apart, dim, q.dtype)
    return found.flatten(-2) if dim == 3 else found.flatten(1, 2).mT


def _per_head(x: Tensor, heads: int) -> tuple[Tensor, int]:
    """``(g, l, heads·n)`` as a dense tensor, and the axis of n in it."""
    if x.stride(-1) == 1:
        return x.unflatten(-1, (heads, -1)), 3
    return x.mT.unflatten(1, (heads, -1)), 2


def softmax_and_lse(
    logits: Tensor, alone: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The softmax over a tile's positions, in place, and ``log Σ exp`` of its logits.

    Zeros where ``mask (g, l)`` is False. The log-sum-exp is None if the tile is ``alone``.
    """
    if mask is not None:
        logits.add_(mask[..., None].to(logits.dtype).log())  # 0 or -inf
    peak = None if alone and mask is None else logits.amax(1, keepdim=True)
    if logits.is_contiguous():
        torch.softmax(logits, 1, out=logits)
    else:
        torch.softmax(logits.mT, 2, out=logits.mT)
    if peak is None:
        return logits, None
    nothing = peak == -torch.inf  # in this tile; another may have some
    if nothing.any():
        logits.masked_fill_(nothing, 0)
    if alone:
        return logits, None
    # At the peak, P is 1 / Σ exp(logit − peak).
    lse = torch.where(nothing, peak, peak - logits.amax(1, keepdim=True).log())
    return logits, lse.squeeze(1)
