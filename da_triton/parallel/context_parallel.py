r"""Positions split over the ranks of a process group: gigapixel images, volumes, long video.

Each rank holds a slice of the positions. A rank's gather gives descriptors ``G_r`` and log-sum-exp
``lse_r`` of its own slice; those of all ranks merge into the result of one device,

    lse = log Σ_r exp(lse_r)            G = Σ_r exp(lse_r − lse) · G_r

and every rank distributes to its own positions. Only ``(G_r, lse_r)`` cross the network, and in
backward ``dG``, whose size has nothing to do with the number of positions. The loss is the sum of
the ranks' losses, each over its own positions: dG is summed over the ranks, and with the lse and G
of the whole the gradients of a slice need no other slice (``kernels.gather_backward``). Both sums
are made from an all-gather, by every rank, in one order: the result is repeatable, and the same
bits everywhere. An attention map without a position left on any rank gives zeros; a slice may be
empty.

Called through ``process_group=`` of ``da_triton.gather``, ``double_attention``,
``double_attention_block`` and ``DoubleAttention``. Forward and backward are collective: all ranks
make the same calls in the same order, a rank without positions too, and backward on every rank
starts from a loss that depends on the result (``0 * z.sum()`` where there is nothing to say).

Time of one training step of the core, **a model, not a measurement**: c_m = c_n = 128, one head,
float32, L = 2²⁴ positions. Memory: A, B and V read, Z written, and in backward twice as much, at
3.35 TB/s. Wire: :func:`wire_bytes` at 450 GB/s among 8 GPUs, at 50 GB/s beyond.

    GPUs   positions each   memory      received by a GPU, both ways     wire
       8        2,097,152    3.8 ms                           0.9 MB   0.002 ms
      64          262,144    0.5 ms                           8.3 MB   0.17 ms
     512           32,768    0.06 ms                           67 MB   1.35 ms

An all-gather brings every rank every other rank's partial, so the wire grows with the ranks; it is
the price of bits that do not depend on the network. Split over as many ranks as the positions need,
and use the others for other samples.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..arguments import Weights
from ..ops.aten import core as aten
from ..ops.custom_op import wants_graph
from ..precision import accumulator, lse_dtype
from ..projection import project


def split(backend: ops.Backend, group: Any) -> ops.Backend:
    """``backend`` (not ``"eager"``), with positions split over the ranks of ``group``.

    Its gather gives G in float32 (float64 for float64 inputs). Extra tokens are the same on every
    rank and count once: rank 0 gathers from them and has all of their gradient, the others zeros.
    """

    def gather(a, b, *, mask=None, extra=None, logit_scale=1.0):
        extra_a, extra_b = (None, None) if extra is None else extra
        return _Gather.apply(a, b, mask, extra_a, extra_b, float(logit_scale), group, backend)[0]

    def distribute(g, v, **options):
        # A product over no positions, so that backward still enters its collective.
        return (backend if v.shape[-1] else ops.TORCH).distribute(g, v, **options)

    def block(x, w, mask, residual, o):
        def composed(x, *w):
            return _compose(gather, distribute, x, Weights(*w), mask, residual, o)

        if o.recompute is not True or not torch.is_grad_enabled():
            return composed(x, *w)
        return checkpoint(composed, x, *w, use_reentrant=False, preserve_rng_state=False)

    return backend._replace(gather=gather, distribute=distribute, block=block, direct=None)


def gather_weights(b: Tensor, mask: Tensor | None, logit_scale: float, group: Any) -> Tensor:
    """``P (N, heads, n, L)`` of this rank's positions; over all ranks each attention map sums to 1.

    Without a gradient: for inspection.
    """
    b = b.detach()
    nothing = b.new_empty((*b.shape[:2], 0, b.shape[3]))  # features: only lse is wanted
    _, lse = _merged(_partial(ops.TORCH, nothing, b, mask, None, None, logit_scale), group)
    logits = aten.scaled_logits(b, mask, logit_scale)
    return aten.weights_from_lse(logits, lse).to(b.dtype)


class WireBytes(NamedTuple):
    """Bytes that a rank receives."""

    forward: int
    backward: int


def wire_bytes(
    batch: int, heads: int, m: int, n: int, *, ranks: int, dtype: torch.dtype = torch.float32
) -> WireBytes:
    """Bytes that each rank receives (and, on a ring, sends) in one gather and in its backward.

    ``heads·m`` features and ``heads·n`` descriptors of ``dtype``. G and dG travel in float32
    (float64 for float64 inputs), lse in float64 (float32 for float16 and bfloat16 inputs); the
    number of positions does not matter.
    """
    sums, statistics = accumulator(dtype).itemsize, lse_dtype(dtype).itemsize
    rows = (ranks - 1) * batch * heads * n
    return WireBytes(rows * (m * sums + statistics), rows * m * sums)


class _Gather(torch.autograd.Function):
    """G and lse of all ranks' positions. Saves a, b, G and lse, as on one device."""

    @staticmethod
    def forward(a, b, mask, extra_a, extra_b, logit_scale, group, backend):
        if group.rank() != 0:
            extra_a = extra_b = None
        return _merged(_partial(backend, a, b, mask, extra_a, extra_b, logit_scale), group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.logit_scale, ctx.group, ctx.backend = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx, dg, _):
        a, b, mask, extra_a, extra_b, g, lse = ctx.saved_tensors
        if dg is None:
            return (None,) * 8
        if wants_graph():
            raise RuntimeError(
                "Positions split over a process group can be differentiated once, by autograd; "
                "create_graph=True and torch.func need more. Gather all positions on one device "
                "for that."
            )
        dg = _of_all_ranks(dg, ctx.group).sum(0)
        grads: list[Any] = [None] * 8
        tokens_here = extra_a is not None and ctx.group.rank() == 0
        sources = {0: (a, b, mask, True), 3: (extra_a, extra_b, None, tokens_here)}
        for i, (values, keys, masking, here) in sources.items():
            needs = ctx.needs_input_grad[i : i + 2]
            if not any(needs):
                continue
            if here and keys.shape[-1]:
                found = ctx.backend.gather_backward(
                    dg, values, keys, masking, g, lse, None, ctx.logit_scale, *needs
                )
            else:
                found = torch.zeros_like(values), torch.zeros_like(keys)
            grads[i : i + 2] = (x if need else None for x, need in zip(found, needs, strict=True))
        return tuple(grads)


