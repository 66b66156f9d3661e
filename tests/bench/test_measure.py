import dataclasses

import pytest
import torch

from bench import formulations, providers, roofline
from bench.measure import (
    CONTEXT_LOST,
    OK,
    OUT_OF_TIME,
    Budget,
    Effort,
    compare,
    prepare,
)
from bench.problems import BACKWARD, FORWARD, MODES, STEP
from bench.providers import GRAPH, setup_block
from bench.roofline import Ceilings


class SoftmaxOverBatch(formulations.EagerDoubleAttention):
    """Wrong: attention maps that sum to 1 over the batch."""

    def forward(self, x):
        a, b, v = (
            conv(x).reshape(x.shape[0] * self.heads, -1, x[0, 0].numel())
            for conv in (self.convA, self.convB, self.convV)
        )
        z = (a @ b.softmax(0).transpose(1, 2)) @ v.softmax(1)
        return x + self.conv_reconstruct(z.reshape(x.shape[0], -1, *x.shape[2:]))


class ForgottenPath(formulations.EagerDoubleAttention):
    """Wrong in the gradient alone: nothing flows back through the attention maps."""

    def forward(self, x):
        hook = self.convB.register_forward_pre_hook(lambda _, inputs: inputs[0].detach())
        out = super().forward(x)
        hook.remove()
        return out


def setup_of(block):
    def setup(problem):
        w = problem.workload
        return setup_block(problem, lambda _: block(w.c, w.c_m, w.c_n, w.heads))

    return setup


@pytest.mark.parametrize("mode", MODES)
def test_right_providers_are_timed(bench, table, timer, mode):
    for workload in table:
        rows = bench.measure(workload, mode, providers.plain("torch"))
        assert [row["status"] for row in rows] == [OK] * 4
        assert all(0 < row["error"] < 1e-4 for row in rows)
        assert all(("error_gradient" in row) == (mode != FORWARD) for row in rows)
    assert len(timer.calls) == 2 * 4 * 3


@pytest.mark.parametrize("mode", MODES)
def test_wrong_output_is_not_timed(bench, tiny, timer, eager, variant, mode):
    wrong = variant("wrong", setup_of(SoftmaxOverBatch))
    good, bad = bench.measure(tiny, mode, [eager, wrong])
    assert good["status"] == OK
    assert bad["status"].startswith("disagrees: relative RMS")
    assert bad["error"] > 0.1
    assert "median_ms" not in bad
    assert len(timer.calls) == 3


def test_wrong_gradient_is_not_timed(bench, tiny, variant):
    wrong = variant("wrong", setup_of(ForgottenPath))
    assert bench.measure(tiny, FORWARD, [wrong])[0]["status"] == OK
    (row,) = bench.measure(tiny, STEP, [wrong])
    assert row["error"] < 1e-4 < 1e-2 < row["error_gradient"]
    assert row["status"].startswith("disagrees")


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_nan_and_zeros_disagree(bench, tiny, variant, value):
    wrong = variant("wrong", lambda p: lambda: (torch.full_like(p.x, value),))
    assert bench.measure(tiny, FORWARD, [wrong])[0]["status"].startswith("disagrees")


def test_result_that_ignores_new_input_disagrees(bench, tiny, eager, variant):
    def setup(problem):
        first = eager.setup(problem)()
        return lambda: first

    (row,) = bench.measure(tiny, FORWARD, [variant("stale", setup)])
    assert row["status"].startswith("disagrees")


def test_other_shape_is_a_failure(bench, tiny, variant):
    wrong = variant("wrong", lambda p: lambda: (p.x[:1],))
    (row,) = bench.measure(tiny, FORWARD, [wrong])
    assert row["status"] == "failed: ValueError: shape (1, 8, 4, 5) instead of (2, 8, 4, 5)"


def test_missing_gradient_is_a_failure(bench, tiny, eager, variant):
    lacking = variant("lacking", lambda p: lambda: eager.setup(p)()[:1])
    (row,) = bench.measure(tiny, STEP, [lacking])
    assert row["status"] == "failed: ValueError: 1 results instead of 2 or more"


def test_late_change_is_noticed(bench, tiny, eager, variant):
    def setup(problem):
        closure, calls = eager.setup(problem), []

        def run():
            calls.append(None)
            return closure() if len(calls) == 1 else (problem.x,)

        return run

    (row,) = bench.measure(tiny, FORWARD, [variant("late", setup)])
    assert row["status"].startswith("disagrees")


