"""The stages of ``bench gpu`` on a CPU: fake commands, fake times, and providers that crash."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pandas as pd
import pytest
import torch

from bench import ceilings, networks, providers, sanitize, stages
from bench.environment import COMMIT, SOURCES, code, commit, environment
from bench.gpu import run_gpu
from bench.groups import Sweeper, Where
from bench.isolation import Worker
from bench.joined import LONGEST_LOG, JoinedReport
from bench.measure import CONTEXT_LOST, OK, OUT_OF_TIME, Budget, Effort
from bench.problems import FORWARD, STEP
from bench.providers import GRAPH
from bench.stages import STAGES, Settings
from bench.workloads import WORKLOADS
from support import fakes
from support.rows import row

CPU = torch.device("cpu")
PASSING = (sys.executable, "-c", "print('3 passed in 1s')")
FAILING = (
    sys.executable, "-c",
    "print('FAILED tests/test_a.py::test_b - assert 1 == 2'); print('1 failed in 1s'); "
    "raise SystemExit(1)",
)  # fmt: skip
CHECK = """
import json, os, pathlib, sys
ptxas = os.environ.get("TRITON_PTXAS_PATH")
device, file = sys.argv[2], sys.argv[4]
assert sys.argv[1::2] == ["--device", "--json"] and device == "cpu"
assert os.environ.get("TRITON_PTXAS_BLACKWELL_PATH") == ptxas
right = ptxas not in ("/wrong/ptxas", "/wrong/and/stopped/ptxas")
pathlib.Path(file).write_text(json.dumps({"ptxas": ptxas, "verdicts": [{"right": right}]}))
print("gather_from_a 64x64: error 1e-3")
sys.exit({"/wrong/ptxas": 1, "/none/ptxas": 2, "/wrong/and/stopped/ptxas": 2}.get(ptxas, 0))
"""
TUNE = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert 0 < float(arguments["--budget"])
table = {"card": "a fake", "workloads": arguments["--workload"]}
pathlib.Path(arguments["--out"]).write_text(json.dumps(table))
print("1 tile measured")
"""
WHERE = Where(CPU, torch.bfloat16, fakes.ScriptedTimer, Effort(1, 2, 2, 0.0), 20.0)


def uncaptured(found):
    return [dataclasses.replace(p, launch=GRAPH) for p in found]


@pytest.fixture
def settings(monkeypatch, children, tmp_path):
    """Those of a CPU: the torch backend in Triton's place, nothing captured, small sizes."""
    monkeypatch.setitem(stages.scaling.AXES, "L", [8, 16, 32])
    base = dataclasses.replace(stages.scaling.BASE, c=8, c_m=4, c_n=4)
    monkeypatch.setattr(stages.scaling, "BASE", base)
    monkeypatch.setattr(stages, "seconds", lambda *args: (2.0, 1.0))
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    monkeypatch.setattr("bench.tune.path_of", lambda card: tmp_path / "data" / f"{card}.json")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    plain = [p for p in providers.plain("torch") if not p.channels_last]
    network = networks.Network("net", fakes.small_network, fakes.loss, (2, 3, 9, 9), (2, 3, 9, 9))
    return Settings(
        where=WHERE,
        sweeps=lambda stage: [uncaptured(plain), plain] if stage == "eager" else [plain],
        check_command=(sys.executable, "-c", CHECK),
        test_command=PASSING,
        tune_command=(sys.executable, "-c", TUNE),
        copy_bytes=1024,
        matrix_size=16,
        networks=(network,),
        ours="torch",
    )


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(out, table, settings):
    def run(*names, seconds=1e9, workloads=table, **changes):
        chosen = [s for s in STAGES if s.name in names]
        made = dataclasses.replace(settings, **changes)
        code = run_gpu(out, workloads, Budget(seconds), chosen, made)
        path = out / "results.csv"
        return code, pd.read_csv(path) if path.exists() else None

    return run


def facts(out):
    return json.loads((out / "environment.json").read_text())


def logged(out, name):
    with tarfile.open(out / "logs.tar.gz") as archive:
        return archive.extractfile(name).read().decode()


