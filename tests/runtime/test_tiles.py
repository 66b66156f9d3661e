"""The tables of tiles, the one lookup, and which table a GPU takes."""

import json
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import triton

from da_triton import ops
from da_triton.kernels import project_gather, weight_gradients
from da_triton.ops.triton import core
from da_triton.precision import POLICIES
from da_triton.runtime import folders, launch, tiles, verdicts
from da_triton.runtime.tiles import ARCHITECTURES, BLOCKS, PLAIN, Entry, Key

GPU = "NVIDIA Test (80GB)"
KEY = Key("gather_from_x", PLAIN, "half", 64, 32)
X = torch.empty(1, dtype=torch.bfloat16)
each_architecture = pytest.mark.parametrize("arch", ARCHITECTURES)


def found(kernel, variant=PLAIN, arch="sm_90", gpu="", sizes=(64, 32)):
    return tiles.find(kernel, "half", *sizes, variant, arch, gpu)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of tuned tables beside empty ones that ship."""
    monkeypatch.setenv("DA_TRITON_TILES", str(tmp_path / "own"))
    monkeypatch.setattr(tiles, "SHIPPED", tmp_path)
    for name in ("wide", "sm_90"):
        (tmp_path / f"{name}.json").write_text(tiles.text({}, {}))
    tiles.shipped.cache_clear()
    yield tmp_path / "own"
    tiles.shipped.cache_clear()
    launch.forget()


def put(folder, entries, **header):
    """Writes a table of GPU, and reads it."""
    path = folder / tiles.file_name(GPU)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tiles.text({"gpu": GPU, "triton": triton.__version__, **header}, entries))
    launch.forget()
    return path


# --- shipped tables -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "wide"])
def test_shipped_file_is_as_its_entries_are_written(name):
    """Sorted, one entry per line, each valid, none twice."""
    text = (tiles.SHIPPED / f"{name}.json").read_text(encoding="utf-8")
    table = json.loads(text)
    entries = tiles.entries(table)
    header = {} if name == "wide" else {"architecture": name}
    assert text == tiles.text(header, entries)
    assert {entry.impl for entry in entries.values()} == {"pointers"}


@each_architecture
def test_every_kernel_has_a_tile_on_every_architecture(arch):
    kernels = {key.kernel for key in tiles.shipped(arch)}
    spared = set() if arch == "sm_90" else {"block_bwd_gather_full_c"}  # block_bwd_gather does it
    assert kernels | set(tiles.STATISTICS) == set(BLOCKS) - spared


@each_architecture
def test_variants_have_a_plain_entry_which_is_another(arch):
    table = tiles.shipped(arch)
    for key, entry in table.items():
        if key.variant not in (PLAIN, "gradient"):
            plain = table[key._replace(variant=PLAIN)]
            assert plain[:4] != entry[:4]


@each_architecture
def test_kernels_of_the_core_have_a_tile_for_any_size_and_dtype(arch):
    for policy in POLICIES.values():
        largest = tiles.LARGEST_G_TILE[policy.tile_class]
        for kernel in tiles.CORE:
            most = 2048 if BLOCKS[kernel].walks else largest
            for sizes in ((1, 1), (1, most), (most, 1), (most, most), (19, 24)):
                assert tiles.find(kernel, policy.tile_class, *sizes, PLAIN, arch) is not None


@each_architecture
def test_full_n_tiles_come_in_pairs_for_every_architecture(arch):
    """Forward and backward up to n = 512: where one is missing, the other is never looked up."""
    keys = [k for k in tiles.shipped(arch) if k[:1] + k[2:3] == ("full_n", "half")]
    keys = [k for k in keys if not k.variant.endswith(tiles.FEW)]
    expected = {(v, n) for v in (PLAIN, "gradient") for n in (32, 64, 128, 256, 512)}
    assert {(k.variant, k.block_n) for k in keys} == expected
    assert len(keys) == len(expected)


def test_importing_the_package_reads_no_table():
    code = (
        "import sys, builtins, io; seen = []; sys.addaudithook(lambda e, a: e == 'open' and "
        "seen.append(str(a[0]))); import da_triton, da_triton.ops.triton.core; "
        "print([p for p in seen if p.endswith('.json') and 'tiles' in p])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


# --- the lookup -----------------------------------------------------------------------------------


def test_sizes_are_rounded_up_to_a_block():
    assert found("gather_from_x", sizes=(40, 19)) == found("gather_from_x")
    assert found("gather", sizes=(2000, 33))[:2] == (128, 64)  # it walks over features
    assert found("gather_from_x", sizes=(2000, 33)) is None
    assert found("gather_from_x", sizes=(256, 512)).block_n == 64  # of all channels, smaller n


def test_fused_kernel_without_an_entry_has_no_tile():
    assert not tiles.fits("gather_from_x", X, 2000, 33)
    with pytest.raises(KeyError, match="no tile for 2000 features and 33 descriptors"):
        tiles.tile("gather_from_x", X, 2000, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_dtypes_have_a_rule_for_fused_kernels_and_no_route_takes_them(dtype):
    x = X.to(dtype)
    assert tiles.tile("gather_from_x", x, 64, 32) == (64, 32, *tiles.INTERPRETED[:-1])
    assert not tiles.fits("gather_from_x", x, 64, 32)


def test_tuned_over_shipped_over_rule(folder):
    statistics = Key("position_lse", PLAIN, "half", 16, 32)
    shipped = {KEY: Entry(128, 8, 3), KEY._replace(variant="mask"): Entry(64, 8, 3)}
    (folder.parent / "sm_90.json").write_text(tiles.text({}, shipped))
    put(folder, {KEY: Entry(32, 4, 1, note="1.00 us"), statistics: Entry(32, 8, 1)})
    assert found(KEY.kernel)[2:5] == (128, 8, 3)
    assert found(KEY.kernel, gpu=GPU)[2:5] == (32, 4, 1)
    assert found(KEY.kernel, "mask", gpu=GPU)[2:5] == (64, 8, 3)  # has its own
    assert found(KEY.kernel, "v", gpu=GPU)[2:5] == (32, 4, 1)  # as plain
    assert found("position_lse", gpu=GPU)[2:5] == (32, 8, 1)
    assert tiles.tile("position_lse", X, 64, 32)[2:5] == tiles.STATISTICS["position_lse"][:3]
    put(folder, {KEY._replace(variant="mask"): Entry(16, 4, 1)})
    assert found(KEY.kernel, "mask", gpu=GPU)[2:5] == (16, 4, 1)
    assert found(KEY.kernel, gpu=GPU)[2:5] == (128, 8, 3)


def test_rows_take_their_tile_where_there_is_one(folder):
    own = KEY._replace(variant=tiles.ALIGNED)
    shipped = {KEY: Entry(128, 8, 3), own: Entry(64, 4, 3, 2)}
    (folder.parent / "sm_90.json").write_text(tiles.text({}, shipped))
    launch.forget()
    w = torch.empty(32, 64, dtype=torch.bfloat16)
    found = {}
    for length in (256, 196, 49):
        ready = project_gather._gather_from_x(w.new_empty(2, 64, length), w, None)
        found[length] = ready.options["num_warps"]
    assert found == {256: 4, 196: 8, 49: 8}


def test_user_folder_over_tuned_tables_that_ship(folder):
    other = KEY._replace(block_n=64)
    put(tiles.SHIPPED / "tuned", {KEY: Entry(16, 4, 1), other: Entry(16, 8, 1)})
    put(folder, {KEY: Entry(64, 4, 2)})
    assert tiles.tuned(GPU) == {KEY: Entry(64, 4, 2), other: Entry(16, 8, 1)}
    assert tiles.tuned("Another GPU") == {}


def test_tile_of_a_gpu_is_the_tuned_one(folder, monkeypatch):
    put(folder, {KEY: Entry(16, 2, 1, 3)})
    monkeypatch.setattr(tiles, "gpu", lambda device: GPU)
    assert tiles.tile(KEY.kernel, X, 64, 32) == (64, 32, 16, 2, 1, 3, "pointers")


def test_verdicts_are_of_the_tiles_that_were_tuned(folder, monkeypatch):
    monkeypatch.setattr(tiles, "gpu", lambda device: GPU)
    found = set()
    for warps in (2, 4):
        put(folder, {KEY: Entry(16, warps, 1)})
        found.add(verdicts.context.__wrapped__(X.device)["kernels"])
    assert len(found) == 2


def test_folder_of_tuned_tables(monkeypatch):
    monkeypatch.delenv("DA_TRITON_TILES", raising=False)
    monkeypatch.setenv("DA_TRITON_CACHE_DIR", "/cache")
    assert str(folders.tiles()) == "/cache/tiles"
    monkeypatch.setenv("DA_TRITON_TILES", "/tables")
    assert str(folders.tiles()) == "/tables"
    assert tiles.file_name(GPU) == "nvidia-test-80gb.json"


ROW = ["gather", PLAIN, "half", 64, 64, 64, 4, 2, 2, "pointers", ""]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gpu": "NVIDIA Other"}, "its gpu is 'NVIDIA Other'"),
        ({"triton": "1.0"}, "its triton is '1.0'"),
        ({"columns": ["kernel"]}, "its columns are"),
        ({"tiles": 3}, "not iterable"),
        ({"tiles": [ROW, ROW]}, "occurs twice"),
        ({"tiles": [ROW[:3]]}, "missing"),
        ({"tiles": [["unknown", *ROW[1:]]]}, "'unknown'"),
        *(
            ({"tiles": [[*ROW[:at], value, *ROW[at + 1 :]]]}, "no kernel could take")
            for at, value in zip(
                (3, 4, 5, 5, 6, 7, 8, 8, 8), (48, "a", 48, 8, 5, 0, 0, 1.5, 33), strict=True
            )
        ),
        (None, "Expecting value"),
    ],
)
def test_tuned_table_that_makes_no_sense_is_ignored_with_one_warning(folder, change, expected):
    path = put(folder, {KEY: Entry(64, 4, 2)})
    text = "nonsense" if change is None else json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(text)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert [tiles.tuned(GPU) for _ in range(2)] == [{}, {}]
    assert len(seen) == 1
    assert "da_triton ignores the tuned tiles in" in str(seen[0].message)
    assert expected in str(seen[0].message)


def test_the_tile_names_the_version_of_a_kernel():
    pointers, tma = object(), object()
    known = {"pointers": pointers, "tma": tma}
    tile = tiles.Tile(64, 32, 64, 4, 2, 1)
    assert launch.implementation(pointers, tile) is pointers
    assert launch.implementation(known, tile) is pointers
    assert launch.implementation(known, tile._replace(impl="tma")) is tma
    with pytest.raises(ValueError, match="names the implementation 'cpp', and the kernel has 'poi"):
        launch.implementation(known, tile._replace(impl="cpp"))


# --- which table a GPU takes ----------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Says that there is a GPU with a compute capability, or an AMD one by its name."""

    def on_gpu(kind):
        amd = isinstance(kind, str)
        properties = type("Properties", (), {"gcnArchName": f"{kind}:sramecc+:xnack-"})
        monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: kind)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for cached in (tiles.architecture, tiles._table_for):
            cached.cache_clear()
        return torch.device("cuda", 0)

    yield on_gpu
    for cached in (tiles.architecture, tiles._table_for):
        cached.cache_clear()


