"""Error types and messages of streaming."""

import doctest

import pytest
import torch

from da_triton import DoubleAttention, streaming
from da_triton.streaming import Descriptors, StreamingDoubleAttention, Window

A, B = torch.zeros(2, 6, 5), torch.zeros(2, 8, 5)
small = Descriptors.init(2, 3, 4, heads=2)
layer = DoubleAttention(6)


def with_group():
    split = DoubleAttention(6)
    split.process_group = object()
    return split


ERRORS = [
    (lambda: Descriptors.init(2, 0, 4), ValueError, "m must be a positive integer, got 0"),
    (lambda: Descriptors.init(2, 3, 4, dtype=torch.float16), TypeError, "frames are float32"),
    (lambda: Descriptors.of(A, B, heads=4), ValueError, "heads must divide"),
    (lambda: Descriptors.of(A, B, backend="cuda"), ValueError, "backend must be one of"),
    (lambda: Descriptors.of(A, B.half()), TypeError, "a and b must share one dtype"),
    (lambda: Descriptors.of(A[:, :, :0], B[:, :, :0]), ValueError, "at least one"),
    (lambda: small.update(A[:1], B[:1]), ValueError, r"\(2, 2, 3, 4\).*of \(1, 2, 3, 4\)"),
    (lambda: small.update(B, A), ValueError, "Start a new state for another batch"),
    (lambda: small.update(A.double(), B.double()), TypeError, r"state\.to\(torch\.float64\)"),
    (lambda: small.to(torch.float64).merge(small), TypeError, r"state\.to\(torch\.float32\)"),
    (lambda: small.to(torch.float16), TypeError, "got torch.float16. Sums of float16.*are float32"),
    (lambda: small.to("cpu", torch.bfloat16), TypeError, "dtype must be torch.float32 or torch.f"),
    (lambda: small.to(dtype=torch.int64), TypeError, "got torch.int64"),
    (lambda: Window.init(2, small).to(torch.float16), TypeError, "got torch.float16"),
    (lambda: small.update(A.to("meta"), B.to("meta")), RuntimeError, r"on meta.*\.to\(device\)"),
    (lambda: small.merge(A), TypeError, "Descriptors merge with Descriptors, got Tensor"),
    (lambda: small.forget(0), ValueError, "decay must be over 0 and at most 1, got 0"),
    (lambda: small.forget(1.5), ValueError, "got 1.5"),
    (lambda: small.forget("1"), TypeError, "decay must be a Python number, int or float, got str"),
    (lambda: Window.init(0, small), ValueError, "size must be a positive integer, got 0"),
    (lambda: Window.init(2, small).update(B, A), ValueError, "Start a new state"),
    (lambda: Window.init(2, small).push(A), TypeError, "got Tensor"),
    (
        lambda: StreamingDoubleAttention(torch.nn.ReLU()),
        TypeError,
        r"got ReLU\. If.*module.attention",
    ),
    (lambda: StreamingDoubleAttention(layer, window=0), ValueError, "window must be a positive"),
    (lambda: StreamingDoubleAttention(layer, decay=2), ValueError, "decay must be over 0"),
    (lambda: StreamingDoubleAttention(layer, window=2, decay=0.5), ValueError, "not both"),
    (lambda: StreamingDoubleAttention(with_group()), ValueError, "a stream lives on one device"),
    (lambda: StreamingDoubleAttention(layer).distribute(A), RuntimeError, "update with a frame"),
    (lambda: StreamingDoubleAttention(layer)(B), ValueError, "must have 6 channels"),
    (lambda: StreamingDoubleAttention(layer)([A]), TypeError, "frame must be a torch.Tensor"),
    (lambda: StreamingDoubleAttention(layer)(A, A), TypeError, "mask must be bool"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_a_stream_rejects_another_batch():
    stream = StreamingDoubleAttention(layer)
    stream(A)
    with pytest.raises(ValueError, match="Start a new state"):
        stream(A[:1])
    assert stream.state.read().shape[0] == 2  # as it was


@pytest.mark.parametrize(("window", "given"), [(None, 3), (3, None), (3, 4)])
def test_a_state_of_another_window_is_an_error(window, given):
    other, stream = (StreamingDoubleAttention(layer, window=size) for size in (given, window))
    other(A)
    stream.state = other.state
    with pytest.raises(ValueError, match=f"window={given}, and this one has window={window}. Put"):
        stream(A)
    stream.reset()
    stream(A)


def test_the_module_shows_what_it_does():
    result = doctest.testmod(streaming)
    assert result.attempted
    assert not result.failed
