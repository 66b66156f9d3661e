"""What a run leaves behind, from rows that were not measured: files, tables, plots, environment."""

import json
import re
import subprocess

import matplotlib.image
import pandas as pd
import pytest
import torch

import da_triton
from bench import environment as module
from bench import plots, scaling
from bench.environment import COMMIT, commit, environment
from bench.measure import CONDITIONS, RATIOS
from bench.report import COLUMNS, INTERRUPTED, Report
from bench.roofline import Ceilings
from bench.tables import METRICS, against_model, markdown, means
from support.rows import row, unpadded

CEILINGS = Ceilings(1e10, 1e12)


@pytest.fixture
def report(tmp_path):
    report = Report(tmp_path / "out", "A title")
    report.record(cpu="A processor", torch="2.14", commit="abc")
    report.add([row("eager"), row("torch", ratio_to_eager=4.0)])
    report.add([row("torch", workload="small", ratio_to_eager=1.0)])
    return report


def finished(report, short=True):
    """What is printed, and what is written."""
    printed = report.finish(short=short)
    page = (report.out / "report.md").read_text(encoding="utf-8")
    return unpadded(printed), unpadded(page)


def test_csv_grows_with_every_group_and_says_where_it_was_measured(report):
    path = report.out / "results.csv"
    frame = pd.read_csv(path)
    assert tuple(frame.columns) == COLUMNS
    assert len(frame) == 3
    assert frame["machine"].eq("A processor").all()
    assert frame["commit"].eq("abc").all()
    report.add([row("broken", status="failed: why, and how", ratio_to_eager=None)])
    assert pd.read_csv(path)["status"].iloc[-1] == "failed: why, and how"


def test_report_has_timings_means_plots_and_what_was_not_timed(report):
    report.notes.append("A note.")
    report.ceilings = CEILINGS
    report.add([
        row("broken", status="failed: why"), row("broken", status="failed: why"),
        row("torch", mode="forward+backward", launch="graph", ratio_to_eager=2.0),
    ])  # fmt: skip
    short, page = finished(report)
    printed, _ = finished(report, short=False)
    for text in (short, printed, page):
        assert "# A title\n\nA note." in text
        assert (
            "| x eager | float32 | eager | forward | torch | nchw | 2.00 | 1.00 | small |" in text
        )
        assert "| broken | eager | failed: why | 2 | tiny |" in text
    assert [text.count(" 2.000 ") for text in (short, printed, page)] == [0, 4, 4]
    assert "| cpu | A processor |" in page
    drawn = re.findall(r"!\[.*?\]\((.*?)\)", page)
    assert drawn == ["bars.png", "roofline.png"]
    for name in drawn:
        image = matplotlib.image.imread(report.out / name)
        assert min(image.shape[:2]) > 300
        assert image[..., :3].std() > 0.05


def test_every_ratio_has_a_mean_and_the_workloads_that_lose(report):
    report.add([
        row("torch", mode="forward+backward", ratio_to_eager=0.5, ratio_same_format=2.0),
        row("torch", mode="forward+backward", workload="big", ratio_to_eager=0.75),
        row("torch", layout="channels_last", ratio_to_eager=9.0),
        row("compile eager", ratio_to_eager=1.5, ratio_to_compiled=1.0),
    ])  # fmt: skip
    for text in finished(report):
        assert "| 0.61 | 0.50 | tiny | 2 | tiny 0.50, big 0.75 |" in text
        assert "| torch | channels_last | 9.00 |" in text  # formats have means of their own
        assert f"* same format: {RATIOS['ratio_same_format'].meaning}" in text
        assert "| same format | float32 | eager | forward+backward | torch | nchw | 2.00 |" in text
        assert RATIOS["ratio_to_compiled"].meaning not in text  # not measured for ours
    ratios = {name: 3.0 + n for n, name in enumerate(RATIOS)}
    report.add([row("triton", launch="graph", workload="all", **ratios)])
    _, page = finished(report)
    for name, ratio in RATIOS.items():
        assert ratio.meaning in page
        assert f"| {ratios[name]:.2f} | {ratios[name]:.2f} | all |" in page


def test_warnings(report):
    """References that failed, kernels that were replaced, and noise."""
    printed, _ = finished(report, short=False)
    for absent in ("do not consider", " * |", "vary"):
        assert absent not in printed
    failed = {"failed_references": "compile eager nchw, sdpa nchw"}
    replaced = {"kernels_not_used": "combine, gather_from_x"}
    report.add([
        row("torch", workload="a", **failed), row("torch", workload="b", **failed, p20_ms=1.0),
        row("triton", workload="a", ratio_to_eager=3.0),
        row("triton", workload="a", ratio_to_eager=2.0, **replaced),
        row("triton", workload="b", ratio_to_eager=3.0),
    ])  # fmt: skip
    printed, page = finished(report, short=False)
    for text in (printed, page):
        assert "what failed: compile eager nchw on a, b; sdpa nchw on a, b." in text
        assert "1 of 8 timings vary" in text
        assert "| triton * | nchw | 2.45 |" in text
        assert "wrong results on first use: combine, gather_from_x." in text
        assert text.count("| triton * |") == 2  # in the ratios and in the measurements
        assert text.count("| triton |") == 2


