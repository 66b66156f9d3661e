"""What was found of a kernel, and the folder that keeps it for other processes.

A verdict holds for one GPU, driver, compiler and package. A file is written whole or not at all:
other processes read and write the same ones.
"""

import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import compilers

_warned: set[str] = set()


class Verdict(NamedTuple):
    """Of one launcher with its channels, dtypes and flags."""

    kernel: str
    case: str  # dtypes, sizes and flags
    tiles: str  # of the kernels that it launched
    error: float  # largest |found − true| / (RMS of true + |true|)
    allowed: float
    reason: str  # what is wrong; empty if nothing is

    @property
    def right(self) -> bool:
        return not self.reason


@functools.cache
def context(device):
    """What a verdict holds for: GPU, driver, compiler, and the kernels with their tiles."""
    sources, here = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *here.glob("data/*.json")]):
        sources.update(path.read_bytes())
    facts = {"triton": triton.__version__, "kernels": sources.hexdigest()[:16]}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version, path = compilers.ptxas(capability)
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": compilers.driver(),
            "ptxas": f"{version} {path}",
            "ptxas options": os.environ.get("PTXAS_OPTIONS", ""),
        }
    return facts


def allows_tf32() -> bool:
    """PyTorch's own switch."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def folder() -> Path:
    """Where verdicts are remembered."""
    named = os.environ.get("DA_TRITON_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "da_triton"


def _file(device, kernel, case):
    facts = json.dumps([context(device), kernel, case, allows_tf32()], sort_keys=True)
    return folder() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"


def remembered(device, kernel, case):
    try:
        found = json.loads(_file(device, kernel, case).read_text(encoding="utf-8"))["verdict"]
        return Verdict(**found)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        return None  # absent, unreadable or of another version of this file


def remember(device, verdict):
    try:
        path = _file(device, verdict.kernel, verdict.case)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.stem, delete=False, encoding="utf-8"
        ) as file:
            json.dump({"context": context(device), "verdict": verdict._asdict()}, file)
        os.replace(file.name, path)
    except (OSError, RuntimeError) as error:
        if "" not in _warned:
            _warned.add("")
            warnings.warn(
                f"da_triton proved a kernel and cannot remember it: {error}. Every process will "
                "prove it again. Name a folder that can be written in DA_TRITON_CACHE_DIR.",
                stacklevel=2,
            )


def warn(verdict, device):
    """Says once per kernel and process that it is not used."""
    if verdict.kernel in _warned:
        return
    _warned.add(verdict.kernel)
    facts = context(device)
    known = "; ".join(f"{f.what} ({f.report})" for f in compilers.affected(device))
    compiled = f"Triton {facts['triton']}, ptxas {facts.get('ptxas', 'unknown')}"
    warnings.warn(
        f"da_triton does not use its kernel {verdict.kernel!r} here, because it failed a check on "
        f"its first use: {verdict.reason} (error {verdict.error:.1e}, allowed "
        f"{verdict.allowed:.0e}; {verdict.case}). PyTorch operations take its place, with right "
        f"results and at their speed. It was compiled by {compiled}. Known faults there: {known}. "
        "A newer Triton, or a newer ptxas named in TRITON_PTXAS_PATH, may compile it right; "
        "`python -m da_triton.check` shows which kernels are right.",
        stacklevel=2,
    )