def test_failing_setup_becomes_a_row(bench, tiny, eager, variant):
    def fails(problem):
        raise RuntimeError("no such card\nand a long story")

    good, bad = bench.measure(tiny, FORWARD, [eager, variant("bad", fails)])
    assert good["status"] == OK
    assert bad["status"] == "failed: RuntimeError: no such card"


def test_failing_while_timed_becomes_a_row(bench, tiny, eager, variant):
    def breaks_later(problem):
        closure, calls = eager.setup(problem), []

        def run():
            calls.append(None)
            if len(calls) > 3:
                raise MemoryError
            return closure()

        return run

    good, bad = bench.measure(tiny, FORWARD, [eager, variant("bad", breaks_later)])
    assert (good["status"], good["repetitions"]) == (OK, 3)
    assert bad["status"] == "failed: MemoryError"
    assert "ratio_to_eager" not in bad


def test_failing_workload_becomes_rows(bench, tiny, eager):
    impossible = dataclasses.replace(tiny, heads=3)
    (row,) = bench.measure(impossible, FORWARD, [eager])
    assert row["status"].startswith("failed: ValueError: heads must divide")


def test_quantiles_and_ratio_to_the_faster_baseline(bench, tiny, eager, variant):
    class PerCall:
        """10 ms for the first closure, 5 for the second, 2 for the third."""

        def __init__(self):
            self.order = []

        def __call__(self, closure, *, launches_count):
            if closure not in self.order:
                self.order.append(closure)
            return (10.0, 5.0, 2.0)[self.order.index(closure)]

    bench = dataclasses.replace(bench, timer=PerCall())
    group = [eager, variant("eager too", baseline=True), variant("ours")]
    rows = bench.measure(tiny, FORWARD, group)
    assert [row["ratio_to_eager"] for row in rows] == [0.5, 1.0, 2.5]
    assert "ratio_to_compiled" not in rows[0]

    bench.timer.order.clear()
    group = [
        eager,
        variant("eager channels_last", baseline=True, channels_last=True),
        variant("compile eager"),
    ]
    rows = bench.measure(tiny, FORWARD, group)
    assert [row["ratio_same_format"] for row in rows] == [1.0, 1.0, 5.0]
    assert [row["ratio_to_compiled"] for row in rows] == [0.2, 0.4, 1.0]


def compared(name, layout="nchw", status=OK, **facts):
    baseline = name == "eager"
    return {"provider": name, "layout": layout, "baseline": baseline, "status": status, **facts}


def test_ratios_to_each_mode_of_compile_and_to_the_best_of_all_others():
    milliseconds = {
        ("eager", "nchw"): 12.0, ("eager", "channels_last"): 10.0,
        ("compile eager", "nchw"): 8.0, ("compile eager", "channels_last"): 6.0,
        ("compile eager max-autotune", "nchw"): 5.0,
        ("compile eager max-autotune", "channels_last"): 4.0,
        ("compile eager mm", "nchw"): 3.0, ("compile triton", "nchw"): 1.0,
        ("triton", "nchw"): 2.0,
    }  # fmt: skip
    rows = [
        compared(name, layout, median_ms=ms) for (name, layout), ms in milliseconds.items()
    ]  # fmt: skip
    without_block = compared("compile without block", median_ms=0.1)
    compare([*rows, without_block])
    ours = rows[8]
    assert {name: ours[name] for name in ours if name.startswith("ratio")} == {
        "ratio_to_eager": 5.0, "ratio_same_format": 6.0, "ratio_to_compiled": 3.0,
        "ratio_to_max_autotune": 2.0, "ratio_to_rivals": 1.5,
    }  # fmt: skip


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
    missing = compared(name, "channels_last", status)
    compare([*others, missing, ours])
    ratios = {key for key in ours if key.startswith("ratio")}
    assert ratios == {
        "ratio_to_eager", "ratio_same_format", "ratio_to_compiled", "ratio_to_rivals",
    } - lost  # fmt: skip
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
    compare([ours])
    assert "ratio_to_compiled" not in ours


