"""Jobs of the benchmark's worker process: groups of providers, networks, launch counts, ceilings.

The worker announces each provider before its setup and before each timing, so that a crash or a
hang can be assigned to it, and sends rows as soon as they are timed.
"""

import contextlib
import dataclasses
import functools
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from . import ceilings, measure, networks, warm
from .floors import Ceilings
from .isolation import SILENCE
from .measure import (
    CONTEXT_LOST,
    OUT_OF_TIME,
    Bench,
    Budget,
    Effort,
    Row,
    Timer,
    on_gpu,
)
from .problems import Problem
from .providers import OURS, Closure, Provider
from .workloads import Workload

SETUP_SHARE = 0.8  # of the silence that kills a worker, after which a setup is interrupted
SLOW = "failed: TimeoutError: setup and first call took longer than"


@dataclasses.dataclass(frozen=True)
class Where:
    """What all groups of a run share. Everything in it is picklable."""

    device: torch.device
    dtype: torch.dtype
    make_timer: Callable[[], Timer]
    effort: Effort
    silence: float = SILENCE  # seconds without a result after which a worker is killed


class Using(NamedTuple):
    """The provider that runs next, by its place in the group; None if it is not one of them."""

    place: int | None


@dataclasses.dataclass
class Spent:
    """Seconds by what they went into; ``imports`` includes starting processes."""

    imports: float = 0.0
    compilation: float = 0.0  # setups and first calls
    checking: float = 0.0  # inputs, the definition in float64, warm-up, memory
    timing: float = 0.0

    def __add__(self, other: "Spent") -> "Spent":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(a + b for a, b in pairs))


class Watch:
    """Announces providers, ends setups that take too long, and adds up the seconds in them and in
    the timer."""

    def __init__(self, send: Callable[[Any], None], where: Where, budget: Budget) -> None:
        self.send, self.where, self.budget = send, where, budget
        self.start = time.perf_counter()
        self.spent = Spent()
        self.places: dict[int, int] = {}  # of closures, by their ids
        self.late: dict[int, str] = {}  # statuses of interrupted setups

    def watched(self, provider: Provider, index: int) -> Provider:
        """The provider, whose setup includes the first call."""

        def setup(problem):
            with self.setting_up(index):
                closure = provider.setup(problem)
                closure()
            self.places[id(closure)] = index
            return closure

        facts = {f.name: getattr(provider, f.name) for f in dataclasses.fields(provider)}
        facts["setup"] = setup
        return _Announced(**facts, original=provider, announce=lambda: self.announce(index))

    @contextlib.contextmanager
    def setting_up(self, index: int) -> Iterator[None]:
        """A setup and its first call: announced, ended if it takes too long, and its time added."""
        self.announce(index)
        start = time.perf_counter()
        limit, left = SETUP_SHARE * self.where.silence, self.budget.left
        fired: list[bool] = []
        try:
            with _alarm(min(limit, left), fired):
                yield
                if on_gpu(self.where.device):
                    torch.cuda.synchronize()
        except Exception:
            if fired:  # torch.compile wraps the exception in its own
                self.late[index] = OUT_OF_TIME if left < limit else f"{SLOW} {limit:.0f} s"
            raise
        finally:
            self.spent.compilation += time.perf_counter() - start

    def timer(self) -> Timer:
        timer = _timer(self.where.make_timer)

        def watched(closure: Closure, **options) -> float:
            start = time.perf_counter()
            self.announce(self.places.get(id(closure)))
            try:
                return timer(closure, **options)
            finally:
                self.spent.timing += time.perf_counter() - start

        return watched

    def announce(self, index: int | None) -> None:
        self.send(Using(index))

    def placed(self, rows: Sequence[Row]) -> dict[int, Row]:
        """Rows of all members by their places, with the statuses of interrupted setups."""
        return {i: row | {"status": self.late.get(i, row["status"])} for i, row in enumerate(rows)}

    def end(self) -> None:
        """Sends what was spent.

        Raises:
            RuntimeError: no other job can run in this process.
        """
        s = self.spent
        s.checking = time.perf_counter() - self.start - s.compilation - s.timing
        self.send(s)
        if not measure.usable(self.where.device):
            raise RuntimeError("CUDA became unusable in this process")


@dataclasses.dataclass(frozen=True)
class _Announced(Provider):
    """A provider that is announced before its problem is made, which may crash, too."""

    _: dataclasses.KW_ONLY
    original: Provider
    announce: Callable[[], None]

    def problem(self, problem: Problem) -> Problem:
        self.announce()
        return self.original.problem(problem)


