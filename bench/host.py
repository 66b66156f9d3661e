"""Host costs of a call: microseconds until it returns, layer by layer.

Small shapes take a GPU less time than the host needs to issue their kernels, so the host decides.

    layer        the module; of ``eager``, the block as users write it
    functional   ``double_attention_block``
    recorded     ``runtime.recorded``, one per pass: allocations, addresses, launches and GEMMs
    gather, distribute, double_attention    the public functions, on A, B and V

and what first calls, compiled programs and whatever watches a call take instead of ``recorded``:

    operator     ``torch.ops.da_triton.block``; in a step, ``block_backward`` too
    launchers    ``ops.triton.routes``: allocations, tiles, arguments of kernels
    launches     ``runtime.launch.Launch`` of each kernel, prepared, with its tensors

Each is called with what the one above it hands down. A step is forward and backward, with the
gradients of x and of all weights; below the functional layer, autograd has no part in it.

``issue`` is the host's part alone. On a GPU, nothing waits for the device within a batch. On a CPU,
tensors take an H200's path in bfloat16: Triton's own binder prepares launches of kernels that do
nothing, and a GEMM only allocates its result, 1 µs slower than a product of tiny matrices. It is a
lower bound: the driver, cuBLAS's choice of a kernel, the caching allocator, the device switch and
the backward thread are missing. The eager block beside it computes on four positions with four
channels per head in float32, which takes next to no time.

``call``, on a CPU only, includes the computation: ``torch`` beside eager, in float32.
"""

import contextlib
import functools
import gc
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from da_triton import DoubleAttention, distribute, double_attention, double_attention_block, gather

from . import observe
from .formulations import EagerDoubleAttention
from .measure import progress
from .problems import FORWARD, STEP
from .tables import markdown
from .warm import always, on_absent
from .workloads import Workload

FILE = "host.csv"
ISSUE, CALL = "issue", "call"
BELOW = ("recorded", "operator", "launchers", "launches")
WHATS = ("layer", "functional", *BELOW, "gather", "distribute", "double_attention")
KEYS = ["workload", "n", "c", "c_n", "positions", "mode", "measured", "provider"]
BATCH_SECONDS, LARGEST_BATCH = 2e-3, 10  # a batch must fit the GPU's queue of launches
ROUNDS = (5, 200)  # at least and at most
Run = Callable[[], Any]


class Measured(NamedTuple):
    """A call, and columns of its row."""

    run: Run
    provider: str
    dtype: str
    mode: str
    what: str


# --- what the package calls, from the top to the bottom -------------------------------------------


def lower_layers(run: Run) -> dict[str, Run]:
    """For each layer below the functional one, a call that repeats what it received.

    All that this file knows of the package's inside is here and in ``nothing_behind``.
    """
    from da_triton.ops.triton import routes
    from da_triton.runtime import launch, recorded

    found: dict[str, list[Run]] = {what: [] for what in BELOW}

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            call = functools.partial(op, *args, **(kwargs or {}))
            if op.namespace == "da_triton":
                found["operator"].append(call)
            return call()

    def kept(what, owner, name):
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            call = functools.partial(function, *args, **kwargs)
            found[what].append(call)
            return call()

        return mock.patch.object(owner, name, noted)

    launch.forget()  # a first call runs the launchers
    with (
        kept("launchers", routes, "forward"),
        kept("launchers", routes, "backward"),
        kept("launches", launch.Launch, "__call__"),
    ):
        run()
    for _ in range(recorded.FIRST):
        run()
    with kept("recorded", recorded.Recorded, "__call__"):
        run()
    with Operators():
        run()
    return {what: in_a_row(calls) for what, calls in found.items() if calls}


def in_a_row(calls: Sequence[Run]) -> Run:
    def run() -> None:
        for call in calls:
            call()

    return run


class NoKernel:
    """In place of a compiled kernel: a launch is counted and does nothing."""

    launched = 0  # kernels and GEMMs
    function = 0
    packed_metadata = ()
    launch_metadata = always(None)

    def run(self, *args):
        NoKernel.launched += 1


