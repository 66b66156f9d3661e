"""``accelerate``: finds layers that are double attention under any name, proves it, replaces them.

A replaced layer stays the same object with the same parameters, keys, hooks and attributes; its
class becomes a subclass of its own class whose ``forward`` is ours. ``restore`` gives the class
back. Nothing else of the model changes, and no class is patched.
"""

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..modules import DoubleAttention
from .families import FAMILIES, Family, Options
from .proof import EXACT, Call, Reference, check_rounding, randomised, seeded

SHAPES = ((5, 6), (7, 9))
CLASSES: dict[type[nn.Module], type] = {}
MISFIT = (ValueError, TypeError, RuntimeError)  # what shapes raise that do not fit a formula


@dataclass(frozen=True)
class Finding:
    """One layer: its name in the model, its class, the family that it resembles.

    ``error``: the largest relative error in float64 of the proof, or of the nearest formula.
    ``note``: how it was proved, or why it was refused.
    """

    name: str
    kind: str
    family: str
    error: float
    note: str


@dataclass
class Report:
    """What :func:`accelerate` did. Printable."""

    replaced: list[Finding] = field(default_factory=list)
    refused: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, findings in (("replaced", self.replaced), ("refused", self.refused)):
            lines.append(f"{title}: {len(findings)}")
            for f in findings:
                lines.append(f"  {f.name or '(the model)'}: {f.kind}, {f.family}; {f.note}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Choice:
    """The formula that a layer was proved to compute."""

    family: str
    options: Options
    backend: str

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Tensor:
        forward = FAMILIES[self.family].forward
        return forward(module, *args, **{"backend": self.backend, **self.options, **kwargs})


class Accelerated:
    """What a replaced layer's class has before its own; ``forward`` is made for each class."""

    _original: type[nn.Module]
    _accelerated: Choice

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and has no address to be imported from: name its parts instead.
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (self._original,), *made[2:]


def accelerate(model: nn.Module, example_input: Any = None, *, backend: str = "auto") -> Report:
    """Replaces, in place, the layers of a model that compute what ours compute.

    Known are double attention under its several key families, Efficient Attention (Shen et al.),
    the linear attention of diffusion U-Nets (denoising-diffusion-pytorch and others), of latent
    diffusion and Grad-TTS, CoaT's factor attention, and GCNet's global context. A layer that looks
    like one is replaced only if ours gives the same output and the same gradients of inputs and
    parameters as the layer itself: in float64 to a relative error of 1e-9, on random inputs with
    random parameters and, with ``example_input``, on what the layer receives in the model; in
    training and in evaluation; and then in the layer's own dtype, where our error against float64
    may be twice the layer's. What depends on anything else is not seen: give an example. What a
    forward does besides (counters, hooks on children that ours need not call) ends, and a result
    has the memory format of the input.

    Args:
        model: any module. Its parameters, keys, hooks and modes stay as they are.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments of the model.
        backend: of the replaced layers; as in :func:`da_triton.gather`.

    Returns:
        What was replaced, and what was refused and why. Print it.

    Warns:
        UserWarning: nothing was replaced.
    """
    checks.backend(backend)
    candidates = list(_candidates(model))
    calls = _calls(model, [module for _, module, _ in candidates], example_input)
    report = Report()
    for name, module, family in candidates:
        kind = type(module).__name__
        with torch.inference_mode(False):
            choice, error, note = _judge(module, family, calls.get(module, []), backend)
        if choice is not None and example_input is not None and module not in calls:
            note += "; the example does not reach it"
        finding = Finding(name, kind, family.name, error, note)
        if choice is None:
            report.refused.append(finding)
        else:
            _replace(module, choice)
            report.replaced.append(finding)
    if not report.replaced:
        done = sum(isinstance(module, Accelerated) for module in model.modules())
        what = str(report) if candidates else "no layer that looks like double attention"
        if done:
            what += f"; {done} layers are accelerated already: restore the model first"
        warnings.warn(f"accelerate replaced nothing: {what}.", stacklevel=2)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undoes :func:`accelerate`: the layers get their own class back. Returns their names.

    Raises:
        RuntimeError: a layer's class was changed since. The model is then unchanged.

    Warns:
        UserWarning: the model has no accelerated layer.
    """
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, Accelerated)
    }
    for name, module in found.items():
        if type(module) is not CLASSES[module._original]:
            raise RuntimeError(
                f"the class of {name!r} was changed after accelerate, to {type(module).__name__}, "
                "as parametrisations and sharding do. Undo that first."
            )
    for module in found.values():
        module.__class__ = module._original
        del module._accelerated
    names = list(found)
    if not names:
        warnings.warn("restore found no accelerated layer in the model.", stacklevel=2)
    return names


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Family]]]:
    for name, module in model.named_modules():
        if isinstance(module, (Accelerated, DoubleAttention)):
            continue
        for family in FAMILIES.values():
            if family.has_children(module):
                yield name, module, family
                break


def _judge(
    module: nn.Module, family: type[Family], given: list[Call], backend: str
) -> tuple[Choice | None, float, str]:
    """The proved formula or None, its error or that of the nearest one, and a sentence."""
    if "forward" in module.__dict__:
        return None, math.nan, "its forward was replaced on the instance: it may do anything"
    try:
        with seeded([]):
            calls = [Call(family.inputs(module, shape), {}) for shape in SHAPES]
            twin = randomised(module)
        references = [Reference(twin, each) for each in calls]
        error, options = _nearest(references[0], family)
        if error > EXACT:
            return None, error, _explained(references[0], family, error)
        choice = Choice(family.__name__, options, backend)
        change = functools.partial(_replace, choice=choice)
        if not given:
            _check_parameters(module, choice)
        for each in given:
            _check_arguments(module, choice, each)
            references.append(Reference(module, each))
        error = max(reference.error(change) for reference in references)
        if error > EXACT:
            why = f"its gradients, or its answer to the example, differ by {error:.0e}"
            return None, error, why
        for each in given or calls[:1]:
            check_rounding(module, each, change)
    except Exception as problem:
        return None, math.nan, f"the comparison fails: {type(problem).__name__}: {problem}"
    where = "random inputs and on the example" if given else "random inputs"
    return choice, error, f"proved on {where}, relative error {error:.0e}"


def _nearest(reference: Reference, family: type[Family]) -> tuple[float, Options]:
    """The formula whose output is nearest."""
    best: tuple[float, Options] = math.inf, {}
    for options in family.choices(reference.module):
        change = functools.partial(_replace, choice=Choice(family.__name__, options, "eager"))
        with contextlib.suppress(*MISFIT):
            error = reference.error(change, gradients=False)
            if error < best[0]:
                best = error, options
            if error <= EXACT:
                break
    return best


def _explained(reference: Reference, family: type[Family], error: float) -> str:
    """Why no formula is the layer's: a known other meaning, or how far the nearest one is."""
    for meaning, forward in family.other_meanings(reference.module).items():
        for options in family.choices(reference.module):

            def change(twin, forward=forward, options=options):
                twin.forward = lambda *args: forward(twin, *args, **options)

            with contextlib.suppress(*MISFIT):
                if reference.error(change, gradients=False) <= EXACT:
                    return meaning
    if error == math.inf:
        return "no formula of this family fits its children's shapes"
    return f"it computes something else: the nearest formula's relative error is {error:.1e}"


def _check_arguments(module: nn.Module, choice: Choice, call: Call) -> None:
    """Ours takes the arguments that the layer gets in the model."""
    forward = FAMILIES[choice.family].forward
    try:
        inspect.signature(forward).bind(
            module, *call.args, backend=choice.backend, **choice.options, **call.kwargs
        )
    except TypeError as error:
        raise TypeError(
            f"in the model it is called with arguments that ours lacks ({error})"
        ) from None


def _check_parameters(module: nn.Module, choice: Choice) -> None:
    """Without an example: ours has every parameter that the layer's forward has."""
    theirs = list(inspect.signature(type(module).forward).parameters)[2:]  # self, x
    ours = inspect.signature(FAMILIES[choice.family].forward).parameters
    if others := [name for name in theirs if name not in ours]:
        raise TypeError(f"its forward also takes {', '.join(others)}: give an example")


def _calls(
    model: nn.Module, candidates: list[nn.Module], example: Any
) -> dict[nn.Module, list[Call]]:
    """Calls that each candidate gets when the model runs on the example, of every form once.

    Parameters, buffers, modes and generators are afterwards as before.
    """
    calls: dict[nn.Module, list[Call]] = {}
    if example is None or not candidates:
        return calls
    forms = set()

    def keep(module, args, kwargs):
        def form(x):
            return tuple(x.shape[1:]) if isinstance(x, Tensor) else repr(x)

        def two(x):  # a batch of two shows as much as one of many
            return x[:2].detach() if isinstance(x, Tensor) and x.dim() > 1 else x

        key = (module, *map(form, args), *((name, form(x)) for name, x in kwargs.items()))
        if key not in forms:
            forms.add(key)
            few = Call(tuple(map(two, args)), {name: two(x) for name, x in kwargs.items()})
            calls.setdefault(module, []).append(few)

    modes = {module: module.training for module in model.modules()}
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    hooks = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in candidates]
    named = example if isinstance(example, dict) else {}
    args = example if isinstance(example, tuple) else () if named else (example,)
    try:
        model.eval()
        with torch.no_grad(), seeded(devices):
            model(*args, **named)
    finally:
        for hook in hooks:
            hook.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes.items():
            if module.training != training:  # train() may do more than set a flag
                module.train(training)
    return calls


def _replace(module: Any, choice: Choice) -> None:
    module.__class__ = _class(type(module))
    module._accelerated = choice


def _class(original: type[nn.Module]) -> Any:
    if original not in CLASSES:

        @functools.wraps(original.forward)  # whose signature exporters read
        def forward(self, *args, **kwargs):
            return self._accelerated(self, *args, **kwargs)

        name = f"Accelerated{original.__name__}"
        members = {"forward": forward, "_original": original}
        CLASSES[original] = type(name, (Accelerated, original), members)
    return CLASSES[original]


def _blank(original: type[nn.Module]) -> nn.Module:
    """What unpickling and deepcopy fill with the state."""
    made = _class(original)
    return made.__new__(made)
