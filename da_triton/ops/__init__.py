"""Backends: the same functions in different operations, and the choice between them.

(A folder named backends, in a package whose name ends in triton, would be skipped by torch.compile,
which leaves out every path that contains "triton/backends".)
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import reference, tracing
from . import custom_op
from .aten import block as aten_block
from .aten import core as aten
from .aten import cpu_block, cpu_small

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Backend(NamedTuple):
    """Gather and distribute on ``(N, heads, channels, L)``, the block on ``(N, C, L)``.

    ``gather_partial`` (see ``reference``) gathers one frame, to be merged with others;
    ``gather_lse`` and ``gather_backward`` (see ``aten``) gather the positions of one rank.
    ``direct`` is the block where only autograd sees it.
    """

    gather: Callable
    distribute: Callable
    block: Callable
    gather_partial: Callable
    gather_lse: Any = None  # the reference lacks these three
    gather_backward: Any = None
    direct: Any = None


def _on_a_cpu(x: torch.Tensor, *args: Any) -> Any:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return None
    return cpu_small.Call.prepare(x, *args) or cpu_block.Call.prepare(x, *args)


EAGER = Backend(reference.gather, reference.distribute, reference.block, reference.gather_partial)
TORCH = Backend(
    aten.gather, aten.distribute, aten_block.block,
    aten.gather_partial, aten.gather_lse, aten.gather_backward, _on_a_cpu,
)  # fmt: skip


def select(name: str, x: torch.Tensor) -> Backend:
    """The backend for tensors like ``x``.

    ``"auto"`` is Triton where it can run, else ``"torch"``, which is also what an exported program
    holds. An explicitly requested backend is never substituted: where it cannot run, RuntimeError
    says why. The exception: transforms that cannot follow the kernels (forward mode, ``torch.vmap``
    in the compiler) get the same function in ATen operations.
    """
    if name == "eager":
        return EAGER
    if name == "torch":
        return TORCH
    if name == "auto" and (not x.is_cuda or tracing.exporting()):
        return TORCH
    obstacle = _obstacle(x)
    if obstacle is None and custom_op.needs_aten():
        return TORCH  # as for second derivatives: what the kernels compute, differentiable
    if obstacle is None:
        from .triton import block as triton_block
        from .triton import core as triton

        return Backend(
            triton.gather, triton.distribute, triton_block.block,
            triton.gather_partial, triton.gather_lse, triton.gather_backward,
            triton_block.Call.prepare,
        )  # fmt: skip
    if name == "auto":
        return TORCH
    raise RuntimeError(f"backend='triton' cannot run here: {obstacle}")


def _obstacle(x: torch.Tensor) -> str | None:
    """Why the kernels cannot run on tensors like ``x``, or None."""
    if tracing.exporting():
        return (
            "traces and exported programs hold PyTorch operations only. Use backend='torch', or "
            "'auto', which takes it while a program is exported."
        )
    if not HAS_TRITON:
        return "Triton is not installed; pip install triton, or use backend='torch'."
    from .triton import core as triton

    return triton.obstacle(x)
