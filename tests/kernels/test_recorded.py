"""Calls whose launches are recorded once and repeated: the same bits, and what must be seen."""

import contextlib
import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs

from da_triton import DoubleAttention
from da_triton.cores import triton_block
from da_triton.kernels import block, guard, launch, recorded
from da_triton.kernels.project_gather import gather_from_a_kernel
from da_triton.kernels.recorded import Recorded
from da_triton.planner import Route
from support import repeatable
from support.numerics import DEVICE

FIRST = recorded.FIRST
ROUTES = {
    "fused": Route("XH", "fused", "fused", "fused", "XH", 64),
    "one sample at a time": Route("XH", "fused", "fused", "fused", "XH", 1),
    "fused from A": Route("AH", "fused", "fused", "split", "AH", 64),
    "products around the core": Route("AZ", "split", "split", "split", "AZ", 64),
    "products, from X through H": Route("XH", "split", "split", "split", "XH", 64),
    "mixed": Route("XZ", "fused", "split", "split", "XZ", 64),
}


@pytest.fixture(autouse=True)
def _kernels():
    with repeatable.kernels():
        yield


@contextlib.contextmanager
def launchers():
    """Names of the launchers' passes that run inside."""
    ran = []

    def noted(function):
        def call(*args):
            ran.append(function.__name__)
            return function(*args)

        return call

    with (
        mock.patch.object(block, "forward", noted(block.forward)),
        mock.patch.object(block, "backward", noted(block.backward)),
    ):
        yield ran


def make(c=16, m=8, n=8, **options):
    return DoubleAttention(c, m, n, **{"residual": True, **options}, backend="triton").to(DEVICE)


def maps(*shape, last=False, **how):
    x = torch.randn(shape or (2, 16, 4, 5), device=DEVICE, **how)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def step(layer, x, upstream, mask=None):
    """The result, and gradients of x and the weights that are trained."""
    x = x.detach().requires_grad_()
    y = layer(x, mask)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    return y.detach(), *torch.autograd.grad(y, wanted, upstream)


def same(found, expected):
    assert len(found) == len(expected)
    for y, z in zip(found, expected, strict=True):
        assert (y.shape, y.stride(), y.dtype) == (z.shape, z.stride(), z.dtype)
        assert torch.equal(y, z)


def check(layer, given):
    """Calls after the second run no launcher and give the bits that a first call gives."""
    expected = []
    for arguments in given:
        launch.forget()
        expected.append(step(layer, *arguments))
    launch.forget()
    for arguments in given[:2]:
        step(layer, *arguments)
    with launchers() as ran:
        for arguments, wanted in zip(given, expected, strict=True):
            same(step(layer, *arguments), wanted)
    assert not ran


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_repeated_step_gives_the_bits_of_a_first_one(route, last, poisoned):
    layer = make(recompute=last)
    with mock.patch.object(triton_block, "_route", return_value=ROUTES[route]):
        check(layer, [(maps(last=last), maps(last=last)) for _ in range(3)])


@pytest.mark.parametrize(
    ("options", "shape"),
    [({"heads": 2}, (2, 16, 4, 5)), ({"reconstruct": False, "m": 16}, (2, 16, 7)),
     ({"softmax_v": False, "bias": False}, (1, 16, 2, 3, 2)), ({"residual": False}, (3, 16, 8))],
)  # fmt: skip
def test_options_and_masks(options, shape, poisoned):
    layer = make(**options)
    given = []
    for _ in range(3):
        mask = torch.rand(shape[0], *shape[2:], device=DEVICE) > 0.3
        given.append((maps(*shape), maps(*shape), mask))
    check(layer, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    layer = make(order="AH").to(dtype)
    check(layer, [(maps(dtype=dtype), maps(dtype=dtype)) for _ in range(3)])


def test_a_call_without_gradients_is_repeated_apart(poisoned):
    layer, given = make(), [maps() for _ in range(4)]
    expected = [step(layer, x, x)[0] for x in given]
    with torch.no_grad():
        for x in given[:2]:
            layer(x)
        with launchers() as ran:
            same([layer(x) for x in given], expected)
        assert not ran
    with torch.inference_mode():
        same([layer(x) for x in given], expected)


def test_what_needs_a_gradient_is_seen():
    layer = make()
    x, upstream = maps(), maps()
    for frozen in ([], ["convA"], ["convB", "convV"], ["convA", "convB", "convV"]):
        for name, child in layer.named_children():
            child.requires_grad_(name not in frozen)
        check(layer, [(maps(), maps()) for _ in range(3)])
    layer.requires_grad_(True)
    full = step(layer, x, upstream)
    for wanted in (["convV.weight"], ["convA.bias", "convB.bias"]):
        for _ in range(4):
            given = dict(layer.named_parameters())
            names = list(given)
            found = torch.autograd.grad(layer(x), [given[name] for name in wanted], upstream)
            same(found, [full[2 + names.index(name)] for name in wanted])


def unaligned(x):
    return torch.empty(x.numel() + 1, device=DEVICE)[1:].view_as(x).copy_(x)


@pytest.mark.parametrize(
    "form",
    [lambda g: g[:1, :1, :1, :1].expand_as(g), torch._neg_view, unaligned,
     lambda g: g.contiguous(memory_format=torch.channels_last), lambda g: g[:, :, :, :2]],
    ids=["expanded", "negated", "not aligned", "channels last", "with gaps"],
)  # fmt: skip
def test_gradients_come_in_any_form(form):
    layer = make()
    for _ in range(3):
        grad = form(maps(2, 16, 4, 4))
        x = maps(*grad.shape)
        found, expected = step(layer, x, grad), step(layer, x, grad.clone().contiguous())
        for y, z in zip(found, expected, strict=True):
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def test_a_gradient_may_be_the_input():
    """Where it is in the recorded call, the next attempt is the fourth call."""
    layer, given = make(), [maps() for _ in range(3)]
    check(layer, [(given[0], given[1]), (given[1], given[2]), (given[2], given[2])])
    x = given[0]
    expected = step(layer, x, x)
    launch.forget()
    for number in range(1, 6):
        with launchers() as ran:
            same(step(layer, x, x if number < 3 else x.clone()), expected)
        assert ("backward" in ran) == (number < 5)


def test_hooks_on_saved_tensors_may_change_their_strides():
    layer = make()
    given = [(maps(last=True), maps(last=True)) for _ in range(3)]
    expected = [step(layer, *arguments) for arguments in given]
    contiguous = torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    )
    for arguments, wanted in zip(given, expected, strict=True):
        with contiguous:
            found = step(layer, *arguments)
        for y, z in zip(found, wanted, strict=True):
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def warm(layer, x):
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    return x


