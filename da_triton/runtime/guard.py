"""Proves kernels on their first use where compilers are known to miscompile them.

There (``compilers``), a launcher's first call with new channels, dtypes or flags also runs a few
times on a small random input, with the same tile, alignment and flags (``trials``). The results
must agree with those of its stand-in (``stand_ins``, in float64) within the rounding of the dtype,
and with each other bit for bit. The verdict is remembered (``verdicts``). A kernel that fails is
not used: its stand-in takes over, with one warning.

Elsewhere, and for dtypes without matrix units, launchers run as they are. Nothing is proved while a
CUDA graph is captured: an unproved kernel runs unchecked there, with a warning.

Two environment variables, the first read once:

    DA_TRITON_PROVE      0: prove nothing; 1: prove on every NVIDIA GPU, half precision and TF32
    DA_TRITON_CACHE_DIR  the folder of verdicts; default ~/.cache/da_triton, or in $XDG_CACHE_HOME
"""

import contextlib
import functools
import inspect
import threading
from collections import Counter
from typing import Any

import torch

from ..precision import HALF, POLICIES
from . import compilers, launch, stand_ins, verdicts
from .trials import exact, fill, like, map_tensors, random, tensors, words
from .verdicts import Verdict

ALLOWED_TF32 = 5e-3
SCALARS = {"logit_scale": 0.7, "scale": 1.3}
ATTEMPTS = 3  # at a proof that something other than the kernel prevents, such as memory
WRONG, VARYING = "wrong results", "different results on the same input"
UNPROVED = "not checked"
# Launchers that return partial sums: the axis of the partials, and how many of the results have it.
SUMMED = {"block_bwd_distribute": (1, 1), "backward_partials": (2, 1), "outer_product": (0, 2)}


class _State(threading.local):
    verdicts: list[Verdict] | None = None  # of an examination in progress
    repetitions = 4
    proving = False


LAUNCHERS: dict[str, Any] = {}  # every guarded launcher, by the name of its stand-in
_state = _State()
_lock = threading.RLock()
_known: dict[Any, bool] = {}  # exact arguments -> whether the kernel may be used
_verdicts: dict[str, Verdict] = {}  # a case -> what was found in this process
_attempts: Counter[str] = Counter()  # to prove a case


def proved(
    axes: dict[str, Any], *, writes=(), roles=None, num_splits=lambda **_: 2,
    apart=lambda **_: False, choice=lambda **_: False,
):  # fmt: skip
    """Decorates a launcher that has a stand-in of the same name.

    ``axes``: a letter per axis of every tensor with a batch (N), positions (L) or partials (S), "-"
    for other axes, which may be left out at the end; a tuple for tensors in tuples. ``writes``:
    arguments that are results. ``roles``: "positive" for tensors with positive elements.
    ``num_splits``: how many programs share the positions, where the code depends on that.
    ``apart``: whether x has strides that other activations do not have, where the code depends on
    that. ``choice``: between two tiles, where the number of programs makes it.
    """

    def decorate(launcher):
        name = launcher.__name__
        spec = LAUNCHERS[name] = _Spec(
            name, launcher, axes, writes, roles or {}, num_splits, apart, choice
        )  # fmt: skip

        @functools.wraps(launcher)
        def call(*args, **kwargs):
            idle = _state.verdicts is None and not watched()
            if idle or _use(spec, args, kwargs):
                return launcher(*args, **kwargs)
            with torch.no_grad(), torch.autocast(next(tensors(args)).device.type, enabled=False):
                return spec.stand_in(*args, **kwargs)

        return call

    return decorate


