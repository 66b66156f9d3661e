"""Tile choice: block sizes, warps and pipeline stages of each kernel.

``tile`` is the one lookup, for every kernel: an entry tuned for this GPU model, else one shipped
for its architecture, else a rule. Nothing is measured at run time: the choice is the same in every
process, traceable, and works interpreted.

Shipped tables are ``kernels/tiles/<architecture>.json``, and ``wide.json`` with float32 and float64
on all of them: those have no tensor cores on NVIDIA and few registers, so their tiles are small.
The entries were found by ahead-of-time compilation (``python -m bench.codegen.tiles``): the largest
tile of a kernel that compiles without spills, within the architecture's shared memory, on every
layout. Ties go to more positions per tile, which means wider rows and fewer loop steps. Those whose
note is "modelled" were chosen by the modelled time of the named workloads. None has been timed yet.
A tile spills at rows of even length only where its note says how many times and that it was chosen
by modelled time ("modelled; 26 spills"). A missing kernel and block spills with every candidate
tried: ``fits`` is False for it, and the planner takes another route.

Tuned tables are written by ``python -m bench tune``, one per GPU model, into the folder that
DA_TRITON_TILES names (default: ``tiles`` in the cache). Some may ship in ``kernels/tiles/tuned``.
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..precision import POLICIES
from . import folders

SHIPPED = Path(__file__).parents[1] / "kernels" / "tiles"


class Tile(NamedTuple):
    """Parameters of a launch: block sizes along m, n and positions, and compiler options."""

    block_m: int
    block_n: int
    block_l: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1  # programs that an SM should hold at once: see ``split_positions``
    impl: str = "pointers"  # which version of the kernel: see ``launch.Launch``


class Key(NamedTuple):
    """The key of a table's entry."""

    kernel: str
    variant: str  # PLAIN, or what needs a tile of its own: "mask", "v" (V written or given), …
    tile_class: str  # of the dtype: ``DtypePolicy.tile_class``
    block_m: int
    block_n: int


class Entry(NamedTuple):
    """An entry of a table, and the reason for it or what was measured, in ``note``."""

    block_l: int
    num_warps: int
    num_stages: int
    ctas_per_sm: int = 1
    impl: str = "pointers"
    note: str = ""


PLAIN = "plain"  # also every variant that a table lacks
# Rows of positions that begin at multiples of 16 bytes in half precision, and those of which every
# load is of one element: see ``launch.rows``.
ALIGNED, ODD = "aligned", "odd"
FEW = " few"  # behind a variant: programs of its tile would leave much of the GPU idle
COLUMNS = [
    "kernel", "variant", "dtype", "block_m", "block_n", "positions", "warps", "stages",
    "ctas_per_sm", "impl", "note",
]  # fmt: skip
Table = Mapping[Key, Entry]

# --- architectures --------------------------------------------------------------------------------


