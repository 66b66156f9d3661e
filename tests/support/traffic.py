"""Counts bytes and operations of interpreted kernels: exact, repeatable, no GPU.

``count()`` yields a list that grows by one ``Traffic`` per launch. Requested bytes count every lane
that its mask lets through, in every program, every time: what the kernel asks of the memory system,
caches aside. Sectors are 32-byte units touched by a load, so badly coalesced or unaligned loads
show as sectors × 32 over requested bytes. PyTorch's own operations between the kernels, views and
allocations aside, count as launches that read their inputs and write their outputs once.
"""

import contextlib
import dataclasses

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import triton_internals


@dataclasses.dataclass
class Traffic:
    kernel: str
    programs: int = 0
    load_bytes: int = 0
    store_bytes: int = 0
    load_sectors: int = 0
    distinct_bytes: int = 0  # of sectors that were loaded or stored at least once
    dot_flop: int = 0
    atomics: int = 0

    @property
    def bytes(self):
        return self.load_bytes + self.store_bytes


@contextlib.contextmanager
def count():
    launches: list[Traffic] = []
    current = None
    loaded: list[np.ndarray] = []  # sectors, by operation
    stored: list[np.ndarray] = []

    def packed_cols(pointers, mask):
        mask = np.broadcast_to(getattr(mask, "data", mask), pointers.data.shape)
        return pointers.data[mask], pointers.get_element_ty().primitive_bitwidth // 8

    def touch(kept, addresses):
        sectors = np.unique(addresses >> np.uint64(5))
        kept.append(sectors)
        return sectors.size

    def load(original, self, pointers, mask, *args, **kwargs):
        addresses, size = packed_cols(pointers, mask)
        current.load_bytes += addresses.size * size
        current.load_sectors += touch(loaded, addresses)
        return original(self, pointers, mask, *args, **kwargs)

    def store(original, self, pointers, value, mask, *args, **kwargs):
        addresses, size = packed_cols(pointers, mask)
        current.store_bytes += addresses.size * size
        touch(stored, addresses)
        return original(self, pointers, value, mask, *args, **kwargs)

    def atomic(original, self, *args, **kwargs):
        current.atomics += 1
        return original(self, *args, **kwargs)

    def dot(original, self, a, b, *args, **kwargs):
        current.dot_flop += 2 * a.data.size * b.data.shape[-1]
        return original(self, a, b, *args, **kwargs)

    def program(original, self, *args):
        current.programs += 1
        return original(self, *args)

    def launch(original, self, *args, **kwargs):
        nonlocal current
        current = Traffic(self.fn.__name__)
        launches.append(current)
        try:
            return original(self, *args, **kwargs)
        finally:
            for kept in (loaded, stored):
                if kept:
                    current.distinct_bytes += 32 * np.unique(np.concatenate(kept)).size
                    kept.clear()
            current = None

    class Between(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if current is None and not op.is_view and "empty" not in op._schema.name:
                read, written = map(_bytes, ((args, kwargs), out))
                distinct = read + written
                launches.append(
                    Traffic(str(op), load_bytes=read, store_bytes=written, distinct_bytes=distinct)
                )
            return out

    hooks = {"load": load, "store": store, "atomic": atomic, "dot": dot, "program": program}
    with triton_internals.around(**hooks, grid=launch), Between():
        yield launches


def _bytes(tree):
    tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
