"""Everything a figure depends on besides the code, and which code that is."""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

GPU_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
COMMIT = "DA_TRITON_COMMIT"
# Files that decide what is measured.
SOURCES = ("da_triton/**/*.py", "da_triton/kernels/tiles/*.json", "tests/**/*.py", "bench/**/*.py")


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "code": code(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    return facts | ({"cuda": torch.version.cuda, "gpu": gpu()} if device.type == "cuda" else {})


def columns(facts: dict[str, Any]) -> dict[str, Any]:
    """The part that goes into every row of a CSV file, so that a row can be read alone."""
    read = facts.get("gpu") or {}
    return {
        "machine": read.get("name", facts.get("cpu")),
        "driver": read.get("driver_version"),
        "clock_mhz": read.get("clocks.sm"),
        **{k: facts.get(k) for k in ("cuda", "torch", "triton", "commit", "code", "date")},
    }


def gpu() -> dict[str, str] | None:
    """Name, driver, clocks in MHz and the like, as ``nvidia-smi`` reads them."""
    query = f"--query-gpu={','.join(GPU_FIELDS)}"
    text = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    if text is None:
        return None
    return dict(zip(GPU_FIELDS, text.splitlines()[0].split(", "), strict=False))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> str | None:
    """The commit of a checkout, with ``-dirty`` where tracked files differ from it.

    Untracked files do not make it dirty: Python files among them change ``code``.
    A copy without ``.git`` has the variable ``DA_TRITON_COMMIT``; None where neither is known.
    """
    checkout = ("git", f"--git-dir={root / '.git'}", f"--work-tree={root}")
    described = _output(*checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described or os.environ.get(COMMIT) or None


def code(root: Path = ROOT) -> str | None:
    """A hash of ``SOURCES``: all Python files, and the shipped tables of tiles; None without them.

    Two runs with the same hash ran the same code, whatever results they left in the checkout.
    """
    found = hashlib.sha256()
    for pattern in SOURCES:
        paths = sorted(root.glob(pattern))
        if not paths:
            return None
        for path in paths:
            name = path.relative_to(root).as_posix()
            found.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text() if info.exists() else "", re.M)
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """The output of a command; None where it is missing, fails or prints nothing."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return ended.stdout.strip() or None
