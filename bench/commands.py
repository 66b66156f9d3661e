"""The commands of ``python -m bench``: what each takes, and what it runs."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from . import ceilings, floors, names, problems, providers, scaling
from .compare import NotComparableError, compare, read
from .environment import environment
from .first_call import seconds
from .gpu import run_gpu
from .measure import OK, Bench, Budget, CudaTimer, Effort, Row, Timer, WallTimer, describe
from .providers import EAGER, GRAPH, LAYOUTS
from .report import DEFAULT_METRICS, METRICS, Report, markdown
from .workloads import SELECTIONS, Workload, select

DEFAULT = Effort(warm_up=1, rounds_min=5, rounds_max=50, seconds=2.0)
QUICK = Effort(warm_up=1, rounds_min=3, rounds_max=20, seconds=1.0)
CPU_NOTE = (
    "A CPU run: the torch backend in float32, batches reduced. Triton latencies need a GPU; "
    "measure them with `python -m bench gpu`."
)
BUSY_NOTE = (
    "The machine was busy (load {load:.1f} on {cpus} CPUs) before the run: expect noise and bias."
)
INTERRUPTED = "Interrupted: these are the measurements until then."
MODES = {
    "fwd": problems.FORWARD, "bwd": problems.BACKWARD, "fwd_bwd": problems.STEP,
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
METRIC_FLOOR = ("floor", "rate")


class UsageError(ValueError):
    """Arguments that make no sense, with what would."""


def _parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    shown = "\n".join(f"  python -m bench {line}".rstrip() for line in examples.split("\n"))
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}".rstrip(),
        description=description,
        epilog=f"examples:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _add_lists(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """Options that take names with commas between."""
    help_ = {
        "workload": "names; without it, those of --selection",
        "provider": "names, see bench/providers.py; without it, all that run here",
        "mode": ", ".join(MODES),
        "dtype": f"{', '.join(DTYPES)}; default bf16 on a GPU, fp32 on a CPU",
        "layout": ", ".join(LAYOUTS),
        "launch": f"{EAGER}, {GRAPH} (CUDA graphs)",
        "metric": ", ".join(METRICS),
    }
    for name, default in defaults.items():
        parser.add_argument(
            f"--{name}", type=_listed, default=_listed(default), metavar="NAME,…", help=help_[name]
        )


def _chosen(kind: str, given: Sequence[str], known: dict) -> list:
    names.check(kind, given, list(known))
    return [known[name] for name in given]


def _here() -> tuple[torch.device, Timer]:
    if torch.cuda.is_available():
        return torch.device("cuda"), CudaTimer()
    return torch.device("cpu"), WallTimer()


def _dtypes(given: Sequence[str], device: torch.device) -> list[torch.dtype]:
    return _chosen("dtype", given or ["bf16" if device.type == "cuda" else "fp32"], DTYPES)


def _launches(given: Sequence[str], device: torch.device) -> Sequence[str]:
    names.check("launch mode", given, [EAGER, GRAPH])
    if GRAPH in given and device.type != "cuda":
        raise UsageError("launch mode 'graph' is a CUDA graph, and there is no GPU here.")
    return given


def _sweeps(options, dtype, device) -> list[list[providers.Provider]]:
    """What is timed side by side: providers of one launch mode."""
    launches = _launches(options.launch, device)
    try:
        found = [
            providers.select(options.provider, launch, device, dtype, options.layout)
            for launch in launches
        ]
    except ValueError as error:
        raise UsageError(error) from None
    return found


def _started(out: Path, device: torch.device, **options) -> Report:
    """A report with the machine's environment and what it has to warn of."""
    facts = environment(device)
    name = (facts.get("card") or {}).get("name", facts["cpu"])
    report = Report(out, f"Double attention on {name}", **options)
    report.record(**facts)
    if device.type == "cpu" and (facts["load"] or 0) > facts["cpus"] / 2:
        report.notes.append(BUSY_NOTE.format(**facts))
    return report


