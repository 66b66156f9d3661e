"""``DoubleAttention`` as an ``nn.Module``, parameter-compatible with common implementations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module

from . import calls, checkpoints, checks, reference, tracing
from .arguments import Options
from .functional import double_attention
from .ops.aten import core as aten
from .parallel import context_parallel


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
        order, recompute, backend: see :func:`da_triton.double_attention_block`. The first two have
            no effect where convolutions are called as modules, as described below.
        process_group: x and mask are this rank's slice of the positions, split over the ranks of
            the group (see :mod:`da_triton.parallel.context_parallel`).
            ``torch.distributed.group.WORLD`` is None, and splits nothing, before
            ``init_process_group``. The gradients of the parameters are
            then this rank's share of them, for a loss that is the sum of the ranks' losses: add
            them up with ``torch.distributed.all_reduce(p.grad, group=process_group)``, or wrap the
            model in DistributedDataParallel and multiply the loss by the number of ranks, whose
            mean it takes. A copy of the module shares the group; pickling it is a TypeError.
        device, dtype: of the parameters.

    The children ``convA``, ``convB``, ``convV`` and ``conv_reconstruct`` are real
    ``nn.Conv2d(…, 1)``. A child that has hooks, a parametrisation or quantised weights, or has been
    replaced or wrapped, is called as a module, and only the core is accelerated; so are all of them
    in an exported program and under ``torch.utils.checkpoint``. ``in_channels``, ``c_m`` and
    ``c_n`` are what the children have: pruning them changes these. State dicts of the common
    implementations load: see ``da_triton.checkpoints``.

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
        process_group: Any = None,
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
        checks.flag(reconstruct=reconstruct, softmax_v=softmax_v, residual=residual, bias=bias)
        checks.backend(backend)
        checks.order(order, reconstruct, backend)
        checks.recompute(recompute, backend)
        if process_group is not None:
            checks.process_group(process_group, backend, order)
        if residual and not reconstruct and c_m != in_channels:
            raise ValueError(
                "residual=True without reconstruct needs c_m == in_channels, got "
                f"c_m={c_m} and in_channels={in_channels}."
            )
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
        self.process_group = process_group

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
        own = self._modules  # faster to read than attributes, which a subclass may have
        a, b, v, last = [own[name] if name in own else getattr(self, name) for name in CHILDREN]
        options = Options(
            self.heads, self.logit_scale, self.logit_scale_v, self.scale, self.softmax_v,
            self.residual, self.order, self.recompute, self.backend,
        )  # fmt: skip
        group = self._group
        return attend(x, a, b, v, last, mask, options, group and group.group, self._check)

    def _check(self, x: Tensor) -> None:
        check_input(self, "x", x)

    def attention_maps(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both attention maps: where each descriptor gathers from, and what each position receives.

        Returns the attention maps P (each sums to 1 over positions) and the distribution weights Q
        (with the softmax, they sum to 1 over n in a head at each position), both
        ``(N, heads, n, *positions)``. They are materialised only by this method. It calls the
        convolutions, whose float32 follows ``torch.backends.cudnn.conv.fp32_precision`` on a GPU
        (TF32 by default); ``forward`` follows ``torch.backends.cuda.matmul.fp32_precision``. With a
        process group, P sums to 1 over the positions of all ranks and carries no gradient.
        """
        check_input(self, "x", x)
        if mask is not None:
            checks.mask(mask, x, "x")
            mask = mask.flatten(1)
        b, v = (
            call(conv, x).flatten(2).unflatten(1, (self.heads, -1))
            for conv in (self.convB, self.convV)
        )
        if self.process_group is None:
            logits = aten.logits_in(b, self.logit_scale, b.dtype)
            p = reference.gather_weights(logits, mask).to(b.dtype)
        else:
            p = context_parallel.gather_weights(b, mask, self.logit_scale, self.process_group)
        logits = aten.logits_in(v, self.logit_scale_v, v.dtype)
        q = reference.distribution_weights(logits, self.softmax_v).to(v.dtype)
        return p.unflatten(-1, x.shape[2:]), q.unflatten(-1, x.shape[2:])

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, c_m={self.c_m}, c_n={self.c_n}, reconstruct={self.reconstruct}"
        for name, default in OPTIONS.items():
            value = getattr(self, name)
            if name == "process_group" and value is not None:
                text += f", process_group of {value.size()} ranks"
            elif value != default:
                text += f", {name}={value!r}"
        return text

    @property
    def in_channels(self) -> int | None:
        """Input channels of ``convA``; None if it was replaced by a module without that number."""
        return _channels(self.convA)[0]

    @property
    def c_m(self) -> int | None:
        """Output channels of ``convA``."""
        return _channels(self.convA)[1]

    @property
    def c_n(self) -> int | None:
        """Output channels of ``convB``: heads·n."""
        return _channels(self.convB)[1]

    @property
    def process_group(self) -> Any:
        """The group whose ranks hold the positions, or None."""
        return None if self._group is None else self._group.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._group = None if group is None else _Group(group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DoubleAttention":
        def of_any_rank(t: Tensor) -> Tensor:
            try:
                return fn(t)
            except RuntimeError:
                if t.dim() != 4:
                    raise
                # A network of videos goes to channels_last_3d, which takes 5-D weights only.
                return fn(t.unsqueeze(-1)).squeeze(-1)

        return super()._apply(of_any_rank, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        own = {name: p.shape for name, p in self.named_parameters()}
        checkpoints.adapt(state_dict, prefix, own)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Group:
    """A process group as a layer holds it: copies share it, since it belongs to this process."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __copy__(self) -> "_Group":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Group":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "A DoubleAttention with a process group cannot be pickled: the group belongs to this "
            "process. Save its state_dict(), or set process_group = None first and give the loaded "
            "module its group."
        )


def attend(
    x: Tensor,
    conv_a: Any,
    conv_b: Any,
    conv_v: Any,
    last: Any,
    mask: Tensor | None,
    options: Options,
    process_group: Any = None,
    check: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The block with these convolutions: as one operation where they are plain, else as modules
    around the core. ``check``: of x, before everything else."""
    if fuses(options.order) and not _global_hooks():
        of_a, of_b, of_v = map(plain_parameters, (conv_a, conv_b, conv_v))
        of_last = (None, None) if last is None else plain_parameters(last)
        if of_a and of_b and of_v and of_last:
            weights = of_a + of_b + of_v + of_last
            return calls.block(x, weights, mask, options, process_group, check)
    if check is not None:
        check(x)
    if mask is not None:
        checks.mask(mask, x, "x")
    heads, logit_scale, logit_scale_v, scale, softmax_v, residual, order, recompute, backend = (
        options
    )
    checks.flag(residual=residual)
    checks.order(order, last is not None, backend)
    checks.recompute(recompute, backend)
    a = call(conv_a, x)
    b = call(conv_b, x, _shift_free(conv_b) if tracing.checkpointed() else None)
    v = call(conv_v, x)
    y = double_attention(
        a, b, v, heads=heads, logit_scale=logit_scale, logit_scale_v=logit_scale_v, scale=scale,
        softmax_v=softmax_v, mask=mask, backend=backend, process_group=process_group,
    )  # fmt: skip
    if last is not None:
        y = call(last, y)
    return x + y if residual else y


def fuses(order: str = "auto") -> bool:
    """Whether plain convolutions may be part of one operation.

    Not in an exported program, where quantisers and runtimes look for convolutions of parameters,
    unless another order than the paper's was requested. Not under ``torch.utils.checkpoint``, which
    compares the tensors saved by two runs: these must not depend on observers of a run.
    """
    if tracing.exporting():
        return order not in checks.PAPERS
    return not tracing.checkpointed()


def _shift_free(conv: Any) -> dict[str, Tensor] | None:
    """Parameters of a plain ``convB`` whose bias has the gradient that it has in the fused block:
    zero, without rounding, since a softmax over positions removes it."""
    if not is_plain(conv) or conv.bias is None:
        return None
    return {"weight": conv.weight + conv.bias[:0].sum(), "bias": conv.bias.detach()}


def check_input(layer: DoubleAttention, name: str, x: Tensor) -> None:
    """A feature map of the layer's channels; a rank of a process group may have no position."""
    tracing.unrecorded(checks.layer_input, name, x, layer.in_channels, layer.process_group)


# Options of the block, kept as attributes of the layer, and their defaults.
OPTIONS: dict[str, Any] = {**Options._field_defaults, "process_group": None}

CHILDREN = ("convA", "convB", "convV", "conv_reconstruct")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Weights with every operation. Other subclasses, quantised ones, have what their module needs.
DENSE = (Tensor, nn.Parameter, FakeTensor)
# Kernel size, stride, padding and groups of convolutions that see one position at a time.
POINTWISE = tuple(
    (ones, ones, padding, 1)
    for ones in ((1, 1), (1,), (1, 1, 1))
    for padding in ((0,) * len(ones), "valid", "same")
)


def is_plain(conv: nn.Module) -> bool:
    """Whether reading the weight is equivalent to calling the module (no hooks, no overrides)."""
    return not _global_hooks() and plain_parameters(conv) is not None


def plain_parameters(conv: Any) -> tuple[Any, Any] | None:
    """Weight and bias where using them equals calling the module, global hooks aside, or None."""
    if type(conv) not in CONVOLUTIONS or _own_hooks(conv):
        return None
    if (conv.kernel_size, conv.stride, conv.padding, conv.groups) not in POINTWISE:
        return None
    own = conv._parameters  # faster to read than attributes, which replicas and shards have
    if own.get("weight") is not None and "bias" in own:
        weight, bias = own["weight"], own["bias"]
    else:
        weight, bias = conv.weight, conv.bias
    if type(weight) in DENSE or type(weight).__name__ == "DTensor":
        return weight, bias
    return None


def is_unobserved(module: nn.Module) -> bool:
    """Whether nothing but the module's own forward runs when it is called."""
    return not _own_hooks(module) and not _global_hooks()


def _own_hooks(module: nn.Module) -> Any:
    return (
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _global_hooks() -> Any:
    return (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def is_pointwise(conv: Any) -> bool:
    """Whether it is a convolution that sees one position at a time."""
    if not isinstance(conv, CONVOLUTIONS):
        return False
    padding = conv.padding if isinstance(conv.padding, str) else tuple(conv.padding)
    return (tuple(conv.kernel_size), tuple(conv.stride), padding, conv.groups) in POINTWISE


def call(child: nn.Module, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """A convolution, or what replaced or wraps it, on inputs with any number of position axes.

    ``parameters``: used in place of its own.

    Raises:
        ValueError: for another number of axes than two, a child with no convolution inside, and for
            another number than its own, one that sees several positions at a time.
    """
    sizes = tracing.sizes(x)
    if 0 in sizes[2:]:  # PyTorch does not convolve without positions
        missing = [p for size in reversed(x.shape[2:]) for p in (0, int(size == 0))]
        padded = call(child, nn.functional.pad(x, missing), parameters)
        inside = (slice(None), slice(None), *map(slice, x.shape[2:]))
        return padded[inside]
    axes = _position_axes(child, len(sizes) - 2)
    inputs = x
    if len(sizes) - 2 != axes:
        inputs = x.flatten(2)
        for _ in range(1, axes):
            inputs = inputs.unsqueeze(-1)
    if parameters is None:
        y = child(inputs)
    else:
        y = torch.func.functional_call(child, parameters, (inputs,))
    return y if inputs is x else y.reshape(*y.shape[:2], *x.shape[2:])


def _position_axes(child: nn.Module, given: int) -> int:
    """The number of position axes that a child takes, for inputs with ``given``."""
    kernels = [m for m in child.modules() if getattr(m, "kernel_size", None) is not None]
    axes = next((len(m.kernel_size) for m in kernels if isinstance(m.kernel_size, tuple)), None)
    if given == axes or (axes is None and given == 2):
        return given
    if axes is None:
        raise ValueError(
            f"{type(child).__name__} replaces a convolution and has none inside, so it does not "
            f"say how many position axes it takes; got an input with {given}. Give it a "
            f"kernel_size like that of nn.Conv2d: {(1,) * given} to receive them as they are."
        )
    for m in kernels:
        pointwise = is_pointwise(m) if isinstance(m, CONVOLUTIONS) else m.kernel_size == (1,) * axes
        if not pointwise:
            raise ValueError(
                f"a child that sees several positions at a time takes inputs with {axes} position "
                f"axes, got {given}: {m}. Replace it by one for inputs of that rank."
            )
    return axes


def _convolutions(child: nn.Module) -> list[Any]:
    """The convolutions in a child: itself, or those inside of a wrapper such as LoRA's."""
    if type(child) in CONVOLUTIONS:
        return [child]
    return [module for module in child.modules() if isinstance(module, CONVOLUTIONS)]


def _channels(child: nn.Module) -> tuple[int | None, int | None]:
    """Input and output channels of a child, by its first and its last convolution."""
    convolutions = _convolutions(child)
    if not convolutions:
        return None, None
    return _channels_of(convolutions[0])[0], _channels_of(convolutions[-1])[1]


def _channels_of(conv: Any) -> tuple[int, int]:
    weight = conv._parameters.get("weight")  # a parametrised one would be computed
    if type(weight) in DENSE and weight.dim() > 2:  # else sharded or offloaded: as constructed
        return tracing.sizes(weight)[1] * conv.groups, tracing.sizes(weight)[0]
    return conv.in_channels, conv.out_channels
