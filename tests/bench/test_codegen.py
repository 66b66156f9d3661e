import importlib.metadata
import subprocess
import sys

import pandas as pd
import pytest

from bench import cli as bench
from bench import codegen
from bench.codegen import survey, tiles
from bench.codegen.compile import read_hip
from bench.environment import ROOT
from bench.model import tiles as ranking
from da_triton.runtime.tiles import shipped

TRITON = importlib.metadata.version("triton")
ROW = {
    "arch": "sm_90", "kernel": "gather", "dtype": "bfloat16", "layout": "nchw", "L": 196, "C": 0,
    "m": 64, "n": 64, "call": "", "flags": "ALIGN=4", "products": 1, "blocks": "M=64 N=64 L=64",
    "warps": 8, "stages": 3, "registers": 200, "spills": 0, "shared": 1024, "matrix": 8, "wgmma": 4,
    "copy_bytes": 16, "load_bytes": 16, "loads_2": 1, "triton": TRITON,
    "digest": "01234567890123e4",
}  # fmt: skip
DIGEST = ROW["digest"]


def row(arch="sm_90", **others):
    return ROW | {"arch": arch} | others


def test_file_comes_back_and_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [row("sm_90", L=784), row("gfx942"), row("sm_90"), row("sm_80")]
    codegen.write(rows, tmp_path / "one.csv")
    codegen.write(reversed(rows), tmp_path / "new" / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "new" / "two.csv").read_bytes()
    assert codegen.read(tmp_path / "one.csv") == [rows[3], rows[2], rows[0], rows[1]]


def test_committed_file_is_as_it_would_be_written(tmp_path):
    codegen.write(codegen.read(), tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == codegen.KEPT.read_bytes()


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({}, {"spills": 3}, "spills 0 -> 3"),
        ({}, {"shared": 2048}, "shared 1024 -> 2048"),
        ({}, {"registers": 209}, "registers 200 -> 209"),
        ({}, {"copy_bytes": 8}, "copy_bytes 16 -> 8"),
        ({}, {"loads_2": 2}, "loads_2 1 -> 2"),
        ({}, {"wgmma": 0}, "wgmma 4 -> 0"),
        ({}, {"matrix": 0}, "matrix 8 -> 0"),
        ({"copy_bytes": 0}, {"copy_bytes": 0, "load_bytes": 8}, "load_bytes 16 -> 8"),
        ({"copy_bytes": 0}, {"load_bytes": 4}, None),  # a copy takes the load's place
        ({}, {"registers": 208, "shared": 512, "wgmma": 2, "blocks": "M=64 N=64 L=32"}, None),
        ({}, {"spills": 3, "flags": "ALIGN=2"}, None),  # another program
        ({}, {"spills": 3, "triton": "3.7.1"}, None),
        ({}, {"spills": 3, "arch": "sm_80"}, None),
    ],
)
def test_what_got_worse_is_said_with_its_row(then, now, said):
    found = codegen.worse([row(**now)], [row(**then)])
    place = f"sm_90 gather bfloat16 nchw L=196 m=64 n=64 [ALIGN=4] {ROW['blocks']}"
    assert found == ([f"{place}: {said}"] if said else [])


def test_summary_has_a_line_for_each_architecture_and_kernel():
    rows = [row(), row(L=784, registers=255, blocks="M=32"), row("gfx942"), row(L=49, spills=7)]
    lines = [
        line.strip("|").replace("|", "").split() for line in codegen.summary(rows).splitlines()
    ]
    assert lines[2:] == [
        ["sm_90", "gather", "3", "2", "255", "0", "7", "1024", "16"],
        ["gfx942", "gather", "1", "1", "200", "0", "0", "1024", "16"],
    ]


