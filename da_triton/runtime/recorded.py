"""The host side of a call, recorded once and then repeated: allocations, launches, GEMMs.

The kernels that a pass launches, and the tensors they take, follow from metadata alone. So the
eighth call with the same metadata is recorded, and later ones skip the launchers: they allocate,
add offsets to addresses, launch, and call the library. Like a CUDA graph, a recording does not
repeat decisions; unlike one, it takes tensors at any address, runs on any stream and keeps no
memory between calls.

Temporaries that kernels alone see share one allocation, and the same bytes where their lifetimes do
not overlap. Every other tensor is allocated before its first use and dropped after its last.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import tracing
from . import guard, launch

aten = torch.ops.aten
ALLOCATIONS = (
    aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided,
)  # fmt: skip
# Operations whose results are random or have a shape that depends on values, and those that change
# more than their results.
UNREPEATABLE = (
    torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded, torch.Tag.inplace_view,
)  # fmt: skip
CONSTANTS = (
    type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip
# The first call that is recorded, a power of 2. Recording costs about as much time as ten calls
# save.
FIRST = 8
UNIT = 256  # bytes; temporaries start at multiples of it
Found = tuple[Tensor | None, ...]


class Recorded:
    """A ``function`` of tensors, any of which but the first may be None, that returns such a tuple.

    It must depend on their metadata alone, and call only kernels of this package and operations of
    ATen. All calls must have the metadata of the first, unless ``compared``: then those with other
    metadata run the function. So do calls whose launches are observed, examined or interpreted, and
    those with addresses that 16 does not divide.
    """

    def __init__(self, function: Callable[..., Found], *, compared: bool = False) -> None:
        self.function, self.compared = function, compared
        self.program: Program | None = None
        self.calls = 0

    def __call__(self, *tensors: Tensor | None) -> Found:
        program = self.program
        if program is None:
            return self._unrecorded(tensors)
        steps, results, room, kernels, device, tf32, metadata = program
        addresses = [0 if t is None else t.data_ptr() for t in tensors]
        if not (
            _aligned(addresses)
            and _unobserved(kernels)
            and tf32 == launch.tf32(tensors[0])
            and (not self.compared or metadata == _metadata(tensors))
        ):
            return self.function(*tensors)
        stream = launch.stream_of(device)
        if stream is None:
            with torch.cuda.device(device):
                return self(*tensors)
        held = [*tensors, *room]
        addresses += room
        for step in steps:
            step(held, addresses, device, stream)
        return tuple([held[r] if type(r) is int else r and r.of(held) for r in results])

    def _unrecorded(self, tensors):
        """Records call 8, 16, 32 …, until one can be repeated: tensors may overlap by chance."""
        self.calls += 1
        if self.calls < FIRST or self.calls & (self.calls - 1) or not _unobserved(()):
            return self.function(*tensors)
        recorder = _Recorder(tensors)
        with recorder, launch.recording(recorder):
            results = self.function(*tensors)
        self.program = recorder.program(results)
        return results


# --- the recording --------------------------------------------------------------------------------
# Tensors have numbers: first the arguments, then those that are made.


class _View(NamedTuple):
    """A tensor, or if a shape is given, a view that begins ``start`` elements after its start."""

    number: int
    start: int
    shape: Sequence[int] | None
    strides: Sequence[int]

    def of(self, tensors: list[Any]) -> Tensor:
        number, start, shape, strides = self
        whole = tensors[number]
        if shape is None:
            return whole
        return whole.as_strided(shape, strides, whole.storage_offset() + start)


class _Allocation(NamedTuple):
    number: int
    shape: Sequence[int]
    strides: Sequence[int]
    dtype: torch.dtype

    def __call__(self, tensors, addresses, device, stream):
        number, shape, strides, dtype = self
        made = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        tensors[number], addresses[number] = made, made.data_ptr()


class _Launch(NamedTuple):
    run: Any
    grid: tuple[int, int, int]
    about: tuple[Any, ...]  # function, metadata, no description, no hooks
    pointers: list[tuple[int, int]]  # numbers of tensors, and bytes after their start
    others: tuple[Any, ...]
    compiled: Any  # kept loaded

    def numbers(self):
        return [number for number, _ in self.pointers]

    def __call__(self, tensors, addresses, device, stream):
        run, grid, about, pointers, others, _ = self
        run(*grid, stream, *about, *[addresses[n] + start for n, start in pointers], *others)


class _Operation(NamedTuple):
    run: Any
    args: list[Any]
    kwargs: dict[str, Any]
    number: int | None  # of the tensor that it makes

    def numbers(self):
        given = [x.number for x in (*self.args, *self.kwargs.values()) if type(x) is _View]
        return given if self.number is None else [*given, self.number]

    def __call__(self, tensors, addresses, device, stream):
        run, args, kwargs, number = self
        given = [x.of(tensors) if type(x) is _View else x for x in args]
        if kwargs:
            kwargs = {k: x.of(tensors) if type(x) is _View else x for k, x in kwargs.items()}
        made = run(*given, **kwargs)
        if number is not None:
            tensors[number], addresses[number] = made, made.data_ptr()


class _Drop(NamedTuple):
    numbers: list[int]

    def __call__(self, tensors, addresses, device, stream):
        for number in self.numbers:
            tensors[number] = None


class Program(NamedTuple):
    steps: list[Any]
    results: list[Any]  # numbers of tensors, views of them, or None
    room: list[None]  # for tensors that are made
    kernels: list[Any]
    device: torch.device
    tf32: bool
    metadata: list[Any]


# --- the recorder ---------------------------------------------------------------------------------


class _Whole(NamedTuple):
    """What a recording has to know of a tensor, given or made."""

    shape: Sequence[int]
    strides: Sequence[int]
    dtype: torch.dtype
    allocated: bool  # not by an operation that also computes
    bytes: int  # of its storage, from its start


class _Recorder(TorchDispatchMode):
    """Notes launches and operations. Tensors are identified by their memory."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Without it the first operation imports the compiler, which takes a second."""
        return False

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.first, self.given, self.metadata = tensors[0], len(tensors), _metadata(tensors)
        self.wholes: list[_Whole | None] = []
        self.places: dict[int, tuple[int, int]] = {}  # of tensors that are alive
        self.steps: list[Any] = []
        self.kernels: list[Any] = []
        for t in tensors:
            if t is None or t.numel() == 0:
                self.wholes.append(None)
                continue
            last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
            self._add(t, t.data_ptr(), (last + 1) * t.itemsize, False)
        ends = sorted(self.places.values())
        # Where tensors overlap, an address does not identify one of them.
        apart = all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
        self.complete = apart and _aligned([start for start, _ in ends])

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = op(*args, **kwargs)
        if self.complete:
            self._note(op, args, kwargs, found)
        return found

    def _note(self, op, args, kwargs, found):
        if op.overloadpacket in ALLOCATIONS:
            self._add_new(found, True)
            return
        known = {_storage(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        several = found if isinstance(found, (list, tuple)) else [found]
        fresh = not all(isinstance(x, Tensor) and _storage(x) in known for x in several)
        if not fresh and not op._schema.is_mutable:
            return  # a view
        if (
            not isinstance(found, Tensor)
            or set(op.tags).intersection(UNREPEATABLE)
            or (fresh and found.storage_offset())
        ):
            self.complete = False
            return
        given = list(map(self._argument, args))
        named = {name: self._argument(x) for name, x in kwargs.items()}
        number = self._add_new(found, False) if fresh else None
        self.steps.append(_Operation(op, given, named, number))

    def launched(self, ready, tensors, scales, compiled):
        """``ready``: a ``launch.Launch``; ``compiled``: what it launches."""
        _, run, function, metadata = compiled
        pointers = [self._place(t.data_ptr()) for t in tensors]
        about, others = (function, metadata, None, None, None), (*scales, *ready.rest)
        self.steps.append(_Launch(run, ready.grid, about, pointers, others, compiled))
        self.kernels.append(ready.kernel)

    def _add_new(self, x, allocated):
        storage = x.untyped_storage()
        if x.device != self.first.device:
            self.complete = False
        return self._add(x, storage.data_ptr(), storage.nbytes(), allocated)

    def _add(self, x, start, size, allocated):
        end, number = start + size, len(self.wholes)
        # What was made in these bytes before has been freed.
        self.places = {
            n: place for n, place in self.places.items()
            if n < self.given or place[1] <= start or end <= place[0]
        }  # fmt: skip
        self.places[number] = start, end
        self.wholes.append(_Whole(tuple(x.shape), x.stride(), x.dtype, allocated, size))
        return number

    def _place(self, address):
        """The number of the tensor there, and how many bytes after its start."""
        for number, (start, end) in self.places.items():
            if start <= address < end:
                return number, address - start
        self.complete = False
        return 0, 0

    def _argument(self, x):
        if isinstance(x, Tensor):
            return self._view(x)
        for part in x if isinstance(x, (list, tuple)) else [x]:
            if not isinstance(part, CONSTANTS):
                self.complete = False
        return x

    def _view(self, x):
        number, start = self._place(x.data_ptr())
        whole = self.wholes[number]
        if whole is None or whole.dtype != x.dtype:
            self.complete = False
        return _View(number, start // x.itemsize, tuple(x.shape), x.stride())

    def program(self, results: Found) -> Program | None:
        """The program that repeats the recorded call; None if the recording is incomplete."""
        views = [None if r is None else self._view(r) for r in results]
        if not (self.complete and self.steps):
            return None
        returned = [view for view in views if view]
        for view in reversed(returned):
            self._shape(view)
        for step in self.steps:
            if type(step) is _Operation:
                step.args[:] = map(self._simplified, step.args)
                step.kwargs.update({k: self._simplified(x) for k, x in step.kwargs.items()})
        numbers = {view.number for view in returned}
        steps = _placed(self.steps, self.wholes, self.given, numbers)
        found = [self._simplified(view) for view in views]
        return Program(
            steps, [view.number if view and view.shape is None else view for view in found],
            [None] * (len(self.wholes) - self.given), self.kernels, self.first.device,
            launch.tf32(self.first), self.metadata,
        )  # fmt: skip

    def _shape(self, view):
        """Allocates a tensor in the shape in which it is returned."""
        whole = self.wholes[view.number]
        if whole.allocated and math.prod(view.shape) * whole.dtype.itemsize == whole.bytes:
            self.wholes[view.number] = whole._replace(shape=view.shape, strides=view.strides)

    def _simplified(self, view):
        if type(view) is not _View:
            return view
        whole = self.wholes[view.number]
        same = (view.start, view.shape, view.strides) == (0, whole.shape, whole.strides)
        return view._replace(shape=None) if same else view


def _metadata(tensors):
    return [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]


def _storage(x):
    return x.untyped_storage().data_ptr()


def _unobserved(kernels):
    """Whether nothing has to observe launches or operators one by one."""
    return launch.unobserved(kernels) and not (tracing.named() or guard.examining())


def _aligned(addresses):
    return functools.reduce(operator.or_, addresses, 0) % 16 == 0


def _placed(steps, wholes, given, returned):
    """The steps between allocations before first uses and drops after last ones.

    Adds to ``wholes`` the tensor that temporaries share. The first ``given`` are the caller's.
    """
    first, last = {}, {}
    for i, step in enumerate(steps):
        for number in step.numbers():
            first.setdefault(number, i)
            last[number] = i
    for number in returned:
        first.setdefault(number, 0)
        last[number] = len(steps)
    starts, arena = {}, len(wholes)
    if all(type(step) is _Launch for step in steps):
        starts, size = _shared({
            n: (first[n], last[n], whole.bytes) for n, whole in enumerate(wholes)
            if n in first and n not in returned and whole.allocated
        })  # fmt: skip
        if starts:
            wholes.append(_Whole((size,), (1,), torch.uint8, True, size))
            first[arena], last[arena] = 0, len(steps)
    placed = []
    for i, step in enumerate(steps):
        for n, whole in enumerate(wholes):
            if n not in starts and first.get(n) == i and whole.allocated:
                placed.append(_Allocation(n, whole.shape, whole.strides, whole.dtype))
        if starts:
            moved = [
                (arena, starts[n] + start) if n in starts else (n, start)
                for n, start in step.pointers
            ]  # fmt: skip
            step = step._replace(pointers=moved)
        placed.append(step)
        unused = [n for n, used in last.items() if used == i and n >= given and n not in starts]
        if unused:
            placed.append(_Drop(unused))
    return placed


def _shared(lives):
    """The offset of each tensor in one allocation, and the size of that, in bytes.

    ``lives``: by number, the first and the last step with it, and its bytes.
    """
    starts, end = {}, 0
    for number, (first, last, size) in sorted(lives.items(), key=lambda item: -item[1][2]):
        start = 0
        for other in sorted(starts, key=starts.get):
            begins, ends, taken = lives[other]
            apart = last < begins or ends < first
            if not apart and start < starts[other] + taken and starts[other] < start + size:
                start = -(-(starts[other] + taken) // UNIT) * UNIT
        starts[number] = start
        end = max(end, start + size)
    return starts, end
