"""onnxruntime's static int8 quantisation of exported blocks: four quantised convolutions."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from da_triton import DoubleAttention
from da_triton.integrations import ResidualDoubleAttention
from support.numerics import relative_rms
from support.plain import PlainBlock, PlainResidual, randomize

BLOCKS = {
    "layer": (DoubleAttention, PlainBlock),
    "residual": (ResidualDoubleAttention, PlainResidual),
}


class Batches(CalibrationDataReader):
    def __init__(self, *batches):
        self.left = list(batches)

    def get_next(self):
        return {"x": np.asarray(self.left.pop())} if self.left else None


def exported(block, x, path, opset):
    """By tracing for an opset, by ``torch.export`` for None."""
    if opset is None:
        torch.onnx.export(block, (x,), path, dynamo=True, input_names=["x"], verbose=False)
    else:
        torch.onnx.export(block, (x,), path, dynamo=False, opset_version=opset, input_names=["x"])


def quantised(block, x, folder, opset):
    """Kinds of its nodes, how many convolutions take int8 weights, and its output for x."""
    path, prepared, final = (str(folder / f"{name}.onnx") for name in ("float", "ready", "int8"))
    exported(block, x, path, opset)
    quant_pre_process(path, prepared)
    quantize_static(prepared, final, Batches(x, x.flip(0)))
    graph = onnx.load(final).graph
    constants = {constant.name: constant for constant in graph.initializer}
    source = {name: node for node in graph.node for name in node.output}
    count = 0
    for node in graph.node:
        if node.op_type == "Conv" and source[node.input[1]].op_type == "DequantizeLinear":
            weight = constants[source[node.input[1]].input[0]]
            count += weight.data_type == onnx.TensorProto.INT8
    session = onnxruntime.InferenceSession(final, providers=["CPUExecutionProvider"])
    out = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    return [node.op_type for node in graph.node], count, out


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("opset", [9, 11, 13, 17, None])
def test_convolutions_are_quantised(kind, opset, tmp_path):
    ours, plain = (randomize(block(16, 8, 6)).eval() for block in BLOCKS[kind])
    x = torch.randn(2, 16, 5, 6)
    exact = plain(x).detach()
    kinds, count, found = quantised(ours, x, tmp_path, opset)
    plain_kinds, plain_count, expected = quantised(plain, x, tmp_path, opset)
    assert (count, kinds.count("Conv")) == (plain_count, plain_kinds.count("Conv")) == (4, 4)
    assert len(kinds) <= len(plain_kinds) + 2
    error, usual = relative_rms(found, exact), relative_rms(expected, exact)
    assert 1e-4 < error < max(0.06, 1.5 * usual)


@pytest.mark.parametrize("positions", [(30,), (2, 3, 5)], ids=["1d", "3d"])
@pytest.mark.parametrize("opset", [9, 17])
def test_signals_and_videos(positions, opset, tmp_path):
    block = randomize(DoubleAttention(16, 8, 6, heads=2)).eval()
    x = torch.randn(2, 16, *positions)
    kinds, count, found = quantised(block, x, tmp_path, opset)
    assert (count, kinds.count("Conv")) == (4, 4)
    assert 1e-4 < relative_rms(found, block(x).detach()) < 0.06
