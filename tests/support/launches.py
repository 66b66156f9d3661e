"""Counts what a call launches, at full size: meta tensors, and kernels that are not run."""

import contextlib

from torch.utils._python_dispatch import TorchDispatchMode

from . import triton_internals


@contextlib.contextmanager
def count():
    """Names of kernels and of operations that compute or copy, in order; views and memory aside."""
    names = []

    def launch(original, kernel, *args, **kwargs):
        names.append(kernel.fn.__name__)

    class Between(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if not (op.is_view or "empty" in op._schema.name or "view" in op._schema.name):
                names.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    with triton_internals.around(interpreted_launch=launch), Between():
        yield names
