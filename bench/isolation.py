"""Child processes that may crash, hang or lose their CUDA context without ending the run.

``isolated`` runs a command until it ends or its time is up. ``Worker`` is a Python process that
runs one job after another. Both are leaders of a process group, which is killed as a whole and has
ended when the call returns, so that nothing of it shares the GPU with what is timed next.

A worker serves many jobs: importing PyTorch and making a CUDA context takes seconds, as long as
measuring a group. It is replaced after a job that failed in any way, because errors such as an
illegal memory access are sticky: every later CUDA call of the process fails too.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

from .environment import ROOT

DONE, FAILED, STARTED, RESULT = "done", "failed", "started", "result"
SILENCE = 150.0  # seconds; torch.compile's max-autotune takes the longest without a message
SILENT = "without a result"  # how the status of a worker ends that was killed for it
WAIT_FOR_GROUP = 10.0
LONGEST_POLL = 3600.0  # the system call takes milliseconds as an int
Job = Callable[[Callable[[Any], None]], None]


class Ended(NamedTuple):
    """``status`` is the exit status, negative for a signal, or None if the process was killed.

    ``interrupted``: it was asked to end because its time was nearly up.
    """

    status: int | None
    seconds: float
    output: str
    interrupted: bool = False

    def __str__(self) -> str:
        if self.status is None:
            return f"killed after {self.seconds:.0f} s"
        if self.interrupted:
            return f"stopped after {self.seconds:.0f} s: {last_line(self.output)}"
        return f"{ending(self.status)}: {last_line(self.output)}"


def isolated(
    command: Sequence[str],
    limit: float,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    grace: float = 0.0,
    family: "Family | None" = None,
) -> Ended:
    """Runs a command in the repository's root for at most ``limit`` seconds.

    ``log`` receives stdout and stderr while the command runs; ``environment`` is added to this
    process's. With a ``grace``, the command is interrupted that many seconds before its limit, to
    print partial results. ``family``: what may kill it from another thread.
    """
    start = time.monotonic()
    with log.open("w+b") if log else tempfile.TemporaryFile() as file:
        process = _start(command, file, environment)
        interrupted = False
        try:
            if family is not None:
                family.add(process)
            status = _wait(process, limit - grace)
            if status is None and grace:
                interrupted = True
                os.killpg(process.pid, signal.SIGINT)  # all, as Ctrl-C in a terminal does
                status = _wait(process, grace)
        finally:
            _kill_group(process)
        file.seek(0)
        output = file.read().decode(errors="replace")
    return Ended(status, time.monotonic() - start, output, interrupted)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> int | None:
    """The exit status, or None if the process still runs then."""
    try:
        return process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        return None


class Worker:
    """A process for jobs: picklable callables that are given a function to send results with.

    ``imports`` is the number of seconds from starting processes until their first jobs began.
    ``family``: what may kill it from another thread.
    """

    def __init__(self, log: Path, family: "Family | None" = None) -> None:
        self.log, self.family = log, family
        self.imports = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def run(
        self,
        job: Job,
        limit: float,
        receive: Callable[[Any], None],
        silence: float = SILENCE,
    ) -> str:
        """Runs a job for at most ``limit`` seconds, of which at most ``silence`` in a row without
        a result; empty if it ended well, else what happened, in one line."""
        try:
            failure = self._run(job, limit, receive, silence)
        except (EOFError, OSError):  # the other end of the pipe is closed
            failure = self._died()
        except BaseException:
            self.close()
            raise
        if failure:
            self.close()
        return failure

    def _run(self, job, limit, receive, silence):
        start = time.monotonic()
        fresh = self._process is None
        heard = math.inf if fresh else start  # imports have the whole limit
        pipe = self._start() if self._pipe is None else self._pipe
        pipe.send(job)
        while True:
            left = min(start + limit, heard + silence) - time.monotonic()
            if not pipe.poll(min(max(0.0, left), LONGEST_POLL)):
                if left > LONGEST_POLL:
                    continue
                self._say_where()
                late = time.monotonic()
                if late - start >= limit:
                    return f"killed after {late - start:.0f} s, when its time was up"
                return f"killed after {late - heard:.0f} s {SILENT}"
            kind, value = pipe.recv()
            heard = time.monotonic()
            if kind == STARTED and fresh:
                self.imports += value
            elif kind == RESULT:
                receive(value)
            elif kind == FAILED:
                return f"failed: {value}"
            elif kind == DONE:
                return ""

    def close(self) -> None:
        """Ends the process and all that it started."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if pipe is not None:
            pipe.close()
        if process is not None:
            _kill_group(process)

    def _start(self) -> Connection:
        self._pipe, theirs = multiprocessing.Pipe()
        descriptor = theirs.fileno()
        command = [
            sys.executable, "-X", "faulthandler", "-m", "bench.worker", str(descriptor),
            repr(time.monotonic()),
        ]  # fmt: skip
        with self.log.open("ab") as file:
            self._process = _start(command, file, None, (descriptor,))
        theirs.close()
        if self.family is not None:
            self.family.add(self._process)
        return self._pipe

    def _died(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(WAIT_FOR_GROUP)
        except subprocess.TimeoutExpired:
            return "the process closed its pipe and was killed"
        text = f"the process died with {ending(status)}"
        if status < 0:
            return text
        return f"{text}: {last_line(self.log.read_text(encoding='utf-8', errors='replace'))}"

    def _say_where(self) -> None:
        """Has the process write its Python stack into the log."""
        if self._process is not None and hasattr(signal, "SIGUSR1"):
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)
                time.sleep(0.2)


class Family:
    """Child processes that several threads wait for, and that an interruption ends first.

    Otherwise leaving a thread pool would wait for the processes.
    """

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._over = False

    def add(self, process: "subprocess.Popen[bytes]") -> None:
        self._processes.append(process)
        if self._over:
            _kill_group(process)

    def map(self, run: Callable[[Any], Any], items: Sequence[Any], threads: int) -> list[Any]:
        """The results of ``run``, in the order of items."""
        with ThreadPoolExecutor(max(1, threads)) as pool:
            try:
                return list(pool.map(run, items))
            except BaseException:
                self._over = True
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._processes):
                    _kill_group(process)
                raise


def in_parallel(jobs: Sequence[Job], limit: float, log: Path) -> list[str]:
    """Runs each job in a process of its own, all at once; what went wrong, in a line per job."""
    family = Family()

    def run(job: Job) -> str:
        worker = Worker(log, family)
        try:
            return worker.run(job, limit, lambda value: None)
        finally:
            worker.close()

    return [failure for failure in family.map(run, jobs, len(jobs)) if failure]


def ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1].strip()


def _start(
    command: Sequence[str],
    output: IO[bytes],
    environment: Mapping[str, str] | None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
        stdout=output, stderr=subprocess.STDOUT, pass_fds=descriptors, start_new_session=True,
        preexec_fn=_interruptible,
    )  # fmt: skip


def _interruptible() -> None:
    """A shell's background commands ignore interrupts, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills what is left of a process's group, and returns when none of it runs any more."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold it for longer
        process.wait(WAIT_FOR_GROUP)
    deadline = time.monotonic() + WAIT_FOR_GROUP
    while _runs(process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)


def _runs(group: int) -> bool:
    """Whether a process of a group is alive. Zombies, which nobody may reap, are not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[2]) == group and fields[0] not in "ZX":
            return True
    return False