@pytest.fixture
def compiled(monkeypatch):
    """A survey without compilation; asked for which architectures, knowing which programs."""
    asked = []

    def surveyed(arch, known):
        asked.append((arch, list(known)))
        left = {"triton", *(codegen.FIGURES if DIGEST in known else ())}
        yield {k: x for k, x in row(arch, call="extra").items() if k not in left}

    monkeypatch.setattr(codegen, "surveyed", surveyed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return asked


def test_command_writes_and_prints(compiled, tmp_path, capsys):
    out = tmp_path / "codegen.csv"
    assert bench.main(["codegen", "--out", str(out)]) == 0
    assert compiled == [(arch, []) for arch in codegen.ORDER]
    assert list(pd.read_csv(out)["arch"]) == list(codegen.ORDER)
    printed = capsys.readouterr().out
    assert "5 rows" in printed
    assert "worse" not in printed
    assert all(f"{arch}: 1 programs, 1 of them compiled" in printed for arch in codegen.ORDER)


def test_new_programs_alone_are_compiled_and_replace_the_rows_of_their_architecture(
    compiled, tmp_path, capsys
):
    """One that is known keeps its figures, and the Triton they are of, under its new name."""
    out = tmp_path / "codegen.csv"
    others = [row("sm_80"), row("gfx942", call="extra", shared=2, digest="0b")]
    codegen.write([*others, row(registers=17, triton="3.7.1")], out)
    assert bench.main(["codegen", "--arch", "sm_90", "--arch", "gfx942", "--out", str(out)]) == 0
    assert compiled == [("sm_90", [DIGEST]), ("gfx942", ["0b"])]
    assert codegen.read(out) == [
        row("sm_80"),
        row(call="extra", registers=17, triton="3.7.1"),
        row("gfx942", call="extra"),
    ]
    printed = capsys.readouterr().out
    assert printed.count("worse: ") == 1
    assert "shared 2 -> 1024" in printed


def test_interpreted_process_cannot_compile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.main(["codegen", "--out", str(tmp_path / "o.csv")]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_bench_needs_no_triton():
    """In a process where Triton is not to be found."""
    program = (
        "import sys, importlib.util\n"
        "sys.modules['triton'] = None\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
        "from bench.__main__ import main\n"
        "sys.exit(main(['codegen']))\n"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2, ran.stderr
    assert "Triton is not installed" in ran.stderr


def test_survey_that_fails_says_why():
    with pytest.raises(RuntimeError, match="sm_7"):
        list(codegen.surveyed("sm_7"))


HIP = """
    v_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
    global_store_dwordx4 v[0:1], v[2:5], off
    .sgpr_spill_count: 1
    .vgpr_count:     128
    .vgpr_spill_count: 2
"""


@pytest.mark.parametrize(
    ("line", "widths"),
    [
        ("global_load_dwordx4 v[0:3], v[4:5], off", (0, 16, 0)),
        ("global_load_dword v1, v[4:5], off", (0, 4, 0)),
        ("buffer_load_dwordx4 v[8:11], v0, s[0:3], 0 offen", (0, 16, 0)),
        ("buffer_load_ushort v8, v0, s[0:3], 0 offen", (0, 2, 1)),
        ("global_load_short_d16_hi v8, v[0:1], off", (0, 2, 1)),
        ("buffer_load_dwordx4 v0, s[0:3], 0 offen lds", (16, 0, 0)),
        ("global_load_lds_dwordx4 v[0:1], off", (16, 0, 0)),
    ],
)
def test_widths_of_loads_on_amd(line, widths):
    found = read_hip({"amdgcn": f"{HIP}    {line}\n"})
    assert found == codegen.Code(128, 3, 0, 1, 0, *widths)


@pytest.mark.parametrize("arch", codegen.ORDER)
def test_survey_has_every_shipped_block_of_the_fused_kernels_and_every_full_n(arch):
    listed = {(name, *block) for name, kernel in survey.KERNELS.items() for block in kernel.blocks}
    fused = {(k.kernel, *k[3:]) for k in shipped(arch) if k.kernel in survey.KERNELS}
    sizes = {k.block_n for k in shipped(arch) if k.kernel == "full_n"}
    assert listed >= fused
    assert sizes == {n for n, _ in survey.SQUARES}


def test_clean_candidates_are_ranked_by_modelled_time(monkeypatch):
    """In the geometric mean of passes, of which none may be much slower; the present tile else."""
    search = tiles.Search("sm_90", "outer_product", modelled=True)
    spilling, uneven, better, *_ = search.candidates((64, 64), None)
    modelled = {None: (2.0, 2.0), spilling: (0.5, 0.5), uneven: (0.5, 2.1), better: (1.8, 1.9)}
    monkeypatch.setattr(
        ranking, "times",
        lambda kernel, blocks, entry, gpu: dict(enumerate(modelled.get(entry, (2.0, 2.0)))),
    )  # fmt: skip

    def spills(blocks, candidate, wanted):
        return 7 if wanted[0].length == codegen.ODD else float(candidate == spilling)

    monkeypatch.setattr(search, "spills", spills)
    assert search.fastest((64, 64)) == (better, "modelled; 7 spills at odd L")
    modelled[better] = modelled[None]
    ships = tiles.tiles.shipped("sm_90")["outer_product", "plain", "half", 64, 64]
    assert search.fastest((64, 64)) == (ships[:4], ships.note)


def test_tile_may_spill_at_an_odd_length_and_has_to_compile_there(monkeypatch):
    search = tiles.Search("sm_90", "outer_product")
    first, second, *_ = search.candidates((64, 64), None)

    def spills(blocks, candidate, wanted):
        if wanted[0].length != codegen.ODD:
            return 0
        return 0.5 if candidate == first else 7  # 0.5: it needs too much shared memory, or the like

    monkeypatch.setattr(search, "spills", spills)
    assert search.best((64, 64), None, {}) == (second, "7 spills at odd L")
