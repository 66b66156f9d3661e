"""``python -m bench warm``: fills Triton's compile cache for a GPU without the GPU.

The package's own launchers run on meta tensors and Triton's JIT compiles their kernels through
``JITFunction.run``, as it would in front of a launch, so the entries have the keys that the JIT
looks up on the GPU. There they are found if Triton is the same wheel, ``ptxas`` the same version
and the kernels' files the same, line numbers included; ``key`` holds all three. If they differ,
nothing breaks: kernels are compiled again. C launchers are not in the cache, because they are
linked against the driver.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from da_triton import selfcheck
from da_triton.runtime.tiles import ARCHITECTURES

from . import problems
from .environment import ROOT
from .report import replace
from .workloads import Workload

META = torch.device("meta")
FILE = "warm.json"  # the key, beside Triton's entries

# SMs, which decide how positions are split.
NUM_SMS = {
    "sm_80": 108,  # A100
    "sm_89": 128,  # RTX 4090
    "sm_90": 132,  # H100 and H200, SXM
    "sm_100": 148,  # B200
}


def warm(arch: str, workloads: Sequence[Workload], folder: Path, smoke: bool = False) -> str:
    """Compiles what a training step and inference launch on the planned routes, in both memory
    formats, into ``folder``, in Triton's own layout.

    ``smoke``: also what a thorough ``da_triton.check`` launches.

    Returns a line with what was compiled and what is in the folder, of whatever architecture.

    Needs a process in which ``TRITON_INTERPRET`` was not set when ``da_triton`` was imported.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start, before = time.perf_counter(), _kernels(folder)
    relocate(folder)
    settings = {"TRITON_CACHE_DIR": str(folder.resolve()), "TRITON_STORE_BINARY_ONLY": "1"}
    with mock.patch.dict(os.environ, settings), on_absent(arch), without_launches():
        for work, channels_last in itertools.product(workloads, (False, True)):
            step(work, channels_last, torch.bfloat16)
        for unit in selfcheck.units() if smoke else ():
            selfcheck.run(*unit, META, every=True)
    (folder / FILE).write_text(json.dumps(key(arch), indent=1) + "\n", encoding="utf-8")
    kernels, seconds = _kernels(folder), time.perf_counter() - start
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return (
        f"{kernels} kernels, {kernels - before} of them compiled in {seconds:.1f} s, "
        f"{size / 1e6:.1f} MB in {folder}"
    )


def step(
    work: Workload, channels_last: bool, dtype: torch.dtype, device: torch.device = META
) -> None:
    """The launches of the block's forward and backward operators; values do not matter."""
    from da_triton.ops.triton import block
    from da_triton.planning import planner

    empty = functools.partial(torch.empty, dtype=dtype, device=device)
    form = problems.memory_format(len(work.positions), channels_last)
    x = empty((work.n, work.c, *work.positions), memory_format=form).flatten(2)
    c, m, n = work.c, work.c_m, work.c_n
    weights = [empty(size) for size in ((m, c), (m,), (n, c), (n, c), (n,), (c, m), (c,))]
    options = work.heads, 1.0, 1.0, 1.0, True, True, "auto"
    save_v = planner.saves_v(c, m, n, work.heads, "auto")
    forward, backward = block.block_op._init_fn, block.block_backward_op._init_fn
    out, *saved = forward(x, *weights, None, *options, save_v)
    backward(torch.empty_like(out), x, *weights, None, *saved, *options, [True] * 8)


def key(arch: str) -> dict[str, Any]:
    """All that the entries' keys depend on: equal on two machines, they are found."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime.cache import triton_key

    sources = hashlib.sha256()
    for folder in ("kernels", "runtime"):
        for path in sorted((ROOT / "da_triton" / folder).glob("*.py")):
            sources.update(path.read_bytes())
    return {
        "arch": arch,
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "ptxas": get_ptxas_version(ARCHITECTURES[arch].target).strip().splitlines()[-1],
        "kernels": sources.hexdigest(),
        "settings": get_cache_invalidating_env_vars(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
    }


def differences(folder: Path) -> list[str]:
    """Differences between this machine's key and that of a cache, a line per fact.

    Raises:
        FileNotFoundError: the folder was not filled by ``warm``.
    """
    made: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
    here = key(made["arch"])
    return [
        f"{name}: {value} here, {made.get(name)} in the cache"
        for name, value in here.items()
        if made.get(name) != value
    ]


def relocate(folder: Path) -> int:
    """Makes a cache that was carried from elsewhere usable; the number of entries changed.

    Triton stores the absolute paths of an entry's files, and an entry whose files are not there
    is compiled again.
    """
    changed = 0
    for group in folder.glob("*/__grp__*.json"):
        before = json.loads(group.read_text(encoding="utf-8"))
        paths = {name: str(group.resolve().parent / name) for name in before["child_paths"]}
        if paths != before["child_paths"]:
            replace(group, json.dumps({"child_paths": paths}))
            changed += 1
    return changed


def _kernels(folder: Path) -> int:
    return len([*folder.glob("*/*.cubin")])


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton compiles every kernel that is launched, and launches none."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        original(self, *args, grid=grid, warmup=True, **kwargs)  # not kept: it may be a future

    with mock.patch.object(JITFunction, "run", run):
        yield


def on_absent(arch: str) -> contextlib.AbstractContextManager[None]:
    """Triton finds a driver of such a GPU, and launchers choose as on one."""
    from triton.runtime import driver

    from .codegen import compile, survey

    gpu = SimpleNamespace(
        get_current_target=always(compile.TARGETS[arch]),
        get_current_device=always(0),
        get_current_stream=always(0),
    )
    driver.set_active(gpu)  # for good: without a GPU there is no driver to go back to
    return survey.on(arch, NUM_SMS[arch])


def always(value: Any) -> Callable[..., Any]:
    """A function that costs next to nothing, unlike a ``Mock``."""
    return lambda *_: value
