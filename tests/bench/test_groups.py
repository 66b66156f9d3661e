"""Groups in a worker, with providers that do to their process what a wrong kernel does."""

import dataclasses
import functools

import pytest
import torch

from bench import groups, networks, providers
from bench.groups import Sweeper, Where
from bench.isolation import Worker
from bench.measure import OK, OUT_OF_TIME, Budget, Effort
from bench.problems import FORWARD, STEP
from bench.providers import GRAPH
from support import fakes

WHERE = Where(
    torch.device("cpu"), torch.float32, fakes.ScriptedTimer, Effort(2, 3, 3, 0.0), silence=10.0
)  # fmt: skip
DIED = "the process died with signal 11 (SIGSEGV)"
ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def sweeper(tmp_path, children):
    worker = Worker(tmp_path / "worker.txt")
    yield Sweeper(worker, WHERE, Budget(60))
    worker.close()


@pytest.fixture
def plain():
    """Eager and ours in both formats: four providers that are right."""
    return providers.plain("torch")


def test_rows_are_those_of_a_bench(sweeper, bench, tiny, plain):
    found = []
    sweeper.run([tiny], [plain], found.append, [STEP])
    (rows,) = found
    assert {row.pop("group") for row in rows} == {"0"}
    expected = bench.measure(tiny, STEP, plain)
    assert [row["status"] for row in rows] == [OK] * 4
    for row in (*rows, *expected):  # another number of threads rounds differently
        assert max(row.pop("error"), row.pop("error_gradient")) < 1e-5
    assert rows == expected


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        (fakes.crashes, DIED),
        (fakes.exits, "the process died with exit status 3: the driver said why"),
        (fakes.hangs, "killed after 3 s without a result"),
        (fakes.poisons, f"failed: RuntimeError: {ILLEGAL}"),
        (fakes.poisons_later, f"failed: RuntimeError: {ILLEGAL}"),
    ],
)
def test_a_provider_costs_its_own_row_only(sweeper, tiny, plain, variant, setup, expected):
    sweeper.where = dataclasses.replace(WHERE, silence=3.0)
    group = [*plain[:2], variant("bad", setup), *plain[2:]]
    rows = sweeper.group(tiny, FORWARD, group)
    assert [row["provider"] for row in rows] == [p.name for p in group]
    assert rows.pop(2)["status"] == expected
    assert [row["status"] for row in rows] == [OK] * 4
    assert all(row["ratio_to_eager"] == 1.0 for row in rows)
    (after,) = sweeper.group(tiny, FORWARD, plain[:1])
    assert after["status"] == OK


def test_two_that_crash(sweeper, tiny, plain, variant):
    group = [variant("one", fakes.crashes), *plain[:1], variant("two", fakes.crashes)]
    assert [r["status"] for r in sweeper.group(tiny, FORWARD, group)] == [DIED, OK, DIED]


def test_too_many_that_crash(sweeper, tiny, plain, variant):
    """A group is not tried for ever; in the end, eager is measured alone."""
    group = [*plain[:1], *(variant(name, fakes.crashes) for name in "abcd")]
    rows = sweeper.group(tiny, FORWARD, group)
    unknown = f"not measured: {DIED}"
    assert [row["status"] for row in rows] == [OK, DIED, DIED, DIED, unknown]


@pytest.mark.parametrize(
    ("setup", "expected"),
    [(fakes.crashes_later, DIED), (fakes.hangs_later, "killed after 3 s without a result")],
)
def test_a_crash_while_all_are_timed(sweeper, tiny, plain, variant, setup, expected):
    sweeper.where = dataclasses.replace(WHERE, silence=3.0)
    rows = sweeper.group(tiny, FORWARD, [*plain[:1], variant("late", setup), *plain[1:2]])
    assert [row["status"] for row in rows] == [OK, expected, OK]


def test_a_crash_after_timing_costs_no_row(sweeper, tiny, plain, variant):
    group = [plain[0], variant("seen", fakes.crashes_when_observed), variant("bad", fakes.fails)]
    rows = sweeper.group(tiny, FORWARD, group)
    failed = "failed: RuntimeError: out of memory"
    assert [row["status"] for row in rows] == [OK, OK, failed]
    assert all(row["gb_s"] > 0 and row["ratio_to_eager"] == 1.0 for row in rows[:2])


