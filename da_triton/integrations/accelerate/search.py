"""``accelerate``: finds layers that are double attention under any name, proves it, replaces them.

A replaced layer stays the same object with the same parameters, keys, hooks and attributes; its
class becomes a subclass of its own class with another ``forward``. ``restore`` gives the class
back. Nothing else of the model changes, and no class is patched.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ... import checks
from ...modules import DoubleAttention
from .examples import calls_in
from .patterns import PATTERNS, Pattern
from .replacement import (
    Accelerated,
    Match,
    has_another_class,
    is_overridden,
    replace,
    split,
    undo,
)
from .verify import EXACT, Call, Reference, UnprovableError, device_of, dtype_of, randomised, seeded

SHAPES = ((5, 6), (7, 9))
LIMITS = (3, 5)
MISFIT = (ValueError, TypeError, RuntimeError)  # what shapes raise that do not fit a formula
HOOKED = "remove_hook_from_submodules(model) of accelerate.hooks"


@dataclasses.dataclass(frozen=True)
class Result:
    """One layer: its name in the model, its class, the pattern that it resembles.

    ``error``: the largest relative error in float64 of the proof, or of the nearest formula; NaN
    where none was computed.
    ``note``: how it was proved, or why it was skipped.
    """

    name: str
    kind: str
    family: str
    error: float
    note: str


@dataclasses.dataclass
class Report:
    """Report of :func:`accelerate`. Printable."""

    replaced: list[Result] = dataclasses.field(default_factory=list)
    skipped: list[Result] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, findings in (("replaced", self.replaced), ("skipped", self.skipped)):
            lines.append(f"{title}: {len(findings)}")
            for f in findings:
                lines.append(f"  {f.name or '(the model)'}: {f.kind}, {f.family}; {f.note}")
        return "\n".join(lines)


def accelerate(
    model: nn.Module,
    example_input: Any = None,
    *,
    backend: str = "auto",
    progress: bool | Callable[[int, int, Result], Any] = False,
) -> Report:
    """Replaces, in place, the layers of a model that compute what da_triton computes.

    It recognises double attention under its several key families, Efficient Attention (Shen et
    al.), the linear attention of diffusion U-Nets (denoising-diffusion-pytorch and others), also
    frame by frame, of latent diffusion and Grad-TTS, linear attention on tokens (``nn.Linear``
    layers named ``to_q``, ``to_k``, ``to_v``, or ``to_qkv``, ``qkv``, or ``query``, ``key``,
    ``value``), CoaT's factor attention, GCNet's global context, and OCR's spatial gather. A layer
    that looks like one is replaced only if da_triton gives the same output and the same gradients
    of inputs and parameters as the layer itself: in float64 to a relative error of 1e-9, on random
    inputs with random parameters and, with ``example_input``, on what the layer receives in the
    model; in training and in evaluation; and then in the layer's own dtype, where the error against
    float64 may be twice the layer's. A layer that computes in float32 inside is compared in float64
    throughout. Behaviour that depends on anything else is not detected: give an example. Side
    effects of the original forward (counters, hooks on children that need not be called) are lost,
    and a result has the memory format of the input.

    A replaced layer takes the arguments that its formula has. Another one may be given at the
    default that the original forward has for it; any other value raises a TypeError.

    Args:
        model: any module. Its parameters, keys, hooks and modes stay as they are.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments of the model.
        backend: of the replaced layers; as in :func:`da_triton.gather`.
        progress: True prints a line per layer to stderr. A function is called after each layer
            with the number of layers that are done, the number of all, and the finding.

    Returns:
        The layers replaced, and those skipped with the reason. Print it.

    Warns:
        UserWarning: nothing was replaced.
    """
    checks.backend(backend)
    candidates = list(_candidates(model))
    obstacles = [_obstacle(module) for _, module, _ in candidates]
    provable = [c[1] for c, obstacle in zip(candidates, obstacles, strict=True) if not obstacle]
    calls = calls_in(model, provable, example_input)
    report = Report()
    known: dict[type[nn.Module], Match | str] = {}
    for (name, module, family), obstacle in zip(candidates, obstacles, strict=True):
        kind = type(module)
        given = calls.pop(module, [])
        choice, error, note = None, math.nan, obstacle
        if not obstacle:
            with torch.inference_mode(False), seeded([]):
                choice, error, note = _judge(module, family, given, backend, known.get(kind))
        known[kind] = choice or note
        if choice is not None and example_input is not None and not given:
            note += "; the example does not reach it"
        finding = Result(name, kind.__name__, family.name, error, note)
        if choice is None:
            report.skipped.append(finding)
        else:
            replace(module, choice)
            report.replaced.append(finding)
        _tell(progress, len(report.replaced) + len(report.skipped), len(candidates), finding)
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
        RuntimeError: a layer's class or forward was changed since. The model is then unchanged.

    Warns:
        UserWarning: the model has no accelerated layer.
    """
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, Accelerated)
    }
    for name, module in found.items():
        if has_another_class(module):
            raise RuntimeError(
                f"the class of {name!r} was changed after accelerate, to {type(module).__name__}, "
                "as parametrisations and sharding do. Undo that first."
            )
        if is_overridden(module):
            raise RuntimeError(
                f"the forward of {name!r} was replaced on the instance after accelerate, as "
                "offloading hooks do. Undo that first."
            )
    for module in found.values():
        undo(module)
    names = list(found)
    if not names:
        warnings.warn("restore found no accelerated layer in the model.", stacklevel=2)
    return names


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, type[Pattern]]]:
    for name, module in model.named_modules():
        if isinstance(module, (Accelerated, DoubleAttention)):
            continue
        for family in PATTERNS.values():
            if family.resembles(module):
                yield name, module, family
                break


