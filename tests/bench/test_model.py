"""The model of one SM: instructions that it follows, its timing, kernels whose speed is known."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bench import model
from bench.environment import ROOT
from bench.model import machine, sass, warp
from bench.model.integers import OPERATIONS
from bench.model.machine import GPUS, H200
from bench.model.registers import Registers, number
from bench.model.sass import NO_BARRIER, Instruction
from bench.model.simulate import SM
from bench.model.warp import Access, Step
from bench.providers import LAYOUTS
from bench.workloads import WORKLOADS
from da_triton.planning import calibration

M32 = 0xFFFFFFFF


def instruction(text, stall=1, write=NO_BARRIER, read=NO_BARRIER, waits=(), address=0):
    guard, negated = None, False
    if text[0] == "@":
        guard, text = text[1:].split(" ", 1)
        guard, negated = guard.lstrip("!"), guard[0] == "!"
    op, _, rest = text.partition(" ")
    operands = tuple(sass.BETWEEN.split(rest)) if rest else ()
    return Instruction(address, guard, negated, op, operands, stall, write, read, waits)


def output(module, *arguments):
    """What a module of the model prints in a process that compiles."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=env, check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


# --- kernels that are known -----------------------------------------------------------------------


def test_public_kernels_are_modelled_within_fifteen_percent():
    rows = [json.loads(line) for line in output("bench.model.anchors").splitlines()]
    assert {row["anchor"] for row in rows} == {"GEMM", "copy"}
    for row in rows:
        least, most = row["published"]
        assert least / 1.15 <= row["modelled"] <= most * 1.15, row


