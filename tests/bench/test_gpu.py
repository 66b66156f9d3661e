"""The stages of ``bench gpu`` on a CPU: fake commands, fake times, and providers that crash."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from bench import providers, roofline, stages
from bench.gpu import run_gpu
from bench.groups import Sweeper
from bench.isolation import Worker
from bench.measure import OK, OUT_OF_TIME, Budget
from bench.problems import FORWARD, STEP
from bench.stages import STAGES
from bench.workloads import WORKLOADS
from support import fakes
from support.gpu_run import CPU, TUNE, WHERE, facts, logged


def test_everything(run, out, table, tmp_path, capsys):
    code, frame = run(*STAGES)
    assert code == 0
    assert (frame["status"] == OK).all()
    blocks = frame[frame["workload"] != "net"]
    groups = blocks.groupby(["workload", "mode", "launch"])
    assert groups.size().to_dict() == {
        (work.name, mode, launch): 4 if launch == "eager" else 2  # in two groups of providers
        for work in table
        for mode in (FORWARD, STEP)
        for launch in ("eager", "graph")
    }
    assert len(frame) == len(blocks) + 2 * 6
    assert frame["dtype"].eq("bfloat16").all()
    assert frame["ratio_to_eager"].notna().all()
    (called,) = frame.dropna(subset="first_call_cold_s").to_dict("records")
    assert (called["workload"], called["provider"]) == (table[0].name, "torch")
    assert {*pd.read_csv(out / "scaling.csv")["size"]} == {8, 16, 32}
    found = facts(out)
    assert found["tests"] == "passed: 3 passed in 1s"
    assert found["smoke"]["of Triton"]["verdict"] == "all right"
    assert {*found["ceilings"]} == {"copy GB/s", "bfloat16 TFLOP/s"}
    assert [*found["stages"]] == [stage.name for stage in STAGES]
    assert all(stage["seconds"] >= 0 for stage in found["stages"].values())
    tiles = json.loads((tmp_path / "data" / "a fake.json").read_text())
    assert {*tiles["workloads"].split(",")} == {work.name for work in table}
    files = [path.relative_to(out) for path in out.rglob("*")]
    assert len(files) == 8
    assert all(len(path.parts) == 1 for path in files)
    assert logged(out, "tests.txt") == "3 passed in 1s\n"
    assert json.loads(logged(out, "smoke-0.json"))["ptxas"] is None
    printed = capsys.readouterr().out
    for text in ("geometric mean", "Ceilings: copy GB/s", "gather_from_a 64x64", "1 tile measured"):
        assert text in printed
    for stage in STAGES:
        assert f"== {stage.name}: " in printed


@pytest.mark.parametrize(
    ("command", "why", "chosen"),
    [("", "out of memory", False), (TUNE, "CUDA error", True)],
    ids=["before a choice", "after one"],
)
def test_tuning_that_fails_leaves_its_choices(command, why, chosen, run, tiny, tmp_path, capsys):
    failing = (sys.executable, "-c", f"{command}raise SystemExit({why!r})")
    code, _ = run("tune", tune_command=failing, workloads=[tiny])
    assert code == 1
    printed = capsys.readouterr().out
    assert f"failed: tiny: exit status 1: {why}" in printed
    assert ("\nIn use from now on: a fake.json" in printed) == chosen
    assert (tmp_path / "data" / "a fake.json").exists() == chosen


def test_processes_after_tuning_are_new(run, tiny):
    """A process reads the table once, so one from before would measure the old tiles."""
    seen = []

    def see(run, budget):
        seen.append(run.worker._process)
        return ""

    before, after = (stages.Stage(name, 1, see, "") for name in ("before", "after"))
    run("eager", before, "tune", after, workloads=[tiny])
    assert seen[0] is not None
    assert seen[1] is None


def test_a_compile_cache_that_is_broken(run, out, tmp_path, monkeypatch):
    (tmp_path / "warm.json").write_text("nonsense")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, _ = run("tests")
    assert code == 0
    assert facts(out)["warm_cache"].startswith("failed: JSONDecodeError")


SLOW_TESTS = """
import time
def test_a(): assert 1 == 2
def test_b(): time.sleep(60)
"""


def test_tests_that_take_too_long_say_what_failed(run, out, tmp_path, capsys):
    path = tmp_path / "test_slow.py"
    path.write_text(SLOW_TESTS)
    options = ["-q", "-rf", "-p", "no:cacheprovider", "-n", "1", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, str(path)]
    start = time.monotonic()
    code, _ = run("tests", seconds=18, test_command=command)
    assert code == 1
    assert time.monotonic() - start < 20
    assert facts(out)["tests"].startswith("stopped after ")
    assert "test_slow.py::test_a - assert 1 == 2" in capsys.readouterr().out


def test_smoke_of_every_assembler(run, out, tiny, capsys, monkeypatch):
    paths = ("/new/ptxas", "/wrong/ptxas", "/none/ptxas", "/wrong/and/stopped/ptxas")
    code, _ = run("smoke", ptxas=paths)
    assert code == 1
    found = facts(out)["smoke"]
    assert [*found] == ["of Triton", *paths]
    assert [x["status"] for x in found.values()] == [0, 0, 1, 2, 1]
    printed = capsys.readouterr().out
    assert "assembler /wrong/ptxas: WRONG RESULTS" in printed
    assert "assembler /none/ptxas: could not run" in printed
    assert json.loads(logged(out, "smoke-2.json"))["ptxas"] == "/wrong/ptxas"
    _, frame = run("tests", "eager", workloads=[tiny])
    assert frame["ratio_to_eager"].notna().all()  # another assembler was wrong
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/wrong/ptxas")
    monkeypatch.setenv("TRITON_PTXAS_BLACKWELL_PATH", "/wrong/ptxas")
    _, frame = run("smoke", "eager", workloads=[tiny])
    assert frame["ratio_to_eager"].isna().all()
    assert "THE KERNELS GAVE WRONG RESULTS" in capsys.readouterr().out
    assert [*facts(out)["smoke"]] == ["of Triton", *paths]  # those of earlier runs are kept


def test_a_smoke_check_that_cannot_start_is_not_a_wrong_kernel(run, out, capsys):
    broken = (sys.executable, "-c", "import a_module_that_is_missing")
    run("smoke")
    code, _ = run("smoke", check_command=broken)
    assert code == 1
    assert facts(out)["smoke"]["of Triton"]["verdict"] == "could not run"
    assert "ModuleNotFoundError" in capsys.readouterr().out


def test_a_smoke_check_that_hangs(run, out):
    hanging = (sys.executable, "-c", "import time; time.sleep(60)")
    start = time.monotonic()
    code, _ = run("smoke", seconds=2, check_command=hanging, ptxas=("/new/ptxas",))
    assert code == 1
    assert time.monotonic() - start < 6
    assert {x["verdict"] for x in facts(out)["smoke"].values()} == {"killed after 1 s"}


def test_crashes_and_warnings_of_workers_are_in_the_report(run, out, tiny, variant, capsys):
    """A crash costs its own row. A warning says that PyTorch's operations were timed, not ours."""
    bad = variant("crash", fakes.crashes), variant("warns", fakes.warns)
    group = [*providers.plain("torch"), *bad]
    code, frame = run("tests", "eager", workloads=[tiny], sweeps=lambda stage: [group])
    assert code == 0
    assert len(frame) == 2 * 6
    failed = frame[frame["status"] != OK]
    assert [*failed["provider"]] == ["crash"] * 2
    assert {*failed["status"]} == {"the process died with signal 11 (SIGSEGV)"}
    printed = capsys.readouterr().out
    assert "the process died with signal 11" in printed
    assert "geometric mean" in printed
    assert (out / "report.md").read_text().count("da_triton does not use its kernel 'a'") == 1


