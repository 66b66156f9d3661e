"""A group: providers that give the right answer, timed in turns.

It is one workload in one mode with the providers of one launch mode. A provider that raises or
disagrees with the definition becomes a row that says so, and the others are timed. After a CUDA
error that no later call of the process survives, what was not timed by then is lost.
"""

import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from . import roofline
from .isolation import SILENT
from .observe import (
    Timer,
    describe,
    host_microseconds,
    launches,
    on_gpu,
    peak_bytes,
    prepare,
    usable,
    wait,
)
from .providers import GRAPH, OURS, Closure, Provider
from .roofline import Ceilings
from .workloads import Workload

progress = functools.partial(tqdm, unit="group", disable=None)  # shown where stderr is a terminal

OK = "ok"
OUT_OF_TIME = "not run: the time budget was used up"
CONTEXT_LOST = "not run: an earlier provider of the group made CUDA unusable in this process"
# The beginnings of statuses of providers that were ended or left out before they could succeed or
# fail, those that hung included.
CUT_SHORT = ("not run", "not measured", "killed")
LEFT_OUT = "not measured again"
SETUP_SHARE = 0.8  # of the silence that ends a process, after which a setup is interrupted
SLOW = "setup and first call took longer than"
CONDITIONS = (
    "torch.backends.cudnn.benchmark is True for every provider; before each timing L2 is filled "
    "with clean lines of an unrelated buffer; graphs of every provider are captured in the same "
    "way; providers called unbiased have no bias of V and so a slightly easier problem"
)
Row = dict[str, Any]
Timed = tuple[Row, Any, str, Provider]  # a row, its workload and its mode


def cut_short(row: Row) -> bool:
    """Whether a measurement was ended or left out before it could succeed or fail."""
    return row["status"].startswith(CUT_SHORT)


def undecided(row: Row) -> bool:
    """Whether the provider might have been timed, with more time or without the others."""
    status = row["status"]
    hung = status.startswith(LEFT_OUT) or (status.startswith("killed") and status.endswith(SILENT))
    return cut_short(row) and not hung


class OutOfTimeError(Exception):
    """The budget was used up in a provider's setup."""


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """cuDNN measures its algorithms instead of guessing, as users of fixed shapes set it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@dataclass(frozen=True)
class Effort:
    """Rounds of a group: at least ``rounds_min``, then until ``seconds`` or ``rounds_max``."""

    warm_up: int
    rounds_min: int
    rounds_max: int
    seconds: float


class Budget:
    """Seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.start = seconds, clock, clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.start)


@contextlib.contextmanager
def limited(seconds: float, late: Exception) -> Iterator[None]:
    """Raises ``late`` in Python code that takes longer, which is gentler than ending its process.

    Only in the main thread, where signals arrive.
    """
    if math.isinf(seconds):
        yield
        return
    fired = False

    def interrupt(number, frame):
        nonlocal fired
        fired = True
        raise late

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    except Exception:
        if not fired:  # torch.compile wraps the exception in its own
            raise
        raise late from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Ready(NamedTuple):
    """A provider that gave the right answer, to be timed, with its place in the group."""

    place: int
    row: Row
    provider: Provider
    closure: Closure


class _WrongError(Exception):
    """A provider disagrees with the reference; the message is its row's status."""


class _LostError(Exception):
    """CUDA became unusable; the row of the provider at fault says why."""


