"""Whole networks with the eager block and with da_triton's: a training step and inference.

    resnet50   torchvision's, with five blocks after the residual blocks that the paper chose:
               1 and 3 of conv3, 1, 3 and 5 of conv4; c_m = c_n = C/2
    yolov8n    ultralytics', with a block after the backbone's last stage; c_m = c_n = C/2

Each is also timed without the block, which gives the time that the block adds. All variants have
the same weights, and must give the same answers, before anything is timed.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from da_triton import DoubleAttention
from da_triton.integrations.resnet import paper_places

from .formulations import EagerDoubleAttention
from .measure import WITHOUT
from .problems import FORWARD, STEP, memory_format
from .providers import Provider, in_layouts

Make = Callable[[int], nn.Module]
# Relative RMS of the block's effect on outputs: many layers amplify what single layers round.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
MODES = {"fwd": FORWARD, "fwd_bwd": STEP}


@dataclass(frozen=True)
class Network:
    """A workload: ``make`` builds it with blocks, or without where the argument is None."""

    name: str
    make: Callable[[Make | None], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]
    shape: tuple[int, int, int, int]
    cpu_shape: tuple[int, int, int, int]

    whole = True

    def draw(self, mode: str, dtype: torch.dtype, device: torch.device) -> "Task":
        x = torch.randn(self._shape(device), generator=torch.Generator().manual_seed(0))
        return Task(self, mode, x.to(device, dtype))

    def columns(self, device: torch.device) -> dict[str, Any]:
        batch, channels, *positions = self._shape(device)
        places = "x".join(map(str, positions))
        return {"workload": self.name, "n": batch, "c": channels, "positions": places}

    def _shape(self, device: torch.device) -> tuple[int, int, int, int]:
        return self.cpu_shape if device.type == "cpu" else self.shape


@dataclass(frozen=True)
class Task:
    """A network's input. The first variant with a block decides all weights and the results."""

    network: Network
    mode: str
    x: Tensor
    first: dict[str, Any] = field(default_factory=dict)

    def in_format(self, channels_last: bool) -> "Task":
        return replace(self, x=self.x.clone(memory_format=memory_format(2, channels_last)))

    def check(self, run: "Run", warm_up: int) -> list[float]:
        """The error of the first call's result: a training step changes the weights."""
        if run.first is None:
            run()
        if not run.has_block:
            return []
        expected = self.first.setdefault("result", run.first).double()
        return [((run.first.double() - expected).norm() / expected.norm()).item()]

    def allowed(self, baseline: bool) -> float:
        return TOLERANCE[self.x.dtype]


class Run:
    """Inference or a training step of a network with a block, or without."""

    def __init__(self, task: Task, block: Make | None, compiled: bool) -> None:
        self.task, self.has_block = task, block is not None
        torch.manual_seed(0)
        network = task.network.make(block).to(task.x.device)
        if self.has_block:
            state = task.first.setdefault("state", copy.deepcopy(network.state_dict()))
            network.load_state_dict(state)
        form = memory_format(2, channels_last=not task.x.is_contiguous())
        network = network.to(memory_format=form).train(task.mode == STEP)
        self.call: Any = torch.compile(network, dynamic=False) if compiled else network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
        self.first: Any = None  # the first call's result

    def __call__(self) -> tuple[Tensor, ...]:
        # Weights stay in float32; products run in the input's dtype, as in mixed precision.
        x, step = self.task.x, self.task.mode == STEP
        half = x.dtype != torch.float32
        with (
            torch.autocast(x.device.type, x.dtype if half else None, enabled=half),
            torch.set_grad_enabled(step),
        ):
            result = self.task.network.loss(self.call, x) if step else _first(self.call(x))
        if step:
            self.optimizer.zero_grad(set_to_none=True)
            result.backward()
            self.optimizer.step()
        result = result.detach()
        self.first = result if self.first is None else self.first
        return (result,)


def variants(backend: str, compiled: bool) -> list[Provider]:
    """A network without a block, with the eager one and with da_triton's, in both layouts."""
    ours = functools.partial(our_block, backend=backend)
    blocks = {WITHOUT: None, "eager": eager_block, backend: ours}
    found = [
        Provider(
            f"compile {name}" if with_compile else name,
            functools.partial(Run, block=block, compiled=with_compile),
            baseline=name == "eager" and not with_compile, compiles=with_compile,
        )
        for with_compile in ((False, True) if compiled else (False,))
        for name, block in blocks.items()
    ]  # fmt: skip
    return in_layouts(found)


def eager_block(channels: int) -> nn.Module:
    return EagerDoubleAttention(channels, channels // 2, channels // 2)


def our_block(channels: int, backend: str) -> nn.Module:
    return DoubleAttention(channels, residual=True, backend=backend)


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = next(iter(output.values() if isinstance(output, dict) else output))
    return output


# --- the networks ---------------------------------------------------------------------------------


class WithBlock(nn.Sequential):
    """A layer, then a block and a normalisation, which keeps deep networks with random weights
    finite."""

    def __init__(self, layer: nn.Module, block: Make, channels: int) -> None:
        super().__init__(layer, block(channels), nn.BatchNorm2d(channels))


def resnet50(block: Make | None) -> nn.Module:
    from torchvision.models import resnet50 as build

    network: Any = build(weights=None)
    if block is None:
        return network
    for name in paper_places(network):
        residual = network.get_submodule(name)
        network.set_submodule(name, WithBlock(residual, block, residual.bn3.num_features))
    return network


def yolov8(block: Make | None) -> nn.Module:
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    network: Any = DetectionModel("yolov8n.yaml", verbose=False)
    network.args = get_cfg()
    if block is not None:
        last = network.model[9]  # SPPF
        both: Any = WithBlock(last, block, last.cv2.conv.out_channels)
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
