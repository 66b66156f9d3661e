"""Networks with blocks leave PyTorch, or this machine: export, ONNX, AOTInductor, saved modules."""

import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention, a2_resnet50, insert_double_attention
from support.numerics import relative_rms

ROOT = Path(__file__).parents[2]


def trained(model):
    """As after some training, in evaluation: the blocks are not identities."""
    for block in model.modules():
        if isinstance(block, ResidualDoubleAttention):
            last = block.attention.conv_reconstruct if block.norm is None else block.norm
            nn.init.normal_(last.weight, std=0.5)
            nn.init.normal_(last.bias, std=0.5)
            if isinstance(block.norm, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(block.norm.running_mean, std=0.1)
                nn.init.uniform_(block.norm.running_var, 0.5, 2.0)
    return model.eval()


def dynamic(axes=2, least=2):
    positions = {2 + i: Dim(f"positions_{i}", min=least, max=512) for i in range(axes)}
    return ({0: Dim("n", min=2, max=64)} | positions,)


def exported(model, x, axes=2, least=2):
    """torch 2.11 cannot prove some conditions that always hold (min(L, 4 L) = L): it asserts them
    when the program runs. So it does with one of ResNet's own, on H and W.
    """
    return torch.export.export(
        model, (x,), dynamic_shapes=dynamic(axes, least),
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip


def onnx(program, path):
    """An exported program as a function, run by onnxruntime."""
    torch.onnx.export(program, (), path, input_names=["x"], verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def group_norm(channels):
    return nn.GroupNorm(4, channels)


@pytest.mark.parametrize("norm", ["batch", None, group_norm])
@pytest.mark.parametrize("positions", [((11,), (40,)), ((5, 6), (7, 3)), ((3, 5, 6), (2, 7, 4))])
def test_export(norm, positions):
    axes = len(positions[0])
    block = trained(ResidualDoubleAttention(16, 8, 6, heads=2, norm=norm, position_axes=axes))
    first, second = (torch.randn(n, 16, *p) for n, p in zip((2, 3), positions, strict=True))
    program = exported(block, first, axes)
    for x in (first, second):
        assert not torch.allclose(block(x), x)
        torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("norm", ["batch", group_norm])
def test_onnx(norm, tmp_path):
    block = trained(ResidualDoubleAttention(16, 8, 6, heads=2, norm=norm))
    first, second = torch.randn(2, 16, 5, 6), torch.randn(3, 16, 7, 4)
    program = exported(block, first)
    run = onnx(program, str(tmp_path / "block.onnx"))
    for x in (first, second):
        torch.testing.assert_close(run(x), block(x))


def test_a_resnet(tmp_path):
    model = trained(a2_resnet50(num_classes=10))
    first, second = torch.randn(2, 3, 64, 96), torch.randn(3, 3, 72, 52)
    program = exported(model, first, least=33)
    run = onnx(program, str(tmp_path / "model.onnx"))
    with torch.no_grad():
        for x in (first, second):
            assert relative_rms(program.module()(x), model(x)) < 1e-5
            assert relative_rms(run(x), model(x)) < 1e-5
        for block in model.modules():
            if isinstance(block, ResidualDoubleAttention):
                nn.init.zeros_(block.norm.weight)
        assert relative_rms(run(first), model(first)) > 1e-3


def test_an_aot_inductor_package(tmp_path):
    block = trained(ResidualDoubleAttention(16, 8, 6))
    first, second = torch.randn(2, 16, 8, 10), torch.randn(5, 16, 7, 9)
    with torch.no_grad():
        program = exported(block, first)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "block.pt2")
        )
        package = torch._inductor.aoti_load_package(path)
        for x in (first, second):
            torch.testing.assert_close(package(x), block(x))


ELSEWHERE = """
import sys

sys.modules["triton"] = None
import torch

if torch.cuda.is_available():
    raise SystemExit("a GPU")
x, expected = torch.load("answer.pt", weights_only=True)
model = torch.load("model.pt", weights_only=False)
print(torch.equal(model(x), expected))
for p in model.parameters():
    torch.nn.init.zeros_(p)
print(torch.equal(model(x), expected))
model.load_state_dict(torch.load("weights.pt", weights_only=True))
print(torch.equal(model(x), expected))
"""


def test_a_saved_network_runs_where_there_is_no_triton(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), DoubleAttention(16, 8, heads=2, residual=True),
        ResidualDoubleAttention(16, 8, 6), nn.Conv2d(16, 8, 1),
    )  # fmt: skip
    model = trained(insert_double_attention(model, ["3"], c_m=4))
    x = torch.randn(2, 3, 9, 8)
    torch.save((x, model(x).detach()), tmp_path / "answer.pt")
    torch.save(model, tmp_path / "model.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    env = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=os.environ | env,
    )  # fmt: skip
    assert result.stdout.split() == ["True", "False", "True"], result.stderr
