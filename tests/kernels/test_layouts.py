"""How the compiler lays matrix products out, for NVIDIA architectures, without a GPU.

Two faults of compilers leave traces in Triton's representations of a program; no kernel has either
(``support.layouts``, in a process without TRITON_INTERPRET).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.layouts import chained, narrow

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
ROOT = Path(__file__).parents[2]
NARROW = """
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1]}>
  %5 = tt.dot %3, %4, %1, inputPrecision = tf32 : tensor<64x16xf32, #ttg.dot_op<{opIdx = 0, \
parent = PARENT, kWidth = WIDTH}>> * tensor<16x64xf32, #ttg.dot_op<{opIdx = 1, parent = PARENT, \
kWidth = WIDTH}>> -> tensor<64x64xf32, PARENT>
"""


def run(*arguments):
    """The output of a process that compiles instead of interpreting."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ended = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def programs(arch, *flags):
    lines = run("-m", "support.layouts", arch, *flags).splitlines()
    return [json.loads(line) for line in lines]


def wrong(found):
    return {f"{p['kernel']} {p['program']}": p["faults"] for p in found if p["faults"]}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_product_is_laid_out_wrongly(arch):
    """One tile of each kernel in each dtype, TF32 too, with a mask and without."""
    found = programs(arch, "--sample")
    masked = {(p["kernel"], p["program"].split()[2]) for p in found if "masked" in p["program"]}
    dtypes = {dtype for kernel, dtype in masked if kernel == "gather_kernel"}
    assert dtypes == {"float64", "float32", "float16", "bfloat16"}
    assert any("tf32" in p["program"] for p in found)
    assert not wrong(found)


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_program_is_laid_out_wrongly(arch):
    assert not wrong(programs(arch))


@pytest.mark.parametrize(
    ("width", "parent", "found"), [(4, "#mma", 2), (2, "#mma", 0), (4, "#mma1", 0)]
)
def test_narrow_operands_are_found(width, parent, found):
    text = NARROW.replace("WIDTH", str(width)).replace("PARENT", parent)
    assert len(narrow(text)) == found


def test_chained_products_are_found():
    apart = "%1 = tt.dot %a, %b, %zero : x\n%2 = tt.dot %c, %d, %zero : x\n"
    assert not chained(apart)
    assert len(chained(apart + "%3 = tt.dot %e, %f, %1 : x\n")) == 1


CONTRACTED = """
import re, torch, triton
from bench.codegen import compile, survey
from da_triton.planning.costs import XH
from da_triton.planning.planner import Route
with survey.on("sm_90"):
    sizes = (24, 19), (200, 19), (200, 600)  # that reach every kernel of the gather's backward
    found = [x for m, n in sizes for x in survey.core(m, n, survey.Variant())]
    fused = Route(XH, "fused", "fused", "fused", XH, 64)
    found += survey.of_block((64, 32, 32), fused, survey.Variant())
for launch in found:
    launch.kwargs.update(FUSION)
    source, options = compile.specialized(launch, "sm_90")
    asm = triton.compile(source, target=compile.TARGETS["sm_90"], options=options).asm
    print(launch.name, len(re.findall(r"fma\\.rn\\.f32", asm["ptx"])))
"""


def test_logits_are_rounded_before_anything_is_subtracted():
    """Where weights are made again: a contracted ``scale·x − lse`` is another number."""
    output = run("-c", CONTRACTED.replace("FUSION", "{}"))
    lines = [line.split() for line in output.splitlines()]
    again = {
        "gather_backward_kernel", "full_n_kernel", "apply_weights_kernel", "grad_logits_kernel",
        "grad_g_kernel", "block_bwd_gather_kernel",
    }  # fmt: skip
    assert {name for name, _ in lines} >= again
    assert not [line for line in lines if line[0] in again and line[1] != "0"]


def test_contraction_would_be_seen():
    fused = run("-c", CONTRACTED.replace("FUSION", "enable_fp_fusion=True"))
    assert int(re.search(r"gather_backward_kernel (\d+)", fused)[1]) > 0
