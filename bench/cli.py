"""The commands of ``python -m bench``, by which a user decides whether to switch."""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import codegen as programs
from . import first_call, gpu, networks, problems, providers, scaling, workloads
from . import model as modelling
from .codegen import cannot_compile
from .environment import columns, environment
from .groups import Add, Sweeper, Where
from .isolation import Worker, terminable
from .joined import LOGS
from .measure import OK, Budget, Effort
from .observe import here
from .providers import CHANNELS_LAST, EAGER, GRAPH, LAYOUTS, NCHW
from .report import Report, started
from .stages import STAGES, Settings
from .tables import DEFAULT_METRICS, METRICS
from .workloads import UsageError, check, select

DEFAULT = Effort(warm_up=1, rounds_min=5, rounds_max=50, seconds=2.0)
QUICK = Effort(warm_up=1, rounds_min=3, rounds_max=20, seconds=1.0)
PATIENCE = 600.0  # seconds without a message, on a slow CPU, before a process is ended
MODES = {"fwd": problems.FORWARD, "bwd": problems.BACKWARD, "fwd_bwd": problems.STEP}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CPU_NOTE = (
    "A CPU run: the torch backend in float32, batches reduced. Triton latencies need a GPU; "
    "measure them with `python -m bench gpu`."
)

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Eager PyTorch against da_triton. Without a command: `report`.",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 for arguments that make no sense."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "report")
    try:
        app(argv, prog_name="python -m bench")
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


# --- options --------------------------------------------------------------------------------------


def names(kind: str, known: Any, note: str = "") -> Any:
    """An option that takes known names with commas between; of a dict, its values."""

    def parse(text: str) -> list[Any]:
        given = [part.strip() for part in text.split(",") if part.strip()]
        all_of = known() if callable(known) else known
        check(kind, given, all_of)
        return [all_of[name] if isinstance(all_of, dict) else name for name in given]

    listed = [] if callable(known) else [", ".join(known)]
    help = "; ".join([*listed, *([note] if note else [])])
    return typer.Option(parser=parse, metavar="NAME,…", help=help)


def option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


def command(name: str, *examples: str, help: str | None = None) -> Callable:
    """Registers a command; its help ends with examples."""
    lines = "\n".join(f"  python -m bench {name} {example}" for example in examples)
    return app.command(name, help=help, epilog=f"\b\nexamples:\n{lines}")


ALL = "without it, those of the command; a wrong name lists all"
Workloads = Annotated[Any, names("workload", lambda: [w.name for w in workloads.WORKLOADS], ALL)]
Providers = Annotated[Any, names("provider", lambda: [p.name for p in providers.catalogue()], ALL)]
Modes = Annotated[Any, names("mode", MODES)]
Dtypes = Annotated[Any, names("dtype", DTYPES, "without it, bf16 on a GPU and fp32 on a CPU")]
Layouts = Annotated[Any, names("layout", LAYOUTS)]
Launches = Annotated[Any, names("launch mode", (EAGER, GRAPH), "graph: CUDA graphs")]
Metrics = Annotated[Any, names("metric", list(METRICS))]
Out = Annotated[Path, option("folder for results")]
Seconds = Annotated[float, option("seconds for everything", "--budget")]
KEPT = typer.Option(help="a CSV file, kept in order", show_default="one in bench/results")
STAGE = names("stage", [s.name for s in STAGES], "repeatable")
RESULTS = Path("bench/out")
SHOWN = ",".join(DEFAULT_METRICS)


class Selection(str, Enum):
    quick, default, all = workloads.SELECTIONS


class Axis(str, Enum):
    L, N, C, c_n = scaling.AXES


def _dtypes(given: list[torch.dtype], device: torch.device) -> list[torch.dtype]:
    return given or [torch.bfloat16 if device.type == "cuda" else torch.float32]


