"""The tuning loop on interpreted kernels, with times that the tests choose."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.measure import Budget
from bench.tune import Choice, Site
from bench.workloads import Workload
from da_triton.kernels import configs, fused_tiles, measured

ROOT = Path(tune.__file__).parents[1]
CPU = torch.device("cpu")
WORK = Workload("small", 1, 64, (8, 16), 32, 32, 1, "test")
SITE = Site("project_distribute", 64, 32)
PRESENT = (32, 4, 1)  # of every fused kernel, interpreted


def always(site, work, candidates):
    return [(64, 4, 2), (16, 4, 1)]


class Clock:
    """Milliseconds by the tile that the site has during the call."""

    def __init__(self, times):
        self.times, self.seen = times, []

    def __call__(self, run, *, launches_count):
        x = torch.empty(1, dtype=torch.bfloat16)
        tile = configs.fused_tile(SITE.kernel, x, 64, 32)
        entry = (tile.block_l, tile.num_warps, tile.num_stages)
        self.seen.append(entry)
        return self.times[entry]


@pytest.fixture
def interpreted_tiles(monkeypatch):
    """Interpreted kernels take the tiles of an H200; here they start from a small one."""
    for key in list(fused_tiles.TILES):
        if key[0] == "sm_90":
            monkeypatch.setitem(fused_tiles.TILES, key, PRESENT)


@pytest.mark.usefixtures("interpreted_tiles")
def test_sites_are_the_fused_kernels_of_the_planned_route():
    found = dict(tune.sites(WORK, CPU))
    assert found[SITE] == PRESENT
    names = {site.kernel for site in found}
    assert names <= {*tune.FORWARD_KERNELS, *tune.BACKWARD_KERNELS}
    assert names & set(tune.FORWARD_KERNELS)


@pytest.mark.usefixtures("interpreted_tiles")
@pytest.mark.parametrize(("fast", "best"), [(0.5, (64, 4, 2)), (1.0, PRESENT), (2.0, PRESENT)])
def test_faster_candidate_replaces_the_present_tile(monkeypatch, fast, best):
    monkeypatch.setattr(tune, "sites", lambda work, device: [(SITE, PRESENT)])
    clock = Clock({PRESENT: 1.0, (64, 4, 2): fast, (16, 4, 1): 3.0})
    told = []
    (choice,) = tune.tune([WORK], CPU, clock, Budget(1e9), always, told.append)
    assert (choice.site, choice.present, choice.best) == (SITE, PRESENT, best)
    assert choice.present_us == 1000.0
    assert choice.best_us == min(1.0, fast) * 1000.0
    assert choice.candidates == 3
    assert clock.seen[:6] == [PRESENT, (64, 4, 2), (16, 4, 1)] * 2  # in turns
    assert len(told) == 1


def test_difference_within_the_noise_changes_nothing():
    candidates = [PRESENT, (64, 4, 2)]
    noisy = [[1.0, 1.1, 1.2, 1.3], [0.9, 1.0, 1.15, 1.2]]
    assert tune.choose(SITE, "w", candidates, noisy).best == PRESENT
    clear = [[1.0, 1.1, 1.2, 1.3], [0.5, 0.6, 0.7, 0.8]]
    assert tune.choose(SITE, "w", candidates, clear).best == (64, 4, 2)


def test_step_with_another_tile_gives_the_same(interpreted_tiles):
    run = tune.step(WORK, CPU, backward=False)
    (before,) = run()
    with tune.tile_of(SITE, (16, 4, 1)):
        (after,) = run()
    torch.testing.assert_close(before, after, rtol=2e-2, atol=2e-2)


def test_used_up_budget(monkeypatch):
    monkeypatch.setattr(tune, "sites", lambda work, device: [(SITE, PRESENT)])
    assert tune.tune([WORK], CPU, Clock({}), Budget(0), always) == []


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "FOLDER", tmp_path)
    measured.tiles.cache_clear()
    path = tune.path_of("NVIDIA Test (80GB)")
    tune.write(path, "NVIDIA Test (80GB)", [Choice(SITE, "w", PRESENT, (64, 4, 2), 2.0, 1.0, 3)])
    yield path
    measured.tiles.cache_clear()


def test_table_comes_back(table):
    assert table.name == "nvidia-test-80gb.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured.tiles("NVIDIA Test (80GB)") == {tuple(SITE): (64, 4, 2)}
        assert measured.tiles("Another card") == {}


def test_measured_tile_is_taken_on_its_card(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test (80GB)")
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    x = torch.empty(1, dtype=torch.bfloat16)
    on_card = type("X", (), {"device": torch.device("cuda", 0), "element_size": lambda self: 2})()
    tile = configs.fused_tile(SITE.kernel, on_card, 64, 32)
    assert (tile.block_l, tile.num_warps, tile.num_stages) == (64, 4, 2)
    shipped = configs.fused_tile(SITE.kernel, x, 64, 32)
    assert shipped[2:5] == fused_tiles.TILES[("sm_90", *SITE)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"card": "NVIDIA Other"}, "they are of 'NVIDIA Other'"),
        ({"triton": "1.0"}, "they are of Triton 1.0"),
        ({"tiles": [{"kernel": "k"}]}, "block_m"),
        ({"tiles": 3}, "not iterable"),
        *(
            ({"tiles": [{"kernel": "k", "block_m": 1, "block_n": 1, "tile": tile}]}, told)
            for tile, told in (
                ([48, 4, 1], "[48, 4, 1]"),
                ([64, 5, 1], "[64, 5, 1]"),
                (["a", 4, 1], "not supported"),
            )
        ),
        (None, "Expecting value"),
    ],
)  # fmt: skip
def test_table_that_makes_no_sense_is_ignored_with_one_warning(table, change, told):
    text = "nonsense" if change is None else json.dumps({**json.loads(table.read_text()), **change})
    table.write_text(text)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = [measured.tiles("NVIDIA Test (80GB)") for _ in range(2)]
    assert found == [{}, {}]
    assert len(seen) == 1
    assert "da_triton ignores the measured tiles" in str(seen[0].message)
    assert told in str(seen[0].message)


COMPILED = """
import sys
from bench import tune
from bench.tune import Site
from bench.workloads import Workload
work = Workload("small", 1, 256, (16, 16), 64, 64, 1, "test")
site = Site("project_distribute", 256, 64)
clean = tune.compiled_clean("sm_90")(site, work, [(64, 8, 2), (512, 8, 3)])
print(clean)
"""


def test_candidates_that_do_not_compile_are_not_measured():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILED]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[(64, 8, 2)]"
