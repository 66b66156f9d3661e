"""Parameter names and weight shapes of the double-attention layers in circulation.

Their first three convolutions are all ``convA``, ``convB``, ``convV``; the last one has four names,
some files carry the prefix ``_mask.``, and pointwise weights come with any number of trailing
1-axes.
"""

from collections.abc import MutableMapping

from torch import Tensor

LAST = "conv_reconstruct"
OTHER_NAMES_OF_LAST = ("proj", "convC", "convZ")
OTHER_PREFIX = "_mask."


def adapt(state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Renames and reshapes, in place, the entries under ``prefix`` to this package's own."""
    children = ("convA", "convB", "convV", LAST, *OTHER_NAMES_OF_LAST)
    for child in children:
        ours = LAST if child in OTHER_NAMES_OF_LAST else child
        for kind in ("weight", "bias"):
            for inner in (OTHER_PREFIX, ""):
                theirs, name = f"{prefix}{inner}{child}.{kind}", f"{prefix}{ours}.{kind}"
                if theirs in state and (theirs == name or name not in state):
                    value = state.pop(theirs)
                    state[name] = _as_conv2d(value) if kind == "weight" else value


def _as_conv2d(weight: Tensor) -> Tensor:
    """A pointwise weight as ``(out, in, 1, 1)``; anything else unchanged, to be refused later."""
    if weight.dim() >= 2 and all(size == 1 for size in weight.shape[2:]):
        return weight.reshape(*weight.shape[:2], 1, 1)
    return weight