def test_everything(run, out, table, tmp_path, capsys):
    code, frame = run(*(stage.name for stage in STAGES))
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
    for seconds in found["stages"].values():
        parts = ("imports", "compilation", "checking", "timing", "other")
        assert sum(seconds[name] for name in parts) == pytest.approx(seconds["seconds"], abs=0.4)
    assert found["stages"]["eager"]["imports"] > 0
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
        assert f"== {stage.name}: seconds" in printed


def test_stages_in_separate_invocations(run, out, table):
    run("smoke", "tests")
    _, first = run("eager", workloads=table[:1])
    assert first["ratio_to_eager"].notna().all()  # the tests passed before
    code, both = run("compiled", workloads=table[1:])
    assert code == 0
    assert len(both) == len(first) + 2 * 2
    kept = both[both["workload"] == table[0].name]
    assert list(kept["median_ms"]) == list(first["median_ms"])
    assert list(kept["date"]) == list(first["date"])
    assert {*kept["positions"]} == {"4x5"}
    assert [*facts(out)["stages"]] == ["smoke", "tests", "eager", "compiled"]
    assert logged(out, "tests.txt") == "3 passed in 1s\n"


def test_a_long_log_is_cut(run, out, tiny):
    command = (sys.executable, "-c", "for i in range(10**6): print('line', i)")
    code, _ = run("tests", test_command=command)
    assert code == 0
    log = logged(out, "tests.txt")
    assert len(log) == LONGEST_LOG
    assert log.endswith("line 999999\n")


@pytest.fixture
def on_code(monkeypatch):
    """Sets what code the next runs are of."""
    return lambda name: monkeypatch.setattr("bench.environment.code", lambda: name)


def test_what_replaces_an_earlier_timing(out, on_code):
    """Being cut short says nothing of a provider; that it fails or disagrees does."""

    def added(status):
        joined = JoinedReport(out, "A title", out / "logs")
        joined.record(**environment(CPU))
        joined.add([row(status=status)])
        (found,) = joined.rows
        return found["status"]

    (out / "logs").mkdir(parents=True)
    on_code("a")
    for status in ("failed: RuntimeError", "disagrees: relative RMS 1", "the process died with 1"):
        assert added(OK) == OK
        assert added(status) == status
    assert added(OK) == OK
    for status in (OUT_OF_TIME, CONTEXT_LOST, "killed after 150 s without a result"):
        assert added(status) == OK
    on_code("b")
    assert added(OUT_OF_TIME) == OUT_OF_TIME
    assert added(OK) == OK


