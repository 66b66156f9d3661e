"""Whole networks with the block, eager block against ours: a training step and inference.

    resnet50   torchvision's, with five blocks after the residual blocks that the paper chose:
               1 and 3 of conv3, 1, 3 and 5 of conv4; c_m = c_n = C/2
    yolov8n    ultralytics', with a block after the backbone's last stage; c_m = c_n = C/2

Each is also timed without the block, so that the block's share of the added time can be told. All
variants have the same weights, and must give the same answers, before anything is timed.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from da_triton import DoubleAttention
from da_triton.integrations.resnet import paper_places

from .formulations import EagerDoubleAttention
from .measure import (
    CONTEXT_LOST,
    OK,
    OUT_OF_TIME,
    WITHOUT,
    Bench,
    Row,
    compare,
    cudnn_benchmark,
    describe,
    note_unused_kernels,
    peak_bytes,
    usable,
)
from .problems import FORWARD, STEP
from .providers import CHANNELS_LAST, NCHW

Make = Callable[[int], nn.Module]
# Relative RMS of the block's effect on outputs: many layers amplify what single layers round.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
MODES = {"fwd": FORWARD, "fwd_bwd": STEP}


@dataclass(frozen=True)
class Network:
    """``make`` builds it with blocks, or without where the argument is None."""

    name: str
    make: Callable[[Make | None], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, int, int, int]
    cpu_shape: tuple[int, int, int, int]

    def input_shape(self, device: torch.device) -> tuple[int, int, int, int]:
        return self.cpu_shape if device.type == "cpu" else self.shape


class NearIdentity(nn.Module):
    """A block behind a normalisation, so that deep networks with random weights stay finite."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self.block = block
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(x))


def resnet50(block: Make | None) -> nn.Module:
    from torchvision.models import resnet50 as build

    network: Any = build(weights=None)
    if block is None:
        return network
    for name in paper_places(network):
        residual = network.get_submodule(name)
        channels = residual.bn3.num_features
        both = nn.Sequential(residual, NearIdentity(block(channels), channels))
        network.set_submodule(name, both)
    return network


def yolov8(block: Make | None) -> nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    network: Any = DetectionModel("yolov8n.yaml", verbose=False)
    network.args = get_cfg()
    if block is not None:
        last = network.model[9]  # SPPF
        channels = last.cv2.conv.out_channels
        both: Any = nn.Sequential(last, NearIdentity(block(channels), channels))
        both.i, both.f, both.type = last.i, last.f, last.type
        network.model[9] = both
    return network


def _classification(network: nn.Module, x: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device) % 1000
    return nn.functional.cross_entropy(network(x).float(), labels)


def _detection(network: nn.Module, x: Tensor) -> Tensor:
    """The library's own loss, with one box in each image."""
    batch = x.shape[0]
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.3]], device=x.device).expand(batch, -1)
    given = {
        "img": x,
        "cls": torch.zeros(batch, 1, device=x.device),
        "bboxes": boxes,
        "batch_idx": torch.arange(batch, device=x.device, dtype=torch.float32),
    }
    loss, _ = network(given)
    return loss.sum()


NETWORKS = {
    n.name: n
    for n in (
        Network("resnet50", resnet50, _classification, (64, 3, 224, 224), (2, 3, 224, 224)),
        Network("yolov8n", yolov8, _detection, (16, 3, 640, 640), (1, 3, 320, 320)),
    )
}


