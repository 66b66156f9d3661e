"""Double attention (A²-Nets, NeurIPS 2018) for PyTorch: Triton kernels, a layer, functions."""

from . import layers
from ._version import __version__
from .functional import distribute, double_attention, double_attention_block, gather
from .modules import DoubleAttention
from .planner import plan
from .selfcheck import check

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
