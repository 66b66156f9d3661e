"""``da_triton.check``: its report on right kernels, wrong ones, and machines without a GPU."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import da_triton
from da_triton import selfcheck
from da_triton.kernels import project_gather
from da_triton.ops.triton import core
from da_triton.runtime import compilers, trials
from da_triton.selfcheck import Case

ROOT = Path(__file__).parents[1]
SMALL = [Case(32, 16, 16, length=33)]


@pytest.fixture
def small(monkeypatch):
    """One block, on one fused route and one that is not."""
    routes = selfcheck._routes

    def few(x, case, every):
        found = list(routes(x, case, every))
        fused = next(r for r, _ in found if r.gather == r.distribute == r.backward == "fused")
        split = next(r for r, _ in found if "fused" not in r)
        return [(fused, True), (split, False)]

    monkeypatch.setattr(selfcheck, "_routes", few)
    monkeypatch.setattr(trials, "LONGEST", 256)
    monkeypatch.setattr(selfcheck, "CASES", SMALL)
    monkeypatch.setattr(selfcheck, "HALF", (torch.bfloat16, torch.float16))


def lie(monkeypatch):
    kernel = project_gather.gather_from_x_kernel

    class Lying:
        fn = kernel.fn

        def __getitem__(self, grid):
            def launch(x, w, mask, acc, *args, **kwargs):
                kernel[grid](x, w, mask, acc, *args, **kwargs)
                acc[0, 0, 0, :8] += 1

            return launch

    monkeypatch.setattr(project_gather, "gather_from_x_kernel", Lying())


def test_right_kernels(small, capsys):
    found = da_triton.check()
    assert found.right
    kernels = {v.kernel for v in found.verdicts}
    assert {"gather_from_x", "project_distribute", "block_bwd_gather", "gather_backward"} <= kernels
    text = capsys.readouterr().out
    assert str(found) in text
    assert f"All {len(found.verdicts)} cases are right." in text
    assert torch.__version__ in text
    masked = [v for v in found.verdicts if "mask=uint8" in v.case]
    assert masked
    assert len(masked) < len(found.verdicts)


def test_wrong_kernels(small, monkeypatch, capsys, tmp_path):
    lie(monkeypatch)
    file = tmp_path / "check.json"
    assert selfcheck.main(["--json", str(file)]) == 1
    text = capsys.readouterr().out
    assert "WRONG" in text
    assert "gather_from_x: wrong results (tiles " in text
    assert "TRITON_PTXAS_PATH" in text
    written = json.loads(file.read_text())
    wrong = {v["kernel"] for v in written["verdicts"] if not v["right"]}
    assert wrong == {"gather_from_x"}
    assert written["facts"]["PyTorch"] == torch.__version__
    assert not written["obstacle"]


def test_nothing_can_be_checked_without_the_kernels(monkeypatch, capsys):
    monkeypatch.setattr(core, "obstacle", lambda x: "there is no GPU.")
    assert selfcheck.main([]) == 2
    assert "not checked: there is no GPU." in capsys.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "triton" else find(name)
    )
    found = da_triton.check()
    assert not found.right
    assert "Triton is not installed" in found.obstacle


@pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
def test_a_device_that_is_not_there(device, capsys):
    with pytest.raises(SystemExit) as ended:
        selfcheck.main(["--device", device])
    assert ended.value.code == 2
    assert "python -m da_triton.check: " in capsys.readouterr().err


def test_the_command_without_a_gpu():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "da_triton.check"]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "need a GPU" in ended.stdout
    assert not ended.stderr


def test_importing_the_command_leaves_the_function():
    function = da_triton.check
    assert importlib.import_module("da_triton.check") is function
    assert da_triton.check is function


def test_facts_about_a_gpu(monkeypatch):
    made_by = compilers.Compiler((9, 0), (3, 6, 0), (12, 8, 93))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compilers, "compiler", lambda device: made_by)
    monkeypatch.setattr(compilers, "ptxas", lambda capability: ("12.8.93", "somewhere/ptxas"))
    monkeypatch.setattr(selfcheck, "_driver", lambda: "580.65")
    facts = selfcheck._gpu(torch.device("cuda"))
    assert facts["GPU"] == "NVIDIA H100, compute capability 9.0"
    assert facts["driver"] == "580.65"
    assert facts["ptxas"] == "12.8.93 (somewhere/ptxas)"
    assert "triton-lang/triton#11781" in facts["known faults"]


def verdict(kernel="gather_from_x", reason=""):
    facts = {"kernel": kernel, "case": "float16", "tiles": "64x64x64 8w 3s", "error": 1e-4}
    return facts | {"allowed": 4e-3, "reason": reason, "right": not reason}


def part(*verdicts, obstacle=""):
    return {"facts": {"GPU": "one"}, "obstacle": obstacle, "verdicts": list(verdicts)}


def test_several_processes_are_joined():
    wrong = verdict("block_bwd_gather", "wrong results")
    found = selfcheck._joined([part(verdict(), wrong), part(verdict())], [])
    assert [v.kernel for v in found.verdicts] == ["gather_from_x", "block_bwd_gather"]
    assert not found.right
    assert not found.obstacle
    assert selfcheck._joined([part(verdict())], []).right
    for places in ((wrong, verdict("block_bwd_gather")), (verdict("block_bwd_gather"), wrong)):
        assert not selfcheck._joined([part(v) for v in places], []).right  # a race, say


def test_wrong_results_outweigh_a_process_that_left_nothing(monkeypatch):
    wrong = selfcheck._joined([part(verdict("block_bwd_gather", "wrong results"))], ["killed"])
    monkeypatch.setattr(selfcheck, "_in_processes", lambda *_: wrong)
    assert selfcheck.main(["--jobs", "2"]) == 1


def test_a_process_that_left_nothing_is_not_forgotten():
    found = selfcheck._joined([part(verdict())], ["Traceback\nImportError: no"])
    assert not found.right
    assert "not checked: ImportError: no" in str(found)
    assert "gather_from_x" in str(found)
    assert selfcheck._joined([], [""]).obstacle == "it printed nothing"


def test_processes_share_the_work(monkeypatch):
    for variable in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert selfcheck.main(["--jobs", "2"]) == 2  # both say the same: there is no GPU


def test_each_part_of_the_work_is_done_once(monkeypatch):
    done = []
    monkeypatch.setattr(selfcheck, "run", lambda *unit: done.append(unit[:3]))
    selfcheck._check(None, False)
    whole = list(done)
    done.clear()
    for i in range(3):
        selfcheck._check(None, False, part=(i, 3))
    assert len(whole) >= 6
    assert sorted(map(str, done)) == sorted(map(str, whole))


def test_a_kernel_that_faults_ends_the_check(small, monkeypatch, capsys):
    def fault(*args, **kwargs):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    kernel = project_gather.gather_from_x_kernel

    class Faulting:
        fn = kernel.fn

        def __getitem__(self, grid):
            return fault

    monkeypatch.setattr(project_gather, "gather_from_x_kernel", Faulting())
    assert selfcheck.main([]) == 1
    assert "gather_from_x: AcceleratorError: CUDA error: an illegal" in capsys.readouterr().out


TILES = """
import json, torch
from unittest import mock
from bench.codegen import compile, survey
from da_triton import selfcheck
from da_triton.runtime import tiles
reached, original = set(), tiles.tile
def spy(kernel, *given):
    tile = original(kernel, *given)
    reached.add((kernel, *tile[:2]))
    return tile
with survey.on("sm_90"), compile.record(), mock.patch.object(tiles, "tile", spy):
    for case in selfcheck.THOROUGH:
        selfcheck.run(case, torch.bfloat16, False, torch.device("meta"), True)
wanted = {(k.kernel, *k[3:]) for k in tiles.shipped("sm_90") if k.kernel in survey.KERNELS}
print(json.dumps(sorted(wanted - reached)))
"""


def test_a_thorough_check_reaches_every_fused_tile():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", TILES]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    left = json.loads(ended.stdout)
    assert left == [["block_bwd_gather", 64, 256]]  # no tile of block_bwd_distribute goes with it
