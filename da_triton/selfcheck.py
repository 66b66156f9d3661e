"""Checks the kernels on this machine: ``check`` and ``python -m da_triton.check``."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .precision import matmul_precision

HALF, FLOAT32, TF32 = (torch.bfloat16, torch.float16), "float32", "TF32"


@dataclasses.dataclass(frozen=True)
class Case:
    """A block: channels, features and descriptors of all heads, positions, and its memory."""

    channels: int
    c_m: int
    c_n: int
    heads: int = 1
    length: int = 784
    channels_last: bool = False


CASES = (Case(256, 128, 128), Case(512, 256, 32), Case(64, 19, 19))
# Together they reach every tile of the fused kernels, and each kernel of the core.
THOROUGH = (
    *CASES,
    Case(128, 128, 128, heads=4),
    *(Case(c, c // 2, n) for c in (64, 128, 256, 512) for n in (32, 64, 128)),
    *(Case(c, c // 2, n) for c in (256, 512) for n in (256, 512)),
    Case(512, 512, 32),
    Case(1024, 64, 32),
    *(Case(c, c // 2, 64, channels_last=True) for c in (256, 512)),
    *(Case(c, c // 2, 64, length=length) for c in (256, 512) for length in (196, 49)),
    *(Case(512, c_m, 32, length=196) for c_m in (256, 512)),  # with few partials
)


@dataclasses.dataclass(frozen=True)
class Check:
    """Result of ``check``. ``verdicts``: one per launcher, dtypes, channels and flags, each with
    ``kernel``, ``case``, ``tiles``, ``error``, ``allowed``, ``reason`` and ``right``."""

    facts: dict[str, Any]  # of the machine and the compiler
    verdicts: tuple[Any, ...]
    obstacle: str = ""  # why nothing could be checked

    @property
    def right(self) -> bool:
        """Every kernel was checked and is right."""
        return not self.obstacle and all(v.right for v in self.verdicts)

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.facts.items() if value]
        if self.obstacle:
            lines.append(f"The kernels were not checked: {self.obstacle}")
        if not self.verdicts:
            return "\n".join(lines)
        rows = [("kernel", "dtype", "cases", "largest error", "allowed", "")]
        for (kernel, allowed), group in _groups(self.verdicts).items():
            failed = sum(not v.right for v in group)
            worst = max(v.error for v in group)
            dtype = _dtypes(group[0])
            state = f"{failed} WRONG" if failed else "right"
            rows.append((kernel, dtype, str(len(group)), f"{worst:.1e}", f"{allowed:.0e}", state))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows), ""]
        wrong = [v for v in self.verdicts if not v.right]
        lines += [f"{v.kernel}: {v.reason} (tiles {v.tiles}; {v.case})" for v in wrong]
        if wrong:
            lines.append(
                f"{len(wrong)} of {len(self.verdicts)} cases are wrong. A newer Triton may compile "
                "them correctly, and so may a newer ptxas, named in TRITON_PTXAS_PATH (on "
                "Blackwell TRITON_PTXAS_BLACKWELL_PATH); backend='torch' needs neither."
            )
        else:
            lines.append(f"All {len(self.verdicts)} cases are right.")
        return "\n".join(lines)


def check(
    device: torch.device | str | int | None = None,
    *,
    thorough: bool = False,
    cases: Iterable[Case] | None = None,
) -> Check:
    """Runs every kernel on a GPU against PyTorch operations in float64, and prints the results.

    Each launch of a few blocks, forward and backward on every route the planner has for them, in
    half precision, float32 and TF32, masked and not, is repeated on a random input. The results
    must be within the rounding of their dtype, element by element, and the same each time.

    Args:
        device: the GPU, by default the current one. Without a GPU, the kernels are checked in
            Triton's interpreter if TRITON_INTERPRET=1 is set, which is slow.
        thorough: more channels, memory formats and lengths, and 20 repetitions instead of 4.
        cases: blocks to check instead.

    Returns:
        A :class:`Check`. ``right`` says whether everything was; ``str`` gives what is printed:
        GPU, driver, versions of PyTorch, Triton and ptxas, known faults of this pair of GPU and
        compiler, the largest error of each kernel, and each case that is wrong. Where the kernels
        cannot run, ``obstacle`` says why.

    Raises:
        RuntimeError, ValueError: ``device`` is not a device of this machine.
    """
    found = _check(device, thorough, cases)
    print(found)
    return found


def _check(device, thorough, cases=None, part=(0, 1)):
    if importlib.util.find_spec("triton") is None:
        return Check(_versions(), (), "Triton is not installed; backend='torch' needs none.")
    from .ops.triton import core
    from .runtime import guard

    x = torch.empty(0, device=_device(device))
    facts = _versions() | _gpu(x.device)
    if obstacle := core.obstacle(x):
        return Check(facts, (), obstacle)
    first, count = part
    # A kernel that faults is the last: nothing can run in this process after it.
    with guard.examine(20 if thorough else 4) as verdicts, guard.until_a_fault():
        for unit in itertools.islice(units(thorough, x.is_cuda, cases), first, None, count):
            run(*unit, x.device, thorough)
    return Check(facts, tuple(verdicts))


def _in_processes(count: int, options: Sequence[str]) -> Check:
    """The check by several processes, each with a part of the blocks."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.json" for i in range(count)]
        command = [sys.executable, "-m", "da_triton.check", *options]
        running = [
            subprocess.Popen(
                [*command, "--json", str(file), "--part", str(i), str(count)],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for i, file in enumerate(files)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in running]
        parts = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.exists()]
        missing = [e for f, e in zip(files, errors, strict=True) if not f.exists()]
    return _joined(parts, missing)


