"""Layers in circulation that are double attention, or a part of it, under other names.

A family says by which children such a layer is known, what its formula may be (``choices``: copies
differ in scales, softmaxes and sums), and runs ours with the layer's own children (``forward``).
Nothing here decides that a layer *is* of a family: ``accelerate`` proves it by numbers.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import LAST, OTHER_NAMES_OF_LAST
from ..functional import double_attention, gather
from ..modules import CONVOLUTIONS, attend, is_pointwise

Options = dict[str, Any]


class Family:
    """``name``: how it is called. ``arguments``: how many ``forward`` takes after the module.

    All methods are static: a family has no state.
    """

    name: str
    arguments = 1

    @staticmethod
    def has_children(module: nn.Module) -> bool:
        """Whether the module's children are those of the family."""
        raise NotImplementedError

    @staticmethod
    def choices(module: nn.Module) -> Iterator[Options]:
        """Options of ``forward`` that the module's formula may have."""
        yield {}

    @staticmethod
    def other_meanings(module: nn.Module) -> dict[str, Any]:
        """What else such a layer may compute: in words, and as a function of the module, its input
        and the options."""
        return {}

    @staticmethod
    def inputs(module: nn.Module, positions: tuple[int, int]) -> tuple[Any, ...]:
        """Random arguments, about ``h × w`` positions, a batch of two."""
        raise NotImplementedError

    @staticmethod
    def forward(*args: Any, **options: Any) -> Tensor:
        """Ours, given the module, its arguments, ``backend`` and options."""
        raise NotImplementedError


class DoubleAttentionCopies(Family):
    name = "double attention (A²-Nets)"

    @staticmethod
    def has_children(module):
        return all(_is_convolution(module, name) for name in ("convA", "convB", "convV"))

    @staticmethod
    def choices(module):
        lasts = [n for n in (LAST, *OTHER_NAMES_OF_LAST) if _is_convolution(module, n)]
        for last, residual in itertools.product([*lasts, None], (False, True)):
            yield {"last": last, "residual": residual}

    @staticmethod
    def other_meanings(module):
        def wrong(axis_b, axis_v):
            def forward(module, x, *, last, residual):
                a, b, v = (getattr(module, n)(x).flatten(2) for n in ("convA", "convB", "convV"))
                z = a @ b.softmax(axis_b).transpose(1, 2) @ v.softmax(axis_v)
                y = z.unflatten(2, x.shape[2:])
                y = y if last is None else getattr(module, last)(y)
                return x + y if residual else y

            return forward

        return {
            "its softmaxes run over the batch (F.softmax without dim takes axis 0 of a 3-D "
            "tensor): a sample's result depends on its neighbours in the batch, and is the same "
            "at every position where it is alone. This is not double attention; its weights load "
            "into da_triton.DoubleAttention, but the network has to be trained again": wrong(0, 0),
            "its second softmax runs over positions, as the first one does, and not over the "
            "maps: positions compete for each descriptor, and no position's weights sum to 1. This "
            "is not double attention": wrong(2, 2),
        }

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(module.convA, positions),)

    @staticmethod
    def forward(module, x, *, last, residual, backend):
        final = None if last is None else getattr(module, last)
        return attend(
            x, module.convA, module.convB, module.convV, final, residual=residual, backend=backend
        )


class EfficientAttention(Family):
    name = "Efficient Attention (Shen et al.)"

    @staticmethod
    def has_children(module):
        names = ("keys", "queries", "values", "reprojection")
        return all(_is_convolution(module, name) for name in names) and _heads(module) > 0

    @staticmethod
    def choices(module):
        yield {"residual": True}
        yield {"residual": False}

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(module.keys, positions),)

    @staticmethod
    def forward(module, x, *, residual, backend):
        return attend(
            x, module.values, module.keys, module.queries, module.reprojection,
            residual=residual, heads=_heads(module), backend=backend,
        )  # fmt: skip


