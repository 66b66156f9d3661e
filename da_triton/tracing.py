"""Detects observers of a call: the compiler, exporters, checkpointing, modes, autocast."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _device, checkpoint


def constant(function):
    """``torch.compiler.assume_constant_result``: the result does not change from call to call.

    That one imports the compiler, and takes longer than importing all of this package.
    """
    function._dynamo_marked_constant = True
    return function


@constant  # Dynamo in torch 2.11 evaluates is_exporting() to True everywhere
def exporting() -> bool:
    """Whether a program is recorded for later runs: ``torch.export``, ``torch.jit.trace``,
    ONNX."""
    return torch._C._is_tracing() or torch.compiler.is_exporting()


def checkpointed() -> bool:
    """Whether ``torch.utils.checkpoint`` runs this call twice and compares the tensors it saves."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__name__


@constant
def transformed() -> bool:
    """Whether ``torch.func`` or forward-mode differentiation is at work.

    A constant of a compilation: the compiler guards both itself. So is the next.
    """
    return torch._C._are_functorch_transforms_active() or forward_mode()


@constant
def forward_mode() -> bool:
    """Whether tensors may carry tangents."""
    return forward_ad._current_level >= 0


_eval_frame_callback = torch._C._dynamo.eval_frame.get_eval_frame_callback
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def watched() -> bool:
    """Whether anything but autograd sees what is done: it must find operations that it knows.

    Called on every call, so it queries PyTorch itself and not the functions above.
    """
    return (
        torch.compiler.is_compiling()
        or _eval_frame_callback() is not None  # the compiler leaves this frame out, not the next
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or (_top_hooks(True) is not None and checkpointed())
    )


def named() -> bool:
    """Whether a profiler or a function mode is active, which know operators by their names.

    ``torch.set_default_device`` is such a mode, and needs no names.
    """
    modes = torch._C._len_torch_function_stack()
    if modes and _device.CURRENT_DEVICE is not None:
        modes -= 1
    return modes > 0 or torch.autograd._profiler_enabled()


AUTOCAST = ("cuda", "cpu")  # have it in every build: querying takes time


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype of autocast on a type of device, or None where it is off."""
    if (kind in AUTOCAST or _autocast_available(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@constant  # torch 2.11 cannot trace this query
def _autocast_available(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def unrecorded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose arithmetic on sizes must not be traced."""
    if not torch.jit.is_tracing():
        return function(*args, **kwargs)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return function(*args, **kwargs)
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def sizes(x: Tensor) -> torch.Size:
    """``x.shape`` in numbers, where a trace has tensors in their place."""
    return unrecorded(lambda: x.shape) if torch.jit.is_tracing() else x.shape
