"""Child processes that may crash, hang or lose their CUDA context without ending the run.

``isolated`` runs a command until it ends or its time is up. ``Worker`` is a Python process that
runs one job after another. Both are leaders of a process group, which is killed as a whole and has
ended when the call returns, so that nothing of it shares the GPU with what is timed next.

A worker serves many jobs: importing PyTorch and making a CUDA context takes seconds, as long as
measuring a group. It is replaced after a job that failed in any way, because errors such as an
illegal memory access are sticky: every later CUDA call of the process fails too.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

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
) -> Ended:
    """Runs a command in the repository's root for at most ``limit`` seconds.

    ``log`` receives stdout and stderr while the command runs; ``environment`` is added to this
    process's. With a ``grace``, the command is interrupted that many seconds before its limit, to
    print partial results.
    """
    start = time.monotonic()
    with log.open("w+b") if log else tempfile.TemporaryFile() as file:
        process = _start(command, file, environment)
        interrupted = False
        try:
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

    ``log`` receives what it prints; without one, this process's output does. ``environment`` is
    added to this process's.
    """

    def __init__(
        self, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log, self.environment = log, environment
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
        self.begin(job)
        return self.wait(limit, receive, silence)

    def begin(self, job: Job) -> None:
        self._began, self._fresh = time.monotonic(), self._process is None
        pipe = self._pipe or self._start()
        with contextlib.suppress(OSError):  # it has died, as ``wait`` will find
            pipe.send(job)

    def wait(
        self, limit: float, receive: Callable[[Any], Any] = id, silence: float = SILENCE
    ) -> str:
        """The outcome of the job, as ``run`` returns it."""
        try:
            failure = self._wait(limit, receive, silence)
        except (EOFError, OSError):  # the other end of the pipe is closed
            failure = self._died()
        except BaseException:
            self.close()
            raise
        if failure:
            self.close()
        return failure

    def _wait(self, limit, receive, silence):
        start, pipe = self._began, self._pipe
        assert pipe is not None
        # Imports have the whole limit, if there is one.
        heard = math.inf if self._fresh and math.isfinite(limit) else start
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
            if kind == RESULT:
                receive(value)
            elif kind == FAILED:
                return f"failed: {value}"
            elif kind == DONE:
                return ""

    def written(self) -> str:
        """All that was printed into the log so far."""
        if self.log is None or not self.log.exists():
            return ""
        return self.log.read_text(encoding="utf-8", errors="replace")

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
        program = f"from bench.isolation import serve; serve({descriptor})"
        command = [sys.executable, "-X", "faulthandler", "-c", program]
        with self.log.open("ab") if self.log else contextlib.nullcontext() as file:
            self._process = _start(command, file, self.environment, (descriptor,))
        theirs.close()
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
        return f"{text}: {last_line(self.written())}" if self.log else text

    def _say_where(self) -> None:
        """Has the process write its Python stack into the log, without one to stderr."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM, which a time limit sends first, and SIGHUP interrupt the block as Ctrl-C does.

    Child processes have sessions of their own, so that no signal but this process's own ends them.
    """
    numbers = signal.SIGTERM, signal.SIGHUP
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_parallel(jobs: Sequence[Job], limit: float, log: Path | None) -> list[str]:
    """Runs each job in a process of its own, all at once; what went wrong, in a line per job."""
    workers = [Worker(log) for _ in jobs]
    try:
        for worker, job in zip(workers, jobs, strict=True):
            worker.begin(job)
        return [failure for worker in workers if (failure := worker.wait(limit))]
    finally:
        for worker in workers:
            worker.close()


def serve(descriptor: int) -> NoReturn:
    """The process behind ``Worker``: runs the jobs that arrive on a pipe.

    It ends with the pipe, or with the first job that fails.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    pipe, status = Connection(descriptor), 0
    while not status:
        try:
            job = pipe.recv_bytes()
        except (EOFError, OSError):
            break  # the parent has ended
        try:
            run = ForkingPickler.loads(job)  # which imports what the first job needs
            pipe.send((STARTED, None))
            run(lambda value: pipe.send((RESULT, value)))
            pipe.send((DONE, None))
        except BaseException as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines()
            with contextlib.suppress(OSError):  # the parent has ended
                pipe.send((FAILED, ": ".join([type(error).__name__, *lines[:1]])))
            status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a lost CUDA context can make an orderly exit hang


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
    output: IO[bytes] | None,
    environment: Mapping[str, str] | None,
    descriptors: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL,
        stdout=output, stderr=output and subprocess.STDOUT, pass_fds=descriptors,
        start_new_session=True, preexec_fn=_interruptible,
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
