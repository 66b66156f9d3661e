"""What the operators over kernels share: absent gradients, and gradients of gradients."""

import torch


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
