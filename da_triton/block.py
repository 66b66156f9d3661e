r"""The block on the split route: library products around a backend's gather and distribute.

    order AZ    A, B, V = W X      G = A Pᵀ             Z = scale·G Q      Y = Wo Z + bo
          X-    M = X Pᵀ           G = Wa M + ba·1ᵀ      (A never exists)
          -H    H = scale·Wo G     Y = H Q + bo         (Z never exists)

Biases go where they are cheapest: bb cannot change a softmax over positions and is left out; rows
of P sum to 1, so ba is added to G; columns of Q sum to 1, so with H bo is added to H.

Everything is a differentiable operation, so gradients need no code here. X is ``(N, C, L)``;
``residual``, of the output's shape, is added to it.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


def block(core, x: Tensor, weights: dict[str, Any], *, recompute: bool, **options) -> Tensor:
    """``(N, C, L)`` to ``(N, C or c_m, L)``; ``core`` is the backend.

    With ``recompute``, autograd keeps x, the weights, lse and G, and projects again in backward.
    """
    if not (recompute and torch.is_grad_enabled()):
        return _block(core, x, **weights, **options)
    keep_descriptors = getattr(core, "KEEP_WHEN_RECOMPUTING", [])
    return checkpoint(
        functools.partial(_block, core, **options),
        x,
        **weights,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, keep_descriptors),
    )


def _block(
    core, x, weight_a, bias_a, weight_b, weight_v, bias_v, weight_out, bias_out, *,
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, keep, order,
):  # fmt: skip
    b = _split_heads(project(x, weight_b, None), heads)
    if order[0] == "X":
        shared = x[:, None].expand(-1, heads, -1, -1)
        m = core.gather(shared, b, keep=keep, logit_scale=logit_scale)
        g = weight_a.unflatten(0, (heads, -1)).to(m.dtype) @ m
    else:
        a = _split_heads(project(x, weight_a, None), heads)
        g = core.gather(a, b, keep=keep, logit_scale=logit_scale)
    if bias_a is not None:
        g = g + _gathered_bias(bias_a.unflatten(0, (heads, -1)).to(g.dtype), keep)
    v = _split_heads(project(x, weight_v, bias_v), heads)

    if order[1] == "Z":
        z = core.distribute(g, v, scale=scale, softmax=softmax_v, logit_scale=logit_scale_v)
        z = z.flatten(1, 2)
        if weight_out is None:
            return z if residual is None else residual + z
        return project(z, weight_out, bias_out, add=residual)
    per_head = weight_out.unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, C, m)
    h = scale * (per_head.to(g.dtype) @ g)
    if bias_out is not None and softmax_v:
        h = h + (bias_out.to(h.dtype) / heads)[:, None]
    y = core.distribute(h, v, softmax=softmax_v, logit_scale=logit_scale_v)
    y = y.squeeze(1) if heads == 1 else y.sum(1)
    if bias_out is not None and not softmax_v:
        y = y + bias_out[:, None]
    return y if residual is None else residual + y


def project(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None = None) -> Tensor:
    """Pointwise convolution ``W x + bias (+ add)`` in x's memory format, one library product.

    Shapes: x ``(N, in, L)``, weight ``(out, in)``, bias ``(out,)``, add ``(N, out, L)``.
    """
    if x.stride(1) == 1 and x.stride(2) != 1:  # channels last: rows of the product are positions
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


def _gathered_bias(bias: Tensor, keep: Tensor | None) -> Tensor:
    """What ba adds to G: itself, but nothing where a sample's positions are all masked."""
    bias = bias[:, :, None]
    return bias if keep is None else bias * keep.any(-1)[:, None, None, None]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, -1))
