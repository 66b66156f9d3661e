"""Who else runs or records a call: the compiler, exporters, checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


def constant(function):
    """``torch.compiler.assume_constant_result``: the result does not change from call to call.

    That one imports the compiler, and takes longer than importing all of this package.
    """
    function._dynamo_marked_constant = True
    return function


@constant  # Dynamo in torch 2.11 evaluates is_exporting() to True everywhere
def exporting() -> bool:
    """Whether a program is recorded that others will run: ``torch.export``, ``torch.jit.trace``,
    ONNX."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def checkpointed() -> bool:
    """Whether ``torch.utils.checkpoint`` runs this call twice and compares the tensors it saves."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == checkpoint.__name__


def unrecorded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a function whose arithmetic on sizes does not belong into a trace."""
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
