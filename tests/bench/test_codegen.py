import csv
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import cli as bench
from bench.codegen import cli, table

ROOT = Path(cli.__file__).parents[2]
SURVEYED = {
    "kernel": "gather", "dtype": "bfloat16", "layout": "nchw", "L": 196, "C": 0, "m": 64, "n": 64,
    "call": "", "flags": "ALIGN=4", "products": 1, "blocks": "M=64 N=64 L=64", "warps": 8,
    "stages": 3, "registers": 200, "spills": 0, "shared": 1024, "matrix": 8, "wgmma": 4,
    "copies": {"8": 4, "16": 2}, "loads": {"2": 1, "16": 3}, "digest": "0a",
}  # fmt: skip

FIGURES = {*table.FIGURES, "copies", "loads"}


def row(arch="sm_90", triton="3.8.0", **others):
    return table.row(arch, SURVEYED, triton) | others


def test_row_holds_the_widest_copy_and_load_and_counts_loads_of_two_bytes():
    made = row()
    assert (made["copy_bytes"], made["load_bytes"], made["loads_2"]) == (16, 16, 1)
    assert set(made) == set(table.COLUMNS)


def test_file_comes_back_and_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = [row("sm_90", L=784), row("gfx942"), row("sm_90"), row("sm_80")]
    table.write(rows, tmp_path / "one.csv")
    table.write(reversed(rows), tmp_path / "new" / "two.csv")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "new" / "two.csv").read_bytes()
    again = table.read(tmp_path / "one.csv")
    assert [(x["arch"], x["L"]) for x in again] == [
        ("sm_80", 196), ("sm_90", 196), ("sm_90", 784), ("gfx942", 196),
    ]  # fmt: skip
    assert again[1] == row()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"spills": 3}, "spills 0 -> 3"),
        ({"shared": 2048}, "shared 1024 -> 2048"),
        ({"registers": 209}, "registers 200 -> 209"),
        ({"copy_bytes": 8}, "copy_bytes 16 -> 8"),
        ({"loads_2": 2}, "loads_2 1 -> 2"),
        ({"wgmma": 0}, "wgmma 4 -> 0"),
        ({"matrix": 0}, "matrix 8 -> 0"),
        ({"flags": "ALIGN=2", "spills": 3}, None),  # another program
        ({"registers": 208, "shared": 512, "wgmma": 2, "blocks": "M=64 N=64 L=32"}, None),
    ],
)
def test_what_is_worse_is_told_with_its_row(change, told):
    found = table.worse([row(**change)], [row()])
    if told is None:
        assert found == []
    else:
        assert found[0].startswith("sm_90 gather bfloat16 nchw L=196 m=64 n=64")
        assert found[0].endswith(told)


def test_loads_count_where_nothing_is_copied_asynchronously():
    then = row(copy_bytes=0)
    assert table.worse([row(copy_bytes=0, load_bytes=8)], [then])
    assert not table.worse([row(copy_bytes=16, load_bytes=4)], [then])


def test_known_program_keeps_its_figures_under_its_new_name():
    fresh = {k: v for k, v in SURVEYED.items() if k not in ("registers", "copies", "loads")}
    kept = row(registers=17, call="masked")
    assert table.known("sm_90", {**fresh, "call": "extra"}, kept) == row(registers=17, call="extra")


def test_other_versions_and_architectures_are_not_compared():
    assert table.worse([row(spills=9)], [row(triton="3.7.1")]) == []
    assert table.worse([row(spills=9)], [row("sm_80")]) == []


def test_summary_has_a_line_for_each_architecture_and_kernel():
    rows = [row(), row(L=784, registers=255, blocks="M=32"), row("gfx942"), row(L=49, spills=7)]
    lines = table.summary(rows).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:7] == ["sm_90", "gather", "3", "2", "255", "7", "(odd"]
    assert lines[2].split()[:6] == ["gfx942", "gather", "1", "1", "200", "0"]


