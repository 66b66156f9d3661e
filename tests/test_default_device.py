"""``torch.set_default_device`` moves nothing that belongs to given tensors, or to the CPU."""

import ast
import pathlib

import pytest
import torch
from torch.utils._device import _device_constructors

import da_triton
from da_triton.integrations import insert_double_attention
from da_triton.varlen import mask_from_sizes, pack, unpack

PACKAGE = pathlib.Path(da_triton.__file__).parent
FACTORIES = {f"torch.{function.__name__}" for function in _device_constructors()}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: file.stem)
def test_every_new_tensor_names_its_device(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            names = [keyword.arg for keyword in node.keywords]  # None: of **options
            assert "device" in names or None in names, f"line {node.lineno}"


@pytest.mark.parametrize("sizes", [[(1, 2), (2, 1)], torch.tensor([(1, 2), (2, 1)])])
def test_masks_from_sizes(sizes):
    expected = mask_from_sizes(sizes, (2, 2))
    with torch.device("meta"):
        mask = mask_from_sizes(sizes, (2, 2))
    assert torch.equal(mask, expected)


def test_packing():
    activations = [torch.randn(4, 3, 2), torch.randn(4, 5)]
    with torch.device("meta"):
        x, offsets = pack(activations)
        parts = unpack(x, offsets)
        g = da_triton.gather(x, x, cu_seqlens=offsets)
    assert offsets.tolist() == [0, 6, 11]
    assert torch.equal(parts[1], activations[1])
    assert torch.equal(g, da_triton.gather(x, x, cu_seqlens=offsets))


def test_a_block_beside_a_module_without_parameters():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU()).double()
    with torch.device("meta"):
        insert_double_attention(model, positions={"1": 8})
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float64)}
    assert model(torch.randn(1, 3, 2, 2, dtype=torch.float64)).shape == (1, 8, 2, 2)