def _sweeps(provider, launch, layout, dtype, device) -> list[list[providers.Provider]]:
    """Providers that are timed in turns, a list per launch mode."""
    if GRAPH in launch and device.type != "cuda":
        raise UsageError("launch mode 'graph' is a CUDA graph, and there is no GPU here.")
    return [providers.select(provider, mode, device, dtype, layout) for mode in launch]


@contextlib.contextmanager
def _measuring(
    made: Report, dtype: torch.dtype, effort: Effort, budget: float = math.inf
) -> Iterator[Sweeper]:
    """Measures in a process of its own, until Ctrl-C or a request to terminate."""
    device, make_timer = here()
    where = Where(device, dtype, make_timer, effort, PATIENCE)
    with terminable(), contextlib.closing(Worker()) as worker, made.ending_early():
        yield Sweeper(worker, where, Budget(budget))


def _take_ceilings(made: Report, sweeper: Sweeper) -> None:
    found = sweeper.measure_ceilings()
    made.notes.append(made.take_ceilings(sweeper.ceilings, found))


def _finished(made: Report, text: str = "") -> None:
    """Prints the report. Exit status 1 if nothing could be timed."""
    print(text or made.finish(short=False))
    raise typer.Exit(not any(row["status"] == OK for row in made.rows))


@command("report", "--quick", "--workload yolo_p3,r50_conv3 --out /tmp/bench")
def report(
    workload: Workloads = "",
    quick: Annotated[bool, option("fewest workloads and rounds", "--quick")] = False,
    everything: Annotated[bool, option("every workload", "--all")] = False,
    out: Out = RESULTS,
) -> None:
    """Eager PyTorch against da_triton, on the GPU if there is one."""
    if quick and everything:
        raise UsageError("--quick and --all exclude each other: give one of them.")
    chosen = select(workload, "quick" if quick else "all" if everything else "default")
    device, _ = here()
    made = started(out, device)
    if device.type == "cuda":
        group = providers.plain("triton")
    else:
        group = providers.plain("torch", *([] if quick else ["compile eager"]))
        made.notes.insert(0, CPU_NOTE)
    (dtype,) = _dtypes([], device)
    with _measuring(made, dtype, QUICK if quick else DEFAULT) as sweeper:
        if not quick:
            _take_ceilings(made, sweeper)
        sweeper.run(chosen, [group], made.add)
    _finished(made)


@command("sweep", "--workload yolo_p3 --mode fwd", "--provider eager,sdpa --launch eager,graph")
def sweep(
    workload: Workloads = "",
    selection: Annotated[Selection, option("of workloads, without names")] = Selection.default,
    provider: Providers = "",
    mode: Modes = "fwd,fwd_bwd",
    dtype: Dtypes = "",
    layout: Layouts = f"{NCHW},{CHANNELS_LAST}",
    launch: Launches = EAGER,
    metric: Metrics = SHOWN,
    out: Out = RESULTS,
    csv: Annotated[bool, option("only the CSV file, no plots", "--csv")] = False,
    png: Annotated[bool, option("only plots, no CSV file", "--png")] = False,
    seconds: Annotated[float, option("for the rounds of a group")] = DEFAULT.seconds,
    budget: Seconds = math.inf,
) -> None:
    """Times providers in turns over workloads, modes, dtypes and layouts of your choice."""
    device, _ = here()
    dtypes = _dtypes(dtype, device)
    groups = {each: _sweeps(provider, launch, layout, each, device) for each in dtypes}
    made = started(out, device, metrics=metric, csv=csv or not png, png=png or not csv)
    chosen = select(workload, selection.value)
    effort = dataclasses.replace(DEFAULT, seconds=seconds)
    with _measuring(made, dtypes[0], effort, budget) as sweeper:
        if {"floor", "rate"} & set(metric):
            _take_ceilings(made, sweeper)
        for each, sweeps in groups.items():
            add: Add = made.add
            if "first_call" in metric:
                add = first_call.adding(made.add, chosen, sweeps, each, device)
            sweeper.of_dtype(each).run(chosen, sweeps, add, mode)
    _finished(made)


