"""Input validation. Errors state what was expected, what was received, and how to fix it."""

import itertools
import numbers

import torch
from torch import Tensor
from torch.fx import Proxy

from .planning.costs import AZ, ORDERS, orders
from .precision import POLICIES

ORDER_NAMES = ("auto", *ORDERS)
PAPERS = ("auto", AZ.name)  # names of an order that may be the paper's
BACKENDS = ("auto", "triton", "torch", "eager")
DTYPES = tuple(POLICIES)


def tensor(name: str, x: Tensor, kind: str = "", hint: str = "") -> None:
    """A tensor in dense memory."""
    if not isinstance(x, Tensor):
        if isinstance(x, Proxy):
            hint = " To trace with torch.fx, make the layer a leaf."
        raise TypeError(f"{name} must be a torch.Tensor{kind}, got {type(x).__name__}.{hint}")
    if x.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor. Samples (C, *positions) of several sizes are "
            f"concatenated by da_triton.varlen.pack({name}.unbind())."
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}. Convert it with {name}.to_dense().")
    if x.is_quantized:
        raise TypeError(
            f"{name} must not be quantised, got {x.dtype}. Convert it with {name}.dequantize()."
        )


def floating(name: str, x: Tensor, kind: str = "") -> None:
    """A tensor of a supported floating-point dtype."""
    tensor(name, x, kind)
    if x.dtype not in DTYPES:
        # float() drops the imaginary part.
        by = f"{name}.abs() or {name}.real" if x.is_complex() else f"{name}.float()"
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}. "
            f"Convert it with {by}."
        )


def feature_map(name: str, x: Tensor, *, may_have_no_positions: bool = False) -> None:
    """``(N, channels, *positions)`` with one to three position axes, floating, not empty."""
    floating(name, x)
    if not 3 <= x.dim() <= 5:
        raise ValueError(
            f"{name} must be (N, channels, *positions) with 1, 2 or 3 position axes, "
            f"got shape {_shape(x)}. Add the missing axes, or flatten the extra ones."
        )
    if 0 in (x.shape[1:2] if may_have_no_positions else x.shape[1:]):
        what = "" if may_have_no_positions else " and one position"
        hint = "" if may_have_no_positions else " Only the batch may be empty."
        raise ValueError(
            f"{name} must have at least one channel{what}, got shape {_shape(x)}.{hint}"
        )


def one_kind(autocast: torch.dtype | None = None, **tensors: Tensor | None) -> None:
    """All tensors share one device and one dtype, after a cast to autocast's."""
    given = {name: x for name, x in tensors.items() if x is not None}
    first, *others = given

    def cast(x: Tensor) -> torch.dtype:
        return x.dtype if autocast is None or x.dtype == torch.float64 else autocast

    for name in others:
        dtype, other = cast(given[first]), cast(given[name])
        if other != dtype:
            raise TypeError(
                f"{first} and {name} must share one dtype, got {dtype} and {other}. "
                f"Convert {first} to {other}, or {name} to {dtype}. Use {name}.to({dtype})."
            )
    one_device(**tensors)


def one_device(**tensors: Tensor | None) -> None:
    given = {name: x for name, x in tensors.items() if x is not None}
    first, *others = given
    for name in others:
        if given[name].device != given[first].device:
            raise RuntimeError(
                f"{first} and {name} must be on one device, got {given[first].device} and "
                f"{given[name].device}. Move one of them with .to(device)."
            )


def same_positions(**activations: Tensor) -> None:
    """Same batch and same position axes."""
    (first, x), *others = activations.items()
    for name, y in others:
        if y.shape[0] != x.shape[0] or y.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"{first} and {name} must have the same batch and positions, got shapes "
                f"{_shape(x)} and {_shape(y)}."
            )


def same_batch(first: str, x: Tensor, name: str, y: Tensor) -> None:
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"{first} and {name} must have the same batch, got shapes {_shape(x)} and {_shape(y)}."
        )


def heads(count: int, **channels: int) -> None:
    """``heads`` divides every number of channels."""
    if not isinstance(count, numbers.Integral) or isinstance(count, bool) or count < 1:
        raise ValueError(f"heads must be a positive integer, got {count!r}.")
    for name, c in channels.items():
        if c % count:
            raise ValueError(
                f"heads must divide the channels of {name}, got heads={count} and {c} channels. "
                f"Choose a divisor of {c}."
            )


def mask(mask: Tensor, x: Tensor, name: str) -> None:
    """bool, ``(N, *positions)`` or ``(N, 1, *positions)``, on x's device."""
    tensor("mask", mask, " of bool")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool (True where a position is attended), got {mask.dtype}. "
            "Compare first: mask != 0."
        )
    plain = (x.shape[0], *x.shape[2:])
    if tuple(mask.shape) not in (plain, (plain[0], 1, *plain[1:])):
        raise ValueError(
            f"mask must have shape (N, *positions) = {tuple(plain)} or (N, 1, *positions) of "
            f"{name}, got {_shape(mask)}."
        )
    one_device(**{name: x, "mask": mask})


