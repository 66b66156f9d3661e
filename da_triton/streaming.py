r"""Streaming double attention for long or unbounded video.

The softmax over positions is taken over all frames seen so far. Per attention map, ``maximum`` is a
pivot μ (its largest logit, or its log-sum-exp), ``total = Σ exp(x − μ)`` and ``weighted = Σ a·exp(x
− μ)``, over positions with logit x and features a. Two sets of positions merge by rescaling to the
larger pivot (the online softmax of Milakov and Gimelshein, arXiv 1805.02867), ``G = weighted /
total``:

    μ' = max(μ₁, μ₂)    total' = total₁·exp(μ₁ − μ') + total₂·exp(μ₂ − μ')

and ``weighted'`` in the same way.

All frames at once give the same G up to rounding. A state is as large after a million frames as
after one; a window of W frames holds at most W + 1 of them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, precision
from .functional import distribute, gather_partial
from .modules import DoubleAttention, call, check_input


@dataclasses.dataclass(frozen=True, eq=False)
class Descriptors:
    """The gather of the positions seen so far. Immutable: each method gives a new state.

    Sums are float32, and float64 for float64 inputs, whatever the dtype of the frames. Gradients
    flow through ``update``, ``merge`` and ``read`` to every frame seen; :meth:`detach` cuts them
    off, and without it under gradients memory grows with the frames. A deep copy is the state
    itself. ``pickle`` and ``torch.save`` keep the values without the graph; ``torch.load`` reads
    them with its default ``weights_only=True``, once this module is imported.

    Example:
        >>> state = Descriptors.init(1, 8, 4)
        >>> for frame in range(3):
        ...     state = state.update(torch.randn(1, 8, 14, 14), torch.randn(1, 4, 14, 14))
        >>> state.read().shape
        torch.Size([1, 1, 8, 4])
    """

    # (N, heads, n), see _pivot_dtype. A constant to autograd, as G does not depend on it.
    maximum: Tensor
    total: Tensor  # (N, heads, n)
    weighted: Tensor  # (N, heads, m, n)

    @staticmethod
    def init(
        batch: int,
        m: int,
        n: int,
        *,
        heads: int = 1,
        dtype: torch.dtype = torch.float32,
        device: Any = None,
    ) -> "Descriptors":
        """An empty state: m features and n descriptors per head and sample.

        ``dtype``: float32, or float64 for float64 frames.
        """
        checks.positive(m=m, n=n, heads=heads)
        _check_dtype(dtype)
        weighted = torch.zeros((batch, heads, m, n), dtype=dtype, device=device)
        maximum = weighted.new_full(
            (batch, heads, n), -torch.inf, dtype=_pivot_dtype(weighted.device)
        )
        return Descriptors(maximum, weighted.new_zeros((batch, heads, n)), weighted)

    @staticmethod
    def of(
        a: Tensor,
        b: Tensor,
        *,
        heads: int = 1,
        mask: Tensor | None = None,
        logit_scale: float = 1.0,
        backend: str = "auto",
    ) -> "Descriptors":
        """The state of one frame alone; arguments as :func:`da_triton.gather`."""
        options: dict[str, Any] = {"mask": mask, "logit_scale": logit_scale, "backend": backend}
        g, maximum, total = gather_partial(a, b, heads=heads, **options)
        return Descriptors(maximum.to(_pivot_dtype(a.device)), total, g * total[:, :, None])

    def update(
        self,
        a: Tensor,
        b: Tensor,
        *,
        mask: Tensor | None = None,
        logit_scale: float = 1.0,
        backend: str = "auto",
    ) -> "Descriptors":
        """Adds the positions of a frame; arguments and errors as :func:`da_triton.gather`.

        A frame may have positions of any number and shape. An attention map whose positions are all
        masked adds nothing; one of ``-inf`` alone, without a mask, gives NaN, as the softmax of
        that frame does.
        """
        options: dict[str, Any] = {"mask": mask, "logit_scale": logit_scale, "backend": backend}
        return self.merge(Descriptors.of(a, b, heads=self.weighted.shape[1], **options))

    def merge(self, other: "Descriptors") -> "Descriptors":
        """The state of the positions of both, which must not overlap.

        Raises:
            TypeError: ``other`` is not a state, or its dtype differs.
            ValueError: another batch, heads, m or n.
            RuntimeError: another device.
        """
        _check_merge(self, other)
        with torch.no_grad():
            maximum = torch.maximum(self.maximum, other.maximum)
            pivot = maximum.masked_fill(maximum == -torch.inf, 0)  # −inf − (−inf) would be NaN
            old, new = (
                (state.maximum - pivot).exp().to(state.total.dtype) for state in (self, other)
            )
        return Descriptors(
            maximum,
            self.total * old + other.total * new,
            self.weighted * old[:, :, None] + other.weighted * new[:, :, None],
        )

    def forget(self, decay: float) -> "Descriptors":
        """Every weight times ``decay`` (0 < decay ≤ 1): logits plus log(decay).

        Before each update, it gives a frame of age t the logits ``x + t·log(decay)``.
        """
        _check_decay(decay)
        shift = math.log(decay)
        with torch.no_grad():
            maximum = self.maximum + shift
            # The pivot's rounding error; −inf − (−inf) where no position was seen.
            rest = (self.maximum - maximum + shift).nan_to_num(0).exp().to(self.total.dtype)
        return Descriptors(maximum, self.total * rest, self.weighted * rest[:, :, None])

    def read(self) -> Tensor:
        """``G (N, heads, m, n)`` in the dtype of the sums; zeros where no position was seen."""
        return self.weighted / self.total.masked_fill(self.total == 0, 1)[:, :, None]

    def emptied(self) -> "Descriptors":
        """An empty state with the shapes, dtype and device of this one."""
        batch, heads, m, n = self.weighted.shape
        kind: dict[str, Any] = {"dtype": self.weighted.dtype, "device": self.weighted.device}
        return Descriptors.init(batch, m, n, heads=heads, **kind)

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> "Descriptors":
        """On another device, with sums of another dtype: ``.to(device, dtype)`` or ``.to(dtype)``.

        Raises:
            TypeError: ``dtype`` is neither float32 nor float64, the dtypes of sums.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        dtype = self.total.dtype if dtype is None else dtype
        _check_dtype(dtype)
        device = self.total.device if device is None else torch.device(device)
        kinds = {"maximum": _pivot_dtype(device), "total": dtype, "weighted": dtype}
        moved = {
            name: getattr(self, name).to(device, kind, non_blocking=non_blocking)
            for name, kind in kinds.items()
        }
        return Descriptors(**moved)

    def detach(self) -> "Descriptors":
        """The same without the graph: gradients of what follows end here."""
        return Descriptors(self.maximum.detach(), self.total.detach(), self.weighted.detach())

    def __copy__(self) -> "Descriptors":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Descriptors":
        return self  # immutable; PyTorch does not copy tensors that have a graph

    def __getstate__(self) -> dict[str, Tensor]:
        return dict(vars(self.detach()))  # PyTorch would load what had a graph as leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """The gather of the last ``size`` frames: three merges per frame on average (once in ``size``
    frames, ``size`` of them), however long the window is.

    Nothing is ever subtracted, so a frame that has left leaves no rounding behind, and no NaN. The
    older half of the window is kept as sums from each of its frames to its end, the newer half as
    its frames and their sum; when the older half has left, the newer one takes its place. Immutable
    like :class:`Descriptors`.
    """

    size: int
    older: tuple[Descriptors, ...]  # [-1]: the whole older half; [0]: its last frame alone
    newer: tuple[Descriptors, ...]
    sum_newer: Descriptors

    @staticmethod
    def init(size: int, empty: Descriptors) -> "Window":
        """A window without frames. ``empty``: ``Descriptors.init(…)`` of the frames to come."""
        checks.positive(size=size)
        return Window(int(size), (), (), empty.emptied())

    def update(self, a: Tensor, b: Tensor, **options: Any) -> "Window":
        """With a frame, without the one ``size`` frames before; as :meth:`Descriptors.update`."""
        heads = self.sum_newer.weighted.shape[1]
        return self.push(Descriptors.of(a, b, heads=heads, **options))

    def push(self, frame: Descriptors) -> "Window":
        """The same with the state of a frame (:meth:`Descriptors.of`)."""
        _check_merge(self.sum_newer, frame)
        older, newer, sum_newer = self.older, self.newer, self.sum_newer
        if len(older) + len(newer) == self.size:
            if not older:
                older = tuple(itertools.accumulate(reversed(newer), _before))
                newer, sum_newer = (), sum_newer.emptied()
            older = older[:-1]
        return Window(self.size, older, (*newer, frame), sum_newer.merge(frame))

    def merged(self) -> Descriptors:
        """The window as one state, older frames first."""
        return self.older[-1].merge(self.sum_newer) if self.older else self.sum_newer

    def read(self) -> Tensor:
        """``G (N, heads, m, n)`` as :meth:`Descriptors.read`."""
        return self.merged().read()

    def to(
        self, device: Any = None, dtype: torch.dtype | None = None, *, non_blocking: bool = False
    ) -> "Window":
        """As :meth:`Descriptors.to`."""
        return self._map(lambda state: state.to(device, dtype, non_blocking=non_blocking))

    def detach(self) -> "Window":
        """The same without the graph."""
        return self._map(Descriptors.detach)

    def _map(self, change: Callable[[Descriptors], Descriptors]) -> "Window":
        older, newer = tuple(map(change, self.older)), tuple(map(change, self.newer))
        return Window(self.size, older, newer, change(self.sum_newer))


# What torch.load may build with its default, weights_only=True.
torch.serialization.add_safe_globals([Descriptors, Window])


class StreamingDoubleAttention(nn.Module):
    """Runs a :class:`da_triton.DoubleAttention` layer on a video frame by frame.

    Causal: ``y = stream(frame)`` for each frame gives every frame what the frames up to it hold.
    In two passes, ``stream.update(frame)`` for all frames and then ``stream.distribute(frame)`` for
    each, the result is that of the layer on the whole clip.

    Args:
        layer: the child whose parameters are used, not copied. Its ``order`` and ``recompute`` are
            not: frames are gathered from A and distributed to Z, as the paper draws it. Hooks of
            its convolutions run; its own do not, as its ``forward`` is not called.
        window: the number of most recent frames that are included. Default: all.
        decay: weights of older frames, times this for each frame since (0 < decay ≤ 1).

    ``state`` is None before the first frame, then :class:`Descriptors` or :class:`Window`, which
    can be kept, saved and put back. Gradients flow through all frames of the state; for a long
    video call :meth:`detach` between frames, or update under ``torch.no_grad()``.

    The state moves with the module: ``.to(device)`` takes it along, and after ``.half()`` its sums
    are float32, after ``.double()`` float64. Copies and pickles of the module hold it. Its
    ``state_dict`` does not, as the state belongs to a video rather than to the weights: a
    checkpoint of the layer loads under the prefix ``layer.``, and ``torch.save(stream.state, …)``
    saves the video's part.

    ``torch.compile(stream)`` compiles once for the first frame and once for all others; with a
    window, once for each number of frames in either half of it.

    Example:
        >>> stream = StreamingDoubleAttention(DoubleAttention(64, residual=True), window=16)
        >>> stream(torch.randn(1, 64, 14, 14)).shape
        torch.Size([1, 64, 14, 14])
    """

    def __init__(
        self, layer: DoubleAttention, window: int | None = None, decay: float | None = None
    ) -> None:
        super().__init__()
        if not isinstance(layer, DoubleAttention):
            raise TypeError(
                f"layer must be a DoubleAttention, got {type(layer).__name__}. If it holds one, "
                "give that: module.attention, for example."
            )
        if layer.process_group is not None:
            raise ValueError(
                "layer has a process_group, and a stream lives on one device. Give each rank a "
                "layer without one, and merge the ranks' states."
            )
        if window is not None and decay is not None:
            raise ValueError(
                f"window or decay, not both: got window={window!r} and decay={decay!r}. With a "
                "decay, old frames fade by themselves."
            )
        if window is not None:
            checks.positive(window=window)
        if decay is not None:
            _check_decay(decay)
        self.layer = layer
        self.window = window
        self.decay = decay
        self.state: Descriptors | Window | None = None

    def forward(self, frame: Tensor, mask: Tensor | None = None) -> Tensor:
        """Adds the frame to the state and distributes the state to it."""
        self.update(frame, mask)
        return self.distribute(frame)

    def update(self, frame: Tensor, mask: Tensor | None = None) -> None:
        """Adds a frame, or several at once, to the state.

        ``frame (N, in_channels, *positions)``; ``mask`` as in :meth:`DoubleAttention.forward`. The
        number of positions may change from frame to frame, N may not.
        """
        self._check(frame)
        layer = self.layer
        if mask is not None:
            checks.mask(mask, frame, "frame")
        new = Descriptors.of(
            call(layer.convA, frame), call(layer.convB, frame), heads=layer.heads, mask=mask,
            logit_scale=layer.logit_scale, backend=layer.backend,
        )  # fmt: skip
        state = self.state
        size = getattr(state, "size", None)
        if state is not None and size != self.window:
            raise ValueError(
                f"The state is of a stream with window={size}, and this one has "
                f"window={self.window}. Put back a state of the same window, or call reset()."
            )
        if state is None and self.window is not None:
            state = Window.init(self.window, new)
        if state is None:
            self.state = new
        elif isinstance(state, Window):
            self.state = state.push(new)
        else:
            _check_merge(state, new)
            self.state = (state if self.decay is None else state.forget(self.decay)).merge(new)

    def distribute(self, frame: Tensor) -> Tensor:
        """The state's G, distributed to a frame: ``(N, in_channels or c_m, *positions)``."""
        self._check(frame)
        if self.state is None:
            raise RuntimeError("No frames seen yet: call update with a frame first.")
        layer = self.layer
        y = distribute(
            self.state.read(), call(layer.convV, frame), scale=layer.scale,
            softmax=layer.softmax_v, logit_scale=layer.logit_scale_v, backend=layer.backend,
        )  # fmt: skip
        if layer.conv_reconstruct is not None:
            y = call(layer.conv_reconstruct, y)
        return frame + y if layer.residual else y

    def detach(self) -> None:
        """Gradients of what follows do not reach the frames before."""
        if self.state is not None:
            self.state = self.state.detach()

    def reset(self) -> None:
        """Forgets all frames, for another video."""
        self.state = None

    def extra_repr(self) -> str:
        given = {"window": self.window, "decay": self.decay}
        return ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "StreamingDoubleAttention":
        super()._apply(fn, recurse)
        if self.state is not None:
            sums = self.state.sum_newer if isinstance(self.state, Window) else self.state
            like = fn(sums.total.new_empty(0))
            lost = sums.total.is_meta and not like.is_meta  # after to_empty()
            dtype = precision.accumulator(like.dtype)
            self.state = None if lost else self.state.to(like.device, dtype)
        return self

    def _check(self, frame: Tensor) -> None:
        check_input(self.layer, "frame", frame)


