"""Layers in circulation that are double attention, or a part of it, under other names.

A pattern says how to recognise such a layer, mostly by its children, what its formula may be
(``choices``: copies differ in scales, softmaxes and sums), and runs da_triton with the layer's own
children (``forward``).
Nothing here decides that a layer *is* of a pattern: ``accelerate`` proves it by numbers.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ... import arguments
from ...checkpoints import LAST, OTHER_NAMES_OF_LAST
from ...functional import double_attention, gather
from ...modules import CONVOLUTIONS, attend, is_pointwise

Options = dict[str, Any]
PROJECTIONS = (("to_qkv",), ("to_q", "to_k", "to_v"), ("qkv",), ("query", "key", "value"))
LAST_OF_ATTENTION = ("to_out", "proj")
DROPOUTS = ("dropout", "proj_drop")


class Pattern:
    """``name``: for messages. ``arguments``: how many ``forward`` takes after the module.

    All methods are static: a pattern has no state.
    """

    name: str
    arguments = 1

    @staticmethod
    def resembles(module: nn.Module) -> bool:
        """Whether the module may match, from its children and attributes."""
        raise NotImplementedError

    @staticmethod
    def choices(module: nn.Module) -> Iterator[Options]:
        """Options of ``forward`` that the module's formula may have."""
        yield {}

    @staticmethod
    def known_wrong_variants(module: nn.Module) -> dict[str, Any]:
        """Other formulas of such layers: in words, and as a function of the module, its input
        and the options."""
        return {}

    @staticmethod
    def inputs(module: nn.Module, positions: tuple[int, int]) -> tuple[Any, ...]:
        """Random arguments on the CPU, about ``h × w`` positions, a batch of two."""
        raise NotImplementedError

    @staticmethod
    def beyond(module: nn.Module) -> tuple[Any, ...]:
        """Random arguments that neither the formula nor such a layer takes; perhaps none."""
        return ()

    @staticmethod
    def forward(*args: Any, **options: Any) -> Tensor:
        """The da_triton computation, given the module, its arguments, ``backend`` and options."""
        raise NotImplementedError


class DoubleAttentionCopies(Pattern):
    name = "double attention (A²-Nets)"

    @staticmethod
    def resembles(module):
        return all(_is_convolution(module, name) for name in ("convA", "convB", "convV"))

    @staticmethod
    def choices(module):
        lasts = [n for n in (LAST, *OTHER_NAMES_OF_LAST) if _is_convolution(module, n)]
        for last, residual in itertools.product([*lasts, None], (False, True)):
            yield {"last": last, "residual": residual}

    @staticmethod
    def known_wrong_variants(module):
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
            "descriptors: positions compete for each descriptor, and no position's weights sum to "
            "1. This is not double attention": wrong(2, 2),
        }

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(module.convA, positions),)

    @staticmethod
    def forward(module, x, *, last, residual, backend):
        final = None if last is None else getattr(module, last)
        options = arguments.Options(residual=residual, backend=backend)
        return attend(x, module.convA, module.convB, module.convV, final, None, options)


class EfficientAttention(Pattern):
    name = "Efficient Attention (Shen et al.)"

    @staticmethod
    def resembles(module):
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
        convolutions = module.values, module.keys, module.queries, module.reprojection
        options = arguments.Options(_heads(module), residual=residual, backend=backend)
        return attend(x, *convolutions, None, options)


