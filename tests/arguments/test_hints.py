"""Errors of the public functions: the advice in them works."""

import re

import numpy as np
import pytest
import torch

import da_triton
from da_triton import varlen

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16,
    torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def per_tensor(x, dtype=torch.quint8):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, dtype)


def per_channel(x):
    scales, zeros = torch.ones(x.shape[0]), torch.zeros(x.shape[0])
    return torch.quantize_per_channel(x, scales, zeros, 0, torch.qint8)


CONVERSIONS = [
    *(pytest.param(lambda x, to=dtype: (x.abs() + 1).to(to), id=str(dtype)) for dtype in DTYPES),
    pytest.param(per_tensor, id="quint8"),
    pytest.param(lambda x: per_tensor(x, torch.qint8), id="qint8"),
    pytest.param(lambda x: per_tensor(x, torch.qint32), id="qint32"),
    pytest.param(per_channel, id="per channel"),
    pytest.param(lambda x: x.to(torch.complex64), id="complex64"),
    pytest.param(lambda x: x.to_sparse(), id="sparse"),
    pytest.param(lambda x: x.double(), id="float64"),
    pytest.param(lambda x: x.half(), id="float16"),
]

NAMED = {"extra[0]": "extra_a", "extra[1]": "extra_b"}


def follow(call, **values):
    """The result, after the conversions that messages suggest, and the conversions."""
    done = []
    while True:
        try:
            return call(**values), done
        except TypeError as error:
            message = str(error)
        found = re.search(r"(?:Convert it with|Use|Compare first:) (.+)\.$", message)
        assert found, message
        hint = found[1].split(" or ")[0]
        for shown, name in NAMED.items():
            hint = hint.replace(shown, name)
        assert hint not in done, message
        done.append(hint)
        name = next(name for name in values if re.search(rf"\b{name}\b", hint))
        values[name] = eval(hint, {"torch": torch}, values)


def core(a, b, v, extra_a, extra_b):
    return da_triton.double_attention(a, b, v, extra=(extra_a, extra_b))


def block(x, weight_a, bias_a, weight_out, bias_out):
    dtype = x.dtype if x.dtype in (torch.float16, torch.float64) else torch.float32
    other = torch.ones(4, 4, dtype=dtype), torch.ones(4, dtype=dtype)
    return da_triton.double_attention_block(
        x, weight_a, bias_a, *other, *other, weight_out, bias_out
    )


activations = {name: torch.randn(2, 4, 5) for name in ("a", "b", "v")}
tokens = {name: torch.randn(2, 4, 3) for name in ("extra_a", "extra_b")}
weights = {
    "x": torch.randn(2, 4, 5), "weight_a": torch.randn(4, 4), "bias_a": torch.randn(4),
    "weight_out": torch.randn(4, 4), "bias_out": torch.randn(4),
}  # fmt: skip
CALLS = [(core, activations | tokens, name) for name in activations | tokens]
CALLS += [(block, weights, name) for name in weights]
CALLS += [(da_triton.distribute, {"g": torch.randn(2, 1, 3, 4), "v": activations["v"]}, "g")]


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("change", CONVERSIONS)
@pytest.mark.parametrize(("call", "values", "name"), CALLS, ids=[name for *_, name in CALLS])
def test_a_conversion_that_a_message_names(call, values, name, change, recwarn):
    changed = values | {name: change(values[name])}
    result, done = follow(call, **changed)
    assert result.isfinite().all()
    assert done or changed[name].dtype == torch.float16
    assert not [w for w in recwarn if "imaginary" in str(w.message)]


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("change", [
    per_tensor, torch.Tensor.float, torch.Tensor.to_sparse, torch.Tensor.int,
    lambda x: x.to(torch.float8_e5m2),
])  # fmt: skip
def test_masks(change):
    mask = torch.tensor([[True, False, True, True, False]] * 2)
    expected = da_triton.gather(activations["a"], activations["b"], mask=mask)

    def call(mask):
        return da_triton.gather(activations["a"], activations["b"], mask=mask)

    result, done = follow(call, mask=change(mask))
    assert done
    assert torch.equal(result, expected)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("given", [
    [0, 2, 5], (0, 2, 5), np.array([0, 2, 5]), [0.0, 2.0, 5.0],
    torch.tensor([0, 2, 5], dtype=torch.uint8), torch.tensor([0.0, 2.0, 5.0]),
    per_tensor(torch.tensor([0, 2, 5])), torch.tensor([0, 2, 5]).to_sparse(),
])  # fmt: skip
def test_offsets(given):
    a, b = (torch.randn(1, 4, 5) for _ in range(2))

    def call(cu_seqlens):
        return da_triton.gather(a, b, cu_seqlens=cu_seqlens)

    result, done = follow(call, cu_seqlens=given)
    assert done
    assert torch.equal(result, da_triton.gather(a, b, cu_seqlens=torch.tensor([0, 2, 5])))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_given_as_offsets(dtype):
    a, b = (torch.randn(1, 4, 5) for _ in range(2))
    lengths = torch.tensor([2, 3], dtype=dtype)
    with pytest.raises(ValueError, match="must begin with 0, got 2") as caught:
        da_triton.gather(a, b, cu_seqlens=lengths)
    offsets = eval(re.search(r"with (torch.*)\.$", str(caught.value))[1])
    assert offsets.tolist() == [0, 2, 5]
    da_triton.gather(a, b, cu_seqlens=offsets)


@pytest.mark.parametrize("sizes", [[(1.0, 2.0)], torch.tensor([[1.0, 2.0]]), [(True, True)]])
def test_sizes(sizes):
    with pytest.raises(TypeError, match="sizes must be integers, got torch") as caught:
        varlen.mask_from_sizes(sizes, (2, 2))
    sizes = eval(re.search(r"with (torch.*)\.$", str(caught.value))[1])
    assert varlen.mask_from_sizes(sizes, (2, 2)).sum() == sizes.prod()


def test_nested_tensors_are_packed():
    x = torch.nested.nested_tensor([torch.randn(4, 3), torch.randn(4, 5)])
    with pytest.raises(TypeError, match="must not be a nested tensor") as caught:
        da_triton.gather(x, x)
    a, offsets = eval(re.search(r"by (da_triton.*)\.$", str(caught.value))[1], {
        "da_triton": da_triton, "a": x,
    })  # fmt: skip
    assert da_triton.gather(a, a, cu_seqlens=offsets).shape == (2, 1, 4, 4)
