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
NO_MEMORY = "failed: RuntimeError: out of memory"
SLOW = "setup and first call took longer than"


@pytest.fixture
def sweeper(tmp_path, children):
    worker = Worker(tmp_path / "worker.txt")
    yield Sweeper(worker, WHERE, Budget(60))
    worker.close()


@pytest.fixture
def plain():
    """Eager and ours in both formats: four providers that are right."""
    return providers.plain("torch")


@pytest.fixture
def statuses(sweeper, tiny):
    """What became of each provider of a group; changes are those of ``Where``."""

    def statuses(group, mode=FORWARD, workload=tiny, **changes):
        sweeper.where = dataclasses.replace(sweeper.where, **changes)
        return [row["status"] for row in sweeper.group(workload, mode, group)]

    return statuses


def test_all_modes_of_a_workload_come_before_the_next_one(sweeper, table, plain):
    found = []
    sweeper.run(table, [plain[:1], plain[1:2]], found.append)
    names = ("workload", "mode", "group")
    assert [tuple(row[name] for name in names) for (row,) in found] == [
        (work.name, mode, group)
        for group in ("0", "1") for work in table for mode in (FORWARD, STEP)
    ]  # fmt: skip


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


def test_several_that_crash(statuses, plain, variant):
    """A group is not tried for ever; in the end, eager is measured alone."""
    crashing = [variant(name, fakes.crashes) for name in "abcd"]
    assert statuses([crashing[0], plain[0], crashing[1]]) == [DIED, OK, DIED]
    unknown = f"not measured: {DIED}"
    assert statuses([plain[0], *crashing]) == [OK, DIED, DIED, DIED, unknown]


@pytest.mark.parametrize(
    ("setup", "expected"),
    [(fakes.crashes_later, DIED), (fakes.hangs_later, "killed after 3 s without a result")],
)
def test_a_crash_while_all_are_timed(statuses, plain, variant, setup, expected):
    group = [*plain[:1], variant("late", setup), *plain[1:2]]
    assert statuses(group, silence=3.0) == [OK, expected, OK]


def test_a_crash_after_timing_costs_no_row(sweeper, tiny, plain, variant):
    group = [plain[0], variant("seen", fakes.crashes_when_observed), variant("bad", fakes.fails)]
    rows = sweeper.group(tiny, FORWARD, group)
    assert [row["status"] for row in rows] == [OK, OK, NO_MEMORY]
    assert all(row["gb_s"] > 0 and row["ratio_to_eager"] == 1.0 for row in rows[:2])


def test_a_crash_before_the_first_setup(statuses, plain, variant):
    """Nobody is blamed for it."""
    group = [*plain[:1], variant("other")]
    assert statuses(group, make_timer=fakes.crashing_timer) == [f"not measured: {DIED}"] * 2


def test_a_problem_that_crashes_is_charged_to_its_provider(statuses, plain):
    assert statuses([plain[0], fakes.CrashingProblem("bad", plain[0].setup)]) == [OK, DIED]


def test_a_failure_in_the_next_process_replaces_no_timing(sweeper, tiny, plain, variant, tmp_path):
    again = functools.partial(fakes.fails_once_timed, tmp_path / "seen")
    poison = variant("poison", functools.partial(fakes.poisons_later, calls=5))  # in the last round
    rows = sweeper.group(tiny, FORWARD, [poison, plain[0], variant("again", again)])
    assert [row["status"] for row in rows] == [f"failed: RuntimeError: {ILLEGAL}", OK, OK]
    assert rows[2]["median_ms"] > 0


@pytest.mark.parametrize("setup", [fakes.hangs, fakes.compiles_for_ever])
def test_a_provider_that_hangs_is_left_out_of_later_groups(
    sweeper, statuses, plain, variant, setup
):
    group = [plain[0], variant("slow", setup)]
    before = statuses(group, silence=2.0)[1]
    sweeper.worker.close()  # a later group cannot succeed by what this process has seen
    assert statuses(group, STEP) == [OK, f"not measured again: on tiny, {before}"]
    other = dataclasses.replace(group[1], launch=GRAPH, setup=plain[0].setup)
    assert statuses([other]) == [OK]


