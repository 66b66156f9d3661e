"""What calls of one signature share: the first finds it out, the others look it up.

A signature is all that checks, plans and launches depend on, of each tensor the shape, strides,
dtype, device and whether it wants a gradient, and the state of autograd and autocast. It holds no
tensor. What is looked up is used only where nothing but autograd sees a call: whatever records,
transforms or counts operations goes the long way, which is the same functions without a table.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tracing

LIMIT = 1024  # signatures of one function; the oldest go first
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

_tables: list["Table"] = []


class Table:
    """Prepared calls by signature and options."""

    def __init__(self) -> None:
        self._calls: dict[Any, Any] = {}
        self._lock = threading.Lock()
        _tables.append(self)

    def get(self, key: Any) -> Any:
        """What was found for a key; None for a new one, and without a key.

        The compiler, which has no key, must not see the dict: it would guard on what that holds.
        """
        return None if key is None else self._calls.get(key)

    def add(self, key: Any, call: Any) -> None:
        """Nothing without a key."""
        if key is None:
            return
        with self._lock:
            self._calls[key] = call
            while len(self._calls) > LIMIT:
                del self._calls[next(iter(self._calls))]

    def clear(self) -> None:
        with self._lock:
            self._calls.clear()

    def __len__(self) -> int:
        return len(self._calls)


def forget() -> None:
    """Prepares every call again, after a change of what plans depend on (a table of tiles)."""
    for table in _tables:
        table.clear()


def key_of(tensors: Sequence[Any], options: tuple[Any, ...]) -> Any:
    """The signature of a call on these tensors (or None), the first of them on its device; or None
    where the call is watched, or not one of plain tensors and hashable options."""
    if tracing.watched() or not PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        facts: list[Any] = []
        for t in tensors:
            if t is None:
                facts.append(None)
            elif t.is_neg():  # the dispatcher changes the sign of what is read
                return None
            else:
                facts.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad))
        autocast = tracing.autocast_dtype(tensors[0].device.type)
        # 1, 1.0 and True are one key, and not always one option.
        kinds = tuple(map(type, options))
        key = tuple(facts), options, kinds, torch.is_grad_enabled(), autocast
        hash(key)
    except (AttributeError, TypeError, RuntimeError, NotImplementedError):
        return None  # sparse and nested tensors have no strides
    return key