def test_a_run_that_is_killed_leaves_no_other_files(out, monkeypatch):
    """Neither one that is ended while it packs its logs, nor one before it."""
    (out / "logs").mkdir(parents=True)
    (out / "logs.tar.gz.part").touch()
    joined = JoinedReport(out, "A title", out / "logs")
    assert not list(out.glob("*.part"))
    (out / "logs" / "a.txt").write_text("said")
    joined.pack()

    def ended(*args):
        raise KeyboardInterrupt

    before = (out / "logs.tar.gz").read_bytes()
    for name in ("tarfile.TarFile.addfile", "pathlib.Path.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, ended)
            with pytest.raises(KeyboardInterrupt):
                joined.pack()
        assert sorted(path.name for path in out.iterdir()) == ["logs", "logs.tar.gz"]
    assert (out / "logs.tar.gz").read_bytes() == before
    assert logged(out, "a.txt") == "said"


def test_tuning_that_fails(run, tiny, tmp_path, capsys):
    broken = (sys.executable, "-c", "raise SystemExit('out of memory')")
    code, _ = run("tune", tune_command=broken, workloads=[tiny])
    assert code == 1
    assert "failed: tiny: exit status 1: out of memory" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


TUNE_AND_FAIL = TUNE + "raise SystemExit('CUDA error')"


def test_tuning_that_is_cut_short_leaves_its_choices(run, tiny, tmp_path, capsys):
    command = (sys.executable, "-c", TUNE_AND_FAIL)
    code, _ = run("tune", tune_command=command, workloads=[tiny])
    assert code == 1
    assert json.loads((tmp_path / "data" / "a fake.json").read_text())["workloads"] == "tiny"
    printed = capsys.readouterr().out
    assert "failed: tiny: exit status 1: CUDA error\nIn use from now on: a fake.json" in printed


def test_processes_after_tuning_are_new(run, tiny, monkeypatch):
    """A process reads the table once, so one from before would measure the old tiles."""
    seen = []

    def rest(run, budget):
        seen.append(run.worker._process)
        return "done"

    original = stages.tuning

    def tuning(run, budget):
        seen.append(run.worker._process)
        return original(run, budget)

    chosen = {"eager": stages.eager, "tune": tuning, "rest": rest}
    made = [s._replace(run=chosen[s.name]) for s in STAGES if s.name in chosen]
    monkeypatch.setattr(sys.modules[__name__], "STAGES", made)
    run(*chosen, workloads=[tiny])
    assert seen[0] is not None
    assert seen[1] is None


def test_earlier_results_that_cannot_be_read_are_kept(run, out, capsys):
    run("tests")
    damaged = (out / "logs.tar.gz").read_bytes()[:100]
    (out / "logs.tar.gz").write_bytes(damaged)
    code, _ = run("tests")
    assert code == 0
    assert (out / "logs.tar.gz").read_bytes() == damaged
    (new,) = out.glob("new-*")
    assert facts(new)["tests"] == "passed: 3 passed in 1s"
    assert "could not be read: " in facts(new)["earlier_results"]
    assert "could not be read: " in capsys.readouterr().out


def test_a_compile_cache_that_is_broken(run, out, tmp_path, monkeypatch):
    (tmp_path / "warm.json").write_text("nonsense")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code, _ = run("tests")
    assert code == 0
    assert facts(out)["warm_cache"].startswith("failed: JSONDecodeError")


def test_no_ratio_while_tests_fail(run, out, tiny, capsys):
    code, frame = run("tests", "eager", test_command=FAILING, workloads=[tiny])
    assert code == 1
    assert frame["ratio_to_eager"].isna().all()
    assert frame["median_ms"].notna().all()
    printed = capsys.readouterr().out
    assert (
        "THE TESTS DID NOT PASS, so there are raw times only: failed with exit status 1" in printed
    )
    assert "FAILED tests/test_a.py::test_b - assert 1 == 2" in printed
    assert "geometric mean" not in printed
    assert "x eager" not in (out / "report.md").read_text()
    code, frame = run("tests")  # repaired
    assert code == 0
    assert frame["ratio_to_eager"].notna().all()


def test_no_ratio_without_tests_of_this_code(run, tiny, on_code):
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].isna().all()
    _, frame = run("tests")
    assert frame["ratio_to_eager"].notna().all()
    on_code("another")
    _, frame = run("smoke")
    assert frame["ratio_to_eager"].notna().all()  # it is of the code that was tested
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].isna().all()


def test_rows_of_several_versions_are_judged_one_by_one(run, out, table, on_code, capsys):
    on_code("a")
    run("eager", workloads=table[:1])  # and no tests
    on_code("b")
    _, frame = run("tests", "eager", workloads=table[1:])
    first = frame["workload"] == table[0].name
    assert frame[first]["code"].eq("a").all()
    assert frame[first]["ratio_to_eager"].isna().all()
    assert frame[~first]["ratio_to_eager"].notna().all()
    assert f"{first.sum()} of {len(frame)} rows have no ratios" in capsys.readouterr().out
    on_code(None)  # unknown is not tested
    _, frame = run("tests", "eager", workloads=table)
    assert frame["ratio_to_eager"].isna().all()


def test_results_inside_the_checkout_change_no_code(run, tmp_path, tiny, monkeypatch):
    paths = [tmp_path / folder / "kernels" / "a.py" for folder in SOURCES]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "c"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr("bench.environment.commit", functools.partial(commit, tmp_path))
    monkeypatch.setattr("bench.environment.code", functools.partial(code, tmp_path))
    run("tests")
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].notna().all()
    (tmp_path / "da_triton" / "kernels" / "data.json").write_text("{}")  # as tuning does
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].notna().all()
    paths[0].write_text("pass")
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].isna().all()


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


