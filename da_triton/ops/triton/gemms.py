"""Vendor GEMMs and small matrices around the core, and views by head."""

from ...kernels import combine
from ...projection import project
from ...runtime import tiles


def project_abv(x, matrices, rows, heads):
    """A, B or V per entry of ``rows``, by head, without bias; ``matrices``: from ``prologue``."""
    if len(matrices) == 1:
        activations = project(x, matrices[0][: sum(rows)], None).split(rows, 1)
    else:
        activations = [project(x, matrix, None) for matrix in matrices[: len(rows)]]
    return [by_head(y, heads) for y in activations]


def by_head(y, heads):
    """``(N, channels, L)`` as ``(N, heads, channels / heads, L)``."""
    return y.unflatten(1, (heads, -1))


def shared(x, heads):
    """X with a head axis, expanded without a copy."""
    return x[:, None].expand(-1, heads, -1, -1)


def fit(w, heads):
    """Whether ``combine`` has a tile for the small products of these weights."""
    return tiles.fits("combine", w.a, w.a.shape[0] // heads, 1)


def reconstructing(g, w, heads, scale, lowp=None):
    """``H = scale · Wo G``, ``(N, C', heads·n)`` in the dtype of the weights.

    ``lowp``: G in that dtype, from which one head's H is a vendor GEMM.
    """
    if lowp is not None and heads == 1:
        h = lowp.new_empty((len(g), len(w.out), g.shape[3]))
        return h.baddbmm_(w.out.expand(len(g), -1, -1), lowp.squeeze(1), beta=0, alpha=scale)
    if fit(w, heads):
        return combine.reconstructing(g, w, heads=heads, scale=scale)
    per_head = w.out.unflatten(1, (heads, -1)).transpose(0, 1).to(g.dtype)
    h = scale * (per_head @ g)  # (N, heads, C', n)
    return h.transpose(1, 2).flatten(2).to(w.a.dtype).contiguous()