@command("scaling", "--axis c_n --provider eager,torch --mode fwd", "--axis L --most 65536")
def scale(
    axis: Annotated[Axis, option("positions, samples, channels or descriptors")] = Axis.L,
    most: Annotated[int | None, option("the largest size; else 2^21, on a CPU 2^17")] = None,
    provider: Providers = "",
    mode: Modes = "fwd,fwd_bwd",
    dtype: Dtypes = "",
    layout: Layouts = "nchw",
    launch: Launches = EAGER,
    out: Out = RESULTS,
    budget: Seconds = math.inf,
) -> None:
    """Cost against the number of positions (to 2^21), samples, channels or maps."""
    device, _ = here()
    (of_dtype, *more) = _dtypes(dtype, device)
    if more:
        raise UsageError("scaling takes one dtype, got several: its curves are of one.")
    wanted = provider or ["eager", "triton" if device.type == "cuda" else "torch"]
    sweeps = _sweeps(wanted, launch, layout, of_dtype, device)
    along = scaling.AXES[axis.value]
    limit = most or (2**17 if device.type == "cpu" and axis.value == "L" else math.inf)
    sizes = [size for size in along if size <= limit]
    if not sizes:
        raise UsageError(f"--most {most} is below the least size, {along[0]}.")
    made = started(out, device, metrics=("time", "ratio"))
    with _measuring(made, of_dtype, DEFAULT, budget) as sweeper:
        scaling.run(sweeper, axis.value, sizes, sweeps, mode, made)
    _finished(made, scaling.finish(made, axis.value))


@command("networks", "--network resnet50", "--mode fwd --compile --out /tmp/networks")
def whole_networks(
    network: Annotated[Any, names("network", lambda: networks.NETWORKS, "without it, all")] = "",
    mode: Annotated[Any, names("mode", networks.MODES)] = "fwd,fwd_bwd",
    dtype: Dtypes = "",
    compiled: Annotated[bool, option("torch.compile, too", "--compile")] = False,
    out: Out = RESULTS,
    budget: Seconds = math.inf,
) -> None:
    """A ResNet-50 and a YOLOv8 with the block, eager block against da_triton's.

    A training step and inference. Needs torchvision and ultralytics.
    """
    device, _ = here()
    made = started(out, device, metrics=("time", "ratio", "added", "memory"), png=False)
    variants = networks.variants("triton" if device.type == "cuda" else "torch", compiled)
    chosen = network or list(networks.NETWORKS.values())
    dtypes = _dtypes(dtype, device)
    with _measuring(made, dtypes[0], DEFAULT, budget) as sweeper:
        for each in dtypes:
            sweeper.of_dtype(each).run(chosen, [variants], made.add, mode)
    _finished(made)


@command("host", "--workload small_64_14x14,yolo_n_p5_b1 --threads 2 --out /tmp/host")
def host_costs(
    workload: Workloads = "",
    threads: Annotated[int, option("of PyTorch")] = 1,
    seconds: Annotated[float, option("for all workloads")] = 45.0,
    out: Out = RESULTS,
) -> None:
    """Microseconds until a call returns, by layer, beside the eager block.

    Module, function, what is recorded, operator, launches. Without a GPU, launches do nothing.
    """
    if threads < 1:
        raise UsageError(f"--threads takes a number of at least 1, got {threads}.")
    if reason := cannot_compile("host", "launches kernels"):
        raise UsageError(reason)
    from . import host

    chosen = select(workload, "all")
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frame = host.measure([w for w in chosen if workload or w.small], device, seconds)
    frame = frame.assign(**columns(environment(device)))
    out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(out / host.FILE, index=False)
    print(host.shown(frame), f"Written to {out}.", sep="\n\n")


