import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bench import (
    cli,
    environment,
    first_call,
    isolation,
    measure,
    networks,
    problems,
    providers,
    report,
    roofline,
    scaling,
    stages,
    workloads,
)
from bench.measure import OK, Effort
from bench.workloads import WORKLOADS
from support import fakes


@pytest.fixture(autouse=True)
def short(monkeypatch, in_this_process):
    monkeypatch.setattr(cli, "DEFAULT", Effort(0, 2, 2, seconds=0.0))
    monkeypatch.setattr(cli, "QUICK", Effort(0, 1, 1, seconds=0.0))
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (2**16, 16)})


@pytest.fixture
def without_compiling(monkeypatch):
    """The providers of a CPU, with the compiled block replaced by the eager one."""

    def plain(*others):
        found = original(*others)
        return [dataclasses.replace(p, setup=found[0].setup) if p.compiles else p for p in found]

    original = providers.plain
    monkeypatch.setattr(providers, "plain", plain)


def test_run_without_arguments(table, tmp_path, capsys, without_compiling, monkeypatch):
    monkeypatch.setattr(cli, "Worker", isolation.Worker)
    assert cli.main(["--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(frame["workload"]) == {"tiny", "tiny_volume"}
    assert set(frame["mode"]) == {"forward", "forward+backward"}
    assert set(frame["provider"]) == {"eager", "torch", "compile eager"}
    assert frame.groupby("provider")["layout"].nunique().eq(2).all()
    assert (frame["status"] == OK).all()
    ratios = ["ratio_to_eager", "ratio_same_format", "ratio_to_compiled"]
    assert (frame[ratios] > 0).all().all()
    assert (frame["repetitions"] == 2).all()
    assert (frame["n"][frame["workload"] == "tiny"] == 2).all()
    printed = capsys.readouterr().out
    assert "Triton latencies need a GPU" in printed
    assert "Triton latencies need a GPU" in (tmp_path / "report.md").read_text()
    assert (frame["share_of_floor"] > 0).all()
    assert {p.name for p in tmp_path.iterdir()} == {
        "environment.json", "report.md", "results.csv", "bars.png", "roofline.png",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("named", "workload"), [([], "tiny"), (["--workload", "tiny_volume"], "tiny_volume")]
)
def test_quick_takes_fewest(table, tmp_path, named, workload):
    assert cli.main(["--quick", *named, "--out", str(tmp_path)]) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert set(frame["workload"]) == {workload}
    assert (frame["repetitions"] == 1).all()


def test_busy_machine_is_reported(table, tmp_path, capsys, monkeypatch):
    facts = environment.environment(torch.device("cpu")) | {"load": 100.0}
    monkeypatch.setattr(report, "environment", lambda device: facts)
    cli.main(["--quick", "--out", str(tmp_path)])
    assert "The machine was busy (load 100.0" in capsys.readouterr().out


@pytest.fixture
def gpu_calls(monkeypatch):
    """What ``run_gpu`` is called with, on a machine that has a GPU."""
    calls = []

    def run_gpu(out, workloads, budget, stages, settings):
        calls.append((out, workloads, budget.seconds, [s.name for s in stages], settings.ptxas))
        return 7

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli.gpu, "run_gpu", run_gpu)
    return calls


def test_gpu_runs_every_stage_with_the_sum_of_their_seconds(table, tmp_path, gpu_calls):
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 7
    names = [stage.name for stage in stages.STAGES]
    assert gpu_calls == [(tmp_path, list(table), 1560, names, [])]


def test_gpu_adds_to_no_results_of_other_commands(table, tmp_path, gpu_calls, capsys):
    (tmp_path / "results.csv").touch()
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 2
    assert "has a results.csv that cannot be added to" in capsys.readouterr().err
    (tmp_path / "logs.tar.gz").touch()
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 7


def test_gpu_runs_chosen_stages_in_their_order(table, tmp_path, gpu_calls):
    ptxas = tmp_path / "ptxas"
    ptxas.touch(0o755)
    arguments = ["--stage", "tests", "--stage", "eager,smoke", "--ptxas", str(ptxas)]
    assert cli.main(["gpu", *arguments, "--workload", "tiny"]) == 7
    assert cli.main(["gpu", *arguments, "--budget", "90"]) == 7
    (_, works, *first), (_, _, *second) = gpu_calls
    assert [work.name for work in works] == ["tiny"]
    assert first == [460, ["smoke", "tests", "eager"], [str(ptxas)]]
    assert second == [90, ["smoke", "tests", "eager"], [str(ptxas)]]


@pytest.mark.parametrize("name", [command.name for command in cli.app.registered_commands])
def test_every_command_has_help_with_examples(name, capsys):
    assert cli.main([name or "codegen", "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"  python -m bench {name or 'codegen'} " in printed.partition("examples:")[2]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sweeep"], "Did you mean 'sweep'"),
        (["--workload", "tiny_volum"], "did you mean 'tiny_volume'"),
        (["--quick", "--all"], "exclude each other"),
        (["sweep", "--provider", "torhc"], "did you mean 'torch'"),
        (["sweep", "--provider", "triton"], "'triton' needs a GPU"),
        (["sweep", "--mode", "fwdbwd"], "did you mean 'fwd_bwd'"),
        (["sweep", "--dtype", "f32"], "did you mean 'fp32'"),
        (["sweep", "--layout", "nhcw"], "did you mean 'nchw'"),
        (["sweep", "--metric", "tme"], "did you mean 'time'"),
        (["sweep", "--launch", "graph"], "there is no GPU here"),
        (["scaling", "--provider", "egaer"], "did you mean 'eager'"),
        (["scaling", "--most", "3"], "below the least size, 1024"),
        (["scaling", "--dtype", "fp32,bf16"], "one dtype"),
        (["plan"], "needs the name of a workload"),
        (["plan", "--shape", "1,2,3"], "needs --c-m and --c-n"),
        (["plan", "--shape", "1,x", "--c-m", "2", "--c-n", "2"], "takes integers, got 1,x"),
        (["plan", "--shape", "1,2", "--c-m", "2", "--c-n", "2"], "x_shape must be"),
        (["sweep", "--selection", "most"], "'most' is not one of 'quick', 'default', 'all'"),
        (["sweep", "--budgt", "1"], "No such option: --budgt"),
        (["sweep", "--mode", "backward"], "did you mean 'bwd'"),
        (["gpu"], "needs a CUDA GPU"),
        (["gpu", "--stage", "eager,teste"], "did you mean 'tests'"),
        (["gpu", "--ptxas", "none"], "--ptxas none is not an executable file"),
        (["host"], "TRITON_INTERPRET is set"),
        (["host", "--threads", "0"], "at least 1, got 0"),
        (["warm", "--arch", "sm_90"], "TRITON_INTERPRET is set"),
        (["tune"], "measures on a CUDA GPU"),
        (["networks", "--network", "resnet5"], "did you mean 'resnet50'"),
        (["networks", "--mode", "bwd"], "did you mean 'fwd'"),
        (["compare", "a.csv", "b.csv"], "a.csv cannot be read"),
    ],
)
def test_arguments_that_make_no_sense(table, capsys, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert not captured.out
    assert not list(tmp_path.iterdir())


def test_sweep(table, tmp_path, capsys):
    arguments = [
        "sweep", "--workload", "tiny", "--provider", "eager,torch", "--mode", "fwd,bwd,fwd_bwd",
        "--dtype", "fp32,bf16", "--layout", "channels_last", "--metric", "time,memory,rate",
        "--seconds", "0", "--out", str(tmp_path),
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    frame = pd.read_csv(tmp_path / "results.csv")
    assert (frame["status"] == OK).all()
    assert len(frame) == 2 * 3 * 2
    assert set(frame["mode"]) == set(problems.MODES)
    assert set(frame["layout"]) == {"channels_last"}
    assert frame["share_of_floor"].notna().equals(frame["dtype"] == "float32")
    printed = capsys.readouterr().out
    assert "saved B" in printed
    assert "GB/s" in printed
    assert "x eager" not in printed


@pytest.mark.parametrize("only", ["csv", "png"])
def test_one_kind_of_file(table, tmp_path, only):
    arguments = ["sweep", "--workload", "tiny", "--provider", "eager,torch", "--mode", "fwd"]
    assert cli.main([*arguments, f"--{only}", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "results.csv").exists() == (only == "csv")
    assert (tmp_path / "bars.png").exists() == (only == "png")


@pytest.mark.parametrize(
    ("command", "csv", "written"),
    [
        (["--quick"], "results.csv", {"bars.png", "report.md"}),
        (["sweep", "--provider", "eager,torch"], "results.csv", {"bars.png", "report.md"}),
        (["scaling", "--provider", "eager,torch", "--axis", "N"], "scaling.csv", {"scaling.png"}),
        (["networks", "--network", "net"], "results.csv", {"report.md"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_run_that_is_interrupted_keeps_what_it_measured(
    table, tmp_path, capsys, monkeypatch, command, csv, written
):
    """Rows, plots and a report of what came before the second group."""
    original, groups = measure.Bench.measure, []

    def ends_in_the_second(self, *args):
        groups.append(None)
        if len(groups) == 2:
            raise KeyboardInterrupt
        return original(self, *args)

    shape = (2, 3, 9, 9)
    net = networks.Network("net", fakes.small_network, fakes.loss, shape, shape)
    monkeypatch.setattr(networks, "NETWORKS", {"net": net})
    monkeypatch.setattr(measure.Bench, "measure", ends_in_the_second)
    monkeypatch.setattr(scaling, "BASE", dataclasses.replace(table[0], heads=1))
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    assert len(groups) == 2
    assert "Interrupted" in capsys.readouterr().out
    assert (pd.read_csv(tmp_path / csv)["status"] == OK).all()
    assert written <= {path.name for path in tmp_path.iterdir()}


def test_run_that_is_terminated_leaves_a_report_and_no_process(
    table, eager, tmp_path, capsys, monkeypatch
):
    """As by a time limit, while a provider hangs in the worker."""
    workers = []

    class Terminated(isolation.Worker):
        def begin(self, job):
            super().begin(job)
            workers.append(self._process)
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "Worker", Terminated)
    hangs = dataclasses.replace(eager, setup=fakes.hangs)
    monkeypatch.setattr(providers, "plain", lambda *others: [hangs])
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 1
    assert report.INTERRUPTED in capsys.readouterr().out
    assert report.INTERRUPTED in (tmp_path / "report.md").read_text()
    (worker,) = workers
    assert worker.returncode == -signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) == before


def test_run_that_times_nothing_fails(table, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "Worker", isolation.Worker)
    monkeypatch.setattr(isolation, "ROOT", tmp_path)  # where there is no benchmark
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert cli.main(["--quick", "--out", str(tmp_path / "out")]) == 1
    rows = pd.read_csv(tmp_path / "out" / "results.csv")
    assert set(rows["status"]) == {"not measured: the process died with exit status 1"}


def test_interruption_elsewhere_has_its_exit_status(monkeypatch):
    def stopped(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.compare.read", stopped)
    assert cli.main(["compare", "a.csv", "b.csv"]) == 130


@pytest.mark.parametrize("axis", scaling.AXES)
def test_scaling(tmp_path, capsys, monkeypatch, axis):
    monkeypatch.setitem(scaling.AXES, axis, [8, 16, 32])
    small = dataclasses.replace(scaling.BASE, c=8, c_m=4, c_n=4)
    monkeypatch.setattr(scaling, "BASE", small)
    arguments = ["scaling", "--axis", axis, "--mode", "fwd", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    frame = pd.read_csv(tmp_path / "scaling.csv")
    assert (frame["status"] == OK).all()
    assert frame["axis"].eq(axis).all()
    assert set(frame["size"]) == {8, 16, 32}
    assert {*frame["provider"]} == {"eager", "torch"}
    of_size = frame.drop_duplicates("size").set_index("size")
    if axis == "L":
        assert all(eval(p.replace("x", "*")) == size for size, p in of_size["positions"].items())
    else:
        assert list(of_size[axis.lower()]) == [8, 16, 32]
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert ("ns per position" in capsys.readouterr().out) == (axis == "L")


def test_positions_of_scaling():
    for size in scaling.AXES["L"]:
        assert scaling.workload("L", size).length == size


def test_line_through_times():
    length = 2.0 ** np.arange(10, 22)
    a, b = scaling.fit(length, 0.02 + 3e-6 * length)
    assert (a, b) == pytest.approx((20.0, 3.0))


def test_plan_of_workloads_and_shapes(capsys):
    assert cli.main(["plan", "yolo_p3", "r50_conv3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("modelled forward") == 2
    shape = ["--shape", "16,256,80,80", "--c-m", "64", "--c-n", "64"]
    assert cli.main(["plan", *shape]) == 0
    assert capsys.readouterr().out.strip() in printed


def test_floors_of_the_design():
    """Of an H200 with the ceilings that were measured on one elsewhere."""
    ceilings = roofline.Ceilings(4.3e12, 790e12, 50e6)
    known = {
        "r50_conv3": 78, "r50_conv4": 83, "r50_conv3_q": 36, "r50_conv4_q": 38, "yolo_p3": 24,
        "kinetics_conv3": 68, "kinetics_conv4": 78, "hires_256": 44, "seg_19": 16,
        "volume_128": 187,
    }  # fmt: skip
    for work in WORKLOADS:
        if work.name in known:
            found = roofline.work_of(work, work.n, problems.FORWARD, 2, ceilings.cache)
            seconds, _ = found.least_time(ceilings)
            assert 1e6 * seconds == pytest.approx(known[work.name], rel=0.06)


def test_modes_add_up():
    for work in WORKLOADS:
        forward, backward, step = (roofline.work_of(work, 2, m, 2) for m in problems.MODES)
        for one, two, both in zip(forward, backward, step, strict=True):
            assert 0 < one < two
            assert both == one + two


def test_first_calls_of_fresh_processes(monkeypatch, children):
    cpu = torch.device("cpu")
    (eager,) = providers.select(["eager"], "eager", cpu, torch.float32, ["nchw"])
    folders = []

    def seen(log, environment):
        folders.append({name: os.path.dirname(path) for name, path in environment.items()})
        return isolation.Worker(log, environment)

    monkeypatch.setattr(first_call, "Worker", seen)
    work = workloads.select(["yolo_p5_b1"], "all")[0]
    cold, warm = first_call.seconds(work, eager, problems.FORWARD, torch.float32, cpu)
    assert 0 < cold < 60
    assert 0 < warm < 60
    assert folders[0] == folders[1]
    assert {*folders[0]} == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "DA_TRITON_CACHE_DIR"}
    broken = dataclasses.replace(eager, setup=fakes.fails)
    with pytest.raises(RuntimeError, match=r"first call of 'eager': failed: .*out of memory"):
        first_call.seconds(work, broken, problems.FORWARD, torch.float32, cpu)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="first call of 'eager': killed after 0 s"):
        first_call.seconds(work, eager, problems.FORWARD, torch.float32, cpu, limit=0.2)
    assert time.monotonic() - start < 3


def test_first_calls_in_a_sweep(table, tmp_path, monkeypatch):
    def seconds(workload, provider, *rest):
        if provider.name == "eager":
            raise RuntimeError("out of memory")
        return 3.0, 1.0

    monkeypatch.setattr(first_call, "seconds", seconds)
    arguments = ["--workload", "tiny", "--provider", "eager,torch", "--mode", "fwd"]
    arguments += ["--metric", "first_call", "--out", str(tmp_path)]
    assert cli.main(["sweep", *arguments]) == 0
    frame = pd.read_csv(tmp_path / "results.csv").set_index("provider")
    assert frame["first_call_cold_s"]["torch"].eq(3.0).all()
    assert frame["first_call_warm_s"]["torch"].eq(1.0).all()
    assert frame["status"]["eager"].eq("failed: RuntimeError: out of memory").all()


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_waiting_threads_sleep_unless_set_otherwise(given):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    program = "import sys, bench, os; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    command = [sys.executable, "-c", program]
    root = Path(measure.__file__).parent.parent
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.stdout.split() == [given or "PASSIVE", "False"]