class _Spec:
    """A launcher and how to make small arguments for it."""

    def __init__(self, name, launcher, axes, writes, roles, num_splits, apart, choice):
        self.name, self.launcher, self.axes = name, launcher, axes
        self.writes, self.roles, self.num_splits = writes, roles, num_splits
        self.apart, self.choice = apart, choice
        self.stand_in = getattr(stand_ins, name)
        self.signature = inspect.signature(launcher)

    def bound(self, args, kwargs):
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def case(self, given):
        """Channels, dtypes, layouts and flags: what the generated code depends on."""
        found = {name: words(value, self.axes.get(name)) for name, value in given.items()}
        found["num_splits"] = str(self.num_splits(**given))
        found["apart"] = "yes" if self.apart(**given) else ""
        found["choice"] = "yes" if self.choice(**given) else ""
        if _dtype(given) == torch.float32:
            found["precision"] = "tf32" if verdicts.allows_tf32() else "ieee"
        return " ".join(f"{name}={word}" for name, word in found.items() if word)

    def small(self, given):
        """Random arguments with the same channels and alignment, few samples and positions."""
        generator = torch.Generator(next(tensors(given)).device).manual_seed(0)
        spread = {"x"} if self.apart(**given) else ()
        return {
            name: SCALARS.get(name, value)
            if isinstance(value, float)
            else random(value, self.axes.get(name), self._role(name), generator, name in spread)
            for name, value in given.items()
        }

    def _role(self, name):
        return "written" if name in self.writes else self.roles.get(name, name)

    def results(self, returned, arguments):
        """Results and outputs of a call; partials, whose number may vary, are merged."""
        found = [*tensors(returned), *(t for n in self.writes for t in tensors(arguments[n]))]
        if self.name in ("gather_partials", "gather_from_x", "gather_from_a"):
            acc, mx, total = stand_ins.merged(*(t.double() for t in found))
            return [acc / total[..., None], mx + total.log()]
        if self.name in SUMMED:
            axis, count = SUMMED[self.name]
            found[:count] = [t.sum(axis, dtype=torch.float64) for t in found[:count]]
        return found


def _use(spec, args, kwargs):
    """Whether a kernel may be used with these arguments; proves it where nothing is known."""
    if _state.proving or next(tensors(args)).shape[0] == 0:
        return True
    if _state.verdicts is not None:
        verdict = _examined(spec, spec.bound(args, kwargs))
        return verdict.right or verdict.reason.startswith(UNPROVED)
    key = exact(spec.name, args, kwargs)
    known = _known.get(key)
    if known is None:
        known = True
        if _concerns(args):
            with _lock:
                verdict = _verdict(spec, spec.bound(args, kwargs))
            if verdict is None:  # retried at the next call
                launch.leave_unrecorded()
                return True
            known = verdict.right
        if len(_known) >= 4096:
            _known.clear()
        _known[key] = known
    return known


def _examined(spec, given):
    """The verdict on a case of this examination."""
    case = spec.case(given)
    for verdict in _state.verdicts:
        if (verdict.kernel, verdict.case) == (spec.name, case):
            return verdict
    try:
        found = _prove(spec, given, case)
    except _UnprovedError as error:
        reason = f"{UNPROVED}: {_line(error.__cause__)}"
        found = Verdict(spec.name, case, "", float("inf"), 0.0, reason)
    _state.verdicts.append(found)
    return found


def _verdict(spec, given):
    """The verdict on a case, remembered or newly proved; None if nothing can be proved now."""
    device = next(tensors(given)).device
    case = spec.case(given)
    key = f"{spec.name} {device} {case}"
    if key not in _verdicts:
        found = verdicts.remembered(device, spec.name, case)
        if found is None:
            if _capturing():
                verdicts.warn_of_a_capture(spec.name)
                return None
            if _attempts[key] >= ATTEMPTS:
                return None
            _attempts[key] += 1
            try:
                found = _prove(spec, given, case)
            except _UnprovedError:
                return None
            except _FaultError as fault:
                verdicts.remember(device, fault.verdict)
                raise
            if found.reason in ("", WRONG, VARYING):  # an error may concern this process alone
                verdicts.remember(device, found)
        _verdicts[key] = found
        if not found.right:
            verdicts.warn(found, device)
    return _verdicts[key]


