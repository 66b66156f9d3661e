"""What the commands' arguments have in common: names with commas between, and where they run."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from . import names, problems
from .measure import CudaTimer, Timer, WallTimer
from .providers import EAGER, GRAPH, LAYOUTS
from .tables import METRICS

MODES = {
    "fwd": problems.FORWARD, "bwd": problems.BACKWARD, "fwd_bwd": problems.STEP,
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class UsageError(ValueError):
    """Arguments that make no sense, with what would."""


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    shown = "\n".join(f"  python -m bench {line}".rstrip() for line in examples.split("\n"))
    return argparse.ArgumentParser(
        prog=f"python -m bench {command}".rstrip(),
        description=description,
        epilog=f"examples:\n{shown}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def add_lists(made: argparse.ArgumentParser, **defaults: str) -> None:
    """Options that take names with commas between."""
    help_ = {
        "workload": "names, instead of the default selection",
        "provider": "names, see bench/providers.py; without it, all that run here",
        "mode": ", ".join(MODES),
        "dtype": f"{', '.join(DTYPES)}; default bf16 on a GPU, fp32 on a CPU",
        "layout": ", ".join(LAYOUTS),
        "launch": f"{EAGER}, {GRAPH} (CUDA graphs)",
        "metric": ", ".join(METRICS),
    }
    for name, default in defaults.items():
        made.add_argument(
            f"--{name}", type=listed, default=listed(default), metavar="NAME,…", help=help_[name]
        )


def chosen(kind: str, given: Sequence[str], known: dict[str, Any]) -> list[Any]:
    names.check(kind, given, list(known))
    return [known[name] for name in given]


def here() -> tuple[torch.device, Timer]:
    if torch.cuda.is_available():
        return torch.device("cuda"), CudaTimer()
    return torch.device("cpu"), WallTimer()


def dtypes(given: Sequence[str], device: torch.device) -> list[torch.dtype]:
    return chosen("dtype", given or ["bf16" if device.type == "cuda" else "fp32"], DTYPES)


def launches(given: Sequence[str], device: torch.device) -> Sequence[str]:
    names.check("launch mode", given, [EAGER, GRAPH])
    if GRAPH in given and device.type != "cuda":
        raise UsageError("launch mode 'graph' is a CUDA graph, and there is no GPU here.")
    return given