OWN = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90", (10, 0): "sm_100", "gfx942": "gfx942"}


@pytest.mark.parametrize("kind", OWN)
def test_gpus_whose_code_was_compiled(on_gpu, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiles.architecture(on_gpu(kind)) == OWN[kind]


@pytest.mark.parametrize(
    ("kind", "arch"),
    [
        ((8, 7), "sm_80"), ((8, 6), "sm_89"), ((8, 8), "sm_89"), ((12, 0), "sm_89"),
        ((12, 1), "sm_89"), ((9, 1), "sm_90"), ((10, 3), "sm_100"), ((11, 0), "sm_100"),
        ((13, 0), "sm_89"), ("gfx90a", "gfx942"), ("gfx950", "gfx942"),
    ],
)  # fmt: skip
def test_other_gpus_take_a_table_of_their_family_with_one_warning(on_gpu, kind, arch):
    device = on_gpu(kind)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert tiles.architecture(device) == arch
        assert tiles.architecture(torch.device("cuda", 1)) == arch
    (warned,) = seen
    named = kind if isinstance(kind, str) else f"compute capability {kind[0]}.{kind[1]}"
    assert f"never compiled for {named}. They take the tiles of {arch}" in str(warned.message)
    for command in ("python -m da_triton.check", "python -m bench tune"):
        assert command in str(warned.message)


@pytest.mark.parametrize("kind", ["gfx1100", "gfx1201", "gfx1030"])
def test_rdna_has_no_table(on_gpu, kind, monkeypatch):
    """So ``auto`` takes PyTorch operations there."""
    device = on_gpu(kind)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    x = type("OnGpu", (), {"device": device, "dtype": torch.float16, "is_cuda": True})()
    reason = core.obstacle(x)
    assert f"{device} is {kind}" in reason
    assert ops.select("auto", x) is ops.TORCH
    with pytest.raises(RuntimeError, match="tiles for AMD's CDNA GPUs"):
        ops.select("triton", x)
    with pytest.raises(RuntimeError, match="tiles for AMD's CDNA GPUs"):
        tiles.architecture(device)


def test_interpreted_kernels_take_the_tiles_of_an_h200():
    assert tiles.architecture(torch.device("cpu")) == "sm_90"


def test_without_a_home_folder_the_shipped_tables_are_used(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DA_TRITON_TILES", raising=False)
    monkeypatch.delenv("DA_TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    assert tiles.tuned_files("") == tiles.tuned_files("NVIDIA H100") == []


def test_an_entry_for_an_implementation_that_a_kernel_lacks_is_rejected():
    row = [*ROW[:-2], "tma", ""]
    with pytest.raises(ValueError, match="no kernel could take"):
        tiles.entries({"columns": tiles.COLUMNS, "tiles": [row]})


@pytest.mark.parametrize(("channels", "rows", "block"), [(512, 768, 256), (256, 128, 128)])
def test_weight_gradients_take_large_tiles_where_there_are_several(channels, rows, block):
    """A single one would have a partial for every SM."""
    t, x = (torch.empty(2, c, 512, dtype=torch.bfloat16, device="meta") for c in (rows, channels))
    with (
        mock.patch.object(launch, "Launch") as made,
        mock.patch.object(launch, "num_sms", return_value=132),
    ):
        weight_gradients._outer(t, x)
    _, _, tile, _ = made.call_args.args
    assert (tile.block_m, tile.block_n) == (block, 128)
    per_split = made.call_args.kwargs["BLOCKS_PER_SPLIT"]
    assert per_split * tile.block_l >= weight_gradients.LEAST_POSITIONS
