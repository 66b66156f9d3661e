"""Packed sequences in Triton kernels: in batches, so that few launches serve many sequences.

A long run of adjacent sequences of equal length is a view and takes one launch. Short runs share
buckets: their positions are copied into a batch padded to its longest sequence, which is at most a
quarter longer than its shortest, and results are copied back. Lengths from 10 to 40 positions need
six buckets, and padding adds at most a quarter to what is copied.
"""

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...precision import accumulator, lse_dtype
from ..aten.varlen import channels_last, empty_like
from . import core as triton

PADDING = 1.25  # the longest sequence of a bucket over the shortest
LONG = 2**13  # positions of a run whose copies would take longer than its launch; an estimate


class Copies(NamedTuple):
    """The positions of a bucket."""

    source: Tensor  # the packed position of each padded one; padding repeats the last
    target: Tensor  # the packed positions, without padding
    origin: Tensor  # where these are in the padded ones
    mask: Tensor | None  # (batch, length), False at padding; None without padding


class Part(NamedTuple):
    """``batch`` sequences of up to ``length`` positions: those of one launch."""

    batch: int
    length: int
    sequences: slice | Tensor
    positions: slice | Copies

    @property
    def mask(self) -> Tensor | None:
        return None if isinstance(self.positions, slice) else self.positions.mask

    def take(self, x: Tensor) -> Tensor:
        """``(1, …, total)`` as ``(batch, …, length)``, a view or a copy, in its memory format."""
        x = x[0]
        if isinstance(self.positions, slice):
            taken = x[..., self.positions]
        else:
            taken = _take(x, self.positions.source)
        return taken.unflatten(-1, (self.batch, self.length)).movedim(-2, 0)

    def put(self, x: Tensor, out: Tensor) -> None:
        """Writes ``(batch, …, length)`` into ``out (1, …, total)``, without padding."""
        x, out = x.movedim(0, -2), out[0]
        if isinstance(self.positions, slice):
            out[..., self.positions].unflatten(-1, (self.batch, self.length)).copy_(x)
            return
        _, target, origin, _ = self.positions
        x = _take(x.flatten(-2), origin)
        if channels_last(out):
            out.movedim(-1, 0).index_copy_(0, target, x.movedim(-1, 0))
        else:
            out.scatter_(-1, target.expand(x.shape), x)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[..., index]`` in the memory format of x."""
    if channels_last(x):
        return x.movedim(-1, 0).index_select(0, index).movedim(0, -1)
    return x.gather(-1, index.expand(*x.shape[:-1], -1))


@functools.lru_cache(maxsize=8)
def plan(lengths: tuple[int, ...], device: torch.device) -> list[Part]:
    """The launches for sequences of these lengths; empty sequences have none."""
    offsets = [0, *itertools.accumulate(lengths)]
    runs, first = [], 0
    for length, equal in itertools.groupby(lengths):
        count = len(list(equal))
        if length:
            runs.append((length, first, count))
        first += count
    short = [run for run in runs if run[0] * run[2] < LONG]
    if len(short) == 1:  # nothing to share a bucket with
        short = []
    partials = [
        Part(count, length, slice(i, i + count), slice(offsets[i], offsets[i] + count * length))
        for length, i, count in runs
        if not short or length * count >= LONG
    ]
    bucket: list[tuple[int, int]] = []
    for length, i, count in sorted(short, reverse=True):
        if bucket and bucket[0][0] > PADDING * length:
            partials.append(_bucket(offsets, bucket, device))
            bucket = []
        bucket += [(length, s) for s in range(i, i + count)]
    if bucket:
        partials.append(_bucket(offsets, bucket, device))
    return partials


def _bucket(offsets: list[int], members: list[tuple[int, int]], device: torch.device) -> Part:
    length = members[0][0]
    lengths, sequences = torch.tensor(members, device="cpu").unbind(1)
    steps = torch.arange(length, device="cpu")
    mask = steps < lengths[:, None]
    starts = torch.tensor(offsets, device="cpu")[sequences, None]
    source = (starts + torch.minimum(steps, lengths[:, None] - 1)).flatten()
    origin = mask.flatten().nonzero().squeeze(1)
    upload = functools.partial(torch.Tensor.to, device=device, non_blocking=True)
    copies = Copies(
        upload(source),
        upload(source[origin]),
        upload(origin),
        upload(mask) if len(origin) < len(source) else None,
    )
    return Part(len(members), length, upload(sequences), copies)


def _samples(x: Tensor | None, part: Part) -> Tensor | None:
    """The samples of a part's sequences."""
    if x is None or isinstance(part.sequences, slice):
        return None if x is None else x[part.sequences]
    return x.index_select(0, part.sequences)