def test_a_provider_that_hangs_is_measured_in_another_dtype(sweeper, statuses, tiny, plain):
    statuses([dataclasses.replace(plain[0], setup=fakes.hangs)], silence=2.0)
    other = sweeper.of_dtype(torch.bfloat16)
    other.where = dataclasses.replace(other.where, silence=WHERE.silence)
    (row,) = other.group(tiny, FORWARD, plain[:1])
    assert (row["status"], row["dtype"]) == (OK, "bfloat16")
    assert sweeper.of_dtype(torch.float32) is sweeper


def test_eager_that_hangs_is_measured_on_other_workloads(statuses, table, plain):
    statuses([dataclasses.replace(plain[0], setup=fakes.hangs)], silence=2.0)
    (again,) = statuses(plain[:1], STEP)
    assert again.startswith("not measured again: on tiny, killed after")
    assert statuses(plain[:1], workload=table[1]) == [OK]


def test_a_provider_that_only_fails_costs_no_process(sweeper, statuses, plain, variant):
    statuses(plain[:1])
    before = sweeper.worker._process.pid
    assert statuses([variant("bad", fakes.fails), *plain[:1]]) == [NO_MEMORY, OK]
    assert sweeper.worker._process.pid == before


@pytest.mark.parametrize("limit", ["silence", "budget"])
def test_a_slow_setup_is_interrupted(sweeper, statuses, plain, variant, limit):
    """The others lose nothing, and the process goes on."""
    statuses(plain[:1])
    before = sweeper.worker._process.pid
    silence, expected = 1.25, f"failed: TimeoutError: {SLOW} 1 s"
    if limit == "budget":
        sweeper.budget = Budget(5)
        silence, expected = 10.0, OUT_OF_TIME
    group = [plain[0], variant("slow", fakes.compiles_for_ever)]
    assert statuses(group, silence=silence) == [OK, expected]
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


def test_used_up_budget(sweeper, statuses, plain):
    sweeper.budget = Budget(0)
    assert statuses(plain) == [OUT_OF_TIME] * 4
    assert sweeper.worker._process is None


def test_a_hang_ends_with_the_budget(sweeper, statuses, plain, variant):
    statuses(plain[:1])  # so that the budget is not spent on imports
    sweeper.budget = Budget(4)
    assert statuses([variant("bad", fakes.hangs)]) == ["killed after 4 s, when its time was up"]
    assert -1.5 < sweeper.budget.left <= 0


# --- networks -------------------------------------------------------------------------------------

VARIANTS = networks.variants("torch", False)  # without a block, eager and ours, in both formats


def network(make):
    return networks.Network("net", make, fakes.loss, (4, 3, 9, 9), (2, 3, 9, 9))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (fakes.small_network, [OK] * 6),
        (fakes.half_crashing_network, [OK] * 4 + [DIED] * 2),
        # It costs the others nothing but another process.
        (fakes.poisoning_network, [f"failed: RuntimeError: {ILLEGAL}"] * 2 + [OK] * 4),
    ],
)
def test_networks(make, expected, statuses):
    assert statuses(VARIANTS, workload=network(make)) == expected


def test_networks_without_the_eager_block(statuses):
    """There is nothing that results could be checked against."""
    made = network(fakes.crashing_network)
    left = f"not measured: {DIED}"  # both eager blocks crash, then there is only da_triton's
    assert statuses(VARIANTS[2:], workload=made) == [DIED, DIED, left, left]
    expected = ["not measured: there is no eager block to check against"]
    assert statuses(VARIANTS[:1], workload=made) == expected


def test_a_network_that_compiles_for_ever(statuses):
    """Its variants are limited one by one: together they may take longer."""
    chosen = [variant for variant in VARIANTS if variant.layout == "nchw"]
    found = statuses(chosen, workload=network(fakes.slow_network), silence=5.0)
    assert found == [OK, f"failed: TimeoutError: {SLOW} 4 s", OK]


def test_ceilings(sweeper):
    found = sweeper.measure_ceilings(4_000_000, 1000)
    assert found == {"copy GB/s": 4.0, "float32 TFLOP/s": 1.0}
    assert (sweeper.ceilings.bandwidth, sweeper.ceilings.matrix_rate) == (4e9, 1e12)
    sweeper.where = dataclasses.replace(WHERE, make_timer=fakes.crashing_timer)
    sweeper.worker.close()
    assert sweeper.measure_ceilings(1024, 16) == {"not measured": DIED}
    assert sweeper.ceilings is None
