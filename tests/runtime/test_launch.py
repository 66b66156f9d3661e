"""Host decisions of a launch: strides and their unit, split of positions, memory formats, tiles."""

import pytest
import torch

from da_triton.kernels import prologue
from da_triton.runtime import launch, tiles


def activations(length, channels=32, rows=None):
    return torch.empty(2, 1, channels, rows or length, device="meta")[..., :length]


@pytest.mark.parametrize(
    ("length", "rows", "unit"),
    [(784, None, 1), (196, None, 4), (200, None, 8), (98, None, 2), (49, None, 1), (784, 788, 4)],
)
def test_alignment(length, rows, unit):
    """The largest unit of rows that the compiler would not see by itself."""
    x = activations(length, rows=rows)
    assert launch.alignment(x) == unit
    n, h, c, last = launch.strides(x, unit)
    assert (n * unit, h * unit, c * unit, last) == (x.stride(0), 0, x.stride(2), 1)


def test_alignment_is_that_of_all_activations():
    assert launch.alignment(activations(196), activations(196, rows=198)) == 2
    assert launch.alignment(activations(196), activations(196).mT.contiguous().mT) == 1
    assert launch.alignment(activations(196)[:, :, ::2]) == 4


def test_strides_of_axes_of_one_element_are_zero():
    x = torch.empty(1, 1, 3, 4).as_strided((1, 1, 3, 4), (7, 5, 4, 1))
    assert launch.strides(x, 1) == (0, 0, 4, 1)


@pytest.mark.parametrize("programs", [1, 3, 16, 64, 132, 1000])
@pytest.mark.parametrize("length", [1, 49, 784, 6400, 2**21])
def test_splits_cover_all_positions_in_about_one_wave(programs, length, monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    tile = tiles.Tile(64, 64, 64, 4, 2, 1)
    blocks, splits = launch.split_positions(programs, length, tile, None)
    assert blocks * splits * 64 >= length
    assert blocks * (splits - 1) * 64 < length, "no empty split"
    assert splits * programs <= max(132, programs)


@pytest.mark.parametrize(("programs", "expected"), [(24, 5), (48, 5), (96, 4), (132, 1), (192, 2)])
def test_several_waves_leave_less_of_the_gpu_idle(programs, expected, monkeypatch):
    """Where one is nearly full, there is one: 120 of 132 programs; else 240, 384, …"""
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    tile = tiles.Tile(128, 128, 64, 4, 2)
    blocks, splits = launch.split_positions(programs, 2**16, tile, None, 4)
    assert splits == expected
    assert blocks * (splits - 1) * 64 < 2**16 <= blocks * splits * 64


def test_splits_fill_as_many_programs_as_an_sm_should_hold(monkeypatch):
    monkeypatch.setattr(launch, "num_sms", lambda device: 132)
    for held, splits in ((1, 16), (2, 32), (3, 48)):
        tile = tiles.Tile(64, 64, 64, 4, 2, held)
        assert launch.split_positions(8, 64 * 16 * 48, tile, None)[1] == splits


@pytest.mark.parametrize(
    ("length", "expected"),
    [(784, "aligned"), (24, "aligned"), (196, "plain"), (50, "plain"), (49, "odd")],
)
def test_rows_that_have_a_tile_of_their_own(length, expected):
    x = torch.empty(2, 64, length)
    assert launch.rows(x) == expected
    assert launch.rows(x.transpose(1, 2).contiguous().transpose(1, 2)) == tiles.PLAIN
    assert launch.rows(torch.empty(2, 64, length + 1)[..., :length]) != tiles.ALIGNED


def test_memory_formats():
    nchw, nhwc = torch.empty(2, 3, 4, 5), torch.empty(2, 5, 3, 4).permute(0, 2, 3, 1)
    assert not launch.is_channels_last(nchw)
    assert launch.is_channels_last(nhwc)
    assert launch.empty_activations_like(nchw, 7).stride() == (105, 35, 5, 1)
    assert launch.empty_activations_like(nhwc, 7).stride() == (105, 7, 1, 21)
    assert launch.empty_activations_like(nhwc).stride() == nhwc.stride()


@pytest.mark.parametrize(
    ("rows", "length", "channels_last", "expected"),
    [
        ([64, 24, 24], 196, False, True),
        ([64, 19, 19], 196, False, False),  # the second 19 channels would begin at 8 bytes
        ([64, 20, 20], 196, False, True),
        ([64, 19, 19], 49, False, True),  # rows of 49 are never wide
        ([64, 24, 24], 49, True, True),
        ([64, 20, 20], 196, True, False),
    ],
)
def test_activations_share_a_tensor_only_where_their_rows_stay_wide(
    rows, length, channels_last, expected
):
    x = torch.empty(2, 32, length, dtype=torch.bfloat16)
    x = x.mT.contiguous().mT if channels_last else x
    assert prologue._aligned_together(x, rows) == expected
