"""``DoubleAttention``: the block as a layer, with the parameters of the widely used ones."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import checkpoints, checks, eager
from .functional import double_attention, double_attention_block


class DoubleAttention(nn.Module):
    r"""Double attention block of A²-Nets (Chen et al., NeurIPS 2018, arXiv 1810.11579).

    ``out = [X +] Wo (scale · [A softmax_L(B)ᵀ] softmax_n(V)) + bo`` with A, B, V pointwise
    convolutions of X. Serves 1-D, 2-D and 3-D feature maps in any memory format.

    Args:
        in_channels: channels C of the input.
        c_m: channels of A. Default: ``in_channels // 2``, at least 1, rounded down to a multiple
            of ``heads`` (at least ``heads``).
        c_n: number of attention maps, channels of B and V. Default as ``c_m``.
        reconstruct: ends with a convolution back to ``in_channels``; otherwise the output has
            ``c_m`` channels.
        heads: divides ``c_m`` and ``c_n``.
        logit_scale, logit_scale_v: factors on B and V before their softmax.
        scale: factor on the distributed result.
        softmax_v: False distributes with ``logit_scale_v · V`` itself.
        residual: adds the input, as the paper does. Without ``reconstruct`` it needs
            ``c_m == in_channels``.
        bias: biases in all convolutions.
        order, recompute, backend: see :func:`da_triton.double_attention_block`.
        device, dtype: of the parameters.

    The children ``convA``, ``convB``, ``convV`` and ``conv_reconstruct`` are real
    ``nn.Conv2d(…, 1)``. A child that carries hooks or a parametrisation, or has been replaced, is
    called as a module, and only the core is accelerated. State dicts of the common implementations
    load: see ``da_triton.checkpoints``.

    Example:
        >>> block = DoubleAttention(64, residual=True)
        >>> block(torch.randn(2, 64, 14, 14)).shape
        torch.Size([2, 64, 14, 14])
    """

    def __init__(
        self,
        in_channels: int,
        c_m: int | None = None,
        c_n: int | None = None,
        reconstruct: bool = True,
        *,
        heads: int = 1,
        logit_scale: float = 1.0,
        logit_scale_v: float = 1.0,
        scale: float = 1.0,
        softmax_v: bool = True,
        residual: bool = False,
        bias: bool = True,
        order: str = "auto",
        recompute: bool | str = "auto",
        backend: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive(in_channels=in_channels)
        checks.heads(heads)
        half = max(heads, max(1, in_channels // 2) // heads * heads)
        c_m = half if c_m is None else c_m
        c_n = half if c_n is None else c_n
        checks.positive(c_m=c_m, c_n=c_n)
        checks.heads(heads, c_m=c_m, c_n=c_n)
        checks.number(logit_scale=logit_scale, logit_scale_v=logit_scale_v, scale=scale)
        checks.backend(backend)
        checks.order(order, reconstruct, backend)
        checks.recompute(recompute, backend)
        if residual and not reconstruct and c_m != in_channels:
            raise ValueError(
                "residual=True without reconstruct needs c_m == in_channels, got "
                f"c_m={c_m} and in_channels={in_channels}."
            )
        self.in_channels = in_channels
        self.c_m = c_m
        self.c_n = c_n
        self.reconstruct = reconstruct
        self.heads = heads
        self.logit_scale = logit_scale
        self.logit_scale_v = logit_scale_v
        self.scale = scale
        self.softmax_v = softmax_v
        self.residual = residual
        self.order = order
        self.recompute = recompute
        self.backend = backend

        kind: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.convA = nn.Conv2d(in_channels, c_m, 1, **kind)
        self.convB = nn.Conv2d(in_channels, c_n, 1, **kind)
        self.convV = nn.Conv2d(in_channels, c_n, 1, **kind)
        self.conv_reconstruct = nn.Conv2d(c_m, in_channels, 1, **kind) if reconstruct else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, in_channels, *positions)`` to ``(N, in_channels or c_m, *positions)``.

        ``mask``: bool, ``(N, *positions)`` or ``(N, 1, *positions)``, True where a position takes
        part in the gather.
        """
        checks.feature_map("x", x)
        checks.channels(x, self.in_channels)
        convolutions = (self.convA, self.convB, self.convV, self.conv_reconstruct)
        if all(conv is None or _is_plain(conv) for conv in convolutions):
            weights: list[Any] = []
            for conv in convolutions:
                weights += [None, None] if conv is None else [conv.weight, conv.bias]
            return double_attention_block(
                x, *weights, heads=self.heads, logit_scale=self.logit_scale,
                logit_scale_v=self.logit_scale_v, scale=self.scale, softmax_v=self.softmax_v,
                residual=self.residual, mask=mask, order=self.order, recompute=self.recompute,
                backend=self.backend,
            )  # fmt: skip
        if mask is not None:
            checks.mask(mask, x, "x")
        a, b, v = (_call(conv, x) for conv in (self.convA, self.convB, self.convV))
        y = double_attention(
            a, b, v, heads=self.heads, logit_scale=self.logit_scale,
            logit_scale_v=self.logit_scale_v, scale=self.scale, softmax_v=self.softmax_v,
            mask=mask, backend=self.backend,
        )  # fmt: skip
        if self.conv_reconstruct is not None:
            y = _call(self.conv_reconstruct, y)
        return x + y if self.residual else y

    def attention_maps(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Where each descriptor gathers from, and what each position receives.

        Returns the gather maps P (each sums to 1 over positions) and the distribution weights Q
        (with the softmax, they sum to 1 over the maps of a head at each position), both
        ``(N, heads, n, *positions)``. They exist in memory only because they are asked for.
        """
        checks.feature_map("x", x)
        checks.channels(x, self.in_channels)
        if mask is not None:
            checks.mask(mask, x, "x")
            mask = mask.flatten(1)
        b, v = (
            _call(conv, x).flatten(2).unflatten(1, (self.heads, -1))
            for conv in (self.convB, self.convV)
        )
        p = eager.gather_weights(b, mask, self.logit_scale)
        q = eager.distribution_weights(v, self.softmax_v, self.logit_scale_v)
        return p.unflatten(-1, x.shape[2:]), q.unflatten(-1, x.shape[2:])

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, c_m={self.c_m}, c_n={self.c_n}, reconstruct={self.reconstruct}"
        for name, default in _DEFAULTS.items():
            value = getattr(self, name)
            if value != default:
                text += f", {name}={value!r}"
        return text

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        own = {name: p.shape for name, p in self.named_parameters()}
        checkpoints.adapt(state_dict, prefix, own)
        super()._load_from_state_dict(state_dict, prefix, *args)


_DEFAULTS = {
    "heads": 1,
    "logit_scale": 1.0,
    "logit_scale_v": 1.0,
    "scale": 1.0,
    "softmax_v": True,
    "residual": False,
    "order": "auto",
    "recompute": "auto",
    "backend": "auto",
}

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _is_plain(conv: nn.Module) -> bool:
    """Whether using the weight directly equals calling the module, to everyone who watches it."""
    if type(conv) is not nn.Conv2d or not _is_pointwise(conv) or "forward" in conv.__dict__:
        return False
    return not any(getattr(conv, h) or getattr(torch_module, f"_global{h}") for h in _HOOKS)


def _is_pointwise(conv: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and conv.kernel_size == conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid", "same")
        and conv.groups == 1
    )


def _call(conv: nn.Module, x: Tensor) -> Tensor:
    """A convolution module on its input; a pointwise Conv2d on any number of position axes."""
    if x.dim() == 4 or not _is_pointwise(conv):
        return conv(x)
    return conv(x.flatten(2).unsqueeze(-1)).flatten(2).unflatten(2, x.shape[2:])
