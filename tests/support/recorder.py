"""A pytest plugin that records, without a GPU, what tests would launch on one.

Tests run as on a GPU, but on meta tensors: DEVICE is "meta" and compares equal to "cuda". Kernels
do nothing, comparisons pass, and a number that is read is 1, so that most tests reach their end.
With DA_TRITON_INTERPRET set, DEVICE is the CPU and kernels are interpreted: exact, and far slower.

The file that DA_TRITON_RECORD names gets a JSON object per line:

    {"test", "ended", "mixed", "cpu"}       per test: how it failed, if it did; whether because
                                            tensors were on two devices; whether it reached
                                            ``ops.aten.cpu_block``
    {"kernel", "args", "kwargs", "test"}    per distinct launch, with the first test that made it

``support.recorded`` compiles the launches.
"""

import importlib.util
import json
import os
import re

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ["DA_TRITON_AS_ON_A_GPU"] = "1"  # and before tests choose their sizes

import pytest
import torch
import torch.fx.experimental._config
import triton.language as tl
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor

from support import triton_internals

PROCESSORS = 132
MIXED = re.compile(r"must be on one device|on the same device|two (different )?devices")
INTERPRETED = "DA_TRITON_INTERPRET" in os.environ


class Elsewhere(str):
    """PyTorch reads "meta", and tests that compare read "cuda"."""

    def __eq__(self, other):
        return other == "cuda"

    def __ne__(self, other):
        return other != "cuda"

    __hash__ = str.__hash__


def encoded(value):
    """A launch argument as JSON, reduced to what Triton specialises on."""
    if isinstance(value, torch.Tensor):
        aligned = value.storage_offset() * value.element_size() % 16 == 0
        return {"tensor": str(value.dtype), "aligned": aligned}
    if isinstance(value, tl.dtype):
        return {"dtype": str(value)}
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        few = -(2**31) <= value < 2**31
        return (16 if few else 2**40) + (value % 16 != 0)
    return value


class Recorder:
    """Keeps what is distinct, in a file."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        self.seen, self.test, self.reached_cpu = set(), "", False

    def write(self, found):
        print(json.dumps(found), file=self.file, flush=True)

    def launch(self, kernel, args, kwargs):
        exact = {k: x if isinstance(x, int) else encoded(x) for k, x in kwargs.items()}
        found = {
            "kernel": f"{kernel.fn.__module__}:{kernel.fn.__name__}",
            "args": [encoded(x) for x in args],
            "kwargs": exact,
        }
        key = json.dumps(found)
        if key not in self.seen:
            self.seen.add(key)
            self.write({**found, "test": self.test})


RECORDER: pytest.StashKey[Recorder] = pytest.StashKey()


def pytest_configure(config):
    recorder = config.stash[RECORDER] = Recorder(os.environ["DA_TRITON_RECORD"])

    def launched(run, kernel, *args, grid, warmup, **kwargs):
        recorder.launch(kernel, args, kwargs)
        if INTERPRETED:
            run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    triton_internals.around(interpreted_launch=launched)
    _as_on_a_gpu(recorder)
    if not INTERPRETED:
        _without_numbers()


def _bodies_for_fakes():
    """On meta tensors, operators run: their fakes are for the compiler's tensors alone."""
    register = CustomOpDef.register_fake

    def register_fake(self, fake, /):
        def chosen(*args):
            compiling = any(isinstance(x, FakeTensor) for x in args)
            return (fake if compiling else self._init_fn)(*args)

        ours = self._qualname.startswith("da_triton::")
        return register(self, chosen if ours else fake)

    CustomOpDef.register_fake = register_fake


if not INTERPRETED:
    _bodies_for_fakes()  # before any conftest imports the operators


def _as_on_a_gpu(recorder):
    """Backends and splits over positions are chosen as on a GPU."""
    from da_triton import ops
    from da_triton.ops.aten import cpu_block, cpu_small
    from da_triton.runtime import launch

    select = ops.select

    def spied(plan):
        def reached(*args):
            if INTERPRETED:
                return False
            recorder.reached_cpu = True
            return plan(*args)

        return reached

    for kind in (cpu_small.Call, cpu_block.Call):
        kind.plan = spied(kind.plan)
    ops.select = lambda name, x: select("triton" if name == "auto" else name, x)
    launch.num_sms = lambda device: PROCESSORS


def _without_numbers():
    from support import numerics

    triton_internals.correct_interpreter()
    numerics.DEVICE = Elsewhere("meta")
    for name in ("check", "check_blocks", "relative_rms", "blockwise"):
        setattr(numerics, name, lambda *args, **kwargs: 0.0)
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    _answer(torch, "equal", lambda *_: True)
    _answer(torch.Tensor, "item", lambda *_: 1)
    _answer(torch.Tensor, "tolist", lambda x: torch.ones(x.shape).tolist())
    _answer(torch.Tensor, "__bool__", lambda *_: True)  # "assert error <= allowed"
    _answer(torch.Tensor, "any", lambda *_: torch.tensor(False))  # "assert not wrong.any()"
    torch.testing.assert_close = lambda *args, **kwargs: None
    torch.autograd.gradcheck = torch.autograd.gradgradcheck = _differentiate
    if importlib.util.find_spec("hypothesis"):
        import hypothesis

        only = hypothesis.Phase.generate  # no search for a smaller example that fails, too
        hypothesis.settings.register_profile("recorder", phases=[only])
        hypothesis.settings.load_profile("recorder")


def _answer(owner, name, answer):
    """Replaces what reads the numbers of a whole tensor, for meta tensors."""
    original = getattr(owner, name)

    def chosen(x, *args, **kwargs):
        partly = name == "any" and (args or kwargs)
        return answer(x, *args) if x.is_meta and not partly else original(x, *args, **kwargs)

    setattr(owner, name, chosen)


def _differentiate(function, inputs, **options):
    """Instead of finite differences: one call, differentiated twice."""
    first = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
    leaves = [x for x in first if x.requires_grad]
    torch.autograd.grad(sum(x.sum() for x in leaves), inputs, allow_unused=True)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    recorder = pyfuncitem.config.stash[RECORDER]
    recorder.test, recorder.reached_cpu, ended = pyfuncitem.nodeid, False, ""
    try:
        return (yield)
    except BaseException as error:
        ended = f"{type(error).__name__}: {error}"[:300]
        raise
    finally:
        recorder.write({
            "test": pyfuncitem.nodeid, "ended": ended, "mixed": bool(MIXED.search(ended)),
            "cpu": recorder.reached_cpu,
        })  # fmt: skip


def pytest_unconfigure(config):
    config.stash[RECORDER].file.close()
