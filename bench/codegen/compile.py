"""Ahead-of-time compilation of the launches a call makes, for GPUs that are not there.

``record()`` replaces Triton's launch by one that keeps the arguments. The package's own launchers
then run on meta tensors, and each recorded launch is compiled through the steps the JIT takes
(its binder and its specialisation: divisibility by 16, equality to 1), so the code examined is the
code a GPU would run. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.codegen import Code
from da_triton.runtime.tiles import ARCHITECTURES

FUNCTION = re.compile(r'@(?:"[^"]+"|[\w.$-]+)')
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {name: GPUTarget(a.backend, a.target, a.warp_size) for name, a in ARCHITECTURES.items()}
# Bytes of one load on AMD: global_load_dwordx4, buffer_load_ushort, … (d16: into half a register).
HIP_LOAD = r"^\s*(?:global|buffer)_load_(\w+)(.*)$"
HIP_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


class Launch(NamedTuple):
    """One recorded launch: the kernel with everything it was called with."""

    kernel: Any
    args: tuple
    kwargs: dict  # flags, tile and compiler options
    grid: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs, grid))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def specialized(launch: Launch, arch: str) -> tuple[ASTSource, dict]:
    """Source and options that the JIT would compile for a launch."""
    kernel = launch.kernel
    backend = make_backend(TARGETS[arch])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    kwargs = {**launch.kwargs, "debug": False}
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(
        backend, kwargs, bound, specialization, options
    )
    return ASTSource(kernel, signature, constexprs, attrs), options.__dict__


def identity(launch: Launch, arch: str) -> tuple:
    """Equal for two launches that run the same code."""
    source, options = specialized(launch, arch)
    parts = source.signature, source.constants, source.attrs, options
    return launch.name, *(str(sorted(p.items(), key=str)) for p in parts)


def parse(launch: Launch, arch: str) -> tuple[Any, Any, Any]:
    """A launch in Triton's first representation, with backend and options for what follows."""
    source, options = specialized(launch, arch)
    backend = make_backend(TARGETS[arch])
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(TARGETS[arch], parsed, *functions, context)
    module.context = context  # which it needs for as long as it is used
    return module, backend, parsed


def digest(launch: Launch, arch: str) -> str:
    """Equal for two launches of which this Triton makes the same code.

    A hash of the options and of the program in Triton's first representation, which takes a
    hundredth of the time of the rest. Comments, names (of functions and modules too) and line
    numbers are not in it.
    """
    module, _, parsed = parse(launch, arch)
    program = _without_names(module.str_nodebug())
    options = {k: v for k, v in parsed.__dict__.items() if k != "extern_libs"}  # machine's paths
    parts = triton.__version__, arch, program, sorted(options.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _without_names(program: str) -> str:
    """Functions by their number in the program: a moved or renamed helper is the same code."""
    numbers: dict[str, int] = {}
    return FUNCTION.sub(lambda name: f"@{numbers.setdefault(name[0], len(numbers))}", program)


def compile_launch(launch: Launch, arch: str) -> Code:
    """Compiles a recorded launch for ``arch`` and reads the result.

    One that needs more shared memory than there is is given up before the assembler runs, which
    takes most of the time.
    """
    target = TARGETS[arch]
    limit = ARCHITECTURES[arch].shared_memory
    source, options = specialized(launch, arch)
    try:
        # Line numbers change nothing of the code and take a quarter of the time. The switch is an
        # environment variable and part of the key of Triton's cache: were it set for longer, child
        # processes would inherit it and compile everything again.
        with _cut_short(limit), knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            compiled = triton.compile(source, target=target, options=options)
    except _OutOfSharedMemoryError as error:
        return Code(shared=error.args[0])
    shared = compiled.metadata.shared
    if shared > limit:  # the cache had it
        return Code(shared=shared)
    read = _read_cuda if target.backend == "cuda" else read_hip
    return read(compiled.asm)._replace(shared=shared)


class _OutOfSharedMemoryError(Exception):
    """A program needs more than there is; ``args``: the bytes."""


@contextlib.contextmanager
def _cut_short(limit):
    """Stops a compilation when it is known to need too much shared memory."""

    def hook(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:
            return "", ""  # no part of the key of Triton's cache
        name = "ptx" if "ptx" in stages else "amdgcn"
        stage = stages[name]

        def checked(source, metadata):
            if metadata["shared"] > limit:
                raise _OutOfSharedMemoryError(metadata["shared"])
            return stage(source, metadata)

        stages[name] = checked

    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", hook):
        yield


# --- read from compiled programs ------------------------------------------------------------------


def _number(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def tool(name: str, cubin: bytes, *args: str) -> str:
    """The output of one of the tools that Triton brings, on a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *args, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    usage = tool("cuobjdump", cubin, "-res-usage")
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage)


def _read_cuda(asm):
    registers, stack = resources(asm["cubin"])
    # Spills are on the stack. Disassembly takes as long as compilation.
    text = tool("nvdisasm", asm["cubin"]) if stack else ""
    spills = len(re.findall(r"\b(?:LDL|STL)\b", text))
    ptx = asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    matrix = wgmma + ptx.count("mma.sync") + ptx.count("tcgen05.mma")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?, (0x[0-9a-f]+|\d+),", ptx)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    widths = [int(vector or 1) * int(bits) // 8 for vector, bits in loads]
    return _code(registers, spills, matrix, wgmma, [int(width, 0) for width in copies], widths)


def read_hip(asm: dict) -> Code:
    """The figures in AMD's assembly, without shared memory."""
    text = asm["amdgcn"]
    copies: list[int] = []
    loads: list[int] = []
    for kind, rest in re.findall(HIP_LOAD, text, re.MULTILINE):
        to_lds = kind.startswith("lds_") or re.search(r"\blds\b", rest)
        width = next(x for name, x in HIP_BYTES.items() if name in kind)
        (copies if to_lds else loads).append(width)
    spilled = (_number(rf"\.{kind}_spill_count:\s*(\d+)", text) for kind in ("vgpr", "sgpr"))
    registers = _number(r"\.vgpr_count:\s*(\d+)", text)
    return _code(registers, sum(spilled), text.count("v_mfma"), 0, copies, loads)


def _code(registers, spills, matrix, wgmma, copies, loads):
    """``copies`` and ``loads``: the bytes of each."""
    widest = max(copies, default=0), max(loads, default=0)
    return Code(registers, spills, 0, matrix, wgmma, *widest, loads.count(2))
