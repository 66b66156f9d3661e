"""What every launcher needs on the host: strides and their alignment, chunks, dtypes, the device.

Positions are split into chunks, one program each, so that a launch has about one wave of programs.
"""

import contextlib
import functools
import threading

import torch
import triton
import triton.language as tl

from ..precision import accumulator
from .tiles import GRADIENT_RANGE

# Read when the kernels are decorated, on import; a later change of the variable changes nothing.
INTERPRETED = triton.knobs.runtime.interpret

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# Without a GPU (interpreted kernels) the split over positions is made for this many processors: few
# enough to keep interpreted launches short, enough to exercise the combination of chunks.
INTERPRETED_PROCESSORS = 4
INTERPRETER = threading.RLock()

# Launch arguments whose value changes no generated code: no recompilation when they are 1 or 16.
COUNTS = ["HEADS", "CHUNK_BLOCKS", "SPLITS"]


def p_scale(dtype):
    """Factor that keeps normalised gather weights out of float16's subnormals.

    P ≤ 1 sums to 1 over up to 2^21 positions, so most of it is below 2^-14, the smallest normal
    float16. 2^15 · P still fits, where P may be larger by the range that ``into_float16`` gives
    to gradients; the product is scaled back in float32. Exact: a power of two.
    """
    return 32768.0 / GRADIENT_RANGE.value if dtype == torch.float16 else 1.0


def strides(x, align):
    """Strides of ``(…, channels, positions)``, all but the last in units of ``align``.

    An axis of size 1 has stride 0 here: PyTorch leaves any value there.
    """
    s = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return *(stride // align for stride in s[:-1]), s[-1]


def alignment(*maps):
    """The unit (8, 4, 2 or 1) in which a launch passes strides and the number of positions.

    The compiler sees divisibility by 16 of an argument and nothing smaller, so with 196 positions a
    row every load would be 2 bytes wide. Given 49 units of 4, it sees rows aligned to 8 bytes.
    """
    rows = [s for x in maps for s in strides(x, 1)[:-1]] + [maps[0].shape[-1]]
    if any(x.stride(-1) != 1 for x in maps) or max(rows) >= 2**31:
        return 1  # rows are not contiguous, or a stride rebuilt in the kernel could overflow int32
    unit = next(d for d in (16, 8, 4, 2, 1) if all(r % d == 0 for r in rows))
    return 1 if unit == 16 else unit


@functools.cache
def processors(device):
    """Multiprocessors of the GPU; a small fixed number for interpreted kernels."""
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Trial(threading.local):
    splits = None  # programs that share the positions, instead of as many as the GPU has room for
    tiles = None  # what launches take is noted here


_trial = _Trial()


@contextlib.contextmanager
def trial(splits, tiles):
    """Splits positions of this thread's launches over ``splits`` programs, blocks permitting, and
    adds the tile of every launch to the list ``tiles``, in words."""
    before = _trial.splits, _trial.tiles
    _trial.splits, _trial.tiles = splits, tiles
    try:
        yield
    finally:
        _trial.splits, _trial.tiles = before


def chunks(programs, length, tile, device):
    """(blocks of positions in a chunk, number of chunks) that fill the GPU about once.

    ``programs``: how many programs there are without splitting positions.
    """
    blocks = triton.cdiv(length, tile.block_l)
    wanted = _trial.splits or max(1, processors(device) * tile.per_processor // programs)
    blocks_per_chunk = triton.cdiv(blocks, min(wanted, blocks))
    return blocks_per_chunk, triton.cdiv(blocks, blocks_per_chunk)


def empty_map_like(x, channels=None):
    """Uninitialised ``(N, heads, channels, positions)`` in the memory format of x.

    Channels-last memory is ``(N, positions, heads, channels)``, as a convolution's output has it.
    """
    batch, heads, c, length = x.shape
    c = c if channels is None else channels
    if is_channels_last(x):
        return x.new_empty((batch, length, heads, c)).permute(0, 2, 3, 1)
    return x.new_empty((batch, heads, c, length))


def empty_rows_like(x, channels):
    """Uninitialised ``(N, channels, positions)`` in the memory format of ``x``, likewise."""
    return empty_map_like(x.unsqueeze(1), channels).squeeze(1)


def is_channels_last(x):
    """Whether neighbours in memory are neighbours in channels, not in positions."""
    return x.stride(3) != 1 and (x.stride(2) == 1 or (x.shape[2] == 1 and x.stride(1) == 1))


def add_parts(parts, shape):
    """Partial sums ``(N·heads, splits, …)`` added in a fixed order."""
    return (parts[:, 0] if parts.shape[1] == 1 else parts.sum(1)).view(shape)


def device_of(x):
    """Triton launches on the current device: make it the tensors'.

    The interpreter keeps its state in one place of the process: there, one thread at a time.
    """
    return torch.cuda.device(x.device) if x.is_cuda else INTERPRETER


def options(x, tile, products=True, again=False):
    """Dtypes and compiler options of a launch; the float32 switch is PyTorch's own.

    ``again``: the kernel recomputes softmax weights from a log-sum-exp. Contracted into one
    FMA, ``scale·x − lse`` would round a huge logit differently than the pass that made lse did,
    where a select stands between the two, and ``exp`` of the difference overflows.
    """
    if _trial.tiles is not None:
        blocks = f"{tile.block_m}x{tile.block_n}x{tile.block_l}"
        _trial.tiles.append(f"{blocks} {tile.num_warps}w {tile.num_stages}s")
    chosen = {
        "ACC": TRITON_DTYPE[accumulator(x.dtype)],
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": not again,
    }
    if products:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        chosen["PRECISION"] = "tf32" if tf32 and x.dtype == torch.float32 else "ieee"
    return chosen
