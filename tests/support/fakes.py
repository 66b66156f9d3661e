"""A timer, providers and jobs for tests of the benchmark, in a module that its workers can import.

Some of them do to their process what a wrong kernel does.
"""

import functools
import os
import signal
import sys
import time
import warnings

import torch
from torch import nn

from bench import formulations, measure, networks, providers
from bench.measure import prepare


class ScriptedTimer:
    """Runs the closure and answers with scripted milliseconds, the same for every closure."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds = milliseconds or (3.0, 1.0, 2.0)
        self.calls: list[tuple[providers.Closure, bool]] = []

    def __call__(self, closure, *, launches_count):
        prepare(closure)
        closure()
        self.calls.append((closure, launches_count))
        seen = sum(called is closure for called, _ in self.calls)
        return self.milliseconds[(seen - 1) % len(self.milliseconds)]


class ThisProcess:
    """In a worker's place: jobs run here, which saves the start of a process."""

    def run(self, job, limit, receive, silence):
        job(receive)
        return ""

    def close(self):
        pass


# --- setups of providers --------------------------------------------------------------------------

right = functools.partial(providers.setup_block, make=formulations.eager_block)


def crashes(problem):
    os.kill(os.getpid(), signal.SIGSEGV)


def exits(problem):
    print("the driver said why", file=sys.stderr, flush=True)
    os._exit(3)


def hangs(problem):
    """As in a compiler that no Python code runs in."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(120)


def compiles_for_ever(problem):
    while True:
        time.sleep(0.01)


def fails(problem):
    raise RuntimeError("out of memory")


def poisons(problem):
    """As an illegal memory access does: no CUDA call of this process succeeds any more."""
    measure.usable = lambda device: False
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def warns(problem):
    warnings.warn("da_triton does not use its kernel 'a' here", stacklevel=1)
    return right(problem)


def counted(problem):
    """Says in the profiler's place which process counts."""
    measure.launches = lambda closure: os.getpid()
    return right(problem)


def crashes_when_observed(problem):
    """Right while it is timed; asking for its memory afterwards ends the process."""
    block = right(problem)

    def call():
        return block()

    call.saved_bytes = lambda: crashes(problem)
    return call


class CrashingProblem(providers.Provider):
    def problem(self, problem):
        crashes(problem)


def fails_once_timed(path, problem):
    """Right in the first process, out of memory in the next one."""
    if path.exists():
        fails(problem)
    path.touch()
    return right(problem)


def _later(then, problem, calls=3):
    """Right in its setup and in the check; wrong while it is timed."""
    block = right(problem)
    left = iter([None] * calls)

    def call():
        if next(left, 0) == 0:
            then(problem)
        return block()

    return call


poisons_later, crashes_later, hangs_later = (
    functools.partial(_later, then) for then in (poisons, crashes, hangs)
)


def crashing_timer():
    crashes(None)


# --- networks -------------------------------------------------------------------------------------


def small_network(block):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *([block(8)] if block else []), nn.Conv2d(8, 2, 3))


def slow_network(block):
    if block is networks.eager_block:
        compiles_for_ever(None)
    return small_network(block)


def crashing_network(block):
    crashes(None)


def poisoning_network(block):
    """The one without a block spoils its process for all that are made after it."""
    if block is None or not measure.usable(torch.device("cpu")):
        poisons(None)
    return small_network(block)


def half_crashing_network(block):
    """With any block but the eager one."""
    if block not in (None, networks.eager_block):
        crashes(None)
    return small_network(block)


def loss(network, x):
    return network(x).square().mean()


# --- jobs of workers ------------------------------------------------------------------------------


def send_pid(send):
    send(os.getpid())


def ends_a_file(problem):
    raise EOFError("a cache entry is cut short")


def call(function, send):
    function(None)


def job_that(function):
    return functools.partial(call, function)


def _meet(folder, mine, other, send):
    (folder / str(mine)).touch()
    while not (folder / str(other)).exists():
        time.sleep(0.01)


def meets(folder, mine, other):
    return functools.partial(_meet, folder, mine, other)
