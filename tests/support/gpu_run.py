"""Commands and settings of ``bench gpu`` that need no GPU, and what is in its results."""

import dataclasses
import json
import sys
import tarfile

import torch

from bench.groups import Where
from bench.measure import Effort
from bench.providers import GRAPH
from support import fakes

CPU = torch.device("cpu")
PASSING = (sys.executable, "-c", "print('3 passed in 1s')")
FAILING = (
    sys.executable, "-c",
    "print('FAILED tests/test_a.py::test_b - assert 1 == 2'); print('1 failed in 1s'); "
    "raise SystemExit(1)",
)  # fmt: skip
CHECK = """
import json, os, pathlib, sys
ptxas = os.environ.get("TRITON_PTXAS_PATH")
device, file = sys.argv[2], sys.argv[4]
assert sys.argv[1::2] == ["--device", "--json"] and device == "cpu"
assert os.environ.get("TRITON_PTXAS_BLACKWELL_PATH") == ptxas
right = ptxas not in ("/wrong/ptxas", "/wrong/and/stopped/ptxas")
pathlib.Path(file).write_text(json.dumps({"ptxas": ptxas, "verdicts": [{"right": right}]}))
print("gather_from_a 64x64: error 1e-3")
sys.exit({"/wrong/ptxas": 1, "/none/ptxas": 2, "/wrong/and/stopped/ptxas": 2}.get(ptxas, 0))
"""
TUNE = """
import json, pathlib, sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert 0 < float(arguments["--budget"])
table = {"gpu": "a fake", "workloads": arguments["--workload"]}
pathlib.Path(arguments["--out"]).write_text(json.dumps(table))
print("1 tile measured")
"""
WHERE = Where(CPU, torch.bfloat16, fakes.ScriptedTimer, Effort(2, 2, 2, 0.0), 20.0)


def uncaptured(found):
    return [dataclasses.replace(p, launch=GRAPH) for p in found]


def facts(out):
    return json.loads((out / "environment.json").read_text())


def logged(out, name):
    with tarfile.open(out / "logs.tar.gz") as archive:
        return archive.extractfile(name).read().decode()
