"""The suite as a GPU runs it: what is on the list, and what it needs."""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch

from bench import cli, suite

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
    assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision != "tf32"
    assert torch.backends.cudnn.deterministic


def test_tests_that_fill_the_memory_share_a_worker():
    """Those with far strides, in whatever file they are, are one group of pytest-xdist."""
    large, gather = "tests/ops/triton/test_large.py", "tests/kernels/test_gather.py"
    files = [large, gather, "tests/test_block.py"]
    grouped = {line.split("[")[0] for line in collected(files, "-m", "xdist_group")}
    assert grouped == {
        f"{large}::test_offsets_beyond_int32",
        f"{large}::test_offsets_in_int32_would_show",
        f"{large}::test_a_batch_of_more_than_two_billion_numbers",
        f"{gather}::test_offsets_beyond_int32",
    }


SAMPLE = "tests/ops/triton/test_core.py"
ON_A_CPU = "tests/ops/aten/test_cpu_block.py::test_no_more_is_saved_than_by_eager"
MIXED = "tests/ops/aten/test_cpu_block.py::test_without_biases"


@pytest.fixture(scope="module")
def recorded():
    return suite.record([SAMPLE, ON_A_CPU, MIXED])


@pytest.mark.parametrize(("fault", "name"), [("mixed", MIXED), ("cpu", ON_A_CPU)])
def test_tests_that_belong_on_a_cpu_are_found(fault, name, recorded):
    assert {test.split("[")[0] for test in recorded.names(fault)} == {name}


def test_most_tests_reach_their_end(recorded):
    """Or their launches are not recorded."""
    early = [test["ended"] for test in recorded.tests if test["test"].startswith(SAMPLE)]
    assert sum(map(bool, early)) < 5
    assert len(early) > 30


def test_meta_tensors_are_launched_as_real_ones_are(recorded):
    """The record without numbers has what interpreted kernels are launched with."""

    def keys(launches):
        return {str({k: x for k, x in each.items() if k != "test"}) for each in launches}

    names = ("g_fits_one_tile-nchw", "many_features-nhwc")
    tests = [f"{SAMPLE}::test_fakes_have_the_true_strides[{name}]" for name in names]
    real = suite.record(tests, interpret=True)
    assert not any(test["ended"] for test in real.tests)
    assert len(real.launches) > 8
    assert keys(real.launches) <= keys(recorded.launches)


def test_launches_compile_and_fit(recorded):
    """A few of them, and one whose tile is too long."""
    few = {launch["kernel"]: launch for launch in recorded.launches}
    assert len(few) > 5
    few = list(few.values())[:4]
    large = {**few[0], "kwargs": {**few[0]["kwargs"], "BLOCK_L": 4096}}
    found = list(suite.compiled([*few, large], "sm_90", 1))
    assert len(found) == 5
    problems = [problem for *_, problem in found if problem]
    assert len(problems) == 1
    assert re.fullmatch(r"needs \d+ bytes of shared memory", problems[0])
    assert all(0 < shared <= 232_448 for *_, shared, problem in found if not problem)


@pytest.mark.parametrize(
    ("mixed", "problem", "printed"),
    [
        (False, "", "1 distinct launches on sm_90: 1 compile and fit, with 4,096 bytes"),
        (True, "", "mixes devices: test_one"),
        (False, "needs 5 bytes of shared memory", "gather_kernel needs 5 bytes of shared memory"),
    ],
)
def test_command(mixed, problem, printed, monkeypatch, capsys):
    tests = [{"test": "test_one", "ended": "", "mixed": mixed, "cpu": False}]
    monkeypatch.setattr(suite, "record", lambda *_, **__: suite.Recorded(tests, []))
    launches = [("gather_kernel", "test_one", 4096, problem)]
    monkeypatch.setattr(suite, "compiled", lambda *_: launches)
    assert cli.main(["suite"]) == int(mixed or bool(problem))
    assert printed in capsys.readouterr().out
