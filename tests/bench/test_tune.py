"""The tuning loop on interpreted kernels, with times that the tests choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import tune
from bench.measure import Budget
from bench.tune import Choice
from bench.workloads import Workload
from da_triton.ops.triton import routes
from da_triton.runtime import launch, tiles

ROOT = Path(tune.__file__).parents[1]
CPU = torch.device("cpu")
WORK = Workload("small", 1, 64, (8, 16), 32, 32)
SITE = tiles.Key("project_distribute", tiles.PLAIN, "half", 64, 32)
PRESENT = (32, 4, 1)  # of every fused kernel, interpreted


OTHERS = [(64, 4, 2), (16, 4, 1)]


def present_tile():
    tile = tiles.tile(SITE.kernel, torch.empty(1, dtype=torch.bfloat16), 64, 32)
    return tile.block_l, tile.num_warps, tile.num_stages


class Step:
    """A step of which only the tile is known that it had."""

    def __init__(self, results=None, fails=()):
        self.results, self.fails, self.seen = results or {}, fails, []

    def __call__(self):
        self.seen.append(present_tile())
        if self.seen[-1] in self.fails:
            raise RuntimeError("out of resource: shared memory")
        return (torch.full((4,), self.results.get(self.seen[-1], 1.0)),)


class Clock:
    """Milliseconds by the tile that the call had."""

    def __init__(self, run, times):
        self.run, self.times, self.seen = run, times, []

    def __call__(self, closure, *, launches_count):
        assert not launches_count
        closure()
        self.seen.append(self.run.seen[-1])
        return self.times[self.seen[-1]]


@pytest.fixture
def tuned(monkeypatch, interpreted_tiles):
    """Tunes one site with a given step and times; the clock, the choices, and what was printed."""
    monkeypatch.setattr(tune, "sites", lambda work, device: {SITE: (PRESENT, steps[0])})
    monkeypatch.setattr(tune, "candidates_of", lambda site: [PRESENT, *OTHERS])
    steps = []

    def tuned(run, times, budget=1e9, save=len):
        steps[:] = [run]
        clock, said = Clock(run, times), []
        return clock, tune.tune([WORK], CPU, clock, Budget(budget), said.append, save), said

    return tuned


@pytest.fixture
def interpreted_tiles(monkeypatch):
    """Interpreted kernels take the tiles of an H200; here they start from a small one."""
    present = {key: tiles.Entry(*PRESENT) for key in tiles.shipped("sm_90")}
    monkeypatch.setattr(tiles, "shipped", lambda arch: present)
    launch.forget()
    yield
    launch.forget()


@pytest.mark.usefixtures("interpreted_tiles")
def test_sites_are_all_kernels_of_the_planned_route_and_the_unfused_one():
    found = tune.sites(WORK, CPU)
    assert found[SITE][0] == PRESENT
    named = {(site.kernel, site.variant) for site in found}
    assert named >= {
        ("gather_from_x", "plain"), ("gather_from_x", "mask"), ("project_distribute", "v"),
        ("block_bwd_gather", "mask"), ("block_bwd_distribute", "v"), ("combine_backward", "plain"),
        ("gather", "plain"), ("full_n", "gradient"), ("gather_backward", "plain"),
    }  # fmt: skip
    assert len(found[SITE][1]()) == 1  # the forward pass is enough
    assert len(found[SITE._replace(kernel="block_bwd_distribute")][1]()) > 1


@pytest.mark.parametrize(("fast", "best"), [(0.5, (64, 4, 2)), (1.0, PRESENT), (2.0, PRESENT)])
def test_faster_candidate_replaces_the_present_tile(tuned, fast, best):
    times = {PRESENT: 1.0, (64, 4, 2): fast, (16, 4, 1): 3.0}
    clock, (choice,), said = tuned(Step(), times)
    assert (choice.site, choice.present, choice.best) == (SITE, PRESENT, best)
    assert choice.present_us == 1000.0
    assert choice.best_us == min(1.0, fast) * 1000.0
    assert choice.candidates == 3
    assert clock.seen == [PRESENT, *OTHERS] * tune.ROUNDS  # in turns
    assert len(said) == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Step({(64, 4, 2): 1.1}), "its results differ by 1.0e-01 from those of (32, 4, 1)"),
        (Step({(64, 4, 2): float("nan")}), "its results differ by nan"),
        (Step(fails=[(64, 4, 2)]), "RuntimeError: out of resource: shared memory"),
    ],
)
def test_candidate_that_fails_or_is_wrong_is_not_timed(tuned, wrong, why):
    times = {PRESENT: 1.0, (64, 4, 2): 0.1, (16, 4, 1): 3.0}
    clock, (choice,), said = tuned(wrong, times)
    assert choice.best == PRESENT
    assert choice.candidates == 2
    assert (64, 4, 2) not in clock.seen
    assert "tile (64, 4, 2) is left out" in said[0]
    assert why in said[0]


def test_site_whose_present_tile_fails_has_no_choice(tuned):
    _, choices, said = tuned(Step(fails=[PRESENT]), {})
    assert choices == []
    assert len(said) == 1


def test_tuning_ends_with_the_context(tuned, monkeypatch):
    run = Step(fails=[(64, 4, 2)])
    monkeypatch.setattr(tune, "usable", lambda device: (64, 4, 2) not in run.seen)
    clock, choices, said = tuned(run, {})
    assert choices == []
    assert clock.seen == []
    assert "tuning ends here" in said[-1]


def test_candidates_are_compiled_together_and_captured(tuned, monkeypatch):
    """On a GPU what is timed is a graph, recorded with the candidate's tile."""
    compiled, captured = [], []

    class Replay:
        def __init__(self, call):
            captured.append(present_tile())
            assert compiled
            self.tile, self.results = captured[-1], call()

        def __call__(self):
            run.seen.append(self.tile)  # replayed: the step itself is not called again
            return self.results

    monkeypatch.setattr(tune, "on_gpu", lambda device: True)
    monkeypatch.setattr(tune, "Replay", Replay)
    monkeypatch.setattr(
        tune,
        "compile_in_parallel",
        lambda site, entries, run, budget: compiled.append(list(entries)),
    )
    run = Step()
    times = {PRESENT: 1.0, (64, 4, 2): 0.5, (16, 4, 1): 3.0}
    _, (choice,), _ = tuned(run, times)
    assert compiled == [[PRESENT, *OTHERS]]
    assert captured == [PRESENT, *OTHERS]
    assert choice.best == (64, 4, 2)


