"""The tuning loop on interpreted kernels, with times that the tests choose."""

import pytest
import torch

import da_triton
from bench import tune
from bench.measure import Budget
from bench.tune import Choice
from bench.workloads import Workload
from da_triton.ops.triton import routes
from da_triton.runtime import tiles
from support.processes import python

CPU = torch.device("cpu")
WORK = Workload("small", 1, 64, (8, 16), 32, 32)
SITE = tiles.Key("project_distribute", tiles.ALIGNED, "half", 64, 32)
PRESENT = (32, 4, 1, 1)  # of every fused kernel, interpreted
FASTER = (64, 4, 2, 2)
OTHERS = [FASTER, (16, 4, 1, 1)]


class Step:
    """A pass of which only the tile is known that it had."""

    def __init__(self, results=None, fails=()):
        self.results, self.fails, self.captured = results or {}, fails, []

    def __call__(self):
        x = torch.empty(1, dtype=torch.bfloat16)
        tile = tiles.tile(SITE.kernel, x, 64, 32, SITE.variant)[2:6]
        self.captured.append(tile)
        if tile in self.fails:
            raise RuntimeError("out of resource: shared memory")
        return (torch.full((4,), self.results.get(tile, 1.0)),)


class Graph:
    """What is recorded with a candidate's tile; replayed, the step itself is not called again."""

    def __init__(self, run):
        self.results, self.tile = run(), run.captured[-1]

    def __call__(self):
        return self.results


@pytest.fixture
def compiled(monkeypatch):
    """The lists of tiles that were compiled in parallel, where graphs need no GPU."""
    compiled = []
    monkeypatch.setattr(
        tune, "compile_in_parallel", lambda _, entries, *__: compiled.append(entries)
    )
    monkeypatch.setattr(tune, "Replay", Graph)
    return compiled


@pytest.fixture
def tuned(monkeypatch, interpreted_tiles, compiled):
    """Tunes sites with a given step and times; the choices, as they come, and the timed tiles."""

    def tuned(run, times, budget=1e9, sites=(SITE,)):
        timed = []

        def timer(closure, *, launches_count):
            assert not launches_count
            timed.append(closure.tile)
            return times[closure.tile]

        monkeypatch.setattr(tune, "sites", lambda *_: dict.fromkeys(sites, (PRESENT, run)))
        monkeypatch.setattr(tune, "candidates_of", lambda kernel: [PRESENT, *OTHERS])
        return tune.tune([WORK], CPU, timer, Budget(budget)), timed

    return tuned


@pytest.fixture
def interpreted_tiles(monkeypatch):
    """Interpreted kernels take the tiles of an H200; here they start from a small one."""
    present = {key: tiles.Entry(*PRESENT) for key in tiles.shipped("sm_90")}
    monkeypatch.setattr(tiles, "shipped", lambda arch: present)


@pytest.mark.usefixtures("interpreted_tiles")
def test_sites_are_all_kernels_of_the_planned_route_and_the_unfused_one():
    found = tune.sites(WORK, CPU)
    assert found[SITE][0] == PRESENT
    named = {(site.kernel, site.variant) for site in found}
    assert named >= {
        ("gather_from_x", "aligned"), ("gather_from_x", "mask"), ("project_distribute", "v"),
        ("block_bwd_gather_full_c", "mask"), ("block_bwd_distribute", "v"),
        ("combine_backward", "plain"), ("gather", "plain"), ("full_n", "gradient"),
        ("gather_backward", "aligned"),
    }  # fmt: skip
    assert len(found[SITE][1]()) == 1  # the forward pass is enough
    assert len(found[SITE._replace(kernel="block_bwd_distribute", variant="plain")][1]()) > 1


def test_planned_route_is_that_of_an_odd_number_of_positions():
    work = Workload("odd", 2, 256, (7, 7), 128, 128, cpu_n=2)
    planned, *_ = next(tune.steps(work, CPU)).args
    assert planned == da_triton.plan((2, 256, 7, 7), 128, 128).route
    assert planned != da_triton.plan((2, 256, 7, 8), 128, 128).route  # whose loads are wide


@pytest.mark.parametrize(("fast", "best"), [(0.5, FASTER), (1.0, PRESENT), (2.0, PRESENT)])
def test_faster_candidate_replaces_the_present_tile(tuned, compiled, capsys, fast, best):
    run = Step()
    (choice,), timed = tuned(run, {PRESENT: 1.0, FASTER: fast, OTHERS[1]: 3.0})
    best_us = 1000 * min(1.0, fast)
    assert choice == Choice(SITE, WORK.name, PRESENT, best, 1000.0, best_us, 3)
    assert compiled == [[PRESENT, *OTHERS]]
    assert run.captured == [PRESENT, *OTHERS]
    assert timed == [PRESENT, *OTHERS] * tune.ROUNDS  # in turns
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (Step({FASTER: 1.1}), "its results differ by 1.0e-01 from those of (32, 4, 1, 1)"),
        (Step({FASTER: float("nan")}), "its results differ by nan"),
        (Step(fails=[FASTER]), "RuntimeError: out of resource: shared memory"),
    ],
)
def test_candidate_that_fails_or_is_wrong_is_not_timed(tuned, capsys, wrong, why):
    (choice,), timed = tuned(wrong, {PRESENT: 1.0, OTHERS[1]: 3.0})
    assert choice.best == PRESENT
    assert choice.candidates == 2
    assert FASTER not in timed
    assert f"tile {FASTER} is left out: " in (printed := capsys.readouterr().out)
    assert why in printed


