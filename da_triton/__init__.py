"""Double attention (A²-Nets, NeurIPS 2018) for PyTorch: Triton kernels, a layer, functions."""

from . import layers
from .functional import distribute, double_attention, double_attention_block, gather
from .modules import DoubleAttention
from .ops.triton.plan import plan
from .selfcheck import check

__version__ = "0.1.0"

__all__ = [
    "DoubleAttention",
    "__version__",
    "check",
    "distribute",
    "double_attention",
    "double_attention_block",
    "gather",
    "layers",
    "plan",
]
