"""Children made by fork and by spawn, data loaders, and threads, while the package is in use."""

import concurrent.futures
import multiprocessing
import threading

import pytest
import torch

import da_triton
from support import ranks, triton_internals
from support.numerics import DEVICE

needs_no_gpu = pytest.mark.skipif(
    DEVICE == "cuda", reason="CUDA cannot be forked, nor a GPU shared"
)
LIMIT = 120  # seconds


def answer(backend, seed=0):
    """Gradients of a small block, of numbers that depend on the seed alone."""
    if DEVICE == "cpu":
        triton_internals.correct_interpreter()
    random = torch.Generator().manual_seed(seed)
    layer = da_triton.DoubleAttention(4, residual=True, backend=backend)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=random))
    layer.to(DEVICE)
    x = torch.randn(2, 4, 12, generator=random).to(DEVICE).requires_grad_()
    out = layer(x)
    out.square().sum().backward()
    return [t.detach().cpu() for t in (out, x.grad, *(p.grad for p in layer.parameters()))]


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def send(pipe, backend):
    torch.set_num_threads(1)
    pipe.send([x.numpy() for x in answer(backend)])  # no shared memory: the child ends first


@needs_no_gpu
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_child_gives_the_same_bits(method, backend):
    """After the parent has used the package, its kernels and autograd."""
    expected = answer(backend)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=send, args=(there, backend))
    child.start()
    try:
        assert here.poll(LIMIT), "the child does not answer"
        found = [torch.from_numpy(x) for x in here.recv()]
        child.join(LIMIT)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
    assert same(found, expected)


def tell_whether_cuda_is_out_of_reach(pipe):
    pipe.send(torch.cuda._is_in_bad_fork())


def test_ranks_on_gpus_can_use_cuda(monkeypatch):
    """Forks of a process that has queried CUDA, as torch 2.11's compiler does, cannot."""
    monkeypatch.delenv("PYTORCH_NVML_BASED_CUDA_CHECK", raising=False)
    context = ranks.context_for("nccl")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=tell_whether_cuda_is_out_of_reach, args=(there,))
    child.start()
    try:
        assert here.poll(LIMIT), "the child does not answer"
        assert here.recv() is False
    finally:
        child.kill()
        child.join()


class Answers(torch.utils.data.Dataset):
    """The block as part of a data set."""

    def __init__(self, backend):
        self.backend = backend

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return answer(self.backend, i)[0]


@needs_no_gpu
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_data_loader(method):
    data = Answers("torch")
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, multiprocessing_context=method, timeout=LIMIT
    )
    found = torch.cat(list(loader))
    assert torch.equal(found, torch.stack([data[i] for i in range(4)]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_two_threads_at_once(backend):
    """Forward and backward passes that interleave, each with numbers of its own."""
    expected = [answer(backend, seed) for seed in range(2)]
    start = threading.Barrier(2)

    def work(seed):
        start.wait(LIMIT)
        return [answer(backend, seed) for _ in range(4)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    for found, right in zip(results, expected, strict=True):
        assert all(same(one, right) for one in found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_backward_in_another_thread(backend):
    layer = da_triton.DoubleAttention(4, residual=True, backend=backend, device=DEVICE)
    x = torch.randn(2, 4, 12, device=DEVICE, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        (found,) = pool.submit(torch.autograd.grad, loss, x).result(LIMIT)
    assert torch.equal(found, expected)


def test_settings_of_one_thread_are_its_own():
    """Autocast and no_grad in a thread change nothing in the other."""
    layer = da_triton.DoubleAttention(4, device=DEVICE)
    x = torch.randn(2, 4, 12, device=DEVICE)
    turns = [threading.Event(), threading.Event()]

    def lower():
        try:
            with torch.autocast(DEVICE, dtype=torch.bfloat16), torch.no_grad():
                turns[0].set()
                assert turns[1].wait(LIMIT)
                return layer(x)
        finally:
            turns[0].set()  # after an error, which ``result`` raises

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(lower)
        assert turns[0].wait(LIMIT)
        out = layer(x)
        turns[1].set()
        low = other.result(LIMIT)
    assert (out.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    assert (out.requires_grad, low.requires_grad) == (True, False)