def _add_ceilings(report: Report, timer: Timer, device: torch.device, dtype: torch.dtype) -> None:
    report.ceilings, found = ceilings.measure(timer, device, dtype)
    report.record(ceilings=found)
    report.notes.append("Ceilings: " + ", ".join(f"{k} {v}" for k, v in found.items()))


# --- measuring ------------------------------------------------------------------------------------


def report(argv: Sequence[str], table: Sequence[Workload]) -> int:
    """The report without a command: eager against ours, on the GPU if there is one.

    On a CPU, where there is time to compile, against ``torch.compile`` of eager too.
    """
    parser = _parser(
        "", "Eager PyTorch against ours, on any machine.\n\n" + OVERVIEW,
        "\n--quick\n--workload yolo_p3,r50_conv3 --out /tmp/bench\nsweep --help",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    _add_lists(parser, workload="")
    parser.add_argument("--quick", action="store_true", help="fewest workloads and repetitions")
    parser.add_argument("--all", action="store_true", help="every workload")
    options = parser.parse_args(argv)
    selection = "quick" if options.quick else "all" if options.all else "default"
    chosen = select(options.workload, selection, table)
    device, timer = _here()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    made = _started(options.out, device)
    if device.type == "cpu":
        made.notes.insert(0, CPU_NOTE)
    if not options.quick:
        _add_ceilings(made, timer, device, dtype)
    effort = QUICK if options.quick else DEFAULT
    bench = Bench(device, dtype, timer, effort, Budget(math.inf), made.ceilings)
    if device.type == "cuda":
        sweep = providers.plain("triton")
    else:
        sweep = providers.plain("torch") if options.quick else providers.cpu_sweep()
    try:
        bench.run(chosen, [sweep], made.add)
    except KeyboardInterrupt:
        made.notes.append(INTERRUPTED)
    print(made.finish(short=False))
    return 0


def sweep(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "sweep", "Times providers side by side over workloads, modes, dtypes and layouts.",
        "sweep --workload yolo_p3,ddpm_64 --mode fwd,fwd_bwd\n"
        "sweep --provider eager,triton,sdpa --launch eager,graph --metric time,ratio,floor\n"
        "sweep --selection all --dtype bf16,fp16 --csv --out results",
    )  # fmt: skip
    _add_lists(
        parser, workload="", provider="", mode="fwd,fwd_bwd", dtype="", layout=",".join(LAYOUTS),
        launch=EAGER, metric=",".join(DEFAULT_METRICS),
    )  # fmt: skip
    parser.add_argument(
        "--selection", choices=SELECTIONS, default="default", help="of workloads, without names"
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument("--csv", action="store_true", help="only the CSV file, no pictures")
    parser.add_argument("--png", action="store_true", help="only pictures, no CSV file")
    parser.add_argument(
        "--seconds", type=float, default=DEFAULT.seconds, help="for the repetitions of a group"
    )
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    options = parser.parse_args(argv)
    chosen = select(options.workload, options.selection, table)
    modes = _chosen("mode", options.mode, MODES)
    names.check("metric", options.metric, list(METRICS))
    device, timer = _here()
    dtypes = _dtypes(options.dtype, device)
    groups = {dtype: _sweeps(options, dtype, device) for dtype in dtypes}
    only = options.csv != options.png
    made = _started(
        options.out, device, metrics=options.metric, csv=options.csv or not only,
        png=options.png or not only,
    )  # fmt: skip
    if set(METRIC_FLOOR) & set(options.metric):
        _add_ceilings(made, timer, device, dtypes[0])
    budget = Budget(options.budget)
    effort = Effort(DEFAULT.warm_up, DEFAULT.rounds_min, DEFAULT.rounds_max, options.seconds)
    try:
        for dtype, groups_of in groups.items():
            known = made.ceilings if dtype == dtypes[0] else None
            bench = Bench(device, dtype, timer, effort, budget, known)
            add: Callable[[list[Row]], None] = made.add
            if "first_call" in options.metric:
                add = _adding_first_calls(made.add, groups_of, dtype, device)
            bench.run(chosen, groups_of, add, modes)
    except KeyboardInterrupt:
        made.notes.append(INTERRUPTED)
    print(made.finish(short=False))
    return 0


def _adding_first_calls(add, groups, dtype, device) -> Callable[[list[Row]], None]:
    known = {(p.name, p.launch, p.layout): p for group in groups for p in group}

    def adding(rows: list[Row]) -> None:
        for row in rows:
            if row["status"] == OK:
                provider = known[row["provider"], row["launch"], row["layout"]]
                try:
                    cold, warm = seconds(row["workload"], provider, row["mode"], dtype, device)
                except Exception as error:
                    row["status"] = f"failed: {describe(error)}"
                else:
                    row.update(first_call_cold_s=cold, first_call_warm_s=warm)
        add(rows)

    return adding


def scale(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "scaling", "Cost against the number of positions (to 2^21), samples, channels or maps.",
        "scaling\nscaling --axis c_n --provider eager,torch --mode fwd\n"
        "scaling --axis L --most 65536",
    )  # fmt: skip
    parser.add_argument("--axis", choices=list(scaling.AXES), default="L")
    parser.add_argument("--most", type=int, help="the largest size; default: 2^21, on a CPU 2^17")
    _add_lists(parser, provider="", mode="fwd,fwd_bwd", dtype="", layout="nchw", launch=EAGER)
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    options = parser.parse_args(argv)
    device, timer = _here()
    (dtype, *more) = _dtypes(options.dtype, device)
    if more:
        raise UsageError("scaling takes one dtype: its curves are of one.")
    options.provider = options.provider or ["eager", "triton" if device.type == "cuda" else "torch"]
    sweeps = _sweeps(options, dtype, device)
    most = options.most or (2**17 if device.type == "cpu" and options.axis == "L" else math.inf)
    sizes = [size for size in scaling.AXES[options.axis] if size <= most]
    if not sizes:
        raise UsageError(f"--most {most} is below the least size, {scaling.AXES[options.axis][0]}.")
    made = _started(options.out, device, metrics=("time", "ratio"))
    bench = Bench(device, dtype, timer, DEFAULT, Budget(options.budget))
    modes = _chosen("mode", options.mode, MODES)
    print(scaling.run(bench, options.axis, sizes, sweeps, modes, made))
    return 0


def gpu(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "gpu", "Tests, ceilings, then every workload for every provider, within a time budget.",
        "gpu --out bench/results/h100\ngpu --budget 900 --workload yolo_p3,r50_conv3",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    _add_lists(parser, workload="")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything")
    options = parser.parse_args(argv)
    chosen = select(options.workload, "all", table)
    if not torch.cuda.is_available():
        raise UsageError("`python -m bench gpu` needs a CUDA GPU, and there is none here.")
    return run_gpu(options.out, chosen, Budget(options.budget))


# --- without measuring ----------------------------------------------------------------------------


def plan(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "plan", "What the block would run on a GPU for a shape, and why. Times are a model's.",
        "plan yolo_p3\nplan --shape 16,256,80,80 --c-m 64 --c-n 64 --heads 4 --dtype fp16",
    )  # fmt: skip
    parser.add_argument("workload", nargs="*", help="names of workloads")
    parser.add_argument("--shape", type=_listed, help="N,C,positions… instead of a name")
    parser.add_argument("--c-m", type=int)
    parser.add_argument("--c-n", type=int)
    parser.add_argument("--heads", type=int, default=1)
    _add_lists(parser, dtype="bf16", layout="nchw")
    options = parser.parse_args(argv)
    from da_triton import plan as planned

    names.check("layout", options.layout, LAYOUTS)
    shapes = [
        ((w.n, w.c, *w.positions), w.c_m, w.c_n, w.heads)
        for w in select(options.workload, "all", table)
        if options.workload
    ]
    if options.shape:
        if not (options.c_m and options.c_n):
            raise UsageError("--shape needs --c-m and --c-n.")
        try:
            shape = tuple(map(int, options.shape))
        except ValueError:
            raise UsageError(f"--shape takes integers, got {','.join(options.shape)}.") from None
        shapes.append((shape, options.c_m, options.c_n, options.heads))
    if not shapes:
        raise UsageError("plan needs the name of a workload, or --shape with --c-m and --c-n.")
    for shape, c_m, c_n, heads in shapes:
        for dtype in _chosen("dtype", options.dtype, DTYPES):
            for layout in options.layout:
                form = torch.contiguous_format
                if layout == providers.CHANNELS_LAST:
                    form = torch.channels_last
                try:
                    found = planned(shape, c_m, c_n, heads=heads, dtype=dtype, memory_format=form)
                except (ValueError, RuntimeError) as error:
                    raise UsageError(error) from None
                print(found, end="\n\n")
    return 0


def model(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "model", "Floors of every workload on cards that are not here: a model, not a measurement.",
        "model\nmodel --workload yolo_p3 --mode fwd,fwd_bwd --csv floors.csv",
    )  # fmt: skip
    _add_lists(parser, workload="", mode="fwd")
    parser.add_argument("--csv", type=Path, help="a file to write it to")
    options = parser.parse_args(argv)
    frame = floors_frame(
        select(options.workload, "all", table), _chosen("mode", options.mode, MODES)
    )
    wide = frame.pivot_table(
        index=["workload", "mode", "MB", "GFLOP"], columns="card", values="floor_us", sort=False
    )
    print("Modelled floors in microseconds, bfloat16; none of this was measured.")
    print(markdown(wide.reset_index(), dict.fromkeys(["MB", "GFLOP", *floors.SHEETS], "{:.1f}")))
    if options.csv:
        frame.to_csv(options.csv, index=False)
        print(f"Written to {options.csv}.")
    return 0


def floors_frame(workloads: Sequence[Workload], modes: Sequence[str]) -> pd.DataFrame:
    """A row for each workload, mode and card."""
    rows = []
    for mode in modes:
        for work in workloads:
            for card, sheet in floors.SHEETS.items():
                found = floors.floor(work, work.n, mode, 2, floors.modelled(sheet))
                rows.append({
                    "kind": "model", "workload": work.name, "mode": mode, "dtype": "bfloat16",
                    "MB": found.bytes / 1e6, "GFLOP": found.flop / 1e9, "card": card,
                    "floor_us": 1e6 * found.seconds, "bound": found.bound,
                })  # fmt: skip
    return pd.DataFrame(rows)


def compare_files(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = _parser(
        "compare", "What got slower between two runs, beyond the noise that both measured. Exit "
        "status 1 if something did.", "compare old/results.csv new/results.csv",
    )  # fmt: skip
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--across", action="store_true", help="files of different machines, too")
    options = parser.parse_args(argv)
    try:
        found = compare(read(options.old), read(options.new), options.across)
    except NotComparableError as error:
        raise UsageError(error) from None
    print(found)
    return int(found.regressed)


def codegen(argv: Sequence[str], table: Sequence[Workload]) -> int:
    from .codegen.cli import main

    return main(argv)


Command = Callable[[Sequence[str], Sequence[Workload]], int]
COMMANDS: dict[str, Command] = {
    "report": report,
    "sweep": sweep,
    "scaling": scale,
    "plan": plan,
    "model": model,
    "codegen": codegen,
    "compare": compare_files,
    "gpu": gpu,
}
OVERVIEW = """commands, each with --help:
  sweep     providers, modes, dtypes, layouts and metrics of your choice
  scaling   cost against positions, samples, channels or maps
  plan      what would run on a GPU for a shape, and why
  model     floors on cards that are not here
  codegen   registers, spills, copies of every kernel, without a GPU
  compare   what got slower between two runs
  gpu       everything on a GPU, within a time budget"""
