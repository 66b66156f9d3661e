"""The block as PyTorch users write it, in several formulations, and da_triton's."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from da_triton import DoubleAttention

from .problems import Problem


class EagerDoubleAttention(nn.Module):
    """The block as it is commonly written in PyTorch: four convolutions, softmax, bmm, residual.

    Parameters have the names of ``DoubleAttention``; ``axes`` is the number of position axes.
    """

    def __init__(self, in_channels: int, c_m: int, c_n: int, heads: int = 1, axes: int = 2) -> None:
        super().__init__()
        convolution: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.heads = heads
        self.convA = convolution(in_channels, c_m, 1)
        self.convB = convolution(in_channels, c_n, 1)
        self.convV = convolution(in_channels, c_n, 1)
        self.conv_reconstruct = convolution(c_m, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        def per_head(t: Tensor) -> Tensor:
            return t.reshape(x.shape[0] * self.heads, t.shape[1] // self.heads, -1)

        features = per_head(self.convA(x))
        attention_maps = per_head(self.convB(x)).softmax(dim=-1)
        attention_vectors = per_head(self.convV(x)).softmax(dim=1)
        descriptors = torch.bmm(features, attention_maps.transpose(1, 2))
        z = torch.bmm(descriptors, attention_vectors)
        return x + self.conv_reconstruct(z.reshape(x.shape[0], -1, *x.shape[2:]))

    # Shared by the other formulations.

    def reconstruct(self, x: Tensor, z: Tensor) -> Tensor:
        return x + self.conv_reconstruct(z.reshape(x.shape[0], -1, *x.shape[2:]))

    def by_head(self, t: Tensor) -> Tensor:
        """``(batch, heads, channels, positions)`` of a convolution's output."""
        return t.flatten(2).unflatten(1, (self.heads, -1))


class EinsumDoubleAttention(EagerDoubleAttention):
    """The core in two contractions, with the heads as an axis of their own."""

    def forward(self, x: Tensor) -> Tensor:
        attention_maps = self.by_head(self.convB(x)).softmax(-1)
        features = self.by_head(self.convA(x))
        descriptors = torch.einsum("nhml,nhkl->nhmk", features, attention_maps)
        vectors = self.by_head(self.convV(x)).softmax(2)
        return self.reconstruct(x, torch.einsum("nhmk,nhkl->nhml", descriptors, vectors))


class AttentionCalls(EagerDoubleAttention):
    """Both steps as ``scaled_dot_product_attention`` with X as keys, then as queries.

    Gather: the weights of B are queries over positions, A are the values. The bias of B adds the
    same to all positions and drops out. Distribute: positions are queries over the weights of V,
    whose bias is an additive mask, and the descriptors are the values.
    """

    def forward(self, x: Tensor) -> Tensor:
        positions, queries, keys = self.operands(x)
        features = self.by_head(self.convA(x)).mT
        g = scaled_dot_product_attention(queries, positions, features, scale=1.0)
        return self.reconstruct(x, self.distribute(positions, keys, g).mT)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """X, the weights of B and those of V, each ``(batch, heads, rows, in_channels)``."""
        shape = x.shape[0], self.heads, -1, -1
        positions = x.flatten(2).mT[:, None].expand(shape)
        return positions, self.rows(self.convB).expand(shape), self.rows(self.convV).expand(shape)

    def rows(self, convolution: Any) -> Tensor:
        """A convolution's weights by head, ``(heads, c_out, c_in)``."""
        return convolution.weight.reshape(self.heads, -1, convolution.in_channels)

    def distribute(self, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        bias = self.convV.bias
        mask = None if bias is None else bias.view(1, self.heads, 1, -1)
        return scaled_dot_product_attention(positions, keys, values, attn_mask=mask, scale=1.0)


class AbsorbedAttention(AttentionCalls):
    """Two attention calls on X itself; A, B, V and Z never exist.

    Gather: ``SDPA(Wb, X, X)``. Its softmax rows sum to 1, so Wa and the bias of A apply to the
    result, and the bias of B, constant over positions, drops out. Distribute: ``SDPA(X, Wv,
    (Wo G)ᵀ)``, whose rows sum to 1 as well, so the output's bias is added to the values. Several
    heads are summed. Without a bias of V neither call has a mask, which leaves flash kernels
    available; with one, it is a mask that is constant over positions.
    """

    def forward(self, x: Tensor) -> Tensor:
        channels, heads = x.shape[1], self.heads
        positions, queries, keys = self.operands(x)
        gathered = scaled_dot_product_attention(queries, positions, positions, scale=1.0)
        g = gathered @ self.rows(self.convA).mT + self.convA.bias.view(heads, 1, -1)
        last = self.conv_reconstruct.weight.reshape(channels, heads, -1).permute(1, 2, 0)
        values = g @ last + self.conv_reconstruct.bias / heads
        mixed = self.distribute(positions, keys, values)
        mixed = mixed.squeeze(1) if heads == 1 else mixed.sum(1)
        return x + mixed.mT.unflatten(2, x.shape[2:])


class AbsorbedFlexAttention(AbsorbedAttention):
    """The bias of V through FlexAttention's ``score_mod``; a kernel only if compiled."""

    def distribute(self, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        bias = self.convV.bias.view(self.heads, -1)

        def add_bias(score, sample, head, position, descriptor):
            return score + bias[head, descriptor]

        return flex_attention(positions, keys, values, score_mod=add_bias, scale=1.0)


class LinearAttentionState(EagerDoubleAttention):
    """The gather as the last state of ``flash-linear-attention``'s chunked linear attention.

    That library has no softmax over positions, so it runs before, and causal outputs, which are
    thrown away: only the final state is used.
    """

    def forward(self, x: Tensor) -> Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        def tokens(t: Tensor) -> Tensor:  # (batch, positions, heads, channels)
            return self.by_head(t).permute(0, 3, 1, 2).contiguous()

        keys = tokens(self.convB(x)).softmax(1)
        queries = tokens(self.convV(x)).softmax(-1)
        _, state = chunk_linear_attn(
            queries, keys, tokens(self.convA(x)), scale=1.0, output_final_state=True,
            normalize=False,
        )  # fmt: skip
        z = queries.permute(0, 2, 1, 3) @ state.to(x.dtype)  # (batch, heads, positions, features)
        return self.reconstruct(x, z.mT)


def eager_block(problem: Problem, kind: type[EagerDoubleAttention] = EagerDoubleAttention):
    w = problem.workload
    block = kind(w.c, w.c_m, w.c_n, w.heads, axes=len(w.positions))
    if "convV.bias" not in problem.state:
        block.convV.bias = None
    return block


def our_block(problem: Problem, backend: str) -> nn.Module:
    w = problem.workload
    return DoubleAttention(w.c, w.c_m, w.c_n, heads=w.heads, residual=True, backend=backend)
