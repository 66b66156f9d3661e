"""A compile cache made without a GPU, in processes where kernels are not interpreted."""

import json
import re

import pytest

from bench import warm
from bench.workloads import Workload
from da_triton.runtime import tiles
from support.processes import python

TINY = Workload("tiny", 4, 8, (4, 5), 4, 4, 2, cpu_n=4)
WARM = "import sys; from bench import cli, workloads; from bench.workloads import Workload\n"
WARM += f"workloads.WORKLOADS = ({TINY!r},); sys.exit(cli.main(['warm', *sys.argv[1:]]))"
# What the benchmark's own closures look up on a GPU: the module, inference and a training step, in
# both memory formats, on a CPU's tensors; only the launches are left out.
LOOKED_UP = """
from unittest import mock
import torch
from triton import knobs
from bench import formulations, problems, providers, warm
from bench.workloads import Workload
from da_triton.ops.triton import core
found = []
knobs.compilation.listener = lambda src, cache_hit, **_: found.append(cache_hit)
cpu = torch.device("cpu")
with (
    warm.on_absent("sm_90"),
    warm.without_launches(),
    mock.patch.object(core, "obstacle", return_value=None),
):
    for mode in (problems.FORWARD, problems.STEP):
        problem = problems.draw(WORKLOAD, mode, torch.bfloat16, cpu)
        for last in (False, True):
            given = problem.in_format(last)
            providers.setup_block(given, lambda p: formulations.our_block(p, "triton"))()
print(len(found), sum(found))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("cache")
    ran = python("-c", WARM, "--out", str(folder))
    assert ran.returncode == 0, ran.stderr
    return folder, ran.stdout


def test_what_it_says(made):
    folder, printed = made
    kernels = [*folder.glob("*/*.cubin")]
    assert len(kernels) > 10
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert printed.startswith(f"{len(kernels)} kernels, {len(kernels)} of them compiled in ")
    assert f" s, {size / 1e6:.1f} MB in {folder}" in printed
    names = [line.split(":")[0] for line in printed.splitlines()[1:]]
    assert names == [*json.loads((folder / warm.FILE).read_text())]
    assert {"triton_key", "ptxas", "kernels"} <= {*names}
    assert not [*folder.glob("*/*.ptx")]  # binaries only


def test_a_second_run_compiles_nothing(made):
    folder, _ = made
    before = sorted(folder.rglob("*"))
    ran = python("-c", WARM, "--out", str(folder))
    assert " kernels, 0 of them compiled in " in ran.stdout
    assert sorted(folder.rglob("*")) == before


def test_a_cache_is_used_elsewhere(made, tmp_path):
    """Triton writes absolute paths into it. Everything that a run looks up is there."""
    folder, printed = made
    code = LOOKED_UP.replace("WORKLOAD", repr(TINY))
    moved = folder.rename(tmp_path / "moved")
    try:
        ran = python("-c", WARM, "--out", str(moved), "--check")
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "the cache is of this Triton and these kernels" in ran.stdout
        assert int(re.search(r"(\d+) entries adjusted", ran.stdout)[1]) > 10
        ran = python("-c", code, TRITON_CACHE_DIR=str(moved))
        assert ran.stdout.split() == [printed.split()[0]] * 2, ran.stderr
    finally:
        moved.rename(folder)
        warm.relocate(folder)


COMPILED_BY_A_RUN = """
from unittest import mock
import torch
from bench import warm
from bench.groups import Where, _warm, in_worker
from bench.measure import Effort
from bench.observe import WallTimer
from bench.workloads import Workload
where = Where(warm.META, torch.bfloat16, WallTimer, Effort(1, 1, 1, 0.0))
with (
    warm.on_absent("sm_90"),
    warm.without_launches(),
    mock.patch("bench.measure.usable", return_value=True),
):
    in_worker(where, None, 60.0, _warm, ([WORKLOAD],), print)
"""


def test_a_run_compiles_the_same_kernels(made, tmp_path):
    """What `bench gpu` calls before it measures needs nothing that `warm` has not made."""
    folder, _ = made
    code = COMPILED_BY_A_RUN.replace("WORKLOAD", repr(TINY))
    ran = python("-c", code, TRITON_CACHE_DIR=str(tmp_path))
    assert ran.stdout.splitlines()[:2] == ["None"] * 2, ran.stderr
    assert {p.parent.name for p in tmp_path.glob("*/*.cubin")} == {
        p.parent.name for p in folder.glob("*/*.cubin")
    }


def test_a_cache_of_another_triton(made, tmp_path):
    folder, _ = made
    facts = json.loads((folder / warm.FILE).read_text())
    (tmp_path / warm.FILE).write_text(json.dumps(facts | {"ptxas": "V1.0"}))
    ran = python("-c", WARM, "--out", str(tmp_path), "--check")
    assert ran.returncode == 1
    assert f"ptxas: {facts['ptxas']} here, V1.0 in the cache" in ran.stdout
    (tmp_path / warm.FILE).unlink()
    ran = python("-c", WARM, "--out", str(tmp_path), "--check")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "has no warm.json" in ran.stderr


def test_key_alone(made):
    folder, _ = made
    facts = json.loads((folder / warm.FILE).read_text())
    printed = python("-c", WARM, "--check").stdout
    assert printed == "".join(f"{name}: {value}\n" for name, value in facts.items())


def test_without_a_folder():
    ran = python("-c", WARM)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "needs --out or TRITON_CACHE_DIR" in ran.stderr


def test_every_architecture_is_one_that_tiles_are_known_for():
    assert {*tiles.ARCHITECTURES} >= {*warm.NUM_SMS}
