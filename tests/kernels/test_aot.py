"""Generated code of every kernel with every shipped tile, for five architectures, without a GPU.

Each architecture is compiled once, in a process without TRITON_INTERPRET (``support.aot_survey``).
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import aot

ARCHITECTURES = list(aot.TARGETS)
MULTIPLYING = {
    "gather_kernel", "gather_backward_kernel", "distribute_kernel", "distribute_backward_kernel",
    "mix_kernel", "map_gradient_kernel", "descriptor_gradient_kernel",
}  # fmt: skip
FUSED = {
    "gather_from_x_kernel", "project_distribute_kernel", "distribute_side_kernel",
    "gather_side_kernel", "outer_kernel", "descriptors_kernel", "descriptors_backward_kernel",
    "weight_gradients_kernel", "gather_from_a_kernel",
}  # fmt: skip
OTHER = {"gather_combine_kernel", "gather_delta_kernel", "position_lse_kernel"}
each_architecture = pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=pytest.mark.xdist_group(a)) for a in ARCHITECTURES]
)


@functools.cache
def survey(arch):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    tests = Path(__file__).parents[1]
    env["PYTHONPATH"] = os.pathsep.join(map(str, (tests.parent, tests)))
    run = subprocess.run(
        [sys.executable, "-m", "support.aot_survey", arch],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def where(code):
    blocks = {k: v for k, v in code["constants"].items() if k.startswith(("BLOCK", "num_"))}
    return f"{code['name']} {code['dtype']} {code['layout']} L={code['length']} {blocks}"


@each_architecture
def test_every_kernel_is_compiled(arch):
    names = {code["name"] for code in survey(arch)}
    assert names - FUSED == MULTIPLYING | OTHER
    if arch in ("sm_80", "sm_90"):  # others have no table yet, and take the split route
        assert names >= FUSED


@each_architecture
def test_no_spills(arch):
    spilled = {where(c): c["spills"] for c in survey(arch) if c["default"] and c["spills"]}
    assert not spilled


@each_architecture
def test_shared_memory_fits(arch):
    limit = aot.SHARED_LIMIT[arch]
    assert not {where(c): c["shared"] for c in survey(arch) if c["shared"] > limit}


@each_architecture
def test_matrix_instructions(arch):
    """In every kernel that multiplies matrices; NVIDIA has none for float32 in full precision."""
    for code in survey(arch):
        scalar = "float32" in code["dtype"] and arch.startswith("sm")
        no_float64_unit = "float64" in code["dtype"] and arch in ("sm_89", "sm_100")
        if code["name"] in MULTIPLYING | FUSED and not scalar and not no_float64_unit:
            assert code["matrix"] > 0, where(code)


@pytest.mark.xdist_group("sm_90")
def test_warpgroup_instructions():
    """Tiles of at least 64 by 64 use Hopper's own matrix unit."""
    for code in survey("sm_90"):
        blocks = [int(code["constants"].get(f"BLOCK_{x}", 0)) for x in "MNL"]
        half = code["dtype"] in ("torch.bfloat16", "torch.float16")
        if code["name"] in MULTIPLYING and half and min(blocks) >= 64:
            assert code["wgmma"] > 0, where(code)


@pytest.mark.parametrize(
    "arch", [pytest.param(a, marks=pytest.mark.xdist_group(a)) for a in ("sm_80", "sm_90")]
)
def test_loads_of_activations_are_wide(arch):
    """At least 8 bytes for 28×28 and 14×14 maps in NCHW, 16 in channels-last memory.

    Narrower loads are of statistics: one number a map, a position or a row of the mask.
    """
    for code in survey(arch):
        if code["dtype"] != "torch.bfloat16" or not code["default"]:
            continue
        least = 16 if code["layout"] == "nhwc" or code["length"] == 784 else 8
        widths = {int(w) for w in {**code["copies"], **code["loads"]}}
        assert max(widths) >= least, where(code)
        # One number a map or channel: biases, and descriptors of a number of maps like 19.
        small = 2 if code["name"] in FUSED and code["n"] % 16 == 0 else 0
        assert code["loads"].get("2", 0) <= small or code["n"] % 16, where(code)


@pytest.mark.xdist_group("sm_90")
def test_main_loops_copy_asynchronously():
    for code in survey("sm_90"):
        pipelined = int(code["constants"].get("num_stages", 1)) > 1
        if code["name"] in FUSED and not code["wgmma"]:
            continue  # tiles of 32 rows: mma.sync takes X from registers, however it came there
        multiplying = code["name"] in MULTIPLYING or (code["name"] in FUSED and pipelined)
        if multiplying and code["dtype"] == "torch.bfloat16" and code["default"]:
            assert max(map(int, code["copies"]), default=0) >= 8, where(code)