def test_addresses_and_turns_of_a_compiled_kernel():
    """Loops turn as often, and accesses are where, Python says; banks conflict where they must."""
    rows = [json.loads(line) for line in output("support.followed").splitlines()]
    assert len(rows) == 4
    for row in rows:
        pid, columns, count = row["pid"], row["columns"], row["count"]
        first = pid // columns * 1000 + pid % columns * 128
        turns = -(-(count - pid) // columns) if pid < count else 0
        loads = [(first + 4096 * columns * i) * 4 for i in range(turns)]
        assert row["loads"] == loads
        assert row["sectors"] == [16] * turns  # 32 lanes of 16 bytes
        assert row["stores"] == [first * 4]
        assert not row["unknown"]


# --- instructions ---------------------------------------------------------------------------------

NEGATIVE = -5 & M32
CASES = [
    ("MOV R0, 0x7", {}, 7),
    ("IMAD R0, R1, R2, R3", {"R1": 3, "R2": M32, "R3": 5}, 2),
    ("IMAD.HI.U32 R0, R1, R2, R4", {"R1": 1 << 31, "R2": 6}, 3),
    ("IMAD.WIDE.U32 R0, R2, 0x10, R4", {"R2": M32, "R4": 1, "R5": 2}, (2 << 32) + 1 + 16 * M32),
    ("IMAD.WIDE R0, R2, 0x10, R4", {"R2": NEGATIVE}, -80 & (1 << 64) - 1),
    ("IMAD.MOV R0, RZ, RZ, -R2", {"R2": 5}, NEGATIVE),
    ("IMAD.IADD R0, R1, 0x1, -R2", {"R1": 5, "R2": 7}, -2 & M32),
    ("IADD3 R0, R1, -R2, R3", {"R1": 5, "R2": 7, "R3": 1}, M32),
    ("VIADD R0, R1, 0xffffffff", {"R1": 5}, 4),
    ("LEA R0, R1, R2, 0x3", {"R1": 5, "R2": 2}, 42),
    ("LEA.HI R0, R3, R2, RZ, 0x7", {"R3": M32, "R2": NEGATIVE}, (127 - 5) & M32),
    ("LEA.HI.SX32 R0, R1, R2, 0x4", {"R1": NEGATIVE, "R2": 2}, 1),
    ("SHF.R.S32.HI R0, RZ, 0x1, R1", {"R1": NEGATIVE}, -3 & M32),
    ("SHF.R.U32.HI R0, RZ, 0x1, R1", {"R1": NEGATIVE}, NEGATIVE >> 1),
    ("SHF.L.U32 R0, R1, 0x4, RZ", {"R1": 0xF0000001}, 0x10),
    ("SHF.L.U64.HI R0, R1, 0x4, R2", {"R1": 0xF0000001, "R2": 3}, 0x3F),
    ("SHF.R.U64 R0, R1, 0x4, R2", {"R1": 0x10, "R2": 3}, 0x30000001),
    ("LOP3.LUT R0, R1, 0xff, RZ, 0xc0, !PT", {"R1": 0x1234}, 0x34),
    ("LOP3.LUT R0, R1, R2, R3, 0xea, !PT", {"R1": 6, "R2": 3, "R3": 8}, 10),
    ("LOP3.LUT R0, R1, R2, RZ, 0xf0, !PT", {"R1": 6, "R2": None}, 6),  # R2 is not used
    ("PRMT R0, R1, 0x5410, R2", {"R1": 0x12345678, "R2": 0x9ABCDEF0}, 0xDEF05678),
    ("PRMT R0, R1, 0x8880, RZ", {"R1": 0x80}, 0xFFFFFF80),
    ("SGXT R0, R1, 0x8", {"R1": 0x80}, 0xFFFFFF80),
    ("SGXT.U32 R0, R1, 0x8", {"R1": 0x180}, 0x80),
    ("IABS R0, R1", {"R1": NEGATIVE}, 5),
    ("VIMNMX R0, R1, R2, PT", {"R1": NEGATIVE, "R2": 2}, NEGATIVE),
    ("VIMNMX.U32 R0, R1, R2, !PT", {"R1": NEGATIVE, "R2": 2}, NEGATIVE),
    ("VIADDMNMX R0, R1, 0x3, R2, !PT", {"R1": NEGATIVE, "R2": 2}, 2),
    ("SEL R0, R1, R2, !PT", {"R1": 1, "R2": 2}, 2),
    ("HFMA2.MMA R0, -RZ, RZ, 0, 1.5974044799804687e-05", {}, 0x10C),
    ("I2F.RP R0, R1", {"R1": 0x1000001}, 0x4B800001),  # 2^24 + 1, rounded up
    ("MUFU.RCP R0, R1", {"R1": 0x40800000}, 0x3E800000),
    ("F2I.FTZ.U32.TRUNC.NTZ R0, R1", {"R1": 0x40733333}, 3),
    ("IMAD R0, R1, R2, R3", {"R1": None, "R2": 1}, None),
]


@pytest.mark.parametrize(("text", "values", "wanted"), CASES)
def test_integer_instructions(text, values, wanted):
    r = Registers({}, {})
    r.values = {name: None if v is None else number(v) for name, v in values.items()}
    x = instruction(text)
    OPERATIONS[x.base](r, x, None)
    found = r.pair("R0") if "WIDE" in x.op else r.values["R0"]
    assert (None if found is None else int(found[0])) == wanted


def test_wide_sums_carry():
    """A 64-bit sum is IADD3 with a carry out, then IADD3.X with it."""
    r = Registers({}, {})
    for name, value in {"R2": M32, "R3": 1, "R4": 2, "R5": 7}.items():
        r.values[name] = number(value)
    for text in ("IADD3 R0, P0, R2, R4, RZ", "IADD3.X R1, R3, R5, RZ, P0, !PT"):
        x = instruction(text)
        OPERATIONS[x.base](r, x, None)
    assert int(r.pair("R0")[0]) == (1 << 32) + M32 + 2 + (7 << 32)


@pytest.mark.parametrize("low", [0, 1, 2])
@pytest.mark.parametrize("name", ["LT", "LE", "GT", "GE", "EQ", "NE"])
def test_comparisons_of_64_bits(name, low):
    """The lower halves first, unsigned; then the upper ones, which they decide where equal."""
    compare = {
        "LT": int.__lt__, "LE": int.__le__, "GT": int.__gt__, "GE": int.__ge__,
        "EQ": int.__eq__, "NE": int.__ne__,
    }[name]  # fmt: skip
    for high in (-1, 0, 1):
        r = Registers({}, {})
        a, b = (high << 32) + low, 1
        for register, value in {"R0": a, "R1": a >> 32, "R2": b, "R3": b >> 32}.items():
            r.values[register] = number(value & M32)
        for text in (
            f"ISETP.{name}.U32.AND P0, PT, R0, R2, PT",
            f"ISETP.{name}.AND.EX P1, P2, R1, R3, PT, P0",
        ):
            x = instruction(text)
            OPERATIONS[x.base](r, x, None)
        assert bool(r.predicates["P1"][0]) == compare(a, b)
        assert bool(r.predicates["P2"][0]) != compare(a, b)


def test_predicates_are_packed_and_unpacked():
    r = Registers({}, {})
    r.predicates = {f"P{i}": np.array([i in (0, 3)]) for i in range(7)}
    x = instruction("P2R R0, PR, RZ, 0x7f")
    OPERATIONS[x.base](r, x, None)
    assert int(r.values["R0"][0]) == 9
    x = instruction("R2P PR, R0, 0x6")
    r.values["R0"] = number(2)
    OPERATIONS[x.base](r, x, None)
    assert [bool(r.predicates[f"P{i}"][0]) for i in range(4)] == [True, True, False, True]


def test_lanes_that_do_not_take_part_keep_their_value():
    r = Registers({}, {})
    r.put("R0", number(1), None)
    r.put("R0", number(2), np.arange(32) < 4)
    assert r.values["R0"].tolist() == [2] * 4 + [1] * 28
    r.put("R0", None, np.arange(32) < 4)
    assert r.values["R0"] is None


# --- a warp ---------------------------------------------------------------------------------------


def program(*texts, labels=None):
    code = [instruction(text, address=16 * i) for i, text in enumerate(texts)]
    return sass.Program(tuple(code), labels or {})


def test_a_loop_turns_as_often_as_its_counter_says():
    code = program(
        "MOV R0, RZ", "VIADD R0, R0, 0x1", "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA `(.L_x_0)", "EXIT", labels={".L_x_0": 1},
    )  # fmt: skip
    trace = warp.follow(code, warp.constants([("i32", 5)], 0x210), 0, 4)
    assert [step.at for step in trace.steps].count(1) == 5
    assert (trace.guesses, trace.unknown) == (0, set())


def test_a_branch_on_what_is_loaded_is_a_guess():
    code = program(
        "LDG.E R0, desc[UR4][R2.64]", "ISETP.GE.AND P0, PT, R0, 0x1, PT", "@P0 BRA `(.L_x_0)",
        "XYZ R4, R5", "EXIT", labels={".L_x_0": 0},
    )  # fmt: skip
    trace = warp.follow(code, {}, 0, 4)
    assert (trace.guesses, trace.unknown) == (1, {"XYZ"})


def test_spilled_counters_come_back():
    code = program(
        "MOV R0, 0x3", "STL [R1+0x8], R0", "MOV R0, RZ", "LDL R2, [R1+0x8]",
        "ISETP.EQ.AND P0, PT, R2, 0x3, PT", "@P0 EXIT", "BRA `(.L_x_0)", labels={".L_x_0": 0},
    )  # fmt: skip
    trace = warp.follow(code, {}, 0, 4)
    assert [step.at for step in trace.steps] == list(range(6))
    assert sum(step.access is not None for step in trace.steps) == 2


@pytest.mark.parametrize(
    ("step", "op", "wavefronts"),
    [
        (4, "LDS", 1), (128, "LDS", 32), (8, "LDS", 2), (0, "LDS", 1),
        (16, "LDS.128", 4), (64, "LDS.128", 16), (8, "LDS.64", 2), (16, "LDSM.16.M88.4", 4),
        (128, "LDSM.16.M88.4", 32),
    ],
)  # fmt: skip
def test_bank_conflicts(step, op, wavefronts):
    code = program(
        f"IMAD R0, R4, {step:#x}, RZ", f"{op} R8, [R0]", "EXIT"
    )  # fmt: skip
    code = sass.Program((instruction("S2R R4, SR_TID.X"), *code.code), {})
    access = warp.follow(code, {}, 0, 4).steps[2].access
    assert access.wavefronts == wavefronts


@pytest.mark.parametrize(
    ("step", "op", "sectors"),
    [(4, "LDG.E", 4), (2, "LDG.E.U16", 2), (32, "LDG.E", 32), (16, "LDG.E.128", 16)],
)
def test_sectors(step, op, sectors):
    texts = (
        "S2R R4, SR_TID.X", f"IMAD.WIDE.U32 R2, R4, {step:#x}, RZ", f"{op} R8, desc[UR4][R2.64]",
        "EXIT",
    )  # fmt: skip
    access = warp.follow(program(*texts), {}, 0, 4).steps[2].access
    assert (access.space, access.sectors, access.store) == ("global", sectors, False)


def test_parameters_are_aligned():
    found = warp.constants([("i32", 1), ("*bf16", 1 << 36), ("u8", 255), ("fp64", 1.0)], 0x210)
    assert found[0x210] == 1
    assert found[0x218 + 4] == 16
    assert found[0x220] == 255
    assert (found[0x228 + 6], found[0x228 + 7]) == (0xF0, 0x3F)


def test_control_words_are_read():
    control = 5 | 1 << 5 | 2 << 8 | 0b100001 << 11
    text = (
        ".L_x_3:\n        /*0010*/  @!P1 IMAD.WIDE R2, R4, 0x2, c[0x0][0x210] ;"
        "  /* 0x0000000000000001 */\n"
        f"                                /* 0x{control << 41:016x} */\n"
    )
    found = sass.parse(text)
    operands = ("R2", "R4", "0x2", "c[0x0][0x210]")
    assert found.labels == {".L_x_3": 0}
    assert found.code == (
        Instruction(16, "P1", True, "IMAD.WIDE", operands, 5, 1, 2, (0, 5)),
    )  # fmt: skip


# --- time -----------------------------------------------------------------------------------------


def cycles(code, steps, *, warps=4, programs=1, resident=1, misses=None):
    sm = SM(code, warps, resident, 132, misses or {}, H200)
    return sm.run([steps] * programs)


def alone(*code):
    return code, [Step(i, True, None) for i in range(len(code))]


def test_stalls_are_kept():
    code, steps = alone(*[instruction("MOV R0, R1", stall=6)] * 50, instruction("EXIT"))
    assert cycles(code, steps).cycles == 300


def test_a_scheduler_issues_one_instruction_per_cycle():
    """Four warps have a scheduler each; sixteen share four, and wait for each other."""
    code, steps = alone(*[instruction("FADD R0, R1, R2")] * 400, instruction("EXIT"))
    one, four = (cycles(code, steps, warps=warps).cycles for warps in (4, 16))
    assert one == pytest.approx(400, abs=5)
    assert four == pytest.approx(4 * one, rel=0.01)


def test_another_program_hides_latency():
    """A load of 270 cycles and as long a wait: two programs take the time of one."""
    load = instruction("LDG.E R0, desc[UR4][R2.64]", write=0)
    code = (load, instruction("FADD R1, R0, R0", waits=(0,)), instruction("EXIT"))
    access = Access("global", False, 128, 4, 0, 0)
    steps = [Step(0, True, access), Step(1, True, None), Step(2, True, None)]
    one = cycles(code, steps, programs=1)
    assert machine.L2_LATENCY < one.cycles < machine.L2_LATENCY + 50
    assert max(one.waits, key=one.waits.get) == "LDG"
    assert cycles(code, steps, programs=2, resident=2).cycles < one.cycles + 20
    in_turn = 2 * one.cycles + machine.START
    assert cycles(code, steps, programs=2).cycles == pytest.approx(in_turn)
    missed = cycles(code, steps, misses={0: 1.0}).cycles
    assert missed == pytest.approx(one.cycles + machine.DRAM_LATENCY, abs=20)


def test_a_barrier_waits_for_the_last_warp():
    """Eight warps: two per scheduler, whose second reaches the barrier after the first."""
    code, steps = alone(
        *[instruction("MOV R0, R1")] * 100, instruction("BAR.SYNC 0x0"), instruction("EXIT")
    )
    found = cycles(code, steps, warps=8)
    assert found.cycles >= 200 + machine.LATENCY["BAR"]
    assert found.waits["barrier"] > 0


def test_products_run_at_the_rate_of_the_tensor_cores():
    """m64n128k16 takes 64 cycles, wherever its first operand is; in shared memory, it is read."""
    product, each = "HGMMA.64x128x16.F32.BF16 R24, {}, gdesc[UR8], R24", 64
    for a in ("R4", "gdesc[UR4]"):
        x = instruction(product.format(a))
        code, steps = alone(*[x] * 64, instruction("EXIT"))
        made = machine.product(x, H200)
        assert made.cycles == each
        assert made.shared_bytes == 2 * 16 * (128 + 64 * (a != "R4"))
        total = machine.cost(code, steps, 4, H200)
        assert total.cycles["tensor"] == 64 * each
        assert total.flop == 64 * 2 * 64 * 128 * 16


def test_narrow_products_wait_for_shared_memory():
    """m64n32k16 with both operands there: 24 cycles to read them, 16 to multiply."""
    wait = instruction("WARPGROUP.DEPBAR.LE gsb0, 0x0")
    x = instruction("HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], gdesc[UR8], R24, gsb0")
    code, steps = alone(*[x] * 100, wait, instruction("EXIT"))
    assert cycles(code, steps).cycles == pytest.approx(2400, rel=0.05)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "wanted"),
    [(64, 0, 8, 4), (255, 0, 8, 1), (128, 0, 4, 4), (32, 100_000, 4, 2), (32, 0, 4, 16)],
)
def test_resident_programs(registers, shared, warps, wanted):
    assert machine.resident(registers, shared, warps, H200) == wanted