class LinearAttention(Family):
    name = "linear attention (diffusion U-Nets, latent diffusion, Grad-TTS)"

    @staticmethod
    def has_children(module):
        together = _is_convolution(module, "to_qkv")
        apart = all(_is_convolution(module, name) for name in ("to_q", "to_k", "to_v"))
        last = isinstance(getattr(module, "to_out", None), nn.Module)
        return (together or apart) and last and _heads(module) > 0

    @staticmethod
    def choices(module):
        norms = (True, False) if isinstance(getattr(module, "norm", None), nn.Module) else (False,)
        logits = (0.0,) if hasattr(module, "to_qkv") else (-0.25, 0.0)
        for norm, residual, softmax, power, logit_power, mean in itertools.product(
            norms, (False, True), (True, False), (-0.5, 0.0), logits, (False, True)
        ):
            yield {
                "norm": norm, "residual": residual, "softmax_v": softmax, "scale_power": power,
                "logit_scale_power": logit_power, "mean": mean,
            }  # fmt: skip

    @staticmethod
    def other_meanings(module):
        def quadratic(module, x, *, norm, residual, scale_power, **_):
            q, k, v = (
                t.flatten(2).unflatten(1, (_heads(module), -1)).transpose(2, 3)
                for t in _q_k_v(module, module.norm(x) if norm else x)
            )
            if (tokens := getattr(module, "mem_kv", None)) is not None:
                k, v = (
                    torch.cat([m.expand(x.shape[0], -1, -1, -1), t], 2)
                    for m, t in zip(tokens, (k, v), strict=True)
                )
            weights = (q @ k.transpose(2, 3) * q.shape[-1] ** scale_power).softmax(-1)
            z = (weights @ v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
            return module.to_out(z) + x if residual else module.to_out(z)

        return {"it is softmax(Q Kᵀ) attention, of quadratic cost: another operation": quadratic}

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(getattr(module, "to_qkv", None) or module.to_q, positions),)

    @staticmethod
    def forward(
        module, x, *, norm, residual, softmax_v, scale_power, logit_scale_power, mean, backend
    ):
        """``scale_power``: scale = (channels of a head of k) ** power. ``mean``: divided by L."""
        q, k, v = _q_k_v(module, module.norm(x) if norm else x)
        heads = _heads(module)
        width = int(k.shape[1]) // heads  # a tensor, in a trace
        tokens = getattr(module, "mem_kv", None)
        z = double_attention(
            v, k, q, heads=heads, softmax_v=softmax_v,
            scale=width**scale_power / (math.prod(map(int, x.shape[2:])) if mean else 1),
            logit_scale=width**logit_scale_power, logit_scale_v=width**logit_scale_power,
            extra=None if tokens is None else tuple(t.flatten(0, 1)[None] for t in tokens.flip(0)),
            backend=backend,
        )  # fmt: skip
        out = module.to_out(z)
        return out + x if residual else out


class FactorAttention(Family):
    name = "factor attention (CoaT)"
    arguments = 2

    @staticmethod
    def has_children(module):
        names = ("qkv", "proj", "crpe")
        return (
            all(isinstance(getattr(module, name, None), nn.Module) for name in names)
            and isinstance(module.qkv, nn.Linear)
            and _heads(module) > 0
        )

    @staticmethod
    def choices(module):
        yield {"scale_power": -0.5}
        yield {"scale_power": 0.0}

    @staticmethod
    def inputs(module, positions):
        h, w = positions
        return _like(module.qkv, 2, 1 + h * w, module.qkv.in_features), positions

    @staticmethod
    def forward(module, x, size, *, scale_power, backend):
        """``(N, 1 + H·W, C)`` tokens, channels of a head beside each other, to the same shape."""
        heads = _heads(module)
        q, k, v = module.qkv(x).transpose(1, 2).chunk(3, dim=1)
        scale = (int(q.shape[1]) // heads) ** scale_power
        z = double_attention(v, k, q, heads=heads, softmax_v=False, scale=scale, backend=backend)
        by_head = (t.unflatten(1, (heads, -1)).transpose(2, 3) for t in (q, v))
        z = z.transpose(1, 2) + module.crpe(*by_head, size=size).transpose(1, 2).flatten(2)
        out = module.proj(z)
        drop = getattr(module, "proj_drop", None)
        return out if drop is None else drop(out)


class GlobalContext(Family):
    name = "global context (GCNet)"
    LOGITS = ("conv_attn", "conv_mask")
    FACTOR = ("mlp_scale", "channel_mul_conv")
    TERM = ("mlp_add", "channel_add_conv")

    @staticmethod
    def has_children(module):
        logits = _first(module, GlobalContext.LOGITS)
        parts = _first(module, GlobalContext.FACTOR) or _first(module, GlobalContext.TERM)
        return isinstance(logits, CONVOLUTIONS) and logits.out_channels == 1 and parts is not None

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(_first(module, GlobalContext.LOGITS), positions),)

    @staticmethod
    def forward(module, x, *, backend):
        logits = _first(module, GlobalContext.LOGITS)(x)
        context = gather(x, logits, backend=backend).view(*x.shape[:2], *(1 for _ in x.shape[2:]))
        factor, term = (_first(module, n) for n in (GlobalContext.FACTOR, GlobalContext.TERM))
        gate = getattr(module, "gate", torch.sigmoid)
        out = x if factor is None else x * gate(factor(context))
        return out if term is None else out + term(context)


FAMILIES: dict[str, type[Family]] = {
    family.__name__: family
    for family in (
        DoubleAttentionCopies, EfficientAttention, LinearAttention, FactorAttention, GlobalContext,
    )
}  # fmt: skip


def _is_convolution(module: Any, name: str) -> bool:
    return is_pointwise(getattr(module, name, None))


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first of the named children that is there."""
    children = (getattr(module, name, None) for name in names)
    return next((child for child in children if child is not None), None)


def _q_k_v(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    if hasattr(module, "to_qkv"):
        return module.to_qkv(x).chunk(3, dim=1)
    return module.to_q(x), module.to_k(x), module.to_v(x)


def _heads(module: nn.Module) -> int:
    """How many heads the layer says that it has; 0 where it says nothing."""
    for name in ("heads", "num_heads", "head_count"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return 0


def _feature_map(conv: Any, positions: tuple[int, int]) -> Tensor:
    h, w = positions
    axes = {1: (h * w,), 2: (h, w), 3: (2, h, w)}[len(conv.kernel_size)]
    return _like(conv, 2, conv.in_channels, *axes)


def _like(layer: Any, *shape: int) -> Tensor:
    """Random numbers on the layer's device."""
    return torch.randn(shape, dtype=torch.float64, device="cpu").to(layer.weight.device)