def test_no_ratio_if_the_smoke_check_did_not_finish(run, out, tiny, on_code, capsys):
    on_code("a")
    _, frame = run("tests", "eager", workloads=[tiny])
    assert frame["ratio_to_eager"].notna().all()
    assert "The smoke check was not run on this code." in capsys.readouterr().out
    hanging = (sys.executable, "-c", "import time; time.sleep(60)")
    _, frame = run("smoke", seconds=1, check_command=hanging)
    assert frame["ratio_to_eager"].isna().all()
    assert "THE SMOKE CHECK DID NOT FINISH (killed after 1 s)" in capsys.readouterr().out
    _, frame = run("smoke")
    assert frame["ratio_to_eager"].notna().all()
    on_code("b")
    run("smoke", ptxas=("/new/ptxas",))
    assert {x["code"] for x in facts(out)["smoke"].values()} == {"b"}


def test_a_crash_costs_its_own_row(run, tiny, variant, capsys):
    group = [*providers.plain("torch"), variant("crash", fakes.crashes)]
    code, frame = run("tests", "eager", workloads=[tiny], sweeps=lambda stage: [group])
    assert code == 0
    assert len(frame) == 2 * 5
    failed = frame[frame["status"] != OK]
    assert [*failed["provider"]] == ["crash"] * 2
    assert {*failed["status"]} == {"the process died with signal 11 (SIGSEGV)"}
    printed = capsys.readouterr().out
    assert "crash (eager launch), 2x, first tiny: the process died with signal 11" in printed
    assert "geometric mean" in printed


def test_warnings_of_workers_are_in_the_report(run, out, tiny, variant):
    """Such as that a kernel failed its check on first use, and PyTorch operations were timed."""
    group = [*providers.plain("torch")[:1], variant("warns", fakes.warns)]
    run("eager", workloads=[tiny], sweeps=lambda stage: [group])
    assert (out / "report.md").read_text().count("da_triton does not use its kernel 'a'") == 1


def test_a_stage_that_fails_does_not_end_the_run(run, out, tiny, monkeypatch, capsys):
    def fails(*args):
        raise MemoryError("too large")

    monkeypatch.setattr(stages, "REST", ((stages.whole_networks, 1),))
    code, frame = run("eager", "rest", workloads=[tiny], sweeps=fails)
    assert code == 1
    assert {*frame["workload"]} == {"net"}
    assert "failed: MemoryError: too large" in capsys.readouterr().out
    assert "in fails" in logged(out, "eager-error.txt")
    monkeypatch.setattr(stages.networks, "variants", fails)
    run("rest", workloads=[tiny])
    assert "whole networks: failed: MemoryError: too large" in capsys.readouterr().out


def test_a_report_that_cannot_be_drawn_is_written(run, out, tiny, monkeypatch, capsys):
    def fails(*args):
        raise ValueError("no font")

    monkeypatch.setattr("bench.plots.bars", fails)
    run("tests", "eager", workloads=[tiny])
    assert "Parts of the report failed: ValueError: no font" in capsys.readouterr().out
    assert "median_ms" in (out / "report.md").read_text()
    assert (pd.read_csv(out / "results.csv")["status"] == OK).all()


def test_used_up_budget(run, out, capsys):
    code, frame = run("tests", "eager", "rest", seconds=0)
    assert code == 1  # the tests did not run
    assert frame is None
    assert {x["result"] for x in facts(out)["stages"].values()} == {"not run, for lack of time"}
    assert "== eager: seconds 0.0" in capsys.readouterr().out


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

    def warm(self, workloads, log):
        asked.append(([work.name for work in workloads], self.budget.left > 0))
        return ["the process died with signal 11 (SIGSEGV)"]

    monkeypatch.setattr("bench.groups.Sweeper.warm", warm)
    where = dataclasses.replace(WHERE, device=torch.device("cpu"))
    code, frame = run("eager", "compiled", ours="triton", workloads=[tiny], where=where)
    assert code == 0
    assert asked == [(["tiny"], True)]
    assert (frame["status"] == OK).all()
    assert "Compiling kernels beforehand: the process died" in capsys.readouterr().out