# --- the table ------------------------------------------------------------------------------------


def row(workload="a", number=0, us=10.0, floor=10.0, mode="forward", **others):
    return {
        "gpu": "H200", "workload": workload, "layout": "nchw", "pass": mode, "number": number,
        "kernel": "gather", "us": us, "binding": "L2", "floor_us": floor, "planner_us": 2 * floor,
        "unknown": "", "waits": "", "loop": "", "route": "", "digest": "", **others,
    }  # fmt: skip


def test_passes_are_sums_with_gaps():
    rows = model.frame([row(), row(number=1, us=30.0, kernel="combine"), row("b", us=18.8)])
    found = model.totals(rows)
    assert found["modelled"].tolist() == [42.4, 20.0]
    assert found["largest"][0] == "combine 30 (L2), gather 10 (L2)"
    text = model.summary(rows)
    assert "H200 nchw forward: 2.91 times the floor in the geometric mean of 2" in text
    assert "at most 4.2 (a)" in text
    assert "differs by 2.12 times at most" in text


def test_small_floors_are_not_in_the_means_and_the_unknown_is_named():
    rows = model.frame([row(), row("tiny", floor=1.0, unknown="XYZ")])
    text = model.summary(rows)
    assert "mean of 1," in text
    assert "does not follow: tiny" in text


