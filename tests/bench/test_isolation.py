"""Processes that crash, hang and leave others behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench import isolation
from bench.isolation import Worker, in_parallel, isolated, terminable
from support import fakes

# Starts a process, says its id, and then ends or does not.
LEAVES_ONE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep({seconds})
"""


def python(code):
    return [sys.executable, "-c", code]


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_command_that_ends(tmp_path):
    log = tmp_path / "log.txt"
    code = "import os, sys; print(os.environ['GIVEN']); print('b', file=sys.stderr); sys.exit(4)"
    ended = isolated(python(code), 30, log, {"GIVEN": "a"})
    assert ended.status == 4
    assert sorted(ended.output.split()) == ["a", "b"]
    assert log.read_text() == ended.output
    assert str(ended).startswith("exit status 4: ")


def test_command_that_dies_or_has_no_time():
    ended = isolated(python("import os; os.kill(os.getpid(), 11)"), 30)
    assert (ended.status, str(ended)) == (-11, "signal 11 (SIGSEGV): no output")
    assert isolated(python("import time; time.sleep(60)"), -1.0).status is None


@pytest.mark.parametrize("seconds", [0, 60], ids=["it ends", "it is stopped"])
def test_processes_that_a_command_started_end_with_it(seconds):
    start = time.monotonic()
    ended = isolated(python(LEAVES_ONE.format(seconds=seconds)), 1.5)
    assert time.monotonic() - start < 5
    assert ended.status == (None if seconds else 0)
    assert not alive(int(ended.output))


def test_command_that_is_interrupted_first():
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('2 failed so far')"
    ended = isolated(python(code), 8, grace=6.5)
    assert (ended.status, ended.interrupted) == (0, True)
    assert str(ended) == f"stopped after {ended.seconds:.0f} s: 2 failed so far"
    assert ended.seconds < 6
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    ended = isolated(python(stubborn), 2, grace=1)
    assert (ended.status, str(ended)) == (None, "killed after 2 s")


@pytest.fixture
def worker(tmp_path, children):
    made = Worker(tmp_path / "worker.txt")
    yield made
    made.close()


def test_worker_serves_many_jobs(worker):
    pids = []
    for _ in range(3):
        assert worker.run(fakes.send_pid, 30, pids.append) == ""
    assert len(pids) == 3
    assert len({*pids}) == 1
    worker.close()
    assert not alive(pids[0])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (fakes.crashes, "the process died with signal 11 (SIGSEGV)"),
        (fakes.exits, "the process died with exit status 3: the driver said why"),
        (
            fakes.poisons,
            "failed: RuntimeError: CUDA error: an illegal memory access was encountered",
        ),
        (fakes.ends_a_file, "failed: EOFError: a cache entry is cut short"),
        ("no function", "failed: TypeError: 'str' object is not callable"),
    ],
)
def test_worker_is_replaced_after_a_failure(worker, function, expected):
    pids = []
    worker.run(fakes.send_pid, 30, pids.append)
    assert worker.run(fakes.job_that(function), 30, pids.append) == expected
    assert not alive(pids[0])
    assert worker.run(fakes.send_pid, 30, pids.append) == ""
    assert pids[0] != pids[1]


def test_worker_that_hangs(worker, tmp_path):
    hang = fakes.job_that(fakes.hangs)
    worker.run(fakes.send_pid, 30, print)
    start = time.monotonic()
    assert worker.run(hang, 60, print, silence=1.0) == "killed after 1 s without a result"
    assert worker.run(fakes.send_pid, 30, print) == ""
    assert worker.run(hang, 1.0, print) == "killed after 1 s, when its time was up"
    assert time.monotonic() - start < 15
    assert "in hangs" in (tmp_path / "worker.txt").read_text()  # where it hung


def test_jobs_in_parallel(tmp_path, children):
    """A job that waits for another one's file ends only if both run at once."""
    meet = [fakes.meets(tmp_path, i, 1 - i) for i in (0, 1)]
    failures = in_parallel([*meet, fakes.job_that(fakes.crashes)], 30, tmp_path / "log")
    assert failures == ["the process died with signal 11 (SIGSEGV)"]


def test_interruption_ends_jobs_in_parallel(tmp_path, children, monkeypatch):
    """The main thread is interrupted as by Ctrl-C, once both processes have started."""
    started = []
    original = isolation._start

    def start(*args):
        started.append(original(*args))
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        return started[-1]

    monkeypatch.setattr(isolation, "_start", start)
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_parallel([fakes.job_that(fakes.hangs)] * 2, 60, tmp_path / "log")
    assert not any(alive(process.pid) for process in started)
    assert time.monotonic() - before < 30


def test_interruption_ends_the_worker(worker):
    pids = []

    def interrupted(pid):
        pids.append(pid)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        worker.run(fakes.send_pid, 30, interrupted)
    assert not alive(pids[0])


def test_worker_ends_with_its_parent(tmp_path, children):
    """A parent that is killed cleans nothing up; the pipe's end is what ends its worker."""
    code = (
        "import os, sys, pathlib; from bench.isolation import Worker; from support import fakes\n"
        f"worker = Worker(pathlib.Path({str(tmp_path / 'w')!r}))\n"
        "worker.run(fakes.send_pid, 30, lambda pid: print(pid, flush=True)); os._exit(9)"
    )
    ran = subprocess.run(python(code), capture_output=True, text=True, env={**os.environ})
    deadline = time.monotonic() + 5
    while alive(int(ran.stdout)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(ran.stdout))


def test_requests_to_terminate_interrupt_but_for_what_is_ignored():
    """``nohup`` ignores SIGHUP for a command that shall go on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt), terminable():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
