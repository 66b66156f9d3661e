"""Arguments of a launch: their key, and small random arguments like them."""

import torch

from ..precision import HALF
from . import verdicts

LONGEST = 1024  # positions of an input to prove with: several steps of every loop
SHORT = 8  # up to here, the number of positions may be a constant of the code


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors(value)
    elif isinstance(tree, dict):
        yield from tensors(list(tree.values()))


def map_tensors(tree, function):
    """The tree with a function applied to its tensors, once to a tensor that occurs twice."""
    seen: dict[int, torch.Tensor] = {}

    def walk(value):
        if isinstance(value, torch.Tensor):
            if id(value) not in seen:
                seen[id(value)] = function(value)
            return seen[id(value)]
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            items = [walk(v) for v in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return value

    return walk(tree)


def exact(name, args, kwargs):
    """A key of everything a launch depends on but the values of its tensors, made quickly."""
    found, half = [name], False
    stack = [*args, *kwargs.values()]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found += (value.shape, value.stride(), value.dtype, value.data_ptr() % 16)
            half = half or value.dtype in HALF
            device = value.device
        elif isinstance(value, (tuple, list)):
            stack += value
        elif not isinstance(value, float):
            found.append(value)
    return (*found, device, half or verdicts.allows_tf32())


def words(value, axes):
    """A tensor as its dtype, sizes and alignments, as far as code depends on them; else a flag."""
    if isinstance(value, torch.Tensor):
        letters = (axes or "").ljust(value.dim(), "-")
        sizes = map(_size, letters, value.shape)
        strides = (str(s) if s < 2 else str(_unit(s)) for s in value.stride())
        shown = f"{str(value.dtype)[6:]}[{'×'.join(sizes)}]/{','.join(strides)}"
        return shown if value.data_ptr() % 16 == 0 else f"{shown}+{value.data_ptr() % 16}"
    if isinstance(value, (tuple, list)):
        inner = _inner(value, axes)
        return "(" + ",".join(words(v, a) for v, a in zip(value, inner, strict=True)) + ")"
    if value is None or isinstance(value, float):
        return ""
    return str(value)


def _size(letter, size):
    if letter == "-" or size == 1 or (letter == "L" and size <= SHORT):
        return str(size)
    return f"L{_unit(size)}" if letter == "L" else letter


def _unit(number):
    """The largest power of two that divides a number, up to 128."""
    return min(number & -number, 128)


def _inner(value, axes):
    """Axes of the elements of a sequence: given by element, or the same for each of a list."""
    if axes is None:
        return [None] * len(value)
    return [axes] * len(value) if isinstance(value, list) else axes


def random(value, axes, role, generator, spread=False):
    """Random tensors like those of a tree, with few samples, positions and partial results.

    ``spread``: with gaps between rows, so that strides are not those of a contiguous tensor.
    """
    if isinstance(value, (tuple, list)):
        roles = role if isinstance(role, tuple) else [role] * len(value)
        items = [
            random(v, a, r, generator)
            for v, a, r in zip(value, _inner(value, axes), roles, strict=True)
        ]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, torch.Tensor):
        return value
    letters = (axes or "").ljust(value.dim(), "-")
    sizes = [few(letter, size) for letter, size in zip(letters, value.shape, strict=True)]
    x = like(value, sizes)
    if spread:
        axis = min(range(value.dim()), key=lambda i: (value.stride(i), -i))
        x = like(value, [s + 128 * (i == axis) for i, s in enumerate(sizes)])
        x = x.narrow(axis, 0, sizes[axis])
    if "S" in letters and value.is_contiguous():  # kernels take partials without strides
        x = value.new_empty(sizes)
    if value.dtype == torch.uint8:
        mask = torch.rand(x.shape, generator=generator, device=x.device) < 0.7
        mask[..., 0] = True  # an attention map without positions has no finite log-sum-exp
        return fill(x, mask)
    if role == "written":
        return fill(x, torch.full(x.shape, torch.nan, device=x.device))
    numbers = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32)
    if role == "lse":  # above every logit, as a log-sum-exp is: P stays below 1
        numbers = 7 + 0.1 * numbers
    elif role == "positive":
        numbers = numbers.abs() + 0.1
    elif axes is None:  # weights
        numbers *= 1.5 * value.shape[-1] ** -0.5
    return fill(x, numbers)


def fill(x, numbers):
    """x with these numbers; along expanded axes, the first of them."""
    target = x
    for axis, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[axis] > 1:
            target, numbers = target.narrow(axis, 0, 1), numbers.narrow(axis, 0, 1)
    target.copy_(numbers)
    return x


def few(letter, size):
    if letter == "N":
        return min(size, 2)
    if letter == "S":  # more than eight are merged by other kernels than a few
        return min(size, 3 if size <= 8 else 9)
    if letter == "L" and size > SHORT:
        return LONGEST - 128 + size % 128
    return size


def like(value, sizes):
    """Memory for a tensor with these sizes. Its strides are ordered like those of ``value`` and are
    equal to them modulo 128, so that the same loads are vectorised."""
    strides, packed = [0] * value.dim(), 1
    for axis in sorted(range(value.dim()), key=lambda i: (value.stride(i), -i)):
        if value.stride(axis) == 0 and value.shape[axis] > 1:
            continue  # expanded
        strides[axis] = packed + (value.stride(axis) - packed) % 128
        packed = strides[axis] * sizes[axis]
    offset = value.data_ptr() % 16 // value.element_size()
    memory = value.new_empty(packed + offset)
    return memory[offset:].as_strided(sizes, strides, offset)