@command(
    "gpu", "--out bench/results/h100", "--stage smoke,tests --ptxas /opt/cuda-13.3/bin/ptxas",
    "--stage eager --budget 120 --workload yolo_p3,r50_conv3",
    help="Everything on a GPU, in stages:\n\n\b\n"
    + "\n".join(f"  {s.name:9} {s.seconds:4.0f} s  {s.title}" for s in STAGES)
    + "\n\nEvery stage runs in processes of its own, and leaves what it measured whatever they do. "
    "Results of a folder are joined: stages may run one by one.",
)  # fmt: skip
def on_gpu(
    stage: Annotated[list[Any] | None, STAGE] = None,
    workload: Workloads = "",
    out: Out = RESULTS / "gpu",
    budget: Annotated[float | None, option("seconds; else those of the stages")] = None,
    ptxas: Annotated[list[str] | None, option("another assembler for smoke; repeatable")] = None,
) -> None:
    named = {*itertools.chain(*(stage or ()))}
    stages = [s for s in STAGES if not named or s.name in named]
    chosen = select(workload, "all")
    for path in ptxas or ():
        if not os.access(path, os.X_OK):
            raise UsageError(f"--ptxas {path} is not an executable file.")
    if (out / "results.csv").exists() and not (out / LOGS).exists():
        raise UsageError(
            f"{out} has a results.csv that cannot be added to without its {LOGS}: choose "
            "another folder with --out."
        )
    seconds = sum(s.seconds for s in stages) if budget is None else budget
    if not torch.cuda.is_available():
        raise UsageError("`python -m bench gpu` needs a CUDA GPU, and there is none here.")
    raise typer.Exit(gpu.run_gpu(out, chosen, Budget(seconds), stages, Settings(ptxas=ptxas or [])))


@command("tune", "--workload yolo_p3,volume_128 --budget 300 --out /tmp/tiles.json")
def tune(
    workload: Workloads = "",
    budget: Seconds = 300.0,
    out: Annotated[Path | None, option("a JSON file; else the one that da_triton reads")] = None,
) -> None:
    """Measures candidates for the kernels' tiles, and writes this GPU's table."""
    device, make_timer = here()
    if device.type != "cuda":
        raise UsageError("`python -m bench tune` measures on a CUDA GPU, and there is none here.")
    from . import tune as tuning

    gpu_name = torch.cuda.get_device_name(device)
    path = out or tuning.path_of(gpu_name)
    choices: list[tuning.Choice] = []
    for choice in tuning.tune(select(workload, "all"), device, make_timer(), Budget(budget)):
        choices.append(choice)
        tuning.write(path, gpu_name, choices)
    replaced = sum(c.best != c.present for c in choices)
    written = f" Written to {path}." if choices else ""
    print(f"{len(choices)} tiles measured, {replaced} replaced.{written}")


@command("plan", "yolo_p3", "--shape 16,256,80,80 --c-m 64 --c-n 64 --heads 4 --dtype fp16")
def plan(
    workload: Annotated[list[str] | None, typer.Argument(help="names")] = None,
    shape: Annotated[str, option("N,C,positions… instead of a name")] = "",
    c_m: int | None = None,
    c_n: int | None = None,
    heads: int = 1,
    dtype: Annotated[Any, names("dtype", DTYPES)] = "bf16",
    layout: Layouts = "nchw",
) -> None:
    """The route that the block would take on a GPU for a shape, and why. Times are a model's."""
    from da_triton import plan as planned

    named = select(workload, "all") if workload else []
    shapes: list[Any] = [((w.n, w.c, *w.positions), w.c_m, w.c_n, w.heads) for w in named]
    if shape:
        if not (c_m and c_n):
            raise UsageError("--shape needs --c-m and --c-n.")
        try:
            shapes.append((tuple(map(int, shape.split(","))), c_m, c_n, heads))
        except ValueError:
            raise UsageError(f"--shape takes integers, got {shape}.") from None
    if not shapes:
        raise UsageError("plan needs the name of a workload, or --shape with --c-m and --c-n.")
    for (sizes, m, n, of), each, form in itertools.product(shapes, dtype, layout):
        memory_format = problems.memory_format(len(sizes) - 2, form == CHANNELS_LAST)
        try:
            found = planned(sizes, m, n, heads=of, dtype=each, memory_format=memory_format)
        except (ValueError, RuntimeError) as error:
            raise UsageError(error) from None
        print(found, end="\n\n")


