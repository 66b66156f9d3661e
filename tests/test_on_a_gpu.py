"""The suite as a GPU runs it: which files, in what order, and what they would launch."""

import ast
import importlib.util
import re
import subprocess
import sys

import pytest
import torch

from bench import stages
from bench.environment import ROOT
from support import recorded


def collected(*options):
    """Names of the tests that pytest collects."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return [line for line in run.stdout.splitlines() if "::" in line]


@pytest.fixture(scope="module")
def files():
    """The files of the command, in order, with the number of their tests."""
    command = stages.test_command()
    assert command[:3] == [sys.executable, "-m", "pytest"]
    found = collected(*(option for option in command[3:] if option != "-q"))
    names = [name.split("::")[0] for name in found]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def test_files_that_use_the_device_are_run_and_the_longest_first(files):
    assert {*[*files][:3]} == {
        "tests/test_properties.py", "tests/ops/triton/test_large.py",
        "tests/ops/triton/test_gpu_numerics.py",
    }  # fmt: skip
    assert len(files) > 35
    assert not [name for name in files if name.startswith(("tests/bench", "tests/integrations"))]
    assert sum(files.values()) > 1500
    assert {"tests/test_block.py", "tests/kernels/test_gather.py"} <= {*files}
    assert "tests/parallel/test_nccl.py" in files
    for name in ("tests/test_package.py", "tests/bench/test_measure.py", "tests/test_on_a_gpu.py"):
        assert name not in files  # they run on the CPU, and cost time on a GPU for nothing


TESTS = ROOT / "tests"
PACKAGES = {"bench": ROOT, "da_triton": ROOT, "support": TESTS}  # and where they are


def imports(path):
    """Modules that a file imports outside of functions, and names from modules, written alike."""
    folder = path.parent.relative_to(TESTS if path.is_relative_to(TESTS) else ROOT)
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            written = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(written, ".".join(folder.parts))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)


def libraries(*names):
    """``(library, importing file)`` for these files and all that they import of this repository."""
    found, paths = set(), [ROOT / name for name in names]
    for path in paths:
        optional = re.findall(r'pytest\.importorskip\("(\w+)"\)', path.read_text(encoding="utf-8"))
        for name in imports(path):
            package, *parts = name.split(".")
            if package not in PACKAGES:
                if package not in optional:
                    found.add((package, path.relative_to(ROOT).as_posix()))
                continue
            stem = PACKAGES[package] / package
            for part in [*parts, ""]:
                files = [stem / "__init__.py", stem.with_suffix(".py")]
                paths += [file for file in files if file.is_file() and file not in paths]
                stem /= part
    return found


def test_files_import_only_what_a_bare_machine_has(files):
    """Or the first file that cannot be imported stops them all."""
    there = {*sys.stdlib_module_names, "numpy", "pytest", "torch", "triton"}
    found = libraries(*files, "tests/conftest.py", "tests/integrations/conftest.py")
    assert {library for library, _ in found} >= {"numpy", "torch", "triton"}
    assert not {(library, file) for library, file in found if library not in there}


def test_imports_are_followed():
    """From support to bench, and by relative imports in it."""
    assert {("tqdm", "bench/measure.py"), ("numpy", "bench/measure.py")} <= libraries(
        "tests/support/fakes.py"
    )


def test_command_without_xdist(monkeypatch):
    assert "loadgroup" in stages.test_command()
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)
    assert "loadgroup" not in stages.test_command()
    assert collected("-p", "no:xdist", "tests/ops/triton/test_large.py")  # the marker is known


def test_convolutions_are_not_tf32_in_tests():
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cudnn.deterministic


def test_tests_that_fill_the_memory_share_a_worker():
    """Those with far strides, in whatever file they are, are one group of pytest-xdist."""
    large, gather = "tests/ops/triton/test_large.py", "tests/kernels/test_gather.py"
    found = collected(large, gather, "tests/test_block.py", "-m", "xdist_group")
    assert {line.split("[")[0] for line in found} == {
        f"{large}::test_offsets_beyond_int32",
        f"{large}::test_offsets_in_int32_would_show",
        f"{large}::test_a_batch_of_more_than_two_billion_numbers",
        f"{gather}::test_offsets_beyond_int32",
    }


# --- what tests would launch ----------------------------------------------------------------------

SAMPLE = "tests/ops/triton/test_core.py"
ON_A_CPU = "tests/ops/aten/test_cpu_block.py::test_no_more_is_saved_than_by_eager"
MIXED = "tests/ops/aten/test_cpu_block.py::test_without_biases"


@pytest.fixture(scope="module")
def record():
    return recorded.record(SAMPLE, ON_A_CPU, MIXED)


@pytest.mark.parametrize(("fault", "name"), [("mixed", MIXED), ("cpu", ON_A_CPU)])
def test_tests_that_belong_on_a_cpu_are_found(fault, name, record):
    assert {test.split("[")[0] for test in record.names(fault)} == {name}


def test_most_tests_reach_their_end(record):
    """Or their launches are not recorded."""
    early = [test["ended"] for test in record.tests if test["test"].startswith(SAMPLE)]
    assert sum(map(bool, early)) < 5
    assert len(early) > 30


def test_meta_tensors_are_launched_as_real_ones_are(record):
    """The record without numbers has what interpreted kernels are launched with."""

    def keys(launches):
        return {str({k: x for k, x in each.items() if k != "test"}) for each in launches}

    names = ("g_fits_one_tile-nchw", "many_features-nhwc")
    tests = [f"{SAMPLE}::test_fakes_have_the_true_strides[{name}]" for name in names]
    real = recorded.record(*tests, interpret=True)
    assert not any(test["ended"] for test in real.tests)
    assert len(real.launches) > 8
    assert keys(real.launches) <= keys(record.launches)


def test_launches_compile_and_fit(record, monkeypatch, capsys):
    """A few of them, and one whose tile is too long."""
    few = {launch["kernel"]: launch for launch in record.launches}
    assert len(few) > 5
    few = list(few.values())[:4]
    large = {**few[0], "kwargs": {**few[0]["kwargs"], "BLOCK_L": 4096}}
    record = recorded.Recorded(record.tests, [*few, large])
    monkeypatch.setattr(recorded, "record", lambda *tests: record)
    assert recorded.main("sm_90") == 1
    printed = capsys.readouterr().out
    shared = re.search(r"5 distinct launches on sm_90, (\S+) bytes of shared memory at", printed)
    assert 0 < int(shared[1].replace(",", "")) <= 232_448
    assert len(re.findall(r"needs \d+ bytes of shared memory, in tests/", printed)) == 1
    assert f"mixes devices: {MIXED}" in printed