def _tell(progress: Any, done: int, count: int, finding: Result) -> None:
    if callable(progress):
        progress(done, count, finding)
    elif progress:
        print(f"accelerate {done}/{count}: {finding.name}: {finding.note}", file=sys.stderr)


def _obstacle(module: nn.Module) -> str:
    """Why the layer cannot be examined; empty where it can."""
    hooked = any(hasattr(m, "_hf_hook") for m in module.modules())
    if any(x.is_meta for x in itertools.chain(module.parameters(), module.buffers())):
        first = f"call {HOOKED}" if hooked else "load the model onto a CPU or a GPU"
        return (
            "its weights are on the meta device (offloaded, or not loaded yet), where nothing can "
            f"be compared: {first}, then accelerate, then offload again"
        )
    if hasattr(module, "_hf_hook"):
        return (
            "its forward was replaced on the instance by a hook of the accelerate library "
            f"(device_map or offloading): call {HOOKED}, then accelerate, then dispatch_model again"
        )
    if is_overridden(module):
        return "its forward is overridden on the instance"
    return ""


def _judge(
    module: nn.Module,
    family: type[Pattern],
    given: list[Call],
    backend: str,
    known: Match | str | None,
) -> tuple[Match | None, float, str]:
    """The proved formula or None, its error or that of the nearest one, and a sentence.

    ``known``: the formula of the layer of this class before it, or why that layer has none. It is
    tried first.
    """
    try:
        twin = randomised(module)
        references = _random_references(twin, family, given)
        if isinstance(known, str) and _means(references[0], family, known):
            return None, math.nan, known
        error, choice = _nearest(references[0], family, backend, known)
        if error > EXACT:
            return None, error, _explained(references[0], family, error)
        if _takes(twin, family.beyond(twin)):
            return None, error, "it also takes arguments of different sizes: its formula does not"
        if not given:
            _check_parameters(module, family)
        own = [_own_reference(module, family, call) for call in given]
        if not given:
            own = [Reference(module, references[0].call.to(dtype_of(module)))]
        change = functools.partial(replace, choice=choice)
        error = max(reference.error(change, enough=EXACT) for reference in (*references, *own))
        if error > EXACT:
            why = f"its gradients, or its answer to the example, differ by {error:.0e}"
            return None, error, why
        for reference in own:
            reference.check_rounding(change)
        if dtype_of(module, own[0].call) == torch.float32:
            references[0].check_autocast(change)
    except Exception as problem:
        return None, math.nan, f"the comparison fails: {type(problem).__name__}: {problem}"
    where = "random inputs and on the example" if given else "random inputs"
    frames = "" if choice.frames is None else " frame by frame"
    return choice, error, f"proved{frames} on {where}, relative error {error:.0e}"


