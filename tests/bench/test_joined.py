"""Results of several invocations of ``bench gpu`` in one folder, and which rows have ratios."""

import sys

import pandas as pd
import pytest

from bench.environment import SOURCES, code
from bench.joined import LONGEST_LOG, JoinedReport
from bench.measure import CONDITIONS, CONTEXT_LOST, OK, OUT_OF_TIME
from support.gpu_run import FAILING, facts, logged
from support.rows import row


@pytest.fixture
def on_code(monkeypatch):
    """Sets what code the next runs are of."""
    return lambda name: monkeypatch.setattr("bench.environment.code", lambda: name)


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


def test_what_replaces_an_earlier_timing(out):
    """Being cut short says nothing of a provider; that it fails or disagrees does."""
    (out / "logs").mkdir(parents=True)

    def added(status):
        joined = JoinedReport(out, "A title", out / "logs", {"code": "a"})
        joined.add([row(status=status, device="cuda")])
        (found,) = joined.rows
        return found["status"]

    for status in ("failed: RuntimeError", "disagrees: relative RMS 1", "the process died with 1"):
        assert added(OK) == OK
        assert added(status) == status
    assert added(OK) == OK
    for status in (OUT_OF_TIME, CONTEXT_LOST, "killed after 150 s without a result"):
        assert added(status) == OK
    assert facts(out)["conditions"] == CONDITIONS


def test_a_run_that_is_killed_leaves_no_other_files(out, monkeypatch):
    """Neither one that is ended while it packs its logs, nor one before it."""
    (out / "logs").mkdir(parents=True)
    (out / "logs.tar.gz.part").touch()
    joined = JoinedReport(out, "A title", out / "logs", {})
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
        names = {"environment.json", "logs", "logs.tar.gz"}
        assert {path.name for path in out.iterdir()} == names
    assert (out / "logs.tar.gz").read_bytes() == before
    assert logged(out, "a.txt") == "said"


def test_earlier_results_that_cannot_be_read_are_kept(run, out, on_code, capsys):
    on_code("a")
    run("tests")
    damaged = (out / "logs.tar.gz").read_bytes()[:100]
    (out / "logs.tar.gz").write_bytes(damaged)
    code, _ = run("tests")
    assert code == 0
    assert (out / "logs.tar.gz").read_bytes() == damaged
    assert facts(out / "a")["tests"] == "passed: 3 passed in 1s"
    assert f"Earlier results in {out} are not joined: " in capsys.readouterr().out
    (out / "a" / "environment.json").write_text("nonsense")
    run("tests")
    (new,) = out.glob("new-*")
    assert facts(new)["tests"] == "passed: 3 passed in 1s"


def test_results_of_other_code_are_kept(run, out, tiny, on_code, capsys):
    on_code("a")
    run("tests", "eager", workloads=[tiny])
    before = (out / "results.csv").read_bytes()
    on_code("b")
    for stages in (("smoke",), ("eager",)):
        run(*stages, workloads=[tiny])
        assert "its results are of other code, a. These are in" in capsys.readouterr().out
    assert (out / "results.csv").read_bytes() == before
    assert [*facts(out / "b")["stages"]] == ["smoke", "eager"]  # those of one code are joined
    assert pd.read_csv(out / "b" / "results.csv")["ratio_to_eager"].isna().all()  # no tests of it
    on_code("a")
    _, frame = run("smoke")
    assert frame["ratio_to_eager"].notna().all()


def test_no_ratio_while_tests_fail(run, tiny, capsys):
    code, frame = run("tests", "eager", test_command=FAILING, workloads=[tiny])
    assert code == 1
    assert frame["ratio_to_eager"].isna().all()
    assert frame["median_ms"].notna().all()
    printed = capsys.readouterr().out
    assert (
        "THE TESTS DID NOT PASS, so there are raw times only: failed with exit status 1" in printed
    )
    assert "FAILED tests/test_a.py::test_b - assert 1 == 2" in printed
    code, frame = run("tests")  # repaired
    assert code == 0
    assert frame["ratio_to_eager"].notna().all()


def test_code_is_python_files_and_shipped_tiles_and_nothing_else(tmp_path):
    paths = [tmp_path / pattern.replace("**", "kernels").replace("*", "a") for pattern in SOURCES]
    assert code(tmp_path) is None
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    before = code(tmp_path)
    tuned = tmp_path / "da_triton" / "kernels" / "tiles" / "tuned" / "gpu.json"
    tuned.parent.mkdir()
    tuned.touch()  # it is a result of a run
    assert code(tmp_path) == before
    seen = {before}
    for path in paths:
        path.write_text("pass")
        seen.add(code(tmp_path))
    assert len(seen) == 1 + len(SOURCES)


def test_no_ratio_unless_tests_passed_and_the_smoke_check_finished(run, out, tiny, capsys):
    run("scaling")
    assert pd.read_csv(out / "scaling.csv")["ratio_to_eager"].isna().all()
    _, frame = run("eager", workloads=[tiny])
    assert frame["ratio_to_eager"].isna().all()
    _, frame = run("tests")
    assert frame["ratio_to_eager"].notna().all()
    assert "The smoke check was not run on this code." in capsys.readouterr().out
    hanging = (sys.executable, "-c", "import time; time.sleep(60)")
    _, frame = run("smoke", seconds=1, check_command=hanging)
    assert frame["ratio_to_eager"].isna().all()
    assert "THE SMOKE CHECK DID NOT FINISH (killed after 1 s)" in capsys.readouterr().out
    _, frame = run("smoke")
    assert frame["ratio_to_eager"].notna().all()