def test_a_crash_before_the_first_setup(sweeper, tiny, plain, variant):
    """Nobody is blamed for it."""
    sweeper.where = dataclasses.replace(WHERE, make_timer=fakes.crashing_timer)
    rows = sweeper.group(tiny, FORWARD, [*plain[:1], variant("other")])
    assert [row["status"] for row in rows] == [f"not measured: {DIED}"] * 2


def test_a_problem_that_crashes_is_charged_to_its_provider(sweeper, tiny, plain):
    bad = fakes.CrashingProblem("bad", plain[0].setup)
    rows = sweeper.group(tiny, FORWARD, [plain[0], bad])
    assert [row["status"] for row in rows] == [OK, DIED]


def test_a_failure_in_the_next_process_replaces_no_timing(sweeper, tiny, plain, variant, tmp_path):
    again = functools.partial(fakes.fails_once_timed, tmp_path / "seen")
    poison = variant("poison", functools.partial(fakes.poisons_later, calls=5))  # in the last round
    rows = sweeper.group(tiny, FORWARD, [poison, plain[0], variant("again", again)])
    assert [row["status"] for row in rows] == [f"failed: RuntimeError: {ILLEGAL}", OK, OK]
    assert rows[2]["median_ms"] > 0


@pytest.mark.parametrize("setup", [fakes.hangs, fakes.compiles_for_ever])
def test_a_provider_that_hangs_is_left_out_of_later_groups(sweeper, tiny, plain, variant, setup):
    sweeper.where = dataclasses.replace(WHERE, silence=2.0)
    group = [plain[0], variant("slow", setup)]
    before = sweeper.group(tiny, FORWARD, group)[1]["status"]
    sweeper.worker.close()  # a later group cannot succeed by what this process has seen
    good, bad = sweeper.group(tiny, STEP, group)
    assert (good["status"], bad["status"]) == (OK, f"not measured again: on tiny, {before}")
    other = dataclasses.replace(group[1], launch=GRAPH, setup=plain[0].setup)
    assert sweeper.group(tiny, FORWARD, [other])[0]["status"] == OK


def test_eager_that_hangs_is_measured_on_other_workloads(sweeper, table, plain):
    sweeper.where = dataclasses.replace(WHERE, silence=2.0)
    sweeper.group(table[0], FORWARD, [dataclasses.replace(plain[0], setup=fakes.hangs)])
    (again,) = sweeper.group(table[0], STEP, plain[:1])
    assert again["status"].startswith("not measured again: on tiny, killed after")
    (other,) = sweeper.group(table[1], FORWARD, plain[:1])
    assert other["status"] == OK


def test_a_provider_that_only_fails_costs_no_process(sweeper, tiny, plain, variant):
    def statuses(rows):
        return [row["status"] for row in rows]

    sweeper.group(tiny, FORWARD, plain[:1])
    before = sweeper.worker._process.pid
    group = [variant("bad", fakes.fails), *plain[:1]]
    found = statuses(sweeper.group(tiny, FORWARD, group))
    assert found == ["failed: RuntimeError: out of memory", OK]
    assert sweeper.worker._process.pid == before


@pytest.mark.parametrize("limit", ["silence", "budget"])
def test_a_slow_setup_is_interrupted(sweeper, tiny, plain, variant, limit):
    """The others lose nothing, and the process goes on."""
    sweeper.group(tiny, FORWARD, plain[:1])
    before = sweeper.worker._process.pid
    if limit == "budget":
        sweeper.budget = Budget(5)
    else:
        sweeper.where = dataclasses.replace(WHERE, silence=1.25)
    group = [plain[0], variant("slow", fakes.compiles_for_ever)]
    good, bad = sweeper.group(tiny, FORWARD, group)
    took = "failed: TimeoutError: setup and first call took longer than 1 s"
    expected = took if limit == "silence" else OUT_OF_TIME
    assert (good["status"], bad["status"]) == (OK, expected)
    assert sweeper.worker._process.pid == before


