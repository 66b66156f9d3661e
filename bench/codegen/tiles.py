"""Finds tiles for the fused kernels by compiling candidates, and writes the table that ships.

    python -m bench.codegen.tiles sm_89 gfx942        (without TRITON_INTERPRET; no GPU)
    python -m bench.codegen.tiles sm_90 --kernel block_bwd_gather --kernel gather_from_x

For each architecture, kernel and block: the first candidate, in order of preference, that neither
spills nor exceeds the shared memory in any variant: 28×28 and 14×14 maps in NCHW and channels-last
memory, several heads, bfloat16 and float16. From there on the same with a mask, or with V written
or given, which may have a tile of its own. Odd numbers of positions in NCHW, where every load is of
one element, are to be clean too, if that costs at most half the positions of a tile; where they are
not, the table says so. A block without a candidate for both is left out, and the planner then takes
another route. Candidates prefer many positions, then stages.
"""

import argparse
import json
import os
import sys

from bench.codegen import compile, survey
from bench.codegen.candidates import CANDIDATES, SMALL
from da_triton.runtime import tiles

HOLD_ALL_CHANNELS = ("gather_from_x", "project_distribute", "block_bwd_distribute")
SHORTEST = 32  # positions of a tile for which a route is fused at all
HOPELESS = 64  # spills beyond which fewer stages do not help
# Where the likeliest to spill need no more registers than this, of 255, the others are not tried.
LIKELIEST, AT_EASE = 2, 200


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen.tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arch", nargs="+", choices=tiles.ARCHITECTURES)
    parser.add_argument(
        "--kernel", action="append", choices=survey.BLOCKS, help="repeatable; else all"
    )
    parser.add_argument(
        "--from", dest="start", metavar="ARCH",
        help="begin at this architecture's tiles in the table instead of the first candidate",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        print("TRITON_INTERPRET is set: nothing would be compiled. Unset it.", file=sys.stderr)
        return 2
    for arch in options.arch:
        for kernel in options.kernel or survey.BLOCKS:
            write(arch, kernel, Search(arch, kernel, options.start).run())
    return 0


class Search:
    """The tiles of one kernel on one architecture."""

    def __init__(self, arch, kernel, start):
        self.arch, self.kernel, self.start = arch, kernel, start
        self.small = kernel.startswith(("combine", "weight"))

    def run(self):
        """``{(block_m, block_n): ((plain tile, remark), (special tile, remark))}``"""
        found = {}
        for blocks, sizes in survey.BLOCKS[self.kernel].items():
            entry = self.best(blocks, sizes, self.candidates(blocks), special=False)
            entries = entry, entry
            if entry and survey.special_flags(self.kernel):
                rest = self.candidates(blocks, entry[0])
                entries = entry, self.best(blocks, sizes, rest, special=True)
            print(self.arch, self.kernel, blocks, *entries, flush=True)
            if all(entries):
                found[blocks] = entries
        return found

    def best(self, blocks, sizes, candidates, special):
        """The first that is clean, with a remark; None if none is."""
        usual = survey.variants(self.kernel, special)
        odd = survey.odd_variants(self.kernel, special)
        fallback, remark, hopeless = None, "", set()
        for candidate in candidates:
            block_l, warps, stages = candidate
            if (block_l, warps) in hopeless and stages > 1:
                continue
            if fallback:  # only one that is clean everywhere is better
                if block_l < max(SHORTEST, fallback[0] // 2):
                    break
                if not self.spills(blocks, sizes, candidate, odd + usual):
                    return candidate, ""
                continue
            spills = self.spills(blocks, sizes, candidate, usual)
            if spills > HOPELESS:
                hopeless.add((block_l, warps))
            if spills:
                continue
            spills = self.spills(blocks, sizes, candidate, odd)
            if not spills:
                return candidate, ""
            fallback, remark = candidate, f"{spills} spills at odd L"
        return (fallback, remark) if fallback else None

    def candidates(self, blocks, first=None):
        """In order, from ``first`` on, or from where the search was told to begin."""
        order = list(SMALL if self.small else CANDIDATES)
        if first is None and self.start:
            key = tiles.Key(self.kernel, tiles.PLAIN, "half", *blocks)
            first = tiles.shipped(self.start).get(key, (None,))[:3]
        order = order[order.index(first) :] if first in order else order
        return [c for c in order if self.may_fit(blocks, *c)]

    def may_fit(self, blocks, block_l, warps, stages):
        """Whether the buffers of a pipeline for X alone leave room; cheaper than to compile."""
        if self.arch == "gfx942" and stages > 2:
            return False  # one buffer beside the registers is what its pipelines are made of
        held = blocks[0] * block_l * 2 * (stages - 1) if self.kernel in HOLD_ALL_CHANNELS else 0
        return held < tiles.ARCHITECTURES[self.arch].shared_memory

    def spills(self, blocks, sizes, candidate, wanted):
        """Of the first variant that spills, else 0; 0.5 for any other failure."""
        seen, registers = set(), 0
        for number, variant in enumerate(wanted):
            if number >= LIKELIEST and registers <= AT_EASE:
                break
            with survey.on("sm_90"):  # its table has what the launchers ask for on the way
                recorded = survey.record(self.kernel, sizes, variant, candidate)
            for launch in recorded:
                key = compile.identity(launch, self.arch)
                if key in seen:
                    continue
                seen.add(key)
                spills = 0.5
                try:
                    code = compile.compile_launch(launch, self.arch)
                    spills, registers = code.spills, max(registers, code.registers)
                    failure = f"{spills} spills"
                except compile.OutOfSharedMemoryError as error:
                    failure = f"{error} of shared memory"
                except Exception as error:  # the compiler's own limits differ by version
                    failure = f"{type(error).__name__} {str(error)[:80]}"
                if spills:
                    print(f"    {blocks} {candidate}: {failure} ({variant.title})", flush=True)
                    return spills
        return 0


def write(arch, kernel, found):
    """Replaces a kernel's entries in the table that ships."""
    path = tiles.SHIPPED / f"{arch}.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    table = {k: e for k, e in tiles.entries(header).items() if k.kernel != kernel}
    for blocks, (plain, special) in found.items():
        variants = {tiles.PLAIN: (plain[0], plain[1] or special[1])}
        if special[0] != plain[0]:
            variants = {tiles.PLAIN: plain, survey.variant_name(kernel): special}
        for variant, (entry, note) in variants.items():
            key = tiles.Key(kernel, variant, "half", *blocks)
            table[key] = tiles.Entry._make((*entry, "pointers", note))
    path.write_text(tiles.text({"architecture": arch}, table), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
