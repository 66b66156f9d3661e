"""Timers, what is read beside times, and a CUDA context that is lost."""

import dataclasses
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure, networks
from bench.measure import (
    CONTEXT_LOST,
    OK,
    Budget,
    ContextLostError,
    Effort,
    describe,
    usable,
)
from bench.observe import FLUSHES_AHEAD, CudaTimer, WallTimer
from bench.problems import FORWARD, STEP
from bench.providers import GRAPH


def test_wall_timer_measures_the_call():
    calls = []
    assert WallTimer()(lambda: (calls.append(None),), launches_count=True) >= 0
    assert len(calls) == 1


@pytest.mark.parametrize(("launches_count", "flushes"), [(True, 1), (False, FLUSHES_AHEAD)])
def test_l2_holds_clean_lines_of_another_buffer_when_the_clock_starts(
    monkeypatch, launches_count, flushes
):
    """A read of a buffer that nothing writes comes after all writes, before the start event."""
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1.5

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            events.append((function.overloadpacket.__name__, args[0].data_ptr(), args[0].nbytes))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    timer = CudaTimer("cpu", flush_bytes=4096)
    with Log():
        assert timer(lambda: events.append("call"), launches_count=launches_count) == 1.5
    writes = [("zero_", timer.written.data_ptr(), 4096)] * flushes
    read = [("sum", timer.read.data_ptr(), 4096)]
    waits = ["synchronize"] if launches_count else []
    assert events == [*writes, *read, *waits, "record", "call", "record"]


def test_cudnn_searches_for_every_provider_and_is_restored(bench, tiny, eager, variant):
    seen = []

    def setup(problem):
        closure = eager.setup(problem)
        seen.append(torch.backends.cudnn.benchmark)

        def run():
            seen.append(torch.backends.cudnn.benchmark)
            return closure()

        return run

    def fails(problem):
        raise KeyboardInterrupt

    assert not torch.backends.cudnn.benchmark
    bench.measure(tiny, STEP, [variant("ours", setup)])
    assert len(seen) > 4
    assert all(seen)
    with pytest.raises(KeyboardInterrupt):
        bench.measure(tiny, FORWARD, [variant("bad", fails)])
    assert not torch.backends.cudnn.benchmark