@dataclasses.dataclass(frozen=True)
class _Sending(Bench):
    """Sends rows as soon as they are timed: observing memory and host time may crash."""

    timed: Callable[[Sequence[tuple[Row, Any, Closure]]], None] = lambda ready: None

    def time_in_turns(self, ready):
        super().time_in_turns(ready)
        self.timed(ready)


@contextlib.contextmanager
def _alarm(seconds: float, fired: list[bool]) -> Iterator[None]:
    """Raises TimeoutError in the block after a number of seconds, if it runs Python then, and
    appends to ``fired``.

    It is gentler than what the parent does: the other providers stay as they are.
    """

    def late(number, frame):
        fired.append(True)
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def _timer(make: Callable[[], Timer]) -> Timer:
    return make()  # with one buffer for the whole process


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that a worker measures within a number of seconds."""

    where: Where
    ceilings: Ceilings | None
    seconds: float

    def __call__(self, send: Callable[[Any], None]) -> None:
        budget = Budget(self.seconds)
        watch = Watch(send, self.where, budget)
        bench = Bench(
            device=self.where.device, dtype=self.where.dtype, timer=watch.timer(),
            effort=self.where.effort, budget=budget, ceilings=self.ceilings,
        )  # fmt: skip
        try:
            self.measure(bench, watch)
        finally:
            gc.collect()
        watch.end()

    def measure(self, bench: Bench, watch: Watch) -> None:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Compared(Job):
    """A job whose results are rows of its members by their places; any of them may crash it."""

    of: Any  # a workload or a network
    mode: str
    members: Sequence[Any]

    def row(self, bench: Bench, member: Any) -> Row:
        raise NotImplementedError

    def needed(self, member: Any) -> bool:
        """Whether the member is measured even where all others are given up."""
        raise NotImplementedError

    def key(self, member: Any) -> tuple[str, ...]:
        """What else is not measured after the member has hung."""
        raise NotImplementedError

    def complete(self) -> bool:
        """Whether results of these members mean something."""
        return bool(self.members)


class Group(Compared):
    """Providers on a workload."""

    def measure(self, bench, watch):
        def timed(ready):
            for row, *_ in ready:
                bench._describe(row, self.of)
            watch.send({watch.places[id(closure)]: dict(row) for row, _, closure in ready})
            watch.announce(None)

        facts = {f.name: getattr(bench, f.name) for f in dataclasses.fields(bench)}
        bench = _Sending(**facts, timed=timed)
        watched = [watch.watched(p, i) for i, p in enumerate(self.members)]
        watch.send(watch.placed(bench.measure(self.of, self.mode, watched)))

    def row(self, bench, member):
        return bench._row(self.of, self.mode, member)

    def needed(self, member):
        return member.baseline or (member.name in OURS and not member.compiles)

    def key(self, member):
        # Without eager or da_triton, the rest of a stage would be worth nothing.
        return member.name, member.launch, self.of.name if self.needed(member) else ""


class NetworkGroup(Compared):
    """Variants of a network."""

    def measure(self, bench, watch):
        rows = networks.measure(bench, self.of, self.mode, self.members, watch.setting_up)
        if not measure.usable(self.where.device):
            failed = [row for row in rows if row["status"].startswith("failed")]
            for row in failed[1:]:
                row["status"] = CONTEXT_LOST
        watch.send(watch.placed(rows))

    def row(self, bench, member):
        return networks.row(bench, self.of, self.mode, member)

    def needed(self, member):
        return not member.compiled

    def key(self, member):
        return member.name, self.of.name

    def complete(self):
        # Results are checked against those of the eager block.
        return any(v.block is networks.eager_block for v in self.members)


Timed = tuple[Row, Workload, str, Provider]
Planned = tuple[Workload, str, Sequence[Provider], int]  # the mode, and the group's number


@dataclasses.dataclass(frozen=True)
class LaunchCount(Job):
    """The numbers of launches of timed rows, in their order; None where they cannot be counted."""

    timed: Sequence[Timed]

    def measure(self, bench, watch):
        bench.count_launches(self.timed)
        watch.send([row.get("launches") for row, *_ in self.timed])


@dataclasses.dataclass(frozen=True)
class Warming(Job):
    """Calls that compile da_triton's kernels and their launchers, in the cache of all processes."""

    workloads: Sequence[Workload]

    def measure(self, bench, watch):
        for work in self.workloads:
            for channels_last in (False, True):
                if bench.budget.left > 0:
                    warm.step(work, channels_last, bench.dtype, bench.device)
                    watch.send(work.name)


@dataclasses.dataclass(frozen=True)
class CeilingsJob(Job):
    copy_bytes: int | None
    matrix_size: int | None

    def measure(self, bench, watch):
        sizes = self.copy_bytes, self.matrix_size
        watch.send(ceilings.measure(bench.timer, bench.device, bench.dtype, *sizes))