def test_a_comparison_shows_what_changed():
    before, now = model.frame([row(), row("b")]), model.frame([row(us=4.4), row("c")])
    text = model.comparison(before, now)
    assert "-50.0%" in text
    assert "| b" not in text
    assert model.comparison(before, before) == ""


def test_rows_are_replaced_by_job_and_kept_in_order(tmp_path, monkeypatch, capsys):
    path = tmp_path / "model.csv"
    made = {"a": [row(number=1), row()], "b": [row("b")]}
    monkeypatch.setattr(model, "modelled", lambda gpu, jobs: [r for j in jobs for r in made[j[0]]])
    model.update(["H200"], [("b", "nchw"), ("a", "nchw")], path)
    first = path.read_bytes()
    found = model.kept(str(path))
    assert found[["workload", "number"]].values.tolist() == [["a", 0], ["a", 1], ["b", 0]]
    model.update(["H200"], [("a", "nchw")], path)
    assert path.read_bytes() == first
    made["a"] = [row(us=8.8)]
    capsys.readouterr()
    model.update(["H200"], [("a", "nchw")], path)
    printed = capsys.readouterr().out
    assert "against the rows before" in printed
    assert len(model.kept(str(path))) == 2


def test_another_source_of_rows_must_exist(tmp_path):
    with pytest.raises(ValueError, match=r"expected a CSV file or a revision .* got 'nowhere'"):
        model.kept("nowhere")


