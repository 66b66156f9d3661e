"""Double attention in Ultralytics' YOLO: names for YAML rows, and YAML files that use them.

Ultralytics looks for the module of a YAML row among the globals of ``ultralytics.nn.tasks``; there
is only this way in. :func:`register_ultralytics` puts the names there, and
``python -m da_triton.integrations.yolo`` is the library's command line with the names. Two kinds of
process get them with what they unpickle instead: one that reads a checkpoint, by the blocks in it,
and a worker of distributed training, which may be given no more of a network than the path of its
YAML file, by a callback (Ultralytics 8.4.140 or newer; older workers need a checkpoint).
"""

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import modules
from . import residual

CONFIGS = Path(__file__).with_name("configs")
NETWORKS = ("yolov8", "yolo11")
SCALES = "nsmlx"


class _Row(nn.Module):
    """A module for YAML rows. A process that unpickles one can build networks from such rows."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if arguments and isinstance(arguments[-1], dict):
            arguments, options = arguments[:-1], arguments[-1] | options
        if arguments and isinstance(arguments[0], list):
            if len(arguments) < 2:
                raise ValueError("ch must be followed by f, the number of a row: [ch, f].")
            channels, row = arguments[:2]
            arguments = (channels[row], *arguments[2:])
        super().__init__(*arguments, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register([type(self)])
        super().__setstate__(state)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        try:
            return super().forward(x, mask)
        except ValueError as error:
            expected = next(self.parameters()).shape[1]
            if x.dim() < 2 or x.shape[1] == expected:
                raise
            # The parser sets i and f, the numbers of a row and of the row that it reads, where the
            # row is not repeated.
            row = f"Row {self.i}" if hasattr(self, "i") else "The row"
            source = getattr(self, "f", -1)
            raise ValueError(
                f"{error} {row} of the YAML file was given {expected} channels and reads "
                f"{x.shape[1]}. c2 has the channels of the row before; write ch, f instead for "
                f"those of the row that is read: [{source}, 1, {type(self).__name__}, [ch, f]]."
            ) from None


class DoubleAttention(_Row, modules.DoubleAttention):
    """:class:`da_triton.DoubleAttention`, for YAML rows: ``[-1, 1, DoubleAttention, [c2]]``.

    Arguments as those of :class:`ResidualDoubleAttention`. The parser assumes that a block keeps
    the number of channels.
    """


class ResidualDoubleAttention(_Row, residual.ResidualDoubleAttention):
    """:class:`da_triton.integrations.ResidualDoubleAttention`, for YAML rows.

    ``[-1, 1, ResidualDoubleAttention, [c2]]``, or ``[c2, 64, 64]`` with ``c_m`` and ``c_n``. A
    mapping at the end gives options by name: ``[c2, {heads: 4, backend: torch}]``. A row that does
    not read the row before takes ``ch, f`` instead of ``c2``: ``[4, 1, …, [ch, f, 64, 64]]``.
    """


BLOCKS = (DoubleAttention, ResidualDoubleAttention)


def register_ultralytics() -> None:
    """Makes ``ResidualDoubleAttention`` and ``DoubleAttention`` known to Ultralytics' YAML files.

    In a row ``[-1, 1, ResidualDoubleAttention, [c2]]``, ``c2`` is the number of channels of the row
    before, at the network's scale; :class:`ResidualDoubleAttention` lists the other arguments. On
    the command line, ``python -m da_triton.integrations.yolo`` in place of ``yolo`` calls this.

    A process that loads a checkpoint needs no call, except under ``ULTRALYTICS_SAFE_LOAD``, which
    imports nothing for a checkpoint: call this first there. Workers of distributed training need
    none with Ultralytics 8.4.140 or newer. Older ones, and the processes of ``YOLO.tune`` there,
    are given nothing but the path of the network: save it, and train ``YOLO("saved.pt")``. Calling
    this again changes nothing.

    Raises:
        ImportError: Ultralytics cannot be imported.
        RuntimeError: ``ultralytics.nn.tasks`` has something else by such a name.

    Example:
        >>> from ultralytics import YOLO
        >>> register_ultralytics()
        >>> YOLO(ultralytics_config("yolov8n")).train(data="coco8.yaml")
    """
    _register(BLOCKS)
    torch.serialization.add_safe_globals(
        [*BLOCKS, modules.DoubleAttention, residual.ResidualDoubleAttention]
    )
    from ultralytics.utils.callbacks import default_callbacks

    # First, because a reset of callbacks keeps the first of each event only.
    event = default_callbacks["on_pretrain_routine_start"]
    if _FOR_WORKERS not in event:
        event.insert(0, _FOR_WORKERS)


def ultralytics_config(model: str = "yolov8n", outputs: bool = False) -> str:
    """The path of a YAML file with double attention, for ``YOLO(path)``.

    Args:
        model: ``"yolov8"`` or ``"yolo11"``, and a scale: n, s, m, l or x.
        outputs: three blocks, on the feature maps that the detector reads (strides 8, 16 and 32),
            instead of one after the backbone's last stage (stride 32).

    Raises:
        ValueError: another model.
        RuntimeError: Ultralytics would not find the file, for the name of a directory above it.
    """
    known = [network + scale for network in NETWORKS for scale in SCALES]
    if model not in known:
        raise ValueError(f"model must be one of {', '.join(known)}, got {model!r}.")
    ending = f"-double-attention{'-outputs' if outputs else ''}.yaml"
    # There is one file for all scales. Ultralytics finds it by taking the scale out of the path,
    # which it believes to be the first such letter after a digit.
    if wrong := re.search(rf"\d[{SCALES}]", str(CONFIGS)):
        raise RuntimeError(
            f"Ultralytics would read a scale from {wrong.group()!r} in {CONFIGS}. "
            f"Copy {model[:-1] + ending} there to a file named {model + ending}, and give its path."
        )
    return str(CONFIGS / (model + ending))


def load_ultralytics(yolo: Any, weights: Any) -> None:
    """Weights of a network without double attention, for the same network with it, in place.

    Rows of double attention shift the numbers of later rows, which ``YOLO.load`` goes by: it would
    pass over most of the neck and the head. This renumbers, and then calls it. A network whose new
    blocks are the identity gives the same answers as the one that the weights are from, and
    ``yolo.train`` starts from them.

    Args:
        yolo: ``ultralytics.YOLO`` of a YAML file with rows of double attention.
        weights: ``ultralytics.YOLO`` of the network without them, or the path of its checkpoint.

    Raises:
        ValueError: no double attention in ``yolo``, or other networks than one with and one
            without.
    """
    from ultralytics import YOLO
    from ultralytics.engine.model import Model

    network = yolo.model
    theirs: Any = weights.model if isinstance(weights, Model) else YOLO(weights).model
    names = {block.__name__ for block in BLOCKS}
    new = [row[2] in names for row in network.yaml["backbone"] + network.yaml["head"]]
    if not any(new):
        raise ValueError(
            "the network has no double attention, so its rows keep their numbers. Use yolo.load."
        )
    if len(theirs.model) != new.count(False):
        raise ValueError(
            f"weights must be of the same network without double attention: expected "
            f"{new.count(False)} rows, got {len(theirs.model)}."
        )
    rows = iter(theirs.model)
    joined = copy.copy(theirs)
    joined._modules = {
        "model": nn.Sequential(
            *(ours if own else next(rows) for ours, own in zip(network.model, new, strict=True))
        )
    }
    # The detector may be for other classes: the library adapts it.
    detector = f"model.{len(new) - 1}."
    found = {name: tuple(value.shape) for name, value in joined.state_dict().items()}
    for name, value in network.state_dict().items():
        if not name.startswith(detector) and found.get(name) != value.shape:
            raise ValueError(
                f"weights must be of the same network without double attention, neither fused: "
                f"expected {tuple(value.shape)} for {name}, got {found.get(name, 'nothing')}. "
                "Load before fuse() or, with Ultralytics before 8.4.140, predict()."
            )
    yolo.load(joined)
    # So does the library itself from 8.4.140 on. Before, train() would build a network without the
    # weights unless ckpt has something, predict() go on with the old ones, and names stay numbers.
    yolo.ckpt, yolo.ckpt_path, yolo.predictor = {"model": network}, None, None
    yolo.overrides.pop("pretrained", None)
    if network.names == {i: str(i) for i in theirs.names}:
        network.names = dict(theirs.names)


def _tasks() -> ModuleType:
    try:
        from ultralytics.nn import tasks
    except ImportError as error:
        raise ImportError(
            f"Ultralytics cannot be imported ({error}). Install it: pip install ultralytics."
        ) from error
    return tasks


def _register(blocks: Iterable[type[nn.Module]]) -> None:
    tasks = _tasks()
    for block in blocks:
        other = getattr(tasks, block.__name__, block)
        if other is not block:
            raise RuntimeError(
                f"ultralytics.nn.tasks.{block.__name__} is {other!r} already, expected nothing or "
                f"{block!r}. Rename the other, or delete it from ultralytics.nn.tasks."
            )
    for block in blocks:
        setattr(tasks, block.__name__, block)


class _ForWorkers:
    """A callback that does nothing, and registers the blocks where it is unpickled."""

    def __call__(self, trainer: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ForWorkers":
        return self  # Ultralytics compares callbacks with the defaults that it copied

    def __reduce__(self) -> Any:
        return _for_workers, ()


def _for_workers() -> _ForWorkers:
    register_ultralytics()
    return _FOR_WORKERS


_FOR_WORKERS = _ForWorkers()
