"""Runs a function in several processes, the ranks of a group: gloo on the CPU, or another."""

import faulthandler
import multiprocessing
import os
import pathlib
import time
import traceback

import torch

# Imported once, by the process that all ranks are forked from: it is most of what a rank costs.
PRELOADED = [
    "da_triton.ops.triton.block",
    "functorch.compile",
    "networkx",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "triton.runtime.interpreter",
]


def context_for(group):
    """How ranks start. torch 2.11's compiler queries CUDA when it is imported, and from then on no
    fork of the process can use it."""
    if group == "nccl":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run(count, function, folder, *args, group="gloo", limit_s=300):
    """Results of ``function(rank, *args)`` on each rank, in order.

    ``function`` belongs to a module that a new process can import. The ranks meet through a file in
    ``folder``. A rank that raises, or takes longer than ``limit_s``, is an AssertionError here with
    its traceback; the others are stopped.
    """
    context = context_for(group)
    folder = pathlib.Path(folder) / str(time.monotonic_ns())
    folder.mkdir()
    calls = [(rank, count, group, function, folder, args) for rank in range(count)]
    processes = [context.Process(target=_rank, args=call, daemon=True) for call in calls]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit_s
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            assert time.monotonic() < deadline, f"no answer after {limit_s} s\n{_logs(folder)}"
            time.sleep(0.01)
        for process in processes:
            process.join(0 if any(p.exitcode for p in processes) else None)
        assert not any(p.exitcode for p in processes), _logs(folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank, count, group, function, folder, args):
    from support import triton_internals

    if not torch.cuda.is_available():
        triton_internals.correct_interpreter()
    torch.set_num_threads(1)
    with open(folder / f"{rank}.log", "w") as log:
        faulthandler.enable(log)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the host's name need not have an address
        store = (folder / "meeting").as_uri()
        try:
            torch.distributed.init_process_group(
                group, init_method=store, rank=rank, world_size=count
            )
            torch.manual_seed(0)
            torch.save(function(rank, *args), folder / f"{rank}.pt")
            torch.distributed.barrier()  # a rank that leaves first would break the others
            torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=log)
            raise


def _logs(folder):
    return "\n".join(f"{log.name}:\n{log.read_text()}" for log in sorted(folder.glob("*.log")))