def test_chosen_metrics_are_what_is_printed(tmp_path):
    report = Report(tmp_path, "A title", metrics=["memory", "first_call"], csv=False, png=False)
    report.add([row("torch", saved_bytes=1234, first_call_cold_s=5.678)])
    printed, _ = finished(report, short=False)
    assert "| saved B | cold s |" in printed
    assert "| 1234 | 5.68 |" in printed
    assert "median" not in printed
    assert {p.name for p in tmp_path.iterdir()} == {"report.md"}
    assert set().union(*METRICS.values()) <= set(COLUMNS)


def test_without_ratios_there_are_raw_times(report):
    report.trusts = lambda row: False
    report.ceilings = CEILINGS
    report.add([])
    short, page = finished(report)
    for text in (short, page):
        assert text.count(" 2.000 ") == 3
        for absent in ("x eager", "geometric", "Ratios"):
            assert absent not in text
    assert pd.read_csv(report.out / "results.csv")["ratio_to_eager"].isna().all()
    assert not list(report.out.glob("*.png"))


@pytest.mark.parametrize(
    ("facts", "drawn"),
    [({"status": "failed: why"}, []), ({"gb_s": None, "tflop_s": None}, ["bars.png"])],
    ids=["nothing timed", "networks"],
)
def test_only_what_there_is_is_drawn(tmp_path, facts, drawn):
    report = Report(tmp_path, "A title", ceilings=CEILINGS)
    report.add([row("eager", **facts), row("torch", **facts)])
    assert facts.get("status", "eager") in report.finish(short=False)
    assert [path.name for path in tmp_path.glob("*.png")] == drawn


def test_scaling_that_was_interrupted_at_once(tmp_path):
    report = Report(tmp_path, "A title", notes=[INTERRUPTED])
    assert INTERRUPTED in scaling.finish(report, "L")
    assert not list(tmp_path.glob("*.png"))


def test_model_beside_what_was_measured_on_a_gpu(report):
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
    assert "## Model against measurement" in finished(report)[1]


def test_provider_of_several_groups_counts_once_with_its_worst_ratio(report):
    report.add([
        row("triton", median_ms=2.0, ratio_to_eager=3.0),
        row("triton", median_ms=2.1, ratio_to_eager=2.5, ratio_to_compiled=1.5),
        row("triton", median_ms=1.9, ratio_to_eager=3.5, ratio_to_rivals=1.25),
    ])  # fmt: skip
    found = means(report.timed()).set_index(["provider", "against"]).loc["triton"]
    expected = {"ratio_to_eager": 2.5, "ratio_to_compiled": 1.5, "ratio_to_rivals": 1.25}
    assert dict(found["geometric mean"]) == pytest.approx(expected)
    assert set(found["timed"]) == {1}
    assert finished(report)[1].count("| forward | eager | triton |") == 3  # all are listed


# --- plots ----------------------------------------------------------------------------------------


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
    panel = plots.roofline(report.timed(), CEILINGS, "A title").axes[0]
    bottom, top = panel.get_ylim()
    points = [line for line in panel.get_lines() if line.get_marker() in ("o", "^")]
    assert len(points) == 2
    for line in points:
        assert len(line.get_ydata())
        assert all(bottom < y < top for y in line.get_ydata())


def test_markdown_table():
    frame = pd.DataFrame({"name": ["a|b", None, "1e9"], "x": [1.25, float("nan"), 3]})
    head, align, *lines = unpadded(markdown(frame, {"x": 1})).splitlines()
    assert re.fullmatch(r"\|:-+\|-+:\|", align)
    assert [head, *lines] == ["| name | x |", "| a\\|b | 1.2 |", "| | |", "| 1e9 | 3.0 |"]


# --- environment ----------------------------------------------------------------------------------


def test_environment_is_recorded(report):
    report.record(**environment(torch.device("cpu")))
    report.record(tests="passed")
    report.add([row(device="cuda")])
    facts = json.loads((report.out / "environment.json").read_text())
    assert facts["torch"] == torch.__version__
    assert facts["tests"] == "passed"
    assert facts["conditions"] == CONDITIONS
    assert {"date", "commit", "python", "cpu", "threads"} <= set(facts)
    assert "cudnn.benchmark is True" in finished(report)[1]


def test_gpu_is_what_nvidia_smi_prints(monkeypatch):
    def run(command, **_):
        assert command[1].startswith("--query-gpu=")
        return subprocess.CompletedProcess(command, 0, stdout="A GPU, 1.2, 3, 4, 5, 6, 7, 8\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    found = module.gpu()
    assert found["clocks.mem"] == "4"
    columns = module.columns({"cpu": "not this", "gpu": found})
    assert (columns["machine"], columns["driver"], columns["clock_mhz"]) == ("A GPU", "1.2", "3")
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    assert module.gpu() is None


def test_commit(tmp_path, monkeypatch):
    monkeypatch.delenv(COMMIT, raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]

    def call(*command):
        return subprocess.run([*git, *command], check=True, capture_output=True, text=True).stdout

    assert commit(tmp_path) is None
    call("init", "-q")
    (tmp_path / "file").touch()
    call("add", ".")
    call("commit", "-q", "-m", "c")
    head = call("rev-parse", "HEAD").strip()
    assert commit(tmp_path) == head
    (tmp_path / "part").mkdir()
    assert commit(tmp_path / "part") is None  # another repository around it
    monkeypatch.setenv(COMMIT, "abc-dirty")
    assert commit(tmp_path / "part") == "abc-dirty"
    (tmp_path / "file").write_text("changed")
    assert commit(tmp_path) == f"{head}-dirty"
