"""Ahead-of-time compilation of the launches a call makes, for GPUs that are not there.

``record()`` replaces Triton's launch by one that keeps the arguments. The package's own launchers
then run on meta tensors, and each recorded launch is compiled through the steps the JIT takes
(its binder and its specialisation: divisibility by 16, equality to 1), so the code examined is the
code a GPU would run. Needs a process without TRITON_INTERPRET.
"""

import contextlib
import dataclasses
import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from da_triton.runtime.tiles import ARCHITECTURES

FUNCTION = re.compile(r'@(?:"[^"]+"|[\w.$-]+)')
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

TARGETS = {name: GPUTarget(a.backend, a.target, a.warp_size) for name, a in ARCHITECTURES.items()}
# Bytes of one load on AMD: global_load_dwordx4, buffer_load_ushort, … (d16: into half a register).
HIP_LOAD = r"^\s*(?:global|buffer)_load_(\w+)(.*)$"
HIP_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "byte": 1}


class OutOfSharedMemoryError(Exception):
    """The kernel needs more shared memory than the architecture has; compilation was cut short."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} bytes")
        self.needed = needed


@dataclasses.dataclass
class Launch:
    """One recorded launch: the kernel with everything it was called with."""

    kernel: Any
    grid: tuple
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constants(self) -> dict[str, str]:
        """Flags, tile and compiler options."""
        return {k: str(x) for k, x in self.kwargs.items()}


@dataclasses.dataclass
class Code:
    """What the compiler made of a launch for one architecture."""

    shared: int  # bytes of shared memory
    registers: int
    spills: int  # NVIDIA: local loads and stores; AMD: spilled registers
    matrix: int  # matrix instructions (mma.sync, wgmma, tcgen05, v_mfma)
    wgmma: int
    copies: dict[int, int]  # asynchronous copies: bytes -> count
    loads: dict[int, int]  # direct loads from global memory: bytes -> count

    @classmethod
    def none(cls, shared: int) -> "Code":
        """For a kernel that needs more shared memory than there is."""
        return cls(shared, registers=0, spills=0, matrix=0, wgmma=0, copies={}, loads={})


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collects launches instead of running them."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, grid, args, kwargs))

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


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


def digest(launch: Launch, arch: str) -> str:
    """Equal for two launches of which this Triton makes the same code.

    A hash of the options and of the program in Triton's first representation, which takes a
    hundredth of the time of the rest. Comments, names (of functions and modules too) and line
    numbers are not in it.
    """
    source, options = specialized(launch, arch)
    target = TARGETS[arch]
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(parsed), backend.get_module_map()
    program = _without_names(source.make_ir(target, parsed, *functions, context).str_nodebug())
    options = {k: v for k, v in options.items() if k != "extern_libs"}  # paths of this machine
    parts = triton.__version__, arch, program, sorted(options.items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _without_names(program: str) -> str:
    """Functions by their number in the program: a moved or renamed helper is the same code."""
    numbers: dict[str, int] = {}
    return FUNCTION.sub(lambda name: f"@{numbers.setdefault(name[0], len(numbers))}", program)


def compile_launch(launch: Launch, arch: str) -> Code:
    """Compiles a recorded launch for ``arch`` and reads the result.

    Raises:
        OutOfSharedMemoryError: before the assembler runs, which takes most of the time.
    """
    target = TARGETS[arch]
    source, options = specialized(launch, arch)
    with _cut_short(ARCHITECTURES[arch].shared_memory), _without_line_info():
        compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    if shared > ARCHITECTURES[arch].shared_memory:  # the cache had it
        raise OutOfSharedMemoryError(shared)
    read = _read_cuda if target.backend == "cuda" else read_hip
    return Code(shared=shared, **read(compiled.asm))


def representation(launch: Launch, arch: str, before: str) -> str:
    """What the compiler has of a launch ``before`` a stage: "ttgir" (no layouts yet) or "llir"."""
    source, options = specialized(launch, arch)

    def stopped(stage):
        def run(program, metadata):
            raise _StoppedError(str(program))

        return run

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder  # what is in the cache passes through no stage
        try:
            with _without_line_info(), _stage(stopped, before):
                triton.compile(source, target=TARGETS[arch], options=options)
        except _StoppedError as reached:
            return reached.text
    raise RuntimeError(f"{launch.name} was compiled for {arch} without its stages")


class _StoppedError(Exception):
    def __init__(self, text):
        super().__init__()
        self.text = text


@contextlib.contextmanager
def _without_line_info():
    """Saves a quarter of the time and changes nothing of the code.

    Only during a compilation: the switch is an environment variable and part of the key of
    Triton's cache, so child processes would inherit it and compile everything again.
    """
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True
        yield


def _cut_short(limit):
    """Stops a compilation when it is known to need too much shared memory."""

    def checked(stage):
        def run(source, metadata):
            if metadata["shared"] > limit:
                raise OutOfSharedMemoryError(metadata["shared"])
            return stage(source, metadata)

        return run

    return _stage(checked, "ptx", "amdgcn")


@contextlib.contextmanager
def _stage(replace, *names):
    """Replaces the first of the named stages that a compilation has."""

    def hook(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:
            return "", ""  # no part of the key of Triton's cache
        name = next(name for name in names if name in stages)
        stages[name] = replace(stages[name])

    knobs.runtime.add_stages_inspection_hook = hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = None


# --- read from compiled programs ------------------------------------------------------------------


def _number(pattern, text):
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def _tool(name, *args):
    command = [str(TOOLS / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_cuda(asm):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        # What is spilled lies on the stack. Disassembly takes as long as compilation.
        spills = 0
        if _number(r"STACK:(\d+)", usage):
            spills = len(re.findall(r"\b(?:LDL|STL)\b", _tool("nvdisasm", file.name)))
    ptx = asm["ptx"]
    wgmma = ptx.count("wgmma.mma_async")
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?, (0x[0-9a-f]+|\d+),", ptx)
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": spills,
        "matrix": wgmma + ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
        "wgmma": wgmma,
        "copies": dict(Counter(int(width, 0) for width in copies)),
        "loads": dict(Counter(int(vector or 1) * int(bits) // 8 for vector, bits in loads)),
    }


def read_hip(asm: dict) -> dict:
    """Fields of ``Code`` from AMD's assembly."""
    text = asm["amdgcn"]

    def field(name):
        return _number(rf"\.{name}:\s*(\d+)", text)

    found: dict[str, Counter] = {"copies": Counter(), "loads": Counter()}
    for kind, rest in re.findall(HIP_LOAD, text, re.MULTILINE):
        to_lds = kind.startswith("lds_") or re.search(r"\blds\b", rest)
        width = next(x for name, x in HIP_BYTES.items() if name in kind)
        found["copies" if to_lds else "loads"][width] += 1
    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "matrix": text.count("v_mfma"),
        "wgmma": 0,
        **{k: dict(v) for k, v in found.items()},
    }