@dataclass(frozen=True)
class Bench:
    """Where, in which dtype, with which clock and for how long groups are measured.

    ``ceilings``: of the machine, measured in the same run; None leaves out shares of the floor.
    ``send`` is given the place in the group of the provider that runs next, None where none of them
    does, and the rows by their places once all are timed: what follows may still crash.
    ``silence``: seconds without such a message after which this process is ended; a setup and its
    first call are interrupted before.
    """

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    effort: Effort
    budget: Budget
    ceilings: Ceilings | None = None
    send: Callable[[Any], Any] = lambda message: None
    silence: float = math.inf

    @cudnn_benchmark()
    def measure(self, workload: Any, mode: str, providers: Sequence[Provider]) -> list[Row]:
        """Rows of all providers on a workload or a network, timed in turns if they are right."""
        rows = [new_row(workload, mode, p, self.device, self.dtype) for p in providers]
        if any(p.compiles for p in providers):
            torch.compiler.reset()
        ready: list[Ready] = []
        times: list[list[float]] = [[] for _ in rows]
        problem: Any = None
        try:
            for place, (row, provider) in enumerate(zip(rows, providers, strict=True)):
                with self._noting(row):
                    if self.budget.left <= 0:
                        raise OutOfTimeError
                    problem = problem or workload.draw(mode, self.dtype, self.device)
                    self.send(place)
                    closure = self._set_up(provider, provider.problem(problem), row)
                    ready.append(Ready(place, row, provider, closure))
            self._time_in_turns(ready, times)
        except _LostError:
            for row, taken in zip(rows, times, strict=True):
                if row["status"] == OK and len(taken) < self.effort.rounds_min:
                    row["status"] = CONTEXT_LOST
        ready = [one for one in ready if one.row["status"] == OK]
        for place, row, *_ in ready:
            row.update(_quantiles(times[place]))
            if not workload.whole:
                row.update(self._rates(row, workload))
        self.send({place: dict(row) for place, row in enumerate(rows)})
        self.send(None)
        for one in ready:
            self._observe(one, workload.whole)
        compare(rows)
        note_unused_kernels(rows)
        return rows

    @contextlib.contextmanager
    def _noting(self, row: Row) -> Iterator[None]:
        """Leaves in the row why the block did not end.

        Raises:
            _LostError: CUDA is unusable after it.
        """
        try:
            yield
        except OutOfTimeError:
            row["status"] = OUT_OF_TIME
        except _WrongError as wrong:
            row["status"] = str(wrong)
        except Exception as error:
            row["status"] = f"failed: {describe(error)}"
            if not usable(self.device):
                raise _LostError from error

    def _set_up(self, provider: Provider, problem: Any, row: Row) -> Closure:
        """The provider's closure, warmed up and then checked.

        In this order, what is recorded or compiled late is checked too.

        Raises:
            _WrongError: its result is not the reference's.
        """
        limit = SETUP_SHARE * self.silence
        late: Exception = TimeoutError(f"{SLOW} {limit:.0f} s")
        if self.budget.left < limit:
            limit, late = self.budget.left, OutOfTimeError()
        with limited(limit, late):
            closure = provider.setup(problem)
            if self.effort.warm_up:
                closure()
            wait(self.device)
        errors = problem.check(closure, self.effort.warm_up - 1)
        row.update(zip(("error", "error_gradient"), errors, strict=False))
        allowed = problem.allowed(provider.baseline)
        if not all(error <= allowed for error in errors):
            figures = " and ".join(f"{error:.1e}" for error in errors)
            raise _WrongError(f"disagrees: relative RMS {figures}, allowed {allowed:.0e}")
        return closure

    def _time_in_turns(self, ready: Sequence[Ready], times: Sequence[list[float]]) -> None:
        """Rounds over all closures, each round beginning with the next one: all drift alike."""
        group = Budget(self.effort.seconds, self.budget.clock)
        for turn in range(self.effort.rounds_max if ready else 0):
            if turn >= self.effort.rounds_min and min(group.left, self.budget.left) <= 0:
                break
            first = turn % len(ready)
            for place, row, provider, closure in (*ready[first:], *ready[:first]):
                if row["status"] == OK:
                    with self._noting(row):
                        self.send(place)
                        ms = self.timer(closure, launches_count=provider.launch != GRAPH)
                        times[place].append(ms)

    def _rates(self, row: Row, workload: Workload) -> Row:
        """Bytes and FLOP per second of a timed row, and its share of the floor."""
        cache = self.ceilings.cache if self.ceilings else roofline.L2
        batch, seconds = workload.batch(self.device), 1e-3 * row["median_ms"]
        work = roofline.work_of(workload, batch, row["mode"], self.dtype.itemsize, cache)
        found = {"gb_s": work.bytes / seconds / 1e9, "tflop_s": work.flop / seconds / 1e12}
        if self.ceilings:
            floor, bound = work.least_time(self.ceilings)
            found |= {"floor_ms": 1e3 * floor, "bound": bound, "share_of_floor": floor / seconds}
        return found

    def _observe(self, ready: Ready, whole: bool) -> None:
        """Memory and host time of a timed row; where these fail, the timing stands."""
        _, row, provider, closure = ready
        readings: dict[str, Callable[[], Any]] = {}
        if on_gpu(self.device) and provider.launch != GRAPH:
            readings["peak_bytes"] = lambda: peak_bytes(closure)
            if not whole:
                readings["cpu_us"] = lambda: host_microseconds(closure)
        if hasattr(closure, "saved_bytes") and not provider.compiles:
            readings["saved_bytes"] = closure.saved_bytes
        for name, reading in readings.items():
            with contextlib.suppress(Exception):
                row[name] = reading()

    @cudnn_benchmark()
    def count_launches(self, timed: Sequence[Timed]) -> None:
        """Completes rows whose provider launches its operations one by one, while there is time."""

        @functools.lru_cache(maxsize=1)  # rows of a group follow each other
        def drawn(workload: Any, mode: str) -> Any:
            return workload.draw(mode, self.dtype, self.device)

        for row, workload, mode, provider in timed:
            if self.budget.left <= 0 or not usable(self.device):
                return
            with contextlib.suppress(Exception):
                if provider.compiles:
                    torch.compiler.reset()
                closure = provider.setup(provider.problem(drawn(workload, mode)))
                prepare(closure)
                closure()
                row["launches"] = launches(closure)


