"""Providers: what is timed. Each sets a problem up and returns a closure of no arguments.

A closure gives the block's output and, in forward + backward mode, the gradients of x and of all
parameters. It reads its problem's ``x`` in place on every call.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from da_triton import DoubleAttention

from .problems import Problem, memory_format

EAGER, GRAPH = "eager", "graph"
Closure = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Provider:
    """``launch``: whether each operation is launched on its own or all of them as a CUDA graph.

    The fastest ``baseline`` of a launch mode is what ratios of that mode refer to, and the fastest
    ``compiled_baseline``. ``compiles`` says that the setup uses ``torch.compile``.
    """

    name: str
    setup: Callable[[Problem], Closure]
    launch: str = EAGER
    channels_last: bool = False
    baseline: bool = False
    compiles: bool = False
    compiled_baseline: bool = False


class EagerDoubleAttention(nn.Module):
    """The block as it is commonly written in PyTorch: four convolutions, softmax, bmm, residual.

    Parameters have the names of ``DoubleAttention``; ``axes`` is the number of position axes.
    """

    def __init__(self, in_channels: int, c_m: int, c_n: int, heads: int = 1, axes: int = 2) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.heads = heads
        self.convA = convolution(in_channels, c_m, 1)
        self.convB = convolution(in_channels, c_n, 1)
        self.convV = convolution(in_channels, c_n, 1)
        self.conv_reconstruct = convolution(c_m, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        def per_head(maps: Tensor) -> Tensor:
            return maps.reshape(x.shape[0] * self.heads, maps.shape[1] // self.heads, -1)

        features = per_head(self.convA(x))
        attention_maps = per_head(self.convB(x)).softmax(dim=-1)
        attention_vectors = per_head(self.convV(x)).softmax(dim=1)
        descriptors = torch.bmm(features, attention_maps.transpose(1, 2))
        z = torch.bmm(descriptors, attention_vectors)
        return x + self.conv_reconstruct(z.reshape(x.shape[0], -1, *x.shape[2:]))


def eager_block(problem: Problem) -> nn.Module:
    w = problem.workload
    return EagerDoubleAttention(w.c, w.c_m, w.c_n, w.heads, axes=len(w.positions))


def our_block(problem: Problem, backend: str) -> nn.Module:
    w = problem.workload
    return DoubleAttention(w.c, w.c_m, w.c_n, heads=w.heads, residual=True, backend=backend)


def setup_block(
    problem: Problem,
    make: Callable[[Problem], nn.Module],
    *,
    compile_mode: str | None = None,
    capture: bool = False,
) -> Closure:
    """The block ``make`` builds, with the problem's weights, perhaps compiled or captured."""
    block = make(problem).to(problem.x.device, problem.x.dtype)
    block.load_state_dict(problem.state)
    if len(problem.workload.positions) == 2 and not problem.x.is_contiguous():
        block = block.to(memory_format=memory_format(2))
    inputs = [problem.x, *block.parameters()]
    run = block if compile_mode is None else _compiled(block, compile_mode)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(problem.x),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = run(problem.x)
        return out, *torch.autograd.grad(out, inputs, problem.grad)

    closure = forward if problem.grad is None else forward_backward
    return captured(closure) if capture else closure


def captured(closure: Closure) -> Closure:
    """``closure`` recorded as a CUDA graph; calling replays it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            closure()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = closure()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def plain(backend: str, launch: str = EAGER) -> list[Provider]:
    """Eager PyTorch and ``backend``, each in both memory formats."""
    makes: dict[str, Callable[[Problem], nn.Module]] = {
        "eager": eager_block,
        backend: functools.partial(our_block, backend=backend),
    }
    return [
        Provider(
            name + (" channels_last" if channels_last else ""),
            functools.partial(setup_block, make=make, capture=launch == GRAPH),
            launch,
            channels_last,
            baseline=name == "eager",
        )
        for name, make in makes.items()
        for channels_last in (False, True)
    ]


def compiled(
    make: Callable[[Problem], nn.Module], name: str, mode: str, launch: str = EAGER, **options: Any
) -> Provider:
    """A block through ``torch.compile``."""
    setup = functools.partial(setup_block, make=make, compile_mode=mode)
    label = f"compile {name}" + ("" if mode == "default" else " max-autotune")
    label += " channels_last" if options.get("channels_last") else ""
    baseline = make is eager_block
    return Provider(label, setup, launch, compiles=True, compiled_baseline=baseline, **options)


def cpu_sweep() -> list[Provider]:
    """What is timed side by side on a CPU: eager, ours, and eager compiled."""
    return plain("torch") + [
        compiled(eager_block, "eager", "default", channels_last=last) for last in (False, True)
    ]


def gpu_sweeps() -> list[list[Provider]]:
    """Groups of providers that are timed side by side on a GPU, what needs no compilation first."""
    ours = functools.partial(our_block, backend="triton")
    graph, eager = plain("triton", GRAPH), plain("triton", EAGER)
    return [
        graph,
        eager,
        [
            *(p for p in graph if p.baseline),
            compiled(eager_block, "eager", "max-autotune", GRAPH),
            compiled(ours, "triton", "max-autotune", GRAPH),
        ],
        [
            *(p for p in eager if p.baseline),
            compiled(eager_block, "eager", "default", EAGER),
            compiled(eager_block, "eager", "max-autotune-no-cudagraphs", EAGER),
            compiled(ours, "triton", "default", EAGER),
        ],
    ]


def _compiled(block: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(block, mode=mode, dynamic=False)

    def run(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return run
