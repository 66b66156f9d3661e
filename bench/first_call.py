"""How long a fresh process takes to its first result, with an empty and with a full kernel cache.

``seconds`` starts such processes; run as a module, this file is one:

    python -m bench.first_call WORKLOAD PROVIDER LAUNCH LAYOUT MODE DTYPE DEVICE

prints the seconds from the ready problem to the end of the first call.
"""

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from . import problems, providers
from .isolation import isolated, last_line
from .measure import OK, Row, describe
from .providers import Provider
from .workloads import select

CACHES = {
    "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "DA_TRITON_CACHE_DIR": "da_triton",
}  # fmt: skip
SAID = "seconds of the first call:"  # stdout and stderr come together
LIMIT = 600.0  # seconds for both calls


def seconds(
    workload: str,
    provider: Provider,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    limit: float = LIMIT,
) -> tuple[float, float]:
    """With an empty cache, then with what that run left in it; both within ``limit`` seconds.

    Raises:
        RuntimeError: with the last line of what the process said.
    """
    arguments = [
        workload, provider.name, provider.launch, provider.layout, mode,
        str(dtype).removeprefix("torch."), str(device),
    ]  # fmt: skip
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: os.path.join(folder, part) for name, part in CACHES.items()}
        cold, warm = (_fresh(arguments, caches, deadline - time.monotonic()) for _ in range(2))
    return cold, warm


def adding(
    add: Callable[[list[Row]], None], groups: Sequence[Sequence[Provider]], dtype, device
) -> Callable[[list[Row]], None]:
    """``add`` for rows that are completed with the seconds of their providers' first calls."""
    known = {(p.name, p.launch, p.layout): p for group in groups for p in group}

    def completed(rows: list[Row]) -> None:
        for row in rows:
            if row["status"] == OK:
                provider = known[row["provider"], row["launch"], row["layout"]]
                try:
                    found = seconds(row["workload"], provider, row["mode"], dtype, device)
                    row["first_call_cold_s"], row["first_call_warm_s"] = found
                except Exception as error:
                    row["status"] = f"failed: {describe(error)}"
        add(rows)

    return completed


def _fresh(arguments, caches, limit):
    ended = isolated([sys.executable, "-m", "bench.first_call", *arguments], limit, None, caches)
    if ended.status:
        raise RuntimeError(f"first call of {arguments[1]!r}: {last_line(ended.output)}")
    if ended.status is None:
        raise RuntimeError(f"first call of {arguments[1]!r}: {ended}")
    (found,) = re.findall(rf"^{SAID} (\S+)$", ended.output, re.MULTILINE)
    return float(found)


def main(workload: str, name: str, launch: str, layout: str, mode: str, dtype: str, where: str):
    device, dtype_ = torch.device(where), getattr(torch, dtype)
    (work,) = select([workload], "all")
    (provider,) = providers.select([name], launch, device, dtype_, [layout])
    problem = provider.problem(problems.draw(work, mode, dtype_, device))
    start = time.perf_counter()
    provider.setup(problem)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(SAID, time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
