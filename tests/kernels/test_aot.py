"""Generated code of every kernel with every shipped tile, for five architectures, without a GPU.

The kept table is held against rules, and against the code: every program that a launch would
compile must be in it, by its digest, and of each kernel one is compiled again in a process without
TRITON_INTERPRET (``bench.codegen``), which must give the figures that the table has.
"""

import functools
import importlib.metadata
import re
import warnings
from pathlib import Path

import pytest

import da_triton
from bench import codegen
from da_triton.kernels import gather
from da_triton.runtime import tiles

ARCHITECTURES = codegen.ORDER
NVIDIA = [a for a in ARCHITECTURES if a.startswith("sm_")]
# Spills with the oldest supported Triton, beside those that notes of tiles name.
ACCEPTED_OF = {
    "3.6.0": {
        ("sm_80", "delta", 32): 3,
        ("sm_90", "block_bwd_gather", 128): 13,
        ("sm_90", "grad_logits", 512): 4,
        ("sm_90", "apply_weights", 512): 22,
        ("sm_90", "weight_gradients", 19): 16,
    },
}
# Matrix-unit instructions of the core's kernels in full precision: none for float32 on NVIDIA.
FLOAT64_UNITS = ("sm_80", "sm_90", "gfx942")


def each(architectures, long=()):
    """In workers of pytest-xdist, one architecture is one worker's."""
    groups = [
        pytest.param(a, marks=[pytest.mark.xdist_group(a), *[pytest.mark.long] * (a in long)])
        for a in architectures
    ]
    return pytest.mark.parametrize("arch", groups)


each_architecture = each(ARCHITECTURES)
# A change of a kernel shows on every one of them.
each_compiled = each(ARCHITECTURES, long=("sm_89", "sm_100", "gfx942"))


TRITON = importlib.metadata.version("triton")
KEPT = codegen.read()


def kept(arch):
    return [row for row in KEPT if row["arch"] == arch]


@functools.cache
def sample(arch):
    """All programs, one of each kernel compiled."""
    return list(codegen.surveyed(arch, sample=True))


def is_fused(code):
    """Kernels of the fused block: these have channels."""
    return code["C"] > 0


@each_architecture
def test_every_kernel_is_compiled(arch):
    """Every kernel that the package defines, those of the fused block included; nothing else."""
    folder = Path(da_triton.__file__).parent / "kernels"
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    defined = set(re.findall(r"^def (\w+)_kernel\(", sources, re.MULTILINE))
    assert {code["kernel"] for code in kept(arch)} == defined


def entries(row):
    """The shipped tiles with which a row's program may have been compiled."""
    blocks = dict(word.split("=") for word in row["blocks"].split())
    flags = dict(word.split("=") for word in row["flags"].split() if "=" in word)
    m = int(blocks.get("M") or blocks.get("C") or 0)
    n = int(blocks.get("N", 0)) * int(flags.get("HEAD_BLOCK", 1))
    kernel = row["kernel"]
    fit = "CHANNELS_FIT" in row["flags"].split()
    if kernel == "block_bwd_gather" and fit:
        kernel += "_full_c"
    if kernel == "project_distribute" and not fit:
        kernel += "_blocks"
    options = int(blocks.get("L", 0)), row["warps"], row["stages"]
    gradient, given = (name in row["flags"].split() for name in ("GRADIENT", "GIVEN"))
    return [
        entry
        for key, entry in tiles.shipped(row["arch"]).items()
        if (key.kernel, key.block_m, key.block_n, *entry[:3]) == (kernel, m, n, *options)
        if (key.tile_class == "half") == (row["dtype"] in ("float16", "bfloat16"))
        if kernel != "full_n" or key.variant.startswith("gradient") == gradient
        if kernel != "gather" or (key.variant == gather.GIVEN) == given
    ]


def noted_spills(row):
    """How many spills the note of a row's tile allows: those at odd lengths are not counted."""
    notes = [entry.note for entry in entries(row)]
    found = [re.search(r"^modelled; (\d+) spills(?! at odd L)", note) for note in notes]
    return max((int(match[1]) for match in found if match), default=0)


def unnoted(rows):
    """Programs that spill more than the notes of their tiles say."""
    return {
        codegen.title(c): c["spills"]
        for c in rows
        if c["L"] != codegen.ODD and c["spills"] > noted_spills(c)
    }


@each_architecture
def test_tiles_spill_only_where_their_notes_say_how_much(arch):
    """And that the modelled time chose them."""
    assert not unnoted(kept(arch))


def test_notes_of_spills_are_found_for_their_programs():
    noted = {
        key: int(match[1])
        for key, entry in tiles.shipped("sm_90").items()
        if (match := re.match(r"modelled; (\d+) spills(?! at odd)", entry.note))
    }
    assert noted
    names = {"block_bwd_gather_full_c": "block_bwd_gather"}
    for key, spills in noted.items():
        entry, gradient = tiles.shipped("sm_90")[key], key.variant.startswith("gradient")
        given = key.variant == gather.GIVEN
        row = {
            **KEPT[0], "arch": "sm_90", "kernel": names.get(key.kernel, key.kernel), "L": 784,
            "flags": f"CHANNELS_FIT {'GRADIENT' * gradient} {'GIVEN' * given}", "dtype": "bfloat16",
            "warps": entry.num_warps, "stages": entry.num_stages,
            "blocks": f"N={key.block_n} C={key.block_m} L={entry.block_l}", "spills": spills,
        }  # fmt: skip
        assert not unnoted([row])
        assert unnoted([{**row, "spills": spills + 1}])
        assert unnoted([{**row, "warps": 2 * entry.num_warps}])  # another tile
        assert not unnoted([{**row, "warps": 2 * entry.num_warps, "spills": 0}])
        assert unnoted([{**row, "arch": "sm_80"}])
        assert unnoted([{**row, "dtype": "float32"}])
        if key.kernel == "full_n":
            assert unnoted([{**row, "flags": "GRADIENT" * (not gradient)}])