def faults(launch: Launch, arch: str) -> list[str]:
    """How a program's matrix products are laid out wrongly.

    Two faults of the compilers leave traces in Triton's representations, and kernels are written so
    that neither appears:

        narrow    an mma.sync operand laid out for elements narrower than its own, over more columns
                  than its tile has (8·kWidth > K): float64 does not compile, TF32 is wrong
                  (triton-lang/triton#11632, #11691)
        chained   on Blackwell's tensor memory, a product whose accumulator is another product's
                  result: wrong in a loop (triton-lang/triton#10821)
    """
    found = list(narrow(representation(launch, arch, before="llir")))
    if arch == "sm_100":
        found += chained(representation(launch, arch, before="ttgir"))
    return found


def narrow(text: str) -> Iterator[str]:
    """Found in Triton's GPU representation, after layouts are chosen."""
    versions = dict(re.findall(r"(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d)", text))
    layout = r"#ttg\.dot_op<\{opIdx = (\d), parent = (#\w+), kWidth = (\d+)"
    for line in text.splitlines():
        operands = re.findall(rf"tensor<(\d+)x(\d+)x\w+, {layout}", line)
        for rows, columns, index, parent, width in operands if "tt.dot " in line else ():
            k = int(columns if index == "0" else rows)
            if versions.get(parent) == "2" and 8 * int(width) > k:
                yield f"narrow: operand {index} has kWidth {width} and K {k}"


def chained(text: str) -> Iterator[str]:
    """Found in Triton's first representation, after its rewrites."""
    products = dict(re.findall(r"(%\S+) = tt\.dot \S+, \S+, (%[\w#]+)", text))
    for result, accumulator in products.items():
        if accumulator in products:
            yield f"chained: {result} adds to the product {accumulator}"