def runs_launchers(layer, x):
    with torch.no_grad(), launchers() as ran:
        layer(x)
    return bool(ran)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [(knobs.runtime, "launch_enter_hook", print), (knobs.runtime, "launch_exit_hook", print),
     (knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "fpsan"),
     (gather_from_a_kernel, "pre_run_hooks", [lambda *_, **__: None])],
)  # fmt: skip
def test_what_observes_launches_sees_those_of_the_launchers(monkeypatch, owner, name, value):
    monkeypatch.setattr(triton_block, "_route", lambda *_: ROUTES["fused from A"])
    layer, x = make(), maps()
    warm(layer, x)
    assert not runs_launchers(layer, x)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, value)
        assert runs_launchers(layer, x)
    assert not runs_launchers(layer, x)


def test_trials_and_examinations_see_launches():
    layer, x = make(), maps()
    warm(layer, x)
    with launch.trial(2, []):
        assert runs_launchers(layer, x)
    with guard.examine(1) as verdicts:
        assert runs_launchers(layer, x)
    assert verdicts
    assert not runs_launchers(layer, x)


def test_the_tf32_switch_is_read_at_every_call():
    layer, x = make(), maps()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        warm(layer, x)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert runs_launchers(layer, x)
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert not runs_launchers(layer, x)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_addresses_that_16_does_not_divide_go_the_long_way():
    layer, x = make(), maps()
    odd = unaligned(x)
    warm(layer, odd)
    assert runs_launchers(layer, odd)
    with torch.no_grad():
        expected = layer(x)
    launch.forget()
    warm(layer, x)
    assert not runs_launchers(layer, x)
    assert runs_launchers(layer, odd)
    with torch.no_grad():
        assert torch.equal(layer(odd), expected)


def test_tensors_that_overlap_are_not_recorded():
    """An address would not say which of them is meant; elsewhere they may be two."""
    layer, x = make(), maps()
    own = layer.convB.weight
    layer.convB.weight = layer.convV.weight
    warm(layer, x)
    assert runs_launchers(layer, x)
    layer.convB.weight = own
    launch.forget()
    warm(layer, x)
    layer.convB.weight = layer.convV.weight
    found = layer(x).detach()
    assert not runs_launchers(layer, x)
    launch.forget()
    assert torch.equal(found, layer(x))


def test_views_of_one_buffer_may_lie_elsewhere_later():
    layer, x = make(), maps()
    flat = torch.cat([layer.convB.weight.flatten(), layer.convV.weight.flatten()]).detach()
    halves = flat.view(2, 8, 16, 1, 1)
    twin = make()
    twin.load_state_dict(layer.state_dict())
    twin.convB.weight, twin.convV.weight = map(torch.nn.Parameter, halves)
    warm(twin, x)
    assert not runs_launchers(twin, x)
    with torch.no_grad():
        assert torch.equal(layer(x), twin(x))


def test_nothing_is_kept_alive():
    layer, x, upstream = make(), maps(), maps()
    kept = []
    for _ in range(4):
        found = step(layer, x, upstream)
        kept += [weakref.ref(t) for t in found]
    kept += [weakref.ref(t) for t in (x, upstream, *layer.parameters())]
    del layer, x, upstream, found
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_threads_repeat_one_recording():
    layer, given = make(), [maps() for _ in range(4)] * 4

    def run(x):
        with torch.no_grad():
            return layer(x)

    expected = [run(x) for x in given]
    launch.forget()
    with ThreadPoolExecutor(4) as pool:
        same(list(pool.map(run, given)), expected)
    assert not runs_launchers(layer, given[0])


