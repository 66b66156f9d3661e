"""The dtypes of what is summed over positions, in every backend."""

import contextlib

import torch


def accumulator(dtype):
    """Dtype of sums and statistics: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lse_dtype(dtype):
    """Dtype of a log-sum-exp: float32 beside half-precision maps, else float64, as one float32 does
    not hold it to the precision of the float32 weights that are recomputed from it."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else torch.float64


def converted(x, dtype):
    """``x`` in ``dtype``: what has it already leaves no conversion in an exported program."""
    return x if x.dtype == dtype else x.to(dtype)


@contextlib.contextmanager
def matmul_precision(wanted):
    """PyTorch's switch for products of float32 on a GPU, "ieee" or "tf32", for a while."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before
