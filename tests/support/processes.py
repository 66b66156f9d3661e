"""Processes of their own, for tests of what Triton compiles."""

import os
import subprocess
import sys

from bench.environment import ROOT


def python(*arguments, **variables):
    """A finished process of Python in which kernels are not interpreted, and its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    env |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
