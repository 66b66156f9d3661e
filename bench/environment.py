"""Everything a figure depends on besides the code, and which code that is."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

CARD_FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
COMMIT = "DA_TRITON_COMMIT"
SOURCES = ("da_triton", "tests", "bench")  # folders whose Python files decide what is measured


def environment(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **commit(),
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
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda, "card": card()}
    return facts


def columns(facts: dict[str, Any]) -> dict[str, Any]:
    """The part that goes into every row of a CSV file, so that a row can be read alone."""
    read = facts.get("card") or {}
    return {
        "machine": read.get("name", facts.get("cpu")),
        "driver": read.get("driver_version"),
        "clock_mhz": read.get("clocks.sm"),
        **{k: facts.get(k) for k in ("cuda", "torch", "triton", "commit", "code", "date")},
    }


def card() -> dict[str, str] | None:
    """Name, driver, clocks in MHz and the like, as ``nvidia-smi`` reads them."""
    query = f"--query-gpu={','.join(CARD_FIELDS)}"
    text = _output("nvidia-smi", query, "--format=csv,noheader,nounits")
    if text is None:
        return None
    values = (value.strip() for value in text.splitlines()[0].split(","))
    return dict(zip(CARD_FIELDS, values, strict=False))


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The commit of a checkout, and whether files differ from it; None where it is unknown.

    A copy without ``.git`` is described by the variable ``DA_TRITON_COMMIT``: a hash, followed by
    ``-clean`` or ``-dirty`` where that is known.
    """
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is not None and Path(top).resolve() == root.resolve():
        changes = _run("git", "-C", str(root), "status", "--porcelain")
        return {
            "commit": _output("git", "-C", str(root), "rev-parse", "HEAD"),
            "uncommitted_changes": None if changes is None else bool(changes),
        }
    given, _, state = os.environ.get(COMMIT, "").strip().partition("-")
    return {
        "commit": given or None,
        "uncommitted_changes": {"clean": False, "dirty": True}.get(state),
    }


def code(root: Path = ROOT) -> str | None:
    """A hash of all Python files of the package, its tests and its benchmark; None without them.

    Two runs with the same hash ran the same code, whatever results they left in the checkout.
    """
    found = hashlib.sha256()
    for folder in SOURCES:
        paths = sorted((root / folder).rglob("*.py"))
        if not paths:
            return None
        for path in paths:
            name = path.relative_to(root).as_posix()
            found.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing, fails or prints nothing."""
    return _run(*command) or None


def _run(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
