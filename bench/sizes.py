"""Parameters and multiply-adds of ResNets with and without the paper's five blocks.

Counted on the meta device: convolutions and matrix products of one forward pass over an image, or a
clip of eight, with the block's products in the paper's order (``AZ``).

Beside them stands what ECA-Net (Wang et al., CVPR 2020, table 3) quotes. Its ResNets have their
parameters in units of 2^20, and their multiply-adds, within 1.5 %, in units of 2^30; its A²-Net has
them in units of 10^6 and 10^9.
"""

from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from da_triton import integrations
from da_triton.integrations.resnet import paper_places

from .tables import markdown

FILE = "sizes.csv"
IMAGE = (3, 224, 224)
CLIP = (3, 8, 224, 224)
A2_RESNET50 = "A²-ResNet-50"
QUOTED = {
    "ResNet-50": (24.37, 3.86),
    "ResNet-101": (42.49, 7.34),
    "ResNet-152": (57.40, 10.82),
    A2_RESNET50: (33.00, 6.50),
}
PAPER_ORDER: dict[str, Any] = {"order": "AZ"}


def table() -> pd.DataFrame:
    """A row for each network.

    Raises:
        ImportError: torchvision is missing.
    """
    from torchvision import models

    resnets: dict[str, tuple[Any, dict[str, Any], tuple[int, ...]]] = {
        "ResNet-50": (models.resnet50, {}, IMAGE),
        "ResNet-101": (models.resnet101, {}, IMAGE),
        "ResNet-152": (models.resnet152, {}, IMAGE),
        A2_RESNET50: (integrations.a2_resnet50, PAPER_ORDER, IMAGE),
        f"{A2_RESNET50}, c = C/4": (quarter_resnet50, PAPER_ORDER, IMAGE),
        "A²-ResNet-101": (integrations.a2_resnet101, PAPER_ORDER, IMAGE),
        "A²-ResNet-152": (integrations.a2_resnet152, PAPER_ORDER, IMAGE),
        f"{A2_RESNET50}, video": (integrations.a2_resnet50_video, PAPER_ORDER, CLIP),
    }
    rows = []
    for name, (make, options, shape) in resnets.items():
        with torch.device("meta"):
            network = make(**options)
        parameters, multiply_adds = count(network, shape)
        quoted_m, quoted_g = QUOTED.get(name, (None, None))
        rows.append(
            {
                "network": name, "input": "×".join(map(str, shape)), "parameters": parameters,
                "multiply_adds": multiply_adds, "quoted_m": quoted_m, "quoted_g": quoted_g,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def quarter_resnet50(**options: Any) -> nn.Module:
    """A ResNet-50 with the paper's blocks at c_m = c_n = C/4, the setting of its ablations."""
    from torchvision import models

    network = models.resnet50()
    for place in paper_places(network):
        c = network.get_submodule(place).bn3.num_features // 4
        integrations.insert_double_attention(network, [place], c, c, **options)
    return network


def count(network: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiply-adds of one input in evaluation mode."""
    parameters = list(network.parameters())
    x = torch.empty(1, *shape, device=parameters[0].device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.eval()(x)
    return sum(p.numel() for p in parameters), counter.get_total_flops() // 2


def shown(frame: pd.DataFrame) -> str:
    """The table in Markdown, in millions and billions."""
    titles = {"parameters": "parameters, M", "multiply_adds": "multiply-adds, G"}
    published = {"quoted_m": "as published, M", "quoted_g": "as published, G"}
    scaled = frame.assign(
        parameters=frame["parameters"] / 1e6, multiply_adds=frame["multiply_adds"] / 1e9
    )
    names = titles | published
    return markdown(scaled.rename(columns=names), dict.fromkeys(names.values(), "{:.2f}"))
