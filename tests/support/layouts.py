"""How the compiler lays matrix products out: ``python -m support.layouts sm_90 [--sample]``.

Prints a JSON object per program that multiplies matrices: its title, and how its products are laid
out wrongly. Two faults of the compilers leave traces in Triton's representations, and kernels are
written so that neither appears:

    narrow    an mma.sync operand laid out for elements narrower than its own, over more columns
              than its tile has (8·kWidth > K): float64 does not compile, TF32 is wrong
              (triton-lang/triton#11632, #11691)
    chained   on Blackwell's tensor memory, a product whose accumulator is another product's
              result: wrong in a loop (triton-lang/triton#10821)

The programs are those of ``bench.codegen.survey`` and, in each dtype, TF32 too, every tile of the
core with a mask; with ``--sample`` one tile of each kernel and dtype. Runs in a process without
TRITON_INTERPRET.
"""

import json
import re
import sys

import torch
from triton.compiler.compiler import Language

from bench.codegen import compile, survey

# m or n: each side reaches a tile of its own, some fill none.
SIDES = {2: (32, 64, 128), 4: (19, 64), 8: (19, 64)}
SHAPES = ((200, 20), (20, 200), (200, 200))
DTYPES = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False),
          (torch.float32, True), (torch.float64, False))  # fmt: skip


def programs(arch, sample):
    """Titles and faults of distinct programs that multiply matrices."""
    keys, kinds = set(), set()
    with survey.on(arch):
        for made, variant, (c, m, n) in [*_core(), *survey.found(arch)]:
            key, kind = compile.identity(made, arch), (made.name, variant)
            if key in keys or "PRECISION" not in made.kwargs or (sample and kind in kinds):
                continue
            keys.add(key)
            kinds.add(kind)
            title = f"{variant.title} C={c} m={m} n={n}"
            yield {"kernel": made.name, "program": title, "faults": faults(made, arch)}


def _core():
    for dtype, tf32 in DTYPES:
        sides = SIDES[dtype.itemsize]
        variant = survey.Variant(dtype=dtype, tf32=tf32, masked=True)
        for m, n in [*((m, n) for m in sides for n in sides), *SHAPES]:
            for made in survey.core(m, n, variant):
                yield made, variant, (0, m, n)


def faults(launch, arch):
    module, backend, options = compile.parse(launch, arch)
    stages, metadata = {}, {}
    backend.add_stages(stages, options, Language.TRITON)
    module = stages["ttir"](module, metadata)
    found = chained(str(module)) if arch == "sm_100" else []
    return found + narrow(str(stages["ttgir"](module, metadata)))


def narrow(text):
    """Found in Triton's GPU representation, after layouts are chosen."""
    found = []
    versions = dict(re.findall(r"(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d)", text))
    layout = r"#ttg\.dot_op<\{opIdx = (\d), parent = (#\w+), kWidth = (\d+)"
    for line in text.splitlines():
        operands = re.findall(rf"tensor<(\d+)x(\d+)x\w+, {layout}", line)
        for rows, columns, index, parent, width in operands if "tt.dot " in line else ():
            k = int(columns if index == "0" else rows)
            if versions.get(parent) == "2" and 8 * int(width) > k:
                found.append(f"narrow: operand {index} has kWidth {width} and K {k}")
    return found


def chained(text):
    """Found in Triton's first representation, after its rewrites."""
    products = dict(re.findall(r"(%\S+) = tt\.dot \S+, \S+, (%[\w#]+)", text))
    return [
        f"chained: {result} adds to the product {accumulator}"
        for result, accumulator in products.items()
        if accumulator in products
    ]


if __name__ == "__main__":
    for program in programs(sys.argv[1], "--sample" in sys.argv):
        print(json.dumps(program), flush=True)
