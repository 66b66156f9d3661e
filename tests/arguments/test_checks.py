"""Wrong arguments of the public functions and the layer: error types and messages."""

import numpy as np
import pytest
import torch

import da_triton
from da_triton import DoubleAttention

x4, x6 = torch.zeros(2, 4, 5), torch.zeros(2, 6, 5)
image = torch.zeros(2, 4, 3, 3)
w = torch.zeros(4, 4)
descriptors = torch.zeros(2, 1, 3, 4)


def gather(a=x4, b=x6, **options):
    return lambda: da_triton.gather(a, b, **options)


def distribute(g=descriptors, v=x4, **options):
    return lambda: da_triton.distribute(g, v, **options)


def core(a=x4, b=x6, v=x6, **options):
    return lambda: da_triton.double_attention(a, b, v, **options)


def block(x=image, **changes):
    given = {
        "weight_a": w, "bias_a": None, "weight_b": w, "bias_b": None, "weight_v": w,
        "bias_v": None, "weight_out": w, "bias_out": None, **changes,
    }  # fmt: skip
    return lambda: da_triton.double_attention_block(x, **given)


def layer(*args, **options):
    return lambda: DoubleAttention(*args, **options)


mask = torch.ones(2, 5, dtype=torch.bool)
meta = x6.to("meta")

