"""Stateless layers for Hugging Face's ``kernels`` library.

``kernelize`` gives a module that somebody else wrote the ``forward`` of such a class: no
constructor, no attributes but two flags, and the arguments of the forward that it replaces.
"""

from typing import Any

from torch import Tensor, nn

from .arguments import Options
from .checkpoints import LAST, OTHER_NAMES_OF_LAST
from .modules import OPTIONS, attend


class DoubleAttention(nn.Module):
    """The forward of :class:`da_triton.DoubleAttention`, for any layer that has its convolutions.

    These are ``convA``, ``convB``, ``convV``, and the last one under any name that
    ``da_triton.checkpoints`` knows, or none. Options are the layer's attributes, where it has them,
    of the names in :class:`da_triton.DoubleAttention` (``heads``, ``scale``, ``residual``, …).
    Otherwise it is the block of A²-Nets (equations 3 to 5) without the sum, whatever axes the
    softmaxes of the replaced forward went over.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`da_triton.double_attention_block`.
    """

    can_torch_compile = True
    has_backward = True

    convA: nn.Module  # noqa: N815
    convB: nn.Module  # noqa: N815
    convV: nn.Module  # noqa: N815

    def forward(self, x: Tensor) -> Tensor:
        """``(N, in_channels, *positions)`` to ``(N, in_channels or c_m, *positions)``."""
        last: Any = None
        for name in (LAST, *OTHER_NAMES_OF_LAST):
            last = getattr(self, name, None) if last is None else last
        options = {name: getattr(self, name, default) for name, default in OPTIONS.items()}
        group = options.pop("process_group")
        convolutions = self.convA, self.convB, self.convV, last
        return attend(x, *convolutions, None, Options(**options), group)
