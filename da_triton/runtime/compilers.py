"""Compilers known to miscompile matrix products, per GPU, from public reports."""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from . import launch


class Compiler(NamedTuple):
    """The code generator for a GPU: capability, and versions of Triton and ptxas."""

    capability: tuple[int, int]
    triton: tuple[int, ...]
    ptxas: tuple[int, ...]


class Fault(NamedTuple):
    what: str
    report: str
    applies: Callable[[Compiler], bool]

    def __str__(self):
        return f"{self.what} ({self.report})"


WAY_OUT = (
    "A newer Triton may compile it correctly, and so may a newer ptxas, named in TRITON_PTXAS_PATH "
    "(on Blackwell TRITON_PTXAS_BLACKWELL_PATH)"
)


FAULTS = (
    Fault(
        "ptxas before 13.3 lets wgmma read operand registers that are already reused",
        "triton-lang/triton#11781",
        lambda c: c.capability[0] == 9 and c.ptxas < (13, 3),
    ),
    Fault(
        "products of a transposed accumulator are wrong",
        "fla-org/flash-linear-attention#640",
        lambda c: c.capability[0] == 9 and c.triton < (3, 7, 1),
    ),
    Fault(
        "tiles of 64 columns are wrong with some numbers of warps",
        "triton-lang/triton#11366",
        lambda c: c.capability[0] == 9 and c.triton < (3, 8),
    ),
    Fault(
        "accumulators that a loop carries race",
        "triton-lang/triton#9871, #10590",
        lambda c: c.capability[0] == 10 and c.triton < ((3, 7) if c.capability[1] == 0 else (3, 9)),
    ),
)


@functools.cache
def affected(device):
    """Known faults of the compiler for a device: a tuple of ``Fault``, mostly empty."""
    wish = os.environ.get("DA_TRITON_PROVE", "")
    if device.type != "cuda" or torch.version.hip or launch.INTERPRETED or wish == "0":
        return ()
    found = faults(compiler(device))
    if wish == "1" and not found:
        return (Fault("none", "DA_TRITON_PROVE=1 requests proofs", lambda c: True),)
    return found


def faults(made_by: Compiler) -> tuple[Fault, ...]:
    return tuple(fault for fault in FAULTS if fault.applies(made_by))


def compiler(device) -> Compiler:
    """The compiler of kernels for a CUDA device."""
    capability = torch.cuda.get_device_capability(device)
    return Compiler(capability, _numbers(triton.__version__), _numbers(ptxas(capability)[0]))


def ptxas(capability) -> tuple[str, str]:
    """Version and path of the assembler that Triton takes for a capability."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(10 * capability[0] + capability[1])
    return tool.version, tool.path


def driver() -> int:
    """The newest CUDA version that the driver supports, such as 13000; 0 if PyTorch cannot say."""
    return getattr(torch._C, "_cuda_getDriverVersion", int)()


def _numbers(version):
    partials = version.split("+")[0].split(".")
    return tuple(int(part) for part in partials if part.isdigit())
