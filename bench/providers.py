"""Providers: what is timed. Each sets a problem up and returns a closure of no arguments.

A closure gives the block's output and, but in forward mode, the gradients of x and of all
parameters. It reads its problem's ``x`` in place on every call.
"""

import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .formulations import (
    AbsorbedAttention,
    AbsorbedFlexAttention,
    AttentionCalls,
    EinsumDoubleAttention,
    LinearAttentionState,
    eager_block,
    our_block,
)
from .problems import BACKWARD, FORWARD, Problem, memory_format
from .workloads import UsageError, check

EAGER, GRAPH = "eager", "graph"
NCHW, CHANNELS_LAST = "nchw", "channels_last"
LAYOUTS = (NCHW, CHANNELS_LAST)
Block = Callable[[Tensor], Tensor]


class Closure(Protocol):
    def __call__(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Provider:
    """``launch``: whether each operation is launched on its own or all of them as a CUDA graph.

    ``baseline``: plain eager PyTorch. ``compiles``: the setup uses ``torch.compile``. ``gpu``: it
    needs a GPU; ``half``: it needs half precision. ``formats``: the layouts it is written for.
    ``unbiased``: its block has no bias of V, so it solves a problem that is slightly easier.
    """

    name: str
    setup: Callable[[Problem], Closure]
    launch: str = EAGER
    channels_last: bool = False
    baseline: bool = False
    compiles: bool = False
    gpu: bool = False
    half: bool = False
    formats: tuple[str, ...] = LAYOUTS
    unbiased: bool = False

    @property
    def layout(self) -> str:
        return CHANNELS_LAST if self.channels_last else NCHW

    def problem(self, problem: Problem) -> Problem:
        """The problem as this provider takes it: in its layout, with or without a bias of V."""
        given = problem.without_bias_of_v if self.unbiased else problem
        return given.in_format(self.channels_last)


# --- closures -------------------------------------------------------------------------------------


class Call:
    """Forward, backward, or both, of a block on its problem's input.

    ``before`` is the part that is not timed: the forward pass, where backward alone is.
    """

    def __init__(self, run: Block, problem: Problem, parameters: Iterable[Tensor]) -> None:
        self.run, self.problem = run, problem
        self.inputs = [problem.x, *parameters]
        self.out: Tensor | None = None

    def before(self) -> None:
        if self.problem.mode == BACKWARD:
            self.out = self.run(self.problem.x)

    def __call__(self) -> tuple[Tensor, ...]:
        if self.problem.mode == FORWARD:
            with torch.no_grad():
                return (self.run(self.problem.x),)
        out = self.run(self.problem.x) if self.out is None else self.out
        self.out = None
        grads = torch.autograd.grad(
            out, self.inputs, self.problem.grad, allow_unused=True, materialize_grads=True
        )
        return out, *grads

    def saved_bytes(self) -> int | None:
        """Bytes that autograd holds between forward and backward, beyond input and parameters."""
        if self.problem.mode == FORWARD:
            return None
        given = {t.untyped_storage()._cdata for t in self.inputs}
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            held.append(t)  # so that no storage's address is used again
            return t

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.run(self.problem.x)
        return sum(size for address, size in found.items() if address not in given)


class Replay:
    """A call recorded as a CUDA graph."""

    def __init__(self, call: Closure) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its stream current: the outer context restores this one.
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self.graph):
            self.results = call()

    def __call__(self) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.results


