"""Providers: what is timed. Each sets a problem up and returns a closure of no arguments.

A closure gives the block's output and, but in forward mode, the gradients of x and of all
parameters. It reads its problem's ``x`` in place on every call.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from da_triton import DoubleAttention

from . import names
from .problems import BACKWARD, FORWARD, Problem, memory_format

EAGER, GRAPH = "eager", "graph"
NCHW, CHANNELS_LAST = "nchw", "channels_last"
LAYOUTS = (NCHW, CHANNELS_LAST)
Block = Callable[[Tensor], Tensor]


class Closure(Protocol):
    def __call__(self) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Provider:
    """``launch``: whether each operation is launched on its own or all of them as a CUDA graph.

    The fastest ``baseline`` of a launch mode is what ratios of that mode refer to, and the fastest
    ``compiled_baseline``. ``compiles`` says that the setup uses ``torch.compile``. ``gpu``: it runs
    nowhere else; ``half``: it means something in half precision only.
    """

    name: str
    setup: Callable[[Problem], Closure]
    launch: str = EAGER
    channels_last: bool = False
    baseline: bool = False
    compiles: bool = False
    compiled_baseline: bool = False
    gpu: bool = False
    half: bool = False

    @property
    def layout(self) -> str:
        return CHANNELS_LAST if self.channels_last else NCHW


# --- blocks that are compared ---------------------------------------------------------------------


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


class EinsumDoubleAttention(EagerDoubleAttention):
    """The core in two contractions, with the heads as an axis of their own."""

    def forward(self, x: Tensor) -> Tensor:
        def by_head(maps: Tensor) -> Tensor:
            return maps.flatten(2).unflatten(1, (self.heads, -1))

        maps = by_head(self.convB(x)).softmax(-1)
        descriptors = torch.einsum("nhml,nhkl->nhmk", by_head(self.convA(x)), maps)
        vectors = by_head(self.convV(x)).softmax(2)
        z = torch.einsum("nhmk,nhkl->nhml", descriptors, vectors)
        return x + self.conv_reconstruct(z.reshape(x.shape[0], -1, *x.shape[2:]))


class AttentionCalls(EagerDoubleAttention):
    """Both steps as ``scaled_dot_product_attention`` with X as keys, then as queries.

    Gather: the weights of B are queries over positions, A are the values. The bias of B adds the
    same to all positions and drops out. Distribute: positions are queries over the weights of V,
    whose bias is an additive mask, and the descriptors are the values.
    """

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, heads = x.shape[0], x.shape[1], self.heads

        def rows(weight: Tensor) -> Tensor:
            return weight.reshape(heads, -1, channels).expand(batch, -1, -1, -1)

        flat = x.flatten(2)
        positions = flat.mT[:, None].expand(-1, heads, -1, -1)
        features = self.convA(x).flatten(2).unflatten(1, (heads, -1)).mT
        descriptors = scaled_dot_product_attention(
            rows(self.convB.weight), positions, features, scale=1.0
        )
        assert self.convV.bias is not None
        bias = self.convV.bias.view(1, heads, 1, -1)
        z = scaled_dot_product_attention(
            positions, rows(self.convV.weight), descriptors, attn_mask=bias, scale=1.0
        )
        z = z.mT.reshape(batch, -1, *x.shape[2:])
        return x + self.conv_reconstruct(z)


class LinearAttentionState(EagerDoubleAttention):
    """The gather as the last state of ``flash-linear-attention``'s chunked linear attention.

    That library has no softmax over positions, so it runs before, and causal outputs, which are
    thrown away: a state is what it computes of this function.
    """

    def forward(self, x: Tensor) -> Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        def tokens(maps: Tensor) -> Tensor:  # (batch, positions, heads, channels)
            return maps.flatten(2).unflatten(1, (self.heads, -1)).permute(0, 3, 1, 2).contiguous()

        keys = tokens(self.convB(x)).softmax(1)
        queries = tokens(self.convV(x)).softmax(-1)
        _, state = chunk_linear_attn(
            queries, keys, tokens(self.convA(x)), scale=1.0, output_final_state=True,
            normalize=False,
        )  # fmt: skip
        z = queries.permute(0, 2, 1, 3) @ state.to(x.dtype)  # (batch, heads, positions, features)
        return x + self.conv_reconstruct(z.mT.reshape(x.shape[0], -1, *x.shape[2:]))


def eager_block(problem: Problem, kind: type[EagerDoubleAttention] = EagerDoubleAttention):
    w = problem.workload
    return kind(w.c, w.c_m, w.c_n, w.heads, axes=len(w.positions))


def our_block(problem: Problem, backend: str) -> nn.Module:
    w = problem.workload
    return DoubleAttention(w.c, w.c_m, w.c_n, heads=w.heads, residual=True, backend=backend)


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
        with torch.cuda.graph(self.graph):
            self.results = call()

    def __call__(self) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.results


def setup_block(
    problem: Problem,
    make: Callable[[Problem], nn.Module],
    *,
    compile_mode: str | None = None,
    capture: bool = False,
    autocast: bool = False,
) -> Closure:
    """The block ``make`` builds, with the problem's weights, perhaps compiled or captured."""
    if capture and problem.mode == BACKWARD:
        raise ValueError("backward alone is not captured: its forward would be replayed with it")
    device, dtype = problem.x.device, problem.x.dtype
    block = make(problem).to(device, torch.float32 if autocast else dtype)
    block.load_state_dict(problem.state)
    if len(problem.workload.positions) == 2 and not problem.x.is_contiguous():
        block = block.to(memory_format=memory_format(2))
    run: Block = block
    if compile_mode is not None:
        run = _compiled(block, compile_mode)
    if autocast:
        run = torch.autocast(device.type, dtype)(run)
    if compile_mode is not None and problem.mode == BACKWARD:
        run = _keeping_its_graph(run)
    call = Call(run, problem, block.parameters())
    return Replay(call) if capture else call