def _joined(parts: Sequence[dict[str, Any]], errors: Sequence[str]) -> Check:
    """One ``Check`` from the files of several processes; ``errors``: output of the others."""
    from .runtime.verdicts import Verdict

    verdicts: dict[tuple[str, str], Any] = {}
    for part in parts:
        for found in part["verdicts"]:
            error = float("inf") if found["error"] is None else found["error"]
            verdict = Verdict(**{name: found[name] for name in Verdict._fields} | {"error": error})
            key = verdict.kernel, verdict.case
            if key not in verdicts or not verdict.right:
                verdicts[key] = verdict
    obstacles = [part["obstacle"] for part in parts if part["obstacle"]]
    obstacles += [(["it printed nothing", *e.splitlines()])[-1] for e in errors]
    facts = parts[0]["facts"] if parts else _versions()
    return Check(facts, tuple(verdicts.values()), "; ".join(dict.fromkeys(obstacles)))


def _device(device):
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def units(thorough=True, gpu=True, cases=None) -> Iterator[tuple[Case, Any, bool]]:
    """Arguments of ``run``: block, dtype, masked. Float32 has no fused kernels, so few blocks."""
    blocks = cases or (THOROUGH if thorough else CASES)
    wanted = itertools.product(blocks, HALF if gpu else HALF[1:])
    full = itertools.product(cases or CASES, (FLOAT32, TF32) if gpu else ())
    for (case, dtype), masked in itertools.product((*wanted, *full), (False, True)):
        yield case, dtype, masked


def run(case, dtype, masked, device, every=False):
    """A training step of a block on routes that the planner has for it."""
    from .ops.triton import routes

    precision = "tf32" if dtype == TF32 else "ieee"
    dtype = torch.float32 if isinstance(dtype, str) else dtype
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    x = normal(2, case.channels, case.length)
    x = x.mT.contiguous().mT if case.channels_last else x
    sizes = ((case.c_m, case.channels), (case.c_n, case.channels), (case.channels, case.c_m))
    a, b, out = (normal(*size) * size[1] ** -0.5 for size in sizes)
    weights = routes.Weights(
        a, normal(case.c_m), b, b.flip(0), normal(case.c_n), out, normal(case.channels)
    )
    mask = None
    if masked:
        mask = torch.rand(2, case.length, generator=generator, device="cpu") < 0.7
        mask = mask.to(device, torch.uint8)
    options = routes.Options(case.heads, 1.0, 1.0, 1.0, True, True)
    with torch.no_grad(), matmul_precision(precision):
        for route, save_v in _routes(x, case, every):
            _, lse, g, v = routes.forward(x, weights, mask, options, route, save_v)
            routes.backward(x, x, weights, mask, lse, g, v, options, route)


