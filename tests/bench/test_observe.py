"""Timers, what is read besides times, and a CUDA context that is lost."""

import dataclasses
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure
from bench.measure import CONTEXT_LOST, OK, Budget, Effort
from bench.observe import FLUSHES_AHEAD, CudaTimer, WallTimer, describe, usable
from bench.problems import FORWARD, STEP
from bench.providers import GRAPH

FAILED = "failed: RuntimeError: out of memory"


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
    event = types.SimpleNamespace(
        record=lambda: events.append("record"),
        synchronize=lambda: None,
        elapsed_time=lambda end: 1.5,
    )

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            events.append((function.overloadpacket.__name__, args[0].data_ptr(), args[0].nbytes))
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("synchronize"))
    timer = CudaTimer("cpu", flush_bytes=4096)
    with Log():
        assert timer(lambda: events.append("call"), launches_count=launches_count) == 1.5
    writes = [("zero_", timer.written.data_ptr(), 4096)] * flushes
    read = [("sum", timer.read.data_ptr(), 4096)]
    waits = ["synchronize"] if launches_count else []
    assert events == [*writes, *read, *waits, "record", "call", "record"]


def test_cudnn_searches_for_every_provider_and_is_restored(measured, eager, variant):
    seen = []

    def setup(problem):
        closure = eager.setup(problem)

        def run():
            seen.append(torch.backends.cudnn.benchmark)
            return closure()

        run()
        return run

    def interrupted(problem):
        raise KeyboardInterrupt

    assert not torch.backends.cudnn.benchmark
    measured([variant("ours", setup)], STEP)
    assert len(seen) > 4
    assert all(seen)
    with pytest.raises(KeyboardInterrupt):
        measured([variant("bad", interrupted)])
    assert not torch.backends.cudnn.benchmark


def fails(argument):
    raise RuntimeError("out of memory")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Replaces readings that need a GPU."""
    monkeypatch.setattr(measure, "on_gpu", lambda device: True)
    monkeypatch.setattr(measure, "peak_bytes", lambda closure: 1000)
    monkeypatch.setattr(measure, "host_microseconds", lambda closure: 5.0)
    monkeypatch.setattr(measure, "launches", lambda closure: 7)


def test_readings_beside_the_time(measured, variant, as_on_a_gpu):
    rows = measured([variant("ours"), variant("graph", launch=GRAPH)])
    assert [row["status"] for row in rows] == [OK] * 2
    readings = [(row["launch"], row.get("peak_bytes"), row.get("cpu_us")) for row in rows]
    assert readings == [("eager", 1000, 5.0), ("graph", None, None)]


def test_failing_counters_leave_the_timing(
    bench, measured, tiny, eager, variant, monkeypatch, as_on_a_gpu
):
    monkeypatch.setattr(measure, "usable", lambda device: True)
    monkeypatch.setattr(measure, "peak_bytes", fails)
    (row,) = measured([eager])
    assert (row["status"], row["median_ms"], row["cpu_us"]) == (OK, 2.0, 5.0)
    assert "peak_bytes" not in row
    other = {}
    bench.count_launches([(row, tiny, FORWARD, variant("bad", fails)), (other, tiny, STEP, eager)])
    assert "launches" not in row
    assert other["launches"] == 7


@pytest.mark.parametrize(("usable", "seconds"), [(True, 0), (False, 60)])
def test_nothing_is_counted_without_time_or_gpu(
    bench, tiny, eager, monkeypatch, as_on_a_gpu, usable, seconds
):
    monkeypatch.setattr(measure, "usable", lambda device: usable)
    row = {}
    bench = dataclasses.replace(bench, budget=Budget(seconds))
    bench.count_launches([(row, tiny, FORWARD, eager)])
    assert "launches" not in row


@pytest.mark.parametrize("replaced", [("a", "b"), (), None])
def test_rows_of_ours_name_the_kernels_that_were_not_used(measured, variant, monkeypatch, replaced):
    """None: Triton is not installed, so the module was never imported."""
    module = "da_triton.runtime.guard"
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(replaced=lambda: replaced))
    if replaced is None:
        monkeypatch.delitem(sys.modules, module)
    rows = measured([variant("eager"), variant("triton"), variant("compile triton")])
    named = ", ".join(replaced or ()) or None
    assert [row.get("kernels_not_used") for row in rows] == [None, named, named]


# --- a CUDA context that is lost ------------------------------------------------------------------


def test_context_lost_in_setup(measured, eager, variant, monkeypatch):
    """Neither those before nor those after it can be timed in this process."""
    later = []
    monkeypatch.setattr(measure, "usable", lambda device: False)
    rows = measured([eager, variant("bad", fails), variant("ours", later.append)])
    assert [row["status"] for row in rows] == [CONTEXT_LOST, FAILED, CONTEXT_LOST]
    assert not later


@pytest.mark.parametrize(("rounds_min", "status"), [(1, OK), (2, CONTEXT_LOST)])
def test_context_lost_while_timing(measured, eager, variant, monkeypatch, rounds_min, status):
    """Providers with enough repetitions by then keep them."""
    calls = []

    def breaks(problem):
        closure = eager.setup(problem)

        def run():
            calls.append(None)
            if len(calls) == 2 + 2:  # warm-up, check; then in the second round, as its first
                fails(problem)
            return closure()

        return run

    monkeypatch.setattr(measure, "usable", lambda device: len(calls) < 4)
    effort = Effort(1, rounds_min, 3, seconds=1e9)
    rows = measured([eager, variant("bad", breaks)], effort=effort)
    assert [row["status"] for row in rows] == [status, FAILED]
    assert rows[0].get("repetitions") == (1 if status == OK else None)


def test_failure_with_a_usable_context_goes_on(measured, variant):
    rows = measured([variant("bad", fails), variant("ours")])
    assert [row["status"] for row in rows] == [FAILED, OK]


def test_what_makes_a_process_unusable(monkeypatch):
    """A sticky error, a capture that has not ended, an allocator that believes in one."""

    def asserts():
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    cuda, ones = torch.device("cuda"), torch.ones
    assert not usable(cuda)  # there is none
    assert usable(torch.device("cpu"))
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    for capturing, empty_cache, expected in (
        (False, lambda: None, True),
        (False, asserts, False),
        (True, lambda: None, False),
    ):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
        assert usable(cuda) == expected


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
