"""Double attention in ResNets: the paper's five locations, pretrained weights and keys unchanged.

Each block becomes a child of the residual block that it follows, and a forward hook of that block
runs it; no other parameter changes its name, and no class is touched. torchvision's, timm's and
transformers' ResNets are known by the names of their stages; other modules can be named one by one.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .residual import Norm, ResidualDoubleAttention

CHILD = "double_attention"
# Chen et al., NeurIPS 2018, section 4.1: after residual blocks 1, 3 of conv3 and 1, 3, 5 of conv4.
PAPER = {"conv3": (0, 2), "conv4": (0, 2, 4)}
# conv3, conv4 and the blocks in them, as libraries name them.
STAGES = (
    {"conv3": "layer2", "conv4": "layer3", "blocks": ""},  # torchvision, timm
    {"conv3": "encoder.stages.1", "conv4": "encoder.stages.2", "blocks": ".layers"},  # transformers
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ASIDE = {"downsample", "shortcut", "se"}  # shortcuts; timm's channel attention


def insert_double_attention(
    model: nn.Module,
    positions: str | Sequence[str] | Mapping[str, int] = "paper",
    c_m: int | None = None,
    c_n: int | None = None,
    norm: Norm = "batch",
    zero_init: bool = True,
    **options: Any,
) -> nn.Module:
    """Puts a residual double attention block after modules of a network, in place.

    ``out`` of such a module becomes ``out + norm(double attention(out))``, which is ``out`` itself
    until training moves the normalisation away from its zeros. The block is the module's child
    ``double_attention``: every key that the network had stays, and ``load_state_dict`` of older
    weights reports nothing but the new ones as missing. A container that loops over its children in
    a forward of its own cannot have another child; its block belongs to the first layer in it.

    Args:
        model: changed in place.
        positions: ``"paper"``: after the residual blocks 1 and 3 of conv3 and 1, 3 and 5 of conv4,
            in a ResNet of torchvision, timm or transformers, by itself or inside a larger model.
            Or the names of modules, as ``model.named_modules()`` gives them, or a mapping from such
            names to the channels of their outputs, for modules that concatenate, say: channels are
            otherwise those of the module's last convolution or norm.
        c_m, c_n: channels of A, and of B and V; half of the module's channels by default.
        norm, zero_init: see :class:`ResidualDoubleAttention`.
        options: further options of it: ``position_axes``, by default as the module's last
            convolution has, and those of :class:`da_triton.DoubleAttention`.

    Returns:
        The model.

    Raises:
        ValueError: no ResNet or several in the model, a name that is not there, already has a
            block or is never called, channels that cannot be inferred. The model is then unchanged.
            In the network's forward: a module's output that its block cannot take.

    Example:
        >>> from torchvision.models import resnet50
        >>> model = insert_double_attention(resnet50(weights="DEFAULT"))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    if positions == "paper":
        names = paper_places(model)
    elif isinstance(positions, (Mapping, list, tuple)) and all(type(n) is str for n in positions):
        names = list(positions)
    else:
        raise ValueError(f'positions must be "paper" or a list of names, got {positions!r}.')
    if not names:
        raise ValueError("positions has no names: nothing would be inserted.")
    modules = dict(model.named_modules())
    blocks: dict[tuple[nn.Module, str], tuple[nn.Module, str, InsertedDoubleAttention]] = {}
    for name in names:
        if name not in modules:
            near = [other for other in modules if other.endswith("." + name)]
            hint = f" Did you mean {near[0]!r}?" if near else " See model.named_modules()."
            raise ValueError(f"positions names {name!r}, which the model does not have.{hint}")
        module = modules[name]
        owner, path = _home(name, module)
        child = path.rpartition(".")[2]
        if child in owner._modules or (owner, child) in blocks:
            raise ValueError(f"{name!r} has a double attention block already.")
        channels, axes = _channels_and_axes(module)
        if isinstance(positions, Mapping):
            channels = positions[name]
        if channels is None:
            raise ValueError(
                f"cannot infer the output channels of {name!r} ({type(module).__name__}). "
                f"Give them: positions={{{name!r}: channels}}."
            )
        around = itertools.chain(module.parameters(), model.parameters())
        like = next(
            (p for p in around if p.is_floating_point()),
            torch.empty((), device=torch.get_default_device()),
        )
        kind = {"device": like.device, "dtype": like.dtype, "position_axes": axes, **options}
        block = InsertedDoubleAttention(channels, c_m, c_n, norm=norm, zero_init=zero_init, **kind)
        block.place = name
        blocks[owner, child] = module, path, block.train(module.training)
    for (owner, child), (module, path, block) in blocks.items():
        owner.add_module(child, block)
        if not _is_sequential(module):  # which runs every child
            module.register_forward_hook(functools.partial(_attend, path))
    return model