class LinearAttention(Pattern):
    """Linear attention on ``(N, C, *positions)``, with pointwise convolutions."""

    name = "linear attention (diffusion U-Nets, latent diffusion, Grad-TTS)"

    @staticmethod
    def resembles(module):
        return _is_attention(module, is_pointwise)

    @staticmethod
    def choices(module):
        norm, drop = _first(module, ("norm",)), _first(module, DROPOUTS)
        norms = (True, False) if _acts(norm) else (False,)
        drops = (True, False) if _acts(drop) else (isinstance(drop, nn.Dropout),)
        logits = (0.0,) if len(_projections(module)) == 1 else (-0.25, 0.0)
        for norm, drop, residual, softmax, power, logit_power, mean in itertools.product(
            norms, drops, (False, True), (True, False), (-0.5, 0.0), logits, (False, True)
        ):
            yield {
                "norm": norm, "drop": drop, "residual": residual, "softmax_v": softmax,
                "scale_power": power, "logit_scale_power": logit_power, "mean": mean,
            }  # fmt: skip

    @staticmethod
    def known_wrong_variants(module):
        def quadratic(module, x, *, norm, drop, residual, scale_power, **_):
            q, k, v = _by_head(module, x, norm)
            if (tokens := getattr(module, "mem_kv", None)) is not None:
                k, v = (
                    torch.cat([m.expand(x.shape[0], -1, -1, -1), t], 2)
                    for m, t in zip(tokens, (k, v), strict=True)
                )
            weights = (q @ k.transpose(2, 3) * q.shape[-1] ** scale_power).softmax(-1)
            return finished(module, x, weights @ v, drop, residual)

        def over_features(module, x, *, norm, drop, residual, softmax_v, scale_power, **_):
            q, k, v = _by_head(module, x, norm)
            q = (q.softmax(-1) if softmax_v else q) * q.shape[-1] ** scale_power
            return finished(module, x, q @ (k.softmax(-1).mT @ v), drop, residual)

        def finished(module, x, z, drop, residual):
            z = z.transpose(2, 3).flatten(1, 2)
            z = z if _on_tokens(module) else z.unflatten(2, x.shape[2:])
            return _finished(module, x, z, drop=drop, residual=residual)

        return {
            "it is softmax(Q Kᵀ) attention, of quadratic cost: another operation": quadratic,
            "the softmax of its keys runs over features, not over positions: another operation": (
                over_features
            ),
        }

    @staticmethod
    def inputs(module, positions):
        return (_feature_map(_projections(module)[0], positions),)

    @staticmethod
    def forward(
        module, x, *, norm, drop, residual, softmax_v, scale_power, logit_scale_power, mean, backend
    ):
        """``scale_power``: scale = (channels of a head of k) ** power. ``mean``: divided by L."""
        q, k, v = _q_k_v(module, module.norm(x) if norm else x)
        heads = _heads(module)
        width = int(k.shape[1]) // heads  # a tensor, in a trace
        tokens = getattr(module, "mem_kv", None)
        z = double_attention(
            v, k, q, heads=heads, softmax_v=softmax_v,
            scale=width**scale_power / (math.prod(map(int, q.shape[2:])) if mean else 1),
            logit_scale=width**logit_scale_power, logit_scale_v=width**logit_scale_power,
            extra=None if tokens is None else tuple(t.flatten(0, 1)[None] for t in tokens.flip(0)),
            backend=backend,
        )  # fmt: skip
        return _finished(module, x, z, drop=drop, residual=residual)


class TokenAttention(LinearAttention):
    """Linear attention on ``(N, L, C)``, with linear layers; channels of a head are adjacent."""

    name = "linear attention on tokens"

    @staticmethod
    def resembles(module):
        return _is_attention(module, lambda child: isinstance(child, nn.Linear))

    @staticmethod
    def inputs(module, positions):
        return (_random(2, sum(positions), _projections(module)[0].in_features),)


class FactorAttention(Pattern):
    name = "factor attention (CoaT)"
    arguments = 2

    @staticmethod
    def resembles(module):
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
        return _random(2, 1 + h * w, module.qkv.in_features), positions

    @staticmethod
    def forward(module, x, size, *, scale_power, backend):
        """``(N, 1 + H·W, C)`` tokens, channels of a head adjacent, to the same shape."""
        heads = _heads(module)
        q, k, v = module.qkv(x).transpose(1, 2).chunk(3, dim=1)
        scale = (int(q.shape[1]) // heads) ** scale_power
        z = double_attention(v, k, q, heads=heads, softmax_v=False, scale=scale, backend=backend)
        by_head = (t.unflatten(1, (heads, -1)).transpose(2, 3) for t in (q, v))
        z = z.transpose(1, 2) + module.crpe(*by_head, size=size).transpose(1, 2).flatten(2)
        out = module.proj(z)
        drop = getattr(module, "proj_drop", None)
        return out if drop is None else drop(out)


class GlobalContext(Pattern):
    name = "global context (GCNet)"
    LOGITS = ("conv_attn", "conv_mask")
    FACTOR = ("mlp_scale", "channel_mul_conv")
    TERM = ("mlp_add", "channel_add_conv")

    @staticmethod
    def resembles(module):
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


class SpatialGather(Pattern):
    """A module without children or parameters, known by its class's name."""

    name = "spatial gather (OCR)"
    arguments = 2

    @staticmethod
    def resembles(module):
        inside = itertools.chain(module.children(), module.parameters(), module.buffers())
        if "gather" not in type(module).__name__.lower() or next(inside, None) is not None:
            return False
        arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
        return sum(a.default is a.empty for a in arguments) == SpatialGather.arguments

    @staticmethod
    def choices(module):
        scaled = isinstance(getattr(module, "scale", None), (int, float))
        for scale, layout in itertools.product((True, False) if scaled else (False,), LAYOUTS):
            yield {"scaled": scale, "layout": layout}

    @staticmethod
    def inputs(module, positions):
        return _random(2, 6, *positions), _random(2, 3, *positions)

    @staticmethod
    def beyond(module):
        return _random(2, 6, 5, 6), _random(2, 3, 4, 7)

    @staticmethod
    def forward(module, feats, probs, *, scaled, layout, backend):
        scale = module.scale if scaled else 1.0
        return LAYOUTS[layout](gather(feats, probs, logit_scale=scale, backend=backend)[:, 0])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "(N, C, K, 1)": lambda g: g[..., None],
    "(N, C, K)": lambda g: g,
    "(N, K, C)": lambda g: g.mT.contiguous(),
}

