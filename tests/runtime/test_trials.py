"""Arguments that kernels are proved with, and what distinguishes two launches."""

import pytest
import torch

from da_triton.kernels import block_backward  # noqa: F401, its launchers are proved
from da_triton.runtime import guard, launch, trials
from support.numerics import DEVICE

DTYPE = torch.float16


def test_arguments_to_prove_with_are_small_and_aligned_alike():
    x = torch.empty(5, 3 * 40, 5000, device=DEVICE)[:, 40:80]  # a slice: samples are further apart
    rows = x.mT.contiguous().mT
    expanded = x[:1].expand(5, -1, -1)
    for value in (x, rows, expanded):
        sizes = [trials.few(letter, s) for letter, s in zip("N-L", value.shape, strict=True)]
        like = trials.like(value, sizes)
        assert sizes == [2, 40, trials.LONGEST - 128 + 5000 % 128]
        assert all((s - t) % 128 == 0 for s, t in zip(value.stride(), like.stride(), strict=True))
        assert like.data_ptr() % 16 == value.data_ptr() % 16
        assert [s == 0 for s in like.stride()] == [s == 0 for s in value.stride()]
    assert trials.few("-", 10**6) == 10**6


@pytest.mark.parametrize("length", [9, 49, 196, 784, 3136, 2**21])
def test_every_length_is_proved_with_several_steps(length):
    """Positions of the longest tile, in each of two programs; with the same remainder."""
    few = trials.few("L", length)
    assert few >= 2 * 3 * 128
    assert (few - length) % 128 == 0


def test_cases_differ_where_code_does():
    base = torch.empty(4, 64, 800, dtype=DTYPE, device=DEVICE)
    given = [
        base[..., :784], base[..., 1:785], base[..., :196], base[:1, :, :784], base[:, :32, :784],
        base[..., :784].float(), base[..., :784].mT.contiguous().mT, base[..., :783], base[..., :4],
        base[:1, :, :784].expand(4, -1, -1),
    ]  # fmt: skip
    assert len({trials.words(x, "N-L") for x in given}) == len(given)
    same = trials.words(base[..., :784], "N-L")
    assert (
        trials.words(torch.empty(7, 64, 800, dtype=DTYPE, device=DEVICE)[..., :144], "N-L") == same
    )
    exact = {trials.exact("", (x,), {}) for x in given}
    assert len(exact) == len(given)


@pytest.mark.parametrize("channels_last", [False, True])
def test_strides_that_the_code_compares_are_part_of_a_case(channels_last):
    """Whether dO has the strides of X: in the case, and in the tensors of its proof."""
    spec = guard.LAUNCHERS["block_bwd_distribute"]

    def activations(channels, length=1024):
        x = torch.zeros(2, channels, length)
        return (x.mT.contiguous().mT if channels_last else x)[:, :64, :1024]

    h, dv = torch.zeros(2, 64, 32), torch.zeros(2, 32, 1024)
    others = torch.zeros(32, 64), None, None, h, dv
    options = {"heads": 1, "logit_scale": 1.0, "softmax": True}
    alike, apart = (
        spec.bound((activations(64), dout, *others), options)
        for dout in (activations(64), activations(192) if channels_last else activations(64, 2048))
    )
    assert spec.case(alike) != spec.case(apart)
    for given, same in ((alike, True), (apart, False)):
        made = spec.small(given)
        assert launch.same_steps(made["x"], made["dout"]) == same
        assert made["x"].isfinite().all()