def eager_block(channels: int) -> nn.Module:
    return EagerDoubleAttention(channels, channels // 2, channels // 2)


def our_block(channels: int, backend: str) -> nn.Module:
    return DoubleAttention(channels, residual=True, backend=backend)


@dataclass(frozen=True)
class Variant:
    """What is timed: with which block, in which memory format, compiled or not."""

    name: str
    block: Make | None
    channels_last: bool = False
    compiled: bool = False

    @property
    def layout(self) -> str:
        return CHANNELS_LAST if self.channels_last else NCHW


def variants(backend: str, compiled: bool) -> list[Variant]:
    ours = functools.partial(our_block, backend=backend)
    blocks = {WITHOUT: None, "eager": eager_block, backend: ours}
    return [
        Variant(f"compile {name}" if compile_ else name, block, last, compile_)
        for compile_ in ((False, True) if compiled else (False,))
        for name, block in blocks.items()
        for last in (False, True)
    ]


class Run:
    """Inference or a training step of a variant on an input of its own."""

    def __init__(self, network: nn.Module, variant: Variant, x: Tensor, mode: str, loss) -> None:
        form = torch.channels_last if variant.channels_last else torch.contiguous_format
        self.network = network.to(memory_format=form).train(mode == STEP)
        self.x, self.mode, self.loss = x.clone(memory_format=form), mode, loss
        self.call = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> tuple[Tensor, ...]:
        # Weights stay in float32; products run in the input's dtype, as in mixed precision.
        half = self.x.dtype != torch.float32
        with torch.autocast(self.x.device.type, self.x.dtype if half else None, enabled=half):
            if self.mode == FORWARD:
                with torch.no_grad():
                    return (_first(self.call(self.x)),)
            loss = self.loss(self.call, self.x)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


@cudnn_benchmark()
def measure(
    bench: Bench,
    network: Network,
    mode: str,
    chosen: Sequence[Variant],
    setting_up: Callable[[int], AbstractContextManager] = contextlib.nullcontext,
) -> list[Row]:
    """Rows of all variants, timed in turns; those that disagree with the eager block are not timed.

    After an error that makes CUDA unusable, the others are not tried: they have no timing either.

    ``setting_up``: a context for the setup and the first call of the variant with a number.
    """
    rows = [row(bench, network, mode, v) for v in chosen]
    ready = []
    expected: Tensor | None = None
    x = torch.randn(network.input_shape(bench.device), generator=torch.Generator().manual_seed(0))
    state: dict[str, Tensor] | None = None
    torch.compiler.reset()
    lost = False
    for place, (found, variant) in enumerate(zip(rows, chosen, strict=True)):
        if lost or bench.budget.left <= 0:
            found["status"] = CONTEXT_LOST if lost else OUT_OF_TIME
            continue
        try:
            with setting_up(place):
                x = x.to(bench.device, bench.dtype)
                torch.manual_seed(0)
                built = network.make(variant.block).to(bench.device)
                if variant.block is not None:
                    state = state or copy.deepcopy(built.state_dict())
                    built.load_state_dict(state)
                run = Run(built, variant, x, mode, network.loss)
                (result,) = run()
            if variant.block is not None:
                expected = result if expected is None else expected
                found["error"] = error = _distance(result, expected)
                if not error <= TOLERANCE[bench.dtype]:
                    found["status"] = f"disagrees: relative RMS {error:.1e} to the eager block"
                    continue
            found["peak_bytes"] = peak_bytes(run, bench.device)
        except Exception as error:
            found["status"] = f"failed: {describe(error)}"
            lost = not usable(bench.device)
            continue
        ready.append((found, _Launched, run))
    if lost:
        for found, *_ in ready:
            found["status"] = CONTEXT_LOST
        return rows
    bench.time_in_turns(ready)
    compare(rows)
    _add_shares(rows)
    note_unused_kernels(rows)
    return rows


class _Launched:
    launch = "eager"


def _distance(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def _add_shares(rows: list[Row]) -> None:
    """Of the time that the eager block adds to the network, what ours adds."""
    for row in rows:
        prefix = "compile " if row["provider"].startswith("compile ") else ""
        peers = {
            name: other["median_ms"]
            for other in rows
            for name in (prefix + WITHOUT, prefix + "eager")
            if other["status"] == OK
            and other["provider"] == name
            and other["layout"] == row["layout"]
        }
        if row["status"] == OK and len(peers) == 2:
            bare, eager = peers[prefix + WITHOUT], peers[prefix + "eager"]
            if eager > bare:
                row["added"] = (row["median_ms"] - bare) / (eager - bare)


def row(bench: Bench, network: Network, mode: str, variant: Variant) -> Row:
    """The row of a variant that was not timed yet."""
    batch, channels, *positions = network.input_shape(bench.device)
    return {
        "workload": network.name, "n": batch, "c": channels,
        "positions": "x".join(map(str, positions)), "device": bench.device.type,
        "dtype": str(bench.dtype).removeprefix("torch."), "layout": variant.layout, "mode": mode,
        "launch": "eager", "provider": variant.name, "baseline": variant.name == "eager",
        "status": OK,
    }  # fmt: skip