def cu_seqlens(offsets: Tensor, **activations: Tensor) -> None:
    """Cumulative offsets ``(S + 1,)`` of packed ``(1, channels, total)``, by shape alone."""
    for name, x in activations.items():
        tensor(name, x)
        if x.dim() != 3 or x.shape[0] != 1:
            raise ValueError(
                f"with cu_seqlens, {name} must be (1, channels, total), all sequences "
                f"concatenated; got shape {_shape(x)}. da_triton.varlen.pack makes it from a list."
            )
    tensor("cu_seqlens", offsets, " of int32 or int64", " Use torch.tensor(cu_seqlens).")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"cu_seqlens must be int32 or int64, got {offsets.dtype}. "
            "Convert it with cu_seqlens.long()."
        )
    if offsets.dim() != 1 or len(offsets) < 2:
        raise ValueError(
            "cu_seqlens must be (S + 1,): where each of S ≥ 1 sequences begins, and the total; got "
            f"shape {_shape(offsets)}."
        )
    if offsets.device.type == "meta":
        raise RuntimeError(
            "cu_seqlens must hold data, but is on the meta device. Keep it on the CPU."
        )


def ends(cu_seqlens: Tensor, **activations: Tensor) -> list[int]:
    """The numbers in ``cu_seqlens``, which fit ``(…, total)``. On a GPU, the host waits."""
    ends = cu_seqlens.tolist()
    advice = "Make offsets of lengths with torch.nn.functional.pad(lengths.cumsum(0), (1, 0))."
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must begin with 0, got {ends[0]}. {advice}")
    for start, end in itertools.pairwise(ends):
        if end < start:
            raise ValueError(
                f"cu_seqlens must be non-decreasing, got {end} after {start}. {advice}"
            )
    for name, x in activations.items():
        if ends[-1] != x.shape[-1]:
            raise ValueError(
                f"cu_seqlens must end with the {x.shape[-1]} positions of {name}, got {ends[-1]}."
            )
    return ends


def extra(tokens: tuple[Tensor, Tensor], a: Tensor, b: Tensor, sequences: int | None) -> None:
    """``(extra_a, extra_b)``, each ``(1 or N, channels, K)``, of the input dtype and device.

    ``sequences``: N of packed activations.
    """
    batch = a.shape[0] if sequences is None else sequences
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2:
        raise TypeError(
            "extra must be a pair (extra_a, extra_b) of tensors (1 or N, channels, K), "
            f"got {type(tokens).__name__}."
        )
    for name, like_name, token, like in (
        ("extra[0]", "a", tokens[0], a),
        ("extra[1]", "b", tokens[1], b),
    ):
        floating(name, token)
        if (
            token.dim() != 3
            or token.shape[0] not in (1, batch)
            or token.shape[1] != like.shape[1]
            or token.shape[2] == 0
        ):
            raise ValueError(
                f"{name} must be (1 or N, channels, K) with N = {batch} and "
                f"{like.shape[1]} channels, those of {like_name}, and K ≥ 1; "
                f"got shape {_shape(token)}."
            )
    if tokens[0].shape[2] != tokens[1].shape[2]:
        raise ValueError(
            f"extra_a and extra_b must have the same number K of tokens, got {tokens[0].shape[2]} "
            f"and {tokens[1].shape[2]}."
        )


def number(**values: float) -> None:
    """Scales are plain numbers: hyperparameters, not tensors."""
    for name, value in values.items():
        whole = isinstance(value, numbers.Integral)
        if not isinstance(value, numbers.Real) or (
            isinstance(value, numbers.Rational) and not whole
        ):
            raise TypeError(
                f"{name} must be a Python number, int or float, got {type(value).__name__}. For a "
                "learnable scale, multiply the corresponding tensor."
            )
        if whole and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name} must fit 64 bits as an int. Give a float.")


def flag(**values: bool) -> None:
    for name, value in values.items():
        kind = type(value)
        numpys = kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
        if not isinstance(value, (bool, torch.SymBool)) and not numpys:
            raise TypeError(f"{name} must be True or False, got {kind.__name__}.")


def descriptors(
    g: Tensor, v: Tensor, sequences: int | None, autocast: torch.dtype | None = None
) -> None:
    """``G (N, heads, m, n)`` that fits v ``(N, heads·n, *positions)``, perhaps in float32.

    ``sequences``: N of packed activations. ``autocast``: the dtype to which v is cast.
    """
    batch = v.shape[0] if sequences is None else sequences
    floating("g", g)
    if g.dim() != 4 or 0 in g.shape[1:]:
        raise ValueError(f"g must be (N, heads, m, n) with heads, m, n ≥ 1, got {_shape(g)}.")
    if batch == v.shape[0]:
        same_batch("g", g, "v", v)
    elif g.shape[0] != batch:
        raise ValueError(
            f"g must have a sample for each of {batch} packed sequences, got shape {_shape(g)}."
        )
    if g.shape[1] * g.shape[3] != v.shape[1]:
        raise ValueError(
            f"v must have heads·n = {g.shape[1]}·{g.shape[3]} channels to fit g {_shape(g)}, "
            f"got {v.shape[1]}."
        )
    dtype = v.dtype if autocast is None or v.dtype == torch.float64 else autocast
    if g.dtype not in (dtype, torch.float32) or (g.dtype != dtype and dtype == torch.float64):
        raise TypeError(
            f"g must have v's dtype, or float32 if v is half precision; got {g.dtype} "
            f"and {dtype}. Convert it with g.to({dtype})."
        )
    one_device(g=g, v=v)


def positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if value >= 2**31:
            raise ValueError(f"{name} must be below 2³¹.")


def layer_input(name: str, x: Tensor, channels: int | None, group=None) -> None:
    """A feature map of the layer's channels, where these are known; a rank of a process group may
    have no position."""
    feature_map(name, x, may_have_no_positions=group is not None)
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name} must have {channels} channels (axis 1), got shape {_shape(x)}.")


def choice(name: str, value, allowed) -> None:
    if not any(type(value) is type(known) and value == known for known in allowed):
        names = ", ".join(repr(known) for known in allowed)
        raise ValueError(f"{name} must be one of {names}, got {value!r}.")


def backend(name: str) -> None:
    choice("backend", name, BACKENDS)


def order(name: str, reconstruct: bool, backend: str) -> None:
    choice("order", name, ORDER_NAMES)
    if not reconstruct and name != "auto" and ORDERS[name].through_h:
        possible = ", ".join(repr(o.name) for o in orders(reconstruct))
        raise ValueError(
            f"order={name!r} folds the last convolution into G, but weight_out is None. "
            f"Use order={possible} or 'auto', or give weight_out."
        )
    if backend == "eager" and name not in PAPERS:
        raise ValueError(
            f"backend='eager' supports order='AZ' only, got order={name!r}. "
            "Use backend='torch' for another order."
        )


def recompute(value: bool | str, backend: str) -> None:
    choice("recompute", value, (True, False, "auto"))
    if value is True and backend == "eager":
        raise ValueError(
            "recompute=True has no effect on backend='eager', where autograd decides what is "
            "saved. Use recompute='auto', or backend='torch'."
        )


def process_group(group, backend: str, order: str = "auto") -> None:
    """A group of ``torch.distributed`` that contains this rank, and options that support it."""
    available = torch.distributed.is_available()
    if not available or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this rank belongs to, "
            f"got {type(group).__name__}. For all ranks give torch.distributed.group.WORLD, for a "
            "DeviceMesh mesh.get_group(); ranks outside the group must not call."
        )
    if backend == "eager":
        raise ValueError(
            "backend='eager' does not support process_group. "
            "Use backend='torch', 'triton' or 'auto'."
        )
    if order not in PAPERS:
        raise ValueError(
            f"process_group runs the block in the paper's order, 'AZ'; got order={order!r}. "
            "Use order='auto' or 'AZ'."
        )


def weight(name: str, w: Tensor, in_channels: int) -> None:
    """A pointwise weight ``(out, in)``, perhaps with trailing 1-axes."""
    floating(name, w)
    if w.dim() < 2 or any(size != 1 for size in w.shape[2:]) or 0 in w.shape:
        raise ValueError(
            f"{name} must be (out, in), perhaps with trailing axes of size 1 as a pointwise "
            f"convolution has them, got shape {_shape(w)}."
        )
    if w.shape[1] != in_channels:
        raise ValueError(f"{name} must take {in_channels} channels, got shape {_shape(w)}.")


def bias(name: str, b: Tensor | None, channels: int) -> None:
    if b is None:
        return
    floating(name, b, " or None")
    if tuple(b.shape) != (channels,):
        raise ValueError(f"{name} must have shape ({channels},), got {_shape(b)}.")


def block_weights(
    x, weight_a, bias_a, weight_b, bias_b, weight_v, bias_v, weight_out, bias_out, residual
):
    """The block's weights, which fit each other and x."""
    channels = x.shape[1]
    weight("weight_a", weight_a, channels)
    weight("weight_b", weight_b, channels)
    weight("weight_v", weight_v, channels)
    c_m, c_n = weight_a.shape[0], weight_b.shape[0]
    if weight_v.shape[0] != c_n:
        raise ValueError(
            f"weight_b and weight_v must give the same number of channels "
            f"(heads·n), got {c_n} and {weight_v.shape[0]}."
        )
    bias("bias_a", bias_a, c_m)
    bias("bias_b", bias_b, c_n)
    bias("bias_v", bias_v, c_n)
    out_channels = c_m
    if weight_out is not None:
        weight("weight_out", weight_out, c_m)
        out_channels = weight_out.shape[0]
        bias("bias_out", bias_out, out_channels)
    elif bias_out is not None:
        raise ValueError("bias_out needs weight_out, which is None. Give both, or neither.")
    if residual and out_channels != channels:
        raise ValueError(
            f"residual=True needs {channels} output channels, those of x; got {out_channels}."
        )


def _shape(x: Tensor) -> tuple:
    return tuple(x.shape)
