"""Activations and a layer whose positions are split over ranks."""

import torch

from da_triton import DoubleAttention

LENGTH = 20
CUTS = {2: (0, 13, LENGTH), 4: (0, 3, 3, 11, LENGTH)}  # uneven; rank 1 of four has no position
SHAPE = (2, 8, LENGTH)


def own(x, rank, cuts):
    """This rank's slice of the positions."""
    return x[..., cuts[rank] : cuts[rank + 1]]


def leaves(tensors, rank=None, cuts=None):
    shards = tensors if rank is None else [own(x, rank, cuts) for x in tensors]
    return [x.detach().clone().requires_grad_() for x in shards]


def activations(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (3 * torch.randn(3, c, LENGTH, generator=generator, dtype=torch.float64)).to(dtype)
        for c in (6, 8, 8)
    ]


def block(group=None, backend="torch", **options):
    torch.manual_seed(5)
    layer = DoubleAttention(
        8, 4, 6, heads=2, residual=True, process_group=group, backend=backend,
        dtype=torch.float64, **options,
    )  # fmt: skip
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(3)  # logits that make a difference
    return layer


def image():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def trained(layer, x, mask=None, call=None):
    """The result, and the gradients of x and of the parameters."""
    (x,) = leaves([x])
    y = (layer if call is None else call)(x, mask)
    y.square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    return [y.detach(), x.grad, *grads]
