"""DTensors, sharded over the batch or the heads, in the operators of the Triton backend."""

import functools
from typing import Any

WEIGHTS = ("weight_", "bias_")


def register_dtensor() -> None:
    """Lets DTensors sharded over the batch or over the heads into ``torch.ops.da_triton.*``.

    Afterwards ``backend="triton"`` runs each rank's kernels on its shard: axis 0 of every tensor,
    and axis 1 of activations ``(N, heads·c, *positions)`` if the ranks divide the heads; of the
    block the batch alone, its weights replicated and their gradients partial sums. Other placements
    are redistributed first, except heads that the ranks do not divide, which DTensor itself
    rejects. Positions are never a shard here: give ``process_group`` for that.

    ``torch.distributed.tensor.experimental.register_sharding`` is not enough: it keeps a rule's
    answer without regard to bools, such as whose gradient is needed, and knows no list of results.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import OpStrategy, RuntimeSchemaInfo
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

    from ..ops.triton import block as triton_block
    from ..ops.triton import core as triton

    def share(given, axis):
        """The placement of each tensor by name, if the call is sharded along ``axis``."""
        tensors = {name: x for name, x in given.items() if isinstance(x, OpStrategy)}
        whole = {
            name: name.startswith(WEIGHTS) or x.ndim <= axis + 1 for name, x in tensors.items()
        }
        return {name: Replicate() if whole[name] else Shard(axis) for name in tensors}

    def strategy(outputs, axes, schema):
        names = [argument.name for argument in schema.op._schema.arguments]
        given = dict(zip(names, schema.args_schema, strict=True))
        replicated = {name: Replicate() for name in share(given, 0)}
        count = len(outputs(given, Replicate()))
        choices: list[list[Any]] = [
            [*[Replicate()] * count, *(replicated.get(name) for name in names)]
        ]
        for axis in axes:
            placed = share(given, axis)
            choices.append([*outputs(given, Shard(axis)), *(placed.get(name) for name in names)])
        return expand_to_full_mesh_op_strategy(
            schema.get_mesh_from_args(), schema, choices, input_index=count
        )

    def needed(*flags):
        return lambda given, shard: [shard if given[flag] else Replicate() for flag in flags]

    def block(given, shard):
        return [shard, shard, shard, shard if given["save_v"] else Replicate()]

    def block_backward(given, shard):
        of_x, *of_weights = given["needs"]
        gradients = [Partial() if need else Replicate() for need in of_weights]
        return [shard if of_x else Replicate(), *gradients]

    rules = [
        (triton.gather_op, (0, 1), lambda given, shard: [shard, shard]),
        (triton.gather_of_tensors, (0, 1), lambda given, shard: [shard, shard]),
        (triton.gather_backward_op, (0, 1), needed("need_a", "need_b")),
        (triton.gather_backward_of_tensors, (0, 1), needed("need_a", "need_b")),
        (triton.distribute_op, (0, 1), lambda given, shard: [shard]),
        (triton.distribute_of_tensors, (0, 1), lambda given, shard: [shard]),
        (triton.distribute_backward_op, (0, 1), needed("need_g", "need_v")),
        (triton.distribute_backward_of_tensors, (0, 1), needed("need_g", "need_v")),
        (triton_block.block_op, (0,), block),
        (triton_block.block_of_tensors, (0,), block),
        (triton_block.block_backward_op, (0,), block_backward),
        (triton_block.block_backward_of_tensors, (0,), block_backward),
    ]
    for op, axes, outputs in rules:
        overload = op._opoverload
        kinds = [str(argument.type) for argument in overload._schema.arguments]
        options = (i for i, kind in enumerate(kinds) if "Tensor" not in kind)
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            overload,
            functools.partial(strategy, outputs, axes),
            RuntimeSchemaInfo(next(options, len(kinds)), needs_pytree=True),
        )
