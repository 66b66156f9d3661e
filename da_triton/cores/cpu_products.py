"""What the block on a CPU is made of: when it applies, layouts, pieces, products.

Maps are ``(g, l, channels)``: g samples, l positions of each.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

PIECE = 2**20  # elements of x in a piece: it and its maps fit a last-level cache
SMALL_SAMPLE = 2**17  # elements of x in a sample too small to be worked on alone
FEW_POSITIONS = 256  # so few rows of one sample make slow products
NARROW = 32  # maps so few that positions, not maps, are kept adjacent in memory
# oneDNN's product, which torch.compile uses too: up to 1.3 times as fast as the BLAS of torch.mm.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def suits(tensors: list[Tensor]) -> bool:
    """Whether these are a CPU's plain tensors and nothing but autograd watches what is done."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or transformed():
        return False
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        for x in tensors
    )


def transformed() -> bool:
    """Whether a transform of ``torch.func``, forward-mode AD or a dispatch mode is active."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _python_dispatch._get_current_dispatch_mode() is not None
    )


def position_major(x: Tensor) -> Tensor:
    """``(N, C, L)`` as ``(N, L, C)``, copied where products of it would be slow or copy it."""
    tokens = x.transpose(1, 2)
    large = x.shape[2] >= FEW_POSITIONS and x.shape[1] * x.shape[2] >= SMALL_SAMPLE
    return tokens if x.stride(1) == 1 or (large and x.stride(2) == 1) else tokens.contiguous()


def empty_like(x: Tensor, channels: int) -> Tensor:
    """``(N, L, channels)`` with the memory format of ``x (N, C, L)``."""
    batch, _, length = x.shape
    if x.stride(1) == 1 and x.stride(2) != 1:
        return x.new_empty(batch, length, channels)
    return x.new_empty(batch, channels, length).transpose(1, 2)


def samples(tokens: Tensor, keep: Tensor | None) -> Iterator[slice]:
    """Samples that are worked on together: a piece's worth, if their rows are those of a matrix."""
    together = 1
    if keep is None and tokens.is_contiguous():
        together = max(1, PIECE // (tokens.shape[1] * tokens.shape[2]))
    return (slice(n, n + together) for n in range(0, len(tokens), together))


def kept_positions(keep: Tensor | None, sample: slice) -> Tensor | None:
    """The positions of one sample that take part, or None for all."""
    return None if keep is None else keep[sample][0].nonzero()[:, 0]


def split_positions(x: Tensor) -> list[slice]:
    """Equal pieces of the positions of ``x (g, L, C)``."""
    length = x.shape[1]
    step = -(-length // max(1, -(-x.numel() // PIECE)))
    return [slice(start, start + step) for start in range(0, length, step)] if length else []


def split(x: Tensor, heads: int) -> Tensor:
    """``(g, l, heads·c)`` to ``(g, heads, l, c)``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """``(g, heads, l, c)`` to ``(g, l, heads·c)``."""
    return x.transpose(1, 2).flatten(2)


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x Wᵀ + bias`` for ``x (g, l, C)`` and ``weight (out, C)``."""
    rows = x.flatten(0, 1)
    fast = ONEDNN and rows.dtype == torch.float32 and rows.is_contiguous()
    linear = _onednn_linear if fast else torch.nn.functional.linear
    if len(weight) <= NARROW and len(x) == 1:
        y = linear(weight, rows, None).T
        y = y if bias is None else y.add_(bias)
    else:
        y = linear(rows, weight, bias)
    return y.unflatten(0, x.shape[:2])


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def add_product(total: Tensor, x: Tensor, matrix: Tensor) -> None:
    """Adds ``x @ matrix`` to ``total (g, l, c)``, as one product where its rows allow it."""
    if total.is_contiguous() or len(total) == 1:
        total.flatten(0, 1).addmm_(x.flatten(0, 1), matrix)
    else:
        total.baddbmm_(x, matrix.expand(len(x), -1, -1))


def accumulate(total: Tensor | None, grad: Tensor, x: Tensor) -> None:
    """Adds ``gradᵀ x``, summed over samples and positions."""
    if total is not None:
        total.addmm_(grad.flatten(0, 1).T, x.flatten(0, 1))


def softmax_(maps: Tensor, heads: int) -> None:
    """In place, over the maps of each head of ``(g, l, heads·n)``."""
    apart = maps.unflatten(-1, (heads, -1))
    if maps.is_contiguous() or heads > 1:
        torch.softmax(apart, -1, out=apart)
    else:
        torch.softmax(maps.mT, 1, out=maps.mT)


def softmax_and_mass(logits: Tensor, alone: bool) -> tuple[Tensor, Tensor | None]:
    """The softmax over a piece's positions, in place, and ``log Σ exp`` of its logits."""
    peak = None if alone else logits.amax(1, keepdim=True)
    if logits.is_contiguous():
        torch.softmax(logits, 1, out=logits)
    else:
        torch.softmax(logits.mT, 2, out=logits.mT)
    if peak is None:
        return logits, None
    nothing = peak == -torch.inf  # in this piece; in another there may be something
    if nothing.any():
        logits.masked_fill_(nothing, 0)
    # At the peak, P is 1 / Σ exp(logit − peak).
    mass = torch.where(nothing, peak, peak - logits.amax(1, keepdim=True).log())
    return logits, mass.squeeze(1)
