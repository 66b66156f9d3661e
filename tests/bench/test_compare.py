import pandas as pd
import pytest

from bench import cli
from bench.compare import compare, read
from bench.report import COLUMNS
from bench.workloads import UsageError
from support.rows import row, unpadded


def frame(*rows):
    return pd.DataFrame([{"machine": "one", **r} for r in rows], columns=list(COLUMNS))


@pytest.fixture
def files(tmp_path):
    def write(old, new):
        paths = [tmp_path / name for name in ("old.csv", "new.csv")]
        for path, made in zip(paths, (old, new), strict=True):
            made.to_csv(path, index=False)
        return list(map(str, paths))

    return write


SLOW = {"median_ms": 4.0, "p20_ms": 3.9, "p80_ms": 4.1}
NOISY = {"median_ms": 4.0, "p20_ms": 2.0, "p80_ms": 4.1}


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        ({}, 0, "0 slower, 0 faster, 1 within the noise"),
        (SLOW, 1, "1 slower, 0 faster, 0 within the noise"),
        (NOISY, 0, "0 slower, 0 faster, 1 within the noise"),
        ({"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}, 0, "0 slower, 1 faster"),
        ({"status": "disagrees: relative RMS 1"}, 1, "disagrees: relative RMS 1"),
        ({"p20_ms": 2.13, "p80_ms": 2.2, "median_ms": 2.15}, 0, "1 within the noise"),  # margin
    ],
)
def test_exit_status(files, capsys, change, code, told):
    assert cli.main(["compare", *files(frame(row()), frame(row(**change)))]) == code
    assert told in capsys.readouterr().out


def test_rows_are_matched_by_what_was_measured():
    old = frame(row(), row(workload="big"), row(layout="channels_last"), row(mode="backward"))
    new = frame(row(workload="big", **SLOW), row(**SLOW), row(mode="backward"))
    found = compare(old, new)
    assert set(found.slower["workload"]) == {"tiny", "big"}
    assert found.slower["ratio"].eq(2.0).all()
    assert list(found.missing["layout"]) == ["channels_last"]
    assert found.same == 1
    assert "| tiny | float32 | nchw | forward | eager | torch | 2.000 | 4.000 | 2.00 |" in unpadded(
        str(found)
    )


def test_what_failed_before_cannot_regress():
    found = compare(frame(row(status="failed: x")), frame(row(status="failed: x")))
    assert not found.regressed


def test_other_machines_are_refused_unless_asked_for(files, capsys):
    paths = files(frame(row()), frame(row()).assign(machine="two"))
    assert cli.main(["compare", *paths]) == 2
    assert "one and two" in capsys.readouterr().err
    assert cli.main(["compare", *paths, "--across"]) == 0


def test_nothing_in_common(files, capsys):
    assert cli.main(["compare", *files(frame(row()), frame(row(workload="other")))]) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read(tmp_path / "absent.csv")
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError, match="it lacks workload"):
        read(other)
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    with pytest.raises(UsageError, match="cannot be read"):
        read(empty)


def test_file_of_fewer_metrics_is_compared(tmp_path):
    """Columns are added in time; results that are kept must stay comparable."""
    path = tmp_path / "results.csv"
    frame(row("torch")).drop(columns=["ratio_to_rivals", "saved_bytes"]).to_csv(path, index=False)
    assert compare(read(path), frame(row("torch"))).same == 1