def _prove(spec, given, case):
    """Runs a launcher a few times on a small input, and its stand-in in float64.

    Raises:
        _UnprovedError: memory was short, or something other than the kernel failed.
        _FaultError: the kernel made the GPU fault.
    """
    device, dtype = next(tensors(given)).device, _dtype(given)
    tf32 = dtype == torch.float32 and verdicts.allows_tf32()
    allowed, error, tiles = ALLOWED_TF32 if tf32 else POLICIES[dtype].proof, float("inf"), []
    _synchronize(device)  # errors of earlier work are not the kernel's

    def verdict(reason):
        shown = ", ".join(dict.fromkeys(tiles))
        return Verdict(spec.name, case, shown, error, allowed, reason)

    _state.proving = True
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            try:
                small = spec.small(given)
                wide = map_tensors(small, lambda t: t.double() if t.is_floating_point() else t)
                truth = _run(spec, spec.stand_in, wide)
            except Exception as failure:
                raise _UnprovedError from failure
            with launch.trial(spec.num_splits(**given), tiles, spec.choice(**given)):
                runs = [_run(spec, spec.launcher, small) for _ in range(_state.repetitions)]
            error = max(map(_error, runs[0], truth))
            if not error <= allowed:
                return verdict(WRONG)
            same = (torch.equal(*pair) for run in runs for pair in zip(run, runs[0], strict=True))
            return verdict("" if all(same) else VARYING)
    except _UnprovedError:
        raise
    except Exception as failure:
        try:
            _synchronize(device)
        except RuntimeError:
            raise _FaultError(verdict(_line(failure))) from failure
        if isinstance(failure, torch.AcceleratorError):
            raise _FaultError(verdict(_line(failure))) from failure
        if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in str(failure):
            raise _UnprovedError from failure
        return verdict(_line(failure))
    finally:
        _state.proving = False


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _UnprovedError(Exception):
    """A proof was not possible: the kernel is neither right nor wrong."""


class _FaultError(RuntimeError):
    """A kernel made the GPU fault: nothing can run in this process any more."""

    def __init__(self, verdict):
        super().__init__(
            f"da_triton's kernel {verdict.kernel!r} faulted: {verdict.reason}. This process cannot "
            "go on; the next one will use PyTorch operations in its place."
        )
        self.verdict = verdict


@contextlib.contextmanager
def until_a_fault():
    """Leaves its body if an examined kernel makes the GPU fault, and records the fault."""
    try:
        yield
    except _FaultError as fault:
        _state.verdicts.append(fault.verdict)
    except torch.AcceleratorError as fault:  # of a launch that was proved on another input
        unknown = Verdict("a kernel", "of a block", "", float("inf"), 0.0, _line(fault))
        _state.verdicts.append(unknown)


def _line(error):
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _run(spec, function, small):
    arguments = map_tensors(small, lambda t: fill(like(t, t.shape), t))
    bound = inspect.BoundArguments(spec.signature, arguments)
    return spec.results(function(*bound.args, **bound.kwargs), arguments)


def _error(found, true):
    found, true = found.double(), true.double()
    scale = true.square().mean().sqrt() + true.abs()
    error = (found - true).abs() / scale.clamp(min=1e-30)
    largest = error.masked_fill(found == true, 0).max().item()  # equal infinities, too
    return largest if largest == largest else float("inf")


@contextlib.contextmanager
def examine(repetitions=4):
    """Proves every launch in its body, on any device and in any dtype.

    Yields a list that collects the verdicts. Nothing is remembered.
    """
    before = _state.verdicts, _state.repetitions
    _state.verdicts, _state.repetitions = [], repetitions
    try:
        yield _state.verdicts
    finally:
        _state.verdicts, _state.repetitions = before


def examining():
    """Whether launches of this thread are examined."""
    return _state.verdicts is not None


def replaced() -> tuple[str, ...]:
    """Kernels that failed their proof and that this process does not use, in alphabetical order."""
    return tuple(sorted({v.kernel for v in _verdicts.values() if not v.right}))


@functools.cache
def watched():
    """Whether anything has to be proved on any GPU of this process."""
    return any(
        compilers.affected(torch.device("cuda", i)) for i in range(torch.cuda.device_count())
    )


def _concerns(args):
    """Whether a launch has to be proved, by the device and dtypes of its tensors."""
    x = next(tensors(args))
    if not compilers.affected(x.device):
        return False
    half = any(t.dtype in HALF for t in tensors(args))
    return half or (x.dtype == torch.float32 and verdicts.allows_tf32())


def _dtype(given):
    """The narrowest dtype among the tensors, in which the matrix unit multiplies."""
    return min((t.dtype for t in tensors(given) if t.is_floating_point()), key=lambda d: d.itemsize)


def _capturing():
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
