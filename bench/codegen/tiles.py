"""Finds tiles for the fused kernels by compiling candidates, and writes the table that ships.

    python -m bench.codegen.tiles sm_89 gfx942        (without TRITON_INTERPRET; no GPU)
    python -m bench.codegen.tiles sm_90 --kernel block_bwd_gather --kernel gather_from_x
    python -m bench.codegen.tiles sm_90 --kernel gather_from_a --modelled

For each architecture, kernel and block: the first candidate, in order of preference, that neither
spills nor exceeds the shared memory in any variant: 28×28 and 14×14 positions in NCHW, 14×14 in
channels-last memory, several heads, bfloat16 and float16. From there on the same with a mask, or
with V written or given, which may have a tile of its own. Odd numbers of positions in NCHW, where
every load is of one element, are to be clean too, if that costs at most half the positions of a
tile; where they are not, the table says so. A block without a candidate for both is left out, and
the planner then takes another route. Candidates prefer many positions, then stages.

``--modelled`` prefers the candidate with the least modelled time on the named workloads, of those
that are clean; blocks that none of them launches have the first, as before.
"""

import argparse
import json
from typing import Any

import torch

from bench.codegen import cannot_compile, compile, survey
from bench.codegen.survey import Variant
from bench.model import tiles as ranking
from bench.tune import candidates_of
from da_triton.runtime import tiles

SHORTEST = 32  # positions of a tile for which a route is fused at all
HOPELESS = 64  # spills beyond which fewer stages do not help
# Where the likeliest to spill need no more registers than this, of 255, the others are not tried.
LIKELIEST, AT_EASE = 2, 200

Blocks = tuple[int, int]
Candidate = tuple[int, int, int, int]  # positions of a tile, warps, stages, programs per SM
Found = tuple[Candidate, str]  # with a remark


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen.tiles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("arch", nargs="+", choices=tiles.ARCHITECTURES)
    add("--kernel", action="append", choices=survey.KERNELS, help="repeatable; else all")
    add("--modelled", action="store_true", help="rank clean candidates by modelled time")
    add("--from", dest="start", metavar="ARCH", help="begin at this architecture's tiles")
    options = parser.parse_args(argv)
    if reason := cannot_compile():
        parser.error(reason)
    for arch in options.arch:
        for kernel in options.kernel or survey.KERNELS:
            write(arch, kernel, Search(arch, kernel, options.start, options.modelled).run())


