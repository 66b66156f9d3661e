"""Stateless layers as ``kernels`` of Hugging Face puts them into existing modules."""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernels
import pytest
import torch
from kernels import KernelizeFallback, LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from torch import nn

import da_triton
from da_triton.layers import DoubleAttention
from support import hub
from support.numerics import check

ROOT = Path(__file__).parents[2]
NAME = "DoubleAttention"


class Theirs(nn.Module):
    """The definition as users write it, independent of this package."""

    axes = (2, 1)

    def __init__(self, channels=16, c_m=8, c_n=12, last="conv_reconstruct", residual=False):
        super().__init__()
        self.in_channels, self.c_m, self.c_n = channels, c_m, c_n
        self.convA = nn.Conv2d(channels, c_m, 1)
        self.convB = nn.Conv2d(channels, c_n, 1)
        self.convV = nn.Conv2d(channels, c_n, 1)
        self.last = last
        if last is not None:
            setattr(self, last, nn.Conv2d(c_m, channels, 1))
        self.residual = residual

    def forward(self, x):
        a = self.convA(x).flatten(2)
        p = self.convB(x).flatten(2).softmax(self.axes[0])
        q = self.convV(x).flatten(2).softmax(self.axes[1])
        z = ((a @ p.mT) @ q).unflatten(2, x.shape[2:])
        y = z if self.last is None else getattr(self, self.last)(z)
        return x + y if self.residual else y


@kernels.use_kernel_forward_from_hub(NAME)
class Replaceable(Theirs):
    pass


@kernels.use_kernel_forward_from_hub(NAME)
class OverTheBatch(Theirs):
    """The widespread ``F.softmax(x)`` of a 3-D tensor."""

    axes = (0, 0)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A published kernel: the package, and the files that packaging adds."""
    path = hub.publish(tmp_path_factory.mktemp("kernel"))
    return LocalLayerRepository(path, layer_name=NAME)


def kernelized(model, repository, mode=Mode.TRAINING | Mode.TORCH_COMPILE):
    """Without fallback: a layer that cannot be replaced raises."""
    with use_kernel_mapping({NAME: {"cpu": repository}}, inherit_mapping=False):
        return kernelize(model, mode=mode, device="cpu", use_fallback=KernelizeFallback.NONE)


def pair(kind=Replaceable, **options):
    """A layer, and an unmodified twin in float64."""
    model = kind(**options)
    twin = Theirs(**options).double()
    twin.load_state_dict(model.state_dict())
    return model, twin


LAYERS = [{"last": name} for name in ("conv_reconstruct", "proj", "convC", "convZ", None)]


@pytest.mark.parametrize("options", [*LAYERS, {"residual": True}], ids=str)
def test_the_layer_gives_the_definition_and_its_gradients(repository, options):
    model, twin = pair(**options)
    kernelized(model, repository)
    assert model.forward.__func__.__module__ == "_da_triton_of_a_test.da_triton.layers"
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    y = x.detach().double().requires_grad_()
    out, expected = model(x), twin(y)
    check(out, expected, torch.float32)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream.double())
    check(x.grad, y.grad, torch.float32)
    for (name, p), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name == "convB.bias":
            assert not p.grad.any()
        else:
            check(p.grad, other.grad, torch.float32, what=name)


def test_the_axes_are_the_papers_whatever_they_were(repository):
    model, paper = pair(OverTheBatch)
    x = torch.randn(2, 16, 5, 6)
    with pytest.raises(AssertionError, match="relative RMS"):
        check(model(x), paper(x.double()), torch.float32)
    check(kernelized(model, repository)(x), paper(x.double()), torch.float32)


def test_options_are_attributes_of_the_layer(repository):
    model = kernelized(Replaceable(), repository)
    options = {"heads": 2, "logit_scale": 0.5, "logit_scale_v": 2.0, "scale": 3.0}
    options |= {"softmax_v": False, "order": "XH"}
    ours = da_triton.DoubleAttention(16, 8, 12, **options)
    ours.load_state_dict(model.state_dict())
    x = torch.randn(2, 16, 5, 6)
    assert not torch.allclose(model(x), ours(x))
    for name, value in options.items():
        setattr(model, name, value)
    assert torch.equal(model(x), ours(x))


def test_children_that_are_watched_are_called(repository):
    model, twin = pair()
    kernelized(model, repository)
    seen = []
    model.convV.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    x = torch.randn(2, 16, 5, 6)
    check(model(x), twin(x.double()), torch.float32)
    assert seen == [(2, 12, 5, 6)]


def test_compile(repository):
    model, twin = pair()
    compiled = torch.compile(kernelized(model, repository), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 5, 6)
    check(compiled(x), twin(x.double()), torch.float32)


def test_the_layer_of_this_package_is_the_published_one():
    model, twin = pair()
    x = torch.randn(2, 16, 5, 6)
    check(DoubleAttention.forward(model, x), twin(x.double()), torch.float32)


REGISTRATIONS = """
import importlib, json, pkgutil, sys, types
import torch
from torch.utils import flop_counter

seen, init = [], torch.library.Library.__init__

def watched(self, namespace, *args, **options):
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith(("torch.library", "torch._library")):
        frame = frame.f_back
    seen.append((frame.f_globals["__name__"], namespace))
    init(self, namespace, *args, **options)

torch.library.Library.__init__ = watched
formulas = set(flop_counter.flop_registry)
import da_triton
for module in pkgutil.walk_packages(da_triton.__path__, "da_triton."):
    importlib.import_module(module.name)
formulas = {str(op) for op in set(flop_counter.flop_registry) - formulas}
other = types.ModuleType("da_triton.other")
exec("import torch; torch.library.Library('aten', 'IMPL')", other.__dict__)
ours = sorted({x for x in seen if x[0].startswith("da_triton")})
names = [x for x in torch._C._dispatch_get_all_op_names() if x.startswith("da_triton::")]
print(json.dumps([ours, sorted(names), sorted(formulas)]))
"""


def test_operators_are_registered_in_one_namespace():
    """Importing registers nothing in other namespaces."""
    result = subprocess.run(
        [sys.executable, "-c", REGISTRATIONS], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    registered, names, formulas = json.loads(result.stdout)
    assert ["da_triton.other", "aten"] in registered
    registered.remove(["da_triton.other", "aten"])
    assert {namespace for _, namespace in registered} == {"da_triton"}
    kinds = ("block", "distribute", "gather")
    assert {f"da_triton::{k}{b}" for k in kinds for b in ("", "_backward")} <= set(names)
    assert {name.replace("::", ".") for name in names} >= set(formulas) != set()
