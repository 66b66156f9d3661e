"""Peak memory of a call at full size, on meta tensors."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Peak(TorchDispatchMode):
    """``bytes``: most that was held at once by storages that operations made under this mode."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self._before = set()
        self._live = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        self._before |= given - set(self._live)
        out = op(*args, **(kwargs or {}))
        for t in _tensors(out):
            storage = t.untyped_storage()
            if storage._cdata not in self._before:
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: v for k, v in self._live.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._live.values()))
        return out


def _tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
