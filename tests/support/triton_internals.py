"""The one place where tests touch private parts of Triton (3.6 to 3.9).

If a release renames or changes one of these, what is named beside it breaks, and the repair is
here. The package itself uses the driver and a compiled kernel's launcher alone.

``OPERATIONS``              the interpreter's builder, its grid and its launch, which all tests that
                            count use (``support.traffic``, ``launches``, ``recorder``), and the
                            JIT's launch and compilation (``support.compiled``)
``BEFORE``                  what a compiled kernel's launcher gets before the kernel's own arguments
                            (``support.repeatable``, ``support.compiled``)
``without_a_gpu``           the driver and ``JITFunction.device_caches`` (``support.compiled``)
``correct_interpreter``     ``TensorHandle``, builder and reductions of the interpreter: every test
                            in bfloat16 or TF32 without a GPU

The interpreter keeps bfloat16 as uint16 and computes on the bit patterns. The corrections widen to
float32, let the original do its work, and round to nearest even. Products in TF32 are those of
float32 there; corrected, they lose the last 13 bits of their operands, as on a GPU. Only tests use
this; the package rejects bfloat16 there.
"""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as ti
from triton._C.libtriton import ir
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

Handle, Builder = ti.TensorHandle, ti.InterpreterBuilder
OPERATIONS = {
    "load": [(Builder, "create_masked_load")],
    "store": [(Builder, "create_masked_store")],
    "atomic": [(Builder, "create_atomic_rmw"), (Builder, "create_atomic_cas")],
    "dot": [(Builder, "create_dot")],
    "program": [(Builder, "set_grid_idx")],
    "grid": [(ti.GridExecutor, "__call__")],
    "interpreted_launch": [(ti.InterpretedFunction, "run")],
    "jit_launch": [(JITFunction, "run")],
    "compilation": [(JITFunction, "_do_compile")],
}
BEFORE = 9  # grid, stream, function, metadata, description and two hooks


def around(**hooks):
    """Calls a hook, with the original first, in place of each named one of ``OPERATIONS``.

    Until the stack that is returned is closed: as a context, or never.
    """
    stack = contextlib.ExitStack()
    for name, hook in hooks.items():
        for owner, attribute in OPERATIONS[name]:
            replaced = _hooked(getattr(owner, attribute), hook)
            stack.enter_context(mock.patch.object(owner, attribute, replaced))
    return stack


def _hooked(original, hook):
    return lambda *args, **kwargs: hook(original, *args, **kwargs)


def without_a_gpu(active, make):
    """From now on kernels are compiled by ``make(name, key)``, for the device of ``active``."""

    def compiled(_, kernel, key, signature, device, *others):
        made = kernel.device_caches[device][0][key] = make(kernel.fn.__name__, key)
        return made

    driver.set_active(active)
    return around(compilation=compiled)


def correct_interpreter():
    """Installs the corrections, once, and tells the package."""
    from da_triton.ops.triton import core

    if not core.interpreter_has_bfloat16:
        _correct_builder()
        _correct_reductions()
        ti.interpreter_builder.options = dataclasses.replace(
            ti.interpreter_builder.options, sanitize_overflow=False
        )  # checking every integer operation takes half the interpreter's time
        core.interpreter_has_bfloat16 = True


def widen(bits):
    return (np.asarray(bits, np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values):
    bits = np.ascontiguousarray(np.asarray(values, np.float32)).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint32(0x7FC00000), rounded).astype(np.uint32) >> np.uint32(16)


def _cut(values):
    """Without the last 13 bits of the mantissa."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _is_bf16(x):
    return isinstance(x, Handle) and x.data.dtype == np.uint16 and x.dtype.scalar == tl.bfloat16


def _wide(x):
    return Handle(widen(x.data), tl.float32) if _is_bf16(x) else x


def _bf16(values):
    return Handle(narrow(values).astype(np.uint16), tl.bfloat16)


def _narrowed(x):
    return Handle(x.data, tl.int1) if x.data.dtype == np.bool_ else _bf16(x.data)


def _correct_builder():
    original = {
        name: getattr(Builder, name)
        for name in ("cast_impl", "create_fp_to_fp", "binary_op", "unary_op", "ternary_op")
    }
    original |= {name: getattr(Builder, name) for name in ("create_fma", "create_dot")}

    def cast(self, source, to):
        if _is_bf16(source) and to.scalar == tl.bfloat16:
            return source
        source = _wide(source)
        if to.scalar == tl.bfloat16:
            return _bf16(source.data.astype(np.float32))
        return source if source.dtype == to else original["cast_impl"](self, source, to)

    def float_to_float(self, source, to, rounding):
        if _is_bf16(source) or to.scalar == tl.bfloat16:
            return cast(self, source, to)
        return original["create_fp_to_fp"](self, source, to, rounding)

    def binary(self, left, right, op):
        if not _is_bf16(left):
            return original["binary_op"](self, left, right, op)
        result = op(_wide(left).data, _wide(right).data)
        return _narrowed(Handle(result, tl.float32))

    def wrap(name, operands):
        def call(self, *args):
            if not any(_is_bf16(x) for x in args[:operands]):
                return original[name](self, *args)
            wide = [_wide(x) for x in args[:operands]]
            return _narrowed(original[name](self, *wide, *args[operands:]))

        setattr(Builder, name, call)

    def product(self, a, b, d, precision, *rest):
        a, b = _wide(a), _wide(b)
        if precision == ir.INPUT_PRECISION.TF32 and a.data.dtype == b.data.dtype == np.float32:
            a, b = (Handle(_cut(x.data), tl.float32) for x in (a, b))
        return original["create_dot"](self, a, b, d, precision, *rest)

    Builder.cast_impl = cast
    Builder.create_fp_to_fp = float_to_float
    Builder.binary_op = binary
    Builder.create_dot = product
    Builder.get_bf16 = lambda self, value: _bf16(np.array([value], np.float32))
    wrap("unary_op", 1)
    wrap("create_fma", 3)


def _correct_reductions():
    def wrap(name):
        original = getattr(ti.ReduceOps, name)

        def call(self, x, *args, **kwargs):
            if isinstance(x, tuple) or not _is_bf16(x.handle):
                return original(self, x, *args, **kwargs)
            wide = self.to_tensor(widen(x.handle.data), tl.float32)
            result = original(self, wide, *args, **kwargs)
            return self.to_tensor(_narrowed(result.handle).data, tl.bfloat16)

        setattr(ti.ReduceOps, name, call)

    wrap("sum")
    wrap("min_max")
