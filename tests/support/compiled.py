"""Launches as on a GPU, without one: Triton binds and specialises, and nothing is compiled or run.

For a process without TRITON_INTERPRET. ``received`` grows by what each launch of a compiled kernel
is given, tensors as addresses; ``jitted`` by the name of each kernel that is launched through
Triton's own ``run``.
"""

import contextlib
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget

from da_triton.runtime import launch, tiles

from . import triton_internals
from .triton_internals import BEFORE

received: list = []
jitted: list = []


class Driver:
    device, stream = 0, 7

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + 100 * device

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@contextlib.contextmanager
def device(wanted):
    """In place of ``torch.cuda.device``."""
    before, current.device = current.device, wanted.index
    yield
    current.device = before


class Compiled:
    packed_metadata = "packed"

    def __init__(self, name, key):
        self.name, self.function = name, key

    def launch_metadata(self, grid, stream, *args):
        hook = knobs.runtime.launch_enter_hook
        return (self.name, grid, stream, addresses(args)) if hook and hook.calls else None

    def run(self, *args):
        received.append((self.name, addresses(args)))
        description, *hooks = args[BEFORE - 3 : BEFORE]
        for hook in hooks:
            if hook is not None:
                hook(description)


def addresses(args):
    return tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)


def _jitted(original, kernel, *args, **kwargs):
    jitted.append(kernel.fn.__name__)
    return original(kernel, *args, **kwargs)


current = Driver()
triton_internals.without_a_gpu(current, Compiled)
triton_internals.around(jit_launch=_jitted)
mock.patch.object(tiles, "architecture", return_value="sm_90").start()
mock.patch.object(launch, "num_sms", return_value=132).start()