def test_site_whose_present_tile_fails_has_no_choice(tuned, capsys):
    assert not [*tuned(Step(fails=[PRESENT]), {})[0]]
    assert capsys.readouterr().out.count("\n") == 1


def test_tuning_ends_with_the_context(tuned, capsys, monkeypatch):
    run = Step(fails=[FASTER])
    monkeypatch.setattr(tune, "usable", lambda device: FASTER not in run.captured)
    assert not [*tuned(run, {})[0]]
    assert "tuning ends here" in capsys.readouterr().out


def test_difference_within_the_noise_changes_nothing():
    present, noisy, clear = [1.0, 1.1, 1.2, 1.3], [0.9, 1.0, 1.15, 1.2], [0.5, 0.6, 0.7, 0.8]
    for times, best in ((noisy, PRESENT), (clear, FASTER)):
        assert tune.choose(SITE, "w", PRESENT, {PRESENT: present, FASTER: times}).best == best


def test_step_with_another_tile_gives_the_same(interpreted_tiles):
    run = next(tune.steps(WORK, CPU))
    (before,) = run()
    with tune.tile_of(SITE, (16, 4, 1, 2)):
        (after,) = run()
    torch.testing.assert_close(before, after, rtol=2e-2, atol=2e-2)


def test_used_up_budget(tuned):
    assert not [*tuned(Step(), {}, budget=0)[0]]


def test_choices_come_one_by_one(tuned):
    """A run that is killed while it tunes the second site leaves the first one's choice."""
    sites = SITE, SITE._replace(kernel="gather_from_x")
    times = dict.fromkeys([PRESENT, *OTHERS], 1.0)
    choices, timed = tuned(Step(), times, sites=sites)
    for number, site in enumerate(sites, 1):
        assert next(choices).site == site
        assert len(timed) == number * len(times) * tune.ROUNDS


@pytest.mark.usefixtures("compiled")
def test_candidates_beyond_the_budget_are_left_out(capsys):
    run = Step()
    budget = Budget(1.5, lambda: float(len(run.captured)))  # a second per capture
    ready = tune.prepared(SITE, [PRESENT, *OTHERS], run, CPU, budget)
    assert list(ready) == [PRESENT, FASTER]
    left_out = f"{SITE}: tile {OTHERS[1]} and those after it are left out, for lack of time.\n"
    assert capsys.readouterr().out == left_out


def test_no_choice_is_made_from_a_single_round():
    def timer(closure, *, launches_count):
        return closure()

    times = tune._times({PRESENT: lambda: 1.0, FASTER: lambda: 2.0}, timer, Budget(0))
    assert times == {PRESENT: [1.0] * tune.ROUNDS_MIN, FASTER: [2.0] * tune.ROUNDS_MIN}


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
    out, grad_x, *grads = step()
    assert out.shape == grad_x.shape == (WORK.batch(CPU), 64, 128)
    assert 1 + len(grads) == len(routes.Gradients._fields)
    assert all(t.isfinite().all() for t in (out, grad_x, *grads))


def test_the_package_reads_what_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("DA_TRITON_TILES", str(tmp_path))
    path = tune.path_of("NVIDIA Test (80GB)")
    tune.write(path, "NVIDIA Test (80GB)", [Choice(SITE, "w", PRESENT, FASTER, 2.0, 1.0, 3)])
    assert path == tmp_path / "nvidia-test-80gb.json"
    entry = tiles.Entry(*FASTER, note="1.00 us on w; (32, 4, 1, 1) took 2.00 us")
    assert tiles.tuned("NVIDIA Test (80GB)") == {SITE: entry}


COMPILED = """
import os, tempfile
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
from unittest import mock
import torch
from triton import knobs
from triton.runtime.jit import JITFunction
import bench
before = dict(os.environ)
import bench.gpu, bench.measure, bench.tune as tune
from bench.codegen import compile, survey
from bench.warm import on_absent, without_launches
from bench.workloads import Workload
from da_triton.runtime.tiles import Key

site, entries = SITE, [(32, 4, 2, 1), (64, 8, 2, 2)]
run = next(tune.steps(WORK, torch.device("cpu")))
with on_absent("sm_90"), without_launches():
    tune.compile_in_parallel(site, entries, run, bench.measure.Budget(600))
    with (
        mock.patch.object(JITFunction, "_do_compile", side_effect=AssertionError("compiled twice")),
        mock.patch.object(JITFunction, "run", autospec=True, side_effect=JITFunction.run) as launch,
    ):
        for entry in entries:
            with tune.tile_of(site, entry):
                run()
launched = [call.args[0].fn.__name__ for call in launch.call_args_list]
print(launched.count("project_distribute_kernel"))
with survey.on("sm_90"):
    recorded = survey.record(site.kernel, (64, 32, 32), survey.Variant(), entries[0])
print(compile.compile_launch(recorded[0], "sm_90").spills)
print({k for k in os.environ.keys() | before.keys() if os.environ.get(k) != before.get(k)})
print(knobs.compilation.disable_line_info)
"""


def test_candidates_are_compiled_once_under_the_keys_of_later_launches():
    """Neither by importing the ahead-of-time compiler nor by using it does the key change."""
    ran = python("-c", COMPILED.replace("SITE", repr(SITE)).replace("WORK", repr(WORK)))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n") == ["2", "0", "set()", "False", ""]
