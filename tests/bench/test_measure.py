"""The measuring loop: which providers are timed, in which order, and how rows are compared."""

import pytest
import torch

from bench import formulations, providers, roofline
from bench.formulations import eager_block
from bench.measure import CONTEXT_LOST, OK, OUT_OF_TIME, Budget, Effort, compare, prepare
from bench.problems import BACKWARD, FORWARD, MODES, STEP
from bench.providers import GRAPH, setup_block


class SoftmaxOverBatch(formulations.EagerDoubleAttention):
    """Wrong: attention maps that sum to 1 over the batch."""

    def forward(self, x):
        a, b, v = (
            conv(x).reshape(x.shape[0] * self.heads, -1, x[0, 0].numel())
            for conv in (self.convA, self.convB, self.convV)
        )
        return self.reconstruct(x, (a @ b.softmax(0).transpose(1, 2)) @ v.softmax(1))


class ForgottenPath(formulations.EagerDoubleAttention):
    """Wrong in the gradient alone: nothing flows back through the attention maps."""

    def forward(self, x):
        hook = self.convB.register_forward_pre_hook(lambda _, inputs: inputs[0].detach())
        out = super().forward(x)
        hook.remove()
        return out


def setup_of(kind):
    return lambda problem: setup_block(problem, lambda p: eager_block(p, kind))


def constant(value):
    return lambda problem: lambda: (torch.full_like(problem.x, value),)


def stale(problem):
    first = setup_block(problem, eager_block)()
    return lambda: first


def without_gradient(problem):
    closure = setup_block(problem, eager_block)
    return lambda: closure()[:1]


def fails(problem):
    raise RuntimeError("no such GPU\nand a long story")


def changed_by(call, then):
    """Right until a call, counted from 1; from there on, something else."""

    def setup(problem):
        closure, calls = setup_block(problem, eager_block), []

        def run():
            calls.append(None)
            return closure() if len(calls) < call else then(problem)

        return run

    return setup


def out_of_memory(problem):
    raise MemoryError


@pytest.mark.parametrize("mode", MODES)
def test_right_providers_are_timed(bench, table, timer, mode):
    for workload in table:
        rows = bench.measure(workload, mode, providers.plain("torch"))
        assert [row["status"] for row in rows] == [OK] * 4
        assert all(0 < row["error"] < 1e-4 for row in rows)
        assert all(("error_gradient" in row) == (mode != FORWARD) for row in rows)
    assert len(timer.calls) == 2 * 4 * 3


@pytest.mark.parametrize(
    ("setup", "mode", "status"),
    [
        *((setup_of(SoftmaxOverBatch), mode, "disagrees: relative RMS") for mode in MODES),
        (setup_of(ForgottenPath), STEP, "disagrees"),
        (constant(float("nan")), FORWARD, "disagrees"),
        (constant(0.0), FORWARD, "disagrees"),
        (stale, FORWARD, "disagrees"),
        (changed_by(2, lambda problem: (problem.x,)), FORWARD, "disagrees"),
        (
            lambda p: lambda: (p.x[:1],),
            FORWARD,
            "failed: ValueError: shape (1, 8, 4, 5) instead of",
        ),
        (without_gradient, STEP, "failed: ValueError: 1 results instead of 2 or more"),
        (fails, FORWARD, "failed: RuntimeError: no such GPU"),
        (changed_by(4, out_of_memory), FORWARD, "failed: MemoryError"),  # while it is timed
    ],
)
def test_wrong_and_failing_providers_have_no_time(
    measured, eager, variant, timer, setup, mode, status
):
    good, bad = measured([eager, variant("bad", setup)], mode)
    assert (good["status"], good["repetitions"]) == (OK, 3)
    assert bad["status"].startswith(status)
    assert "\n" not in bad["status"]
    assert not {"median_ms", "ratio_to_eager"} & set(bad)
    assert len(timer.calls) == (4 if "Memory" in status else 3)


def test_gradients_are_checked_beside_the_output(measured, variant):
    wrong = variant("wrong", setup_of(ForgottenPath))
    assert measured([wrong])[0]["status"] == OK
    (row,) = measured([wrong], STEP)
    assert row["error"] < 1e-4 < 1e-2 < row["error_gradient"]


# --- comparisons ----------------------------------------------------------------------------------


def compared(name, layout="nchw", status=OK, **facts):
    baseline = name == "eager"
    return {"provider": name, "layout": layout, "baseline": baseline, "status": status, **facts}


def ratios(row):
    return {name: value for name, value in row.items() if name.startswith("ratio")}


def test_ratios_refer_to_the_fastest_of_their_references():
    milliseconds = {
        ("triton", "nchw"): 2.0,
        ("eager", "nchw"): 12.0, ("eager", "channels_last"): 10.0,
        ("compile eager", "nchw"): 8.0, ("compile eager", "channels_last"): 6.0,
        ("compile eager max-autotune", "nchw"): 5.0,
        ("compile eager max-autotune", "channels_last"): 4.0,
        ("compile eager mm", "nchw"): 3.0, ("compile triton", "nchw"): 1.0,
        ("compile without block", "nchw"): 0.1,
    }  # fmt: skip
    rows = [compared(*key, median_ms=ms) for key, ms in milliseconds.items()]
    compare(rows)
    assert ratios(rows[0]) == {
        "ratio_to_eager": 5.0, "ratio_same_format": 6.0, "ratio_to_compiled": 3.0,
        "ratio_to_max_autotune": 2.0, "ratio_to_rivals": 1.5,
    }  # fmt: skip
    assert [row["ratio_to_eager"] for row in rows[1:3]] == [10 / 12, 1.0]
    compare(rows[:1])
    assert not ratios(rows[0])