def test_launches_are_counted_last_in_another_process(sweeper, tiny, plain, variant, monkeypatch):
    monkeypatch.setattr(groups, "on_gpu", lambda device: True)
    found = []
    replayed = dataclasses.replace(plain[0], launch=GRAPH)
    group = [variant("counted", fakes.counted), plain[0]]
    sweeper.run([tiny], [[replayed], group], found.append, [FORWARD])
    assert found.pop() == []  # rows were completed in place
    (graph,), (one, other) = found
    assert "launches" not in graph
    assert one["launches"] == other["launches"] != sweeper.worker._process.pid
    assert {row["status"] for row in (graph, one, other)} == {OK}


def test_used_up_budget(sweeper, tiny, plain):
    sweeper.budget = Budget(0)
    assert {r["status"] for r in sweeper.group(tiny, FORWARD, plain)} == {OUT_OF_TIME}
    assert sweeper.worker._process is None


def test_a_hang_ends_with_the_budget(sweeper, tiny, variant):
    sweeper.budget = Budget(4)
    (row,) = sweeper.group(tiny, FORWARD, [variant("bad", fakes.hangs)])
    assert row["status"] == "killed after 4 s, when its time was up"
    assert -1.5 < sweeper.budget.left <= 0


def test_networks(sweeper):
    def named(make):
        return networks.Network("net", make, fakes.loss, (4, 3, 9, 9), (2, 3, 9, 9))

    chosen = networks.variants("torch", False)
    rows = sweeper.group(named(fakes.small_network), FORWARD, chosen)
    assert [row["status"] for row in rows] == [OK] * 6
    rows = sweeper.group(named(fakes.half_crashing_network), FORWARD, chosen)
    assert [row["status"] for row in rows] == [OK] * 4 + [DIED] * 2
    assert {row["workload"] for row in rows} == {"net"}


def test_a_network_that_makes_cuda_unusable(sweeper):
    """It costs the others nothing but another process."""
    chosen = networks.variants("torch", False)
    made = networks.Network("net", fakes.poisoning_network, fakes.loss, (4, 3, 9, 9), (2, 3, 9, 9))
    rows = sweeper.group(made, FORWARD, chosen)
    failed = f"failed: RuntimeError: {ILLEGAL}"
    assert [row["status"] for row in rows] == [failed] * 2 + [OK] * 4


def test_networks_without_the_eager_block(sweeper):
    """There is nothing that results could be checked against."""
    chosen = networks.variants("torch", False)
    made = networks.Network("net", fakes.crashing_network, fakes.loss, (4, 3, 9, 9), (2, 3, 9, 9))
    rows = sweeper.group(made, FORWARD, chosen[2:])  # both eager blocks, then da_triton's
    left = f"not measured: {DIED}"
    assert [row["status"] for row in rows] == [DIED, DIED, left, left]
    (row,) = sweeper.group(made, FORWARD, chosen[:1])
    assert row["status"] == "not measured: there is no eager block to check against"


def test_a_network_that_compiles_for_ever(sweeper):
    """Its variants are limited one by one: together they may take longer."""
    sweeper.where = dataclasses.replace(WHERE, silence=5.0)
    chosen = [v for v in networks.variants("torch", False) if not v.channels_last]
    network = networks.Network("net", fakes.slow_network, fakes.loss, (2, 3, 9, 9), (2, 3, 9, 9))
    rows = sweeper.group(network, FORWARD, chosen)
    took = "failed: TimeoutError: setup and first call took longer than 4 s"
    assert [row["status"] for row in rows] == [OK, took, OK]


def test_ceilings(sweeper):
    found = sweeper.measure_ceilings(4_000_000, 1000)
    assert found == {"copy GB/s": 4.0, "float32 TFLOP/s": 1.0}
    assert sweeper.ceilings.bandwidth == 4e9
    sweeper.where = dataclasses.replace(WHERE, make_timer=fakes.crashing_timer)
    sweeper.worker.close()
    assert sweeper.measure_ceilings(1024, 16) == {"ceilings": DIED}
    assert sweeper.ceilings is None
