"""torch.export and ONNX of the ``torch`` backend: dynamic batch and positions."""

import numpy as np
import onnxruntime
import pytest
import torch

from da_triton import DoubleAttention
from support import cases

ORDERS = [*cases.ORDERS, "auto"]


class Net(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.block = DoubleAttention(16, 8, 6, residual=True, backend="torch", **options)

    def forward(self, x):
        return self.block(self.stem(x))


def dynamic(axes=2):
    """The batch and the position axes."""
    names = {0: "n"} | {2 + i: f"positions_{i}" for i in range(axes)}
    return {i: torch.export.Dim(name, min=2, max=512) for i, name in names.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_export(order):
    net = Net(order=order, heads=2).eval()
    program = torch.export.export(net, (torch.randn(2, 3, 8, 10),), dynamic_shapes=({**dynamic()},))
    for shape in ((2, 3, 8, 10), (5, 3, 7, 9), (3, 3, 40, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(program.module()(x), net(x))


@pytest.mark.parametrize("order", ORDERS)
def test_onnx(order, tmp_path):
    net = Net(order=order, heads=2).eval()
    path = str(tmp_path / "net.onnx")
    torch.onnx.export(
        net, (torch.randn(2, 3, 8, 10),), path, dynamo=True, dynamic_shapes=({**dynamic()},),
        input_names=["x"], verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 8, 10), (4, 3, 5, 7)):
        x = torch.randn(shape)
        (out,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(out, net(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_mask_is_exported():
    block = DoubleAttention(16, 8, 6, backend="torch").eval()
    x, mask = torch.randn(2, 16, 5, 6), torch.rand(2, 5, 6) > 0.5
    program = torch.export.export(block, (x, mask))
    other = torch.rand(2, 5, 6) > 0.5
    torch.testing.assert_close(program.module()(x, other), block(x, other))


@pytest.mark.parametrize("positions", [((11,), (40,)), ((3, 5, 6), (2, 7, 4))], ids=["1d", "3d"])
def test_signals_and_videos(positions, tmp_path):
    block = DoubleAttention(16, 8, 6, heads=2, residual=True, backend="torch").eval()
    first, second = (torch.randn(n, 16, *p) for n, p in zip((2, 3), positions, strict=True))
    shapes = ({**dynamic(len(positions[0]))},)
    # torch 2.11 cannot prove that min(L, 4 L) = L: it asserts that when the program runs.
    program = torch.export.export(
        block, (first,), dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
    )
    path = str(tmp_path / "block.onnx")
    torch.onnx.export(
        block, (first,), path, dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for x in (first, second):
        torch.testing.assert_close(program.module()(x), block(x))
        (out,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(out, block(x).detach().numpy(), rtol=1e-4, atol=1e-5)
