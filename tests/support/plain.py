"""The block in plain PyTorch: four convolutions that are always called as modules.

It shows what a library does with such a layer. Its parameters have the names of the real ones.
"""

import torch
from torch import nn

from da_triton.integrations.residual import BATCH_NORMS


class PlainBlock(nn.Module):
    """``DoubleAttention``, as the paper writes it."""

    def __init__(self, channels, c_m, c_n, *, heads=1, residual=False):
        super().__init__()
        self.heads, self.residual = heads, residual
        self.convA = nn.Conv2d(channels, c_m, 1)
        self.convB = nn.Conv2d(channels, c_n, 1)
        self.convV = nn.Conv2d(channels, c_n, 1)
        self.conv_reconstruct = nn.Conv2d(c_m, channels, 1)

    def forward(self, x):
        image = x if x.dim() == 4 else x.flatten(2).unsqueeze(-1)
        n, _, height, width = image.shape
        a, b, v = (conv(image) for conv in (self.convA, self.convB, self.convV))
        shape = (n, self.heads, a.shape[1] // self.heads, height * width)
        shape_n = (n, self.heads, b.shape[1] // self.heads, height * width)
        g = a.reshape(shape) @ b.reshape(shape_n).softmax(-1).transpose(2, 3)
        z = (g @ v.reshape(shape_n).softmax(2)).reshape(n, a.shape[1], height, width)
        y = self.conv_reconstruct(z)
        if x.dim() != 4:
            y = y.reshape(n, y.shape[1], *x.shape[2:])
        return x + y if self.residual else y


class PlainResidual(nn.Module):
    """``ResidualDoubleAttention`` with its batch normalisation."""

    def __init__(self, channels, c_m, c_n, *, heads=1, position_axes=2):
        super().__init__()
        self.attention = PlainBlock(channels, c_m, c_n, heads=heads)
        self.norm = BATCH_NORMS[position_axes](channels)

    def forward(self, x):
        return x + self.norm(self.attention(x))


def randomize(module):
    """Parameters and running statistics as after some training, the same for the same names."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            gain = 2 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.5
            p.copy_(gain * torch.randn(p.shape, generator=generator))
        for name, buffer in module.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
            elif name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return module
