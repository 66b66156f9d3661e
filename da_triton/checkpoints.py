"""Parameter names and weight shapes of the double-attention layers in circulation.

Their first three convolutions are all ``convA``, ``convB``, ``convV``; the last one has four names,
some files carry the prefix ``_mask.``, and pointwise weights come with any number of trailing
1-axes.
"""

from collections.abc import Mapping, MutableMapping

import torch
from torch import Tensor

LAST = "conv_reconstruct"
OTHER_NAMES_OF_LAST = ("proj", "convC", "convZ")
OTHER_PREFIX = "_mask."


def adapt(state: MutableMapping[str, Tensor], prefix: str, own: Mapping[str, torch.Size]) -> None:
    """Renames and reshapes, in place, the entries under ``prefix`` to those of the layer.

    ``own``: the layer's parameters and their shapes. Names that clash and shapes that differ by
    more than 1-axes are left as they are, and ``load_state_dict`` rejects them.
    """
    for child in ("convA", "convB", "convV", LAST, *OTHER_NAMES_OF_LAST):
        ours = LAST if child in OTHER_NAMES_OF_LAST else child
        for kind in ("weight", "bias"):
            for inner in (OTHER_PREFIX, ""):
                theirs, name = f"{inner}{child}.{kind}", f"{ours}.{kind}"
                if prefix + theirs in state and (theirs == name or prefix + name not in state):
                    value = state.pop(prefix + theirs)
                    state[prefix + name] = _reshaped(value, own.get(name, value.shape))


def _reshaped(value: Tensor, shape: torch.Size) -> Tensor:
    """``value`` in ``shape``, where they differ by trailing 1-axes only."""
    if value.shape == shape or value.shape[:2] != shape[:2] or value.numel() != shape.numel():
        return value  # a quantised weight of the right shape cannot be reshaped
    return value.reshape(shape)