PATTERNS: dict[str, type[Pattern]] = {
    family.__name__: family
    for family in (
        DoubleAttentionCopies, EfficientAttention, LinearAttention, FactorAttention, GlobalContext,
        TokenAttention, SpatialGather,
    )
}  # fmt: skip


def _is_convolution(module: Any, name: str) -> bool:
    return is_pointwise(getattr(module, name, None))


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    """The first existing child among the names."""
    children = (getattr(module, name, None) for name in names)
    return next((child for child in children if child is not None), None)


def _is_attention(module: nn.Module, kind: Callable[[Any], bool]) -> bool:
    """Whether it has heads and projections of this kind, and a last child that is callable."""
    projections = _projections(module)
    last = _first(module, LAST_OF_ATTENTION)
    return (
        len(projections) > 0
        and all(map(kind, projections))
        and not isinstance(last, nn.ModuleList)
        and _heads(module) > 0
    )


def _projections(module: nn.Module) -> list[Any]:
    """The children that make q, k and v: one, three or none."""
    found = ([getattr(module, name, None) for name in names] for names in PROJECTIONS)
    return next((children for children in found if None not in children), [])


def _acts(child: Any) -> bool:
    """Whether it is a module that changes its input."""
    idle = isinstance(child, nn.Identity) or getattr(child, "p", None) == 0
    return isinstance(child, nn.Module) and not idle


def _on_tokens(module: nn.Module) -> bool:
    return isinstance(_projections(module)[0], nn.Linear)


def _q_k_v(module: nn.Module, x: Tensor) -> list[Tensor]:
    """q, k and v as ``(N, channels, *positions)``."""
    projected = [child(x) for child in _projections(module)]
    if _on_tokens(module):
        projected = [t.transpose(1, 2) for t in projected]
    return projected if len(projected) == 3 else list(projected[0].chunk(3, dim=1))


def _by_head(module: Any, x: Tensor, norm: bool) -> Iterator[Tensor]:
    """q, k and v as ``(N, heads, positions, channels)``."""
    projected = _q_k_v(module, module.norm(x) if norm else x)
    return (t.flatten(2).unflatten(1, (_heads(module), -1)).transpose(2, 3) for t in projected)


def _finished(module: Any, x: Tensor, z: Tensor, *, drop: bool, residual: bool) -> Tensor:
    """The layers after the attention ``(N, channels, *positions)``."""
    z = z.transpose(1, 2) if _on_tokens(module) else z
    last = _first(module, LAST_OF_ATTENTION)
    out = z if last is None else last(z)
    out = _first(module, DROPOUTS)(out) if drop else out
    return out + x if residual else out


def _heads(module: nn.Module) -> int:
    """The number of heads that the layer states; 0 if none."""
    for name in ("heads", "num_heads", "head_count"):
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    return 0


def _feature_map(conv: Any, positions: tuple[int, int]) -> Tensor:
    h, w = positions
    axes = {1: (h * w,), 2: (h, w), 3: (2, h, w)}[len(conv.kernel_size)]
    return _random(2, conv.in_channels, *axes)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, device="cpu")
