"""Compares two forms of a module by numbers: outputs and gradients, in float64 and as they are.

Both forms are deep copies of one module; the module itself is not run, and keeps its state.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Relative error in float64: rounding, too small to hide another formula.
EXACT = 1e-9
# Relative error in the module's own dtype that is always accepted.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CASTS = dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double)
NUMBERS = (torch.tensor, torch.full, torch.linspace)  # in the default dtype
# Elements below which several threads cost more than they give, and many times more where other
# processes use the cores: each small operation then waits for a thread that does not run.
SMALL = 1 << 20


class UnprovableError(ValueError):
    """The module does something that comparing numbers cannot verify."""


@dataclass(frozen=True)
class Call:
    """Arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype | None) -> "Call":
        """Fresh copies that require gradients, in ``dtype`` unless it is None."""
        return self.of(lambda x: x.detach().to(dtype or x.dtype, copy=True).requires_grad_())

    def few(self) -> "Call":
        """The first two samples of the batch, which are enough."""
        return self.of(lambda x: x[:2] if x.dim() > 1 else x, every=True)

    def random(self, limit: int | None) -> "Call":
        """Random numbers of the same shapes; with ``limit``, of shortened axes of positions."""

        def fresh(x):
            short = math.inf if limit is None else limit
            shape = [size if i < 2 else min(size, short + i) for i, size in enumerate(x.shape)]
            return torch.randn(shape, dtype=torch.float64, device="cpu").to(x.device)

        return self.of(fresh)

    def of(self, change: Callable[[Tensor], Tensor], *, every: bool = False) -> "Call":
        """The call with other floating tensors, or with ``every`` other tensors of any dtype."""

        def changed(x):
            tensor = isinstance(x, Tensor) and (every or x.is_floating_point())
            return change(x) if tensor else x

        kwargs = {name: changed(x) for name, x in self.kwargs.items()}
        return Call(tuple(map(changed, self.args)), kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        values = (*self.args, *self.kwargs.values())
        return [x for x in values if isinstance(x, Tensor) and x.is_floating_point()]

    @property
    def axes(self) -> int:
        """The number of axes of the first tensor; 0 where there is none."""
        return next((x.dim() for x in self.tensors), 0)


class AllInFloat64(TorchFunctionMode):
    """Gives float64 where a forward requests a lower precision, as ``x.float()`` does.

    In float64 such a forward would differ from its formula by roundings to float32,
    among which another formula could hide.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wide(x):
            return torch.float64 if isinstance(x, torch.dtype) and x in ROUNDING else x

        args = tuple(map(wide, args))
        kwargs = {name: wide(x) for name, x in (kwargs or {}).items()}
        out = CASTS.get(func, func)(*args, **kwargs)
        if func in NUMBERS and out.dtype in ROUNDING:
            return func(*args, **{**kwargs, "dtype": torch.float64})
        return out


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def unwatched(module: nn.Module) -> nn.Module:
    """A deep copy without the hooks of the module itself: whoever watches it does not watch this,
    and its hooks may hold what cannot be copied."""
    kept = {name: module.__dict__[name] for name in HOOKS}
    module.__dict__.update({name: type(hooks)() for name, hooks in kept.items()})
    try:
        return copy.deepcopy(module)
    finally:
        module.__dict__.update(kept)


def randomised(module: nn.Module) -> nn.Module:
    """A copy with parameters that make logits of deviation about 2, and other buffers.

    A layer whose last weights are zeros gives zeros whatever it computes: it would prove nothing.
    Nor would a factor that is still one.
    """
    twin = unwatched(module)
    with torch.no_grad():
        for b in twin.buffers():
            if b.is_floating_point():  # variances stay positive
                noise = torch.rand(b.shape, dtype=torch.float64, device="cpu")
                b.copy_((b + 0.5) * (1 + noise).to(b))
        for p in twin.parameters():
            if p.is_floating_point():
                deviation = 2 / math.sqrt(p[0].numel()) if p.dim() > 1 else 1.0
                p.copy_(deviation * torch.randn(p.shape, dtype=torch.float64, device="cpu"))
    return twin


class Reference:
    """Outputs of a module for a call, in float64, in training and in evaluation.

    Raises:
        UnprovableError: not one finite tensor, or it changes its own state.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module, self.call = module, call
        self.expected = {t: _results(module, call, torch.float64, t) for t in (True, False)}

    def error(
        self,
        change: Callable[[nn.Module], Any],
        *,
        gradients: bool = True,
        enough: float = math.inf,
    ) -> float:
        """The largest relative error of the changed module, or one that exceeds ``enough``.

        ``gradients``: of outputs and gradients, or of outputs alone.
        """
        worst = 0.0
        for training, expected in self.expected.items():
            found = _results(
                self.module, self.call, torch.float64, training, change, gradients=gradients
            )
            worst = max(worst, *_errors(found, expected[: len(found)], floor=1e-3))
            if worst > enough:
                break
        return worst

    def check_rounding(self, change: Callable[[nn.Module], Any]) -> None:
        """In the module's own dtype, the change returns the same dtype, and its errors against
        float64 are at most twice the module's own.

        Raises:
            ValueError: that is not so.
        """
        dtype, training = dtype_of(self.module, self.call), self.module.training
        if dtype == torch.float64:
            return
        ours = _results(self.module, self.call, None, training, change)
        theirs = _results(self.module, self.call, None, training)
        if ours[0].dtype != theirs[0].dtype:
            raise ValueError(
                f"with parameters in {dtype} it returns {theirs[0].dtype}, the formula "
                f"{ours[0].dtype}"
            )
        errors = (_errors(found, self.expected[training], floor=0.1) for found in (ours, theirs))
        for mine, their in zip(*errors, strict=True):
            if not mine <= max(2 * their, ROUNDING.get(dtype, 0.0)):
                raise ValueError(
                    f"in {dtype} its relative error would be {mine:.1e}; the layer's own is "
                    f"{their:.1e}"
                )

    def check_autocast(self, change: Callable[[nn.Module], Any]) -> None:
        """Where the module keeps float32 under autocast, the change does too.

        Raises:
            ValueError: that is not so.
        """
        call = self.call.to(torch.float32)
        errors: list[float] = []
        for form in (None, change):
            found = _results(
                self.module, call, torch.float32, False, form, gradients=False, autocast=True
            )
            errors += _errors(found, self.expected[False][:1], floor=0.0)
        theirs, ours = errors
        if theirs <= ROUNDING[torch.float32] < ours:
            raise ValueError(
                f"it keeps float32 under autocast: the formula's relative error would be {ours:.1e}"
            )


def dtype_of(module: nn.Module, *calls: Call) -> torch.dtype:
    """The dtype of the first weight (a layer in half precision may have norms in float32), or,
    without any, of the first tensor of the calls."""
    weights = (p for p in module.parameters() if p.is_floating_point() and p.dim() > 1)
    return next((x.dtype for x in _with_tensors(weights, calls)), torch.float32)


def device_of(module: nn.Module, *calls: Call) -> torch.device:
    """The device of the first parameter, or, without any, of the first tensor of the calls."""
    tensors = _with_tensors(module.parameters(), calls)
    return next((x.device for x in tensors), torch.device("cpu"))


def _with_tensors(parameters: Iterable[Tensor], calls: Iterable[Call]) -> Iterator[Tensor]:
    return itertools.chain(parameters, *(call.tensors for call in calls))


@contextlib.contextmanager
def threads_for(call: Call) -> Iterator[None]:
    """One thread where the call is small."""
    before = torch.get_num_threads()
    small = before > 1 and sum(x.numel() for x in call.tensors) < SMALL
    try:
        if small:
            torch.set_num_threads(1)
        yield
    finally:
        if small:
            torch.set_num_threads(before)


@contextlib.contextmanager
def seeded(devices: Iterable[torch.device]) -> Iterator[None]:
    """Reseeds the generators of the CPU and of these devices, and restores them afterwards."""
    devices = list(devices)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        yield


def _results(
    module: nn.Module,
    call: Call,
    dtype: torch.dtype | None,
    training: bool,
    change: Callable[[nn.Module], Any] | None = None,
    *,
    gradients: bool = True,
    autocast: bool = False,
) -> list[Tensor]:
    """Output, and gradients of the arguments and parameters, in a fixed order.

    ``dtype``: of the parameters and arguments; None leaves them as they are.
    """
    twin = unwatched(module).train(training).requires_grad_(True)
    twin = twin if dtype is None else twin.to(dtype)
    if change is not None:
        change(twin)
    fresh = call.to(dtype)
    before = {name: b.clone() for name, b in twin.named_buffers(recurse=False)}
    device = device_of(twin, call)
    with contextlib.ExitStack() as stack:
        stack.enter_context(threads_for(call))
        stack.enter_context(seeded([device] if device.type == "cuda" else []))  # dropout alike
        stack.enter_context(torch.autocast(device.type, enabled=autocast))
        if dtype == torch.float64:
            stack.enter_context(AllInFloat64())
        with torch.set_grad_enabled(gradients):
            out = twin(*fresh.args, **fresh.kwargs)
        if not isinstance(out, Tensor):
            raise UnprovableError(f"it returns {type(out).__name__}, not one tensor")
        after = dict(twin.named_buffers(recurse=False))
        if changed := [name for name in before if not torch.equal(before[name], after[name])]:
            raise UnprovableError(f"its forward changes its own state ({', '.join(changed)})")
        if not out.isfinite().all():
            raise UnprovableError("it returns values that are not finite, which cannot be compared")
        if not gradients:
            return [out.detach()]
        upstream = torch.randn(out.shape, dtype=torch.float64, device="cpu").to(out)
        wanted = [*fresh.tensors, *twin.parameters()]
        found = torch.autograd.grad(out, wanted, upstream, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True))
    return [out.detach(), *zeros]


def _errors(found: list[Tensor], expected: list[Tensor], floor: float) -> Iterator[float]:
    """Relative errors of the output and of each gradient.

    ``floor``: of the largest gradient, added to each one's size: a gradient far below the largest
    is made of terms that cancel, and their roundings stay.
    """
    if found[0].shape != expected[0].shape:
        yield math.inf
        return
    largest = max((x.double().norm().item() for x in expected[1:]), default=0.0)
    for i, (x, y) in enumerate(zip(found, expected, strict=True)):
        size = y.double().norm().item() + (floor * largest if i else 0.0)
        error = (x.double() - y.double()).norm().item()
        yield error / size if size else (0.0 if error == 0 else math.inf)
