"""Replaces a layer's forward by a formula, in place: the layer's class becomes a subclass of it."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .patterns import PATTERNS, Options

CLASSES: dict[type[nn.Module], type] = {}


@dataclass(frozen=True)
class Match:
    """A formula that a layer may compute.

    ``frames``: the axis of x over which it runs frame by frame; None for all at once.
    """

    family: str
    options: Options
    backend: str
    frames: int | None = None

    def __call__(self, module: Any, x: Tensor, *args: Any) -> Tensor:
        forward = functools.partial(
            PATTERNS[self.family].forward, backend=self.backend, **self.options
        )
        if self.frames is None:
            return forward(module, x, *args)
        batch, frames = x.shape[0], x.shape[self.frames]
        out = forward(module, x.movedim(self.frames, 1).flatten(0, 1), *args)
        return out.unflatten(0, (batch, frames)).movedim(1, self.frames)


class Accelerated:
    """First base of a replaced layer's class; ``forward`` is made for each class."""

    _original: type[nn.Module]
    _accelerated: Match

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made here and has no address to be imported from: name its parts instead.
        made: Any = super().__reduce_ex__(protocol)
        return _blank, (self._original,), *made[2:]


def is_overridden(module: Any) -> bool:
    """Whether another forward than the class's own was set on the instance; a hook of the
    accelerate library leaves the class's own there when it is removed."""
    forward = module.__dict__.get("forward")
    own = getattr(forward, "__func__", None) is type(module).forward
    return forward is not None and not (own and forward.__self__ is module)


def replace(module: Any, choice: Match) -> None:
    module.__dict__.pop("forward", None)
    module.__class__ = accelerated(type(module))
    module._accelerated = choice


def has_another_class(module: Any) -> bool:
    """Whether a replaced layer's class was changed again since."""
    return type(module) is not CLASSES[module._original]


def undo(module: Any) -> None:
    module.__dict__.pop("forward", None)
    module.__class__ = module._original
    del module._accelerated


def accelerated(original: type[nn.Module]) -> Any:
    """The subclass of a layer's class that computes the layer's formula."""
    if original not in CLASSES:

        @functools.wraps(original.forward)  # whose signature exporters read
        def forward(self, *args, **kwargs):
            choice = self._accelerated
            count = PATTERNS[choice.family].arguments
            if kwargs or len(args) != count:
                taken, others = split(original.forward, count, args, kwargs)
                if others:
                    raise TypeError(
                        f"accelerate replaced this {original.__name__} by a formula without "
                        f"{', '.join(others)}: leave the argument out, or call restore(model). "
                        "With an example input in which the layer gets the argument, accelerate "
                        "leaves the layer as it is."
                    )
                args = tuple(taken)
            return choice(self, *args)

        name = f"Accelerated{original.__name__}"
        members = {"forward": forward, "_original": original}
        CLASSES[original] = type(name, (Accelerated, original), members)
    return CLASSES[original]


def split(
    forward: Callable[..., Tensor], count: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments of a layer's forward: the first ``count``, which its formula takes, in order, and,
    by name, others that differ from their default."""
    signature = inspect.signature(forward)
    given = signature.bind(None, *args, **kwargs).arguments
    names = list(signature.parameters)[1:]
    others: dict[str, Any] = {}
    for name in names[count:]:
        parameter = signature.parameters[name]
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            others |= given.get(name, {})
        elif name in given and not _same(given[name], parameter.default):
            others[name] = given[name]
    return [given[name] for name in names[:count] if name in given], others


def _same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    return isinstance(value, (bool, int, float, str)) and value == default


def _blank(original: type[nn.Module]) -> nn.Module:
    """An empty replacement that unpickling and deepcopy fill with the state."""
    made = accelerated(original)
    return made.__new__(made)
