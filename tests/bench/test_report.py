import json
import re
import subprocess

import matplotlib.image
import pandas as pd
import pytest
import torch

import da_triton
from bench import environment as module
from bench import plots
from bench.environment import environment
from bench.measure import CONDITIONS
from bench.report import COLUMNS, Report
from bench.roofline import Ceilings
from bench.tables import METRICS, RATIOS, against_model, markdown, means
from support.rows import row, unpadded


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "out", "A title")
    report.record(cpu="A processor", torch="2.14", commit="abc")
    report.add([row("eager"), row("torch", ratio_to_eager=4.0)])
    report.add([row("torch", workload="small", ratio_to_eager=1.0)])
    return report


def test_csv_grows_with_every_group_and_says_where_it_was_measured(report):
    path = report.out / "results.csv"
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 3
    assert frame["machine"].eq("A processor").all()
    assert frame["commit"].eq("abc").all()
    report.add([row("broken", status="failed: why, and how", ratio_to_eager=None)])
    assert pd.read_csv(path)["status"].iloc[-1] == "failed: why, and how"


def test_text_has_every_timing_and_the_mean(report):
    report.add([row("broken", status="failed: why"), row("broken", status="failed: why")])
    text = report.finish(short=False)
    assert "A title" in text
    assert "geometric mean 2.00, worst 1.00 (small), 2 timed" in text
    assert "broken (eager launch), 2x, first tiny: failed: why" in text
    assert text.count(" 2.000 ") == 3
    assert " 2.000 " not in report.finish(short=True)


def test_other_ratios_and_the_workloads_that_lose(report):
    report.add([
        row("torch", mode="forward+backward", ratio_to_eager=0.5, ratio_same_format=2.0),
        row("torch", mode="forward+backward", workload="big", ratio_to_eager=0.75),
        row("compile eager", ratio_to_eager=1.5, ratio_to_compiled=1.0),
    ])  # fmt: skip
    text = report.finish(short=True)
    assert "worst 0.50 (tiny), 2 timed\n         slower on tiny 0.50, big 0.75" in text
    assert "eager in the same memory format, same launch mode:" in text
    assert "geometric mean 2.00, worst 2.00 (tiny), 1 timed" in text
    assert "torch.compile" not in text  # nothing of ours was compared with it


def test_references_that_failed_are_named(report):
    assert "do not consider" not in report.finish(short=True)
    failed = {"failed_references": "compile eager nchw, sdpa nchw"}
    report.add([row("torch", workload=name, ratio_to_eager=2.0, **failed) for name in ("a", "b")])
    line = "The ratios do not consider what failed: compile eager nchw on a, b; sdpa nchw on a, b."
    assert line in report.finish(short=True)
    assert line in (report.out / "report.md").read_text()


def test_kernels_that_were_not_used_are_marked(report):
    assert "*" not in report.finish(short=False)
    report.add([
        row("triton", workload="a", ratio_to_eager=3.0),
        row("triton", workload="a", kernels_not_used="combine, gather_from_x", ratio_to_eager=2.0),
        row("triton", workload="b", ratio_to_eager=3.0),
    ])  # fmt: skip
    text = report.finish(short=False)
    assert re.search(r"triton \* nchw +geometric mean 2\.45", text)
    line = "* measured in a process where PyTorch operations replaced kernels that gave"
    assert line in text
    assert "on first use: combine, gather_from_x." in text
    page = unpadded((report.out / "report.md").read_text())
    assert line in page
    assert page.count("| triton * |") == 2  # in the ratios and in the measurements
    assert page.count("| triton |") == 2


def test_memory_formats_have_means_of_their_own(report):
    report.add([row("torch", layout="channels_last", ratio_to_eager=9.0)])
    text = report.finish(short=True)
    assert re.search(r"torch nchw +geometric mean 2\.00", text)
    assert re.search(r"torch channels_last +geometric mean 9\.00", text)


def test_chosen_metrics_are_what_is_printed(tmp_path):
    report = Report(tmp_path, "A title", metrics=["memory", "first_call"], csv=False, png=False)
    report.add([row("torch", saved_bytes=1234, first_call_cold_s=5.678)])
    text = report.finish(short=False)
    assert "saved B" in text
    assert "1234" in text
    assert "5.68" in text
    assert "median" not in text
    assert {p.name for p in tmp_path.iterdir()} == {"report.md"}
    assert set().union(*METRICS.values()) <= set(COLUMNS)


def test_without_ratios_there_are_raw_times(report):
    report.with_ratios = False
    report.ceilings = Ceilings(1e10, 1e11)
    report.add([])
    text = report.finish(short=True)
    assert "x eager" not in text
    assert "geometric" not in text
    assert text.count(" 2.000 ") == 3
    assert pd.read_csv(report.out / "results.csv")["ratio_to_eager"].isna().all()
    page = (report.out / "report.md").read_text()
    assert "Ratios" not in page
    assert "x eager" not in page
    assert not (report.out / "roofline.png").exists()


def test_noisy_timings_are_reported(report):
    assert "vary" not in report.finish(short=True)
    report.add([row("torch", workload="noisy", p20_ms=1.0)])
    assert "1 of 4 timings vary" in report.finish(short=True)


def test_page_ties_everything_together(report):
    report.ceilings = Ceilings(1e10, 1e11)
    report.notes.append("A note.")
    report.add([row("broken", status="failed: why")])
    report.finish(short=True)
    page = unpadded((report.out / "report.md").read_text())
    for part in ("# A title", "A note.", "failed: why", "## Ratios", "## Measurements"):
        assert part in page
    for name in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (report.out / name).exists()
    assert {"bars.png", "roofline.png"} <= {p.name for p in report.out.iterdir()}
    assert "| cpu | A processor |" in page
    assert "| torch | nchw | 2.00 | 1.00 | small |" in page


