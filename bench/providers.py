"""Providers: the implementations that are timed. Each turns a problem into a closure.

A closure takes no arguments and returns the block's output and, except in forward mode, the
gradients of x and of all parameters. It reads its problem's ``x`` in place on every call.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
from .workloads import UsageError

EAGER, GRAPH = "eager", "graph"
NCHW, CHANNELS_LAST = "nchw", "channels_last"
LAYOUTS = (NCHW, CHANNELS_LAST)
Block = Callable[[Tensor], Tensor]
Closure = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Provider:
    """``launch``: operations are launched one by one ("eager") or as a CUDA graph ("graph").

    ``baseline``: plain eager PyTorch. ``compiles``: the setup uses ``torch.compile``. ``gpu``: it
    needs a GPU; ``half``: it needs half precision. ``formats``: the layouts it is written for.
    ``unbiased``: its block has no bias of V, so it solves a problem that is slightly easier.
    """

    name: str
    setup: Callable[[Problem], Closure]
    launch: str = EAGER
    layout: str = NCHW
    baseline: bool = False
    compiles: bool = False
    gpu: bool = False
    half: bool = False
    formats: tuple[str, ...] = LAYOUTS
    unbiased: bool = False

    def problem(self, problem: Problem) -> Problem:
        """The problem in this provider's layout, with or without a bias of V."""
        given = problem.without_bias_of_v if self.unbiased else problem
        return given.in_format(self.layout == CHANNELS_LAST)


# --- closures -------------------------------------------------------------------------------------


class Call:
    """Forward, backward, or both, of a block on its problem's input.

    ``before`` is not timed: it is the forward pass in backward mode, and empty in the others.
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
        saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used again

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            saved[storage._cdata] = storage
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            self.run(self.problem.x)
        return sum(storage.nbytes() for address, storage in saved.items() if address not in given)


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

    ``as_matmul``: compiled with pointwise convolutions as GEMMs that Inductor generates, and fuses
    with the operations around them.
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
        # Its backward is run later, with other calls between.
        run = torch._functorch.config.patch(donated_buffer=False)(run)
    call = Call(run, problem, block.parameters())
    return Replay(call) if capture else call


def matmul_options(mode: str) -> dict[str, Any]:
    """Arguments of ``torch.compile``: a mode's options and those of ``as_matmul``."""
    from torch import _inductor

    options = _inductor.list_mode_options(mode)
    return {"options": {**options, "conv_1x1_as_mm": True, "triton.native_matmul": True}}


# --- catalogue ------------------------------------------------------------------------------------

# Nothing records graphs of its own: every provider that runs as one is captured by ``Replay``.
DEFAULT, AUTOTUNE = "default", "max-autotune-no-cudagraphs"
OURS = ("torch", "triton", "compile torch", "compile triton", "compile triton max-autotune")


def catalogue(launch: str = EAGER) -> list[Provider]:
    """Every provider in NCHW, those that need no compilation first."""

    def provider(name, make, compile_mode=None, as_matmul=False, autocast=False, **facts):
        setup = functools.partial(
            setup_block, make=make, compile_mode=compile_mode, as_matmul=as_matmul,
            capture=launch == GRAPH, autocast=autocast,
        )  # fmt: skip
        return Provider(name, setup, launch, compiles=compile_mode is not None, **facts)

    def formulated(kind):
        return functools.partial(eager_block, kind=kind)

    torch_, triton = (functools.partial(our_block, backend=name) for name in ("torch", "triton"))
    absorbed, flex = formulated(AbsorbedAttention), formulated(AbsorbedFlexAttention)
    rows = (CHANNELS_LAST,)  # the only layout of those that read X as rows of channels
    found = [
        provider("eager", eager_block, baseline=True),
        provider("triton", triton, gpu=True),
        provider("torch", torch_),
        provider("eager autocast", eager_block, autocast=True, half=True),
        provider("einsum", formulated(EinsumDoubleAttention)),
        provider("sdpa", formulated(AttentionCalls)),
        provider("fla", formulated(LinearAttentionState), gpu=True),
        provider("absorbed", absorbed, formats=rows),
        provider("absorbed unbiased", absorbed, formats=rows, unbiased=True),
        provider("compile eager", eager_block, DEFAULT),
        provider("compile triton", triton, DEFAULT, gpu=True),
        provider("compile torch", torch_, DEFAULT),
        provider("compile eager max-autotune", eager_block, AUTOTUNE, gpu=True),
        provider("compile triton max-autotune", triton, AUTOTUNE, gpu=True),
        provider("compile eager mm", eager_block, DEFAULT, as_matmul=True, gpu=True),
        provider("compile eager mm max-autotune", eager_block, AUTOTUNE, as_matmul=True, gpu=True),
        provider("compile absorbed unbiased", absorbed, DEFAULT, formats=rows, unbiased=True),
        provider("compile absorbed flex", flex, DEFAULT, formats=rows, gpu=True),
        provider("compile absorbed flex max-autotune", flex, AUTOTUNE, formats=rows, gpu=True),
    ]
    return [p for p in found if p.name != "fla" or importlib.util.find_spec("fla")]


