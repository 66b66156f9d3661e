"""Samples of different sizes in one batch: masks for padding, and packed positions without any.

Packed, the positions of S samples are concatenated, ``(1, channels, total)``; sample s has those
from ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``, as in the variable-length interface of
FlashAttention. The Triton backend computes samples of similar length in one launch (see
``ops.triton.varlen``), the ``torch`` backend one sample after another, without padding (see
``ops.aten.varlen``). Both are operators that read the offsets inside: ``torch.compile`` makes one
graph for all lengths. The definition, forward mode, second derivatives, traced programs
(``torch.jit.trace``) and DTensors take one call per run of equal lengths; ``torch.export`` cannot
read the offsets.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import checks, tracing
from .ops import EAGER, Backend, custom_op


def mask_from_sizes(
    sizes: Sequence[Sequence[int]] | Tensor, shape: Sequence[int], device: Any = None
) -> Tensor:
    """``mask (N, *shape)`` for padded samples: True in the first ``sizes[n]`` of each axis.

    Args:
        sizes: for each sample as many numbers as ``shape`` has, ``(h, w)`` for images; in positions
            of the feature map, not in pixels. A list or an integer tensor ``(N, axes)``.
        shape: positions of the padded feature map, one to three axes.
        device: of the mask. Default: that of ``sizes`` if it is a tensor, else the CPU.

    Raises:
        ValueError: sizes below 0 or over ``shape``, or of another number of axes.
        TypeError: sizes that are not integers.

    Example:
        >>> mask_from_sizes([(1, 2), (2, 1)], (2, 2)).int().tolist()
        [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
    """
    shape = tuple(shape)
    if device is None:  # as_tensor would move sizes to the default device
        device = sizes.device if isinstance(sizes, Tensor) else "cpu"
    given = torch.as_tensor(sizes, device=device)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(
            f"sizes must be integers, got {given.dtype}. Convert them with "
            "torch.as_tensor(sizes).long()."
        )
    if not 1 <= len(shape) <= 3 or given.dim() != 2 or given.shape[1] != len(shape):
        raise ValueError(
            "sizes must be (N, axes) and shape have as many axes, 1 to 3, got sizes of shape "
            f"{tuple(given.shape)} and shape={shape}."
        )
    if bool(((given < 0) | (given > torch.tensor(shape, device=given.device))).any()):
        raise ValueError(
            f"sizes must be from 0 to shape={shape}, got {given.tolist()}. Give sizes in "
            "positions of the feature map, after downsampling."
        )
    given = given.long()
    mask = torch.ones((len(given), *shape), dtype=torch.bool, device=given.device)
    for axis, length in enumerate(shape):
        inside = torch.arange(length, device=given.device) < given[:, axis, None]
        mask &= inside.view(-1, *(length if i == axis else 1 for i in range(len(shape))))
    return mask


def pack(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Feature maps ``(C, *positions)`` as ``(1, C, total)``, and cu_seqlens (int64, on the CPU).

    Raises:
        TypeError, ValueError, RuntimeError: no samples, or different channels, dtypes or devices.

    Example:
        >>> x, cu_seqlens = pack([torch.ones(8, 3, 4), torch.ones(8, 2, 2)])
        >>> x.shape, cu_seqlens.tolist()
        (torch.Size([1, 8, 16]), [0, 12, 16])
    """
    if not isinstance(samples, (list, tuple)) or not samples:
        what = "an empty list" if isinstance(samples, (list, tuple)) else type(samples).__name__
        raise TypeError(
            f"samples must be a list of one or more tensors (C, *positions), got {what}."
        )
    for i, x in enumerate(samples):
        checks.tensor(f"samples[{i}]", x)
        if x.dim() < 2 or x.shape[0] != samples[0].shape[0]:
            raise ValueError(
                f"samples[{i}] must be (C, *positions) with the channels of samples[0], of shape "
                f"{tuple(samples[0].shape)}; got shape {tuple(x.shape)}."
            )
        checks.one_kind(**{"samples[0]": samples[0], f"samples[{i}]": x})
    rows = [x.flatten(1) for x in samples]
    offsets = [0, *itertools.accumulate(x.shape[1] for x in rows)]
    return torch.cat(rows, 1)[None], torch.tensor(offsets, device="cpu")


def unpack(
    packed: Tensor, cu_seqlens: Tensor, positions: Sequence[Sequence[int]] | None = None
) -> list[Tensor]:
    """Views ``(C, length)`` of ``packed (1, C, total)``; ``(C, *positions[s])`` if they are given.

    Under autograd they are not to be changed in place: clone one first.

    Raises:
        TypeError, ValueError: as the public functions with ``cu_seqlens``; ``positions`` of another
            number of samples, or of other lengths.
    """
    checks.cu_seqlens(cu_seqlens, packed=packed)
    offsets = checks.ends(cu_seqlens, packed=packed)
    lengths = [end - start for start, end in itertools.pairwise(offsets)]
    parts = packed[0].split(lengths, 1)
    if positions is None:
        return list(parts)
    if [torch.Size(p).numel() for p in positions] != lengths:
        raise ValueError(
            f"positions must have the lengths {lengths}, got {[tuple(p) for p in positions]}."
        )
    return [x.unflatten(1, tuple(p)) for x, p in zip(parts, positions, strict=True)]


def packed_backend(backend: Backend, cu_seqlens: Tensor, x: Tensor) -> Backend:
    """``backend`` with a gather and a distribute that take packed positions.

    Activations are ``(1, heads, channels, total)``, the mask ``(1, total)``; G and extra tokens
    have a sample for each sequence. A sequence without positions has G = 0; nothing is distributed
    to it.
    """
    # A copy: the caller's may be changed before the backward pass reads it.
    cu_seqlens = cu_seqlens.detach().to("cpu", copy=True)
    if (
        backend is EAGER
        or custom_op.needs_aten()
        or tracing.exporting()
        or is_traceable_wrapper_subclass(x)  # such as a DTensor
    ):
        return per_sequence(backend, cu_seqlens)
    from .ops import varlen as varlen_ops

    return varlen_ops.packed_ops(backend, cu_seqlens)


def per_sequence(backend: Backend, cu_seqlens: Tensor) -> Backend:
    """Packed positions in calls of ``backend``, one for each run of equal lengths."""

    def runs(**activations: Tensor) -> list[tuple[int, int]]:
        """Lengths, and how many neighbours have them."""
        lengths = (
            end - start for start, end in itertools.pairwise(checks.ends(cu_seqlens, **activations))
        )
        return [(length, len(list(equal))) for length, equal in itertools.groupby(lengths)]

    def split(x: Tensor, runs: list[tuple[int, int]]) -> Iterator[Tensor]:
        """``(1, …, total)`` as views ``(count, …, length)``, one for each run of equal lengths.

        All from one split, whose gradient is one concatenation: that of a slice has the size of x.
        """
        parts = x.squeeze(0).split([length * count for length, count in runs], -1)
        for part, (length, count) in zip(parts, runs, strict=True):
            yield part.unflatten(-1, (count, length)).movedim(-2, 0)

    def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
        found_runs = runs(a=a)
        nothing = [None] * len(found_runs)
        masks = nothing if mask is None else split(mask, found_runs)
        counts = [count for _, count in found_runs]
        tokens = nothing if extra is None else zip(*(x.split(counts) for x in extra), strict=True)
        found = []
        given = zip(split(a, found_runs), split(b, found_runs), masks, tokens, strict=True)
        for a_, b_, mask_, extra_ in given:
            if a_.shape[-1]:
                options = {"mask": mask_, "extra": extra_, "logit_scale": logit_scale}
                found.append(backend.gather(a_, b_, **options))
            else:
                found.append(a_ @ b_.mT)  # zeros that still have gradients
        return torch.cat(found)

    def distribute(g, v, **options):
        found_runs = runs(v=v)
        counts = [count for _, count in found_runs]
        parts: list[Tensor] = []
        for g_, v_ in zip(g.split(counts), split(v, found_runs), strict=True):
            z = backend.distribute(g_, v_, **options) if v_.shape[-1] else g_.to(v.dtype) @ v_
            parts += (z.squeeze(0),) if len(z) == 1 else z.unbind()
        if v.stride(-1) == 1:
            return torch.cat(parts, -1)[None]
        positions_first = [z.permute(2, 0, 1) for z in parts]  # joined as v's memory has them
        return torch.cat(positions_first).permute(1, 2, 0)[None]

    return backend._replace(gather=gather, distribute=distribute)
