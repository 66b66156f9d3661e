"""Layers written from published formulas, with the names of their children in circulation."""

import torch
from torch import nn


class DoubleAttentionCopy(nn.Module):
    """A²-Nets, equations 3 to 5; the last convolution has the name given."""

    def __init__(self, channels, c_m, c_n, last="conv_reconstruct", residual=False, conv=nn.Conv2d):
        super().__init__()
        self.convA, self.convB, self.convV = (conv(channels, c, 1) for c in (c_m, c_n, c_n))
        self.last, self.residual, self.c_m = last, residual, c_m
        if last is not None:
            setattr(self, last, conv(c_m, channels, 1))

    def weights(self, b, v):
        return b.softmax(2), v.softmax(1)

    def forward(self, x):
        b, v = self.weights(self.convB(x).flatten(2), self.convV(x).flatten(2))
        z = self.convA(x).flatten(2) @ b.transpose(1, 2) @ v
        z = z.view(z.shape[0], self.c_m, *x.shape[2:])
        y = z if self.last is None else getattr(self, self.last)(z)
        return x + y if self.residual else y


class SoftmaxOverTheBatch(DoubleAttentionCopy):
    """The widely copied version: F.softmax without ``dim`` takes axis 0 of three."""

    def weights(self, b, v):
        return b.softmax(0), v.softmax(0)


class SoftmaxOverPositionsTwice(DoubleAttentionCopy):
    def weights(self, b, v):
        return b.softmax(2), v.softmax(2)


class EfficientAttention(nn.Module):
    """Shen et al., WACV 2021, section 3.2: rho_q(Q) (rho_k(K)ᵀ V), head by head."""

    def __init__(self, channels, key_channels, head_count, value_channels, residual=True):
        super().__init__()
        self.keys = nn.Conv2d(channels, key_channels, 1)
        self.queries = nn.Conv2d(channels, key_channels, 1)
        self.values = nn.Conv2d(channels, value_channels, 1)
        self.reprojection = nn.Conv2d(value_channels, channels, 1)
        self.head_count, self.residual = head_count, residual

    def forward(self, x):
        abv = (conv(x).flatten(2) for conv in (self.keys, self.queries, self.values))
        heads = zip(*(m.chunk(self.head_count, 1) for m in abv), strict=True)
        parts = [(v @ k.softmax(2).transpose(1, 2)) @ q.softmax(1) for k, q, v in heads]
        y = self.reprojection(torch.cat(parts, 1).unflatten(2, x.shape[2:]))
        return x + y if self.residual else y


class LatentLinearAttention(nn.Module):
    """Latent diffusion and Grad-TTS: softmax on k alone."""

    def __init__(self, dim, heads=4, dim_head=8):
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Conv2d(dim, 3 * heads * dim_head, 1, bias=False)
        self.to_out = nn.Conv2d(heads * dim_head, dim, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = self.to_qkv(x).view(n, 3, self.heads, -1, h * w).unbind(1)
        context = k.softmax(-1) @ v.transpose(-1, -2)
        out = context.transpose(-1, -2) @ q
        return self.to_out(out.reshape(n, -1, h, w))


class ImageLinearAttention(nn.Module):
    """Three convolutions, of any size; q and k times d^-1/4."""

    def __init__(self, dim, heads=2, key_dim=8, value_dim=6, norm_queries=True):
        super().__init__()
        self.heads, self.key_dim, self.norm_queries = heads, key_dim, norm_queries
        self.to_q = nn.Conv2d(dim, heads * key_dim, 1)
        self.to_k = nn.Conv2d(dim, heads * key_dim, 1)
        self.to_v = nn.Conv2d(dim, heads * value_dim, 1)
        self.to_out = nn.Conv2d(heads * value_dim, dim, 1)

    def forward(self, x):
        q, k, v = (
            conv(x).flatten(2).unflatten(1, (self.heads, -1))
            for conv in (self.to_q, self.to_k, self.to_v)
        )
        q, k = q * self.key_dim**-0.25, k * self.key_dim**-0.25
        q = q.softmax(-2) if self.norm_queries else q
        z = v @ k.softmax(-1).transpose(-1, -2) @ q
        return self.to_out(z.flatten(1, 2).unflatten(-1, x.shape[2:]))


class ContextBlock(nn.Module):
    """GCNet (Cao et al., 2019), figure 4d: gather with one attention map, two transforms."""

    def __init__(self, channels, hidden, multiply=True, add=True):
        super().__init__()
        self.conv_mask = nn.Conv2d(channels, 1, 1)

        def transform():
            return nn.Sequential(
                nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(),
                nn.Conv2d(hidden, channels, 1),
            )  # fmt: skip

        self.channel_mul_conv = transform() if multiply else None
        self.channel_add_conv = transform() if add else None

    def forward(self, x):
        weights = self.conv_mask(x).flatten(2).softmax(2)
        context = (x.flatten(2) @ weights.transpose(1, 2)).unsqueeze(-1)
        if self.channel_mul_conv is not None:
            x = x * self.channel_mul_conv(context).sigmoid()
        return x if self.channel_add_conv is None else x + self.channel_add_conv(context)