def test_a_stage_that_fails_does_not_end_the_run(run, out, tiny, capsys):
    def fails(*args):
        raise MemoryError("too large")

    code, frame = run("eager", "networks", workloads=[tiny], sweeps=fails)
    assert code == 1
    assert {*frame["workload"]} == {"net"}
    assert "failed: MemoryError: too large" in capsys.readouterr().out
    assert "in fails" in logged(out, "eager-error.txt")


def test_a_report_that_cannot_be_drawn_is_written(run, out, tiny, monkeypatch, capsys):
    def fails(*args):
        raise ValueError("no font")

    monkeypatch.setattr("bench.plots.bars", fails)
    run("tests", "eager", workloads=[tiny])
    assert "Parts of the report failed: ValueError: no font" in capsys.readouterr().out
    assert "median_ms" in (out / "report.md").read_text()
    assert (pd.read_csv(out / "results.csv")["status"] == OK).all()


def test_used_up_budget(run, out, capsys):
    code, frame = run("tests", "eager", "memory", seconds=0)
    assert code == 1  # the tests did not run
    assert frame is None
    assert {x["result"] for x in facts(out)["stages"].values()} == {"not run, for lack of time"}
    assert "== eager: 0.0 s" in capsys.readouterr().out


def test_time_that_a_stage_does_not_use_is_for_the_next(out, table, settings):
    seconds = []

    def spends(share):
        def stage(run, budget):
            seconds.append(budget.left)
            now[0] += share * budget.left
            return "done"

        return stage

    now = [0.0]
    chosen = [
        stages.Stage("a", 100, spends(0.5), ""), stages.Stage("b", 200, spends(1.0), ""),
        stages.Stage("c", 100, spends(1.0), ""),
    ]  # fmt: skip
    run_gpu(out, table, Budget(410, lambda: now[0]), chosen, settings)
    assert seconds == pytest.approx([100, 350 * 2 / 3, 350 / 3])


def test_a_budget_holds_whatever_hangs(run, tiny, variant):
    group = [providers.plain("torch")[0], variant("hang", fakes.hangs)]
    start = time.monotonic()
    _, frame = run("eager", seconds=6, workloads=[tiny], sweeps=lambda stage: [group])
    assert time.monotonic() - start < 10
    assert (frame["status"] != OK).any()
    assert OUT_OF_TIME in {*frame["status"]}


