"""Prepared launches: what is computed once, and what is checked at every call."""

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch

from da_triton import signatures
from da_triton.kernels import distribute, gather, gather_backward, project_gather
from da_triton.runtime import launch, tiles

TESTS = Path(__file__).parents[1]


def compiled(program):
    """Output of a program in its own process, where kernels are compiled."""
    env = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRELUDE + program]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.split()


PRELUDE = """
import sys
import torch
from triton import knobs
from support import compiled
from support.compiled import jitted, received
from da_triton.kernels import distribute, gather, gather_backward, project_gather
from da_triton.ops.triton import routes
from da_triton.runtime import launch
from da_triton.runtime.recorded import Recorded
from da_triton.planning.costs import AH, AZ, XH, XZ
from da_triton.planning.planner import Route

FUSED = Route(XH, "fused", "fused", "fused", XH, 64)
OPTIONS = routes.Options(1, 0.5, 0.6, 0.7, True, True)

def empty(*shape, dtype=torch.bfloat16, offset=0):
    return torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)

def rows(batch, channels, length, last, offset):
    if last:
        return empty(batch, length, channels, offset=offset).mT
    return empty(batch, channels, length, offset=offset)

def weights(c, m, n, offset=0):
    return routes.Weights(
        empty(m, c), empty(m, offset=offset), empty(n, c), empty(n, c), empty(n, offset=offset),
        empty(c, m), empty(c, offset=offset),
    )

x, w = empty(1, 128, 49), weights(128, 64, 64)

def gathered(x=x):
    return project_gather.gather_from_x(x, w.b, None, 0.5)

def forward(x, *w):
    return routes.forward(x, routes.Weights(*w), None, OPTIONS, FUSED, False)

def numbers(args):
    return [0 if isinstance(a, int) and a >= 2**32 else a for a in args]
"""


def test_a_prepared_launch_passes_what_triton_passes():
    """Every kernel, argument for argument, in every layout, with addresses 16 does not divide."""
    names = compiled("""
original = launch.Launch.__call__

def both(self, tensors, scales=()):
    original(self, tensors, scales)
    number = len(jitted)
    original(self, tensors, scales)
    assert len(jitted) == number, "it was prepared"
    self._compile(tensors, scales, None)
    assert len(jitted) == number + 1
    assert received[-2] == received[-1], received[-2:]

launch.Launch.__call__ = both
UNFUSED = [
    Route(AZ, "unfused", "unfused", "unfused", AZ, 64),
    Route(XH, "unfused", "unfused", "unfused", XH, 64),
    Route(AH, "fused", "fused", "unfused", AH, 64),
    Route(XZ, "fused", "unfused", "unfused", XZ, 64),
]
for last in (False, True):
    for offset in (0, 1):
        for masked in (False, True):
            for route in (FUSED, FUSED._replace(batch_chunk=1), *UNFUSED):
                x, w = rows(2, 64, 196, last, offset), weights(64, 32, 48, offset)
                keep = empty(2, 196, dtype=torch.uint8, offset=offset) if masked else None
                for save_v in (False, True):
                    out, lse, g, v = routes.forward(x, w, keep, OPTIONS, route, save_v)
                    routes.backward(out, x, w, keep, lse, g, v, OPTIONS, route)
            x, w = rows(1, 64, 4096, last, offset), weights(64, 32, 48, offset)  # many partials
            out, lse, g, v = routes.forward(x, w, None, OPTIONS, FUSED, False)
            routes.backward(out, x, w, None, lse, g, v, OPTIONS, FUSED)
            a, b = (rows(66, 300, 49, last, offset)[:, None] for _ in range(2))
            keep = empty(66, 49, dtype=torch.uint8) if masked else None
            gather.gather_forward([(a, b, keep)], 0.5)  # with statistics
            for m, n, length in ((32, 32, 4096), (300, 128, 196), (300, 600, 49)):
                for dtype in (torch.bfloat16, torch.float16, torch.float32):
                    a, b, v, z = (
                        rows(1, c, length, last, offset).to(dtype)[:, None] for c in (m, n, n, m)
                    )
                    keep = empty(1, length, dtype=torch.uint8) if masked else None
                    g, lse = gather.gather_forward([(a, b, keep)], 0.5)
                    gather_backward.gradients(g, a, b, keep, g, lse, lse, 0.5, True, True)
                    distribute.distribute_forward(g, v, 0.5, True, 0.6)
                    distribute.distribute_backward(z, g, v, 0.5, True, 0.6, True, True)
print(*{name for name, _ in received})
""")
    sources = [path.read_text() for path in (TESTS.parent / "da_triton/kernels").glob("*.py")]
    defined = sum(source.count("_kernel(\n") for source in sources)
    assert len(names) == defined == 25