def _routes(x, case, every) -> Iterator[tuple[Any, bool]]:
    """Routes of the planner, with each backward pass; V saved or projected again.

    ``every``: all orders of unfused passes too, which else have one of each way to distribute.
    """
    from .ops.triton.plan import kernel_limits
    from .planning import planner
    from .planning.costs import XH
    from .planning.shapes import Shape
    from .runtime import launch, tiles

    sizes = case.channels, case.c_m, case.c_n, case.heads, case.length
    s = Shape(2, *sizes, x.element_size(), True, launch.channels_last(x))
    arch, num_sms = tiles.architecture(x.device), launch.num_sms(x.device)
    limits = kernel_limits(s, case.channels, arch, num_sms)
    fused = ("fused", XH)
    found = [planned.route for planned in planner.routes(s, limits)]
    if not every:
        parts = [(r.gather, r.distribute, r.order.from_x, r.to_channels_last) for r in found]
        ways = [(r.distribute, r.order.through_h) for r in found]
        firsts = {parts.index(each) for each in parts} | {ways.index(each) for each in ways}
        found = [found[i] for i in sorted(firsts)]
    for route in found:
        unfused = ("unfused", route.order)
        for kind, order in (unfused, fused) if limits.backward else (unfused,):
            copied = route.to_channels_last
            full = route._replace(
                backward=kind, backward_order=order,
                backward_to_channels_last=copied and kind == "unfused",
            )  # fmt: skip
            yield full, route.gather == "fused" or copied


def _versions() -> dict[str, Any]:
    from . import __version__

    triton_version = "not installed"
    if importlib.util.find_spec("triton"):
        import triton

        triton_version = triton.__version__
    return {
        "da_triton": __version__,
        "PyTorch": torch.__version__,
        "Triton": triton_version,
    }


def _gpu(device) -> dict[str, Any]:
    from .runtime import compilers, launch

    if device.type != "cuda":
        return {
            "device": f"{device}, in Triton's interpreter" if launch.INTERPRETED else str(device)
        }
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return {"GPU": name, "ROCm": torch.version.hip}
    capability = torch.cuda.get_device_capability(device)
    version, path = compilers.ptxas(capability)
    faults = compilers.faults(compilers.compiler(device))
    return {
        "GPU": f"{name}, compute capability {capability[0]}.{capability[1]}",
        "driver": _driver() or f"CUDA {compilers.driver()}",
        "ptxas": f"{version} ({path})",
        "known faults": "; ".join(map(str, faults)) or "none",
    }


def _driver():
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        printed = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return printed.stdout.strip().partition("\n")[0]


def _groups(verdicts):
    groups: dict[tuple[str, str, float], list[Any]] = {}
    for v in verdicts:
        groups.setdefault((v.kernel, _dtypes(v), v.allowed), []).append(v)
    return {(kernel, allowed): group for (kernel, _, allowed), group in groups.items()}


def _dtypes(verdict):
    return next((name for name in ("bfloat16", "float16") if name in verdict.case), "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m da_triton.check``: 0 if all kernels are right, 1 if not, 2 if none could run."""
    parser = argparse.ArgumentParser(
        prog="python -m da_triton.check",
        description="Checks every kernel on a GPU against PyTorch operations in float64.",
        epilog="Exit status: 0 all are right, 1 some are wrong, 2 none could be checked.",
    )
    parser.add_argument("--device", help="such as cuda:1; the current GPU by default")
    parser.add_argument("--thorough", action="store_true", help="more shapes, 20 repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all cases to a file")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        if arguments.jobs > 1:
            options = ["--thorough"] * arguments.thorough
            options += ["--device", arguments.device] if arguments.device else []
            found = _in_processes(arguments.jobs, options)
        else:
            found = _check(arguments.device, arguments.thorough, part=arguments.part)
    except (RuntimeError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(found)
    if arguments.json:
        verdicts = [
            {**v._asdict(), "error": v.error if math.isfinite(v.error) else None, "right": v.right}
            for v in found.verdicts
        ]
        text = json.dumps({"facts": found.facts, "obstacle": found.obstacle, "verdicts": verdicts})
        arguments.json.write_text(text + "\n", encoding="utf-8")
    if any(not v.right for v in found.verdicts):
        return 1
    return 2 if found.obstacle else 0
