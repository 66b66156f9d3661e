"""Interpreted kernels that are launched as compiled ones are: by addresses, on a stream.

A call that was recorded without a GPU can then be repeated, and computes.
"""

import contextlib
import ctypes
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

from da_triton.runtime import launch, recorded

from .triton_internals import BEFORE

DEVICE_INDEX, STREAM = 0, 7


class Driver:
    """In place of Triton's, which finds no device."""

    active = None

    def get_current_device(self):
        return DEVICE_INDEX

    def get_current_stream(self, device):
        return STREAM + device


Driver.active = Driver()


class Kernel:
    """In place of a compiled one, for hooks."""

    def launch_metadata(self, *args):
        return None


@contextlib.contextmanager
def kernels():
    """The second call of a signature is recorded. Launches keep a kernel that takes addresses."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(launch.forgetting())
        stack.enter_context(mock.patch.object(recorded, "FIRST", 2))
        if launch.INTERPRETED:
            stack.enter_context(mock.patch.object(launch, "driver", Driver))
            stack.enter_context(mock.patch.object(launch.Launch, "_compile", _compile))
        yield


def _compile(self, tensors, scales, aligned):
    _original(self, tensors, scales, aligned)
    dtypes = [t.dtype for t in tensors]

    def run(*args):
        head, args = args[:BEFORE], args[BEFORE:]
        assert head == (*self.grid, STREAM, "function", "metadata", *head[6:])
        pointers, rest = args[: len(dtypes)], args[len(dtypes) :]
        given = [_at(address, dtype) for address, dtype in zip(pointers, dtypes, strict=True)]
        assert rest[len(scales) :] == self.rest
        # The interpreter's own operations are not the launchers'.
        with launch.INTERPRETER, _disable_current_modes():
            self.kernel[self.grid](
                *given, *rest[: len(scales)], *self.sizes, **self.constants, **self.options
            )

    self.compiled[aligned] = Kernel(), run, "function", "metadata"


_original = launch.Launch._compile


def _at(address, dtype):
    """A tensor that starts there: kernels take no size from a tensor."""
    memory = (ctypes.c_byte * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)
