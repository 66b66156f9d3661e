"""What the operators over kernels share: absent gradients, gradients of gradients, torch.vmap."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def or_empty(gradient, like):
    """Operators return tensors: an empty one stands for a gradient nobody asked for."""
    return like.new_empty(0) if gradient is None else gradient


def unviewed(x):
    """``x`` as a tensor of its own: autograd forbids changing a view in place that a Function made.

    What follows a layer often does: ``nn.ReLU(inplace=True)``, ``y += shortcut``.
    """
    return x.new_empty(0).set_(x)


def wants_graph():
    """Whether the backward pass is itself to be differentiated (``create_graph=True``)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def differentiable(forward, inputs, needs, upstream):
    """Gradients of ``forward`` as a graph that autograd can differentiate again.

    Taken with respect to views: the inputs themselves may depend on each other. An input that no
    longer asks for a gradient (behind ``torch.func.vjp``) gets one of its own.
    """
    with torch.enable_grad():
        inputs = [None if x is None else x.view_as(x) for x in inputs]
        inputs = [
            x.detach().requires_grad_() if need and not x.requires_grad else x
            for x, need in zip(inputs, needs, strict=True)
        ]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need]
        found = iter(torch.autograd.grad(forward(*inputs), wanted, upstream, create_graph=True))
    return [next(found) if need else None for need in needs]


def vectorise(op, *, shared=(), joined=True):
    """Teaches an operator torch.vmap: the axis joins the batch, which is axis 0 of every tensor.

    ``shared`` tensors, such as weights, have no batch: where one of them has the axis, the operator
    runs once for each. So it does if not ``joined``: a sum over the batch would add up.
    """
    names = [argument.name for argument in op._opoverload._schema.arguments]

    def rule(info, in_dims, *args):
        size = info.batch_size
        given = list(zip(names, args, in_dims, strict=True))
        if joined and all(dim is None for name, _, dim in given if name in shared):
            batches = [x if name in shared else _joined(x, dim, size) for name, x, dim in given]
            out = tree_map(lambda y: y.unflatten(0, (size, y.shape[0] // size)), op(*batches))
        else:
            runs = [op(*(_at(x, dim, i) for _, x, dim in given)) for i in range(size)]
            out = tree_map(lambda *each: torch.stack(each), *runs)
        return out, tree_map(lambda _: 0, out)

    op.register_vmap(rule)


def _joined(x, dim, size):
    if not isinstance(x, Tensor):
        return x
    return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)


def _at(x, dim, i):
    return x if dim is None or not isinstance(x, Tensor) else x.select(dim, i)
