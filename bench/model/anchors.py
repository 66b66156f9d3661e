"""Kernels whose speed on an H100 SXM is public: what the model says about them.

    python -m bench.model.anchors          (without TRITON_INTERPRET; no GPU)

prints a JSON object per anchor. Published: a plain Triton GEMM of 8192³ in half precision without
TMA 565 to 600 TFLOP/s (tritonbench#894, triton-lang/triton#5461); a large copy
2.95 to 3.03 TB/s, read and written together (the benchmarks of quack).
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from bench.codegen import compile

from . import launches
from .machine import GPUS
from .operations import Cache

GPU = GPUS["H100"]
SIDE, COPIED = 8192, 2**28  # rows of a matrix, elements of a copy
BLOCKS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
SLICE = 4096  # elements of the copy in a program


@triton.jit
def gemm_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``C = A B`` of row-major matrices that tiles fill; GROUP rows of tiles share the L2."""
    pid = tl.program_id(0)
    per_group = GROUP * (N // BLOCK_N)
    within = pid % per_group
    rows = (pid // per_group * GROUP + within % GROUP) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = within // GROUP * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * K + inner[None, :]
    b_ptrs = b_ptr + inner[:, None] * N + cols[None, :]
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K, BLOCK_K):
        c = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), c)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * N
    c_ptrs = c_ptr + rows[:, None] * N + cols[None, :]
    tl.store(c_ptrs, c.to(c_ptr.dtype.element_ty))


@triton.jit
def copy_kernel(x_ptr, y_ptr, SLICE: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * SLICE + tl.arange(0, SLICE)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


class Anchor(NamedTuple):
    name: str
    published: tuple[float, float]  # the least and the most
    per_second: float  # FLOP, or bytes
    launch: Callable[[], None]


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def _gemm() -> None:
    a, b, c = (_empty(SIDE, SIDE) for _ in range(3))
    tiles = (SIDE // BLOCKS["BLOCK_M"]) * (SIDE // BLOCKS["BLOCK_N"])
    gemm_kernel[(tiles,)](a, b, c, SIDE, SIDE, **BLOCKS, GROUP=8, num_warps=8, num_stages=3)


def _copy() -> None:
    copy_kernel[(COPIED // SLICE,)](_empty(COPIED), _empty(COPIED), SLICE=SLICE, num_warps=8)


ANCHORS = (
    Anchor("GEMM", (565e12, 600e12), 2 * SIDE**3, _gemm),
    Anchor("copy", (2.95e12, 3.03e12), 4 * COPIED, _copy),
)


def modelled(anchor: Anchor) -> float:
    """FLOP or bytes per second."""
    with compile.record() as made:
        anchor.launch()
    return anchor.per_second / launches.time(made[0], Cache(GPU.l2_kept), GPU).seconds


if __name__ == "__main__":
    for anchor in ANCHORS:
        rate = modelled(anchor)
        print(json.dumps({"anchor": anchor.name, "published": anchor.published, "modelled": rate}))
