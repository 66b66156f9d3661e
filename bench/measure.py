"""Timers and the run: providers that give the right answer are timed in turns, group by group.

A group is one workload in one mode with the providers of one launch mode. A provider that raises or
disagrees with the definition becomes a row that says so, and the run goes on. Only a CUDA error
that no later call of the process survives ends it, by ``ContextLostError``, with every row added.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import floors, problems
from .floors import Ceilings
from .isolation import SILENT
from .observe import Timer, host_microseconds, launches, on_gpu, peak_bytes, prepare, usable
from .providers import GRAPH, OURS, Closure, Provider
from .workloads import Workload

OK = "ok"
OUT_OF_TIME = "not run: the time budget was used up"
CONTEXT_LOST = "not run: an earlier provider of the group made CUDA unusable in this process"
# How statuses begin of what was ended or left out before it could succeed or fail; those of a
# provider that hung are among them.
CUT_SHORT = ("not run", "not measured", "killed")
LEFT_OUT = "not measured again"
CONDITIONS = (
    "torch.backends.cudnn.benchmark is True for every provider; before each timing L2 is filled "
    "with clean lines of an unrelated buffer; graphs of every provider are captured in the same "
    "way; providers called unbiased have no bias of V and so a slightly easier problem"
)
Row = dict[str, Any]
Timed = tuple[Row, Any, str, Provider]  # a row, its workload and its mode
Ready = tuple[int, Row, Provider, Closure]  # a place in the group, and what is timed there


def cut_short(row: Row) -> bool:
    """Whether a measurement was ended or left out before it could succeed or fail."""
    return row["status"].startswith(CUT_SHORT)


def undecided(row: Row) -> bool:
    """Whether the provider might have been timed, with more time or without the others."""
    status = row["status"]
    hung = status.startswith(LEFT_OUT) or (status.startswith("killed") and status.endswith(SILENT))
    return cut_short(row) and not hung


class ContextLostError(RuntimeError):
    """CUDA is unusable in this process; the rows measured so far have been added."""

    def __init__(self, groups_done: int) -> None:
        super().__init__(
            f"CUDA became unusable in group {groups_done}, so nothing was measured after it"
        )


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


@dataclass
class Budget:
    seconds: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    @property
    def left(self) -> float:
        return self.seconds - (self.clock() - self.start)


class Watch:
    """What is told while a group is measured; in this process, nothing.

    Providers are named by their places in the group.
    """

    def announce(self, place: int | None) -> None:
        """The provider runs next, or none of them."""

    def setting_up(self, place: int) -> contextlib.AbstractContextManager:
        """A setup and its first call."""
        return contextlib.nullcontext()

    def timing(self, place: int | None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def timed(self, rows: dict[int, Row]) -> None:
        """All were timed; what follows may still crash."""


@dataclass(frozen=True)
class Bench:
    """Where, in which dtype, with which clock and for how long groups are measured.

    ``ceilings``: of the machine, measured in the same run; None leaves out shares of the floor.
    """

    device: torch.device
    dtype: torch.dtype
    timer: Timer
    effort: Effort
    budget: Budget
    ceilings: Ceilings | None = None
    watch: Watch = Watch()  # noqa: RUF009

    def run(
        self,
        workloads: Sequence[Any],
        sweeps: Sequence[Sequence[Provider]],
        add: Callable[[list[Row]], None],
        modes: Sequence[str] = (problems.FORWARD, problems.STEP),
    ) -> None:
        """Gives ``add`` the rows of each group as soon as they are measured.

        Launches are counted at the end, because a profiler slows what runs after it: that
        completes rows in place, and a last ``add([])`` says so.

        Raises:
            ContextLostError: CUDA is unusable from here on; the group's rows have been added.
        """
        groups = [(w, m, p) for p in sweeps for m in modes for w in workloads]
        timed: list[Timed] = []
        for done, (workload, mode, providers) in enumerate(progress(groups), 1):
            rows = self.measure(workload, mode, providers)
            add(rows)
            if any(r["status"] not in (OK, OUT_OF_TIME) for r in rows) and not usable(self.device):
                raise ContextLostError(done)
            timed += countable(rows, workload, mode, providers)
        if on_gpu(self.device):
            self.count_launches(timed)
            add([])
            if not usable(self.device):
                raise ContextLostError(len(groups))

    @cudnn_benchmark()
    def measure(self, workload: Any, mode: str, providers: Sequence[Provider]) -> list[Row]:
        """Rows of all providers on a workload or a network, timed in turns if they are right."""
        rows = [new_row(workload, mode, p, self.device, self.dtype) for p in providers]
        if any(p.compiles for p in providers):
            torch.compiler.reset()
        ready: list[Ready] = []
        problem: Any = None
        lost = False
        for place, (row, provider) in enumerate(zip(rows, providers, strict=True)):
            if lost or self.budget.left <= 0:
                row["status"] = CONTEXT_LOST if lost else OUT_OF_TIME
                continue
            try:
                problem = problem or workload.draw(mode, self.dtype, self.device)
                self.watch.announce(place)
                closure = self._ready(provider, provider.problem(problem), row, place)
            except OutOfTimeError:
                row["status"] = OUT_OF_TIME
            except Exception as error:
                row["status"] = f"failed: {describe(error)}"
                lost = not usable(self.device)
            else:
                if closure is not None:
                    ready.append((place, row, provider, closure))
        if lost:
            for _, row, *_ in ready:
                row["status"] = CONTEXT_LOST
            return rows
        self.time_in_turns(ready)
        if not workload.whole:
            for _, row, *_ in ready:
                self._describe(row, workload)
        self.watch.timed({place: row for place, row, *_ in ready})
        for _, row, provider, closure in ready:
            self._observe(row, provider, closure, workload.whole)
        compare(rows)
        note_unused_kernels(rows)
        return rows

    def _ready(self, provider: Provider, problem: Any, row: Row, place: int) -> Closure | None:
        """The provider's closure, warmed up and right; None, and a row that says so, if wrong.

        The check comes after the warm-up: what is recorded or compiled late is checked too.
        """
        with self.watch.setting_up(place):
            closure = provider.setup(problem)
            if self.effort.warm_up:
                closure()
        errors = problem.check(closure, self.effort.warm_up - 1)
        row.update(zip(("error", "error_gradient"), errors, strict=False))
        allowed = problem.allowed(provider.baseline)
        if not all(error <= allowed for error in errors):
            figures = " and ".join(f"{error:.1e}" for error in errors)
            row["status"] = f"disagrees: relative RMS {figures}, allowed {allowed:.0e}"
            return None
        return closure

    def _observe(self, row: Row, provider: Provider, closure: Closure, whole: bool) -> None:
        """Memory and host time of a timed row; where these fail, the timing stands."""
        if row["status"] != OK:
            return
        wanted: dict[str, Callable[[], int | float | None]] = {}
        if provider.launch != GRAPH:
            wanted["peak_bytes"] = lambda: peak_bytes(closure, self.device)
        if provider.launch != GRAPH and not whole:
            wanted["cpu_us"] = lambda: host_microseconds(closure, self.device)
        saved = getattr(closure, "saved_bytes", None)
        if saved and not provider.compiles:
            wanted["saved_bytes"] = saved
        for name, measured in wanted.items():
            with contextlib.suppress(Exception):
                row[name] = measured()

    @cudnn_benchmark()
    def count_launches(self, timed: Sequence[Timed]) -> None:
        """Completes rows whose provider launches its operations one by one, while there is time."""
        drawn: tuple[Any, str] | None = None
        for row, workload, mode, provider in timed:
            if self.budget.left <= 0:
                return
            try:
                if drawn != (workload, mode):
                    problem = workload.draw(mode, self.dtype, self.device)
                    drawn = workload, mode
                if provider.compiles:
                    torch.compiler.reset()
                closure = provider.setup(provider.problem(problem))
                prepare(closure)
                closure()
                row["launches"] = launches(closure, self.device)
            except Exception:
                if not usable(self.device):
                    return

    def time_in_turns(self, ready: Sequence[Ready]) -> None:
        """Rounds over all closures, each round beginning with the next one: all drift alike.

        If CUDA becomes unusable, those that have enough repetitions by then keep them.
        """
        times: list[list[float]] = [[] for _ in ready]
        group = Budget(self.effort.seconds, self.budget.clock)
        lost = False
        for turn in range(self.effort.rounds_max if ready else 0):
            late = turn >= self.effort.rounds_min and min(group.left, self.budget.left) <= 0
            if lost or late:
                break
            for place in range(len(ready)):
                index = (turn + place) % len(ready)
                name, row, provider, closure = ready[index]
                if row["status"] != OK:
                    continue
                try:
                    with self.watch.timing(name):
                        ms = self.timer(closure, launches_count=provider.launch != GRAPH)
                    times[index].append(ms)
                except Exception as error:
                    row["status"] = f"failed: {describe(error)}"
                    lost = not usable(self.device)
                    if lost:
                        break
        for (_, row, *_), taken in zip(ready, times, strict=True):
            if lost and row["status"] == OK and len(taken) < self.effort.rounds_min:
                row["status"] = CONTEXT_LOST
            if row["status"] == OK:
                quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
                middle, low, high = torch.tensor(taken, dtype=torch.float64).quantile(quantiles)
                row.update(median_ms=middle.item(), p20_ms=low.item(), p80_ms=high.item())
                row["repetitions"] = len(taken)

    def _describe(self, row: Row, workload: Workload) -> None:
        """Rates of a timed row, and its share of the floor."""
        if row["status"] != OK:
            return
        batch, size = workload.batch(self.device), self.dtype.itemsize
        seconds = 1e-3 * row["median_ms"]
        cache = self.ceilings.cache if self.ceilings else Ceilings.cache
        moved = floors.compulsory_bytes(workload, batch, row["mode"], size, cache)
        flop = floors.useful_flop(workload, batch, row["mode"])
        row.update(gb_s=moved / seconds / 1e9, tflop_s=flop / seconds / 1e12)
        if self.ceilings:
            floor = floors.floor(workload, batch, row["mode"], size, self.ceilings)
            row.update(floor_ms=1e3 * floor.seconds, bound=floor.bound)
            row["share_of_floor"] = floor.seconds / seconds


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


def countable(rows: Sequence[Row], workload: Any, mode: str, providers) -> list[Timed]:
    """Those of blocks whose operations are launched one by one."""
    return [
        (row, workload, mode, provider)
        for row, provider in zip(rows, providers, strict=True)
        if row["status"] == OK and provider.launch != GRAPH and not workload.whole
    ]


# Each ratio refers to the fastest row of the group for which its condition holds. Without a block
# there is nothing to compare a block with.
WITHOUT = "without block"
REFERENCES: dict[str, Callable[[Row, Row], bool]] = {
    "ratio_to_eager": lambda row, other: other["baseline"],
    "ratio_same_format": lambda row, other: other["baseline"] and other["layout"] == row["layout"],
    "ratio_to_compiled": lambda row, other: other["provider"] == "compile eager",
    "ratio_to_max_autotune": lambda row, other: other["provider"] == "compile eager max-autotune",
    "ratio_to_rivals": lambda row, other: (
        other["provider"] not in OURS and not other["provider"].endswith(WITHOUT)
    ),
}


def compare(rows: list[Row]) -> None:
    """Adds ratios to others of the group, which has one launch mode.

    A ratio is left out if one of its references was cut short, because that one might have been the
    fastest. References that failed, hung or disagree are named in ``failed_references``.
    """
    for row in rows:
        for name in (*REFERENCES, "failed_references"):
            row.pop(name, None)  # of a comparison with fewer rows
    for row in (row for row in rows if row["status"] == OK):
        failed: dict[str, None] = {}
        for name, is_reference in REFERENCES.items():
            references = [other for other in rows if is_reference(row, other)]
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
    """Of the time that the eager block adds to a network, what each provider's adds."""
    times = {(r["provider"], r["layout"]): r["median_ms"] for r in rows if r["status"] == OK}
    for row in (row for row in rows if row["status"] == OK):
        prefix = "compile " if row["provider"].startswith("compile ") else ""
        bare, eager = (times.get((prefix + name, row["layout"])) for name in (WITHOUT, "eager"))
        if bare and eager and eager > bare:
            row["added"] = (row["median_ms"] - bare) / (eager - bare)


def note_unused_kernels(rows: list[Row]) -> None:
    """Says in rows of da_triton's kernels which of them PyTorch operations stood in for.

    A kernel that failed its proof on first use is replaced for the rest of the process.
    """
    guard = sys.modules.get("da_triton.runtime.guard")  # without it, no kernel has run
    unused = guard.replaced() if guard else ()
    for row in rows:
        if unused and row["status"] == OK and "triton" in row["provider"].split():
            row["kernels_not_used"] = ", ".join(unused)


def progress(items: Sequence[Any]) -> Iterable[Any]:
    """A progress bar where tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, unit="group", disable=None)


def describe(error: BaseException) -> str:
    """Type and first line of an error, and of the one that was being handled when it was raised.

    An aborted graph capture raises again in ``capture_end``; the cause is the error before.
    """
    earlier = None if error.__suppress_context__ else error.__context__
    found = []
    for one in filter(None, (error, earlier)):
        lines = str(one).strip().splitlines()
        found.append(f"{type(one).__name__}: {lines[0]}" if lines else type(one).__name__)
    return ", after ".join(found)