def _compiled(block: nn.Module, mode: str) -> Block:
    compiled = torch.compile(block, mode=mode, dynamic=False)

    def run(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return run


def _keeping_its_graph(run: Block) -> Block:
    """Compiled forward passes whose backward is run later, with other calls between."""

    def keeping(x: Tensor) -> Tensor:
        with torch._functorch.config.patch(donated_buffer=False):
            return run(x)

    return keeping


# --- catalogue ------------------------------------------------------------------------------------

MODES_OF_COMPILE = {
    "": ("default", "default"),
    " max-autotune": ("max-autotune-no-cudagraphs", "max-autotune"),  # launched, as a graph
}
OURS = ("torch", "triton", "compile torch", "compile triton", "compile triton max-autotune")


def catalogue(launch: str = EAGER) -> list[Provider]:
    """Every provider in NCHW, what needs no compilation first."""
    ours = {name: functools.partial(our_block, backend=name) for name in ("torch", "triton")}
    kinds = {"einsum": EinsumDoubleAttention, "sdpa": AttentionCalls, "fla": LinearAttentionState}
    plain: list[tuple[str, Callable[[Problem], nn.Module], dict[str, Any]]] = [
        ("eager", eager_block, {"baseline": True}),
        ("triton", ours["triton"], {"gpu": True}),
        ("torch", ours["torch"], {}),
        ("eager autocast", eager_block, {"half": True}),
        *(
            (name, functools.partial(eager_block, kind=kind), {"gpu": name == "fla"})
            for name, kind in kinds.items()
            if name != "fla" or importlib.util.find_spec("fla")
        ),
    ]
    found = [
        Provider(
            name,
            functools.partial(
                setup_block,
                make=make,
                capture=launch == GRAPH,
                autocast=name == "eager autocast",
            ),
            launch,
            **facts,
        )
        for name, make, facts in plain
    ]
    compiled = [("eager", ""), ("triton", ""), ("torch", "")]
    compiled += [(name, " max-autotune") for name in ("eager", "triton")]
    for name, suffix in compiled:
        mode = MODES_OF_COMPILE[suffix][launch == GRAPH]
        setup = functools.partial(
            setup_block,
            make=ours.get(name, eager_block),
            compile_mode=mode,
            capture=launch == GRAPH and not suffix,  # max-autotune records graphs itself
        )
        found.append(
            Provider(
                f"compile {name}{suffix}",
                setup,
                launch,
                compiles=True,
                compiled_baseline=name == "eager",
                gpu=name == "triton" or bool(suffix),
            )
        )
    return found


def in_layouts(providers: Iterable[Provider], layouts: Sequence[str]) -> list[Provider]:
    """Each provider in each memory format."""
    names.check("layout", layouts, LAYOUTS)
    return [
        dataclasses.replace(p, channels_last=layout == CHANNELS_LAST)
        for p in providers
        for layout in layouts
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
        UnknownNameError: with the nearest name.
        ValueError: a named one does not run there.
    """
    known = catalogue(launch)
    names.check("provider", chosen, [p.name for p in known])
    fit = {p.name: _misfit(p, device, dtype) for p in known}
    for name in chosen:
        if fit[name]:
            raise ValueError(f"provider {name!r} {fit[name]}.")
    found = [p for p in known if (p.name in chosen if chosen else not fit[p.name])]
    return in_layouts(found, layouts)


def _misfit(provider, device, dtype):
    if provider.gpu and device.type != "cuda":
        return "needs a GPU"
    if provider.half and dtype.itemsize != 2:
        return "needs float16 or bfloat16"
    return ""


def plain(backend: str, launch: str = EAGER) -> list[Provider]:
    """Eager PyTorch and ``backend``, each in both memory formats."""
    return in_layouts((p for p in catalogue(launch) if p.name in ("eager", backend)), LAYOUTS)


def cpu_sweep() -> list[Provider]:
    """What is timed side by side on a CPU: eager, ours, and eager compiled."""
    wanted = ("eager", "torch", "compile eager")
    return in_layouts((p for p in catalogue() if p.name in wanted), LAYOUTS)


def gpu_sweeps() -> list[list[Provider]]:
    """Groups of providers that are timed side by side on a GPU, what needs no compilation first.

    Every group has eager in it, in both memory formats, to compare with.
    """
    found = []
    for compiles in (False, True):
        for launch in (GRAPH, EAGER):
            known = catalogue(launch)
            group = [p for p in known if p.baseline]
            group += [p for p in known if p.name == "triton" and not compiles]
            both = in_layouts(group, LAYOUTS)
            both += [
                p for p in known if p.compiles == compiles and not p.baseline and p.name != "triton"
            ]
            found.append(both)
    return found
