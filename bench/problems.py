"""A workload's tensors, and the float64 reference output and gradient that results must match.

Logits are peaky and the block's branch has the size of its input, so that neither an average over
thousands of positions nor the residual hides an error.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from da_triton import double_attention_block

from .workloads import Workload

FORWARD, BACKWARD, STEP = "forward", "backward", "forward+backward"
MODES = (FORWARD, BACKWARD, STEP)
CHILDREN = ("convA", "convB", "convV", "conv_reconstruct")
LOGIT_STD = 3.0
TOLERANCE = {torch.float32: 3e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


@dataclass(frozen=True)
class Problem:
    """Tensors of one workload in one mode.

    Providers read ``x`` in place. It holds ``features`` while they are timed and ``fresh`` while
    they are checked. ``grad`` is the gradient of the output, None in forward mode. ``expected`` is
    the output, and with a gradient also x's gradient, for ``fresh`` in float64.
    """

    workload: Workload
    mode: str
    state: dict[str, Tensor]
    x: Tensor
    features: Tensor
    fresh: Tensor
    grad: Tensor | None
    expected: tuple[Tensor, ...]

    def in_format(self, channels_last: bool) -> "Problem":
        """The problem with an ``x`` and a ``grad`` of its own in a memory format."""
        layout = memory_format(len(self.workload.positions), channels_last)
        x = self.features.clone(memory_format=layout)
        if self.grad is None:
            return replace(self, x=x)
        return replace(self, x=x.requires_grad_(), grad=self.grad.clone(memory_format=layout))

    @functools.cached_property
    def without_bias_of_v(self) -> "Problem":
        """The problem for a block whose V has no bias: other state, other expected results."""
        state = {name: value for name, value in self.state.items() if name != "convV.bias"}
        expected = _definition(self.workload, state, self.fresh, self.grad)
        return replace(self, state=state, expected=expected)

    def show(self, activations: Tensor) -> None:
        """Writes ``features`` or ``fresh`` into ``x``."""
        with torch.no_grad():
            self.x.copy_(activations)

    def check(self, closure: Any, warm_up: int) -> list[float]:
        """The errors of a closure that was called before, on values that it has not read yet."""
        for _ in range(warm_up):
            closure()
        self.show(self.fresh)
        errors = self.errors(closure())
        self.show(self.features)
        return errors

    def allowed(self, baseline: bool) -> float:
        """Eager's own sums over millions of positions lose digits; that does not make it wrong."""
        return TOLERANCE[self.x.dtype] * (2 if baseline else 1)

    def errors(self, results: tuple[Tensor, ...]) -> list[float]:
        """Relative RMS error of the output, and of x's gradient, against the branch's size."""
        skips = (self.fresh,) if self.grad is None else (self.fresh, self.grad)
        if len(results) < len(self.expected):
            raise ValueError(f"{len(results)} results instead of {len(self.expected)} or more")
        errors = []
        for result, truth, skip in zip(results, self.expected, skips, strict=False):
            if result.shape != truth.shape:
                raise ValueError(f"shape {tuple(result.shape)} instead of {tuple(truth.shape)}")
            branch = truth - skip.double()
            errors.append(((result.detach().double() - truth).norm() / branch.norm()).item())
        return errors


def draw(workload: Workload, mode: str, dtype: torch.dtype, device: torch.device) -> Problem:
    features, fresh = (workload.features(device, seed).to(dtype) for seed in (0, 1))
    state = _weights(workload, fresh.double(), dtype)
    grad = None
    if mode != FORWARD:
        generator = torch.Generator(device).manual_seed(2)
        grad = torch.randn(fresh.shape, generator=generator, device=device).to(dtype)
    expected = _definition(workload, state, fresh, grad)
    return Problem(workload, mode, state, features, features, fresh, grad, expected)


def memory_format(axes: int, channels_last: bool = True) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if axes == 2 else torch.channels_last_3d


def _weights(workload: Workload, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict for which both logits have ``LOGIT_STD`` and the branch has unit RMS on x."""
    generator = torch.Generator(x.device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=x.device, dtype=torch.float64)

    c, c_m, c_n = workload.c, workload.c_m, workload.c_n
    flat = x.flatten(2)
    a, b, v = normal(c_m, c), normal(c_n, c), normal(c_n, c)
    a, b, v = (w * (s / (w @ flat).std()) for w, s in ((a, 1.0), (b, LOGIT_STD), (v, LOGIT_STD)))
    z = double_attention_block(
        flat, a, None, b, None, v, None, heads=workload.heads, backend="eager"
    )
    last = normal(c, c_m)
    last /= (last @ z).square().mean().sqrt()
    weights = dict(zip(CHILDREN, (a, b, v, last), strict=True))
    axes = (1,) * len(workload.positions)
    state = {f"{name}.weight": w.reshape(*w.shape, *axes) for name, w in weights.items()}
    state |= {f"{name}.bias": 0.1 * normal(w.shape[0]) for name, w in weights.items()}
    return {name: value.to(dtype) for name, value in state.items()}


def _definition(
    workload: Workload, state: dict[str, Tensor], x: Tensor, grad: Tensor | None
) -> tuple[Tensor, ...]:
    x = x.double().requires_grad_(grad is not None)
    double = {name: value.double() for name, value in state.items()}
    parameters: list[Any] = [double.get(f"{c}.{k}") for c in CHILDREN for k in ("weight", "bias")]
    out = double_attention_block(
        x, *parameters, heads=workload.heads, residual=True, backend="eager"
    )
    if grad is None:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, x, grad.double())
