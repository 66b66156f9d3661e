"""The memory checks of the last stage, with a compute-sanitizer that the tests write."""

import sys
from types import SimpleNamespace

import pytest

from bench import stages
from bench.environment import ROOT
from bench.measure import Budget

CLEAN = "print('========= ERROR SUMMARY: 0 errors')"
FAULTY = (
    "print('at gather_kernel+0x1230'); print('========= ERROR SUMMARY: 3 errors'); sys.exit(86)"
)


def install(folder, script=CLEAN):
    path = folder / "compute-sanitizer"
    folder.mkdir(parents=True)
    note = f"import sys; print(*sys.argv, file=open({str(folder / 'arguments')!r}, 'w'))"
    path.write_text(f"#!{sys.executable}\n{note}\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)


def checked(tmp_path, seconds=60.0):
    return stages.memory_checks(SimpleNamespace(logs=tmp_path), Budget(seconds))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (CLEAN, "0 errors, exit status 0"),
        (FAULTY, "3 errors, exit status 86"),
        (f"{CLEAN}; sys.exit(1)", "0 errors, exit status 1"),  # not a clean run
        ("print('Target application terminated')", "no summary, exit status 0"),
    ],
)
def test_errors_and_the_exit_status(script, said, tmp_path):
    install(tmp_path / "bin", script)
    assert checked(tmp_path).startswith(said)
    arguments = (tmp_path / "bin" / "arguments").read_text()
    assert "--tool memcheck --error-exitcode 86" in arguments
    assert "-m pytest" in arguments
    assert arguments.split()[-1] == "tests/kernels/test_sanitize.py"
    assert (ROOT / arguments.split()[-1]).exists()
    assert ("gather_kernel" in (tmp_path / "sanitize.txt").read_text()) == (script == FAULTY)


def test_time_limit(tmp_path):
    install(tmp_path / "bin", "import time; time.sleep(60)")
    assert checked(tmp_path, 0.3).startswith("no summary, killed after 0 s")


def test_where_the_tool_is_looked_for(tmp_path, monkeypatch):
    assert "not installed" in checked(tmp_path)
    in_wheel = install(tmp_path / "nvidia" / "sanitizer" / "bin")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: spec)
    assert stages.compute_sanitizer() == in_wheel
    in_toolkit = install(tmp_path / "cuda" / "bin")
    assert stages.compute_sanitizer() == in_toolkit
    on_path = install(tmp_path / "bin")
    assert stages.compute_sanitizer() == on_path
