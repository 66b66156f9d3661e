"""Verdicts on kernels, and the folder that keeps them for other processes.

A verdict holds for one GPU, driver, compiler and package. Files are replaced atomically, because
other processes read and write them too.
"""

import contextlib
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

from . import compilers, folders, tiles

OPTIONS = ("PTXAS_OPTIONS", "DISABLE_PTXAS_OPT")  # variables that change what ptxas makes
_warned: set[str] = set()


class Verdict(NamedTuple):
    """Verdict on one launcher with given channels, dtypes and flags."""

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
    """The scope of a verdict: GPU, driver, compiler, and the kernels with their tiles."""
    sources, package = hashlib.sha256(), Path(__file__).parents[1]
    patterns = "kernels/*.py", "kernels/tiles/*.json", "runtime/*.py", "precision.py"
    shipped = sorted(path for pattern in patterns for path in package.glob(pattern))
    for path in [*shipped, *tiles.tuned_files(tiles.gpu(device))]:
        with contextlib.suppress(OSError):  # a tuned table that nobody can read is not used
            sources.update(path.read_bytes())
    facts = {"triton": triton.__version__, "kernels": sources.hexdigest()[:16]}
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        version, path = compilers.ptxas(capability)
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "driver": compilers.driver(),
            "ptxas": f"{version} {path}",
            "options": [os.environ.get(name, "") for name in OPTIONS],
        }
    return facts


def allows_tf32() -> bool:
    """PyTorch's own switch."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _file(device, kernel, case):
    facts = json.dumps([context(device), kernel, case], sort_keys=True)
    return folders.cache() / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"


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
        os.chmod(file.name, 0o644)  # a folder may be shared by users
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
    """Warns once per kernel and process that it is not used."""
    if verdict.kernel in _warned:
        return
    _warned.add(verdict.kernel)
    facts = context(device)
    known = "; ".join(map(str, compilers.affected(device)))
    compiled = f"Triton {facts['triton']}, ptxas {facts.get('ptxas', 'unknown')}"
    warnings.warn(
        f"da_triton does not use its kernel {verdict.kernel!r} here, because it failed a check on "
        f"its first use: {verdict.reason} (error {verdict.error:.1e}, allowed "
        f"{verdict.allowed:.0e}; {verdict.case}). PyTorch operations in float32 take its place. "
        f"It was compiled by {compiled}. Known faults there: {known}. "
        f"{compilers.WAY_OUT}; `python -m da_triton.check` shows which kernels are right.",
        stacklevel=2,
    )


def warn_of_a_capture(kernel):
    """Warns once that a captured kernel was not proved."""
    if "capture" in _warned:
        return
    _warned.add("capture")
    warnings.warn(
        f"da_triton's kernel {kernel!r} is captured into a CUDA graph before it was proved, and "
        "the compiler is known to miscompile some kernels for this GPU. Call the layer once before "
        "the capture.",
        stacklevel=2,
    )
