"""Kernels that are proved on first use: what happens to a kernel that is wrong, with fakes."""

import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from da_triton.kernels import distribute, gather, project_gather
from da_triton.ops.triton import core
from da_triton.precision import POLICIES, matmul_precision
from da_triton.runtime import compilers, guard, launch, stand_ins, trials, verdicts
from support.block import CASES, ROUTES, inputs, run
from support.numerics import DEVICE, TOLERANCE, relative_rms

ROOT = Path(__file__).parents[2]
FAULT = compilers.Fault("it is said to be wrong", "a report", lambda made_by: True)
DTYPE = torch.float16


@pytest.fixture
def suspect(monkeypatch, tmp_path):
    """As on a GPU whose compiler is known to be wrong, in a process that has proved nothing."""
    monkeypatch.setenv("DA_TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(guard, "watched", lambda: True)
    monkeypatch.setattr(compilers, "affected", lambda device: (FAULT,))
    monkeypatch.setattr(trials, "LONGEST", 256)
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    for name in ("_known", "_verdicts"):
        monkeypatch.setattr(guard, name, {})
    monkeypatch.setattr(guard, "_attempts", Counter())
    monkeypatch.setattr(verdicts, "_warned", set())


@pytest.fixture
def proofs(monkeypatch):
    """Names of the launchers that were proved, in order."""
    names = []
    prove = guard._prove

    def noted(spec, given, case):
        names.append(spec.name)
        return prove(spec, given, case)

    monkeypatch.setattr(guard, "_prove", noted)
    return names


def activations(length=70, dtype=DTYPE, batch=2):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(batch, 1, c, length, generator=generator) for c in (24, 20))
    return a.to(DEVICE, dtype), b.to(DEVICE, dtype)


def gathered(a, b):
    return core.gather(a, b, logit_scale=0.7)


class Kernel:
    """A kernel with something done after it, or in its place."""

    def __init__(self, kernel, lie):
        self.kernel, self.lie = kernel, lie
        self.fn = kernel.fn

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.kernel[grid](*args, **kwargs)
            self.lie(*args)

        return launch


def corrupt(a, b, mask, acc, *_):
    """61 for 64, in a corner of 8 by 8."""
    acc.view(-1, acc.shape[-1])[:8, :8] *= 61 / 64


def lying(monkeypatch, lie=corrupt):
    launch.forget()
    monkeypatch.setattr(gather, "gather_kernel", Kernel(gather.gather_kernel, lie))


def test_a_right_kernel_is_proved_once_and_used(suspect, proofs):
    a, b = activations()
    plain = gather.gather_forward.__wrapped__([(a, b, None)], 0.7)
    assert torch.equal(gathered(a, b), plain[0])
    assert proofs == ["gather_forward"]
    assert guard.replaced() == ()
    gathered(a, b)
    gathered(*activations(length=134))  # more positions, aligned alike: the same code
    assert proofs == ["gather_forward"]
    gathered(*activations(length=71))  # aligned differently
    gathered(*activations(dtype=torch.bfloat16))
    assert proofs == ["gather_forward"] * 3


def test_a_verdict_is_remembered_by_the_next_process(suspect, proofs, monkeypatch):
    gathered(*activations())
    (file,) = suspect.iterdir()
    assert json.loads(file.read_text())["verdict"]["kernel"] == "gather_forward"
    forget(monkeypatch)
    gathered(*activations())
    assert len(proofs) == 1
    forget(monkeypatch)
    monkeypatch.setattr(verdicts, "context", lambda device: {"driver": 1, "triton": "9"})
    gathered(*activations())  # another driver or compiler
    assert len(proofs) == 2
    for damaged in suspect.iterdir():
        damaged.write_text("{")
    forget(monkeypatch)
    gathered(*activations())
    assert len(proofs) == 3