def test_model_stands_beside_what_was_measured_on_a_gpu(report):
    facts = {"device": "cuda", "dtype": "bfloat16", "n": 16, "c": 256, "positions": "80x80"}
    facts |= {"c_m": 64, "c_n": 64, "median_ms": 0.1}
    plan = da_triton.plan((16, 256, 80, 80), 64, 64)
    for mode, seconds in (
        ("forward", plan.chosen.seconds),
        ("backward", plan.chosen.backward_seconds),
        ("forward+backward", plan.chosen.seconds + plan.chosen.backward_seconds),
    ):
        report.rows = [row("triton", mode=mode, **facts), row("torch", **facts), row("triton")]
        (found,) = against_model(report.timed()).to_dict("records")
        assert found["modelled us"] == pytest.approx(1e6 * seconds)
        assert found["measured us"] == pytest.approx(100)
        assert found["measured / modelled"] == pytest.approx(1e-4 / seconds)
    report.finish(short=True)
    assert "## Model against measurement" in (report.out / "report.md").read_text()


@pytest.mark.parametrize("with_ratios", [True, False])
def test_figures_are_images_with_something_on_them(report, with_ratios):
    report.with_ratios = with_ratios
    report.ceilings = Ceilings(1e10, 1e11)
    report.add([row("torch", mode="forward+backward", launch="graph", ratio_to_eager=2.0)])
    report.finish(short=True)
    for path in report.out.glob("*.png"):
        image = matplotlib.image.imread(path)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.05


def test_report_of_nothing(tmp_path):
    report = Report(tmp_path, "A title")
    report.add([row("broken", status="failed: why")])
    assert "failed: why" in report.finish(short=True)
    assert not list(tmp_path.glob("*.png"))


def test_bars_are_our_better_format_against_eager_and_compile(report):
    report.add([
        row("torch", layout="channels_last", median_ms=1.0, ratio_to_eager=8.0),
        row("compile torch", median_ms=0.5, ratio_to_eager=16.0),
        row("torch", workload="big", ratio_to_eager=3.0, ratio_to_compiled=2.0),
    ])  # fmt: skip
    panel = plots.bars(report.timed(), "A title").axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in panel.containers]
    assert heights[0] == [8.0, 1.0, 3.0]
    assert heights[1][2] == 2.0
    assert panel.get_lines()[0].get_ydata()[0] == 1.0


def test_ours_is_triton_where_that_was_timed(report):
    report.add([row("triton", median_ms=3.0, ratio_to_eager=0.7), row("compile triton")])
    best = plots.best_of_ours(report.timed())
    assert list(best["provider"]) == ["triton"]
    assert list(best["ratio_to_eager"]) == [0.7]


def test_roofline_shows_both_in_view_under_the_roof(report):
    panel = plots.roofline(report.timed(), Ceilings(1e10, 1e12), "A title").axes[0]
    bottom, top = panel.get_ylim()
    points = [line for line in panel.get_lines() if line.get_marker() in ("o", "^")]
    assert len(points) == 2
    for line in points:
        assert len(line.get_ydata())
        assert all(bottom < y < top for y in line.get_ydata())


def test_markdown_table():
    frame = pd.DataFrame({"name": ["a|b", None], "x": [1.25, float("nan")]})
    head, align, *lines = unpadded(markdown(frame, {"x": "{:.1f}"})).splitlines()
    assert align.startswith("|:-")
    assert align.endswith("-:|")
    assert [head, *lines] == ["| name | x |", "| a\\|b | 1.2 |", "| | |"]


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
    columns = module.columns({"cpu": "not this", "card": module.card()})
    assert (columns["machine"], columns["driver"], columns["clock_mhz"]) == ("A card", "1.2", "3")


def test_card_is_none_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert module.card() is None


def test_every_ratio_comes_out_of_the_page(report):
    ratios = {name: 2.0 + n for n, name in enumerate(RATIOS)}
    report.add([row("triton", launch="graph", workload="all", **ratios)])
    report.finish(short=True)
    page = unpadded((report.out / "report.md").read_text())
    for name, meaning in RATIOS.items():
        assert f"Times as fast as {meaning}" in page
        assert f"| {ratios[name]:.2f} | {ratios[name]:.2f} | all |" in page


def test_provider_of_several_groups_counts_once_with_its_worst_ratio(report):
    report.add([
        row("triton", median_ms=2.0, ratio_to_eager=3.0),
        row("triton", median_ms=2.1, ratio_to_eager=2.5, ratio_to_compiled=1.5),
        row("triton", median_ms=1.9, ratio_to_eager=3.5, ratio_to_rivals=1.25),
        row("eager", median_ms=6.0), row("eager", median_ms=6.1),
    ])  # fmt: skip
    found = means(report.timed()).set_index(["provider", "against"])
    assert dict(found.loc["triton", "mean"]) == {
        "ratio_to_eager": 2.5, "ratio_to_compiled": 1.5, "ratio_to_rivals": 1.25,
    }  # fmt: skip
    assert set(found.loc["triton", "timed"]) == {1}
    for report.with_ratios in (True, False):
        report.finish(short=True)
    page = unpadded((report.out / "report.md").read_text())
    assert page.count("| triton |") == 3  # every measurement is listed


def test_conditions_of_a_gpu_run_are_recorded(report):
    assert "conditions" not in report.environment
    report.add([row("triton", device="cuda", dtype="bfloat16")])
    assert report.environment["conditions"] == CONDITIONS
    report.with_ratios = False
    report.finish(short=True)
    assert "cudnn.benchmark is True" in (report.out / "report.md").read_text()
