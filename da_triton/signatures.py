"""Results that calls of one signature share: computed by the first, looked up by the others.

A signature is all that checks, plans and launches depend on: for each tensor its shape, strides,
dtype, device and whether it wants a gradient; options; the state of autograd and autocast. It holds
no tensor. What is looked up is used only where nothing but autograd sees a call: whatever records,
transforms or counts operations goes the long way, which is the same functions without a table.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import tracing

LIMIT = 1024  # entries of one table; the oldest go first
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))

_tables: list["Table"] = []


class Table:
    """Values by signature and options. Shared by threads.

    Not a dict itself: the compiler would compile again whenever one changes that it has seen.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Any] = {}
        self._lock = threading.Lock()
        _tables.append(self)

    def add(self, key: Any, found: Any) -> None:
        """Adds a value; does nothing without a key."""
        if key is None:
            return
        with self._lock:
            self.found[key] = found
            while len(self.found) > LIMIT:
                del self.found[next(iter(self.found))]

    def clear(self) -> None:
        with self._lock:
            self.found.clear()

    def find(self, tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[Any, Any]:
        """The key of a call on these tensors (some may be None), and the value stored for it.

        The key is None where the call is observed, and for anything but plain tensors and hashable
        options. The device of the first tensor says which autocast applies.
        """
        if tracing.watched() or not PLAIN.issuperset(map(type, tensors)):
            return None, None
        try:
            facts: list[Any] = []
            for t in tensors:
                if t is None:
                    facts.append(None)
                elif t.is_neg() or t.layout is not torch.strided:
                    return None, None  # the dispatcher changes signs; a sparse tensor is an error
                else:
                    facts.append((t.shape, t.stride(), t.dtype, t.device, t.requires_grad))
            device = tensors[0].device.type
            if device == "meta":
                return None, None
            autocast = tracing.autocast_dtype(device)
            # 1, 1.0 and True are one key, and not always one option.
            kinds = tuple(map(type, options))
            key = tuple(facts), options, kinds, torch.is_grad_enabled(), autocast
            return key, self.found.get(key)
        except (AttributeError, TypeError, RuntimeError, NotImplementedError):
            return None, None  # nested tensors have no strides


def forget() -> None:
    """Prepares every call again, after a change of what plans depend on (a table of tiles)."""
    for table in _tables:
        table.clear()
