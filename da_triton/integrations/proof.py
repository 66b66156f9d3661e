"""Whether two forms of a module are one function: forward and gradients, in float64 and as it is.

Both forms are deep copies of one module; the module itself is not run, and keeps its state.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Relative error in float64: rounding, and nothing that another formula could hide behind.
EXACT = 1e-9
# Relative error in the module's own dtype that is never too much.
ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Call:
    """Arguments of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> "Call":
        """Fresh copies that want gradients, floating tensors in ``dtype``."""

        def fresh(x):
            if isinstance(x, Tensor) and x.is_floating_point():
                return x.detach().to(dtype, copy=True).requires_grad_()
            return x

        return Call(
            tuple(map(fresh, self.args)), {name: fresh(x) for name, x in self.kwargs.items()}
        )

    @property
    def tensors(self) -> list[Tensor]:
        values = (*self.args, *self.kwargs.values())
        return [x for x in values if isinstance(x, Tensor) and x.requires_grad]


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
    """What a module gives for a call, in float64, in training and in evaluation.

    Raises:
        ValueError: not one finite tensor, or it changes its own state.
    """

    def __init__(self, module: nn.Module, call: Call) -> None:
        self.module, self.call = module, call
        self.expected = {t: _results(module, call, torch.float64, t) for t in (True, False)}

    def error(self, change: Callable[[nn.Module], Any], *, gradients: bool = True) -> float:
        """The largest relative error of the changed module; without gradients, of the output."""
        worst = 0.0
        for training, expected in self.expected.items():
            found = _results(
                self.module, self.call, torch.float64, training, change, gradients=gradients
            )
            worst = max(worst, *_errors(found, expected[: len(found)], floor=1e-3))
        return worst


def check_rounding(module: nn.Module, call: Call, change: Callable[[nn.Module], Any]) -> None:
    """In the module's own dtype, our errors against float64 are at most twice the module's own.

    Raises:
        ValueError: they are not.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    if dtype == torch.float64:
        return
    rounded, training = call.to(dtype), module.training
    exact = _results(module, rounded, torch.float64, training)
    ours = _results(module, rounded, dtype, training, change)
    theirs = _results(module, rounded, dtype, training)
    errors = (_errors(found, exact, floor=0.1) for found in (ours, theirs))
    for mine, their in zip(*errors, strict=True):
        if not mine <= max(2 * their, ROUNDING.get(dtype, 0.0)):
            raise ValueError(
                f"in {dtype} its relative error would be {mine:.1e}; the layer's own is {their:.1e}"
            )


@contextlib.contextmanager
def seeded(devices: Iterable[torch.device]) -> Iterator[None]:
    """Generators of the CPU and of these devices begin anew, and go on afterwards as before."""
    devices = list(devices)
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(0)
        for device in devices:
            torch.cuda.default_generators[device.index or 0].manual_seed(0)
        yield


def _results(
    module: nn.Module,
    call: Call,
    dtype: torch.dtype,
    training: bool,
    change: Callable[[nn.Module], Any] | None = None,
    *,
    gradients: bool = True,
) -> list[Tensor]:
    """Output, and gradients of the arguments and parameters, in a fixed order."""
    twin = unwatched(module).to(dtype).train(training).requires_grad_(True)
    if change is not None:
        change(twin)
    fresh = call.to(dtype)
    before = {name: b.clone() for name, b in twin.named_buffers(recurse=False)}
    device = next((p.device for p in twin.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    with seeded(devices), torch.autocast(device.type, enabled=False):  # dropout in both alike
        with torch.enable_grad():
            out = twin(*fresh.args, **fresh.kwargs)
        if not isinstance(out, Tensor):
            raise ValueError(f"it returns {type(out).__name__}, not one tensor")
        after = dict(twin.named_buffers(recurse=False))
        if changed := [name for name in before if not torch.equal(before[name], after[name])]:
            raise ValueError(f"its forward changes its own state ({', '.join(changed)})")
        if not out.isfinite().all():
            raise ValueError("it gives values that are not finite, which compare with nothing")
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
