"""The commands of ``python -m bench`` that measure."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import arguments, ceilings, estimate, host, names, networks, providers, scaling
from .arguments import UsageError
from .codegen.table import cannot_compile
from .environment import columns, environment
from .first_call import seconds
from .gpu import run_gpu
from .joined import LOGS
from .measure import (
    OK,
    Bench,
    Budget,
    ContextLostError,
    Effort,
    Row,
    Timer,
    describe,
    progress,
    usable,
)
from .providers import EAGER, LAYOUTS
from .report import Report
from .stages import STAGES, Settings
from .tables import DEFAULT_METRICS, METRICS
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
METRIC_FLOOR = ("floor", "rate")


def report(argv: Sequence[str], table: Sequence[Workload], overview: str = "") -> int:
    """The report without a command: eager against ours, on the GPU if there is one.

    On a CPU, where there is time to compile, against ``torch.compile`` of eager too.
    """
    parser = arguments.parser(
        "", "Eager PyTorch against ours, on any machine.\n\n" + overview,
        "\n--quick\n--workload yolo_p3,r50_conv3 --out /tmp/bench\nsweep --help",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    arguments.add_lists(parser, workload="")
    parser.add_argument("--quick", action="store_true", help="fewest workloads and repetitions")
    parser.add_argument("--all", action="store_true", help="every workload")
    options = parser.parse_args(argv)
    selection = "quick" if options.quick else "all" if options.all else "default"
    chosen = select(options.workload, selection, table)
    device, timer = arguments.here()
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
    with made.ending_early():
        bench.run(chosen, [sweep], made.add)
    print(made.finish(short=False))
    return made.status


def sweep(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "sweep", "Times providers side by side over workloads, modes, dtypes and layouts.",
        "sweep --workload yolo_p3,ddpm_64 --mode fwd,fwd_bwd\n"
        "sweep --provider eager,triton,sdpa --launch eager,graph --metric time,ratio,floor\n"
        "sweep --selection all --dtype bf16,fp16 --csv --out results",
    )  # fmt: skip
    arguments.add_lists(
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
    modes = arguments.chosen("mode", options.mode, arguments.MODES)
    names.check("metric", options.metric, list(METRICS))
    device, timer = arguments.here()
    dtypes = arguments.dtypes(options.dtype, device)
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
    with made.ending_early():
        for dtype, groups_of in groups.items():
            known = made.ceilings if dtype == dtypes[0] else None
            bench = Bench(device, dtype, timer, effort, budget, known)
            add: Callable[[list[Row]], None] = made.add
            if "first_call" in options.metric:
                add = _adding_first_calls(made.add, groups_of, dtype, device)
            bench.run(chosen, groups_of, add, modes)
    print(made.finish(short=False))
    return made.status


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
    parser = arguments.parser(
        "scaling", "Cost against the number of positions (to 2^21), samples, channels or maps.",
        "scaling\nscaling --axis c_n --provider eager,torch --mode fwd\n"
        "scaling --axis L --most 65536",
    )  # fmt: skip
    parser.add_argument("--axis", choices=list(scaling.AXES), default="L")
    parser.add_argument("--most", type=int, help="the largest size; default: 2^21, on a CPU 2^17")
    arguments.add_lists(
        parser, provider="", mode="fwd,fwd_bwd", dtype="", layout="nchw", launch=EAGER
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    options = parser.parse_args(argv)
    device, timer = arguments.here()
    (dtype, *more) = arguments.dtypes(options.dtype, device)
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
    modes = arguments.chosen("mode", options.mode, arguments.MODES)
    print(scaling.run(bench, options.axis, sizes, sweeps, modes, made))
    return made.status


def whole_networks(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "networks", "Whole networks with the block, eager block against ours: a training step and "
        "inference. Needs torchvision and ultralytics.",
        "networks --network resnet50\nnetworks --mode fwd --compile --out /tmp/networks",
    )  # fmt: skip
    parser.add_argument("--network", type=arguments.listed, default=[], metavar="NAME,…")
    arguments.add_lists(parser, mode="fwd,fwd_bwd", dtype="")
    parser.add_argument("--compile", action="store_true", help="compiled networks, too")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for everything")
    options = parser.parse_args(argv)
    chosen = options.network or list(networks.NETWORKS)
    names.check("network", chosen, list(networks.NETWORKS))
    modes = arguments.chosen("mode", options.mode, networks.MODES)
    device, timer = arguments.here()
    made = _started(options.out, device, metrics=("time", "ratio", "added", "memory"), png=False)
    budget = Budget(options.budget)
    backend = "triton" if device.type == "cuda" else "torch"
    groups = [
        (dtype, networks.NETWORKS[name], mode)
        for dtype in arguments.dtypes(options.dtype, device)
        for name in chosen
        for mode in modes
    ]
    with made.ending_early():
        for done, (dtype, network, mode) in enumerate(progress(groups), 1):
            bench = Bench(device, dtype, timer, DEFAULT, budget)
            variants = networks.variants(backend, options.compile)
            made.add(networks.measure(bench, network, mode, variants))
            if not usable(device):
                raise ContextLostError(done)
    print(made.finish(short=False))
    return made.status


def tune(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "tune", "Measures candidates for the kernels' tiles, and writes this GPU's table.",
        "tune\ntune --workload yolo_p3,volume_128 --budget 300 --out /tmp/tiles.json",
    )  # fmt: skip
    arguments.add_lists(parser, workload="")
    parser.add_argument("--budget", type=float, default=300, help="seconds for everything")
    parser.add_argument(
        "--out", type=Path, help="a JSON file; without it, the one that the package reads"
    )
    options = parser.parse_args(argv)
    chosen = select(options.workload, "all", table)
    device, timer = arguments.here()
    if device.type != "cuda":
        raise UsageError("`python -m bench tune` measures on a CUDA GPU, and there is none here.")
    from . import tune as tuning

    card = torch.cuda.get_device_name(device)
    path = options.out or tuning.path_of(card)
    choices = tuning.tune(
        chosen, device, timer, Budget(options.budget),
        save=lambda choices: tuning.write(path, card, choices),
    )  # fmt: skip
    replaced = sum(c.best != c.present for c in choices)
    written = f" Written to {path}." if choices else ""
    print(f"{len(choices)} tiles measured, {replaced} replaced.{written}")
    return 0


def host_costs(argv: Sequence[str], table: Sequence[Workload]) -> int:
    parser = arguments.parser(
        "host", "Microseconds until a call returns, by layer: module, function, what is "
        "recorded, operator, launches; beside the eager block. Without a GPU, launches do nothing.",
        "host\nhost --workload small_64_14x14,yolo_n_p5_b1 --threads 2 --out /tmp/host",
    )  # fmt: skip
    arguments.add_lists(parser, workload="")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument(
        "--seconds", type=float, default=45.0, help="for all workloads (default %(default)s)"
    )
    options = parser.parse_args(argv)
    if options.threads < 1:
        raise UsageError(f"--threads takes a number of at least 1, got {options.threads}.")
    small = [work for work in table if work.small]
    chosen = select(options.workload, "all", table) if options.workload else small
    if reason := cannot_compile("host", "launches kernels"):
        raise UsageError(reason)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frame = host.measure(chosen, device, options.seconds)
    frame = frame.assign(**columns(environment(device)))
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / host.FILE, index=False)
    print(host.shown(frame), f"Written to {options.out}.", sep="\n\n")
    return 0


def gpu(argv: Sequence[str], table: Sequence[Workload]) -> int:
    known = [stage.name for stage in STAGES]
    lines = "\n".join(f"  {s.name:9} {s.seconds:4.0f} s  {s.title}" for s in STAGES)
    parser = arguments.parser(
        "gpu", f"Everything on a GPU, in stages:\n\n{lines}\n\nEvery stage runs in processes of "
        "its own, and leaves what it measured whatever they do. Results of a folder are joined: "
        "stages may run one by one.",
        "gpu --out bench/results/h100\ngpu --stage smoke,tests --ptxas /opt/cuda-13.3/bin/ptxas\n"
        "gpu --stage eager --budget 120 --workload yolo_p3,r50_conv3\ngpu --estimate",
    )  # fmt: skip
    parser.add_argument(
        "--stage", type=arguments.listed, action="extend", default=[], metavar="NAME,…",
        help="repeatable; without it, all in order",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=Path("bench/out/gpu"), help="folder for results (%(default)s)"
    )
    arguments.add_lists(parser, workload="")
    parser.add_argument(
        "--budget", type=float, help="seconds for all chosen stages; default: the sum of theirs"
    )
    parser.add_argument(
        "--ptxas", action="append", default=[], help="another assembler for the smoke check"
    )
    parser.add_argument(
        "--estimate", action="store_true",
        help="measure nothing: say where the seconds would go, on any machine",
    )  # fmt: skip
    options = parser.parse_args(argv)
    names.check("stage", options.stage, known)
    stages = [stage for stage in STAGES if not options.stage or stage.name in options.stage]
    chosen = select(options.workload, "all", table)
    for path in options.ptxas:
        if not os.access(path, os.X_OK):
            raise UsageError(f"--ptxas {path} is not an executable file.")
    if (options.out / "results.csv").exists() and not (options.out / LOGS).exists():
        raise UsageError(
            f"{options.out} has a results.csv that cannot be added to without its {LOGS}: choose "
            "another folder with --out."
        )
    seconds = sum(s.seconds for s in stages) if options.budget is None else options.budget
    if options.estimate:
        print(estimate.text([s.name for s in stages], chosen, seconds))
        return 0
    if not torch.cuda.is_available():
        raise UsageError("`python -m bench gpu` needs a CUDA GPU, and there is none here.")
    return run_gpu(options.out, chosen, Budget(seconds), stages, Settings(ptxas=options.ptxas))


def _sweeps(options, dtype, device) -> list[list[providers.Provider]]:
    """What is timed side by side: providers of one launch mode."""
    launches = arguments.launches(options.launch, device)
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