def test_a_kernel_that_is_wrong_is_not_used(suspect, monkeypatch):
    a, b = activations()
    lying(monkeypatch)
    with pytest.warns(UserWarning, match="does not use its kernel 'gather_forward'") as caught:
        found = gathered(a, b)
    (message,) = [str(w.message) for w in caught if w.category is UserWarning]
    for word in ("wrong results", "TRITON_PTXAS_PATH", "newer Triton", FAULT.what, FAULT.report):
        assert word in message
    expected = stand_ins.gather_forward([(a.double(), b.double(), None)], 0.7)[0]
    assert relative_rms(found, expected) < TOLERANCE[DTYPE]
    assert guard.replaced() == ("gather_forward",)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(gathered(a, b), found)
        gathered(*activations(length=71))  # one warning per kernel
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="gather_forward"):  # remembered; said in each process
        assert torch.equal(gathered(a, b), found)


def test_the_check_sees_what_the_layer_would_not(suspect, monkeypatch):
    """The corruption is below what a root mean square over all of G would show."""
    a, b = activations()
    right = gather.gather_forward.__wrapped__([(a, b, None)], 0.7)[0]
    lying(monkeypatch)
    wrong = gather.gather_forward.__wrapped__([(a, b, None)], 0.7)[0]
    assert 0 < relative_rms(wrong, right) < 3e-2
    with pytest.warns(UserWarning, match="wrong results"):
        gathered(a, b)


def test_a_kernel_that_is_not_deterministic_is_not_used(suspect, monkeypatch):
    turns = iter(range(1000))
    lying(monkeypatch, lambda a, b, mask, acc, *_: acc.view(-1)[:4].add_(1e-5 * next(turns)))
    with pytest.warns(UserWarning, match="different results on the same input"):
        gathered(*activations())


def test_a_kernel_that_does_not_compile_is_not_used(suspect, monkeypatch):
    def fail(*_):
        raise RuntimeError("PassManager::run failed\nmore")

    a, b = activations()
    lying(monkeypatch, fail)
    with pytest.warns(UserWarning, match="RuntimeError: PassManager::run failed"):
        found = gathered(a, b)
    assert not list(suspect.iterdir())  # the next process tries again
    assert torch.equal(found, stand_ins.gather_forward([(a, b, None)], 0.7)[0])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("Triton Error [CUDA]: out of memory")],
)
def test_without_memory_for_a_proof_the_kernel_runs_as_it_is(error, suspect, proofs, monkeypatch):
    a, b = activations()
    once = [error]

    def fail(*_):
        if once:
            raise once.pop()

    lying(monkeypatch, fail)
    plain = gathered(a, b)
    assert not list(suspect.iterdir())
    assert torch.equal(gathered(a, b), plain)
    assert proofs == ["gather_forward"] * 2
    assert len(list(suspect.iterdir())) == 1


def test_what_fails_beside_the_kernel_does_not_indict_it(suspect, proofs, monkeypatch):
    def fail(*_):
        raise RuntimeError("cuBLAS is not there")

    monkeypatch.setattr(guard.LAUNCHERS["gather_forward"], "stand_in", fail)
    a, b = activations()
    plain = gather.gather_forward.__wrapped__([(a, b, None)], 0.7)[0]
    for _ in range(5):
        assert torch.equal(gathered(a, b), plain)
    assert proofs == ["gather_forward"] * guard.ATTEMPTS
    assert not list(suspect.iterdir())
    with guard.examine() as found:
        gathered(a, b)
    assert [v.reason for v in found] == ["not checked: RuntimeError: cuBLAS is not there"]


def test_a_kernel_that_faults_is_not_used_by_the_next_process(suspect, monkeypatch):
    def fault(*_):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    a, b = activations()
    lying(monkeypatch, fault)
    with pytest.raises(RuntimeError, match="'gather_forward' faulted: AcceleratorError: CUDA"):
        gathered(a, b)
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="illegal memory access"):
        found = gathered(a, b)
    assert torch.equal(found, stand_ins.gather_forward([(a, b, None)], 0.7)[0])