def in_layouts(providers: Iterable[Provider], layouts: Sequence[str] = LAYOUTS) -> list[Provider]:
    """Each provider in each memory format that it is written for."""
    return [replace(p, layout=each) for p in providers for each in layouts if each in p.formats]


def select(
    chosen: Sequence[str],
    launch: str,
    device: torch.device,
    dtype: torch.dtype,
    layouts: Sequence[str] = LAYOUTS,
) -> list[Provider]:
    """Providers by name, or all that run on a device in a dtype.

    Raises:
        UsageError: a provider of that name does not run there.
    """
    found = []
    for provider in catalogue(launch):
        misfit = _misfit(provider, device, dtype, layouts)
        if misfit and provider.name in chosen:
            raise UsageError(f"provider {provider.name!r} {misfit}.")
        if provider.name in chosen or not (chosen or misfit):
            found.append(provider)
    return in_layouts(found, layouts)


def _misfit(provider, device, dtype, layouts):
    if provider.gpu and device.type != "cuda":
        return "needs a GPU"
    if provider.half and dtype.itemsize != 2:
        return "needs float16 or bfloat16"
    if not set(provider.formats) & set(layouts):
        return f"needs layout {' or '.join(provider.formats)}"
    return ""


def plain(*others: str) -> list[Provider]:
    """Eager PyTorch and others, each in both memory formats."""
    return in_layouts(p for p in catalogue() if p.name in ("eager", *others))


SIDES = ("eager", "triton")  # the baseline and da_triton, in every group
ONE_FORMAT = ("torch", "eager autocast", "einsum", "fla", "compile triton")  # NCHW suffices
# The groups of each stage, by number: the launch mode, and what is timed beside ``SIDES``.
STAGES: dict[str, tuple[tuple[str, ...], ...]] = {
    "eager": (
        (
            GRAPH, "torch", "eager autocast", "einsum", "sdpa", "fla", "absorbed",
            "absorbed unbiased",
        ),
        (EAGER,),
    ),
    "compiled": (
        (GRAPH, "compile eager", "compile triton"),
        (GRAPH, "compile eager max-autotune"),
        (GRAPH, "compile eager mm", "compile absorbed unbiased", "compile absorbed flex"),
        (EAGER, "compile eager", "compile triton"),
        (GRAPH, "compile eager mm max-autotune", "compile absorbed flex max-autotune"),
    ),
}  # fmt: skip
# Groups of the compiled stage by their worth for the time they take; the others follow by number.
COMPILED_MAIN = (0, 2, 1)


def gpu_sweeps(stage: str) -> list[list[Provider]]:
    """Groups of providers that are timed in turns on a GPU; ``stages.order`` says which come first.

    ``stage``: "eager", which needs no compilation, or "compiled". Every group has eager and
    da_triton in both memory formats.
    """
    found = []
    for launch, *others in STAGES[stage]:
        group = in_layouts(p for p in catalogue(launch) if p.name in (*SIDES, *others))
        found.append([p for p in group if p.layout == NCHW or p.name not in ONE_FORMAT])
    return found