@command("compare", "old/results.csv new/results.csv")
def compare(
    old: Path,
    new: Path,
    across: Annotated[bool, option("files of two machines, too", "--across")] = False,
) -> None:
    """Lists what got slower between two runs, beyond the noise that both measured.

    Exit status 1 if something did.
    """
    from . import compare as comparing

    found = comparing.compare(comparing.read(old), comparing.read(new), across)
    print(comparing.text(found))
    raise typer.Exit(comparing.regressed(found))


@command("warm", "--arch sm_90 --out /tmp/cache --smoke", "--out /tmp/cache --check")
def fill_cache(
    arch: Annotated[str, option("the GPU to compile for")] = "sm_90",
    out: Annotated[Path | None, typer.Option(envvar="TRITON_CACHE_DIR", help="a folder")] = None,
    workload: Workloads = "",
    verify: Annotated[bool, option("exit 1 if --out is of other kernels", "--check")] = False,
    smoke: Annotated[bool, option("the many kernels of the smoke check, too", "--smoke")] = False,
) -> None:  # fmt: skip
    """Fills Triton's compile cache with what the block launches on a GPU that is not there."""
    from . import warm

    check("arch", [arch], warm.NUM_SMS)
    if reason := cannot_compile("warm"):
        raise UsageError(reason)
    if not verify:
        if out is None:
            raise UsageError("warm needs --out or TRITON_CACHE_DIR: a folder for the cache.")
        print(warm.warm(arch, select(workload, "all"), out, smoke))
    for name, value in warm.key(arch).items():
        print(f"{name}: {value}")
    if verify and out is not None:
        if not (out / warm.FILE).exists():
            raise UsageError(f"{out} has no {warm.FILE}: `warm` did not fill it.")
        print(f"{warm.relocate(out)} entries adjusted to the folder's place")
        differing = warm.differences(out)
        print(*(differing or ["the cache is of this Triton and these kernels"]), sep="\n")
        raise typer.Exit(bool(differing))


@command("codegen", "--arch sm_90", "--arch gfx942 --out /tmp/codegen.csv")
def codegen(
    arch: Annotated[list[str] | None, option("repeatable; without it, all")] = None,
    out: Annotated[Path, KEPT] = programs.KEPT,
) -> None:
    """Registers, spills, shared memory and loads of every kernel with its tiles, without a GPU.

    Programs that have not changed are not compiled again. `git diff` shows what a change did.
    """
    check("arch", arch or [], programs.ORDER)
    if reason := cannot_compile():
        raise UsageError(reason)
    programs.update(arch or programs.ORDER, out)


@command("model", "--workload seg_19,yolo_p3", "--against HEAD~1 --out /tmp/model.csv")
def model(
    workload: Workloads = "",
    layout: Layouts = f"{NCHW},{CHANNELS_LAST}",
    gpu: Annotated[Any, names("GPU", modelling.GPUS)] = "H200",
    against: Annotated[str, option("a CSV file, or a revision with its kept file")] = "",
    out: Annotated[Path, KEPT] = modelling.KEPT,
) -> None:
    """Modelled µs of every launch of a block by cause, beside floor and planner, without a GPU."""
    if reason := cannot_compile("model"):
        raise UsageError(reason)
    chosen = [w.name for w in select(workload, "all") if workload or not w.small]
    try:
        modelling.update(gpu, list(itertools.product(chosen, layout)), out, against)
    except ValueError as error:
        raise UsageError(error) from None
