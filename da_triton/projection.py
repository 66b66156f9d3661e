"""Pointwise convolutions as one GEMM, in any memory format; channels split by head."""

import torch
from torch import Tensor

from . import tracing


def split_heads(x: Tensor, heads: int, axis: int = 1) -> Tensor:
    """A view whose ``axis`` of heads·c channels is split into heads and c."""
    if heads == 1:
        return x.unsqueeze(axis)
    channels = tracing.sizes(x)[axis] // heads
    return x.reshape(*x.shape[:axis], heads, channels, *x.shape[axis + 1 :])


def channels_last(x: Tensor) -> bool:
    """Whether neighbours in memory are neighbours in channels: of ``(N, C, *positions)``."""
    return x.stride(1) == 1 and x.stride(-1) != 1


def in_format(x: Tensor, last: bool) -> Tensor:
    """``(N, C, *positions)`` without gaps, channels last or first; a copy only if it must be."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x.contiguous()


def project(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Pointwise convolution ``W x + bias (+ add)`` in x's memory format, one vendor GEMM.

    Shapes: x ``(N, in, L)``, weight ``(out, in)``, bias ``(out,)``, add ``(N, out, L)``.
    """
    if channels_last(x):  # rows of the product are positions
        if add is not None and bias is None and add.dtype == x.dtype:
            rows, added = (y.transpose(1, 2).flatten(0, 1) for y in (x, add))
            y = torch.addmm(added, rows, weight.t())
            return y.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        y = torch.nn.functional.linear(x.transpose(1, 2), weight, bias).transpose(1, 2)
        return y if add is None else add + y
    if x.device.type == "cpu" and x.dtype == torch.float32:
        # A batched product with one shared matrix is slower there than the convolution it is.
        y = torch.conv2d(x.unsqueeze(-1), weight[..., None, None], bias).squeeze(-1)
        return y if add is None else add + y
    shared = weight.expand(x.shape[0], -1, -1)
    if add is not None and add.dtype == x.dtype:
        y = torch.baddbmm(add, shared, x)
        return y if bias is None else y + bias[:, None]
    y = torch.bmm(shared, x) if bias is None else torch.baddbmm(bias[:, None], shared, x)
    return y if add is None else add + y


def add_project(start: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """``start + W x`` in ``start``, ``(N, out, L)``, whose memory format is x's; one product."""
    if channels_last(x):
        rows, columns = (y.transpose(1, 2).flatten(0, 1) for y in (start, x))
        rows.addmm_(columns, weight.t())
    else:
        start.baddbmm_(weight.expand(x.shape[0], -1, -1), x)
    return start