class InsertedDoubleAttention(ResidualDoubleAttention):
    """A block whose errors name the module that it follows."""

    place = ""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        try:
            return super().forward(x, mask)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"The double attention block after {self.place!r} cannot take the output of that "
                f"module: {error}{self._hint(x)}"
            ) from error

    def _hint(self, x: Any) -> str:
        channels = self.attention.in_channels
        if not isinstance(x, Tensor):
            return " Name a module that returns one tensor (N, channels, *positions)."
        if channels is None or x.dim() < 3 or x.shape[1] == channels:
            return ""
        given = f"give their number: positions={{{self.place!r}: {x.shape[1]}}}"
        if x.shape[-1] != channels:
            return f" To follow it, {given}."
        return (
            f" If axis 1 holds its channels, {given}. If the last axis does, name a module that "
            "returns (N, channels, *positions)."
        )


def a2_resnet50(**options: Any) -> nn.Module:
    """torchvision's ResNet-50 with the paper's five blocks: 32.9M parameters, 6.7G MACs.

    ``options``: those of :func:`insert_double_attention` (``c_m``, ``c_n``, ``norm``,
    ``zero_init``, ``backend``, …), and of ``torchvision.models.resnet50`` (``weights``,
    ``num_classes``, …), whose pretrained weights load unchanged.
    """
    return _a2_resnet("resnet50", options)


def a2_resnet101(**options: Any) -> nn.Module:
    """As :func:`a2_resnet50`, of torchvision's ResNet-101."""
    return _a2_resnet("resnet101", options)


def a2_resnet152(**options: Any) -> nn.Module:
    """As :func:`a2_resnet50`, of torchvision's ResNet-152."""
    return _a2_resnet("resnet152", options)


def a2_resnet50_video(*, num_classes: int = 400, **options: Any) -> nn.Module:
    """A ResNet-50 over ``(N, 3, T, H, W)`` clips with the paper's five blocks.

    torchvision's ResNet-50 inflated: every convolution gets a time axis, of length 5 in the stem, 3
    in the first convolution of every second residual block, and 1 elsewhere. T is kept to the last
    pooling: a clip of 8 frames of 224×224 gives the blocks 8×28×28 and 8×14×14 positions.
    Image weights (``weights=``) go to the middle of the time axis: initially, a still clip gets the
    image's answer. ``options`` as :func:`a2_resnet50`; with ``weights``, ``num_classes`` must be
    theirs.
    """
    return _a2_resnet("resnet50", {"num_classes": num_classes, **options}, video=True)


def _a2_resnet(name: str, options: dict[str, Any], video: bool = False) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(
            f"a2_{name} builds on torchvision, which cannot be imported ({error}). "
            "Install it: pip install torchvision."
        ) from error
    theirs = {"weights", "progress", *inspect.signature(models.ResNet).parameters}
    network = getattr(models, name)(**{k: v for k, v in options.items() if k in theirs})
    if video:
        if options.get("norm_layer") not in (None, nn.BatchNorm2d):
            raise ValueError(
                f"a video network has nn.BatchNorm3d, got norm_layer={options['norm_layer']!r}. "
                "Leave norm_layer out."
            )
        _inflate(network)
    return insert_double_attention(network, **{k: v for k, v in options.items() if k not in theirs})


def _attend(path: str, module: nn.Module, args: Any, output: Any) -> Tensor:
    """The hook of a module that has a block."""
    return module.get_submodule(path)(output)


