"""``StreamingDoubleAttention`` and its state: moved, converted, copied, saved and compiled."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from da_triton import DoubleAttention
from da_triton.streaming import Descriptors, StreamingDoubleAttention, Window
from support.numerics import DEVICE, check, relative_rms

KINDS = [{}, {"window": 3}, {"decay": 0.5}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=["all", "window", "decay"])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def clip(frames=5, dtype=torch.float32):
    return list(torch.randn(frames, 2, 6, 3, 4, dtype=dtype, device=DEVICE))


def streamed(kind, dtype=torch.float32, **options):
    layer = DoubleAttention(6, residual=True, dtype=dtype, device=DEVICE, **options)
    return StreamingDoubleAttention(layer, **kind)


def sums(state):
    """Total and weighted of everything that a state holds."""
    if isinstance(state, Window):
        states = [*state.older, *state.newer, state.sum_newer]
        return [x for state in states for x in sums(state)]
    return [state.total, state.weighted]


@each_kind
def test_a_state_survives_save_and_load_with_their_defaults(kind, tmp_path):
    stream, frames = streamed(kind), clip()
    for frame in frames[:4]:
        stream(frame)
    torch.save({"state": stream.state, "frame": 4}, tmp_path / "video.pt")
    loaded = torch.load(tmp_path / "video.pt")["state"]
    assert type(loaded) is type(stream.state)
    assert torch.equal(loaded.read(), stream.state.read())
    assert not any(x.requires_grad for x in sums(loaded))  # the graph has no end there
    again = StreamingDoubleAttention(stream.layer, **kind)
    again.state = loaded
    assert torch.equal(again(frames[4]), stream(frames[4]))


def test_another_process_loads_a_state(tmp_path):
    stream, (frame, *_) = streamed({"window": 3}), clip()
    stream(frame)
    torch.save(stream.state, tmp_path / "state.pt")
    code = """
import sys, torch
from da_triton import streaming
torch.save(torch.load(sys.argv[1] + "/state.pt", map_location="cpu").read(), sys.argv[1] + "/g.pt")
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert torch.equal(torch.load(tmp_path / "g.pt"), stream.state.read().detach().cpu())


