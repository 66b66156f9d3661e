"""``python -m bench sanitize``: every kernel under NVIDIA's memory checkers, on small odd shapes.

``check`` runs compute-sanitizer over processes of this module, one for each tool and group of
kernels; run as a module, it is such a process:

    python -m bench.sanitize GROUP
"""

import importlib.util
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from .isolation import Ended, Family, ending, isolated

NAME = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck")
# racecheck does not model asynchronous matrix products, and initcheck reports pad rows that are
# read and whose products are not: both are for a closer look.
DEFAULT = ("memcheck",)
AT_ONCE = 4  # processes on one GPU
TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
LIMIT = 600.0  # seconds
FAILED = 86  # its exit status where the tool found something
# Without PyTorch's cache every tensor is an allocation, beyond whose end memcheck sees.
SETTINGS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")


def core(device: torch.device, heads: int, m: int, n: int, length: int = 37) -> None:
    """Gather and distribute, forward and backward, with a mask and without."""
    from da_triton.kernels import distribute, gather

    a, b, v = (_normal(device, 2, heads, c, length) for c in (m, n, n))
    for keep in (None, _mask(device, 2, length)):
        g, lse = gather.gather_forward([(a, b, keep)], 0.5)
        for softmax in (True, False):
            z = distribute.distribute_forward(g, v, 1.0, softmax, 0.5)
            dg, _ = distribute.distribute_backward(z, g, v, 1.0, softmax, 0.5, True, True)
        gather.gather_backward(dg, a, b, keep, g, lse, None, 0.5, True, True)


def block(
    device: torch.device, sizes: tuple[int, int, int], way: str, order: str, backward: str
) -> None:
    """The block on a route, forward and backward, in both memory formats."""
    from da_triton.ops.triton import routes as kernels
    from da_triton.planning.shapes import ORDERS, XH, Route

    channels, c_m, c_n = sizes
    backward_order = XH if backward == "fused" else ORDERS[order]
    route = Route(ORDERS[order], way, way, backward, backward_order, 1 if way == "fused" else 2)
    shapes = (
        (c_m, channels), (c_m,), (c_n, channels), (c_n, channels), (c_n,), (channels, c_m),
        (channels,),
    )  # fmt: skip
    w = kernels.Weights(*(_normal(device, *shape) for shape in shapes))
    x, keep = _normal(device, 2, channels, 37), _mask(device, 2, 37)
    options = kernels.Options(2, 0.5, 0.5, 1.0, True, True)
    for maps in (x, x.mT.contiguous().mT):
        out, lse, g, v = kernels.forward(maps, w, keep, options, route, True)
        kernels.backward(out, maps, w, keep, lse, g, v, options, route)


SMALL, BY_CHANNELS = (20, 6, 4), (130, 6, 68)
GROUPS: dict[str, Callable[[torch.device], None]] = {
    "core, one tile": lambda device: core(device, 2, 5, 9),
    "core, positions in chunks": lambda device: core(device, 1, 5, 3, 3001),
    "core, all maps": lambda device: core(device, 2, 130, 9),
    "core, blocks": lambda device: core(device, 1, 5, 514),
    "block, fused": lambda device: block(device, SMALL, "fused", "XH", "fused"),
    "block, fused from A": lambda device: block(device, SMALL, "fused", "AH", "split"),
    "block, fused by channels": lambda device: block(device, BY_CHANNELS, "fused", "XH", "split"),
    "block, split AZ": lambda device: block(device, SMALL, "split", "AZ", "split"),
    "block, split XH": lambda device: block(device, SMALL, "split", "XH", "split"),
}


def _normal(device: torch.device, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=device).half()


def _mask(device: torch.device, *shape: int) -> torch.Tensor:
    return (torch.rand(shape, device=device) > 0.3).view(torch.uint8)


def find_tool() -> str | None:
    """The path of compute-sanitizer: from PATH, the CUDA toolkit, or NVIDIA's wheels."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders += TOOLKITS
    places = [os.path.join(f, part) for f in folders for part in ("bin", NAME)]
    if found := shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(places)):
        return found
    wheels = importlib.util.find_spec("nvidia")
    for folder in (wheels and wheels.submodule_search_locations) or ():
        for path in sorted(Path(folder).rglob(NAME)):
            if path.is_file() and os.access(path, os.X_OK):
                return str(path)
    return None


def check(
    tool: str,
    tools: Sequence[str],
    groups: Sequence[str],
    tell: Callable,
    limit: float = LIMIT,
) -> pd.DataFrame:
    """A row for each tool and group: how many errors, and what else went wrong.

    Several groups run at once. ``tell`` gets the output of each process that has errors; ``limit``
    is in seconds, per process and for all of them together.
    """
    deadline, family = time.monotonic() + limit, Family()

    def run(pair: tuple[str, str]) -> Ended:
        name, group = pair
        command = [
            tool, "--tool", name, "--error-exitcode", str(FAILED),
            sys.executable, "-m", "bench.sanitize", group,
        ]  # fmt: skip
        return isolated(command, deadline - time.monotonic(), None, SETTINGS, family=family)

    pairs = [(name, group) for name in tools for group in groups]
    rows = []
    for (name, group), ended in zip(pairs, family.map(run, pairs, AT_ONCE), strict=True):
        errors, status = _read(ended)
        rows.append({"tool": name, "kernels": group, "errors": errors, "status": status})
        if errors or status != "ok":
            tell(f"{name}, {group}:\n{ended.output}")
    return pd.DataFrame(rows)


def _read(ended: Ended) -> tuple[int, str]:
    """The number of errors, and "ok" or what is wrong with the process."""
    if ended.status is None:
        return 0, str(ended)
    found = [int(one or other) for one, other in SUMMARY.findall(ended.output)]
    if not found:
        return 0, f"no summary, {ending(ended.status)}"
    if ended.status not in (0, FAILED) or (ended.status and not sum(found)):
        return sum(found), ending(ended.status)
    return sum(found), "ok"


if __name__ == "__main__":
    GROUPS[sys.argv[1]](torch.device("cuda"))
    torch.cuda.synchronize()