def test_cudnn_searches_for_networks(bench):
    seen = []

    def make(block):
        seen.append(torch.backends.cudnn.benchmark)
        return torch.nn.Conv2d(3, 3, 1)

    shape = (1, 3, 4, 4)
    network = networks.Network("n", make, lambda net, x: net(x).mean(), shape, shape)
    bench.measure(network, FORWARD, networks.variants("torch", False))
    assert seen == [True] * 6
    assert not torch.backends.cudnn.benchmark


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What is measured on a GPU only, without one; what is counted, in order."""
    counted = []

    def launches(closure):
        counted.append(closure)
        return 7

    monkeypatch.setattr(measure, "on_gpu", lambda device: True)
    monkeypatch.setattr(measure, "usable", lambda device: True)
    monkeypatch.setattr(measure, "peak_bytes", lambda closure: 1000)
    monkeypatch.setattr(measure, "host_microseconds", lambda closure: 5.0)
    monkeypatch.setattr(measure, "launches", launches)
    return counted


def test_launches_are_counted_after_all_timing(bench, table, variant, timer, as_on_a_gpu):
    """A profiler that has once run slows later launches."""
    added = []

    def add(rows):
        added.append(list(rows))
        assert bool(as_on_a_gpu) == (not rows)

    bench.run(table, [[variant("ours"), variant("graph", launch=GRAPH)], [variant("other")]], add)
    assert len(added) == 2 * 2 * 2 + 1
    assert added[-1] == []
    rows = [row for group in added for row in group]
    assert all(row["status"] == OK for row in rows)
    by_launch = {(row["launch"], row.get("launches"), row.get("peak_bytes")) for row in rows}
    assert by_launch == {("eager", 7, 1000), ("graph", None, None)}
    assert len(as_on_a_gpu) == 2 * 2 * 2


def test_failing_counters_leave_the_timing(bench, tiny, eager, monkeypatch, as_on_a_gpu):
    def fails(closure):
        raise ValueError("no such counter")

    monkeypatch.setattr(measure, "launches", fails)
    monkeypatch.setattr(measure, "peak_bytes", fails)
    rows = []
    bench.run([tiny], [[eager]], rows.extend)
    assert [row["status"] for row in rows] == [OK] * 2
    assert all(row["median_ms"] == 2.0 and row["cpu_us"] == 5.0 for row in rows)
    assert not any("launches" in row or "peak_bytes" in row for row in rows)


def test_used_up_budget_counts_nothing(bench, tiny, eager, as_on_a_gpu):
    bench = dataclasses.replace(bench, budget=Budget(0))
    row = {}
    bench.count_launches([(row, tiny, FORWARD, eager)])
    assert "launches" not in row


def test_rows_of_ours_name_the_kernels_that_were_not_used(bench, tiny, variant, monkeypatch):
    group = [variant("eager"), variant("triton"), variant("compile triton")]
    module = "da_triton.runtime.guard"
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(replaced=lambda: ("a", "b")))
    rows = bench.measure(tiny, FORWARD, group)
    assert [row.get("kernels_not_used") for row in rows] == [None, "a, b", "a, b"]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(replaced=lambda: ()))
    assert not any("kernels_not_used" in row for row in bench.measure(tiny, FORWARD, group))
    monkeypatch.delitem(sys.modules, module)  # as without Triton
    assert not any("kernels_not_used" in row for row in bench.measure(tiny, FORWARD, group))


def test_lost_context_ends_the_run_with_every_row_added(bench, table, eager, variant, monkeypatch):
    """In setup: neither those before nor those after it can be timed in this process."""
    broken = []

    def fails(problem):
        broken.append(None)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(measure, "usable", lambda device: not broken)
    rows = []
    sweeps = [[eager], [eager, variant("bad", fails), variant("ours")], [variant("later")]]
    with pytest.raises(ContextLostError, match="in group 3"):
        bench.run(table, sweeps, rows.extend, [FORWARD])
    failed = "failed: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert [row["status"] for row in rows] == [OK, OK, CONTEXT_LOST, failed, CONTEXT_LOST]


def test_context_lost_while_timing(bench, tiny, eager, variant, monkeypatch):
    """Those that have enough repetitions keep them."""
    calls = []

    def breaks(problem):
        closure = eager.setup(problem)

        def run():
            calls.append(None)
            if len(calls) == 2 + 2:  # warm-up, check; then in the second round, as its first
                raise RuntimeError("CUDA error")
            return closure()

        return run

    monkeypatch.setattr(measure, "usable", lambda device: len(calls) < 4)
    bench = dataclasses.replace(bench, effort=Effort(1, 1, 3, seconds=1e9))
    rows = []
    with pytest.raises(ContextLostError):
        bench.run([tiny], [[eager, variant("bad", breaks)]], rows.extend)
    assert [row["status"] for row in rows] == [OK, "failed: RuntimeError: CUDA error"]
    assert rows[0]["repetitions"] == 1
    calls.clear()
    bench = dataclasses.replace(bench, effort=Effort(1, 2, 3, seconds=1e9))
    rows.clear()
    with pytest.raises(ContextLostError):
        bench.run([tiny], [[eager, variant("bad", breaks)]], rows.extend)
    assert rows[0]["status"] == CONTEXT_LOST


def test_failure_with_a_usable_context_goes_on(bench, table, variant):
    def fails(problem):
        raise RuntimeError("out of memory")

    rows = []
    bench.run(table, [[variant("bad", fails), variant("ours")]], rows.extend, [FORWARD])
    assert [row["status"] for row in rows] == ["failed: RuntimeError: out of memory", OK] * 2


def test_what_makes_a_process_unusable(monkeypatch):
    """A sticky error, a capture that has not ended, an allocator that believes in one."""
    cuda = torch.device("cuda")
    assert not usable(cuda)  # there is none
    assert usable(torch.device("cpu"))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert usable(cuda)

    def asserts():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "empty_cache", asserts)
    assert not usable(cuda)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not usable(cuda)


def test_cause_of_a_failed_capture_is_described():
    try:
        try:
            raise ValueError("synchronised while captured\nand more")
        finally:
            raise RuntimeError("capture ended in error")
    except RuntimeError as error:
        described = describe(error)
    expected = "RuntimeError: capture ended in error, after ValueError: synchronised while captured"
    assert described == expected
