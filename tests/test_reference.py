"""The definition against the paper's sums, written out with loops over numbers."""

import math

import pytest
import torch

from da_triton import reference

N, M, TOTAL_N, L = 2, 3, 4, 7


def loops(a, b, v):
    """Equations 2 to 5, one number at a time."""
    z = torch.zeros(N, M, L, dtype=torch.float64)
    for s in range(N):
        g = [[0.0] * TOTAL_N for _ in range(M)]
        for k in range(TOTAL_N):
            weight = [math.exp(b[s, k, i]) for i in range(L)]
            for f in range(M):
                g[f][k] = sum(a[s, f, i].item() * w for i, w in enumerate(weight)) / sum(weight)
        for i in range(L):
            share = [math.exp(v[s, k, i]) for k in range(TOTAL_N)]
            for f in range(M):
                z[s, f, i] = sum(g[f][k] * share[k] for k in range(TOTAL_N)) / sum(share)
    return z


@pytest.fixture
def abv():
    return [torch.randn(N, c, L, dtype=torch.float64) for c in (M, TOTAL_N, TOTAL_N)]


def test_core_is_the_paper(abv):
    a, b, v = (x[:, None] for x in abv)
    torch.testing.assert_close(reference.distribute(reference.gather(a, b), v)[:, 0], loops(*abv))


def test_axes_are_not_interchangeable(abv):
    a, b, v = abv
    right = loops(a, b, v)
    swapped = a @ b.softmax(1).mT @ v.softmax(2)
    over_the_batch = a @ b.softmax(0).mT @ v.softmax(0)
    assert (swapped - right).abs().max() > 0.1
    assert (over_the_batch - right).abs().max() > 0.1


def test_block_is_three_convolutions_the_core_and_one_more(abv):
    x = torch.randn(N, 5, L, dtype=torch.float64)
    w = [
        torch.randn(o, i, dtype=torch.float64)
        for o, i in ((M, 5), (TOTAL_N, 5), (TOTAL_N, 5), (5, M))
    ]
    c = [torch.randn(o, dtype=torch.float64) for o in (M, TOTAL_N, TOTAL_N, 5)]
    out = reference.block(
        x, w[0], c[0], w[1], c[1], w[2], c[2], w[3], c[3],
        heads=1, logit_scale=1.0, logit_scale_v=1.0, scale=1.0, softmax_v=True, residual=x,
        mask=None,
    )  # fmt: skip
    conv = torch.nn.functional.conv1d
    z = loops(*(conv(x, w[i][..., None], c[i]) for i in range(3)))
    torch.testing.assert_close(out, x + conv(z, w[3][..., None], c[3]))


def test_a_sample_does_not_depend_on_its_neighbours(abv):
    a, b, v = (x[:, None] for x in abv)
    both = reference.distribute(reference.gather(a, b), v)
    alone = reference.distribute(reference.gather(a[:1], b[:1]), v[:1])
    torch.testing.assert_close(both[:1], alone)


def test_mask_is_leaving_positions_out(abv):
    a, b, _ = (x[:, None] for x in abv)
    mask = torch.ones(N, L, dtype=torch.bool)
    mask[:, 4:] = False
    torch.testing.assert_close(
        reference.gather(a, b, mask=mask), reference.gather(a[..., :4], b[..., :4])
    )
    extra = torch.randn(N, 1, M, 2, dtype=a.dtype), torch.randn(N, 1, TOTAL_N, 2, dtype=a.dtype)
    joined = [torch.cat([x[..., :4], e], -1) for x, e in zip((a, b), extra, strict=True)]
    torch.testing.assert_close(
        reference.gather(a, b, mask=mask, extra=extra), reference.gather(*joined)
    )


def test_heads_are_blocks_of_channels(abv):
    a, b, v = (torch.randn(N, 2, c, L, dtype=torch.float64) for c in (M, TOTAL_N, TOTAL_N))
    both = reference.distribute(reference.gather(a, b), v)
    for h in range(2):
        torch.testing.assert_close(both[:, h], loops(a[:, h], b[:, h], v[:, h]))


def test_scales(abv):
    a, b, v = (x[:, None] for x in abv)
    g = reference.gather(a, b, logit_scale=0.5)
    torch.testing.assert_close(g, reference.gather(a, 0.5 * b))
    z = reference.distribute(g, v, scale=3.0, logit_scale=0.5)
    torch.testing.assert_close(z, 3 * reference.distribute(g, 0.5 * v))
    torch.testing.assert_close(
        reference.distribute(g, v, softmax=False, logit_scale=0.5), 0.5 * (g @ v)
    )
