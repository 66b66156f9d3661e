"""The block as a plugin layer of OpenMMLab's backbones, by name in a configuration."""

from typing import Any

from torch import nn

from .residual import Norm, ResidualDoubleAttention

NAME = "ResidualDoubleAttention"


class PluginDoubleAttention(ResidualDoubleAttention):
    """:class:`ResidualDoubleAttention` under a short name in the backbone.

    Args:
        norm_cfg: the norm as OpenMMLab's other layers take it, such as ``dict(type="GN",
            num_groups=32)``; None for no norm. Without it, ``norm`` is used.
        args, options: see :class:`ResidualDoubleAttention`.
    """

    _abbr_ = "double_attention"

    def __init__(self, *args: Any, **options: Any) -> None:
        if "norm_cfg" in options:
            if "norm" in options:
                raise ValueError(
                    f"norm and norm_cfg both choose the norm, got norm={options['norm']!r} and "
                    f"norm_cfg={options['norm_cfg']!r}. Give one of them."
                )
            options["norm"] = _norm(options.pop("norm_cfg"))
        super().__init__(*args, **options)


def _norm(cfg: Any) -> Norm:
    if cfg is None:
        return None
    try:
        from mmcv.cnn import build_norm_layer  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f"norm_cfg needs mmcv, which cannot be imported ({error}). "
            "Install it: pip install mmcv-lite, or give norm instead."
        ) from error
    return lambda channels: build_norm_layer(cfg, channels)[1]


def register_openmmlab() -> type[nn.Module]:
    """Makes the block known to every library built on ``mmengine`` (mmdet, mmseg, mmpretrain, …).

    Afterwards, a backbone takes it as ``plugins=[dict(cfg=dict(type="ResidualDoubleAttention",
    c_m=64), stages=(False, True, True, False), position="after_conv3")]``, with the options of
    :class:`ResidualDoubleAttention` and ``norm_cfg``; the backbone gives ``in_channels``. A second
    call does nothing.

    Returns:
        The registered class.

    Raises:
        ImportError: no ``mmengine``.
        RuntimeError: the name is registered for something else.
    """
    try:
        from mmengine.registry import MODELS
    except ImportError as error:
        raise ImportError(
            f"register_openmmlab needs mmengine, which cannot be imported ({error}). "
            "Install it: pip install mmengine, and mmcv or mmcv-lite for backbones."
        ) from error
    known = MODELS.module_dict.get(NAME)
    if known is None:
        MODELS.register_module(name=NAME, module=PluginDoubleAttention)
    elif known is not PluginDoubleAttention:
        raise RuntimeError(
            f"{NAME} is registered in OpenMMLab already, as {known!r}. "
            f"Remove that registration: mmengine.registry.MODELS.module_dict.pop({NAME!r})."
        )
    return PluginDoubleAttention
