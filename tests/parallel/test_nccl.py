"""Positions split over the GPUs of a machine, if only over one, against one process."""

import pytest
import torch
from torch import distributed

from support import ranks
from support.numerics import DEVICE, check
from support.splits import LENGTH, block, image, own, trained

pytestmark = pytest.mark.skipif(
    not (DEVICE == "cuda" and distributed.is_nccl_available()), reason="needs a GPU: NCCL"
)


def on_its_gpu(rank, cuts, backend):
    torch.cuda.set_device(rank)
    layer = block(distributed.group.WORLD, backend).cuda()
    y, dx, *grads = trained(layer, own(image(), rank, cuts).cuda())
    for grad in grads:
        distributed.all_reduce(grad)
    return [x.cpu() for x in (y, dx, *grads)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gpus_give_what_one_process_gives(backend, tmp_path):
    count = torch.cuda.device_count()
    cuts = [rank * LENGTH // count for rank in range(count + 1)]
    found = ranks.run(count, on_its_gpu, tmp_path, cuts, backend, group="nccl")
    for i, whole in enumerate(trained(block(), image())):
        slices = [each[i] for each in found]
        check(torch.cat(slices, -1) if i < 2 else slices[0], whole, torch.float64, what=i)