class Architecture(NamedTuple):
    """A GPU that tables are made for: what Triton compiles for, and bytes of shared memory."""

    backend: str
    target: int | str
    warp_size: int
    shared_memory: int


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 166_912),
    "sm_89": Architecture("cuda", 89, 32, 101_376),
    "sm_90": Architecture("cuda", 90, 32, 232_448),
    "sm_100": Architecture("cuda", 100, 32, 232_448),
    "gfx942": Architecture("hip", "gfx942", 64, 65_536),
}
# Tables for compute capabilities: by number, then by generation. 8.7 (Orin) has the A100's shared
# memory. 8.6, 8.9 and 12.x have 99 KiB, the smallest: their table is the safest for any other.
# 10.x and 11.x are Blackwell with tensor memory, which 12.x lacks.
TABLES = {(8, 0): "sm_80", (8, 7): "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}
SAFEST = "sm_89"
AMD = "gfx942"


@functools.cache
def architecture(device: torch.device) -> str:
    """The architecture whose table a GPU uses; interpreted kernels use an H200's.

    Raises:
        RuntimeError: no table is safe for it (see ``obstacle``).
    """
    if device.type != "cuda":
        return "sm_90"
    if not torch.version.hip:
        return _table_for(torch.cuda.get_device_capability(device))
    reason = obstacle(device)
    if reason is not None:
        raise RuntimeError(reason)
    return _table_for(_gcn(device))


def obstacle(device: torch.device) -> str | None:
    """Why no table is safe for an AMD GPU, or None. RDNA has other matrix units and waves."""
    name = _gcn(device)
    if name.startswith("gfx9"):
        return None
    return (
        f"the kernels have tiles for AMD's CDNA GPUs (gfx9…), and {device} is {name}. Use "
        "backend='torch' there."
    )


def _gcn(device):
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


@functools.cache  # one warning per kind of GPU
def _table_for(kind: tuple[int, int] | str) -> str:
    if isinstance(kind, str):
        found, own = AMD, kind == AMD
    else:
        found = TABLES.get(kind) or TABLES.get(kind[0]) or SAFEST
        own = 10 * kind[0] + kind[1] == ARCHITECTURES[found].target
        kind = f"compute capability {kind[0]}.{kind[1]}"
    if not own:
        warnings.warn(
            f"da_triton's kernels were never compiled for {kind}. They take the tiles of {found}. "
            "`python -m da_triton.check` verifies them on this GPU, and `python -m bench tune` "
            "finds faster tiles.",
            stacklevel=2,
        )
    return found


def reads_shared_operands(device):
    """Whether the matrix unit takes both operands from shared memory, transposed or not."""
    return architecture(device) in ("sm_90", "sm_100")


def wants_64_rows(device):
    """Whether the matrix unit is wgmma, whose results have 64 rows or a multiple."""
    return architecture(device) == "sm_90"


def limits_registers(device):
    """Whether a launch may limit the registers of a thread (NVIDIA's assembler alone does)."""
    return architecture(device) != AMD


def registers(tile):
    """Registers of a thread with which an SM holds ``tile.ctas_per_sm`` programs."""
    return min(255, REGISTERS // (32 * tile.num_warps * tile.ctas_per_sm) // 8 * 8)


def threads(tile, device):
    """Threads of a program."""
    return tile.num_warps * ARCHITECTURES[architecture(device)].warp_size


def chains_products(device):
    """Whether several products in a loop may add to one accumulator.

    Triton 3.6 to 3.8 miscompile them for Blackwell's tensor memory: triton-lang/triton#10821.
    """
    return architecture(device) != "sm_100"


# --- block sizes ----------------------------------------------------------------------------------

# The largest G that one program holds whole, in both directions, by class of dtype; and the
# smallest block of a kernel of the core.
LARGEST_G_TILE = {"half": 128, "float32": 32, "float64": 32}
SMALLEST = {"half": 32, "float32": 32, "float64": 16}
ANY = 1 << 30
REGISTERS = 65_536  # of an SM


class Blocks(NamedTuple):
    """Least and most features (or channels) and descriptors in a block, as powers of two.

    ``walks``: axes on which the kernel walks over smaller blocks, if the table has no larger ones.
    """

    m: tuple[int, int] = (1, ANY)
    n: tuple[int, int] = (1, ANY)
    walks: str = ""


BLOCKS = {
    # the core: all of G in a program; blocks of G; full n; statistics
    "distribute": Blocks(),
    "distribute_backward": Blocks(),
    "gather_backward": Blocks(),
    "gather": Blocks(walks="mn"),
    "grad_g": Blocks(walks="mn"),
    "apply_weights": Blocks(walks="mn"),
    "grad_logits": Blocks(walks="mn"),
    "full_n": Blocks((64, 64), (32, ANY), walks="m"),
    "position_lse": Blocks((16, 16), (1, 32)),
    # fused with projections
    "combine": Blocks((32, ANY), (16, 16)),
    "combine_backward": Blocks((32, ANY), (16, 16)),
    "gather_from_a": Blocks((32, ANY), (32, ANY)),
    "gather_from_x": Blocks((64, ANY), (32, ANY)),
    "block_bwd_gather": Blocks((64, 64), (32, ANY)),
    "block_bwd_gather_full_c": Blocks((64, ANY), (32, ANY)),
    "block_bwd_distribute": Blocks((64, ANY), (32, ANY)),
    "project_distribute": Blocks((64, ANY), (32, ANY)),
    "project_distribute_blocks": Blocks((64, 64), (32, ANY)),
    "outer_product": Blocks((64, 256), (64, 128), walks="m"),
    "weight_gradients": Blocks((32, 32), (32, 32)),
}
IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {}  # if not "pointers" alone
CORE = list(BLOCKS)[:7]
# Rules: entries where no table has one. In float32 and float64, fused kernels run only interpreted,
# and in tests.
STATISTICS = {"position_lse": Entry(64, 4, 1)}
INTERPRETED = Entry(32, 4, 1)


def blocks(kernel: str, tile_class: str, features: int, descriptors: int) -> tuple[int, int]:
    """``(block_m, block_n)`` of a kernel, the largest if it walks."""
    least, (m, n, _) = SMALLEST[tile_class], BLOCKS[kernel]
    block_m = min(_power(features, max(m[0], least)), m[1])
    block_n = min(_power(descriptors, max(n[0], least)), n[1])
    if kernel == "gather_from_x":
        block_n = min(block_n, max(32, LARGEST_G_TILE["half"] ** 2 // block_m))
    return block_m, block_n


def _walked(kernel, tile_class, features, descriptors) -> Iterator[tuple[int, int]]:
    """The block sizes to look up, in order."""
    m, n = blocks(kernel, tile_class, features, descriptors)
    walks = BLOCKS[kernel].walks
    for block_n in _halves(n) if "n" in walks else [n]:
        for block_m in _halves(m) if "m" in walks else [m]:
            yield block_m, block_n


def _halves(size):
    while size >= 16:
        yield size
        size //= 2


def _power(size, least):
    """The smallest power of two that holds ``size``, but not below ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def g_fits_one_tile(x, c_m, c_n):
    """Whether one program can hold all of G."""
    return max(c_m, c_n) <= LARGEST_G_TILE[POLICIES[x.dtype].tile_class]


def channels_fit(features, descriptors):
    """Whether ``project_distribute`` keeps a tile of X, with all its channels, between products."""
    return _power(features, 64) * _power(descriptors, 32) <= LARGEST_G_TILE["half"] ** 2


def packed_cols(heads, c_n):
    """(heads, n of a head) in a tile with the full n of all heads: powers of two."""
    head_block = _power(heads, 1)
    return head_block, max(_power(c_n, 1), 32 // head_block)


def packed(heads, c_n, block_n):
    """Whether a tile of all heads has no gaps between them."""
    return heads == 1 or c_n == block_n


# --- the lookup -----------------------------------------------------------------------------------


def tile(
    kernel: str, x: torch.Tensor, features: int, descriptors: int, variant: str = PLAIN
) -> Tile:
    """The tile of a kernel for tensors like x, with these features (or channels) and n.

    Raises:
        KeyError: no tile of the kernel fits (see ``fits``).
    """
    found = _of(kernel, x, features, descriptors, variant)
    if found is None:
        found = _rule(kernel, POLICIES[x.dtype].tile_class, features, descriptors)
    if found is None:
        raise KeyError(
            f"{kernel} has no tile for {features} features and {descriptors} descriptors"
        )
    return found


def fits(kernel: str, x: torch.Tensor, features: int, descriptors: int) -> bool:
    """Whether a kernel has a tile, which spills no more than its note says.

    With a mask, or rows of odd length, some spill more; results do not change.
    """
    return _of(kernel, x, features, descriptors, PLAIN) is not None


def _of(kernel, x, features, descriptors, variant):
    device = x.device
    facts = architecture(device), gpu(device)
    return find(kernel, POLICIES[x.dtype].tile_class, features, descriptors, variant, *facts)


@functools.lru_cache(maxsize=4096)
def find(
    kernel: str,
    tile_class: str,
    features: int,
    descriptors: int,
    variant: str,
    arch: str,
    gpu_name: str = "",
) -> Tile | None:
    """The entry tuned on the GPU ``gpu_name``, if given, else the one of its architecture."""
    sizes = list(_walked(kernel, tile_class, features, descriptors))
    tables = tuned(gpu_name), shipped(arch)
    for wanted in dict.fromkeys((variant, variant.removesuffix(FEW), PLAIN)):
        for block in sizes:
            key = Key(kernel, wanted, tile_class, *block)
            for table in tables:
                if key in table:
                    return _tile(key, table[key])
    return None


def _rule(kernel, tile_class, features, descriptors):
    entry = STATISTICS.get(kernel)
    if entry is None and tile_class != "half" and kernel not in CORE and kernel != "full_n":
        entry = INTERPRETED
    key = Key(kernel, PLAIN, tile_class, *blocks(kernel, tile_class, features, descriptors))
    return None if entry is None else _tile(key, entry)


def _tile(key, entry):
    return Tile(key.block_m, key.block_n, *entry[:-1])


def forget() -> None:
    """Reads tuned tables again."""
    find.cache_clear()
    tuned.cache_clear()


# --- the tables -----------------------------------------------------------------------------------


@functools.cache
def shipped(arch: str) -> Table:
    """The table of an architecture."""
    names = "wide", arch
    return {k: e for name in names for k, e in entries(_read(SHIPPED / f"{name}.json")).items()}


@functools.cache
def tuned(gpu_name: str) -> Table:
    """Entries tuned on a GPU: a table in the user's folder takes precedence over a shipped one.

    A table that cannot be read, is of another version of Triton, or has an entry that no kernel
    could take is left out, with one warning.
    """
    found: dict[Key, Entry] = {}
    for path in tuned_files(gpu_name):
        import triton  # nothing else here needs it

        try:
            table = _read(path)
            for name, own in (("gpu", gpu_name), ("triton", triton.__version__)):
                if table[name] != own:
                    raise ValueError(f"its {name} is {table[name]!r}, and not {own!r}")
            found |= entries(table)
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"da_triton ignores the tuned tiles in {path}: {error}. The tiles of the "
                "architecture are used; `python -m bench tune` measures and writes the file again.",
                stacklevel=2,
            )
    return found


def tuned_files(gpu_name: str) -> list[Path]:
    """The existing tables of a GPU; later ones take precedence."""
    if not gpu_name:
        return []
    paths = [SHIPPED / "tuned" / file_name(gpu_name)]
    with contextlib.suppress(RuntimeError):  # there is no home folder
        paths.append(folders.tiles() / file_name(gpu_name))
    return [path for path in paths if os.path.exists(path)]


def file_name(gpu_name: str) -> str:
    """Name of the file that holds a GPU's table."""
    return re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") + ".json"


@functools.cache
def gpu(device: torch.device) -> str:
    """The name of a GPU; empty without one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def _read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def entries(table: Mapping[str, Any]) -> dict[Key, Entry]:
    """The entries of a file's contents.

    Raises:
        ValueError, KeyError, TypeError: one of them is not an entry, or occurs twice.
    """
    if table["columns"] != COLUMNS:
        raise ValueError(f"its columns are {table['columns']}, and not {COLUMNS}")
    found: dict[Key, Entry] = {}
    for row in table["tiles"]:
        key, entry = Key(*row[:5]), Entry(*row[5:])
        sizes = key.block_m, key.block_n, entry.block_l
        powers = all(type(s) is int and s >= 16 and s & (s - 1) == 0 for s in sizes)
        options = entry.num_warps in (1, 2, 4, 8, 16) and entry.num_stages in range(1, 9)
        options &= type(entry.ctas_per_sm) is int and 1 <= entry.ctas_per_sm <= 16
        options &= entry.impl in IMPLEMENTATIONS.get(key.kernel, ("pointers",))
        if key.kernel not in BLOCKS or not powers or not options or key in found:
            raise ValueError(f"no kernel could take its entry {row}, or it occurs twice")
        found[key] = entry
    return found


def text(header: Mapping[str, str], table: Table) -> str:
    """A file's contents: one entry per line, sorted."""
    rows = [json.dumps([*key, *entry], ensure_ascii=False) for key, entry in sorted(table.items())]
    head = json.dumps({**header, "columns": COLUMNS}, ensure_ascii=False)[:-1]
    return f'{head}, "tiles": [\n' + ",\n".join(rows) + "\n]}\n"
