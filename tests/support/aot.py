"""Ahead-of-time compilation of the launches a call makes, for GPUs that are not there.

``record()`` replaces Triton's launch by one that keeps the arguments. The package's own launchers
then run on meta tensors, and each recorded launch is compiled through the steps the JIT takes
(its binder and its specialisation: divisibility by 16, equality to 1), so the code examined is the
code a GPU would run. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {
    "sm_80": 166_912,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
}


@dataclasses.dataclass
class Launch:
    """One recorded launch: the kernel with everything it was called with."""

    kernel: JITFunction
    grid: tuple
    args: tuple
    kwargs: dict

    @property
    def name(self):
        return self.kernel.fn.__name__


@dataclasses.dataclass
class Code:
    """What the compiler made of a launch for one architecture."""

    arch: str
    name: str
    shared: int  # bytes of shared memory
    registers: int
    spills: int  # NVIDIA: local loads and stores; AMD: spilled registers
    matrix: int  # matrix instructions (mma.sync, wgmma, tcgen05, v_mfma)
    wgmma: int
    copies: dict  # asynchronous copies: bytes -> count
    loads: dict  # direct loads from global memory: bytes -> count
    text: str = dataclasses.field(repr=False, default="")


@contextlib.contextmanager
def record():
    """Collects launches instead of running them."""
    launches = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def compile_launch(launch, arch):
    """Compiles a recorded launch for ``arch`` and reads the result."""
    target = TARGETS[arch]
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {**launch.kwargs, "debug": False}
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    source = ASTSource(kernel, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    read = _read_cuda if target.backend == "cuda" else _read_hip
    return Code(arch=arch, name=launch.name, shared=compiled.metadata.shared, **read(compiled.asm))


def _tool(name, *args):
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cuda(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", file.name)
    ptx = asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "matrix": wgmma + ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
        "wgmma": wgmma,
        "copies": _count(_cp_async_bytes(ptx)),
        "loads": _count(_ld_global_bytes(ptx)),
        "text": ptx,
    }


def _cp_async_bytes(ptx):
    for width in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?, (0x[0-9a-f]+|\d+),", ptx):
        yield int(width, 0)


def _ld_global_bytes(ptx):
    for vector, bits in re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        yield int(vector or 1) * int(bits) // 8


def _read_hip(asm):
    text = asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "matrix": text.count("v_mfma"),
        "wgmma": 0,
        "copies": {},
        "loads": {},
        "text": text,
    }


def _count(widths):
    counts = {}
    for width in widths:
        counts[width] = counts.get(width, 0) + 1
    return counts
