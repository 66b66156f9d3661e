"""Helpers of the custom operators: varying scales, absent gradients, second derivatives, vmap."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import tracing
from ..signatures import PLAIN
from ..tracing import constant, forward_mode

# Tag for operators whose launches depend on values read on the host: a CUDA graph would replay
# those of the recorded call.
READS_ON_HOST = (torch.Tag.cudagraph_unsafe,)


def scalars(*scales):
    """The scales as operators take them: floats, or tensors for ``of_tensors``.

    The compiler makes a constant of a float that an operator takes, and compiles again for the next
    value. A scale that it traces as a variable, because it changes from call to call, becomes a
    tensor, and so do the operator's other scales.
    """
    if torch.compiler.is_dynamo_compiling():
        # Imports sympy, which the compiler has imported already.
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if not all(map(has_static_value, scales)):
            one = torch.ones((), dtype=torch.float64, device="cpu")
            return [one * scale for scale in scales]
    return map(float, scales)


# For each operator: the position of its first float, and the operator with tensors for floats.
_twins: dict[Any, tuple[int, Any]] = {}
_SCALARS = frozenset((type(None), bool, int, float, str, list))


def run(op, *args):
    """``op``; its twin for tensor scales; the function itself where nothing intercepts it."""
    if not tracing.watched() and not tracing.named():
        tensors = [x for x in args if type(x) not in _SCALARS]
        if all(type(x) in PLAIN and not (x.is_neg() or x.is_meta) for x in tensors):
            return op._init_fn(*args)
    scale, twin = _twins[op]
    return (twin if isinstance(args[scale], Tensor) else op)(*args)


def apply(function, *args):
    """``function.apply``, without a node where no gradient is wanted.

    Binding the arguments of a Function that has ``setup_context`` takes longer than a small input
    does, and only ``torch.func`` and the compiler need it.
    """
    if torch.compiler.is_compiling() or tracing.transformed():
        return function.apply(*args)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return _without_setup(function).apply(*args)
    return function.forward(*args)


@functools.cache
def _without_setup(function):
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            output = function.forward(*args)
            function.setup_context(ctx, args, output)
            return output

        backward = staticmethod(function.backward)

    return Direct


def of_tensors(op):
    """``op`` with a 0-d float64 tensor on the CPU in place of each float.

    Its fake implementation must be registered.
    """
    schema = op._opoverload._schema
    floats = [str(argument.type) == "float" for argument in schema.arguments]

    def run(*args):
        given = zip(args, floats, strict=True)
        return op._init_fn(*(x.item() if is_float else x for x, is_float in given))

    twin = torch.library.custom_op(
        f"{schema.name}_of_tensors", run, mutates_args=(), tags=READS_ON_HOST,
        schema=str(schema).removeprefix(schema.name).replace("float ", "Tensor "),
    )  # fmt: skip
    twin.register_fake(op._abstract_fn)
    _twins[op] = floats.index(True), twin
    return twin


def or_empty(gradient, like):
    """Operators return tensors: an empty one in place of a gradient that is not needed."""
    return like.new_empty(0) if gradient is None else gradient


def as_owned_tensor(x):
    """``x``, but not a view: autograd rejects in-place changes of views that a Function returns.

    Operations after a layer often do: ``nn.ReLU(inplace=True)``, ``y += shortcut``. For results
    that nothing else holds: autograd does not see that the two share memory.
    """
    return x.data


@constant
def _vectorised():
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def needs_aten():
    """Whether an active transform can follow neither the operators nor their Functions.

    The compiler cannot trace a Function under ``torch.vmap``.
    """
    return forward_mode() or (torch.compiler.is_compiling() and _vectorised())


def wants_graph(*upstream):
    """Whether the backward pass has to consist of differentiable operations.

    It is itself differentiated (``create_graph=True``, tangents), or ``is_grads_batched=True`` has
    batched gradients in a way that operators cannot see.
    """
    if torch.compiler.is_compiling():
        return False
    batched = map(torch._C._functorch.is_legacy_batchedtensor, upstream)
    return torch.is_grad_enabled() or forward_mode() or any(batched)


def differentiable(forward, inputs, needs, upstream):
    """Gradients of ``forward`` as operations that can be differentiated and transformed.

    Taken with respect to views: the inputs themselves may depend on each other. An input that no
    longer requires a gradient (inside ``torch.func.vjp``) gets its own.
    """
    wanted = [x for x, need in zip(inputs, needs, strict=True) if need]

    def of_wanted(*wanted):
        given = iter(wanted)
        return forward(*(next(given) if need else x for x, need in zip(inputs, needs, strict=True)))

    if torch._C._are_functorch_transforms_active():
        found = torch.func.vjp(of_wanted, *wanted)[1](upstream)
    else:  # hooks on saved tensors, which torch.func rejects, work here
        with torch.enable_grad():
            wanted = [x.view_as(x) if x.requires_grad else x.detach() for x in wanted]
            wanted = [x.requires_grad_() for x in wanted]
            found = torch.autograd.grad(of_wanted(*wanted), wanted, upstream, create_graph=True)
    found = iter(found)
    return [next(found) if need else None for need in needs]


def vectorise(op, *, shared=(), joined=True):
    """Registers a vmap rule that folds the vmapped axis into the batch, axis 0 of every tensor.

    ``shared`` tensors, such as weights, have no batch: where one of them is vmapped, the operator
    runs once per index. It also does if not ``joined``, since a sum over the batch would mix them.
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
