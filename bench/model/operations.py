"""PyTorch's own operations in a block: recorded on meta tensors, and priced by tiles and bytes.

A GEMM of the vendor's library is modelled by its tiles and waves, at nine tenths of the tensor
rate; every other operation by the bytes that it moves. How much slower a GEMM is whose rows are
aligned to less than 16 bytes is a guess.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.codegen import compile
from bench.codegen.compile import Launch

from .machine import GPU

VIEWS = {
    "view", "_unsafe_view", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze", "split",
    "split_with_sizes", "slice", "select", "empty", "new_empty", "empty_like", "detach", "alias",
    "unflatten", "flatten", "as_strided", "reshape", "empty_strided", "new_empty_strided",
}  # fmt: skip
GEMMS = {"mm", "addmm", "bmm", "baddbmm", "baddbmm_", "addmm_", "linear"}
GEMM_TILES = (
    (128, 256), (256, 128), (128, 128), (64, 256), (256, 64), (128, 64), (64, 128), (64, 64),
)  # fmt: skip
TILE_SHARE, TILE_START = 0.9, 1200  # of the tensor rate; cycles to fill and drain a tile
MULTICAST = 0.67  # of a tile's operands are loaded, since clusters share them
SPLIT_K = 512  # the least k of a part where a product is split along k
SHARES = {16: 1.0, 8: 0.55, 4: 0.4, 2: 0.25}  # by the alignment of rows in bytes
WRITTEN_LATER = 4e6  # bytes of a result that is still in the L2 when it is read


class Operation(NamedTuple):
    name: str
    inputs: tuple[Tensor, ...]
    output: Tensor


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[Any]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in VIEWS and isinstance(result, Tensor):
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.found.append(Operation(name, tuple(tensors), result))
        return result


@contextlib.contextmanager
def recording() -> Iterator[list[Launch | Operation]]:
    """Collects launches and operations in the order in which they would run."""
    with compile.record() as found, _Operations(found):
        yield found  # type: ignore[misc]


class Cache:
    """Which tensors the L2 still holds: whole ones, the least recently used go first."""

    def __init__(self, size: float) -> None:
        self.size = size
        self.held: OrderedDict[int, float] = OrderedDict()

    def reads(self, t: Tensor) -> float:
        """Bytes of a tensor that come from memory."""
        key = t.untyped_storage()._cdata
        missing = max(0.0, bytes_of(t) - self.held.pop(key, 0.0))
        self.held[key] = min(bytes_of(t), self.size)
        while sum(self.held.values()) > self.size and len(self.held) > 1:
            self.held.popitem(last=False)
        return missing

    def writes(self, t: Tensor) -> float:
        """Bytes of a tensor that go to memory."""
        self.reads(t)
        return bytes_of(t) if bytes_of(t) > WRITTEN_LATER else 0.0


def bytes_of(t: Tensor) -> float:
    sizes = (n for n, step in zip(t.shape, t.stride(), strict=True) if step)
    return float(t.element_size() * math.prod(sizes))


class Priced(NamedTuple):
    name: str
    seconds: float
    busy: dict[str, float]  # seconds of each resource


def price(op: Operation, cache: Cache, gpu: GPU) -> Priced:
    """The modelled time of an operation, without the gap before it."""
    dram = sum(map(cache.reads, op.inputs)) + cache.writes(op.output)
    busy = {"DRAM": dram / gpu.bandwidth}
    name = f"aten.{op.name}"
    if op.name in GEMMS:
        a, b = op.inputs[-2:]
        sizes = a.shape[0] if a.dim() == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1]
        aligned = min(map(alignment, (a, b, op.output)))
        name = f"{op.name} {'×'.join(map(str, sizes))}"
        busy["tensor"] = gemm_seconds(*sizes, aligned, gpu)
    else:
        moved = sum(map(bytes_of, (*op.inputs, op.output)))
        busy["L2"] = moved / gpu.l2_rate
    return Priced(name, max(busy.values()), busy)


def alignment(t: Tensor) -> int:
    """Bytes to which a matrix's rows are aligned, 16 at most."""
    if t.dim() < 2:
        return 16
    steps = [step for n, step in zip(t.shape, t.stride(), strict=True) if n > 1 and step > 1]
    places = [step * t.element_size() for step in (*steps, t.storage_offset())]
    return next((a for a in (16, 8, 4) if all(place % a == 0 for place in places)), 2)


def gemm_seconds(batch: int, m: int, n: int, k: int, aligned: int, gpu: GPU) -> float:
    """``batch`` products ``(m, k) × (k, n)`` of half precision, with the best tile."""
    cycles, requested = math.inf, math.inf
    for rows, columns in GEMM_TILES:
        tiles = batch * -(-m // rows) * -(-n // columns)
        operands = tiles * (rows + columns) * k * 2 * MULTICAST
        requested = min(requested, operands + batch * m * n * 2)
        shared = (rows + columns) * 2 * 2 / 128  # per k: filled and read once
        tile = k * max(rows * columns / (4 * gpu.tensor) / TILE_SHARE, shared)
        parts, start = 1, TILE_START
        if tiles < gpu.num_sms:
            parts = min(gpu.num_sms // tiles, max(1, k // SPLIT_K))
            start *= 2 if parts > 1 else 1
        waves = -(-tiles * parts // gpu.num_sms)
        cycles = min(cycles, waves * (tile / parts + start))
    flop = 2 * batch * m * n * k
    return max(
        cycles / gpu.clock / SHARES[aligned], flop / gpu.library, requested / gpu.l2_rate
    )  # fmt: skip
