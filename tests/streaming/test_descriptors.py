"""``Descriptors``, frame by frame: against all frames at once, a window of them, and a decay."""

import math
import pickle

import pytest
import torch

import da_triton
from da_triton import DoubleAttention, reference
from da_triton.streaming import Descriptors, StreamingDoubleAttention, Window
from support.cases import each_backend
from support.numerics import DEVICE, DTYPES, TOLERANCE, check, peaky, relative_rms

HEADS, M, N = 2, 3, 4
EXACT = TOLERANCE[torch.float64]


def video(frames, dtype=torch.float64, lengths=(7, 12), batch=2):
    """Features and logits ``(batch, channels, positions)`` of frames of changing sizes.

    Later frames have larger logits, so that the largest one keeps changing.
    """
    shift = torch.linspace(-3, 3, frames, device=DEVICE).tolist()
    sizes = [lengths[i % len(lengths)] for i in range(frames)]
    a = [peaky(batch, HEADS * M, 1, size, dtype=dtype)[:, :, 0] + 1 for size in sizes]
    b = [
        peaky(batch, HEADS * N, 1, size, dtype=dtype)[:, :, 0] + s
        for size, s in zip(sizes, shift, strict=True)
    ]
    return a, b


def by_head(frames):
    return torch.cat(frames, -1).double().unflatten(1, (HEADS, -1))


def whole(a, b, masks=None, logit_scale=1.0):
    """The definition in float64 over all frames at once."""
    mask = None if masks is None else torch.cat(masks, -1)
    return reference.gather(by_head(a), by_head(b), mask=mask, logit_scale=logit_scale)


def start(dtype=torch.float64, batch=2):
    high = torch.promote_types(dtype, torch.float32)
    return Descriptors.init(batch, M, N, heads=HEADS, dtype=high, device=DEVICE)