@contextlib.contextmanager
def nothing_behind() -> Iterator[None]:
    """Tensors of a CPU take the path of an H200's, whose kernels do nothing."""
    from triton.runtime.jit import JITFunction

    from da_triton.ops.triton import core

    def compiled(self, key, signature, device, *_):
        return self.device_caches[device][0].setdefault(key, NoKernel())

    with (
        on_absent("sm_90"),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(core, "obstacle", always(None)),
    ):
        yield


@contextlib.contextmanager
def no_products() -> Iterator[None]:
    """A CPU's matrix products allocate their result and compute nothing."""

    def product(a, b):
        NoKernel.launched += 1
        return a.new_empty((*a.shape[:-1], b.shape[-1]))

    def added(start, a, b, **_):
        NoKernel.launched += 1
        return torch.empty_like(start)

    def added_in_place(start, a, b, **_):
        NoKernel.launched += 1
        return start

    with torch.library._scoped_library("aten", "IMPL") as library:
        with warnings.catch_warnings():  # PyTorch warns of what is replaced
            warnings.simplefilter("ignore")
            for name in ("mm", "bmm"):
                library.impl(name, product, "CPU")
            for name in ("addmm", "baddbmm"):
                library.impl(name, added, "CPU")
                library.impl(f"{name}_", added_in_place, "CPU")
        yield


# --- what is measured -----------------------------------------------------------------------------


def of_workload(work: Workload, device: torch.device) -> dict[str, list[Measured]]:
    """Calls that are measured in turns, by what is measured of them."""
    if device.type != "cpu":
        gpu = work.n, device, torch.bfloat16
        calls = [*ours(work, "triton", *gpu), *ours(work, "torch", *gpu), *eager(work, *gpu)]
        return {ISSUE: calls}
    width = 4 * work.heads
    tiny = Workload(work.name, 1, width, (2,) * len(work.positions), width, width, work.heads)
    with no_products():
        issued = ours(work, "triton", work.n, device, torch.bfloat16)
    cpu = work.cpu_n, device, torch.float32
    return {
        ISSUE: [*issued, *eager(tiny, 1, device, torch.float32)],
        CALL: [*ours(work, "torch", *cpu), *eager(work, *cpu)],
    }


def eager(work: Workload, n: int, device: torch.device, dtype: torch.dtype) -> list[Measured]:
    axes = len(work.positions)
    block = EagerDoubleAttention(work.c, work.c_m, work.c_n, work.heads, axes=axes)
    block = block.to(device, dtype)
    x = torch.randn(n, work.c, *work.positions).to(device, dtype)
    passes = passes_of(block, x, [*block.parameters()])
    return [Measured(run, "eager", str(dtype)[6:], mode, "layer") for mode, run in passes.items()]


def ours(
    work: Workload, backend: str, n: int, device: torch.device, dtype: torch.dtype
) -> list[Measured]:
    core: dict[str, Any] = {"heads": work.heads, "backend": backend}
    layer = DoubleAttention(work.c, work.c_m, work.c_n, residual=True, **core).to(device, dtype)
    parameters = [*layer.parameters()]  # in the order of the function's arguments
    x, a, b, v = (
        torch.randn(n, c, *work.positions).to(device, dtype)
        for c in (work.c, work.c_m, work.c_n, work.c_n)
    )
    g = gather(a, b, **core)

    def functional(x: Tensor) -> Tensor:
        return double_attention_block(x, *parameters, residual=True, **core)

    layers, functions = (passes_of(call, x, parameters) for call in (layer, functional))
    runs = {mode: {"layer": layers[mode], "functional": functions[mode]} for mode in layers}
    runs[FORWARD] |= {
        "gather": functools.partial(gather, a, b, **core),
        "distribute": functools.partial(distribute, g, v, backend=backend),
        "double_attention": functools.partial(double_attention, a, b, v, **core),
    }
    if backend == "triton":
        for of_mode in runs.values():
            of_mode |= lower_layers(of_mode["functional"])
    return [
        Measured(run, backend, str(dtype)[6:], mode, what)
        for mode, of_mode in runs.items()
        for what, run in of_mode.items()
    ]


