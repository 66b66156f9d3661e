"""Contents of an exported program: PyTorch operations, as few as the plain block has, and
convolutions that quantisers find."""

import collections
import io
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from da_triton import DoubleAttention, double_attention, gather, ops
from da_triton.integrations import ResidualDoubleAttention

DYNAMIC = {"x": {0: "n", 2: "h", 3: "w"}}
X = torch.randn(2, 16, 5, 6, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    """The block in plain PyTorch."""

    def __init__(self, heads=1):
        super().__init__()
        self.heads = heads
        self.convA, self.convB, self.convV = (nn.Conv2d(16, c, 1) for c in (8, 6, 6))
        self.last = nn.Conv2d(8, 16, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        a, b, v = (
            conv(x).view(n, self.heads, conv.out_channels // self.heads, h * w)
            for conv in (self.convA, self.convB, self.convV)
        )
        g = a @ b.softmax(-1).transpose(-1, -2)
        return self.last((g @ v.softmax(-2)).view(n, 8, h, w))


def export(module, path, opset, dynamic=True, x=X):
    """The graph that the exporter by tracing makes. Warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.onnx.export(
            module, (x,), path, dynamo=False, opset_version=opset, input_names=["x"],
            dynamic_axes=DYNAMIC if dynamic else None,
        )  # fmt: skip
    return onnx.load(path).graph


def run(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": np.asarray(x)})[0])


BLOCKS = {
    "auto": lambda: DoubleAttention(16, 8, 6),
    "heads": lambda: DoubleAttention(16, 8, 6, heads=2),
    "eager": lambda: DoubleAttention(16, 8, 6, backend="eager"),
    "AZ": lambda: DoubleAttention(16, 8, 6, order="AZ"),
    "norm": lambda: ResidualDoubleAttention(16, 8, 6, zero_init=False),
}
ORDERS = {
    order: lambda order=order: DoubleAttention(16, 8, 6, heads=2, order=order)
    for order in ("XZ", "AH", "XH")
}
ALL = BLOCKS | ORDERS


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_onnx_of_any_opset_and_its_preparation_for_int8(make, opset, tmp_path):
    block, path = make().eval(), str(tmp_path / "block.onnx")
    graph = export(block, path, opset)
    assert not {"Mod", "BatchNormalization"} & {node.op_type for node in graph.node}
    for x in (X, torch.randn(3, 16, 4, 3)):
        torch.testing.assert_close(run(path, x), block(x).detach(), rtol=1e-4, atol=1e-5)
    prepared = str(tmp_path / "prepared.onnx")
    quant_pre_process(path, prepared)
    torch.testing.assert_close(run(prepared, X), block(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_onnx_in_half_precision(make, opset, tmp_path):
    block, path = make().eval(), str(tmp_path / "block.onnx")
    expected = block(X).detach()
    export(block.half(), path, opset, x=X.half())
    found = run(path, X.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=3e-3)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("opset", [9, 13])
def test_a_graph_is_as_small_as_that_of_the_plain_block(dynamic, heads, opset, tmp_path):
    plain = export(Plain(heads), str(tmp_path / "plain.onnx"), opset, dynamic)
    ours = export(
        DoubleAttention(16, 8, 6, heads=heads), str(tmp_path / "ours.onnx"), opset, dynamic
    )
    kinds = [collections.Counter(node.op_type for node in graph.node) for graph in (plain, ours)]
    assert kinds[0]["Conv"] == kinds[1]["Conv"] == 4
    assert kinds[0]["Softmax"] == kinds[1]["Softmax"] == 2
    assert kinds[1].total() <= kinds[0].total()


def test_a_trace_of_signals_and_videos(tmp_path):
    block = DoubleAttention(16, 8, 6).eval()
    for positions in ((7,), (2, 3, 4)):
        x, path = torch.randn(2, 16, *positions), str(tmp_path / "block.onnx")
        export(block, path, 9, dynamic=False, x=x)
        torch.testing.assert_close(run(path, x), block(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_trace_in_half_precision_is_saved(dtype):
    block, x = DoubleAttention(16, 8, 6, dtype=dtype).eval(), X.to(dtype)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(block, x, check_trace=False), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for y in (x, torch.randn(3, 16, 4, 3, dtype=dtype)):
        torch.testing.assert_close(loaded(y), block(y), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS.keys())
def test_an_exported_program_convolves_with_the_parameters_themselves(make):
    program = torch.export.export(make().eval(), (X,))
    weights = [n.args[1] for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(weights) == 4
    assert all(weight.op == "placeholder" for weight in weights)


def test_a_module_that_is_used_twice_changes_no_program():
    block = ResidualDoubleAttention(16, 8, 6, zero_init=False).eval()
    twice = nn.Sequential(silu := nn.SiLU(), block, silu)
    targets = [
        [n.target for n in torch.export.export(net.eval(), (X,)).graph.nodes if "aten" in n.name]
        for net in (twice, nn.Sequential(nn.SiLU(), block, nn.SiLU()))
    ]
    assert targets[0] == targets[1]


# --- backends -------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """Tensors that are on a GPU by their device only."""
    monkeypatch.setattr("da_triton.ops.triton.core._gpu_obstacle", lambda device: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.empty(2, 16, 4, 4, device="cuda")


def test_auto_is_the_torch_backend_in_a_program_exported_on_a_gpu(a_gpu):
    assert ops.select("auto", a_gpu) is not ops.TORCH
    for block in (
        DoubleAttention(16, device="cuda"),
        ResidualDoubleAttention(16, device="cuda").eval(),
    ):
        program = torch.export.export(block, (a_gpu,))
        assert not [n for n in program.graph.nodes if "da_triton" in str(n.target)]


def attended(x, backend):
    return double_attention(x, x, x, backend=backend)


def gathered(x, backend):
    return gather(x, x, backend=backend)


@pytest.mark.parametrize("function", [attended, gathered])
def test_functions_too(a_gpu, function):
    class Net(nn.Module):
        def forward(self, x):
            return function(x, "auto")

    program = torch.export.export(Net(), (a_gpu,))
    assert not [n for n in program.graph.nodes if "da_triton" in str(n.target)]


@pytest.mark.parametrize("order", ["auto", "XH"])
def test_named_kernels_are_not_exported(order):
    block = DoubleAttention(16, 8, 6, order=order, backend="triton").eval()
    message = "traces and exported programs hold PyTorch operations only. Use backend='torch'"
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(block, X)
    with pytest.raises(RuntimeError, match=message):
        torch.export.export(block, (X,))
    with pytest.raises(RuntimeError, match=message):
        torch.onnx.export(block, (X,), io.BytesIO(), dynamo=False)
    assert block(X).shape == X.shape
