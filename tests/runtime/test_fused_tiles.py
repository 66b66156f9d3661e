import pytest
import torch

from da_triton.runtime import configs, fused_tiles

TILE = configs.Tile(64, 32, 128, 8, 3, 1)
KEY = ("sm_90", "gather_from_x", 64, 32)


@pytest.fixture
def half():
    return torch.empty(1, dtype=torch.bfloat16)


def test_special_launch_takes_its_own_tile_where_there_is_one(half, monkeypatch):
    monkeypatch.setitem(fused_tiles.SPECIAL, KEY, (32, 4, 1))
    assert fused_tiles.special(TILE, KEY[1], half, "sm_90") == (64, 32, 32, 4, 1, 1)
    assert fused_tiles.special(TILE, KEY[1], half, "no such") == TILE


def test_other_dtypes_keep_theirs(half, monkeypatch):
    monkeypatch.setitem(fused_tiles.SPECIAL, KEY, (32, 4, 1))
    assert fused_tiles.special(TILE, KEY[1], half.float(), "sm_90") == TILE


def test_special_tiles_stand_for_tiles():
    assert fused_tiles.SPECIAL.keys() <= fused_tiles.TILES.keys()
    assert all(fused_tiles.SPECIAL[key] != fused_tiles.TILES[key] for key in fused_tiles.SPECIAL)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_has_a_tile_on_every_architecture(arch):
    kernels = {key[1] for key in fused_tiles.TILES}
    assert {key[1] for key in fused_tiles.TILES if key[0] == arch} == kernels