def setup_block(
    problem: Problem,
    make: Callable[[Problem], nn.Module],
    *,
    compile_mode: str | None = None,
    as_matmul: bool = False,
    capture: bool = False,
    autocast: bool = False,
) -> Closure:
    """The block ``make`` builds, with the problem's weights, optionally compiled or captured.

    ``as_matmul``: compiled with pointwise convolutions as matrix products, and those as generated
    code that Inductor fuses with what surrounds it.
    """
    if capture and problem.mode == BACKWARD:
        raise ValueError("backward alone is not captured: its forward would be replayed with it")
    device, dtype = problem.x.device, problem.x.dtype
    block = make(problem).to(device, torch.float32 if autocast else dtype)
    block.load_state_dict(problem.state)
    if len(problem.workload.positions) == 2 and not problem.x.is_contiguous():
        block = block.to(memory_format=memory_format(2))
    run: Block = block
    if compile_mode is not None:
        how = matmul_options(compile_mode) if as_matmul else {"mode": compile_mode}
        # Without fullgraph, graph breaks and the limit of recompilations run eager code silently.
        run = torch.compile(block, dynamic=False, fullgraph=True, **how)
    if autocast:
        run = torch.autocast(device.type, dtype)(run)
    if compile_mode is not None and problem.mode == BACKWARD:
        run = _keeping_its_graph(run)
    call = Call(run, problem, block.parameters())
    return Replay(call) if capture else call


def matmul_options(mode: str) -> dict[str, Any]:
    """Arguments of ``torch.compile``: a mode's options and those of ``as_matmul``."""
    from torch import _inductor

    options = {
        **_inductor.list_mode_options(mode),
        "conv_1x1_as_mm": True,
        "triton.native_matmul": True,
    }
    return {"options": options}


def _keeping_its_graph(run: Block) -> Block:
    """Compiled forward passes whose backward is run later, with other calls between."""

    def keeping(x: Tensor) -> Tensor:
        with torch._functorch.config.patch(donated_buffer=False):
            return run(x)

    return keeping


# --- catalogue ------------------------------------------------------------------------------------

# Nothing records graphs of its own: every provider that runs as one is captured by ``Replay``.
MODES_OF_COMPILE = {"": "default", " max-autotune": "max-autotune-no-cudagraphs"}
OURS = ("torch", "triton", "compile torch", "compile triton", "compile triton max-autotune")


def catalogue(launch: str = EAGER) -> list[Provider]:
    """Every provider in NCHW, those that need no compilation first."""
    eager, flex = eager_block, functools.partial(eager_block, kind=AbsorbedFlexAttention)
    torch_, triton = (functools.partial(our_block, backend=name) for name in ("torch", "triton"))
    einsum, sdpa, fla, absorbed = (
        functools.partial(eager_block, kind=kind)
        for kind in (
            EinsumDoubleAttention, AttentionCalls, LinearAttentionState, AbsorbedAttention,
        )
    )  # fmt: skip
    rows: dict[str, Any] = {"formats": (CHANNELS_LAST,)}
    plain: list[tuple[str, Callable[[Problem], nn.Module], dict[str, Any]]] = [
        ("eager", eager, {"baseline": True}),
        ("triton", triton, {"gpu": True}),
        ("torch", torch_, {}),
        ("eager autocast", eager, {"half": True}),
        ("einsum", einsum, {}),
        ("sdpa", sdpa, {}),
        *([("fla", fla, {"gpu": True})] if importlib.util.find_spec("fla") else []),
        ("absorbed", absorbed, rows),
        ("absorbed unbiased", absorbed, {**rows, "unbiased": True}),
    ]
    compiled: list[tuple[str, str, Callable[[Problem], nn.Module], dict[str, Any]]] = [
        ("eager", "", eager, {}),
        ("triton", "", triton, {"gpu": True}),
        ("torch", "", torch_, {}),
        ("eager", " max-autotune", eager, {"gpu": True}),
        ("triton", " max-autotune", triton, {"gpu": True}),
        ("eager mm", "", eager, {"gpu": True}),
        ("eager mm", " max-autotune", eager, {"gpu": True}),
        ("absorbed unbiased", "", absorbed, {**rows, "unbiased": True}),
        ("absorbed flex", "", flex, {**rows, "gpu": True}),
        ("absorbed flex", " max-autotune", flex, {**rows, "gpu": True}),
    ]
    capture = launch == GRAPH
    found = []
    for name, make, facts in plain:
        setup = functools.partial(
            setup_block, make=make, capture=capture, autocast=name == "eager autocast"
        )
        found.append(Provider(name, setup, launch, **facts))
    for name, suffix, make, facts in compiled:
        setup = functools.partial(
            setup_block,
            make=make,
            compile_mode=MODES_OF_COMPILE[suffix],
            as_matmul=name == "eager mm",
            capture=capture,
        )
        found.append(Provider(f"compile {name}{suffix}", setup, launch, compiles=True, **facts))
    return found