def test_kernels_are_compiled_before_anything_is_timed(run, out, tiny, monkeypatch, capsys):
    """Once per invocation, in other processes; what fails there is reported and goes on."""
    asked = []

    def warm(self, workloads):
        asked.append(([work.name for work in workloads], self.budget.left > 0))
        return ["the process died with signal 11 (SIGSEGV)"]

    monkeypatch.setattr("bench.groups.Sweeper.warm", warm)
    code, frame = run("eager", "compiled", ours="triton", workloads=[tiny])
    assert code == 0
    assert asked == [(["tiny"], True)]
    assert (frame["status"] == OK).all()
    assert "Compiling kernels beforehand: the process died" in capsys.readouterr().out


def test_kernels_are_compiled_in_processes_that_may_fail(tmp_path, children, tiny, monkeypatch):
    sweeper = Sweeper(Worker(tmp_path / "log"), WHERE, Budget(60))
    assert sweeper.warm([tiny]) == []  # interpreted
    monkeypatch.delenv("TRITON_INTERPRET")
    (failure,) = sweeper.warm([tiny])  # compiled, and there is no GPU
    assert failure.startswith("failed: ")


TERMINATED = """
import pathlib, sys
from bench.gpu import run_gpu
from bench.measure import Budget
from bench.stages import STAGES, Settings
tests = (sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)")
chosen = [stage for stage in STAGES if stage.name == "tests"]
run_gpu(pathlib.Path(sys.argv[1]), [], Budget(60), chosen, Settings(test_command=tests))
"""


def test_a_run_that_is_terminated_leaves_its_report(out, children):
    process = subprocess.Popen([sys.executable, "-c", TERMINATED, str(out)], stdout=subprocess.PIPE)
    while not (out / "environment.json").exists():
        time.sleep(0.1)
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert b"Interrupted" in printed
    assert facts(out)["stages"]["tests"]["result"] == "interrupted"
    assert (out / "report.md").exists()


def test_furthest_from_the_floor():
    shares = (
        ("a", "triton", 0.9), ("a", "triton", 0.2), ("b", "triton", 0.5), ("b", "eager", 0.1),
        ("c", "triton", None), ("d", "triton", 0.7), ("e", "triton", 0.6), ("small", "triton", 0.1),
    )  # fmt: skip
    keys = ("workload", "provider", "share_of_floor")
    report = SimpleNamespace(rows=[dict(zip(keys, row, strict=True)) for row in shares])
    table = [SimpleNamespace(name=name, small=name == "small") for name in (*"abcde", "small")]
    assert stages.furthest(report, table) == ["b", "e", "d"]
    report.rows = []
    assert stages.furthest(report, table) == ["a", "b", "c"]


def test_the_eager_stage_has_the_order_of_its_groups_and_ends_with_small_workloads():
    planned = stages.order("eager", WORKLOADS, 2)
    halves = [[w for w in WORKLOADS if w.small is small] for small in (False, True)]
    assert all(halves)
    assert planned == [
        (work, mode, group)
        for half in halves
        for group in (0, 1)
        for work in half
        for mode in (FORWARD, STEP)
    ]


def test_compiled_stage_begins_with_what_matters():
    """Every rival on three workloads, then the default mode on all, then max-autotune."""
    groups = providers.gpu_sweeps("compiled")
    planned = stages.order("compiled", WORKLOADS, len(groups))
    assert len({*planned}) == len(planned) == 2 * len(WORKLOADS) * len(groups)
    count = 3 * len(providers.COMPILED_MAIN) * 2
    first, then = planned[:count], planned[count:]
    assert {work.name for work, _, _ in first} == {*stages.COMPILED_FIRST[:3]}
    names = {p.name for _, _, group in first for p in groups[group]}
    assert names >= {
        "compile eager", "compile eager max-autotune", "compile triton", "compile eager mm",
        "compile absorbed unbiased", "compile absorbed flex",
    }  # fmt: skip
    for name in ("compile eager", "compile eager max-autotune"):
        works = 2 * (len(WORKLOADS) - 3)
        part, then = then[:works], then[works:]
        assert all(any(p.name == name for p in groups[group]) for _, _, group in part)
        assert len({work for work, _, _ in part}) == len(WORKLOADS) - 3


def test_rows_have_the_numbers_of_their_groups(run, out, tiny, settings):
    """Whatever the order: results of several invocations are joined by them."""
    (plain,) = settings.sweeps("compiled")
    sweeps = [[dataclasses.replace(p, name=f"{p.name} {i}") for p in plain] for i in range(3)]
    run("compiled", workloads=[tiny], sweeps=lambda stage: sweeps)
    rows = [json.loads(line) for line in logged(out, "rows.jsonl").splitlines()]
    assert len(rows) == 3 * 2 * 2
    assert all(row["group"] == f"compiled {row['provider'][-1]}" for row in rows)


def test_ceiling_that_fails_is_reported():
    def timer(closure, *, launches_count):
        raise MemoryError("too large")

    found, rates = roofline.measure(timer, CPU, torch.bfloat16, 1024, 16)
    assert found is None
    assert set(rates.values()) == {"failed: MemoryError: too large"}
