"""A kernel whose accesses are known, followed by the model; prints a JSON object per program.

Runs in a process of its own, without TRITON_INTERPRET.
"""

import json

import torch
import triton
import triton.language as tl

from bench.codegen import compile
from bench.model import launches, warp
from bench.model.machine import H200
from bench.model.simulate import REGION

COLUMNS, COUNT = 7, 40


@triton.jit
def walked_kernel(x_ptr, y_ptr, columns, count):
    pid = tl.program_id(0)
    first = (pid // columns).to(tl.int64) * 1000 + pid % columns * 128
    offs = first + tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    for i in range(pid, count, columns):
        step = ((i - pid) // columns).to(tl.int64) * 4096 * columns
        total += tl.load(x_ptr + offs + step)
    tl.store(y_ptr + offs, total)


def main():
    x, y = (torch.empty(2**24, device="meta") for _ in range(2))
    with compile.record() as made:
        walked_kernel[(64,)](x, y, COLUMNS, COUNT, num_warps=1)
    b = launches.build(made[0], H200.arch)
    constants = warp.constants(b.parameters, H200.first_parameter)
    for pid in (0, 6, 23, 39):
        trace = warp.follow(b.program, constants, pid, b.warps)
        accesses = [s.access for s in trace.steps if s.access and s.access.space == "global"]
        inside = (1 << REGION) - 1
        loads = [a for a in accesses if not a.store]
        facts = {
            "pid": pid, "columns": COLUMNS, "count": COUNT,
            "loads": [a.first & inside for a in loads], "sectors": [a.sectors for a in loads],
            "stores": [a.first & inside for a in accesses if a.store],
            "unknown": sorted(trace.unknown) + ["a branch"] * trace.guesses,
        }  # fmt: skip
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
