"""The launches that a call makes, recorded on meta tensors with the package's own launchers."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch

from bench.codegen import compiler
from da_triton.kernels import distribute, gather
from da_triton.ops.triton import routes
from da_triton.planning.planner import Route
from da_triton.precision import matmul_precision
from da_triton.runtime import launch, tiles

# Positions of a 28×28 map, of a 14×14 map (rows not a multiple of 16), and of either in
# channels-last memory.
LAYOUTS = (("nchw", 784), ("nchw", 196), ("nhwc", 196))
ODD = ("nchw", 49)  # a 7×7 map: every load is of one element
PROCESSORS = 132


@dataclasses.dataclass(frozen=True)
class Variant:
    """What a launch depends on beside sizes."""

    layout: str = "nchw"
    length: int = 196
    dtype: torch.dtype = torch.bfloat16
    masked: bool = False
    keep_v: bool = False  # forward writes V, backward reads it
    softmax: bool = True
    extra: bool = False  # gather tokens beside the positions; of the core
    tf32: bool = False  # PyTorch's switch; of the core
    heads: int = 1  # of the block

    @property
    def title(self) -> str:
        words = [self.layout, f"L={self.length}", str(self.dtype)[6:], self.flags]
        return " ".join(filter(None, words))

    @property
    def flags(self) -> str:
        """The switches that are not as in a plain call, by name."""
        names = [name for name in ("masked", "keep_v", "extra", "tf32") if getattr(self, name)]
        names += [] if self.softmax else ["no_softmax"]
        names += [f"heads={self.heads}"] if self.heads > 1 else []
        return " ".join(names)


@contextlib.contextmanager
def on(arch: str) -> Iterator[None]:
    """Launchers choose as on a GPU of this architecture."""
    with (
        launch.forgetting(),
        mock.patch.object(tiles, "architecture", return_value=arch),
        mock.patch.object(launch, "processors", return_value=PROCESSORS),
    ):
        yield


def core(m: int, n: int, v: Variant, batch: int = 64) -> list[compiler.Launch]:
    """One forward and backward pass of the core with m features and n maps."""

    def maps(channels):
        if v.layout == "nchw":
            return _empty(v, batch, 1, channels, v.length)
        return _empty(v, batch, v.length, 1, channels).permute(0, 2, 3, 1)

    a, b, logits, dz = maps(m), maps(n), maps(n), maps(m)
    keep = _keep(v, batch)
    sources = [(a, b, keep)]
    if v.extra:
        sources.append((a[..., :4], b[..., :4], None))
    with matmul_precision("tf32" if v.tf32 else "ieee"), compiler.record() as launches:
        g, lse = gather.gather_forward(sources, 1.0)
        distribute.distribute_forward(g, logits, 1.0, v.softmax, 1.0)
        dg, _ = distribute.distribute_backward(dz, g, logits, 1.0, v.softmax, 1.0, True, True)
        gather.gather_backward(dg, a, b, keep, g, lse, None, 1.0, True, True)
    return launches


def of_block(sizes: tuple[int, int, int, int], route: Route, v: Variant) -> list[compiler.Launch]:
    """One training step of the block; ``sizes``: batch, channels, c_m, c_n."""
    batch, channels, c_m, c_n = sizes
    x = _empty(v, batch, channels, v.length)
    if v.layout == "nhwc":
        x = _empty(v, batch, v.length, channels).transpose(1, 2)
    w = routes.Weights(
        _empty(v, c_m, channels), _empty(v, c_m), _empty(v, c_n, channels),
        _empty(v, c_n, channels), _empty(v, c_n), _empty(v, channels, c_m), _empty(v, channels),
    )  # fmt: skip
    options = routes.Options(v.heads, 1.0, 1.0, 1.0, v.softmax, True)
    keep = _keep(v, batch)
    with compiler.record() as launches:
        _, lse, g, kept = routes.forward(x, w, keep, options, route, v.keep_v)
        routes.backward(torch.empty_like(x), x, w, keep, lse, g, kept, options, route)
    return launches


def _empty(v, *shape):
    return torch.empty(shape, dtype=v.dtype, device="meta")


def _keep(v, batch):
    shape = (batch, v.length)
    return torch.empty(shape, dtype=torch.uint8, device="meta") if v.masked else None
