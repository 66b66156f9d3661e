"""The suite as a GPU runs it: what is on the list, and what it needs."""

import ast
import os
import re
import subprocess
import sys

import torch

from bench import suite

ON_ITS_OWN = {"test_nccl.py"}  # moves everything to a GPU by ``.cuda()``


def test_command_takes_what_is_installed(monkeypatch):
    everything = suite.command()
    assert everything[:3] == [sys.executable, "-m", "pytest"]
    assert everything[everything.index("--dist") + 1] == "loadgroup"
    assert "tests/test_properties.py" in everything
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    bare = suite.command()
    assert "-n" not in bare
    assert set(everything) - set(bare) >= {"tests/test_properties.py", "-n", "--dist"}
    assert all(os.path.exists(suite.ROOT / name) for name in bare if name.startswith("tests/"))


def test_a_failure_does_not_end_the_run():
    assert not {"-x", "--exitfirst", "--maxfail=1"} & set(suite.command())


def test_list_leaves_out_nothing_that_is_not_there():
    assert all((suite.TESTS / name).exists() for name in (*suite.LEFT_OUT, *suite.NEEDS))
    assert all(suite.TESTS / name in suite.files() for name in suite.FIRST)


def test_list_imports_only_what_a_bare_machine_has(monkeypatch):
    """Or the first file that cannot be imported stops them all."""
    monkeypatch.setattr(suite, "find_spec", lambda name: None)
    there = {
        *sys.stdlib_module_names, "bench", "da_triton", "numpy", "pytest", "support", "torch",
        "triton",
    }  # fmt: skip
    assert len(suite.files()) > 18
    for file in [*suite.files(), suite.TESTS / "conftest.py"]:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= there, file


def collected(names, *options):
    """Names of the tests in files, as pytest collects them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, *options, *names], cwd=suite.ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return [line for line in run.stdout.splitlines() if "::" in line]


def test_list_is_collected():
    names = [str(file.relative_to(suite.ROOT)) for file in suite.files()]
    tests = collected(names)
    files = dict.fromkeys(test.split("::")[0] for test in tests)
    assert list(files) == names, "every file, in the order that was asked for"
    assert len(tests) > 1500


def test_every_file_on_the_list_uses_the_device():
    """What never mentions it runs on the CPU, and costs time on a GPU for nothing."""
    for file in suite.files():
        uses = re.search(r"\b(DEVICE|peaky)\b", file.read_text(encoding="utf-8"))
        assert uses or file.name in ON_ITS_OWN, file


def test_convolutions_are_not_tf32_in_tests():
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.deterministic


def test_tests_that_fill_the_memory_share_a_worker():
    """Those with far strides, in whatever file they are, are one group of pytest-xdist."""
    files = ["tests/test_large.py", "tests/kernels/test_gather.py", "tests/test_block.py"]
    grouped = {line.split("[")[0] for line in collected(files, "-m", "xdist_group")}
    assert grouped == {
        "tests/test_large.py::test_offsets_beyond_int32",
        "tests/test_large.py::test_offsets_in_int32_would_show",
        "tests/test_large.py::test_a_batch_of_more_than_two_billion_numbers",
        "tests/kernels/test_gather.py::test_offsets_beyond_int32",
    }