def _partial(backend, a, b, mask, extra_a, extra_b, logit_scale):
    """``(G_r, lse_r)`` of this rank's positions and tokens; 0 and +inf where it has neither."""
    sources = [(a, b, _kept(mask, b))]
    if extra_b is not None:
        sources.append((extra_a, extra_b, _kept(None, extra_b)))
    sources = [source for source in sources if source[1].shape[-1]]
    if not sources:
        lse = b.new_full(b.shape[:3], torch.inf, dtype=lse_dtype(b.dtype))
        return a.new_zeros((*a.shape[:3], b.shape[2]), dtype=accumulator(a.dtype)), lse
    (a, b, mask), *tokens = sources
    extra = tokens[0][:2] if tokens else None
    return backend.gather_lse(a, b, mask=mask, extra=extra, logit_scale=logit_scale)


def _kept(mask, b):
    """The mask, made if None: a slice whose logits are all −inf has no weight instead of NaN."""
    if mask is not None:
        return mask
    return torch.ones((1, 1), dtype=torch.bool, device=b.device).expand(b.shape[0], b.shape[-1])


def _merged(part, group):
    """G ``(N, heads, m, n)`` and lse ``(N, heads, n)`` of all ranks from this rank's partial.

    One message: lse travels as more rows of G, in whose dtype its bits are read.
    """
    g, lse = part
    rows = lse.view(g.dtype).unflatten(-1, (-1, lse.shape[-1]))
    parts = _of_all_ranks(torch.cat([g, rows], 2), group)
    g, rows = parts.split([g.shape[2], rows.shape[2]], 3)
    log_weights = rows.flatten(3).contiguous().view(lse.dtype)
    log_weights = log_weights.masked_fill(log_weights == torch.inf, -torch.inf)
    most = log_weights.amax(0)
    pivot = most.masked_fill(most == -torch.inf, 0)
    total = (log_weights - pivot).exp().sum(0)
    lse = (pivot + total.log()).masked_fill(total == 0, torch.inf)
    weights = (log_weights - lse).exp().to(g.dtype)
    return (weights.unsqueeze(3) * g).sum(0), lse


def _of_all_ranks(x, group):
    """``(ranks, *x.shape)``: x of every rank, in the order of ranks."""
    size = group.size()
    if x.numel() == 0:
        return x.new_empty((size, *x.shape))
    flat = torch.ops._c10d_functional.all_gather_into_tensor(
        x.contiguous().flatten(), size, group.group_name
    )
    return torch.ops._c10d_functional.wait_tensor(flat).view(size, *x.shape)


# --- the block ------------------------------------------------------------------------------------


def _compose(gather, distribute, x, w, mask, residual, o):
    """The block in the paper's order, on ``(N, C, L)``.

    Not ``ops.aten.block.compose``: that adds A's bias to G of each sample with an unmasked
    position, and a rank sees only its own positions, of which there may be none.
    """
    a, b, v = (
        _project(x, weight, bias).unflatten(1, (o.heads, -1))
        for weight, bias in ((w.a, w.bias_a), (w.b, None), (w.v, w.bias_v))
    )
    g = gather(a, b, mask=mask, logit_scale=o.logit_scale)
    z = distribute(g, v, scale=o.scale, softmax=o.softmax_v, logit_scale=o.logit_scale_v)
    y = z.flatten(1, 2)
    if w.out is not None:
        y = _project(y, w.out, w.bias_out)
    return y if residual is None else residual + y


def _project(x, weight, bias):
    if x.shape[2]:
        return project(x, weight, bias)
    y = weight @ x
    return y if bias is None else y + bias[:, None]