def _quantiles(milliseconds: list[float]) -> Row:
    low, middle, high = np.quantile(milliseconds, [0.2, 0.5, 0.8]).tolist()
    return {
        "median_ms": middle, "p20_ms": low, "p80_ms": high, "repetitions": len(milliseconds),
    }  # fmt: skip


def new_row(
    workload: Any, mode: str, provider: Provider, device: torch.device, dtype: torch.dtype
) -> Row:
    """The row of a provider that was not timed yet."""
    return {
        **workload.columns(device), "device": device.type,
        "dtype": str(dtype).removeprefix("torch."), "mode": mode, "layout": provider.layout,
        "launch": provider.launch, "provider": provider.name, "baseline": provider.baseline,
        "status": OK,
    }  # fmt: skip


WITHOUT = "without block"


class Ratio(NamedTuple):
    """How many times as fast a row is as the fastest of its references, rows of the same group."""

    title: str  # of its column in tables
    meaning: str
    legend: str  # of its bars; empty where it has none
    is_reference: Callable[[Row, Row], bool]  # whether the second is a reference of the first


RATIOS = {
    "ratio_to_eager": Ratio(
        "x eager", "the better of eager NCHW and channels_last", "against eager",
        lambda row, other: other["baseline"],
    ),
    "ratio_same_format": Ratio(
        "same format", "eager in the same memory format", "",
        lambda row, other: other["baseline"] and other["layout"] == row["layout"],
    ),
    "ratio_to_compiled": Ratio(
        "x compile", "torch.compile of eager, the better of NCHW and channels_last",
        "against torch.compile of eager",
        lambda row, other: other["provider"] == "compile eager",
    ),
    "ratio_to_max_autotune": Ratio(
        "x max-autotune",
        "torch.compile of eager in mode max-autotune, the better of NCHW and channels_last",
        "against its mode max-autotune",
        lambda row, other: other["provider"] == "compile eager max-autotune",
    ),
    "ratio_to_rivals": Ratio(  # without a block there is nothing to compare a block with
        "x best other", "the fastest of all other implementations", "",
        lambda row, other: not (other["provider"] in OURS or other["provider"].endswith(WITHOUT)),
    ),
}  # fmt: skip


def compare(rows: list[Row]) -> None:
    """Adds each row's ratios to others of its group, which has one launch mode.

    A ratio is left out if one of its references was cut short, because that one might have been the
    fastest. References that failed, hung or disagree are named in ``failed_references``.
    """
    for row in rows:
        for name in (*RATIOS, "failed_references"):
            row.pop(name, None)  # of a comparison with fewer rows
    for row in (row for row in rows if row["status"] == OK):
        failed: dict[str, None] = {}
        for name, ratio in RATIOS.items():
            references = [other for other in rows if ratio.is_reference(row, other)]
            times = [other["median_ms"] for other in references if other["status"] == OK]
            if not times or any(map(undecided, references)):
                continue
            row[name] = min(times) / row["median_ms"]
            failed |= {
                f"{other['provider']} {other['layout']}": None
                for other in references
                if other["status"] != OK
            }
        if failed:
            row["failed_references"] = ", ".join(failed)
    _add_shares(rows)


def _add_shares(rows: list[Row]) -> None:
    """Each block's share of the time that the eager one adds to a network."""
    times = {(r["provider"], r["layout"]): r["median_ms"] for r in rows if r["status"] == OK}
    for row in (row for row in rows if row["status"] == OK):
        prefix = "compile " if row["provider"].startswith("compile ") else ""
        bare, eager = (times.get((prefix + name, row["layout"])) for name in (WITHOUT, "eager"))
        if bare and eager and eager > bare:
            row["added"] = (row["median_ms"] - bare) / (eager - bare)


def note_unused_kernels(rows: list[Row]) -> None:
    """Names in rows of da_triton's kernels those that PyTorch operations replaced.

    A kernel that failed its proof on first use is replaced for the rest of the process.
    """
    guard = sys.modules.get("da_triton.runtime.guard")  # without it, no kernel has run
    unused = guard.replaced() if guard else ()
    for row in rows:
        if unused and row["status"] == OK and "triton" in row["provider"].split():
            row["kernels_not_used"] = ", ".join(unused)