ERRORS = [
    (gather(a=[1]), TypeError, "a must be a torch.Tensor, got list"),
    (gather(a=torch.zeros(2, 4)), ValueError, r"1, 2 or 3 position axes, got shape \(2, 4\)"),
    (gather(a=torch.zeros(1, 1, 1, 1, 1, 1)), ValueError, "flatten the extra ones"),
    (gather(a=x4.int()), TypeError, r"got torch.int32. Convert it with a.float\(\)"),
    (gather(b=torch.zeros(2, 6, 0)), ValueError, "at least one channel and one position"),
    (gather(b=torch.zeros(2, 0, 5)), ValueError, "Only the batch may be empty"),
    (gather(b=x6.double()), TypeError, "one dtype, got torch.float32 and torch.float64"),
    (gather(b=meta), RuntimeError, r"one device, got cpu and meta. Move one of them"),
    (gather(b=torch.zeros(2, 6, 4)), ValueError, "same batch and positions"),
    (gather(b=torch.zeros(3, 6, 5)), ValueError, r"got shapes \(2, 4, 5\) and \(3, 6, 5\)"),
    (gather(heads=3), ValueError, "divide the channels of a, got heads=3 and 4 channels"),
    (gather(heads=4), ValueError, "divide the channels of b, got heads=4 and 6 channels"),
    (gather(heads=0), ValueError, "heads must be a positive integer, got 0"),
    (gather(heads=True), ValueError, "heads must be a positive integer, got True"),
    (gather(heads=1.0), ValueError, "heads must be a positive integer, got 1.0"),
    (gather(logit_scale=torch.ones(())), TypeError, "logit_scale must be a Python number"),
    (gather(logit_scale="1"), TypeError, "got str"),
    (gather(logit_scale=10**30), ValueError, "logit_scale must fit 64 bits as an int. Give a flo"),
    (gather(a=x4.to_sparse()), TypeError, r"got torch.sparse_coo. Convert it with a.to_dense\(\)"),
    (gather(b=torch.nested.nested_tensor(list(x6))), TypeError, "b must not be a nested tensor"),
    (gather(mask=[True]), TypeError, "mask must be a torch.Tensor of bool, got list"),
    (gather(mask=mask.float()), TypeError, r"got torch.float32. Compare first: mask != 0"),
    (gather(mask=mask[:, :4]), ValueError, r"\(N, \*positions\) = \(2, 5\).*of a, got \(2, 4\)"),
    (gather(mask=mask.to("meta")), RuntimeError, "a and mask must be on one device"),
    (gather(backend="cuda"), ValueError, "'auto', 'triton', 'torch', 'eager', got 'cuda'"),
    (distribute(g=1), TypeError, "g must be a torch.Tensor, got int"),
    (distribute(g=torch.zeros(2, 3, 4)), ValueError, r"g must be \(N, heads, m, n\)"),
    (distribute(g=torch.zeros(2, 1, 0, 4)), ValueError, "with heads, m, n ≥ 1"),
    (distribute(g=torch.zeros(3, 1, 3, 4)), ValueError, "g and v must have the same batch"),
    (distribute(v=x6), ValueError, r"heads·n = 1·4 channels to fit g \(2, 1, 3, 4\), got 6"),
    (distribute(g=torch.zeros(2, 1, 3, 4).half()), TypeError, "or float32 if v is half"),
    (distribute(v=x4.double()), TypeError, "got torch.float32 and torch.float64"),
    (distribute(v=x4.to("meta")), RuntimeError, "g and v must be on one device"),
    (distribute(scale=None), TypeError, "scale must be a Python number, int or float, got NoneT"),
    (
        core(v=x4),
        ValueError,
        r"b and v must have the same number of channels \(heads·n\), got 6 and 4",
    ),
    (core(v=x6.half()), TypeError, "a and v must share one dtype"),
    (core(v=torch.zeros(3, 6, 5)), ValueError, "b and v must have the same batch"),
    (core(v=x6[0]), ValueError, r"v must be \(N, channels, \*positions\)"),
    (core(softmax_v=1), TypeError, "softmax_v must be True or False, got int"),
    (core(softmax_v=np.ones(2)), TypeError, "True or False, got ndarray"),
    (core(softmax_v=np.float64(1)), TypeError, "True or False, got float64"),
    (core(scale=torch.ones(1)), TypeError, "multiply the corresponding tensor"),
    (core(extra=x4), TypeError, r"pair \(extra_a, extra_b\).*got Tensor"),
    (core(extra=(x4[:1], None)), TypeError, r"extra\[1\] must be a torch.Tensor, got NoneType"),
    (core(extra=(x6[:1], x6[:1])), ValueError, "4 channels, those of a, and K ≥ 1"),
    (core(extra=(x4[:1], x6[:1, :, :2])), ValueError, "same number K of tokens, got 5 and 2"),
    (core(extra=(x4[:1].half(), x6[:1])), TypeError, "a and extra_a must share one dtype"),
    (core(extra=(x4[:1], meta[:1])), RuntimeError, "a and extra_b must be on one device"),
    (block(x=image.int()), TypeError, "x must be float16, bfloat16, float32 or float64"),
    (block(weight_a=None), TypeError, "weight_a must be a torch.Tensor, got NoneType"),
    (block(weight_a=torch.zeros(4)), ValueError, r"weight_a must be \(out, in\)"),
    (block(weight_b=torch.zeros(4, 4, 3, 3)), ValueError, "trailing axes of size 1"),
    (block(weight_v=torch.zeros(4, 5)), ValueError, "weight_v must take 4 channels"),
    (
        block(weight_v=torch.zeros(6, 4)),
        ValueError,
        r"must give the same number of channels \(heads·n\), got 4 and 6",
    ),
    (block(weight_out=torch.zeros(4, 5)), ValueError, "weight_out must take 4 channels"),
    (block(bias_a=torch.zeros(5)), ValueError, r"bias_a must have shape \(4,\), got \(5,\)"),
    (block(bias_b=torch.zeros(5)), ValueError, r"bias_b must have shape \(4,\)"),
    (block(bias_v=1.0), TypeError, "bias_v must be a torch.Tensor or None, got float"),
    (block(bias_out=torch.zeros(1, 4)), ValueError, r"bias_out must have shape \(4,\)"),
    (block(weight_out=None, bias_out=torch.zeros(4)), ValueError, "Give both, or neither"),
    (
        block(weight_out=torch.zeros(5, 4), residual=True),
        ValueError,
        "needs 4 output channels, those of x",
    ),
    (block(weight_a=w.half()), TypeError, "x and weight_a must share one dtype"),
    (block(bias_a=torch.zeros(4, dtype=torch.float64)), TypeError, "x and bias_a must share"),
    (block(weight_v=w.to("meta")), RuntimeError, "x and weight_v must be on one device"),
    (block(heads=3), ValueError, "divide the channels of weight_a"),
    (block(order="ZA"), ValueError, "'auto', 'AZ', 'XZ', 'AH', 'XH', got 'ZA'"),
    (block(order="AH", weight_out=None), ValueError, "folds the last convolution"),
    (block(order="XH", backend="eager"), ValueError, "Use backend='torch' for another order"),
    (block(recompute="yes"), ValueError, "recompute must be one of True, False, 'auto'"),
    (block(recompute=1), ValueError, "got 1"),
    (block(recompute=True, backend="eager"), ValueError, "autograd decides what is saved"),
    (block(mask=mask), ValueError, r"\(2, 3, 3\) or \(N, 1, \*positions\) of x"),
    (layer(0), ValueError, "in_channels must be a positive integer, got 0"),
    (layer(4, 2.5), ValueError, "c_m must be a positive integer, got 2.5"),
    (layer(8, 3, 4, heads=2), ValueError, "divide the channels of c_m, got heads=2 and 3"),
    (layer(8, heads="2"), ValueError, "heads must be a positive integer, got '2'"),
    (layer(8, order="AH", reconstruct=False), ValueError, "folds the last convolution"),
    (layer(8, 4, residual=True, reconstruct=False), ValueError, "needs c_m == in_channels"),
    (layer(8, backend="Triton"), ValueError, "got 'Triton'"),
    (layer(8, recompute=0), ValueError, "recompute must be one of"),
    (layer(8, scale=torch.ones(1)), TypeError, "scale must be a Python number"),
    (lambda: DoubleAttention(8)(image), ValueError, r"x must have 8 channels \(axis 1\)"),
    (lambda: DoubleAttention(8)(x4[0]), ValueError, "1, 2 or 3 position axes"),
    (lambda: DoubleAttention(4).attention_maps(x6), ValueError, "x must have 4 channels"),
    (lambda: DoubleAttention(4)(image, mask), ValueError, "mask must have shape"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[r[2][:40] for r in ERRORS])
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