def test_nothing_is_proved_while_a_graph_is_captured(suspect, proofs, monkeypatch):
    a, b = activations()
    plain = gather.gather_forward.__wrapped__([(a, b, None)], 0.7)[0]
    monkeypatch.setattr(guard, "_capturing", lambda: True)
    with pytest.warns(UserWarning, match="captured into a CUDA graph before it was proved"):
        assert torch.equal(gathered(a, b), plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gathered(a, b)
    assert not proofs
    assert not list(suspect.iterdir())
    monkeypatch.setattr(guard, "_capturing", lambda: False)
    gathered(a, b)
    assert proofs == ["gather_forward"]


@pytest.mark.parametrize("next_process", [False, True])
def test_a_kernel_that_is_known_to_be_wrong_is_not_captured(next_process, suspect, monkeypatch):
    a, b = activations()
    lying(monkeypatch)
    with pytest.warns(UserWarning, match="does not use"):
        found = gathered(a, b)
    monkeypatch.setattr(guard, "_capturing", lambda: True)
    if next_process:
        forget(monkeypatch)
        with pytest.warns(UserWarning, match="does not use"):
            assert torch.equal(gathered(a, b), found)
    more = [torch.cat([t, t[:1]]) for t in (a, b)]  # another batch, the same case
    assert torch.equal(gathered(*more)[:2], found)


def test_a_folder_that_cannot_be_written(suspect, proofs, monkeypatch):
    file = suspect / "file"
    file.write_text("")
    monkeypatch.setenv("DA_TRITON_CACHE_DIR", str(file))
    with pytest.warns(UserWarning, match="cannot remember it.*DA_TRITON_CACHE_DIR"):
        gathered(*activations())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        gathered(*activations())
        gathered(*activations(length=71))
    assert len(proofs) == 2


PROCESS = """
import torch
from da_triton.ops.triton import core
from da_triton.runtime import compilers, guard
guard.watched = lambda: True
compilers.affected = lambda device: (compilers.FAULTS[0],)
prove, proofs = guard._prove, []
guard._prove = lambda *args: proofs.append(args) or prove(*args)
generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(1, 1, 16, 40, generator=generator).half() for _ in range(2))
print(len(proofs), core.gather(a, b).sum().item(), len(proofs))
"""


def test_processes_share_what_they_find(tmp_path):
    """Two at once, and one after them, which proves nothing."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "DA_TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROCESS]
    both = [
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    first, second = (process.communicate()[0].split() for process in both)
    last = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert len(first) == len(second) == 3
    assert first[1] == second[1] == last[1]
    assert last[2] == "0"
    assert len(list(tmp_path.iterdir())) == 1


def test_float32_is_proved_where_pytorch_allows_tf32(suspect, proofs, monkeypatch):
    gathered(*activations(dtype=torch.float32))
    assert not proofs
    monkeypatch.setattr(verdicts, "allows_tf32", lambda: True)
    gathered(*activations(dtype=torch.float32))
    assert proofs == ["gather_forward"]


def test_elsewhere_nothing_is_proved(proofs):
    assert not compilers.affected(torch.device("cpu"))
    gathered(*activations())
    assert not proofs


H100, B200, B300, L40 = (9, 0), (10, 0), (10, 3), (8, 9)


@pytest.mark.parametrize(
    ("capability", "triton", "ptxas", "number"),
    [
        (H100, (3, 6, 0), (12, 8, 93), 3),
        (H100, (3, 6, 0), (13, 4), 2),
        (H100, (3, 7, 1), (12, 8, 93), 2),
        (H100, (3, 8, 0), (12, 9, 86), 1),
        (H100, (3, 9, 0), (13, 4), 0),
        (B200, (3, 6, 0), (12, 8), 1),
        (B200, (3, 7, 0), (12, 8), 0),
        (B300, (3, 8, 0), (12, 9), 1),
        (L40, (3, 6, 0), (12, 8), 0),
    ],
)
def test_known_faults(capability, triton, ptxas, number):
    assert len(compilers.faults(compilers.Compiler(capability, triton, ptxas))) == number


@pytest.mark.parametrize(("wish", "number"), [("", 2), ("1", 2), ("0", 0)])
@pytest.mark.parametrize("made_by", [compilers.Compiler(H100, (3, 7, 1), (12, 8))])
def test_an_environment_variable_turns_proofs_off(wish, number, made_by, monkeypatch):
    monkeypatch.setenv("DA_TRITON_PROVE", wish)
    monkeypatch.setattr(compilers, "compiler", lambda device: made_by)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert len(compilers.affected.__wrapped__(torch.device("cuda"))) == number
    monkeypatch.setattr(launch, "INTERPRETED", True)  # nothing is compiled
    assert not compilers.affected.__wrapped__(torch.device("cuda"))


def test_one_variable_proves_everywhere(monkeypatch):
    monkeypatch.setattr(
        compilers, "compiler", lambda d: compilers.Compiler(L40, (3, 9, 0), (13, 4))
    )
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("DA_TRITON_PROVE", "1")
    assert compilers.affected.__wrapped__(torch.device("cuda"))
    monkeypatch.delenv("DA_TRITON_PROVE")
    assert not compilers.affected.__wrapped__(torch.device("cuda"))


def test_tf32_is_examined_apart(monkeypatch):
    monkeypatch.setattr(trials, "LONGEST", 256)
    a, b = activations(dtype=torch.float32)
    with guard.examine(1) as verdicts:
        gathered(a, b)
        with matmul_precision("tf32"):
            gathered(a, b)
    assert [v.allowed for v in verdicts] == [POLICIES[torch.float32].proof, guard.ALLOWED_TF32]


def test_a_mask_of_few_positions(monkeypatch):
    """No sample of the trial is fully masked."""
    a, b = activations(length=1)
    mask = torch.tensor([[True], [True]], device=DEVICE)
    with guard.examine(1) as verdicts:
        core.gather(a, b, mask=mask)
    assert [v.reason for v in verdicts] == [""]


def test_proofs_in_backward_inference_and_compiled_code(suspect, proofs):
    a, b = (t.requires_grad_() for t in activations())
    call = torch.compile(gathered, backend="aot_eager", fullgraph=True)
    call(a, b).square().sum().backward()
    assert proofs == ["gather_forward", "gather_backward"]
    with torch.inference_mode():
        gathered(*activations(length=71))
    assert proofs == ["gather_forward", "gather_backward", "gather_forward"]
    assert not guard.replaced()


def test_every_launch_of_a_block_can_be_proved(monkeypatch):
    """Fused and unfused, in the dtype the tiles are for; a mask, V saved, several heads."""
    monkeypatch.setattr(trials, "LONGEST", 256)
    given = inputs(CASES["odd"], DTYPE, False)
    x = given[0]
    with guard.examine(2) as verdicts:
        for name in ("fused_xh", "fused_ah", "fused_gather_a_h", "unfused_AZ", "unfused_XH"):
            run(ROUTES[name], CASES["odd"], *given)
        gather.gather_forward([(x[:, None], x[:, None], None)], 1.0)
        g = torch.randn(2, 1, 8, 40, device=DEVICE)
        distribute.distribute_backward(x[:, None, :8], g, x[:, None], 1.0, True, 1.0, True, True)
    assert not [v for v in verdicts if not v.right]
    assert {v.kernel for v in verdicts} == set(guard.LAUNCHERS)
    assert all(0 < v.error < v.allowed / 2 for v in verdicts)
    assert all(v.tiles for v in verdicts)


def test_examining_leaves_out_what_is_remembered(suspect, proofs, monkeypatch):
    gathered(*activations())
    with guard.examine(2) as verdicts:
        gathered(*activations())
        gathered(*activations())
    assert proofs == ["gather_forward"] * 2
    assert [v.kernel for v in verdicts] == ["gather_forward"]
    monkeypatch.setattr(
        project_gather, "gather_from_x_kernel",
        Kernel(project_gather.gather_from_x_kernel, lambda x, w, mask, acc, *_: acc.mul_(1.1)),
    )  # fmt: skip
    x, w, _, _ = inputs(CASES["plain"], DTYPE, False)
    with guard.examine(2) as verdicts:
        project_gather.gather_from_x(x, w.b, None, 1.0)
    assert [v.reason for v in verdicts] == ["wrong results"]
