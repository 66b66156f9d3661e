"""Cores: the same two functions, ``gather`` and ``distribute``, in different operations.

One for each backend. (A folder named backends, in a package whose name ends in triton, would be
skipped by torch.compile, which leaves out every path that contains "triton/backends".)
"""

import importlib.util
from types import ModuleType

import torch

from .. import eager
from . import aten

HAS_TRITON = importlib.util.find_spec("triton") is not None
NAMES = ("auto", "triton", "torch", "eager")


def select(name: str, x: torch.Tensor) -> ModuleType:
    """The backend for tensors like ``x``.

    ``"auto"`` is Triton where it can run, else ``"torch"``. A named backend is never exchanged for
    another: where it cannot run, RuntimeError says why.
    """
    if name == "eager":
        return eager
    if name == "torch":
        return aten
    if name == "auto" and not x.is_cuda:
        return aten
    obstacle = _obstacle(x)
    if obstacle is None:
        from . import triton as triton_backend

        return triton_backend
    if name == "auto":
        return aten
    raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")


def _obstacle(x: torch.Tensor) -> str | None:
    """Why the kernels cannot run on tensors like ``x``, or None."""
    if not HAS_TRITON:
        return "Triton is not installed; pip install triton, or use backend='torch'."
    from . import triton as triton_backend

    return triton_backend.obstacle(x)