def _random_references(
    twin: nn.Module, family: type[Pattern], given: list[Call]
) -> list[Reference]:
    """The twin on random inputs of two shapes: the family's, or, where the layer takes others,
    shapes like those of the first given call."""
    device = device_of(twin, *given)
    random = [Call(family.inputs(twin, shape), {}).of(lambda x: x.to(device)) for shape in SHAPES]
    if not given or given[0].axes == random[0].axes:
        try:
            return [Reference(twin, call) for call in random]
        except UnprovableError:
            raise
        except Exception as problem:
            if not given:
                shape = tuple(random[0].tensors[0].shape)
                raise ValueError(
                    f"its forward does not take a random input of shape {shape}: give accelerate "
                    f"an example input of the model ({type(problem).__name__}: {problem})"
                ) from problem
    _check_arguments(twin, family, given[0])
    references = []
    for call in (given[0].few().random(limit) for limit in LIMITS):
        with contextlib.suppress(Exception):
            references.append(Reference(twin, call))
    return references or [Reference(twin, given[0].random(None))]


def _own_reference(module: nn.Module, family: type[Pattern], call: Call) -> Reference:
    """The module on a given call: a batch of two, or all where it does not take two."""
    _check_arguments(module, family, call)
    with contextlib.suppress(Exception):
        return Reference(module, call.few())
    return Reference(module, call)


def _takes(module: nn.Module, args: tuple[Any, ...]) -> bool:
    if args:
        with contextlib.suppress(Exception):
            Reference(module, Call(args, {}))
            return True
    return False


def _choices(reference: Reference, family: type[Pattern], backend: str) -> Iterator[Match]:
    """Formulas that the module may compute, also on frames if its input has an axis more."""
    usual = Call(family.inputs(reference.module, SHAPES[0]), {}).axes
    axes = (2, 1, None) if reference.call.axes == usual + 1 else (None,)
    for frames, options in itertools.product(axes, family.choices(reference.module)):
        yield Match(family.__name__, options, backend, frames)


def _nearest(
    reference: Reference, family: type[Pattern], backend: str, known: Match | str | None
) -> tuple[float, Match]:
    """The formula whose output is nearest, and its error; ``known`` is tried first."""
    best = math.inf, Match(family.__name__, {}, backend)
    for choice in sorted(_choices(reference, family, backend), key=lambda c: c != known):
        change = functools.partial(replace, choice=dataclasses.replace(choice, backend="eager"))
        with contextlib.suppress(*MISFIT):
            error = reference.error(change, gradients=False, enough=best[0])
            if error < best[0]:
                best = error, choice
            if error <= EXACT:
                break
    return best


def _means(reference: Reference, family: type[Pattern], meaning: str) -> bool:
    """Whether the layer computes what the pattern's ``known_wrong_variants`` has by this name."""
    forward = family.known_wrong_variants(reference.module).get(meaning)
    if forward is None:
        return False
    names = inspect.signature(forward).parameters
    tried = []
    for choice in family.choices(reference.module):
        options = {name: value for name, value in choice.items() if name in names}
        if options in tried:
            continue
        tried.append(options)

        def change(twin, options=options):
            twin.forward = lambda *args: forward(twin, *args, **options)

        with contextlib.suppress(*MISFIT):
            if reference.error(change, gradients=False, enough=EXACT) <= EXACT:
                return True
    return False


def _explained(reference: Reference, family: type[Pattern], error: float) -> str:
    """Why no formula matches: a known wrong variant, or how far the nearest one is."""
    for meaning in family.known_wrong_variants(reference.module):
        if _means(reference, family, meaning):
            return meaning
    if error == math.inf:
        return "no formula of this family fits its shapes"
    rounded = "; it may round to float32 in compiled or scripted code" if error < 1e-6 else ""
    return (
        f"it computes something else: the nearest formula's relative error is {error:.1e}{rounded}"
    )


def _check_arguments(module: nn.Module, family: type[Pattern], call: Call) -> None:
    """With an example: the formula takes the arguments that the layer gets in the model."""
    _, others = split(type(module).forward, family.arguments, call.args, call.kwargs)
    if others:
        raise TypeError(f"in the model it gets {', '.join(others)}, which the formula lacks")


def _check_parameters(module: nn.Module, family: type[Pattern]) -> None:
    """Without an example: the formula has every parameter that the layer's forward has."""
    theirs = list(inspect.signature(type(module).forward).parameters)[1:]
    if others := theirs[family.arguments :]:
        raise TypeError(f"its forward also takes {', '.join(others)}: give an example")
