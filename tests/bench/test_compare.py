import pandas as pd
import pytest

from bench import cli
from bench.compare import MISSING, SAME, SLOWER, compare, read, regressed, text
from bench.report import COLUMNS
from bench.workloads import UsageError
from support.rows import row, unpadded


def frame(*rows):
    return pd.DataFrame([{"machine": "one", **r} for r in rows], columns=list(COLUMNS))


@pytest.fixture
def command(tmp_path):
    """The exit status of the command with files of these rows."""

    def run(old, new, *options):
        for name, made in (("old", old), ("new", new)):
            made.to_csv(tmp_path / f"{name}.csv", index=False)
        return cli.main(["compare", f"{tmp_path}/old.csv", f"{tmp_path}/new.csv", *options])

    return run


SLOW = {"median_ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1}
NOISY = {"median_ms": 4.0, "p20_ms": 2.0, "p80_ms": 4.1}


@pytest.mark.parametrize(
    ("change", "status", "printed"),
    [
        ({}, 0, "0 slower, 0 faster, 1 within the noise"),
        (SLOW, 1, "1 slower, 0 faster, 0 within the noise"),
        (NOISY, 0, "0 slower, 0 faster, 1 within the noise"),
        ({"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}, 0, "0 slower, 1 faster"),
        ({"status": "disagrees: relative RMS 1"}, 1, "disagrees: relative RMS 1"),
        ({"p20_ms": 2.13, "p80_ms": 2.2, "median_ms": 2.15}, 0, "1 within the noise"),  # margin
    ],
)
def test_exit_status(command, capsys, change, status, printed):
    assert command(frame(row()), frame(row(**change))) == status
    assert printed in capsys.readouterr().out


def test_rows_are_matched_by_what_was_measured():
    old = frame(row(), row(workload="big"), row(layout="channels_last"), row(mode="backward"))
    found = compare(old, frame(row(workload="big", **SLOW), row(**SLOW), row(mode="backward")))
    verdicts = found.set_index(["workload", "mode", "layout"])["verdict"]
    assert dict(verdicts) == {
        ("tiny", "forward", "nchw"): SLOWER,
        ("big", "forward", "nchw"): SLOWER,
        ("tiny", "forward", "channels_last"): MISSING,
        ("tiny", "backward", "nchw"): SAME,
    }
    printed = unpadded(text(found))
    assert "| tiny | float32 | nchw | forward | eager | torch | 2.000 | 4.000 | 2.00 |" in printed
    assert "| tiny | float32 | channels_last | forward | eager | torch |" in printed


def test_what_failed_before_cannot_regress():
    assert not regressed(compare(frame(row(status="failed: x")), frame(row(status="failed: x"))))


def test_other_machines_only_if_asked_for(command, capsys):
    rows = frame(row()), frame(row()).assign(machine="two")
    assert command(*rows) == 2
    assert "one and two" in capsys.readouterr().err
    assert command(*rows, "--across") == 0


def test_nothing_in_common(command, capsys):
    assert command(frame(row()), frame(row(workload="other"))) == 2
    assert "no measurement in common" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "cannot be read"), ("a,b\n1,2\n", "it lacks workload")],
)
def test_not_a_results_file(tmp_path, content, message):
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        read(path)


def test_file_of_fewer_metrics_is_compared(tmp_path):
    """Columns are added in time; results that are kept must stay comparable."""
    path = tmp_path / "results.csv"
    frame(row()).drop(columns=["ratio_to_rivals", "saved_bytes"]).to_csv(path, index=False)
    assert list(compare(read(path), frame(row()))["verdict"]) == [SAME]
