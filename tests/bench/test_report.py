import json
import subprocess

import matplotlib.image
import pandas as pd
import pytest
import torch

from bench import report as module
from bench.measure import OK
from bench.report import COLUMNS, Report, environment


def row(provider, mode="forward", launch="eager", workload="tiny", **others):
    facts = {"workload": workload, "n": 1, "c": 8, "positions": "4x5", "mode": mode}
    facts |= {"launch": launch, "provider": provider, "baseline": provider == "eager"}
    times = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "repetitions": 5}
    return facts | {"status": OK, "ratio_to_eager": 1.0} | times | others


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "out", "A title")
    report.add([row("eager"), row("ours", ratio_to_eager=4.0)])
    report.add([row("ours", workload="small", ratio_to_eager=1.0)])
    return report


def test_csv_grows_with_every_group(report):
    path = report.out / "results.csv"
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 3
    report.add([row("broken", status="failed: why, and how", ratio_to_eager=None)])
    assert pd.read_csv(path)["status"].iloc[-1] == "failed: why, and how"


def test_text_has_every_timing_and_the_mean(report):
    report.add([row("broken", status="failed: why"), row("broken", status="failed: why")])
    text = report.finish(short=False)
    assert "A title" in text
    assert "geometric mean 2.00, worst 1.00 (small), 2 timed" in text
    assert "broken (eager launch), 2x, first tiny: failed: why" in text
    assert text.count(" 2.000 ") == 3
    assert (report.out / "report.txt").read_text().startswith("A title")
    assert " 2.000 " not in report.finish(short=True)


def test_other_ratios_and_the_workloads_that_lose(report):
    report.add([
        row("ours", mode="forward+backward", ratio_to_eager=0.5, ratio_same_format=2.0),
        row("ours", mode="forward+backward", workload="big", ratio_to_eager=0.75),
        row("compile eager", ratio_to_eager=1.5, ratio_to_compiled=1.0),
    ])  # fmt: skip
    text = report.finish(short=True)
    assert "worst 0.50 (tiny), 2 timed\n         slower on tiny 0.50, big 0.75" in text
    assert "eager in the same memory format, same launch mode:" in text
    assert "geometric mean 2.00, worst 2.00 (tiny), 1 timed" in text
    assert "torch.compile" not in text  # nothing of ours was compared with it


def test_without_ratios_there_are_raw_times(report):
    report.with_ratios = False
    report.add([])
    text = report.finish(short=True)
    assert "x eager" not in text
    assert "geometric" not in text
    assert text.count(" 2.000 ") == 3
    assert pd.read_csv(report.out / "results.csv")["ratio_to_eager"].isna().all()


def test_noisy_timings_are_told(report):
    assert not report.noise()
    report.add([row("ours", p20_ms=1.0)])
    assert report.noise().startswith("1 of 4 timings vary")


@pytest.mark.parametrize("with_ratios", [True, False])
def test_figure_is_an_image_with_something_on_it(report, with_ratios):
    report.with_ratios = with_ratios
    report.add([row("ours", mode="forward+backward", launch="graph", ratio_to_eager=2.0)])
    report.finish(short=True)
    image = matplotlib.image.imread(report.out / "results.png")
    assert min(image.shape[:2]) > 300
    assert image[..., :3].std() > 0.05


def test_figure_of_nothing(tmp_path):
    report = Report(tmp_path, "A title")
    report.add([row("broken", status="failed: why")])
    assert "failed: why" in report.finish(short=True)
    assert matplotlib.image.imread(tmp_path / "results.png").size


def test_bars_are_ratios_of_others_than_the_baseline(report):
    panel = report.figure().axes[0]
    assert [bar.get_height() for bars in panel.containers for bar in bars] == [4.0, 1.0]
    assert panel.get_lines()[0].get_ydata()[0] == 1.0
    assert "eager" in panel.get_ylabel()


def test_environment_is_recorded(report):
    report.record(**environment(torch.device("cpu")))
    report.record(tests="passed")
    facts = json.loads((report.out / "environment.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["tests"] == "passed"
    assert {"date", "commit", "python", "cpu", "threads"} <= set(facts)


def test_card_reads_what_nvidia_smi_prints(monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        line = "A card, 1.2, 3, 4, 5, 6, 7, 8\n"
        return subprocess.CompletedProcess(command, 0, stdout=line)

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.card()["name"] == "A card"
    assert module.card()["clocks.mem"] == "4"
    assert all(command[1].startswith("--query-gpu=") for command in commands)


def test_card_is_none_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert module.card() is None