def _inputs(part, a, b, mask, extra_a, extra_b):
    mask = None if mask is None else part.take(mask)
    if part.mask is not None:
        mask = part.mask if mask is None else mask & part.mask
    return part.take(a), part.take(b), mask, _samples(extra_a, part), _samples(extra_b, part)


def gather(a, b, mask, extra_a, extra_b, lengths, logit_scale):
    """G and lse of each sequence; zeros for an empty one."""
    shape = (len(lengths), *a.shape[1:3], b.shape[2])
    g = a.new_zeros(shape, dtype=accumulator(a.dtype))
    lse = a.new_zeros((*shape[:2], shape[3]), dtype=lse_dtype(a.dtype))
    for part in plan(lengths, a.device):
        inputs = _inputs(part, a, b, mask, extra_a, extra_b)
        g[part.sequences], lse[part.sequences] = triton.gather_op(*inputs, logit_scale)
    return g, lse


def gather_backward(dg, a, b, mask, extra_a, extra_b, g, lse, lengths, logit_scale, needs):
    """Gradients of a, b and the tokens; None where not needed."""
    grads = [
        empty_like(x, x.shape[2]) if need else None
        for x, need in zip((a, b), needs[:2], strict=True)
    ]
    tokens = [
        torch.zeros_like(x) if need else None
        for x, need in zip((extra_a, extra_b), needs[2:], strict=True)
    ]
    for part in plan(lengths, a.device):
        a_, b_, mask_, extra_a_, extra_b_ = _inputs(part, a, b, mask, extra_a, extra_b)
        dg_, g_, lse_ = (_samples(x, part) for x in (dg, g, lse))
        da, db, *found = triton.gather_gradients(
            dg_, a_, b_, mask_, extra_a_, extra_b_, g_, lse_, None, logit_scale, needs
        )
        for x, out in zip((da, db), grads, strict=True):
            if out is not None:
                part.put(x, out)
        for x, out in zip(found, tokens, strict=True):
            if out is not None:
                out[part.sequences] = x
    return *grads, *tokens


def distribute(g, v, lengths, scale, softmax, logit_scale):
    """Z in v's memory format."""
    z = empty_like(v, g.shape[2])
    for part in plan(lengths, v.device):
        inputs = _samples(g, part), part.take(v)
        part.put(triton.distribute_op(*inputs, scale, softmax, logit_scale), z)
    return z


def distribute_backward(dz, g, v, lengths, scale, softmax, logit_scale, need_g, need_v):
    """dG in the dtype of sums and dV; None where not needed."""
    dg: Any = g.new_zeros(g.shape, dtype=accumulator(v.dtype)) if need_g else None
    dv: Any = empty_like(v, v.shape[2]) if need_v else None
    for part in plan(lengths, v.device):
        dz_ = part.take(dz)
        if part.mask is not None:  # padding repeats positions
            dz_ = dz_.masked_fill(~part.mask[:, None, None], 0)
        inputs = dz_, _samples(g, part), part.take(v), scale, softmax, logit_scale
        dg_, dv_ = triton.distribute_backward_op(*inputs, need_g, need_v)
        if need_g:
            dg[part.sequences] = dg_
        if need_v:
            part.put(dv_, dv)
    return dg, dv
