"""The memory checkers' command with a tool that the tests write, and what it runs, interpreted."""

import re
import sys
from pathlib import Path

import pytest
import torch

import da_triton
from bench import __main__ as cli
from bench import sanitize
from support import launches

TOOL = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
name, command = arguments[arguments.index("--tool") + 1], arguments[4:]
with open(pathlib.Path(__file__).parent / "calls", "a") as calls:
    print(name, command[-1], file=calls)
print("========= COMPUTE-SANITIZER")
{script}
"""
CLEAN = """
if name == "racecheck":
    print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
else:
    print("========= ERROR SUMMARY: 0 errors")
"""
FAULTY = """
if (name, command[-1]) == ("memcheck", "block, fused"):
    print("========= Invalid __global__ read of size 2 bytes")
    print("=========     at gather_from_x_kernel+0x1230")
    print("========= ERROR SUMMARY: 3 errors")
    sys.exit(int(arguments[arguments.index("--error-exitcode") + 1]))
if (name, command[-1]) == ("racecheck", "core, blocks"):
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    sys.exit(int(arguments[arguments.index("--error-exitcode") + 1]))
"""
BROKEN = (
    'print("========= Error: Target application terminated before first instrumented API call")'
)
FAILING = 'print("========= ERROR SUMMARY: 0 errors"); sys.exit(1)'


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a script as compute-sanitizer, on PATH, beside a pretended GPU."""

    def install(script, folder="bin"):
        path = tmp_path / folder / sanitize.NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOOL.format(python=sys.executable, script=script))
        path.chmod(0o755)
        return path

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return install


def rows(printed):
    lines = [line for line in printed.splitlines() if line.startswith("| ")][1:]
    return {
        (tool, kernels): (int(errors), status)
        for tool, kernels, errors, status in (
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines
        )
    }


def test_nothing_found(installed, capsys):
    calls = installed(CLEAN).parent / "calls"
    assert cli.main(["sanitize"]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == [("memcheck", g) for g in sanitize.GROUPS]
    assert set(found.values()) == {(0, "ok")}
    assert sorted(calls.read_text().splitlines()) == sorted(
        f"memcheck {g}" for g in sanitize.GROUPS
    )


def test_groups_run_at_the_same_time(installed, tmp_path):
    """Each waits until as many others run as are allowed to; the ninth runs alone."""
    folder = tmp_path / "bin"
    script = f"""
import time
folder = pathlib.Path({str(folder)!r})
(folder / ("at " + command[-1])).touch()
end = time.monotonic() + 20
while len([*folder.glob("at *")]) < {sanitize.AT_ONCE} and time.monotonic() < end:
    time.sleep(0.01)
assert len([*folder.glob("at *")]) >= {sanitize.AT_ONCE}
"""
    installed(script + CLEAN)
    assert cli.main(["sanitize"]) == 0


def test_errors_are_counted_and_shown(installed, capsys):
    installed(FAULTY + CLEAN)
    assert cli.main(["sanitize", "--tool", "memcheck,racecheck"]) == 1
    printed = capsys.readouterr().out
    found = rows(printed)
    assert found.pop(("memcheck", "block, fused")) == (3, "ok")
    assert found.pop(("racecheck", "core, blocks")) == (1, "ok")
    assert set(found.values()) == {(0, "ok")}
    assert "at gather_from_x_kernel+0x1230" in printed


def test_only_the_tools_that_are_named(installed, capsys):
    installed(FAULTY + CLEAN)
    assert cli.main(["sanitize", "--tool", "initcheck"]) == 0
    assert {tool for tool, _ in rows(capsys.readouterr().out)} == {"initcheck"}
    assert cli.main(["sanitize", "--tool", "memchek"]) == 2
    assert "did you mean 'memcheck'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "expected"), [(BROKEN, "no summary, exit status 0"), (FAILING, "exit status 1")]
)
def test_run_that_fails_is_no_clean_one(installed, capsys, script, expected):
    installed(script)
    assert cli.main(["sanitize", "--tool", "memcheck"]) == 1
    assert set(rows(capsys.readouterr().out).values()) == {(0, expected)}


def test_run_that_does_not_end(installed):
    tool = installed("import time; time.sleep(60)")
    found = sanitize.check(str(tool), ["memcheck"], ["core, blocks"], print, limit=0.3)
    assert found["status"].tolist() == ["killed after 0 s"]


def test_where_it_is_looked_for(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sanitize, "TOOLKITS", ())
    assert sanitize.find_tool() is None
    in_wheel = installed(CLEAN, "nvidia/cuda_sanitizer/bin")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: spec)
    assert sanitize.find_tool() == str(in_wheel)
    in_toolkit = installed(CLEAN, "cuda/compute-sanitizer")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitize.find_tool() == str(in_toolkit)
    assert sanitize.find_tool() != str(installed(CLEAN)) == sanitize.find_tool()


def test_without_a_gpu_exits_with_2(capsys):
    assert cli.main(["sanitize"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_without_the_tool_exits_with_2(installed, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_tool", lambda: None)
    assert cli.main(["sanitize"]) == 2
    assert "needs compute-sanitizer" in capsys.readouterr().err


def test_every_kernel_is_launched():
    folder = Path(da_triton.__file__).parent / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    defined = {*re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE)}
    with launches.count() as names:
        for run in sanitize.GROUPS.values():
            run(torch.device("cpu"))
    assert defined <= {*names}


@pytest.mark.parametrize("group", ["core, one tile", "block, fused"])
def test_groups_run(group):
    sanitize.GROUPS[group](torch.device("cpu"))
