"""The block as a plugin layer of OpenMMLab's backbones, by name in a configuration."""

from torch import nn

from .residual import ResidualDoubleAttention

NAME = "ResidualDoubleAttention"


class PluginDoubleAttention(ResidualDoubleAttention):
    """:class:`ResidualDoubleAttention` under a short name in the backbone, and again the identity
    after ``init_weights`` of a model, which sets every normalisation to ones."""

    _abbr_ = "double_attention"

    def init_weights(self) -> None:
        """Called by a model's own ``init_weights``, before it loads pretrained weights."""
        self.zero_init_last()


def register_openmmlab() -> type[nn.Module]:
    """Makes the block known to every library built on ``mmengine`` (mmdet, mmseg, mmpretrain, …).

    Afterwards, a backbone takes it as ``plugins=[dict(cfg=dict(type="ResidualDoubleAttention",
    c_m=64), stages=(False, True, True, False), position="after_conv3")]``, with the options of
    :class:`ResidualDoubleAttention`; the backbone gives ``in_channels``. A second call does
    nothing.

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
