"""The block's arguments as every layer below the public functions passes them on."""

from typing import Any, NamedTuple


class Weights(NamedTuple):
    """Matrices ``(out, in)`` and biases ``(out,)``, in the dtype of X; or their gradients.

    A, B, V and the last convolution. Without the bias of B, which changes nothing: a softmax over
    positions removes it.
    """

    a: Any  # (c_m, C)
    bias_a: Any  # (c_m,) or None
    b: Any  # (c_n, C)
    v: Any  # (c_n, C)
    bias_v: Any  # (c_n,) or None
    out: Any  # (C', c_m) or None
    bias_out: Any  # (C',) or None


class Options(NamedTuple):
    """Options of the block; see ``double_attention_block``."""

    heads: int = 1
    logit_scale: float = 1.0
    logit_scale_v: float = 1.0
    scale: float = 1.0
    softmax_v: bool = True
    residual: bool = False
    order: str = "auto"
    recompute: bool | str = "auto"
    backend: str = "auto"