def _home(name: str, module: nn.Module) -> tuple[nn.Module, str]:
    """The module whose child the block after ``module`` becomes, and the block's name below
    ``module``.

    A container that loops over its children would run another one, so the block belongs to its
    first layer. A layer that loops over its own children in turn runs the block twice.
    """
    if getattr(module.forward, "__func__", None) is nn.Module.forward:
        raise ValueError(
            f"{name!r} is a {type(module).__name__}, which is never called. Name the modules in it."
        )
    owner, path = module, []
    if not _is_sequential(module):
        while isinstance(owner, CONTAINERS) and len(owner):
            step, owner = next(owner.named_children())
            path.append(step)
    return owner, ".".join([*path, f"{CHILD}_{len(path)}" if path else CHILD])


def _is_sequential(module: nn.Module) -> bool:
    """Whether it runs its children in turn, and does nothing else."""
    kind = type(module)
    known = kind.forward is nn.Sequential.forward and kind.__call__ is nn.Module.__call__
    return known and "forward" not in module.__dict__


def paper_places(model: nn.Module) -> list[str]:
    """Names of the residual blocks that the paper's five blocks follow."""
    modules = dict(model.named_modules())
    found = []
    for stages in STAGES:
        for name in modules:
            if f".{name}".endswith(f".{stages['conv3']}"):
                prefix = name.removesuffix(stages["conv3"])
                if prefix + stages["conv4"] in modules:
                    found.append((prefix, stages))
    if len(found) != 1:
        what = "no ResNet" if not found else f"{len(found)} ResNets"
        raise ValueError(
            f'positions="paper" found {what} in {type(model).__name__} (stages named layer2 and '
            "layer3, or encoder.stages). Give the names of the modules to insert after."
        )
    prefix, stages = found[0]
    places = [
        f"{prefix}{stages[stage]}{stages['blocks']}.{place}"
        for stage, chosen in PAPER.items()
        for place in chosen
    ]
    if missing := [name for name in places if name not in modules]:
        raise ValueError(
            f"the paper's places need at least 3 residual blocks in conv3 and 5 in conv4; "
            f"{type(model).__name__} has no {', '.join(missing)}. Name the places yourself."
        )
    return places


def _channels_and_axes(module: nn.Module) -> tuple[int | None, int]:
    """Output channels and position axes, from the last normalisation or convolution outside
    shortcuts and channel attention."""
    channels, axes = None, 2
    layer: Any
    for layer in _main_path(module):
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            channels, axes = layer.out_channels, len(layer.kernel_size)
        elif isinstance(getattr(layer, "num_features", None), int):
            channels = layer.num_features
        elif isinstance(layer, nn.GroupNorm):
            channels = layer.num_channels
    return channels, axes


def _main_path(module: nn.Module) -> Iterator[nn.Module]:
    """Modules in the order of their registration, without shortcuts, channel attention and blocks
    inserted before."""
    yield module
    for name, child in module.named_children():
        if name not in ASIDE and not isinstance(child, InsertedDoubleAttention):
            yield from _main_path(child)


def _inflate(network: nn.Module) -> None:
    """A time axis for every 2-D layer of torchvision's ResNet, in place."""
    for name, module in list(network.named_modules()):
        parent = network.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        if isinstance(module, nn.Conv2d):
            place = name.split(".")[1] if "." in name else ""
            time = 5 if name == "conv1" else 3 if child == "conv1" and int(place) % 2 == 0 else 1
            setattr(parent, child, _inflated(module, time))
        elif isinstance(module, nn.BatchNorm2d):
            norm = nn.BatchNorm3d(
                module.num_features, module.eps, module.momentum, module.affine,
                module.track_running_stats,
            )  # fmt: skip
            norm.load_state_dict(module.state_dict())
            setattr(parent, child, norm)
        elif isinstance(module, nn.MaxPool2d):
            setattr(parent, child, nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            setattr(parent, child, nn.AdaptiveAvgPool3d(1))


def _inflated(conv: Any, time: int) -> nn.Conv3d:
    """The convolution over each frame, and zeros for the frames before and after."""
    (s, _), (p, _), (d, _) = conv.stride, conv.padding, conv.dilation
    new = nn.Conv3d(
        conv.in_channels, conv.out_channels, (time, *conv.kernel_size), stride=(1, s, s),
        padding=(time // 2, p, p), dilation=(1, d, d), groups=conv.groups, bias=False,
    )  # fmt: skip
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :, time // 2] = conv.weight
    return new
