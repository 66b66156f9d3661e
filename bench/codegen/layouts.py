"""How the matrix products of every kernel are laid out, read from Triton's representations.

    python -m bench.codegen.layouts sm_90 [--sample]

prints a JSON object per program: its title, and what is wrong with it. Two faults of the compilers
leave traces there, and kernels are written so that neither appears:

    narrow    an mma.sync operand laid out for elements narrower than its own, over more columns
              than its tile has (8·kWidth > K): float64 does not compile, TF32 is wrong
              (triton-lang/triton#11632, #11691)
    chained   on Blackwell's tensor memory, a product whose accumulator is another product's result:
              wrong in a loop (triton-lang/triton#10821)

Programs are those of ``survey``, and in each dtype, TF32 too, every tile of the core with a mask.
``--sample``: one tile of each kernel and dtype. Needs a process without TRITON_INTERPRET.
"""

import json
import re
import sys
from collections.abc import Iterator

import torch

from . import compiler, launches, survey
from .launches import Variant

# Features or maps, by bytes of an element: each pair reaches a tile of the core.
SIDES = {2: (32, 64, 128), 4: (19, 64), 8: (19, 64)}
BLOCKED = ((200, 20), (20, 200), (200, 200))
DTYPES = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False),
          (torch.float32, True), (torch.float64, False))  # fmt: skip
Found = tuple[str, compiler.Launch]


def programs(arch: str) -> Iterator[Found]:
    """Every distinct program of an architecture, with a title."""
    seen = set()
    with launches.on(arch):
        for title, launch in _launches(arch):
            key = compiler.identity(launch, arch)
            if key not in seen:
                seen.add(key)
                yield title, launch


def _launches(arch):
    for dtype, tf32 in DTYPES:
        sides = SIDES[dtype.itemsize]
        variant = Variant(dtype=dtype, tf32=tf32, masked=True)
        for m, n in [*((m, n) for m in sides for n in sides), *BLOCKED]:
            for launch in launches.core(m, n, variant):
                yield f"{variant.title} m={m} n={n}", launch
    for launch, variant, sizes in survey.found(arch):
        yield f"{variant.title} C={sizes[0]} m={sizes[1]} n={sizes[2]}", launch


def faults(launch: compiler.Launch, arch: str) -> list[str]:
    """What is wrong in a launch's program."""
    found = list(narrow(compiler.representation(launch, arch, before="llir")))
    if arch == "sm_100":
        found += chained(compiler.representation(launch, arch, before="ttgir"))
    return found


def narrow(text: str) -> Iterator[str]:
    """Of a program in Triton's GPU representation, after layouts are chosen."""
    versions = dict(re.findall(r"(#\w+) = #ttg\.nvidia_mma<\{versionMajor = (\d)", text))
    layout = r"#ttg\.dot_op<\{opIdx = (\d), parent = (#\w+), kWidth = (\d+)"
    operand = rf"tensor<(\d+)x(\d+)x\w+, {layout}"
    for line in text.splitlines():
        if "tt.dot " not in line:
            continue
        for rows, columns, index, parent, width in re.findall(operand, line):
            k = int(columns if index == "0" else rows)
            if versions.get(parent) == "2" and 8 * int(width) > k:
                yield f"narrow: operand {index} has kWidth {width} and K {k}"


def chained(text: str) -> Iterator[str]:
    """Of a program in Triton's first representation, after its rewrites."""
    products = dict(re.findall(r"(%\S+) = tt\.dot \S+, \S+, (%[\w#]+)", text))
    for result, accumulator in products.items():
        if accumulator in products:
            yield f"chained: {result} adds to the product {accumulator}"


def main(arch: str, sample: bool) -> None:
    seen = set()
    for title, launch in programs(arch):
        kind = launch.name, title.split(" C=")[0].split(" m=")[0]
        if "PRECISION" not in launch.kwargs or (sample and kind in seen):
            continue
        seen.add(kind)
        found = faults(launch, arch)
        print(json.dumps({"kernel": launch.name, "program": title, "faults": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "--sample" in sys.argv)