def test_an_address_that_16_does_not_divide_is_another_kernel():
    compiled("""
gathered()
gathered(empty(1, 128, 49, offset=1))
gathered()
gathered(empty(1, 128, 49, offset=1))
assert jitted == ["gather_from_x_kernel"] * 2
functions = [args[4] for _, args in received]
assert functions[0] == functions[2] != functions[1] == functions[3]
""")


def test_a_recorded_launch_passes_what_a_prepared_one_passes():
    """Apart from the addresses of what it allocates, and hooks, which it does not pass."""
    compiled("""
ready = Recorded(forward)
for _ in range(9):
    ready(x, *w)
second, third = received[-6:-3], received[-3:]
assert ready.program is not None and len(jitted) == 3
assert "torch._dynamo" not in sys.modules
for (kernel, args), (again, found) in zip(second, third):
    assert kernel == again
    assert numbers(found[:7] + found[9:]) == numbers(args[:7] + args[9:])
    assert found[7:9] == (None, None)
""")


def test_recorded_launches_are_on_the_current_stream_of_the_tensors_device():
    compiled("""
torch.cuda.device = compiled.device
original = torch.empty_strided
torch.empty_strided = lambda *args, device, **how: original(*args, **how)
ready = Recorded(forward)
for _ in range(9):
    ready(x, *w)
del received[3:-3]
compiled.current.stream = 8
ready(x, *w)
ready.program = ready.program._replace(device=torch.device("cuda", 1))
ready(x, *w)
compiled.current.device = 1
ready(x, *w)
assert [args[3] for _, args in received[2::3]] == [7, 7, 8, 108, 108]
assert len(jitted) == 3
""")


def test_what_triton_reads_at_a_launch_is_seen():
    compiled("""
def through_triton(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    number = len(jitted)
    gathered()
    setattr(owner, name, before)
    return len(jitted) - number

kernel = project_gather.gather_from_x_kernel
gathered()
assert through_triton(knobs.runtime, "debug", False) == 0
assert through_triton(knobs.runtime, "debug", True) == 1
assert received[-1][1][4] != received[-2][1][4], "another kernel"
assert through_triton(knobs.compilation, "instrumentation_mode", "fpsan") == 1
hooked = []
assert through_triton(kernel, "pre_run_hooks", [lambda *args, **options: hooked.append(1)]) == 1
assert hooked == [1]
seen = []
knobs.runtime.launch_enter_hook.add(seen.append)
knobs.runtime.launch_exit_hook.add(seen.append)
assert through_triton(knobs.runtime, "debug", False) == 0
assert seen == [received[-1][1][6]] * 2 and seen[0][0] == "gather_from_x_kernel", seen
launch.forget()
assert through_triton(knobs.runtime, "debug", False) == 1
first, again = seen[0], seen[2]
assert first[:3] == again[:3] and first[3][7:] == again[3][7:], "as Triton describes it"
""")


def test_the_stream_is_the_current_one_of_the_current_device():
    compiled("""
gathered()
gathered()
compiled.current.stream = 8
gathered()
compiled.current.device = 1
gathered()
assert [args[3] for _, args in received] == [7, 7, 8, 108]
""")


def test_the_tensors_device_is_made_the_current_one():
    compiled("""
torch.cuda.device = compiled.device
ready = launch.prepared(project_gather._gather_from_x, (x, w.b, None))
tensors = x, w.b, x, *ready.empty()
ready(tensors, (0.5,))
ready.device = torch.device("cuda", 1)
ready(tensors, (0.5,))
compiled.current.device = 1
ready(tensors, (0.5,))
assert [args[3] for _, args in received] == [7, 107, 107]
assert len(jitted) == 1
""")


def test_threads_share_a_table_that_is_full(monkeypatch):
    monkeypatch.setattr(signatures, "LIMIT", 2)
    x = torch.empty(1)

    def look_up(start):
        return [
            launch.prepared(lambda x, flag: flag, (x,), (start + i) % 5) == (start + i) % 5
            for i in range(2000)
        ]

    with ThreadPoolExecutor(8) as threads:
        assert all(map(all, threads.map(look_up, range(8))))
    assert len(launch._prepared.found) == 2