def test_difference_within_the_noise_changes_nothing():
    candidates = [PRESENT, (64, 4, 2)]
    noisy = [[1.0, 1.1, 1.2, 1.3], [0.9, 1.0, 1.15, 1.2]]
    assert tune.choose(SITE, "w", candidates, noisy).best == PRESENT
    clear = [[1.0, 1.1, 1.2, 1.3], [0.5, 0.6, 0.7, 0.8]]
    assert tune.choose(SITE, "w", candidates, clear).best == (64, 4, 2)


def test_step_with_another_tile_gives_the_same(interpreted_tiles):
    run = next(tune.steps(WORK, CPU))
    (before,) = run()
    with tune.tile_of(SITE, (16, 4, 1)):
        (after,) = run()
    torch.testing.assert_close(before, after, rtol=2e-2, atol=2e-2)


def test_used_up_budget(tuned):
    assert tuned(Step(), {}, budget=0)[1] == []


def test_choices_are_saved_one_by_one(tuned, monkeypatch):
    """A run that is killed while it tunes the second site leaves the first one's choice."""
    second = SITE._replace(kernel="gather_from_x")
    run = Step()
    monkeypatch.setattr(
        tune, "sites", lambda work, device: dict.fromkeys((SITE, second), (PRESENT, run))
    )
    saved = []
    tuned(run, dict.fromkeys([PRESENT, *OTHERS], 1.0), save=lambda found: saved.append(len(found)))
    assert saved == [1, 2]


def test_candidates_beyond_the_budget_are_left_out(tuned):
    said, run = [], Step()
    budget = Budget(1.5, lambda: float(len(run.seen)))  # a second per call
    ready = tune.prepared(SITE, [PRESENT, *OTHERS], run, CPU, said.append, budget)
    assert list(ready) == [PRESENT, OTHERS[0]]
    assert said == [f"{SITE}: tile {OTHERS[1]} and those after it are left out, for lack of time."]


