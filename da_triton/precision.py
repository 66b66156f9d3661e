"""Numerical policy per dtype, in every backend: one table."""

import contextlib
from typing import NamedTuple

import torch

# In float16, gradients of descriptors may exceed its largest number by this factor.
GRADIENT_RANGE = 32.0


class DtypePolicy(NamedTuple):
    """Numerical policy of one dtype."""

    accumulator: torch.dtype  # of sums and statistics
    # Of a log-sum-exp: one float32 does not hold it to the precision of the float32 weights that
    # are recomputed from it.
    lse: torch.dtype
    tile_class: str  # in the tables of tiles
    half: bool  # multiplied at the full rate of matrix units, whose code is proved on first use
    proof: float  # relative error that a proof allows a kernel
    # Exact factor that keeps normalised gather weights out of the subnormal numbers: P ≤ 1 sums to
    # 1 over up to 2^21 positions, so most of it is below 2^-14, the smallest normal float16.
    # 2^15 · P still fits, where P may be larger by the range that ``into_float16`` gives to
    # gradients. The product is scaled back in float32.
    p_scale: float = 1.0
    extended: bool = False  # gradients beyond its largest number take a factor: ``into_float16``
    positions: int | None = None  # the most whose weights 1/L are normal numbers, without p_scale


POLICIES = {
    torch.float16: DtypePolicy(
        torch.float32, torch.float32, "half", True, 4e-3,
        p_scale=32768.0 / GRADIENT_RANGE, extended=True, positions=2**14,
    ),
    torch.bfloat16: DtypePolicy(torch.float32, torch.float32, "half", True, 3e-2),
    torch.float32: DtypePolicy(torch.float32, torch.float64, "float32", False, 2e-5),
    torch.float64: DtypePolicy(torch.float64, torch.float64, "float64", False, 1e-11),
}  # fmt: skip
HALF = tuple(dtype for dtype, policy in POLICIES.items() if policy.half)


def accumulator(dtype):
    return POLICIES[dtype].accumulator


def lse_dtype(dtype):
    return POLICIES[dtype].lse


def converted(x, dtype):
    """``x`` in ``dtype``: a tensor that has it leaves no conversion in an exported program."""
    return x if x.dtype == dtype else x.to(dtype)


@contextlib.contextmanager
def matmul_precision(wanted):
    """Context that sets PyTorch's switch for float32 products on a GPU, "ieee" or "tf32"."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, wanted
    try:
        yield
    finally:
        matmul.fp32_precision = before