def test_the_kept_table_is_of_this_code():
    """Every launch of the named workloads is in it, with the digest of its program."""
    jobs = list(itertools.product([w.name for w in WORKLOADS if not w.small], LAYOUTS))
    key = [*model.PASS, "number", "route", "digest"]
    wanted = {tuple(r[k] for k in key) for r in model.modelled("H200", jobs, untimed=True)}
    found = model.kept(str(model.KEPT))
    assert set(found["gpu"]) <= set(GPUS)
    own = found[found["gpu"] == "H200"]
    assert {tuple(r) for r in own[key].itertuples(index=False)} == wanted
    assert not own["unknown"].any()
    assert (own["us"] > 0).all()


def test_the_planners_calibration_is_of_this_code(tmp_path):
    """Every route of one small workload is modelled again."""
    path = tmp_path / "calibration.json"
    output("bench.model.calibrate", "--workload", "small_16_8x8", "--out", str(path))
    made, whole = (json.loads(p.read_text(encoding="utf-8")) for p in (path, calibration.FILE))
    assert made["columns"] == whole["columns"] == calibration.COLUMNS
    assert made["rows"]
    same_shape = [row for row in whole["rows"] if row[1:7] == [16, 8, 8, 1, 1, 64]]
    assert made["rows"] == same_shape
