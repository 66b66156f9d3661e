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
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from da_triton.runtime import launch, tiles

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
        for hook in args[7:9]:
            if hook is not None:
                hook(args[6])


def addresses(args):
    return tuple(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args)


def _compile(self, key, signature, device, constexprs, options, attrs, warmup):
    made = Compiled(self.fn.__name__, key)
    self.device_caches[device][0][key] = made
    return made


def _run(self, *args, **kwargs):
    jitted.append(self.fn.__name__)
    return _original(self, *args, **kwargs)


_original = JITFunction.run
current = Driver()
driver.set_active(current)
mock.patch.object(JITFunction, "_do_compile", _compile).start()
mock.patch.object(JITFunction, "run", _run).start()
mock.patch.object(tiles, "architecture", return_value="sm_90").start()
mock.patch.object(launch, "processors", return_value=132).start()
