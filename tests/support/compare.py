"""A function with gradients against its definition: all that the test of a new kernel writes is

def test_matches_the_definition(poisoned):
    a, b = (peaky(2, 1, channels, 98, dtype=torch.bfloat16) for channels in (24, 19))
    check_against_reference(kernel, definition, (a, b), logit_scale=0.7)
"""

import inspect

import torch
from torch.utils._pytree import tree_map

from .numerics import check


def step(function, inputs, upstream=None, wanted=None, **options):
    """The result as "out", and gradients by the names that ``function`` gives to ``inputs``.

    Inputs may be None. ``wanted``: the names of those that require a gradient; otherwise all.
    """
    names = list(inspect.signature(function).parameters)[: len(inputs)]
    leaves = {
        name: None if x is None else x.detach().requires_grad_(wanted is None or name in wanted)
        for name, x in zip(names, inputs, strict=True)
    }
    out = function(*leaves.values(), **options)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = {name: x for name, x in leaves.items() if x is not None and x.requires_grad}
    grads = torch.autograd.grad(out, [*leaves.values()], upstream.to(out))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check_against_reference(
    function, reference, inputs, upstream=None, *, own=None, slack=1, only_tolerance=(),
    left_out=(), wanted=None, **options,
):  # fmt: skip
    """``step`` of ``function``, within the tolerance and twice the error of ``reference`` itself.

    The truth is ``reference`` in float64, and the tolerance that of the narrowest input's dtype.
    ``own``: other inputs for the reference in that dtype. ``only_tolerance``: names of results
    whose terms cancel, so that the reference's own error says nothing. ``left_out``: names of
    results that are not compared.
    """
    dtype = min((x.dtype for x in inputs if x is not None), key=lambda dtype: dtype.itemsize)
    truth = step(reference, widened(inputs), upstream, wanted, **widened(options))
    own = step(reference, own or inputs, upstream, wanted, **options)
    found = step(function, inputs, upstream, wanted, **options)
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        if name not in left_out:
            theirs = None if name in only_tolerance else own[name]
            check(found[name], expected, dtype, theirs, name, slack)
    return found


def widened(tree):
    """Its floating-point tensors in float64."""
    return tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree
    )
