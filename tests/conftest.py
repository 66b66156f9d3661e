"""The same tests with and without a GPU: real kernels on one, interpreted kernels elsewhere."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import pytest

from support import interpreter

if not torch.cuda.is_available():
    interpreter.correct()
torch.set_num_threads(1)  # the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """``torch.empty`` gives NaN: memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