def in_layouts(providers: Iterable[Provider], layouts: Sequence[str]) -> list[Provider]:
    """Each provider in each memory format that it is written for."""
    return [
        dataclasses.replace(p, channels_last=layout == CHANNELS_LAST)
        for p in providers
        for layout in layouts
        if layout in p.formats
    ]


def select(
    chosen: Sequence[str],
    launch: str,
    device: torch.device,
    dtype: torch.dtype,
    layouts: Sequence[str] = LAYOUTS,
) -> list[Provider]:
    """Providers by name, or all that run on a device in a dtype.

    Raises:
        UsageError: a name is not known, or what it names does not run there.
    """
    known = catalogue(launch)
    check("provider", chosen, [p.name for p in known])
    check("layout", layouts, LAYOUTS)
    fit = {p.name: _misfit(p, device, dtype, layouts) for p in known}
    for name in chosen:
        if fit[name]:
            raise UsageError(f"provider {name!r} {fit[name]}.")
    found = [p for p in known if (p.name in chosen if chosen else not fit[p.name])]
    return in_layouts(found, layouts)


def _misfit(provider, device, dtype, layouts):
    if provider.gpu and device.type != "cuda":
        return "needs a GPU"
    if provider.half and dtype.itemsize != 2:
        return "needs float16 or bfloat16"
    if not set(provider.formats) & set(layouts):
        return f"needs layout {' or '.join(provider.formats)}"
    return ""


def plain(backend: str, launch: str = EAGER) -> list[Provider]:
    """Eager PyTorch and ``backend``, each in both memory formats."""
    return in_layouts((p for p in catalogue(launch) if p.name in ("eager", backend)), LAYOUTS)


def cpu_sweep() -> list[Provider]:
    """What is timed side by side on a CPU: eager, ours, and eager compiled."""
    wanted = ("eager", "torch", "compile eager")
    return in_layouts((p for p in catalogue() if p.name in wanted), LAYOUTS)


SIDES = ("eager", "triton")  # the baseline and da_triton, in every group
ONE_FORMAT = ("torch", "eager autocast", "einsum", "fla", "compile triton")  # NCHW suffices
STAGES: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "eager": (
        (
            GRAPH,
            ("torch", "eager autocast", "einsum", "sdpa", "fla", "absorbed", "absorbed unbiased"),
        ),
        (EAGER, ()),
    ),
    "compiled": (
        (GRAPH, ("compile eager", "compile triton")),
        (GRAPH, ("compile eager max-autotune",)),
        (GRAPH, ("compile eager mm", "compile absorbed unbiased", "compile absorbed flex")),
        (EAGER, ("compile eager", "compile triton")),
        (GRAPH, ("compile eager mm max-autotune", "compile absorbed flex max-autotune")),
    ),
}
# Numbers of groups of the compiled stage, in the order of their worth for the time they take.
COMPILED_DEFAULT, COMPILED_AUTOTUNED = 0, 1
COMPILED_MAIN = (0, 2, 1)
COMPILED_LATER = (2, 3, 4)


def gpu_sweeps(stage: str = "") -> list[list[Provider]]:
    """Groups of providers that are timed in turns on a GPU; ``stages.order`` says which come first.

    ``stage``: "eager", which needs no compilation, or "compiled"; without one, both in this order.
    Every group has eager and da_triton in both memory formats.

    Raises:
        UsageError: a stage of another name.
    """
    check("stage", [stage] if stage else [], list(STAGES))
    found = []
    for launch, others in itertools.chain(*([STAGES[stage]] if stage else STAGES.values())):
        known = {p.name: p for p in catalogue(launch)}
        group: list[Provider] = []
        for name in (*SIDES, *others):
            if name in known:  # all but fla, which is optional
                layouts = (NCHW,) if name in ONE_FORMAT else LAYOUTS
                group += in_layouts([known[name]], layouts)
        found.append(group)
    return found
