"""``python -m bench [gpu] [--out DIR] [--workload NAME] [--quick] [--budget SECONDS]``.

``python -m bench codegen`` compiles the kernels instead of timing them; see ``codegen.cli``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import providers
from .codegen.cli import main as codegen
from .gpu import run_gpu
from .measure import Bench, Budget, CudaTimer, Effort, Timer, WallTimer
from .report import Report, environment
from .workloads import WORKLOADS, UnknownWorkloadError, Workload, select

DEFAULT = Effort(warm_up=1, rounds_min=5, rounds_max=50, seconds=2.0)
QUICK = Effort(warm_up=1, rounds_min=3, rounds_max=20, seconds=1.0)
CPU_NOTE = (
    "A CPU run: the torch backend in float32, batches reduced. Triton latencies need a GPU; "
    "measure them with `python -m bench gpu`."
)
BUSY_NOTE = (
    "The machine was busy (load {load:.1f} on {cpus} CPUs) before the run: expect noise and bias."
)


def main(argv: Sequence[str] | None = None, table: Sequence[Workload] = WORKLOADS) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["codegen"]:
        return codegen(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m bench", description="Eager block against ours")
    parser.add_argument("where", nargs="?", choices=["gpu"], help="the full run on a GPU")
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder for results")
    parser.add_argument(
        "--workload", action="append", default=[], metavar="NAME", help="repeatable"
    )
    parser.add_argument("--quick", action="store_true", help="fewest workloads and repetitions")
    parser.add_argument("--budget", type=float, default=480, help="seconds, with gpu")
    options = parser.parse_args(argv)
    everything = "all" if options.where == "gpu" else "default"
    try:
        chosen = select(options.workload, "quick" if options.quick else everything, table)
    except UnknownWorkloadError as error:
        print(error, file=sys.stderr)
        return 2
    if options.where is None:
        return run_here(options.out, chosen, options.quick)
    if not torch.cuda.is_available():
        print("`python -m bench gpu` needs a CUDA GPU, and there is none here.", file=sys.stderr)
        return 2
    return run_gpu(options.out, chosen, Budget(options.budget))


def run_here(out: Path, workloads: Sequence[Workload], quick: bool) -> int:
    """Eager against ours with eager launches, on the GPU if there is one, else on the CPU.

    On a CPU, where there is time to compile, against ``torch.compile`` of eager too.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    timer: Timer = CudaTimer() if on_gpu else WallTimer()
    facts = environment(device)
    name = (facts.get("card") or {}).get("name", facts["cpu"])
    report = Report(out, f"Double attention on {name}, {str(dtype).removeprefix('torch.')}")
    report.record(**facts)
    if not on_gpu:
        report.notes.append(CPU_NOTE)
        if (facts["load"] or 0) > facts["cpus"] / 2:
            report.notes.append(BUSY_NOTE.format(**facts))
    bench = Bench(device, dtype, timer, QUICK if quick else DEFAULT, Budget(float("inf")))
    if on_gpu:
        sweep = providers.plain("triton")
    else:
        sweep = providers.plain("torch") if quick else providers.cpu_sweep()
    bench.run(workloads, [sweep], report.add)
    print(report.finish(short=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