@pytest.fixture
def compiled(monkeypatch):
    """A survey without compilation; asked for which architectures, knowing which programs."""
    asked = []

    def surveyed(arch, known):
        asked.append((arch, list(known)))
        figures = () if SURVEYED["digest"] in known else SURVEYED
        yield {k: v for k, v in SURVEYED.items() if k in figures or k not in FIGURES}

    monkeypatch.setattr(cli, "surveyed", surveyed)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return asked


def test_command_writes_and_prints(compiled, tmp_path, capsys):
    out = tmp_path / "codegen.csv"
    assert bench.main(["codegen", "--out", str(out)]) == 0
    assert compiled == [(arch, []) for arch in table.ORDER]
    with out.open() as file:
        assert [line["arch"] for line in csv.DictReader(file)] == list(table.ORDER)
    printed = capsys.readouterr().out
    assert "5 rows" in printed
    assert "worse" not in printed
    assert all(arch in printed for arch in table.ORDER)


def test_programs_in_the_file_are_not_compiled_again(compiled, tmp_path):
    out = tmp_path / "codegen.csv"
    table.write([row("sm_90", shared=1), row("gfx942", shared=2, digest="0b")], out)
    assert bench.main(["codegen", "--arch", "sm_90", "--arch", "gfx942", "--out", str(out)]) == 0
    assert compiled == [("sm_90", ["0a"]), ("gfx942", ["0b"])]
    assert [(x["arch"], x["shared"]) for x in table.read(out)] == [("sm_90", 1), ("gfx942", 1024)]


def test_command_tells_what_got_worse(compiled, tmp_path, capsys):
    out = tmp_path / "codegen.csv"
    table.write([row(shared=1, digest="0b", triton=importlib.metadata.version("triton"))], out)
    assert bench.main(["codegen", "--arch", "sm_90", "--out", str(out)]) == 0
    assert "shared 1 -> 1024" in capsys.readouterr().out


def test_one_architecture_replaces_its_rows_only(compiled, tmp_path):
    out = tmp_path / "codegen.csv"
    table.write([row("sm_80", shared=1), row("sm_90", shared=1, digest="0b")], out)
    assert bench.main(["codegen", "--arch", "sm_90", "--out", str(out)]) == 0
    assert [(x["arch"], x["shared"]) for x in table.read(out)] == [("sm_80", 1), ("sm_90", 1024)]


def test_interpreted_process_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.main(["codegen", "--out", str(tmp_path / "o.csv")]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert not (tmp_path / "o.csv").exists()


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["codegen", "--help"])
    assert stopped.value.code == 0
    assert "python -m bench codegen --arch sm_90" in capsys.readouterr().out


def test_bench_needs_no_triton(tmp_path):
    """Import and refusal, in a process where Triton is not to be found."""
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


def test_survey_that_fails_is_told():
    with pytest.raises(RuntimeError, match="sm_7"):
        list(cli.surveyed("sm_7"))


READ_HIP = """
import json
from bench.codegen.compiler import read_hip
text = '''
\\tglobal_load_dwordx4 v[0:3], v[4:5], off
\\tglobal_load_dword v1, v[4:5], off
\\tbuffer_load_dwordx4 v[8:11], v0, s[0:3], 0 offen
\\tbuffer_load_ushort v8, v0, s[0:3], 0 offen
\\tglobal_load_short_d16_hi v8, v[0:1], off
\\tbuffer_load_dwordx4 v0, s[0:3], 0 offen lds
\\tglobal_load_lds_dwordx4 v[0:1], off
\\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\\tglobal_store_dwordx4 v[0:1], v[2:5], off
    .sgpr_spill_count: 1
    .vgpr_count:     128
    .vgpr_spill_count: 2
'''
print(json.dumps(read_hip({"amdgcn": text})))
"""


def test_widths_of_loads_on_amd():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", READ_HIP]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {
        "registers": 128, "spills": 3, "matrix": 1, "wgmma": 0,
        "loads": {"16": 2, "4": 1, "2": 2}, "copies": {"16": 2},
    }  # fmt: skip
