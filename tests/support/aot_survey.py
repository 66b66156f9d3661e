"""Compiles every kernel with every shipped tile for one architecture; one JSON line a compilation.

    python -m support.aot_survey sm_90

Runs in a process of its own, without TRITON_INTERPRET, on a machine without a GPU.
"""

import dataclasses
import json
import sys

import torch

from bench.workloads import WORKLOADS
from da_triton import planner
from da_triton.costs import Shape
from da_triton.kernels import block, configs, distribute, gather, launch
from support import aot

# Positions of a 28×28 map, of a 14×14 map (rows not a multiple of 16), and of either in
# channels-last memory.
LAYOUTS = (("nchw", 784), ("nchw", 196), ("nhwc", 196))
CORE = {
    "gather_kernel", "gather_combine_kernel", "gather_delta_kernel", "gather_backward_kernel",
    "distribute_kernel", "distribute_backward_kernel", "position_lse_kernel", "mix_kernel",
    "map_gradient_kernel", "descriptor_gradient_kernel",
}  # fmt: skip
BLOCKED_SHAPES = ((512, 512), (32, 512), (512, 32))


def shapes(itemsize):
    """(features, maps) that reach every tile of the tables."""
    sides = {2: (32, 64, 128), 4: (32,), 8: (16, 32)}[itemsize]
    blocked = BLOCKED_SHAPES if itemsize == 2 else BLOCKED_SHAPES[:1]
    return [(m, n) for m in sides for n in sides] + list(blocked)


def record(m, n, length, dtype, layout, *, batch=64, masked=False, softmax=True, extra=False):
    """The launches of one forward and backward pass of the core, on meta tensors."""

    def maps(channels):
        if layout == "nchw":
            return torch.empty((batch, 1, channels, length), dtype=dtype, device="meta")
        return torch.empty((batch, length, 1, channels), dtype=dtype, device="meta").permute(
            0, 2, 3, 1
        )

    a, b, v, dz = maps(m), maps(n), maps(n), maps(m)
    keep = torch.empty((batch, length), dtype=torch.uint8, device="meta") if masked else None
    sources = [(a, b, keep)]
    if extra:
        sources.append((a[..., :4], b[..., :4], None))
    with aot.record() as launches:
        g, lse = gather.gather_forward(sources, 1.0)
        distribute.distribute_forward(g, v, 1.0, softmax, 1.0)
        dg, _ = distribute.distribute_backward(dz, g, v, 1.0, softmax, 1.0, True, True)
        gather.gather_backward(dg, a, b, keep, g, lse, 1.0, True, True)
    return launches


def record_block(sizes, length, layout, route, heads=1, keep_v=False):
    """The launches of one training step of the block."""
    batch, channels, c_m, c_n = sizes

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x = empty(batch, channels, length)
    if layout == "nhwc":
        x = empty(batch, length, channels).transpose(1, 2)
    w = block.Weights(
        empty(c_m, channels), empty(c_m), empty(c_n, channels), empty(c_n, channels), empty(c_n),
        empty(channels, c_m), empty(channels),
    )  # fmt: skip
    options = block.Options(heads, 1.0, 1.0, 1.0, True, True)
    with aot.record() as launches:
        _, lse, g, _ = block.forward(x, w, None, options, route, keep_v)
        dout = torch.empty_like(x)
        block.backward(dout, x, w, None, lse, g, None, options, route, True)
    return launches


def planned(work, arch):
    """Sizes and route of a named workload on a GPU like an H200."""
    length = torch.Size(work.positions).numel()
    s = Shape(work.n, work.c, work.c_m, work.c_n, work.heads, length, 2, True)
    return (*s[:4],), planner.options(s, configs.limits(s, work.c, arch, 132))[0].route


def survey(arch):
    """Yields a description of every distinct compilation."""
    launch.processors = lambda device: 132
    configs.architecture = lambda device: arch
    recorded = _core() + [
        (found, {"m": sizes[2], "n": sizes[3], "length": length, "layout": layout}, "bfloat16", {})
        for work in WORKLOADS
        for sizes, route in [planned(work, arch)]
        for layout, length in LAYOUTS[1:]
        for found in record_block(sizes, length, layout, route, work.heads)
        if found.name not in CORE
    ]
    recorded += [
        (found, {"m": 64, "n": n, "length": 196, "layout": "nchw"}, "bfloat16", {"keep_v": True})
        for n in (64, 128)
        for work, route in [
            (
                WORKLOADS[2],
                planned(WORKLOADS[2], arch)[1]._replace(backward="split", backward_order="AZ"),
            )
        ]
        if route.distribute == "fused"
        for found in record_block((work.n, 512, 64, n), 196, "nchw", route, keep_v=True)
        if found.name == "project_distribute_kernel"
    ]
    seen = set()
    for found, about, dtype, options in recorded:
        constants = {k: str(x) for k, x in found.kwargs.items()}
        key = (found.name, dtype, about["length"], about["layout"], *sorted(constants.items()))
        if key in seen:
            continue
        seen.add(key)
        code = dataclasses.asdict(aot.compile_launch(found, arch))
        del code["text"]
        yield {
            **code, **about, "dtype": f"torch.{dtype}", "constants": constants,
            "default": not options,
        }  # fmt: skip


def _core():
    """Launches of the core with every tile of its tables."""
    runs = [
        (m, n, length, dtype, layout, {})
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
        for m, n in shapes(dtype.itemsize)
        for layout, length in (LAYOUTS if dtype == torch.bfloat16 else LAYOUTS[1:2])
    ]
    for m, n in ((128, 128), (512, 512)):
        for options in ({"masked": True, "extra": True, "batch": 4}, {"softmax": False}):
            runs.append((m, n, 784, torch.bfloat16, "nchw", options))
        runs.append((m, n, 784, torch.float16, "nchw", {}))
    return [
        (found, {"m": m, "n": n, "length": length, "layout": layout}, str(dtype)[6:], options)
        for m, n, length, dtype, layout, options in runs
        for found in record(m, n, length, dtype, layout, **options)
    ]


if __name__ == "__main__":
    for line in survey(sys.argv[1]):
        print(json.dumps(line), flush=True)