def test_no_choice_is_made_from_a_single_round():
    def timer(closure, *, launches_count):
        return closure()

    times = tune._times([lambda: 1.0, lambda: 2.0], timer, Budget(0))
    assert times == [[1.0] * tune.ROUNDS_MIN, [2.0] * tune.ROUNDS_MIN]


def test_compilations_that_have_not_begun_end_with_the_budget():
    now, begun = [0.0], []

    def compilation():
        begun.append(now[0])
        now[0] += 6.0

    with tune._Timely(1, Budget(10.0, lambda: now[0])) as threads:
        futures = [threads.submit(compilation) for _ in range(4)]
    assert begun == [0.0, 6.0]
    assert [type(f.exception()) for f in futures[2:]] == [TimeoutError] * 2


def test_step_returns_all_gradients(interpreted_tiles):
    """So that a candidate that spoils one is noticed."""
    _, step, *_ = tune.steps(WORK, CPU)
    results = step()
    shapes = [tuple(t.shape) for t in results]
    batch = WORK.batch(CPU)
    assert shapes[:2] == [(batch, 64, 128)] * 2
    assert len(results) == 1 + len(routes.Gradients._fields)
    assert all(t.isfinite().all() for t in results)


def test_the_package_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("DA_TRITON_TILES", str(tmp_path))
    path = tune.path_of("NVIDIA Test (80GB)")
    tune.write(path, "NVIDIA Test (80GB)", [Choice(SITE, "w", PRESENT, (64, 4, 2), 2.0, 1.0, 3)])
    assert path == tmp_path / "nvidia-test-80gb.json"
    launch.forget()
    entry = tiles.Entry(64, 4, 2, "pointers", "1.00 us on w; (32, 4, 1) took 2.00 us")
    assert tiles.tuned("NVIDIA Test (80GB)") == {SITE: entry}


COMPILED = """
import os, sys, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
from unittest import mock
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
import bench
before = dict(os.environ)
import bench.gpu, bench.measure, bench.tune as tune
from bench.codegen import compile, survey
from da_triton.ops.triton import routes
from da_triton.runtime import tiles as table

class Card:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Card())
variant = survey.Variant("nchw", 256)
shapes = (64, 256), (64,), (64, 256), (64, 256), (64,), (256, 64), (256,)
w = routes.Weights(*(survey._empty(variant, *shape) for shape in shapes))
x = survey._empty(variant, 1, 256, 256)
options = routes.Options(1, 1.0, 1.0, 1.0, True, True)
run = lambda: routes.forward(x, w, None, options, survey.route("project_distribute"), False)
site = table.Key("project_distribute", table.PLAIN, "half", 256, 64)
entries = [(32, 4, 2), (64, 8, 2)]

def no_compilation(*args, **options):
    raise AssertionError("compiled twice")

original = JITFunction.run
launched = []

def without_launch(self, *args, grid, warmup, **options):
    launched.append(self.fn.__name__)
    original(self, *args, grid=grid, warmup=True, **options)

with survey.on("sm_90"):
    tune.compile_in_parallel(site, entries, run, bench.measure.Budget(600))
    with (
        mock.patch("triton.compile", no_compilation),
        mock.patch("triton.compiler.compile", no_compilation),
        mock.patch("triton.compiler.compiler.compile", no_compilation),
        mock.patch.object(JITFunction, "run", without_launch),
    ):
        for entry in entries:
            with tune.tile_of(site, entry):
                run()
print(launched.count("project_distribute_kernel"))
with survey.on("sm_90"):
    recorded = survey.record(site.kernel, (256, 64, 64), variant, (32, 4, 2))
print(compile.compile_launch(recorded[0], "sm_90").spills)
print({k for k in os.environ.keys() | before.keys() if os.environ.get(k) != before.get(k)})
print(knobs.compilation.disable_line_info)
"""


def test_candidates_are_compiled_once_under_the_keys_of_later_launches():
    """Neither by importing the ahead-of-time compiler nor by using it does the key change."""
    hidden = ("TRITON_INTERPRET", "TRITON_DISABLE_LINE_INFO")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    command = [sys.executable, "-c", COMPILED]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n") == ["2", "0", "set()", "False", ""]
