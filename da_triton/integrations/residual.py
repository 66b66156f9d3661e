"""Residual block for networks: ``x + norm(double attention(x))``, initially the identity."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import checks, tracing
from ..functional import double_attention_block
from ..modules import OPTIONS, DoubleAttention, check_input, fuses, is_plain, is_unobserved

BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
AXES: dict[type, int] = {
    norm: axes for norms in (BATCH_NORMS, INSTANCE_NORMS) for axes, norm in norms.items()
}
Norm = str | Callable[[int], nn.Module] | None


class ResidualDoubleAttention(nn.Module):
    """``x + norm(attention(x))``: the double attention block to insert into a trained network.

    The paper (Chen et al., NeurIPS 2018, section 3.1) adds the block's result to its input. A
    normalisation before the sum, initialised with zeros, makes the block the identity initially.
    In evaluation a batch normalisation is part of the last convolution, so that the sum costs no
    further pass over x.

    Args:
        in_channels: channels C of the input.
        c_m, c_n: as :class:`da_triton.DoubleAttention`; half of ``in_channels`` by default.
        norm: ``"batch"``, None, or a function from the number of channels to a module, such as
            ``functools.partial(nn.GroupNorm, 32)``.
        zero_init: the normalisation's weight and bias start as zeros (without one, those of
            ``conv_reconstruct``).
        position_axes: 1, 2 or 3; which batch normalisation.
        device, dtype: of the parameters.
        options: further options of :class:`da_triton.DoubleAttention` (``heads``, ``backend``, …).

    Raises:
        ValueError: an unknown norm, ``zero_init`` with a norm whose weight cannot learn,
            ``residual`` or ``reconstruct`` (the sum is part of this module and needs the channels
            of x).
    """

    _alive: tuple[int, int] | None = None  # see _check_learns

    def __init__(
        self,
        in_channels: int,
        c_m: int | None = None,
        c_n: int | None = None,
        *,
        norm: Norm = "batch",
        zero_init: bool = True,
        position_axes: int = 2,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        checks.flag(zero_init=zero_init)
        if taken := {"residual", "reconstruct"} & set(options):
            raise ValueError(
                f"{' and '.join(sorted(taken))} cannot be set: this module adds x itself. "
                "Use DoubleAttention for a block without the sum."
            )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention = DoubleAttention(in_channels, c_m, c_n, **kind, **options)
        self.norm = _norm(norm, in_channels, position_axes, kind)
        self.zero_init = zero_init
        if zero_init and not self._last_parameters()[0].requires_grad:
            raise _dead(self.norm)
        self.zero_init_last()

    def zero_init_last(self) -> None:
        """Zeros at the end of the block, if ``zero_init``. timm calls this after it has initialised
        every convolution of a network again.

        Raises:
            ValueError: the last weight is no longer a parameter (parametrised, or frozen in a
                buffer). Nothing is changed then.
        """
        if self.zero_init:
            for parameter in self._last_parameters():
                nn.init.zeros_(parameter)

    def init_weights(self) -> None:
        """The same for OpenMMLab, whose models call it after they have initialised every
        convolution and norm, and before they load pretrained weights."""
        self.zero_init_last()

    def reset_parameters(self) -> None:
        """New values for everything in the block, distributed as the constructor's: the identity
        again, if ``zero_init``.

        A loop over all modules that resets parents before their children loses the identity because
        it resets the norm again; call :meth:`zero_init_last` afterwards.

        Raises:
            ValueError: as :meth:`zero_init_last`.
        """
        if self.zero_init:
            self._last_parameters()
        for child in self.children():
            _reset(child)
        self.zero_init_last()

    @property
    def _is_hf_initialized(self) -> bool:
        """transformers' mark on what its models have initialised or loaded."""
        return self.__dict__.get("_is_hf_initialized", False)

    @_is_hf_initialized.setter
    @torch.no_grad()
    def _is_hf_initialized(self, value: bool) -> None:
        # A model's own initialisation sets the mark on the block after it has filled what a file
        # lacks: norms with ones, and what it does not know with nothing at all.
        state = (*self.parameters(), *self.buffers())
        loaded = [t for t in state if getattr(t, "_is_hf_initialized", False)]
        if value and len(loaded) < len(state):
            values = [t.clone() for t in loaded]
            self.reset_parameters()
            for t, kept in zip(loaded, values, strict=True):
                t.copy_(kept)
        self.__dict__["_is_hf_initialized"] = value

    def _last_parameters(self) -> list[nn.Parameter]:
        """Weight and bias, if any, at the end of the block."""
        last = self.attention.conv_reconstruct if self.norm is None else self.norm
        weight, bias = getattr(last, "weight", None), getattr(last, "bias", None)
        if not isinstance(weight, nn.Parameter):  # a frozen norm has buffers
            raise _dead(last)
        return [weight] if bias is None else [weight, bias]

    def _check_learns(self) -> None:
        """Raises if the norm is frozen at weight zero while the block is trainable: no gradient
        reaches the block until it is unfrozen.

        The values are read once per state of the weight, because reading them synchronises with
        the GPU.
        """
        norm: Any = self.norm
        if norm is None or torch.compiler.is_compiling() or tracing.exporting():
            return
        # Only the norm's own weight: that of a wrapper or a shard (FSDP1, ZeRO-3) is not whole yet.
        weight = (norm._parameters | norm._buffers).get("weight")
        if type(weight) not in (Tensor, nn.Parameter) or weight.requires_grad:
            return
        if weight.is_meta or not weight.numel():
            return
        if tracing.transformed() or torch._C._len_torch_dispatch_stack() > 0:  # no values to read
            return
        if not any(p.requires_grad for p in self.attention.parameters()):
            return
        state = weight.data_ptr(), weight._version
        if state != self._alive:
            if not weight.any():
                raise _dead(norm)
            self._alive = state

    def _check_axes(self, x: Tensor) -> None:
        """BatchNorm checks this only where it is called, and InstanceNorm takes a missing axis for
        a missing batch."""
        wanted = AXES.get(type(self.norm)) if isinstance(x, Tensor) else None
        if wanted is not None and (axes := x.dim() - 2) != wanted and axes in BATCH_NORMS:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but the block's norm is a "
                f"{type(self.norm).__name__}, which takes {wanted} position axes. "
                f"Build the block with position_axes={axes}, or with another norm."
            )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(N, in_channels, *positions)`` to the same shape. ``mask``: see DoubleAttention.

        Raises:
            ValueError: x, or a norm that cannot learn: it was frozen while its weight was zero.
        """
        self._check_axes(x)
        if self.training and self.zero_init and torch.is_grad_enabled():
            self._check_learns()
        attention, last = self.attention, self._last_convolution()
        if last is None:
            y = attention(x) if mask is None else attention(x, mask)
            return x + (y if self.norm is None else self.norm(y))
        check_input(attention, "x", x)
        first = (attention.convA, attention.convB, attention.convV)
        weights: list[Any] = [w for conv in first for w in (conv.weight, conv.bias)]
        options = {name: getattr(attention, name) for name in OPTIONS} | {"residual": True}
        return double_attention_block(x, *[*weights, *last], mask=mask, **options)

    def _last_convolution(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of ``conv_reconstruct`` followed by the norm, where that is linear."""
        attention: Any = self.attention
        norm: Any = self.norm
        if type(attention) is not DoubleAttention or not is_unobserved(attention):
            return None
        if not fuses(attention.order):
            return None
        if not all(is_plain(conv) for conv in attention.children()):
            return None
        conv: Any = attention.conv_reconstruct
        if norm is None:
            return conv.weight, conv.bias
        known = isinstance(norm, _BatchNorm) and type(norm).__module__ == _BatchNorm.__module__
        if not known or norm.training or norm.running_mean is None or not is_unobserved(norm):
            return None
        high = torch.promote_types(conv.weight.dtype, torch.float32)
        factor = (norm.running_var.to(high) + norm.eps).rsqrt()
        bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
        if norm.affine:
            factor = factor * norm.weight
        bias = bias * factor
        if norm.affine:
            bias = bias + norm.bias
        weight = conv.weight * factor[:, None, None, None]
        return weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)


def _reset(module: nn.Module) -> None:
    """``reset_parameters`` of the module, or of its children if it has none."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
    else:
        for child in module.children():
            _reset(child)


def _dead(norm: Any) -> ValueError:
    return ValueError(
        f"zero_init needs a norm with a weight that learns, got {type(norm).__name__}, whose "
        "weight is missing or frozen, or parametrised: it would not learn, or not stay zero. "
        "Choose zero_init=False, a norm with trainable parameters, or remove the parametrisation."
    )


def _norm(norm: Norm, channels: int, position_axes: int, kind: dict[str, Any]) -> nn.Module | None:
    if norm is None:
        return None
    if norm == "batch":
        if not isinstance(position_axes, int) or position_axes not in BATCH_NORMS:
            raise ValueError(f"position_axes must be 1, 2 or 3, got {position_axes!r}.")
        return BATCH_NORMS[position_axes](channels, **kind)
    if not callable(norm):
        raise ValueError(
            f'norm must be "batch", None or a function from channels to a module, got {norm!r}.'
        )
    return norm(channels).to(**kind)
