"""Host-side launch helpers: strides and alignment, split of positions, dtypes, device guard.

Positions are split over programs so that a launch has about one wave of programs.

Everything about a launch but addresses and scales follows from the shapes, strides, dtypes and
device of its tensors, the flags, and PyTorch's TF32 switch. It is found once per such signature
(``prepared``), and the kernel that Triton compiled for it is stored, so that a later call only
looks up the ``Launch`` and passes pointers; or not even that, where the whole call was
``recorded``.
"""

import contextlib
import functools
import math
import operator
import threading

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime.driver import driver

from .. import signatures
from ..precision import accumulator
from ..projection import channels_last
from . import tiles

# Read when the kernels are decorated, on import; a later change of the variable has no effect.
INTERPRETED = triton.knobs.runtime.interpret

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}  # of sums
# Without a GPU (interpreted kernels) the split over positions is made for this many SMs: few
# enough to keep interpreted launches short, enough to exercise the merging of partials.
INTERPRETED_SMS = 4
INTERPRETER = threading.RLock()

# Launch arguments whose value changes no generated code: no recompilation when they are 1 or 16.
COUNTS = ["HEADS", "BLOCKS_PER_SPLIT", "NUM_SPLITS"]


def strides(x, align):
    """Strides of ``(…, channels, positions)``, all but the last in units of ``align``.

    Axes of size 1 get stride 0: PyTorch's value is arbitrary.
    """
    s = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return tuple(s) if align == 1 else (*[stride // align for stride in s[:-1]], s[-1])


def alignment(*activations):
    """The unit (8, 4, 2 or 1) in which a launch passes strides and the number of positions.

    The compiler sees divisibility by 16 of an argument and nothing smaller, so with 196 positions a
    row every load would be 2 bytes wide. Given 49 units of 4, it sees rows aligned to 8 bytes.
    """
    rows = [activations[0].shape[-1]]
    for x in activations:
        if x.stride(-1) != 1:
            return 1  # rows are not contiguous
        rows += strides(x, 1)[:-1]
    unit = math.gcd(16, *rows)
    return 1 if unit == 16 or max(rows) >= 2**31 else unit  # rebuilt in the kernel, it is int32


def rows(x):
    """The variant of a tile for x: ``tiles.ALIGNED``, ``tiles.ODD`` or ``tiles.PLAIN``."""
    if x.stride(-1) != 1:
        return tiles.PLAIN
    unit = math.gcd(8, x.shape[-1], *strides(x, 1)[:-1])
    return {8: tiles.ALIGNED, 1: tiles.ODD}.get(unit, tiles.PLAIN)


def same_steps(x, *others):
    """Whether all have x's strides of channels and positions, for kernels that then read x's."""
    return all(strides(t, 1)[-2:] == strides(x, 1)[-2:] for t in others)


@functools.cache
def num_sms(device):
    """SMs of the GPU; a small fixed number for interpreted kernels."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Thread(threading.local):
    num_splits = None  # of positions, instead of as many as the GPU has room for
    choice = None  # between two tiles, instead of the one that the number of programs makes
    tiles = None  # tiles of launches are appended here
    recorder = None  # receives every launch


_thread = _Thread()


@contextlib.contextmanager
def recording(recorder):
    """Passes this thread's launches to ``recorder.launched``, too."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def is_recorded():
    return _thread.recorder is not None


def leave_unrecorded():
    """Marks the call that is being recorded as one that cannot be repeated."""
    if _thread.recorder is not None:
        _thread.recorder.complete = False


@contextlib.contextmanager
def trial(num_splits, tiles, choice=False):
    """Splits positions of this thread's launches over ``num_splits`` programs, if blocks permit,
    makes ``choice`` between tiles, and adds the tile of each launch to the list ``tiles``, as text.
    """
    before = _thread.num_splits, _thread.tiles, _thread.choice
    _thread.num_splits, _thread.tiles, _thread.choice = num_splits, tiles, choice
    try:
        yield
    finally:
        _thread.num_splits, _thread.tiles, _thread.choice = before


def chosen(choice):
    """``choice``, which depends on the number of programs; in a trial, that of the proved call."""
    return choice if _thread.choice is None else _thread.choice


def split_positions(programs, length, tile, device, waves=1, least=1):
    """``(blocks_per_split, num_splits)`` that fill the GPU about once.

    ``programs``: how many programs there are without splitting positions. ``waves``: how often the
    GPU may be filled instead, where a single wave would leave much of it idle. ``least``: blocks
    per split.
    """
    blocks = -(-length // tile.block_l)
    room = num_sms(device) * tile.ctas_per_sm
    wanted = _thread.num_splits or max(1, room // max(1, programs))
    most = _thread.num_splits or waves * wanted
    found = []
    for splits in range(wanted, most + 1):
        blocks_per_split = max(least, -(-blocks // min(splits, blocks)))
        num_splits = -(-blocks // blocks_per_split)
        steps = blocks_per_split * -(-programs * num_splits // room)
        found.append((steps, blocks_per_split, num_splits))
    enough = 1.1 * min(found)[0]
    return next(tuple(split) for steps, *split in found if steps <= enough)


def empty_activations_like(x, channels=None):
    """Uninitialised ``(N, heads, channels, positions)`` in the memory format of x.

    Channels-last memory is ``(N, positions, heads, channels)``, as a convolution's output has it.
    """
    batch, heads, c, length = x.shape
    c = c if channels is None else channels
    if is_channels_last(x):
        return x.new_empty((batch, length, heads, c)).permute(0, 2, 3, 1)
    return x.new_empty((batch, heads, c, length))


def empty_rows_like(x, channels):
    """Uninitialised ``(N, channels, positions)`` in the memory format of ``x``."""
    batch, _, length = x.shape
    if channels_last(x):
        return x.new_empty_strided((batch, channels, length), (channels * length, 1, channels))
    return x.new_empty((batch, channels, length))


def is_channels_last(x):
    """Whether channels, not positions, are adjacent in memory."""
    return x.stride(3) != 1 and (x.stride(2) == 1 or (x.shape[2] == 1 and x.stride(1) == 1))


def add_partials(partials, shape):
    """Partial sums ``(N·heads, num_splits, …)`` added in a fixed order."""
    return (partials[:, 0] if partials.shape[1] == 1 else partials.sum(1)).view(shape)


def device_of(x):
    """Triton launches on the current device, so switch to the tensors'.

    The interpreter keeps its state in one place of the process: there, one thread at a time.
    """
    return torch.cuda.device(x.device) if x.is_cuda else INTERPRETER


_ABSENT = object()
_prepared = signatures.Table()


def prepared(build, tensors, *flags):
    """Returns ``build(*tensors, *flags)``, built once per signature.

    ``build`` reads only shapes, strides, dtypes and the device of the tensors, of which any but the
    first may be None, and returns nothing that holds them: mostly a ``Launch``.
    """
    if _thread.tiles is not None:
        return build(*tensors, *flags)
    x = tensors[0]
    key = (
        build, flags, x.device, x.dtype == torch.float32 and tf32(x),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
    )  # fmt: skip
    found = _prepared.found.get(key, _ABSENT)
    if found is _ABSENT:
        found = build(*tensors, *flags)
        _prepared.add(key, found)
    return found


def forget():
    """Forgets every prepared launch and call, and the tables of tuned tiles that were read."""
    signatures.forget()
    tiles.forget()


@contextlib.contextmanager
def forgetting():
    """Context for replacing a kernel, a table of tiles, or the facts about a GPU."""
    forget()
    try:
        yield
    finally:
        forget()


def tf32(x):
    """Whether products of tensors like x are computed in TF32."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


class Launch:
    """A kernel with its grid and every argument but the tensors and scales, which come first.

    ``kernel``: one, or ``{impl: kernel}`` from which the tile chooses.

    ``values`` are the others by name, except those that follow from the rest: block sizes of the
    tile (a kernel without one gives ``num_warps``), ACC and PRECISION of ``like``; for
    ``activations``, whose strides are in units of ALIGN, these, ALIGN and L_UNITS; strides of
    ``strided`` tensors, 0 without one; BLOCKS_PER_SPLIT and NUM_SPLITS, by which ``programs`` grow.

    ``bounded``: limits registers so that an SM can hold the tile's ``ctas_per_sm`` programs.

    ``again``: the kernel recomputes softmax weights from a log-sum-exp. Contracted into one
    FMA, ``scale·x − lse`` would round a huge logit differently from the pass that made lse, where a
    select separates the two operations, and ``exp`` of the difference would overflow.
    """

    def __init__(
        self, kernel, like, tile, programs, *, activations=None, strided=None, again=False,
        num_warps=None, bounded=False, **values,
    ):  # fmt: skip
        kernel = implementation(kernel, tile)
        sizes, constants, steps = _arguments(kernel.fn)
        found = {
            "ACC": TRITON_DTYPE[accumulator(like.dtype)],
            "PRECISION": "tf32" if tf32(like) else "ieee",
        }
        self.options = {"enable_fp_fusion": not again}
        if tile is None:
            self.options["num_warps"] = num_warps
            if _thread.tiles is not None:
                _thread.tiles.append(f"{num_warps}w")
        else:
            found["BLOCK_M"] = found["BLOCK_C"] = tile.block_m
            found["BLOCK_N"], found["BLOCK_L"] = tile.block_n, tile.block_l
            self.options |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
            if bounded and tile.ctas_per_sm > 1 and tiles.limits_registers(like.device):
                self.options["maxnreg"] = tiles.registers(tile)
            if _thread.tiles is not None:
                blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_l}"
                _thread.tiles.append(f"{blocks} {tile.num_warps}w {tile.num_stages}s")
        if activations:
            align = alignment(*activations.values())
            length = next(iter(activations.values())).shape[-1]
            found["ALIGN"], found["L_UNITS"] = align, length // align
            for name, x in activations.items():
                found.update(zip(steps[name], strides(x, align), strict=True))
            if "NUM_SPLITS" in sizes and "NUM_SPLITS" not in values:
                per_split, num_splits = split_positions(programs, length, tile, like.device)
                found |= {"BLOCKS_PER_SPLIT": per_split, "NUM_SPLITS": num_splits}
                programs *= num_splits
        for name, x in (strided or {}).items():
            found.update(zip(steps[name], (0, 0) if x is None else x.stride(), strict=True))
        found |= values
        self.kernel, self.device, self.grid = kernel, like.device, (programs, 1, 1)
        self.num_splits = found.get("NUM_SPLITS")
        self.sizes = tuple([found[n] for n in sizes])
        self.constants = {n: found[n] for n in constants}
        self.rest = (*self.sizes, *self.constants.values())
        self.results = []
        self.compiled = {}

    def allocating(self, dtype, *shapes):
        """Adds contiguous results for ``empty`` to allocate; returns itself."""
        for shape in shapes:
            steps = [1]
            for size in reversed(shape[1:]):
                steps.append(steps[-1] * max(size, 1))
            self.results.append((tuple(shape), tuple(reversed(steps)), dtype))
        return self

    def empty(self):
        """The results, uninitialised."""
        return tuple([
            torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            for shape, strides, dtype in self.results
        ])  # fmt: skip

    def __call__(self, tensors, scales=()):
        """Launches on the current stream of the tensors' device.

        The code depends on which addresses 16 divides. Whatever Triton checks at every launch is
        checked here, too: if that calls for another kernel or a hook before it, Triton launches.
        """
        pointers = [t.data_ptr() for t in tensors]
        joined = 0
        for pointer in pointers:
            joined |= pointer
        aligned = True if joined % 16 == 0 else tuple([p % 16 == 0 for p in pointers])
        found = self.compiled.get(aligned)
        if found is None or not _direct((self.kernel,)):
            leave_unrecorded()
            return self._compile(tensors, scales, aligned)
        stream = stream_of(self.device)
        if stream is None:
            with torch.cuda.device(self.device):
                return self(tensors, scales)
        if _thread.recorder is not None:
            _thread.recorder.launched(self, tensors, scales, found)
        kernel, run, function, metadata = found
        enter, leave, about = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if enter is not None and getattr(enter, "calls", True):
            about = kernel.launch_metadata(self.grid, stream, *pointers, *scales, *self.rest)
        run(
            *self.grid, stream, function, metadata, about, enter, leave,
            *pointers, *scales, *self.rest,
        )  # fmt: skip

    def _compile(self, tensors, scales, aligned):
        """Launches through Triton and stores the compiled kernel."""
        with device_of(tensors[0]):
            kernel = self.kernel[self.grid](
                *tensors, *scales, *self.sizes, **self.constants, **self.options
            )
        if kernel is not None and _direct((self.kernel,)):
            self.compiled[aligned] = kernel, kernel.run, kernel.function, kernel.packed_metadata


def implementation(kernel, tile):
    """The version of a kernel that its tile names, if there are several."""
    known = kernel if isinstance(kernel, dict) else {"pointers": kernel}
    if tile is None:
        return kernel
    if tile.impl not in known:
        raise ValueError(
            f"a table of tiles names the implementation {tile.impl!r}, and the kernel has "
            f"{', '.join(map(repr, known))}. Correct the entry in kernels/tiles or in the user's "
            "table (see da_triton.runtime.tiles)."
        )
    return known[tile.impl]


def stream_of(device):
    """The device's current stream; None if another device is current."""
    current = driver.active
    index = current.get_current_device()
    if index != device.index and device.type == "cuda":
        return None
    return current.get_current_stream(index)


def unobserved(kernels):
    """Whether nothing observes launches of these kernels, nor changes what they launch."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return False
    return _thread.tiles is None and _direct(kernels)


def _direct(kernels):
    """Whether nothing is set that Triton reads at a launch, other than hooks around it."""
    runtime = knobs.runtime
    return not (
        runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or any(map(_pre_run_hooks, kernels))
    )


_pre_run_hooks = operator.attrgetter("pre_run_hooks")


@functools.cache
def _arguments(function):
    """Names of a kernel's numbers, of its constants, and of strides by tensor; each in order."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    marks = function.__annotations__
    steps = {}
    for name in names:
        if name.startswith("stride_"):
            steps.setdefault(name.split("_")[1], []).append(name)
    sizes = [n for n in names if n not in marks and not n.endswith("_ptr")]
    return sizes, [n for n in names if marks.get(n) is tl.constexpr], steps