def test_kernels_are_compiled_in_processes_that_may_fail(tmp_path, children, tiny, monkeypatch):
    sweeper = Sweeper(Worker(tmp_path / "log"), WHERE, Budget(60))
    assert sweeper.warm([tiny], tmp_path / "log") == []  # interpreted
    assert sweeper.spent.compilation > 0
    monkeypatch.delenv("TRITON_INTERPRET")
    (failure,) = sweeper.warm([tiny], tmp_path / "log")  # compiled, and there is no GPU
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, (None, None)),
        ("abc123", ("abc123", None)),
        ("abc123-clean", ("abc123", False)),
        ("abc123-dirty", ("abc123", True)),
    ],
)
def test_commit_of_a_copy_without_git(tmp_path, monkeypatch, given, expected):
    monkeypatch.delenv(COMMIT, raising=False)
    if given:
        monkeypatch.setenv(COMMIT, given)
    assert tuple(commit(tmp_path).values()) == expected
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "part").mkdir()
    assert tuple(commit(tmp_path / "part").values()) == expected  # another repository around it


def test_commit_of_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv(COMMIT, "abc123-clean")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "c"]):
        subprocess.run([*git, *command], check=True)
    found = commit(tmp_path)
    assert len(found["commit"]) == 40
    assert found["uncommitted_changes"] is False
    (tmp_path / "file").touch()
    assert commit(tmp_path) == {"commit": found["commit"], "uncommitted_changes": True}


def test_furthest_from_the_floor():
    class Report:
        rows = [  # noqa: RUF012
            {"workload": name, "provider": provider, "share_of_floor": share}
            for name, provider, share in (
                ("a", "triton", 0.9), ("a", "triton", 0.2), ("b", "triton", 0.5),
                ("b", "eager", 0.1), ("c", "triton", None), ("d", "triton", 0.7),
                ("e", "triton", 0.6), ("elsewhere", "triton", 0.1),
            )
        ]  # fmt: skip

    class Named:
        def __init__(self, name):
            self.name = name

    table = [Named(name) for name in "abcde"]
    assert stages.furthest(Report, table) == ["b", "e", "d"]
    Report.rows = []
    assert stages.furthest(Report, table) == ["a", "b", "c"]


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


def test_other_stages_have_the_order_of_their_groups():
    works = WORKLOADS[:2]
    found = [(work.name, group) for work, _, group in stages.order("eager", works, 2)[::2]]
    assert found == [(work.name, group) for group in (0, 1) for work in works]


def test_rows_have_the_numbers_of_their_groups(run, tiny, monkeypatch, tmp_path):
    """Whatever the order: results of several invocations are joined by them."""
    plain = [p for p in providers.plain("torch") if not p.channels_last]
    sweeps = [[dataclasses.replace(p, name=f"{p.name} {i}") for p in plain] for i in range(3)]
    run("compiled", workloads=[tiny], sweeps=lambda stage: sweeps)
    with tarfile.open(tmp_path / "out" / "logs.tar.gz") as archive:
        lines = archive.extractfile("rows.jsonl").read().decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3 * 2 * 2
    assert all(row["group"] == f"compiled {row['provider'][-1]}" for row in rows)


def test_ceiling_that_fails_is_reported():
    def timer(closure, *, launches_count):
        raise MemoryError("too large")

    found, rates = ceilings.measure(timer, CPU, torch.bfloat16, 1024, 16)
    assert found is None
    assert set(rates.values()) == {"failed: MemoryError: too large"}


def test_ceilings_from_times(timer):
    found, rates = ceilings.measure(timer, CPU, torch.bfloat16, 4_000_000, 1000)
    assert rates == {"copy GB/s": 4.0, "bfloat16 TFLOP/s": 1.0}
    assert (found.bandwidth, found.matrix_rate) == (4e9, 1e12)
