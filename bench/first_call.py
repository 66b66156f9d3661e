"""How long a fresh process takes to its first result, with an empty and with a full kernel cache.

``seconds`` starts such processes; run as a module, this file is one:

    python -m bench.first_call WORKLOAD PROVIDER LAUNCH LAYOUT MODE DTYPE DEVICE

prints the seconds from the ready problem to the end of the first call.
"""

import os
import subprocess
import sys
import tempfile
import time

import torch

from . import problems, providers
from .environment import ROOT
from .providers import Provider
from .workloads import select

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
LIMIT = 600.0


def seconds(
    workload: str, provider: Provider, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """With an empty cache, then with what that run left in it.

    Raises:
        RuntimeError: with the last line of what the process said.
    """
    arguments = [
        workload, provider.name, provider.launch, provider.layout, mode,
        str(dtype).removeprefix("torch."), str(device),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: os.path.join(folder, part) for name, part in CACHES.items()}
        cold, warm = (_fresh(arguments, os.environ | caches) for _ in range(2))
    return cold, warm


def _fresh(arguments, environment):
    command = [sys.executable, "-m", "bench.first_call", *arguments]
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"first call of {arguments[1]!r}: {lines[-1]}")
    return float(ended.stdout.split()[-1])


def main(workload: str, name: str, launch: str, layout: str, mode: str, dtype: str, where: str):
    device, dtype_ = torch.device(where), getattr(torch, dtype)
    (work,) = select([workload], "all")
    (provider,) = providers.select([name], launch, device, dtype_, [layout])
    problem = provider.problem(problems.draw(work, mode, dtype_, device))
    start = time.perf_counter()
    provider.setup(problem)()
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