def test_times_become_median_and_percentiles(bench, tiny, eager):
    (row,) = bench.measure(tiny, FORWARD, [eager])
    assert (row["median_ms"], row["repetitions"]) == (2.0, 3)
    assert (row["p20_ms"], row["p80_ms"]) == pytest.approx((1.4, 2.6))


def test_no_ratio_without_a_baseline(bench, tiny, variant):
    (row,) = bench.measure(tiny, FORWARD, [variant("ours")])
    assert row["status"] == OK
    assert "ratio_to_eager" not in row


def test_rounds_begin_with_the_next_provider(bench, tiny, timer, variant):
    bench.measure(tiny, FORWARD, [variant(name) for name in "abc"])
    called = [closure for closure, _ in timer.calls]
    a, b, c = called[:3]
    assert called == [a, b, c, b, c, a, c, a, b]


def test_graphs_are_timed_without_their_launch(bench, tiny, timer, variant):
    bench.measure(tiny, FORWARD, [variant("graph", launch=GRAPH)])
    bench.measure(tiny, FORWARD, [variant("eager launch")])
    assert [counted for _, counted in timer.calls] == [False] * 3 + [True] * 3


def test_effort_bounds_the_rounds(bench, tiny, eager):
    endless = dataclasses.replace(bench, effort=Effort(0, 2, 7, seconds=1e9))
    assert endless.measure(tiny, FORWARD, [eager])[0]["repetitions"] == 7
    hasty = dataclasses.replace(bench, effort=Effort(0, 2, 7, seconds=0.0))
    assert hasty.measure(tiny, FORWARD, [eager])[0]["repetitions"] == 2


def test_used_up_budget_skips_what_is_left(bench, table, eager, variant):
    now = [0.0]

    def slow(problem):
        now[0] += 60
        return eager.setup(problem)

    bench = dataclasses.replace(bench, budget=Budget(100, clock=lambda: now[0]))
    rows = []
    bench.run(table, [[variant("slow", slow), eager]], rows.extend)
    assert [row["status"] for row in rows] == [OK] * 3 + [OUT_OF_TIME] * 5


def test_compiling_groups_start_afresh(bench, tiny, variant, monkeypatch):
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(None))
    bench.measure(tiny, FORWARD, [variant("plain")])
    assert not resets
    bench.measure(tiny, FORWARD, [variant("compiled", compiles=True)])
    assert len(resets) == 1


def test_backward_alone_is_timed_after_its_forward(bench, tiny, eager):
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

    bench = dataclasses.replace(bench, timer=timer)
    (row,) = bench.measure(tiny, BACKWARD, [dataclasses.replace(eager, setup=setup)])
    assert row["status"] == OK
    timed = events[events.index("clock") - 1 :][:9]
    assert timed == ["forward", "clock", "end"] * 3
    events.clear()
    bench.measure(tiny, STEP, [dataclasses.replace(eager, setup=setup)])
    timed = events[events.index("clock") :][:9]
    assert timed == ["clock", "forward", "end"] * 3


def test_rates_and_share_of_the_floor(bench, tiny, eager):
    ceilings = Ceilings(bandwidth=1e6, matrix_rate=1e6)
    bench = dataclasses.replace(bench, ceilings=ceilings)
    (row,) = bench.measure(tiny, FORWARD, [eager])
    moved = 4 * (2 * 2 * 8 * 20 + 8 * 16)  # X and the output of two samples, weights
    flop = roofline.work_of(tiny, 2, FORWARD, 4).flop
    assert row["gb_s"] == pytest.approx(moved / 2e-3 / 1e9)
    assert row["tflop_s"] == pytest.approx(flop / 2e-3 / 1e12)
    assert row["floor_ms"] == pytest.approx(1e3 * max(moved, flop) / 1e6)
    assert row["share_of_floor"] == pytest.approx(row["floor_ms"] / 2)
    assert row["bound"] == ("memory" if moved > flop else "compute")


def test_kept_for_backward_is_measured(bench, tiny, eager):
    rows = bench.measure(tiny, STEP, [eager])
    maps = 4 * 2 * 20 * (4 + 4 + 4 + 4)  # A, both attention maps, Z: float32, two samples
    assert maps <= rows[0]["saved_bytes"] <= 2 * maps
    assert bench.measure(tiny, FORWARD, [eager])[0]["saved_bytes"] is None
