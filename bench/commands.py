"""The commands of ``python -m bench``, by name."""

import functools
from collections.abc import Callable, Sequence

from . import running, telling
from .workloads import Workload

Command = Callable[[Sequence[str], Sequence[Workload]], int]
OVERVIEW = """commands, each with --help:
  sweep     providers, modes, dtypes, layouts and metrics of your choice
  scaling   cost against positions, samples, channels or maps
  networks  a ResNet-50 and a YOLOv8 with the block: training step and inference
  host      what a call costs the host, layer by layer, with or without a GPU
  plan      what would run on a GPU for a shape, and why
  codegen   registers, spills, copies of every kernel, without a GPU
  compare   what got slower between two runs
  gpu       everything on a GPU, in stages with time budgets
  warm      fills Triton's compile cache for a GPU, without one
  tune      measures candidates and writes the tile table of this GPU
  suite     what the tests would do on a GPU, without one"""
COMMANDS: dict[str, Command] = {
    "report": functools.partial(running.report, overview=OVERVIEW),
    "sweep": running.sweep,
    "scaling": running.scale,
    "networks": running.whole_networks,
    "host": running.host_costs,
    "gpu": running.gpu,
    "tune": running.tune,
    "plan": telling.plan,
    "codegen": telling.codegen,
    "warm": telling.warm,
    "compare": telling.compare_files,
    "suite": telling.test_suite,
}