class Search:
    """The tiles of one kernel on one architecture."""

    def __init__(
        self, arch: str, kernel: str, start: str | None = None, modelled: bool = False
    ) -> None:
        self.arch, self.kernel, self.modelled = arch, kernel, modelled
        self.start = tiles.shipped(start) if start else {}
        self.facts = survey.KERNELS[kernel]

    def run(self) -> dict[Blocks, tuple[Found, Found]]:
        """The plain and the special tile of each block."""
        found = {}
        _, flags = self.facts.special
        for blocks in self.facts.blocks:
            key = tiles.Key(self.kernel, tiles.PLAIN, "half", *blocks)
            first = self.start[key][:4] if key in self.start else None
            plain = special = self.best(blocks, first, {})
            if plain and self.modelled:
                plain = special = self.fastest(blocks) or plain
            if plain and flags:
                special = self.best(blocks, plain[0], flags)
            print(self.arch, self.kernel, blocks, plain, special, flush=True)
            if plain and special:
                found[blocks] = plain, special
        return found

    def best(self, blocks: Blocks, first: Candidate | None, flags: dict[str, Any]) -> Found | None:
        """The first candidate from ``first`` on that is clean; None if none is."""
        usual, odd = self.variants(flags), [survey.ODD_ROWS._replace(**flags)]
        fallback: Found | None = None  # only one that is clean everywhere is better
        hopeless = set()
        for candidate in self.candidates(blocks, first):
            block_l, warps, stages, _ = candidate
            if fallback and block_l < max(SHORTEST, fallback[0][0] // 2):
                break
            if stages > 1 and (block_l, warps) in hopeless:
                continue
            if fallback:
                if not self.spills(blocks, candidate, odd + usual):
                    return candidate, ""
            elif spills := self.spills(blocks, candidate, usual):
                if spills > HOPELESS:
                    hopeless.add((block_l, warps))
            elif not (spills := self.spills(blocks, candidate, odd)):
                return candidate, ""
            elif spills >= 1:  # slow; with any other failure, it could not be launched
                fallback = candidate, f"{spills} spills at odd L"
        return fallback

    def fastest(self, blocks: Blocks) -> Found | None:
        """The tile with the least modelled time: a clean candidate, or the one that ships."""
        clean = [
            c
            for c in self.candidates(blocks, None)
            if not self.spills(blocks, c, self.variants({}))
        ]
        chosen = ranking.best(self.kernel, blocks, clean, ranking.gpu_of(self.arch))
        if chosen is None:
            entry = tiles.shipped(self.arch).get(
                tiles.Key(self.kernel, tiles.PLAIN, "half", *blocks)
            )
            return None if entry is None else (entry[:4], entry.note)
        spills = self.spills(blocks, chosen, [survey.ODD_ROWS])
        return chosen, f"modelled; {spills} spills at odd L" if spills else "modelled"

    def variants(self, flags: dict[str, Any]) -> list[Variant]:
        """Variants in which a tile must be clean, the likeliest to spill first."""
        half = survey.NARROW._replace(dtype=torch.float16)
        found = [survey.NARROW, survey.LAST, survey.WIDE, half]
        if self.facts.special == survey.V and not flags:
            found.append(survey.NARROW._replace(heads=4))
        if self.kernel.startswith("combine"):
            found.insert(0, survey.NARROW._replace(masked=True))
        return [variant._replace(**flags) for variant in found]

    def candidates(self, blocks: Blocks, first: Candidate | None) -> list[Candidate]:
        """Candidates that may fit, in order of preference, from ``first`` on."""
        order = candidates_of(self.kernel)
        start = order.index(first) if first in order else 0
        return [c for c in order[start:] if self.may_fit(blocks, *c[:3])]

    def may_fit(self, blocks: Blocks, block_l: int, warps: int, stages: int) -> bool:
        """Whether the buffers of a pipeline for X alone leave room; cheaper than to compile."""
        if self.arch == "gfx942" and stages > 2:
            return False  # one buffer beside the registers is what its pipelines are made of
        held = blocks[0] * block_l * 2 * (stages - 1) if self.facts.holds_channels else 0
        return held < tiles.ARCHITECTURES[self.arch].shared_memory

    def spills(self, blocks: Blocks, candidate: Candidate, wanted: list[Variant]) -> float:
        """Spills of the first variant that has any, else 0; 0.5 for any other failure."""
        seen, registers = set(), 0
        for number, variant in enumerate(wanted):
            if number >= LIKELIEST and registers <= AT_EASE:
                break
            with survey.on("sm_90"):  # its table has what the launchers ask for on the way
                recorded = survey.record(self.kernel, self.facts.blocks[blocks], variant, candidate)
            for launch in recorded:
                key = compile.identity(launch, self.arch)
                if key in seen:
                    continue
                seen.add(key)
                spills, failure, used = self.tried(launch)
                registers = max(registers, used)
                if failure:
                    print(f"    {blocks} {candidate}: {failure} ({variant.title})", flush=True)
                    return spills
        return 0

    def tried(self, launch: compile.Launch) -> tuple[float, str, int]:
        """Spills, what is wrong with the program, and its registers."""
        try:
            code = compile.compile_launch(launch, self.arch)
        except Exception as error:  # the compiler's own limits differ by version
            return 0.5, f"{type(error).__name__} {str(error)[:80]}", 0
        if code.shared > tiles.ARCHITECTURES[self.arch].shared_memory:
            return 0.5, f"{code.shared} bytes of shared memory", 0
        return code.spills, f"{code.spills} spills" if code.spills else "", code.registers


def write(arch: str, kernel: str, found: dict[Blocks, tuple[Found, Found]]) -> None:
    """Replaces a kernel's entries in the table that ships."""
    path = tiles.SHIPPED / f"{arch}.json"
    header = json.loads(path.read_text(encoding="utf-8"))
    kept = tiles.ALIGNED, tiles.ODD  # which the search does not find
    table = {
        k: e for k, e in tiles.entries(header).items() if k.kernel != kernel or k.variant in kept
    }
    special_name, _ = survey.KERNELS[kernel].special
    for blocks, (plain, special) in found.items():
        variants = {tiles.PLAIN: (plain[0], plain[1] or special[1])}
        if special[0] != plain[0]:
            variants = {tiles.PLAIN: plain, special_name: special}
        for variant, (entry, note) in variants.items():
            key = tiles.Key(kernel, variant, "half", *blocks)
            table[key] = tiles.Entry(*entry, note=note)
    path.write_text(tiles.text({"architecture": arch}, table), encoding="utf-8")


if __name__ == "__main__":
    main()
