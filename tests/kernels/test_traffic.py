"""Bytes, sectors, operations and launches of the core, counted on interpreted kernels.

The batch is reduced to one sample, with the tiles and splits that the full batch would have on a
GPU with 132 SMs. Operations between the kernels (δ, sums of parts) are counted too.
"""

import dataclasses

import pytest
import torch

from da_triton.kernels import distribute, gather, gather_backward
from da_triton.runtime import launch, tiles
from support.numerics import DEVICE

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter, not on a GPU")


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    batch: int
    length: int
    m: int
    n: int
    heads: int = 1
    channels_last: bool = False


WORKLOADS = [
    Workload("r50_conv3_q", 64, 784, 128, 128),
    Workload("r50_conv3_q_nhwc", 64, 784, 128, 128, channels_last=True),
    Workload("yolo_p3", 16, 6400, 64, 64),
    Workload("yolo_p5", 16, 400, 128, 128),
    Workload("r50_conv4_q_nhwc", 64, 196, 256, 256, channels_last=True),
    Workload("r50_conv4_q", 64, 196, 256, 256),
    Workload("r50_conv3", 64, 784, 256, 256),
]
# Requested over compulsory bytes, forward and backward. Where G fits one tile every element of the
# activations is asked for once, and the rest is G and its partial sums; elsewhere tiles of n and
# m load them again, as in any GEMM, and caches serve that.
LIMITS = {
    "r50_conv3_q": (1.6, 1.8),
    "r50_conv3_q_nhwc": (1.6, 1.8),
    "yolo_p3": (1.3, 1.8),
    "yolo_p5": (4.7, 4.1),
    "r50_conv4_q": (4.0, 7.7),
    "r50_conv4_q_nhwc": (4.1, 7.7),  # B once more, for the statistics of its rows
    "r50_conv3": (3.4, 5.9),
}


@pytest.fixture(scope="module")
def counted():
    """Counts of each workload, made once."""
    cache = {}

    def measure(work, monkeypatch):
        if work not in cache:
            cache[work] = _measure(work, monkeypatch)
        return cache[work]

    return measure


def _measure(work, monkeypatch):
    from support import traffic

    launch.forget()
    monkeypatch.setattr(launch, "num_sms", lambda device: 132 // work.batch)

    def activations(channels):
        x = torch.randn(1, work.heads, channels, work.length, dtype=torch.float32).bfloat16()
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if work.channels_last else x

    a, b, v, dz = activations(work.m), activations(work.n), activations(work.n), activations(work.m)
    with traffic.count() as forward:
        g, lse = gather.gather_forward([(a, b, None)], 1.0)
        distribute.distribute_forward(g, v, 1.0, True, 1.0)
    with traffic.count() as backward:
        dg, _ = distribute.distribute_backward(dz, g, v, 1.0, True, 1.0, True, True)
        gather_backward.gradients(dg, a, b, None, g, lse, None, 1.0, True, True)
    element = 2 * work.heads * work.length
    return {
        "forward": forward,
        "backward": backward,
        "forward_ratio": sum(k.bytes for k in forward) / (element * (2 * work.m + 2 * work.n)),
        "backward_ratio": sum(k.bytes for k in backward) / (element * (3 * work.m + 4 * work.n)),
    }


each_workload = pytest.mark.parametrize("work", WORKLOADS, ids=lambda w: w.name)


@each_workload
def test_requested_bytes(work, counted, monkeypatch):
    found = counted(work, monkeypatch)
    forward, backward = LIMITS[work.name]
    assert found["forward_ratio"] <= forward
    assert found["backward_ratio"] <= backward


@each_workload
def test_sectors(work, counted, monkeypatch):
    """No load touches more memory than requested, within 10 %."""
    found = counted(work, monkeypatch)
    for kernel in found["forward"] + found["backward"]:
        if not kernel.load_sectors:  # an operation of PyTorch's
            continue
        ratio = 32 * kernel.load_sectors / kernel.load_bytes
        limit = 1.1 if work.channels_last or work.length % 16 == 0 else 1.35
        assert ratio <= limit, (kernel.kernel, ratio)


@each_workload
def test_operations(work, counted, monkeypatch):
    """Useful operations, tiles rounded up, and nothing twice."""
    found = counted(work, monkeypatch)
    product = 2 * work.heads * work.m * work.n * work.length
    for name, products in (("forward", 2), ("backward", 4)):
        flop = sum(kernel.dot_flop for kernel in found[name])
        lowp = -(-work.length // 128) * 128 / work.length + 0.01
        assert products * product <= flop <= products * product * lowp


@each_workload
def test_launches(work, counted, monkeypatch):
    found = counted(work, monkeypatch)
    assert len(found["forward"]) <= 4
    assert len(found["backward"]) <= 9
    assert not any(k.atomics for k in found["forward"] + found["backward"])


def test_splits_are_those_of_the_full_batch(monkeypatch):
    """The reduced batch of this file's measurements splits positions alike."""
    for work in WORKLOADS:
        x = torch.empty(1, dtype=torch.bfloat16)
        whole = ("distribute", "distribute_backward", "gather_backward")
        for kernel in ("gather", *(whole if tiles.g_fits_one_tile(x, work.m, work.n) else ())):
            tile = tiles.tile(kernel, x, work.m, work.n)
            monkeypatch.setattr(launch, "num_sms", lambda device: 132)
            full = launch.split_positions(work.batch, work.length, tile, x.device)
            monkeypatch.setattr(launch, "num_sms", lambda device, n=work.batch: 132 // n)
            assert launch.split_positions(1, work.length, tile, x.device) == full
