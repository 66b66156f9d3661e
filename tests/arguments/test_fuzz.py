"""Wrong and odd arguments, one or two at a time: an error that names the argument, or the answer.

Every argument of every public function, and of the layers, is spoiled in every way below. What is
rejected must be rejected by this package, with the documented types and a message that says which
argument it is; what is not must equal the definition in float64.
"""

import copy
import functools
import itertools
import random
import re
import traceback
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import da_triton
from da_triton import DoubleAttention, integrations
from support.numerics import DEVICE

PACKAGE = Path(da_triton.__file__).parent
ERRORS = (ValueError, TypeError, RuntimeError)
KINDS = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 1e-5, torch.float64: 1e-12}


# --- ways to spoil ------------------------------------------------------------------------------


def spoiled(value, axis=None):
    def spoil(x):
        x = x.clone()
        x.view(-1)[:1] = value
        return x

    return spoil


def resized(axis, change):
    def spoil(x):
        axes = list(x.shape)
        if axis >= len(axes):
            return x.new_ones(*axes, *[1] * (axis - len(axes)), 2)
        axes[axis] = max(0, change(axes[axis]))
        return x.new_ones(axes)

    return spoil


NO_TENSORS = {
    "None": lambda x: None,
    "a number": lambda x: 1.5,
    "a string": lambda x: "x",
    "a list": lambda x: x.tolist(),
    "a tuple": lambda x: (x,),
    "an array": lambda x: np.asarray(x.detach().cpu()),
    "a class": lambda x: torch.Tensor,
    "a module": lambda x: nn.Identity(),
}
TENSORS = {
    **{f"axis {i} without anything": resized(i, lambda n: 0) for i in range(4)},
    **{f"axis {i} longer": resized(i, lambda n: n + 1) for i in range(5)},
    **{f"axis {i} of 1": resized(i, lambda n: 1) for i in range(4)},
    "one axis less": lambda x: x[0],
    "no axes": lambda x: x.new_ones(()),
    "six axes": lambda x: x.new_ones(1, 1, 1, 1, 1, 1),
    **{
        f"{dtype}": functools.partial(torch.Tensor.to, dtype=dtype)
        for dtype in (*KINDS, torch.int64, torch.uint8, torch.bool, torch.complex64)
    },
    "on meta": lambda x: x.to("meta"),
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded along the last axis": lambda x: x[..., :1].expand(x.shape),
    "all one number": lambda x: x.new_full((1,), 0.5).expand(x.shape),
    "overlapping windows": lambda x: torch.randn(
        x.numel(), device=x.device, dtype=x.dtype
    ).as_strided(x.shape, [1] * x.dim()),
    "negated lazily": lambda x: torch._neg_view(-x) if x.is_floating_point() else x,
    "part of a complex one": lambda x: (
        torch.complex(x, x).conj().imag if x.is_floating_point() else x
    ),
    "reversed": lambda x: x.flip(-1),
    "sparse": lambda x: x.to_sparse(),
    "of sparse rows": lambda x: x.to_sparse_csr(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "NaN": spoiled(float("nan")),
    "inf": spoiled(float("inf")),
    "-inf": spoiled(float("-inf")),
    "huge": lambda x: x * 1e30 if x.dtype in KINDS else x,
    "a parameter": lambda x: nn.Parameter(x) if x.is_floating_point() else x,
    "an expanded leaf": lambda x: (
        x[:1].detach().requires_grad_(x.is_floating_point()).expand(x.shape)
    ),
}
VALUES = {"NaN", "inf", "-inf", "huge"}
NUMBERS = {
    repr(value): lambda x, value=value: value
    for value in (
        None, "1", [], 1j, 0, -1, 0.5, 3, True, float("nan"), float("inf"), 10**30, -(10**400),
        Fraction(1, 3),
    )
} | {
    "a tensor": lambda x: torch.ones(()), "a numpy number": lambda x: np.float32(2.0),
    "a numpy integer": lambda x: np.int64(2), "a numpy bool": lambda x: np.True_,
}  # fmt: skip


def ways(value):
    if isinstance(value, torch.Tensor):
        return NO_TENSORS | TENSORS
    if isinstance(value, tuple):
        both = {
            f"{name} in {i}": lambda x, i=i, way=way: (*x[:i], way(x[i]), *x[i + 1 :])
            for i in range(2)
            for name, way in (NO_TENSORS | TENSORS).items()
        }
        return both | {"alone": lambda x: x[0], "a third": lambda x: (*x, x[0])}
    return NUMBERS


# --- the functions ------------------------------------------------------------------------------


def normal(*shape):
    return torch.randn(shape, device=DEVICE)


def gather():
    mask = torch.tensor([[True, False, True, True, True, False], [False] * 6], device=DEVICE)
    given = {"a": normal(2, 4, 6), "b": normal(2, 6, 6), "heads": 2, "logit_scale": 0.5}
    return da_triton.gather, given | {"mask": mask}


def distribute():
    given = {"g": normal(2, 2, 2, 3), "v": normal(2, 6, 5), "scale": 2.0, "logit_scale": 0.5}
    return da_triton.distribute, given | {"softmax": True}


def double_attention():
    mask = torch.rand(2, 1, 3, 2, device=DEVICE) > 0.5
    given = {
        "a": normal(2, 4, 3, 2), "b": normal(2, 6, 3, 2), "v": normal(2, 6, 5), "heads": 2,
        "logit_scale": 0.5, "logit_scale_v": 2.0, "scale": 0.7, "mask": mask, "softmax_v": True,
        "extra": (normal(1, 4, 2), normal(2, 6, 2)),
    }  # fmt: skip
    return da_triton.double_attention, given


def block():
    shapes = {
        "weight_a": (4, 3), "bias_a": (4,), "weight_b": (6, 3), "bias_b": (6,),
        "weight_v": (6, 3, 1), "bias_v": (6,), "weight_out": (3, 4), "bias_out": (3,),
    }  # fmt: skip
    given = {"x": normal(2, 3, 3, 2), **{k: normal(*s) for k, s in shapes.items()}}
    given |= {"mask": torch.rand(2, 3, 2, device=DEVICE) > 0.5, "heads": 2, "scale": 0.7}
    given |= {"softmax_v": True, "residual": True, "logit_scale": 0.5, "logit_scale_v": 2.0}
    return da_triton.double_attention_block, given


def in_a_layer(layer):
    def call(x, mask, backend):
        here = copy.deepcopy(layer).double() if backend == "eager" else layer
        for module in here.modules():
            if isinstance(module, DoubleAttention):
                module.backend = backend
        return here(x, mask)

    return call, {"x": normal(2, 3, 3, 2), "mask": torch.rand(2, 3, 2, device=DEVICE) > 0.5}


def layer():
    return in_a_layer(DoubleAttention(3, 4, 6, heads=2, residual=True, device=DEVICE))


def residual_layer():
    block = integrations.ResidualDoubleAttention(3, 4, 6, zero_init=False, device=DEVICE)
    return in_a_layer(block.eval())


CALLS = {
    f.__name__: f for f in (gather, distribute, double_attention, block, layer, residual_layer)
}


def wide(value):
    """The argument in float64, contiguous."""
    if isinstance(value, (tuple, list)):
        return type(value)(wide(x) for x in value)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return (value.double() if value.is_floating_point() else value).clone().contiguous()


def outcome(call, given, backend):
    """ "rejected", or "right"; AssertionError where it is neither."""
    try:
        found = call(**given, backend=backend)
    except ERRORS as error:
        rejected(error, {*given, "extra_a", "extra_b"})
        return "rejected"
    expected = call(**{k: wide(v) for k, v in given.items()}, backend="eager")
    assert found.shape == expected.shape
    if found.device.type == "meta":
        return "right"
    # What is not finite in an argument may spoil more of the result, never less.
    assert not found[~expected.isfinite()].isfinite().any(), "finite where the definition is not"
    clean = all(t.isfinite().all() for t in tensors(given))
    assert found.isfinite()[expected.abs() < 1e4].all() or not clean, "not finite"
    usual = (found.isfinite() & (expected.abs() < 1e4)).flatten(1).all(1)
    found, expected = found[usual].double(), expected[usual]
    limit = max(KINDS[t.dtype] for t in tensors(given) if t.dtype in KINDS)
    assert (found - expected).norm() <= limit * max(1.0, expected.norm()), "wrong"
    return "right"


def rejected(error, names):
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert PACKAGE in Path(last.filename).parents, f"from inside {last.filename}: {error!r}"
    assert {*re.findall(r"\w+", str(error).lower())} & names, f"names no argument: {error!r}"


def tensors(given):
    flat = itertools.chain(*(v if isinstance(v, tuple) else (v,) for v in given.values()))
    return [t for t in flat if isinstance(t, torch.Tensor)]


def cases(name):
    """Arguments to spoil, and how; but bias_b may hold anything, as it never changes a result."""
    _, given = CALLS[name]()
    return [
        (argument, way)
        for argument, value in given.items()
        for way in ways(value)
        if argument != "bias_b" or way not in VALUES
        if (argument, way) != ("weight_b", "-inf")
    ]


def spoil(given, argument, way):
    """Whether it applies: a bias cannot be channels last, for instance."""
    try:
        given[argument] = ways(given[argument])[way](given[argument])
    except (RuntimeError, IndexError):
        return False
    return True


def tally(name, backend, chosen):
    """Counts of rejected and of right calls; fails with a list of the others."""
    faults, count = [], {"rejected": 0, "right": 0}
    for spoils in chosen:
        torch.manual_seed(0)
        call, given = CALLS[name]()
        if not all(spoil(given, *one) for one in spoils):
            continue
        try:
            count[outcome(call, given, backend)] += 1
        except Exception as error:
            text = ", ".join(f"{argument} = {way}" for argument, way in spoils)
            faults.append(f"{text}: {type(error).__name__} {str(error)[:300]}")
    assert not faults, "\n".join(faults)
    return count


each_backend = pytest.mark.parametrize("backend", ["torch", "triton"])
each_call = pytest.mark.parametrize("name", CALLS)


@each_backend
@each_call
def test_one_argument(name, backend):
    count = tally(name, backend, [(one,) for one in cases(name)])
    assert min(count.values()) > 20


@pytest.mark.long
@each_backend
@each_call
def test_two_arguments(name, backend):
    known = [(one, two) for one, two in itertools.combinations(cases(name), 2) if one[0] != two[0]]
    count = tally(name, backend, random.Random(0).sample(known, 150))
    assert count["rejected"] > 50


# --- the layers ---------------------------------------------------------------------------------


LAYER = {"in_channels": 8, "c_m": 4, "c_n": 6, "heads": 2, "logit_scale": 1.0, "logit_scale_v": 1.0,
         "scale": 1.0, "softmax_v": True, "bias": True, "order": "AZ", "recompute": False,
         "backend": "torch"}  # fmt: skip
MADE = {
    "DoubleAttention": (DoubleAttention, LAYER | {"reconstruct": True, "residual": True}),
    "ResidualDoubleAttention": (
        integrations.ResidualDoubleAttention,
        LAYER | {"norm": "batch", "position_axes": 2, "zero_init": True},
    ),
    "insert_double_attention": (
        lambda **given: integrations.insert_double_attention(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), **given
        ),
        {"positions": {"0": 8}, "c_m": 4, "c_n": 6, "norm": "batch", "heads": 2},
    ),
    "plan": (
        da_triton.plan,
        {"x_shape": (2, 8, 5, 5), "c_m": 4, "c_n": 6, "heads": 2, "dtype": torch.float16,
         "device": "cuda", "order": "AZ", "recompute": False, "reconstruct": True},
    ),
}  # fmt: skip
OTHERS = (
    None, 0, -1, 3, 2.5, True, "x", "", "AZ", "auto", [], [1], (), ("0",), ("1",), {}, {"0": 0},
    {"0": "x"}, {"nowhere": 3}, torch.int32, torch.float16, float("nan"), 1j, object(), nn.ReLU,
    nn.BatchNorm2d, torch.zeros(2), (0, 8, 5), (2, 8), (2, 8, -5), (2, 8, "5"), "cpu",
    "meta", 10**30, -(10**400),
)  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_any_argument_is_accepted_or_rejected_by_name(name):
    """Each argument replaced by each of many values: constructed, or rejected by name."""
    function, usual = MADE[name]
    faults, count = [], {"rejected": 0, "made": 0}
    for argument, other in itertools.product(usual, OTHERS):
        try:
            made = function(**usual | {argument: other})
        except ERRORS as error:
            try:
                rejected(error, {*usual, "in_channels"})
                count["rejected"] += 1
            except AssertionError as fault:
                faults.append(f"{argument} = {other!r}: {fault}")
        except Exception as error:
            faults.append(f"{argument} = {other!r}: {error!r}")
        else:
            assert str(made)
            count["made"] += 1
    assert not faults, "\n".join(faults)
    assert min(count.values()) > 3


@pytest.mark.parametrize("other", OTHERS, ids=range(len(OTHERS)))
def test_blocks_are_inserted_into_a_module(other):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        integrations.insert_double_attention(other)