@each_architecture
def test_shared_memory_fits(arch):
    limit = tiles.ARCHITECTURES[arch].shared_memory
    assert not {codegen.title(c): c["shared"] for c in kept(arch) if c["shared"] > limit}


@each_architecture
def test_matrix_instructions(arch):
    """Every kernel with matrix products has them; NVIDIA has none for full-precision float32."""
    for code in kept(arch):
        scalar = code["dtype"] == "float32" and arch in NVIDIA
        no_unit = code["dtype"] == "float64" and arch not in FLOAT64_UNITS
        if code["products"] and not scalar and not no_unit:
            assert code["matrix"] > 0, codegen.title(code)


@pytest.mark.xdist_group("sm_90")
def test_warpgroup_instructions():
    """Tiles of at least 64 by 64 use Hopper's own matrix unit."""
    for code in kept("sm_90"):
        blocks = dict(word.split("=") for word in code["blocks"].split())
        smallest = min(int(blocks.get(x, 0)) for x in "MNL")
        half = code["dtype"] in ("bfloat16", "float16")
        if code["products"] and not is_fused(code) and half and smallest >= 64:
            assert code["wgmma"] > 0, codegen.title(code)


@each_architecture
def test_loads_of_activations_are_wide(arch):
    """At least 8 bytes for 28×28 and 14×14 positions in NCHW, 16 in channels-last memory.

    Narrower loads are of statistics: one number per descriptor, position or mask row. AMD's
    wavefronts have 64 lanes and its tiles are small: a lane may get 4 bytes, but never 2.
    """
    for code in kept(arch):
        if (
            code["L"] == codegen.ODD
            or code["dtype"] != "bfloat16"
            or (code["call"] and not is_fused(code))
        ):
            continue
        least = 16 if code["layout"] == "nhwc" or code["L"] == 784 else 8
        least = least if arch in NVIDIA else 4
        assert max(code["copy_bytes"], code["load_bytes"]) >= least, codegen.title(code)
        # One number per channel: biases, and G where n is a number like 19.
        small = 2 if is_fused(code) and code["n"] % 16 == 0 else 0
        if "HAS_BIAS" in code["flags"]:  # a lane's share of it; of rows, it would be 64 and more
            small = max(small, {"full_n": 32, "operands": 4}.get(code["kernel"], 0))
        # Copies to channels-last memory are for rows that are not aligned, and read elements.
        copy = code["kernel"] == "operands" and "ALIGN=1" in code["flags"] and code["L"] % 8
        assert copy or code["loads_2"] <= small or code["n"] % 16, codegen.title(code)


@pytest.mark.xdist_group("sm_90")
def test_main_loops_copy_asynchronously():
    for code in kept("sm_90"):
        if code["L"] == codegen.ODD:
            continue
        if is_fused(code) and not (code["wgmma"] and code["stages"] > 1):
            continue  # tiles of 32 rows: mma.sync takes X from registers, wherever it comes from
        if code["stages"] == 1 and any(entry.ctas_per_sm > 1 for entry in entries(code)):
            continue  # while a program loads, the SM's other one multiplies
        if code["products"] and code["dtype"] == "bfloat16" and not code["call"]:
            assert code["copy_bytes"] >= 8, codegen.title(code)


@each_compiled
def test_table_is_of_the_programs_that_launches_compile(arch):
    """None missing, none stale."""
    if {row["triton"] for row in kept(arch)} != {TRITON}:
        warnings.warn(f"{codegen.KEPT.name} is of another Triton than {TRITON}", stacklevel=1)
        return
    wanted = {row["digest"]: row for row in sample(arch)}
    listed = {row["digest"]: row for row in kept(arch)}
    missing = [codegen.title(wanted[d]) for d in wanted.keys() - listed.keys()]
    gone = [codegen.title(listed[d]) for d in listed.keys() - wanted.keys()]
    again = f"Run `python -m bench codegen --arch {arch}` and look at its git diff."
    assert not missing + gone, f"{missing=}\n{gone=}\n{again}"


@each_compiled
def test_table_has_the_figures_that_the_compiler_gives(arch):
    """One program of each kernel; with another Triton, that its spills are those of the notes."""
    listed = {row["digest"]: row for row in kept(arch)}
    accepted = ACCEPTED_OF.get(TRITON, {})
    compiled = [row for row in sample(arch) if "registers" in row]
    assert len(compiled) == len({row["kernel"] for row in sample(arch)})
    for row in compiled:
        fresh = {**row, "triton": TRITON}
        if fresh["digest"] in listed:
            assert fresh == listed[fresh["digest"]]
        else:
            most = accepted.get((arch, fresh["kernel"], fresh["n"]), 0)
            most = max(most, noted_spills(fresh))
            assert fresh["L"] == codegen.ODD or fresh["spills"] <= most, codegen.title(fresh)