def run(state, a, b, **options):
    for frame in zip(a, b, strict=True):
        state = state.update(*frame, **options)
    return state


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frame_by_frame_equals_all_at_once(backend, dtype):
    a, b = video(6, dtype)
    g = run(start(dtype), a, b, logit_scale=0.5, backend=backend).read()
    assert g.dtype == torch.promote_types(dtype, torch.float32)
    check(g, whole(a, b, logit_scale=0.5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_of_logits_rounds_alike_with_and_without_gradients(dtype):
    """The kernels scale in float32, whatever the input dtype."""
    a, b = video(3, dtype)
    for wanted in (False, True):
        frames = [x.clone().requires_grad_(wanted) for x in b]
        g = run(start(dtype), a, frames, logit_scale=0.7, backend="triton").read()
        check(g.detach(), whole(a, b, logit_scale=0.7), dtype)


@each_backend
def test_images_and_clips_are_frames(backend):
    a, b = video(3, lengths=(12,))
    state = start()
    for i, shape in enumerate([(12,), (3, 4), (2, 3, 2)]):
        state = state.update(a[i].unflatten(2, shape), b[i].unflatten(2, shape), backend=backend)
    check(state.read(), whole(a, b), torch.float64)


def test_other_combinations_of_frames_are_told_apart():
    a, b = video(6)
    right = run(start(), a, b).read()
    frames = [Descriptors.of(x, y, heads=HEADS) for x, y in zip(a, b, strict=True)]
    mean = torch.stack([frame.read() for frame in frames]).mean(0)
    assert relative_rms(mean, right) > 0.1
    assert relative_rms(frames[-1].read(), right) > 0.01
    assert relative_rms(run(start(), a[:-1], b[:-1]).read(), right) > 0.01


def test_states_merge_in_any_grouping():
    a, b = video(7)
    halves = run(start(), a[:3], b[:3]).merge(run(start(), a[3:], b[3:]))
    check(halves.read(), whole(a, b), torch.float64)
    swapped = run(start(), a[3:], b[3:]).merge(run(start(), a[:3], b[:3]))
    assert torch.equal(swapped.read(), halves.read())
    assert torch.equal(start().merge(halves).read(), halves.read())
    assert torch.equal(halves.merge(halves.emptied()).read(), halves.read())


@each_backend
def test_masks(backend):
    a, b = video(5)
    masks = [torch.rand(2, x.shape[2], device=DEVICE) > 0.4 for x in a]
    masks[0][:] = False  # nothing in the first frame
    masks[2][1] = False
    for x, y, mask in zip(a, b, masks, strict=True):
        x.masked_fill_(~mask[:, None], torch.nan)
        y.masked_fill_(~mask[:, None], torch.nan)
    state = start()
    for x, y, mask in zip(a, b, masks, strict=True):
        state = state.update(x, y, mask=mask, backend=backend)
        assert not state.read().isnan().any()
    expected = whole(a, [y.nan_to_num() for y in b], masks)
    check(state.read(), expected, torch.float64)


@each_backend
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_nothing_seen_gives_zeros_with_zero_gradients(backend, needs_gradient):
    a, b = ([x.requires_grad_(needs_gradient) for x in frames] for frames in video(2))
    assert not start().read().any()
    state = start()
    for x, y in zip(a, b, strict=True):
        nothing = torch.zeros(2, x.shape[2], dtype=torch.bool, device=DEVICE)
        state = state.update(x, y, mask=nothing, backend=backend)
    assert torch.equal(state.read(), torch.zeros(2, HEADS, M, N).to(state.read()))
    if needs_gradient:
        for gradient in torch.autograd.grad(state.read().sum(), [*a, *b]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("offset", [0, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_thousand_frames(dtype, offset):
    """Nothing is rounded to half precision on the way."""
    a, b = video(1000, dtype, lengths=(8,), batch=1)
    b = [y + offset for y in b]
    state = run(start(dtype, batch=1), a, b, backend="torch")
    check(state.read(), whole(a, b), torch.promote_types(dtype, torch.float32))


@pytest.mark.parametrize("masked", [False, True])
def test_the_pivot_of_the_kernels_loses_no_digits(masked):
    """Their lse is float64 for float32 inputs, and the state is float32."""
    a, b = video(8, torch.float32)
    b = [y + 300 for y in b]
    masks = [torch.ones(2, x.shape[2], dtype=torch.bool, device=DEVICE) for x in a]
    state = start(torch.float32)
    for x, y, mask in zip(a, b, masks, strict=True):
        state = state.update(x, y, mask=mask if masked else None, backend="triton")
    check(state.read(), whole(a, b), torch.float32)


def bytes_of(state):
    states = [state] if isinstance(state, Descriptors) else [*state.older, *state.newer]
    return sum(x.untyped_storage().nbytes() for s in states for x in (s.total, s.weighted))


def test_memory_does_not_grow_with_frames():
    a, b = video(40, torch.float32, lengths=(7,))
    state = run(start(torch.float32), a[:2], b[:2])
    after_two, pickled = bytes_of(state), len(pickle.dumps(state))
    state = run(state, a, b)
    assert bytes_of(state) == after_two
    assert len(pickle.dumps(state)) == pickled
    window = run(Window.init(4, start(torch.float32)), a[:4], b[:4])
    full = bytes_of(window)
    for frame in zip(a, b, strict=True):
        window = window.update(*frame)
        assert bytes_of(window) == full


@each_backend
@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
def test_a_window_is_the_gather_of_its_frames(backend, size):
    a, b = video(11 if backend != "triton" else 7)
    window = Window.init(size, start())
    assert not window.read().any()
    for i in range(len(a)):
        window = window.update(a[i], b[i], logit_scale=1.3, backend=backend)
        seen = slice(max(0, i + 1 - size), i + 1)
        check(window.read(), whole(a[seen], b[seen], logit_scale=1.3), torch.float64)
    if size < len(a):
        assert relative_rms(window.read(), whole(a, b, logit_scale=1.3)) > 1e-3


def test_a_window_forgets_what_has_left_it():
    a, b = video(7)
    b[1] += 500  # a peak that would hide every other frame
    a[2] += torch.nan
    window = run(Window.init(3, start()), a[:3], b[:3])
    assert window.read().isnan().all()
    window = run(window, a[3:6], b[3:6])
    check(window.read(), whole(a[3:6], b[3:6]), torch.float64)


@pytest.mark.parametrize("size", [3, 16])
def test_a_window_costs_three_merges_a_frame(size, monkeypatch):
    a, b = video(64, lengths=(7,))
    window = run(Window.init(size, start()), a, b)
    merges, merge = [], Descriptors.merge

    def counted(self, other):
        merges.append(None)
        return merge(self, other)

    monkeypatch.setattr(Descriptors, "merge", counted)
    for frame in zip(a, b, strict=True):
        window = window.update(*frame)
        window.read()
    assert len(merges) <= 3 * len(a)


def aged(b, decay):
    """Logits plus age · log(decay)."""
    return [y + (len(b) - 1 - i) * math.log(decay) for i, y in enumerate(b)]


def run_decayed(state, a, b, decay, **options):
    for frame in zip(a, b, strict=True):
        state = state.forget(decay).update(*frame, **options)
    return state


@each_backend
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.2])
def test_forgetting_is_a_shift_of_logits(backend, decay):
    a, b = video(8)
    state = run_decayed(start(), a, b, decay, backend=backend)
    check(state.read(), whole(a, aged(b, decay)), torch.float64)
    if decay < 1:
        assert relative_rms(state.read(), whole(a, b)) > 1e-3


def test_a_peak_of_long_ago_does_not_hide_the_frames_after_it():
    """In float32, e^-104 is 0: what is not seen beside the peak must not be lost for good."""
    a, b = video(240, torch.float32, lengths=(7,))
    b[0] += 150
    state = start(torch.float32)
    for i, frame in enumerate(zip(a, b, strict=True)):
        state = state.forget(0.5).update(*frame)
        if i in (100, 239):  # the peak outweighs all frames; it weighs nothing
            check(state.read(), whole(a[: i + 1], aged(b[: i + 1], 0.5)), torch.float32)


@pytest.mark.parametrize("decay", [1e-30, 1e-44, 5e-324])
def test_what_is_as_good_as_forgotten_leaves_the_newest_frame(decay):
    a, b = video(3, torch.float32)
    state = run_decayed(start(torch.float32), a, b, decay)
    check(state.read(), whole(a[-1:], b[-1:]), torch.float32)
    check(state.forget(decay).read(), whole(a[-1:], b[-1:]), torch.float32)


def gradients(g, *frames):
    weights = torch.linspace(-1, 1, g.numel(), dtype=g.dtype, device=g.device).view(g.shape)
    return torch.autograd.grad((weights * g).sum(), [x for f in frames for x in f])


@each_backend
@pytest.mark.parametrize("kind", ["all", "masked", "window", "decay"])
def test_gradients_are_those_of_all_frames_at_once(backend, kind):
    a, b = video(6)
    a, b = ([x.requires_grad_() for x in frames] for frames in (a, b))
    masks = [torch.rand(2, x.shape[2], device=DEVICE) > 0.4 for x in a]
    masks[1][:] = False
    options = {"logit_scale": 0.7, "backend": backend}
    if kind == "masked":
        state = start()
        for x, y, mask in zip(a, b, masks, strict=True):
            state = state.update(x, y, mask=mask, **options)
        expected = whole(a, b, masks, logit_scale=0.7)
    elif kind == "window":
        state = run(Window.init(4, start()), a, b, **options)
        a, b = a[2:], b[2:]
        expected = whole(a, b, logit_scale=0.7)
    elif kind == "decay":
        state = run_decayed(start(), a, b, 0.6, **options)
        expected = whole(a, [y / 0.7 for y in aged([0.7 * y for y in b], 0.6)], logit_scale=0.7)
    else:
        state = run(start(), a, b, **options)
        expected = whole(a, b, logit_scale=0.7)
    right = gradients(expected, a, b)
    for actual, gradient in zip(gradients(state.read(), a, b), right, strict=True):
        check(actual, gradient, torch.float64)


@pytest.mark.parametrize("window", [None, 3])
def test_detach_ends_gradients(window):
    a, b = ([x.requires_grad_() for x in frames] for frames in video(4))
    state = start() if window is None else Window.init(window, start())
    state = run(run(state, a[:2], b[:2]).detach(), a[2:], b[2:])
    before = torch.autograd.grad(state.read().sum(), [*a[:2], *b[:2], a[3]], allow_unused=True)
    assert before[:4] == (None,) * 4
    assert before[4].any()


@pytest.mark.parametrize("window", [None, 3])
def test_a_state_can_be_pickled_and_moved(window):
    a, b = video(5)
    state = start() if window is None else Window.init(window, start())
    state = run(state, a, b)
    again = pickle.loads(pickle.dumps(state))
    assert torch.equal(again.read(), state.read())
    assert torch.equal(again.update(a[0], b[0]).read(), state.update(a[0], b[0]).read())
    assert state.to("meta").read().device.type == "meta"
    assert torch.equal(state.to(DEVICE).read(), state.read())


def test_autocast():
    a, b = video(3, torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        g = run(start(torch.float32), a, b).read()
    assert g.dtype == torch.float32
    half = [[x.bfloat16() for x in frames] for frames in (a, b)]
    assert torch.equal(g, run(start(torch.float32), *half).read())


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled(backend):
    torch.compiler.reset()
    a, b = video(4, torch.float32, lengths=(7,))

    def update(state, a, b):
        return state.forget(0.9).update(a, b, backend=backend)

    state, expected = start(torch.float32), start(torch.float32)
    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for frame in zip(a, b, strict=True):
        state, expected = compiled(state, *frame), update(expected, *frame)
    check(state.read(), expected.read().double(), torch.float32)


def clip(frames=5, shape=(3, 4), channels=6, dtype=torch.float64):
    return torch.randn(2, channels, frames, *shape, dtype=dtype, device=DEVICE)


LAYERS = [
    {"residual": True},
    {"c_m": 4, "c_n": 8, "heads": 2, "logit_scale": 1.7, "logit_scale_v": 0.8, "scale": 0.5},
    {"c_m": 4, "reconstruct": False, "softmax_v": False, "bias": False, "order": "XZ"},
]


@pytest.mark.parametrize("options", LAYERS, ids=["residual", "heads", "core"])
@pytest.mark.parametrize("masked", [False, True])
def test_two_passes_are_the_layer_on_the_clip(options, masked):
    layer = DoubleAttention(6, **options, dtype=torch.float64, device=DEVICE)
    x = clip()
    mask = torch.rand(2, 5, 3, 4, device=DEVICE) > 0.3 if masked else None
    expected = layer(x, mask)
    stream = StreamingDoubleAttention(layer)
    for t in range(5):
        stream.update(x[:, :, t], None if mask is None else mask[:, t])
    found = torch.stack([stream.distribute(x[:, :, t]) for t in range(5)], 2)
    check(found, expected, torch.float64)
    stream.reset()
    stream.update(x[:, :, :3], None if mask is None else mask[:, :3])  # several frames at once
    stream.update(x[:, :, 3:], None if mask is None else mask[:, 3:])
    check(stream.distribute(x), expected, torch.float64)


@pytest.mark.parametrize("window", [None, 2])
def test_causal_is_the_layer_on_the_frames_so_far(window):
    layer = DoubleAttention(6, residual=True, dtype=torch.float64, device=DEVICE)
    stream, x = StreamingDoubleAttention(layer, window=window), clip()
    for t in range(5):
        first = 0 if window is None else max(0, t + 1 - window)
        check(stream(x[:, :, t]), layer(x[:, :, first : t + 1])[:, :, -1], torch.float64)
    later = layer(x)[:, :, 0]  # with what comes after
    stream.reset()
    assert relative_rms(stream(x[:, :, 0]), later) > 1e-3


def test_decay_of_a_stream():
    layer = DoubleAttention(6, dtype=torch.float64, device=DEVICE)
    stream, x = StreamingDoubleAttention(layer, decay=0.5), clip()
    projected = []
    for t in range(5):
        y = stream(x[:, :, t])
        projected.append([conv(x[:, :, t]).flatten(2) for conv in (layer.convA, layer.convB)])
    a, b = zip(*projected, strict=True)
    g = da_triton.gather(torch.cat(a, -1), torch.cat(aged(b, 0.5), -1))
    last = layer.conv_reconstruct(da_triton.distribute(g, layer.convV(x[:, :, -1])))
    check(y, last, torch.float64)


def test_parameters_learn_from_all_frames():
    layer = DoubleAttention(6, residual=True, dtype=torch.float64, device=DEVICE)
    x, stream = clip(), StreamingDoubleAttention(layer)
    frames = [x[:, :, t] for t in range(5)]
    for frame in frames:
        stream.update(frame)
    loss = sum(stream.distribute(frame).square().sum() for frame in frames)
    found = torch.autograd.grad(loss, list(layer.parameters()))
    right = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for (name, _), y, expected in zip(layer.named_parameters(), found, right, strict=True):
        if name == "convB.bias":  # exactly zero, found here by a sum of roundings
            assert y.abs().max() < EXACT * 1e3
        else:
            assert relative_rms(y, expected) < 1e-12, name
    stream.detach()
    y = stream(frames[0]).sum()
    assert torch.autograd.grad(y, layer.convA.weight)[0].any()


def test_modules_of_the_layer_are_called():
    layer = DoubleAttention(6, device=DEVICE)
    calls = []
    for conv in layer.children():
        conv.register_forward_hook(lambda module, *_: calls.append(module))
    StreamingDoubleAttention(layer)(clip(dtype=torch.float32)[:, :, 0])
    assert calls == list(layer.children())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stream_under_autocast(dtype):
    layer = DoubleAttention(6, residual=True, device=DEVICE)
    x, stream = clip(dtype=torch.float32), StreamingDoubleAttention(layer)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype):
        y = torch.stack([stream(x[:, :, t]) for t in range(5)], 2)
        expected = layer(x)[:, :, -1]
    assert y.dtype == expected.dtype == torch.float32
    assert stream.state.read().dtype == torch.float32
    check(y[:, :, -1], expected, dtype)