@pytest.mark.parametrize(
    "status",
    [
        OUT_OF_TIME,
        CONTEXT_LOST,
        "killed after 9 s, when its time was up",
        "not measured: killed after 9 s without a result",
    ],
)
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("eager", {"ratio_to_eager", "ratio_to_rivals"}),
        ("compile eager", {"ratio_to_compiled", "ratio_to_rivals"}),
        ("sdpa", {"ratio_to_rivals"}),
    ],
)
def test_no_ratio_to_a_reference_that_was_cut_short(status, name, lost):
    """The missing one might have been the fastest, for example in the better memory format."""
    ours = compared("triton", median_ms=2.0)
    others = [compared(other, median_ms=6.0) for other in ("eager", "compile eager", "sdpa")]
    compare([*others, compared(name, "channels_last", status), ours])
    expected = {"ratio_to_eager", "ratio_same_format", "ratio_to_compiled", "ratio_to_rivals"}
    assert set(ratios(ours)) == expected - lost
    assert "failed_references" not in ours


@pytest.mark.parametrize(
    "status",
    [
        "failed: why",
        "disagrees: much",
        "the process died with signal 11",
        "killed after 9 s without a result",
        "not measured again: on tiny, killed after 9 s without a result",
    ],
)
def test_references_that_failed_are_named(status):
    ours = compared("triton", median_ms=2.0)
    timed = [compared("eager", median_ms=6.0), compared("compile eager", median_ms=4.0)]
    failed = [compared(name, "channels_last", status) for name in ("compile eager", "sdpa")]
    compare([*timed, *failed, ours])
    assert (ours["ratio_to_compiled"], ours["ratio_to_rivals"]) == (2.0, 2.0)
    assert ours["failed_references"] == "compile eager channels_last, sdpa channels_last"
    compare([*timed, ours])  # again, with others
    assert "failed_references" not in ours


# --- timing ---------------------------------------------------------------------------------------


def test_times_become_median_percentiles_and_ratios(measured, eager):
    (row,) = measured([eager])
    assert (row["median_ms"], row["repetitions"], row["ratio_to_eager"]) == (2.0, 3, 1.0)
    assert (row["p20_ms"], row["p80_ms"]) == pytest.approx((1.4, 2.6))


def test_rounds_begin_with_the_next_provider(measured, timer, variant):
    measured([variant(name) for name in "abc"])
    called = [closure for closure, _ in timer.calls]
    a, b, c = called[:3]
    assert called == [a, b, c, b, c, a, c, a, b]


def test_graphs_are_timed_without_their_launch(measured, timer, variant):
    measured([variant("graph", launch=GRAPH)])
    measured([variant("eager launch")])
    assert [counted for _, counted in timer.calls] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(1e9, 7), (0.0, 2)])
def test_effort_bounds_the_rounds(measured, eager, seconds, rounds):
    (row,) = measured([eager], effort=Effort(0, 2, 7, seconds))
    assert row["repetitions"] == rounds


def test_used_up_budget_skips_what_is_left(measured, eager, variant):
    now = [0.0]

    def slow(problem):
        now[0] += 60
        return eager.setup(problem)

    budget = Budget(100, clock=lambda: now[0])
    rows = measured([variant("slow", slow), eager, variant("slow", slow), eager], budget=budget)
    assert [row["status"] for row in rows] == [OK] * 3 + [OUT_OF_TIME]


def test_compiling_groups_start_afresh(measured, variant, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    measured([variant("plain")])
    assert not resets
    measured([variant("compiled", compiles=True)])
    assert len(resets) == 1


@pytest.mark.parametrize(
    ("mode", "expected"),
    [(BACKWARD, ["forward", "clock", "end"]), (STEP, ["clock", "forward", "end"])],
)
def test_backward_alone_is_timed_after_its_forward(measured, eager, variant, mode, expected):
    """Forward runs before the clock starts, once for every time that backward runs."""
    events = []

    def setup(problem):
        call = eager.setup(problem)
        run = call.run
        call.run = lambda x: (events.append("forward"), run(x))[1]
        return call

    def timer(closure, *, launches_count):
        prepare(closure)
        events.append("clock")
        closure()
        events.append("end")
        return 1.0

    (row,) = measured([variant("ours", setup)], mode, timer=timer)
    assert row["status"] == OK
    start = events.index("clock") - expected.index("clock")
    assert events[start:][:9] == expected * 3


def test_rates_and_share_of_the_floor(measured, tiny, eager):
    ceilings = roofline.Ceilings(bandwidth=1e6, matrix_rate=1e6)
    (row,) = measured([eager], ceilings=ceilings)
    moved = 4 * (2 * 2 * 8 * 20 + 8 * 16)  # X and the output of two samples, weights
    flop = roofline.work_of(tiny, 2, FORWARD, 4).flop
    assert row["gb_s"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["tflop_s"] == pytest.approx(flop / 2e-3 / 1e12)
    assert row["floor_ms"] == pytest.approx(1e3 * max(moved, flop) / 1e6)
    assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / 2)
    assert row["bound"] == ("memory" if moved > flop else "compute")


def test_bytes_saved_for_backward(measured, eager):
    (row,) = measured([eager], STEP)
    saved = 4 * 2 * 20 * (4 + 4 + 4 + 4)  # A, P, softmax of V, Z: float32, two samples
    assert saved <= row["saved_bytes"] <= 2 * saved
    assert measured([eager])[0]["saved_bytes"] is None