def test_forms_of_gradients_are_bounded(monkeypatch):
    monkeypatch.setattr(triton_block, "MOST_RECORDED", 2)
    calls = []
    original = triton_block.Call.plan
    monkeypatch.setattr(
        triton_block.Call, "plan", lambda self, *a: calls.append(self) or original(self, *a)
    )
    layer, x = make(), maps()
    upstream = [maps(), maps(last=True), torch.ones((), device=DEVICE).expand(x.shape)]
    for grad in upstream * 2:
        step(layer, x, grad)
    (call,) = calls
    assert len(call.recorded_gradients) == 2


# --- functions of ATen alone ----------------------------------------------------------------------


def repeats(function, *given):
    """Whether the third call of a function repeats the second, with the right results."""
    ran = []

    def counted(*tensors):
        ran.append(1)
        return function(*tensors)

    ready = Recorded(counted)
    for _ in range(2):
        ready(*given)
    again = [None if t is None else t + 1 for t in given]
    expected = function(*[t if t is None else t.clone() for t in again])
    found = ready(*again)
    for y, z in zip(found, expected, strict=True):
        assert (y is None) == (z is None)
        if y is not None:
            assert torch.equal(y, z)
            assert y.stride() == z.stride()
    return len(ran) == 2


def test_a_few_calls_are_not_worth_a_recording(monkeypatch):
    monkeypatch.setattr(recorded, "FIRST", FIRST)
    ran = []
    ready = Recorded(lambda x: ran.append(1) or (x @ x,))
    for _ in range(FIRST + 3):
        ready(square())
    assert len(ran) == FIRST == 8


def square(n=4):
    return torch.randn(n, n, device=DEVICE)


def in_place(x, y):
    made = torch.empty_like(x)
    torch.mm(x, y, out=made)
    made[:, 1:].mul_(2)
    return made.t(), None, made[1:, ::2].sum(1), x


def through_views(x, y):
    first, second = (x @ y).relu().split(2)
    first = first.unflatten(1, (2, 2)).transpose(0, 1).reshape(2, 4)
    return first, second, second


@pytest.mark.parametrize("function", [in_place, through_views])
def test_operations_are_repeated(function):
    assert repeats(function, square(), square())


def test_absent_tensors():
    assert repeats(lambda x, none, y: (x @ y, none), square(), None, square())


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * x.sum().item(),), lambda x: (torch.rand_like(x),), lambda x: (x[x > 0],),
     lambda x: (torch.cat([x, x]),), lambda x: tuple(x.topk(2)), lambda x: (x + CONSTANT,),
     lambda x: (x.view(torch.int32) + 1,), lambda x: (x,),
     lambda x: (x.clone().resize_(2, 8),),
     lambda x: (x.new_empty(0).set_(CONSTANT.untyped_storage()),),
     lambda x: (x.clone().bernoulli_(0.5, generator=torch.Generator(DEVICE)),)],
    ids=["a value on the host", "random numbers", "a shape from values", "a list of tensors",
         "two results", "a tensor from elsewhere", "bits", "nothing", "another shape in place",
         "a storage", "a generator"],
)  # fmt: skip
def test_what_is_not_known_to_be_repeatable_is_not_repeated(function):
    calls = []
    ready = Recorded(lambda x: calls.append(1) or function(x))
    for _ in range(5):
        ready(square())
    assert len(calls) == 5
    assert ready.program is None


CONSTANT = torch.ones(4, device=DEVICE)


@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 2000)).map(
            lambda t: (min(t[:2]), max(t[:2]), t[2])
        ),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_lives_that_overlap_share_no_bytes(lives):
    lives = dict(enumerate(lives))
    starts, size = recorded._shared(lives)
    for (n, (a, b, taken)), (m, (c, d, other)) in itertools.combinations(lives.items(), 2):
        if a <= d and c <= b:
            assert starts[n] + taken <= starts[m] or starts[m] + other <= starts[n]
    assert all(start % recorded.UNIT == 0 for start in starts.values())
    assert size == max(starts[n] + taken for n, (_, _, taken) in lives.items())


def test_lives_that_are_apart_share_bytes():
    starts, size = recorded._shared({1: (0, 1, 512), 2: (2, 3, 500), 3: (1, 2, 100)})
    assert starts == {1: 0, 2: 0, 3: 512}
    assert size == 612


def test_temporaries_of_kernels_are_one_allocation(monkeypatch):
    monkeypatch.setattr(triton_block, "_route", lambda *_: ROUTES["fused"])
    layer, x = make(), maps()
    warm(layer, x)
    allocate = mock.Mock(side_effect=torch.empty_strided)
    monkeypatch.setattr(torch, "empty_strided", allocate)
    warm(layer, x)
    assert allocate.call_count == 3 * 4  # the result, lse, G, and what the launches share