def passes_of(
    run: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[nn.Parameter]
) -> dict[str, Run]:
    """Forward; and a step, forward and backward with the gradients of x and of all parameters."""
    leaf = x.clone().requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        with torch.enable_grad():
            torch.autograd.grad(run(leaf), (leaf, *parameters), grad)

    return {FORWARD: functools.partial(run, x), STEP: step}


# --- how it is measured ---------------------------------------------------------------------------


@torch.no_grad()  # a step enables gradients itself
def measure(workloads: Sequence[Workload], device: torch.device, seconds: float) -> pd.DataFrame:
    """A row for each call of each workload, in ``seconds`` or what five rounds of all take."""
    rows = []
    with contextlib.nullcontext() if observe.on_gpu(device) else nothing_behind():
        for work in progress(workloads):
            groups = of_workload(work, device)
            for measured, calls in groups.items():
                found = in_turns(calls, device, seconds / len(workloads) / len(groups))
                for call, times in zip(calls, found, strict=True):
                    rows.append(_row(work, measured, call, times, device))
    return pd.DataFrame(rows)


def _row(
    work: Workload, measured: str, call: Measured, times: Sequence[float], device: torch.device
) -> dict[str, Any]:
    low, median = np.quantile(times, (0.25, 0.5))
    named = call._asdict()
    del named["run"]
    return {
        **work.columns(device), "n": work.cpu_n if measured == CALL else work.n,
        "device": device.type, "threads": torch.get_num_threads(), **named, "measured": measured,
        "median_us": median, "quartile_us": low, "batches": len(times),
        "launches": launches(call, device),
    }  # fmt: skip


def in_turns(calls: Sequence[Measured], device: torch.device, seconds: float) -> list[list[float]]:
    """Microseconds of each call, a mean of every batch; a batch of each, and again."""
    end = time.perf_counter() + seconds
    sizes = [batch_size(call, device) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    least, most = ROUNDS
    gc.collect()
    gc.disable()
    try:
        while len(found[0]) < least or (time.perf_counter() < end and len(found[0]) < most):
            for call, size, times in zip(calls, sizes, found, strict=True):
                times.append(batch(call, device, size))
    finally:
        gc.enable()
    return found


def batch_size(call: Measured, device: torch.device) -> int:
    batch(call, device, 2)
    seconds = 1e-6 * batch(call, device, 1)
    return max(1, min(LARGEST_BATCH, int(BATCH_SECONDS / seconds)))


def batch(call: Measured, device: torch.device, size: int) -> float:
    """Microseconds until a call returns, the mean of ``size`` calls."""
    run = call.run
    replaced = device.type == "cpu" and call.provider == "triton"
    with no_products() if replaced else contextlib.nullcontext():
        run()  # finds caches as they are between calls
        observe.wait(device)
        start = time.perf_counter_ns()
        for _ in range(size):
            run()
        taken = time.perf_counter_ns() - start
    observe.wait(device)
    return taken / (1e3 * size)


def launches(call: Measured, device: torch.device) -> int | None:
    """Kernels that a call launches, and products; None where nothing is launched or counted."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # no profiling interface
            return observe.launches(call.run)
    elif call.provider == "triton":
        with no_products():
            NoKernel.launched = 0
            call.run()
            return NoKernel.launched
    return None


def shown(frame: pd.DataFrame) -> str:
    """Lower quartiles, which leave out what else runs on the machine, in Markdown."""
    wide = frame.pivot_table(index=KEYS, columns="what", values="quartile_us", sort=False)
    wide = wide[[what for what in WHATS if what in wide]]
    layers = frame[frame["what"] == "layer"].set_index(KEYS)
    wide["launches of the layer"] = layers["launches"]
    return markdown(wide.reset_index(), dict.fromkeys(wide.columns, 0))