@pytest.mark.parametrize("backend", ["triton", "torch", "eager"])
def test_a_file_is_as_small_as_the_state(backend, tmp_path):
    """A view would be saved with all that it is a view of."""
    a, b = (torch.randn(1, 4, 5000, device=DEVICE) for _ in range(2))
    torch.save(Descriptors.of(a, b, backend=backend), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 5000


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
@each_kind
def test_a_copied_state_keeps_its_gradients(kind, copied):
    stream, (frame, *_) = streamed(kind), clip()
    stream(frame)
    g = copied(stream.state).read()
    assert torch.equal(g, stream.state.read())
    assert torch.autograd.grad(g.sum(), stream.layer.convA.weight)[0].any()


@each_kind
def test_a_copied_stream_goes_its_own_way(kind):
    stream, (first, second, third, *_) = streamed(kind), clip()
    stream(first)  # with a graph, whose tensors PyTorch does not copy
    twin = copy.deepcopy(stream)
    assert torch.equal(twin(second), stream(second))
    expected = stream.state.read()
    twin(third)
    with torch.no_grad():
        twin.layer.convA.weight.zero_()
    assert torch.equal(stream.state.read(), expected)
    assert stream.layer.convA.weight.any()


@each_kind
def test_a_pickled_stream_goes_on_with_its_video(kind, tmp_path):
    stream, (first, second, *_) = streamed(kind), clip()
    stream(first)
    torch.save(stream, tmp_path / "stream.pt")
    loaded = [pickle.loads(pickle.dumps(stream))]
    loaded.append(torch.load(tmp_path / "stream.pt", weights_only=False))
    expected = stream(second)
    for other in loaded:
        assert torch.equal(other(second), expected)


def test_a_stream_is_the_parent_of_its_layer():
    layer = DoubleAttention(6)
    stream = StreamingDoubleAttention(layer, window=4)
    assert list(stream.named_children()) == [("layer", layer)]
    assert [name for name, _ in stream.named_parameters()] == [
        f"layer.{name}" for name, _ in layer.named_parameters()
    ]
    assert not list(stream.buffers())
    stream.eval().requires_grad_(False)
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert "window=4" in repr(stream)
    assert "decay=0.5" in repr(StreamingDoubleAttention(layer, decay=0.5))


def test_hooks_of_a_stream_run_with_each_frame():
    stream, frames, seen = streamed({}), clip(), []
    stream.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    stream.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    y = stream(frames[0])
    assert torch.equal(seen[0][0], 2 * frames[0])
    assert seen[0][1] is y
    assert torch.equal(y, StreamingDoubleAttention(stream.layer)(2 * frames[0]))


@each_kind
def test_weights_and_nothing_else_are_in_the_state_dict(kind):
    stream, (first, second, *_) = streamed(kind), clip()
    stream(first)
    weights = stream.state_dict()
    assert set(weights) == {f"layer.{name}" for name in stream.layer.state_dict()}
    other = streamed(kind)
    other.load_state_dict(weights)
    other.state = stream.state
    assert torch.equal(other(second), stream(second))


@pytest.mark.parametrize("last", ["conv_reconstruct", "proj"])
def test_a_checkpoint_of_a_plain_layer_loads_under_the_prefix(last):
    layer, (frame, *_) = DoubleAttention(6, device=DEVICE), clip()
    weights = {
        f"layer.{name.replace('conv_reconstruct', last)}": value
        for name, value in layer.state_dict().items()
    }
    stream = StreamingDoubleAttention(DoubleAttention(6, device=DEVICE))
    stream.load_state_dict(weights)
    check(stream(frame), layer(frame).double(), torch.float32)


@each_kind
def test_a_state_moves_with_the_model_that_holds_the_stream(kind):
    model = nn.Sequential(streamed(kind))
    frames = clip()
    for frame in frames:
        model(frame)
    model.to("meta")
    assert all(x.device.type == "meta" for x in sums(model[0].state))
    assert model(frames[0].to("meta")).device.type == "meta"
    model.to_empty(device=DEVICE)
    assert model[0].state is None  # its values are lost
    model(frames[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", DTYPES, ids=str)
@each_kind
def test_a_stream_converted_between_frames(kind, before, dtype):
    """Its sums are never in half precision."""
    stream, frames = streamed(kind, before), clip(dtype=before)
    with torch.no_grad():
        for frame in frames[:3]:
            stream(frame)
        stream.to(dtype)
        assert stream.layer.convA.weight.dtype == dtype
        high = torch.promote_types(dtype, torch.float32)
        assert {x.dtype for x in sums(stream.state)} == {high}
        found = [stream(frame.to(dtype)) for frame in frames[3:]]
        assert {y.dtype for y in found} == {dtype}
        exact = copy.deepcopy(stream).double()
        exact.reset()
        expected = [exact(frame.double()) for frame in frames][3:]
    coarse = max(before, dtype, key=lambda kind: torch.finfo(kind).eps)
    for y, right in zip(found, expected, strict=True):
        assert relative_rms(y, right) < 8 * torch.finfo(coarse).eps


def test_conversions_by_name():
    stream, (frame, *_) = streamed({}), clip()
    stream(frame)
    g = stream.state.read()
    for change, high in [
        (stream.half, torch.float32), (stream.double, torch.float64),
        (stream.bfloat16, torch.float32), (stream.float, torch.float32),
    ]:  # fmt: skip
        assert change() is stream
        assert stream.state.read().dtype == high
    assert torch.equal(stream.state.read(), g)
    stream.to(memory_format=torch.channels_last)  # of convolutions: a state is not a feature map
    assert torch.equal(stream.state.read(), g)
    assert stream.state.weighted.is_contiguous()


@each_kind
def test_to_takes_what_the_to_of_a_tensor_takes(kind):
    stream, frames = streamed(kind), clip()
    for frame in frames:
        stream(frame)
    state = stream.state
    for arguments, options in [
        ((DEVICE,), {}), ((torch.float32,), {}), ((DEVICE, torch.float32), {}), ((), {}),
        ((), {"device": DEVICE, "dtype": torch.float32, "non_blocking": True}),
    ]:  # fmt: skip
        assert torch.equal(state.to(*arguments, **options).read(), state.read())
    double = state.to(torch.float64)
    assert {x.dtype for x in sums(double)} == {torch.float64}
    assert {x.device.type for x in sums(state.to("meta", torch.float64))} == {"meta"}
    check(state.read(), double.read(), torch.float32)
    assert torch.autograd.grad(double.read().sum(), stream.layer.convA.weight)[0].any()
    assert torch.equal(double.to(torch.float32).read(), state.read())


def test_a_pivot_survives_a_conversion():
    """A float32 next to 1e5 / 3 is off by up to 0.002: so would be the weight of the state."""
    one, b = torch.ones(1, 1, 1, dtype=torch.float64), torch.full((1, 1, 1), 1e5 / 3).double()
    far = Descriptors.of(one, b).to(torch.float32).to(torch.float64)
    found = far.merge(Descriptors.of(0 * one, b)).read().item()
    assert found == pytest.approx(0.5, rel=1e-6)


@each_kind
def test_a_compiled_stream(kind):
    torch.compiler.reset()
    stream, frames = streamed(kind), clip(7)
    other = copy.deepcopy(stream)
    compiled = torch.compile(stream, fullgraph=True, backend="aot_eager")
    for frame in frames:
        expected = other(frame)
        check(compiled(frame).detach(), expected.detach().double(), torch.float32)
    check(stream.state.read().detach(), other.state.read().detach().double(), torch.float32)


def test_a_compiled_stream_is_compiled_twice():
    torch.compiler.reset()
    stream, graphs = streamed({"decay": 0.9}), []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(stream, fullgraph=True, backend=counted)
    with torch.no_grad():
        for frame in clip(6):
            compiled(frame)
    assert len(graphs) == 2
