"""The same tests with and without a GPU: real kernels on one, interpreted kernels elsewhere."""

import fcntl
import gc
import os
import re

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest

from da_triton.runtime import launch
from support import triton_internals

if not torch.cuda.is_available():
    triton_internals.correct_interpreter()
torch.set_num_threads(1)  # the workers of pytest-xdist share the cores
# On a GPU. A worker of pytest-xdist takes one test at a time, so these start first.
LONGEST = ("test_properties.py", "test_large.py", "test_gpu_numerics.py")


@pytest.fixture(autouse=True)
def _cudnn_in_full_precision():
    """cuDNN's convolutions are TF32 by default, a thousand times the tolerance of float32.

    By the older switch, which PyTorch's export queries and which must not contradict the newer.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_launches():
    """A test may replace kernels, tiles or the facts about a GPU."""
    with launch.forgetting():
        yield


@pytest.fixture
def poisoned():
    """``torch.empty`` gives NaN: memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="only files whose tests use DEVICE")


def pytest_ignore_collect(collection_path, config):
    """With --gpu, what never says DEVICE: its tests run on the CPU in any case.

    Nor is the conftest of such a folder imported, which may need what a bare machine lacks.
    """
    path = collection_path
    files = path.rglob("test_*.py") if path.is_dir() else [path]
    uses = (re.search(r"\bDEVICE\b", file.read_text(encoding="utf-8")) for file in files)
    return True if config.getoption("gpu") and not any(uses) else None


@pytest.hookimpl(wrapper=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(config, items):
    if config.getoption("gpu"):
        items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if "memory" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("large"))
    return (yield)


@pytest.fixture
def memory(tmp_path_factory):
    """Gigabytes of a GPU's memory: for one worker of pytest-xdist at a time, and given back.

    Tests that use it run in the same worker, so that other workers do not wait for the lock.
    """
    if not torch.cuda.is_available():
        yield
        return
    with open(tmp_path_factory.getbasetemp().parent / "large", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        gc.collect()  # a cycle may hold tensors
        torch.cuda.empty_cache()