def test_a_warm_forward_pass_calls_few_functions():
    """Python's own count, which does not vary: of this package, for three launches."""
    (calls,) = compiled("""
from pathlib import Path
folder = str(Path(launch.__file__).parents[1])
calls = 0

def count(frame, event, argument):
    global calls
    calls += event == "call" and frame.f_code.co_filename.startswith(folder)

def forward():
    routes.forward(x, w, None, OPTIONS, FUSED, False)

forward()
sys.setprofile(count)
forward()
sys.setprofile(None)
print(calls)
""")
    assert int(calls) <= 36  # fewer from Python 3.12, where comprehensions are inlined


def core(length=24):
    a, b, v = (torch.randn(1, 1, 8, length) for _ in range(3))
    g, _ = gather.gather_forward([(a, b, None)], 0.5)
    return distribute.distribute_forward(g, v, 0.5, True, 0.6)


def test_a_signature_is_prepared_once(monkeypatch):
    made = []
    original = launch.Launch.__init__
    monkeypatch.setattr(
        launch.Launch,
        "__init__",
        lambda self, *a, **k: made.append(a[0]) or original(self, *a, **k),
    )
    core()
    number = len(made)
    core()
    assert len(made) == number > 0
    core(25)
    shared = 1  # what merges partials does not depend on the length
    assert len(made) == 2 * number - shared
    launch.forget()
    core()
    assert len(made) == 3 * number - shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tf32_switch_is_read_at_every_call(dtype):
    x = torch.empty(1, 32, 8, dtype=dtype)
    w = torch.empty(8, 32, dtype=dtype)
    before = torch.backends.cuda.matmul.fp32_precision
    found = []
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            ready = launch.prepared(project_gather._gather_from_x, (x, w, None))
            found.append(ready.constants["PRECISION"])
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert found == ["ieee", "tf32" if dtype == torch.float32 else "ieee"]


def test_a_trial_is_apart():
    """A trial neither uses nor stores a prepared launch, and records tiles."""
    a = torch.randn(1, 1, 8, 300)
    expected = gather.gather_partials([(a, a, None)], 0.5)[0].shape[1]
    table = dict(launch._prepared.found)
    tiles = []
    with launch.trial(2, tiles):
        assert gather.gather_partials([(a, a, None)], 0.5)[0].shape[1] == 2 != expected
    assert len(tiles) == 1
    assert launch._prepared.found == table
    assert gather.gather_partials([(a, a, None)], 0.5)[0].shape[1] == expected


def test_the_table_is_bounded_and_the_oldest_go(monkeypatch):
    monkeypatch.setattr(signatures, "LIMIT", 3)
    x = torch.empty(1)
    for flag in range(5):
        assert launch.prepared(lambda x, flag: flag, (x,), flag) == flag
    assert [key[1] for key in launch._prepared.found] == [(2,), (3,), (4,)]


def test_that_nothing_is_launched_is_found_once():
    calls = []
    for _ in range(2):
        assert launch.prepared(calls.append, (torch.empty(1),)) is None
    assert len(calls) == 1


def test_nothing_keeps_tensors():
    a, b, mask = torch.randn(1, 1, 8, 24), torch.randn(1, 1, 8, 24), torch.ones(1, 24).byte()
    g, lse = gather.gather_forward([(a, b, mask)], 0.5)
    da, db = gather_backward.gradients(g, a, b, mask, g, lse, None, 0.5, True, True)
    z = distribute.distribute_forward(g, b, 0.5, True, 0.6)
    kept = [weakref.ref(t) for t in (a, b, mask, g, lse, da, db, z)]
    assert launch._prepared.found
    del a, b, mask, g, lse, da, db, z
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_a_reloaded_table_of_tiles_is_seen(monkeypatch):
    x, w = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((1, 64, 8), (8, 64)))

    def warps():
        return launch.prepared(project_gather._gather_from_x, (x, w, None)).options["num_warps"]

    before = warps()
    key = tiles.Key("gather_from_x", tiles.PLAIN, "half", 64, 32)
    monkeypatch.setattr(tiles, "shipped", lambda arch: {key: tiles.Entry(64, 2, 2)})
    assert warps() == before != 2
    launch.forget()
    assert warps() == 2


def test_what_is_replaced_inside_forgetting_is_seen_there_alone():
    a = torch.randn(1, 1, 8, 300)

    def num_partials():
        return gather.gather_partials([(a, a, None)], 0.5)[0].shape[1]

    before = num_partials()
    with launch.forgetting(), mock.patch.object(launch, "num_sms", return_value=1):
        assert num_partials() == 2 != before
    assert num_partials() == before