def _before(later: Descriptors, frame: Descriptors) -> Descriptors:
    return frame.merge(later)


def _check_merge(state: Descriptors, other: Descriptors) -> None:
    if not isinstance(other, Descriptors):
        raise TypeError(f"Descriptors merge with Descriptors, got {type(other).__name__}.")
    x, y = state.weighted, other.weighted
    if x.shape != y.shape:
        raise ValueError(
            f"The state is of shape (N, heads, m, n) = {tuple(x.shape)}, and the one being merged "
            f"of {tuple(y.shape)}. Start a new state for another batch, heads, m or n."
        )
    if x.dtype != y.dtype:
        raise TypeError(
            f"The state is {x.dtype}, and the one being merged {y.dtype}. Frames of one video "
            f"share a dtype; to go on with another, convert the state: state.to({y.dtype})."
        )
    if x.device != y.device:
        raise RuntimeError(
            f"The state is on {x.device}, and the one being merged on {y.device}. Move one of them "
            "with .to(device)."
        )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"dtype must be torch.float32 or torch.float64, got {dtype!r}. Sums of float16 and "
            "bfloat16 frames are float32."
        )


def _pivot_dtype(device: torch.device) -> torch.dtype:
    """float64, because float32 loses digits of exp(logit − pivot) with every shift; float32 on MPS,
    which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _check_decay(decay: float) -> None:
    checks.number(decay=decay)
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be over 0 and at most 1, got {decay!r}.")
