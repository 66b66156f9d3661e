"""Calls recorded once and repeated: the same bits, and changes that must be noticed."""

import contextlib
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from triton import knobs

from da_triton import DoubleAttention
from da_triton.kernels.project_gather import gather_from_a_kernel
from da_triton.ops.triton import block as triton_block
from da_triton.ops.triton import routes
from da_triton.planning.costs import AH, AZ, XH, XZ
from da_triton.planning.planner import Route
from da_triton.runtime import guard, launch, recorded
from support import repeatable
from support.numerics import DEVICE

ROUTES = {
    "fused": Route(XH, "fused", "fused", "fused", XH, 64),
    "one sample at a time": Route(XH, "fused", "fused", "fused", XH, 1),
    "fused from A": Route(AH, "fused", "fused", "unfused", AH, 64),
    "products around the core": Route(AZ, "unfused", "unfused", "unfused", AZ, 64),
    "products of copies": Route(AZ, "unfused", "unfused", "unfused", AZ, 64, True, True),
    "products, through H": Route(AH, "unfused", "unfused", "unfused", XH, 64),
    "mixed": Route(XZ, "fused", "unfused", "unfused", XZ, 64),
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
        mock.patch.object(routes, "forward", noted(routes.forward)),
        mock.patch.object(routes, "backward", noted(routes.backward)),
    ):
        yield ran


def make(c=16, m=8, n=8, **options):
    return DoubleAttention(c, m, n, **{"residual": True, **options}, backend="triton").to(DEVICE)


def activations(*shape, last=False, **how):
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
        check(layer, [(activations(last=last), activations(last=last)) for _ in range(3)])


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
        given.append((activations(*shape), activations(*shape), mask))
    check(layer, given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    layer = make(order="AH").to(dtype)
    check(layer, [(activations(dtype=dtype), activations(dtype=dtype)) for _ in range(3)])


def test_a_call_without_gradients_is_repeated_apart(poisoned):
    layer, given = make(), [activations() for _ in range(4)]
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
    x, upstream = activations(), activations()
    for frozen in ([], ["convA"], ["convB", "convV"], ["convA", "convB", "convV"]):
        for name, child in layer.named_children():
            child.requires_grad_(name not in frozen)
        check(layer, [(activations(), activations()) for _ in range(3)])
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
        grad = form(activations(2, 16, 4, 4))
        x = activations(*grad.shape)
        found, expected = step(layer, x, grad), step(layer, x, grad.clone().contiguous())
        for y, z in zip(found, expected, strict=True):
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def test_a_gradient_may_be_the_input():
    """Where it is in the recorded call, the next attempt is the fourth call."""
    layer, given = make(), [activations() for _ in range(3)]
    check(layer, [(given[0], given[1]), (given[1], given[2]), (given[2], given[2])])
    x = given[0]
    expected = step(layer, x, x)
    launch.forget()
    for number in range(1, 6):
        with launchers() as ran:
            same(step(layer, x, x if number < 3 else x.clone()), expected)
        assert ("backward" in ran) == (number < 5)


def through_default_hooks(layer, x, upstream):
    """Saved tensors come back contiguous."""
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    ):
        return step(layer, x, upstream)


def through_own_hooks(layer, x, upstream):
    """x alone comes back contiguous."""
    x = x.detach().requires_grad_()
    y = layer(x)
    saved = y.grad_fn._raw_saved_tensors[0]
    saved.register_hooks(lambda t: t, lambda t: t.contiguous())
    return y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], upstream)


def with_other_data(layer, x, upstream):
    """x and a weight get other strides between the passes."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    x.data = x.data.contiguous()
    layer.convB.weight.data = layer.convB.weight.data.transpose(0, 1).clone().transpose(0, 1)
    found = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    layer.convB.weight.data = layer.convB.weight.data.contiguous()
    return y.detach(), *found


@pytest.mark.parametrize("change", [through_default_hooks, through_own_hooks, with_other_data])
def test_what_was_saved_may_have_other_strides(change):
    layer = make()
    given = [(activations(last=True), activations(last=True)) for _ in range(3)]
    expected = [step(layer, *arguments) for arguments in given]  # recorded, too
    for arguments, wanted in zip(given, expected, strict=True):
        for y, z in zip(change(layer, *arguments), wanted, strict=True):
            torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def test_a_weight_that_lost_rows_raises():
    layer, x = make(), activations().requires_grad_()
    for _ in range(3):
        step(layer, x, x.detach().clone())
    y = layer(x)
    layer.convB.weight.data = layer.convB.weight.data[:4].clone()
    with pytest.raises(RuntimeError, match="shape"):
        y.sum().backward()


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
    layer, x = make(), activations()
    warm(layer, x)
    assert not runs_launchers(layer, x)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, value)
        assert runs_launchers(layer, x)
    assert not runs_launchers(layer, x)


def test_trials_and_examinations_see_launches():
    layer, x = make(), activations()
    warm(layer, x)
    with launch.trial(2, []):
        assert runs_launchers(layer, x)
    with guard.examine(1) as verdicts:
        assert runs_launchers(layer, x)
    assert verdicts
    assert not runs_launchers(layer, x)


def test_a_counter_around_the_backward_pass_sees_its_operator():
    layer, x = make(), activations().requires_grad_()
    for _ in range(3):
        step(layer, x, activations())
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() > 0


def test_a_subclass_as_gradient_is_not_read_by_its_address():
    class Subclass(torch.Tensor):
        pass

    layer, x = make(), activations()
    for _ in range(3):
        expected = step(layer, x, torch.ones_like(x))
    with launchers() as ran:
        same(step(layer, x, torch.ones_like(x).as_subclass(Subclass)), expected)
    assert "backward" in ran


class Mode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_a_default_device_does_not_count_as_a_mode():
    layer, x = make(), activations()
    torch.set_default_device(DEVICE)
    try:
        assert not runs_launchers(layer, warm(layer, x))
        with Mode():
            assert runs_launchers(layer, x)
    finally:
        torch.set_default_device(None)


def test_where_another_device_is_current_each_launch_is_recorded_once(monkeypatch):
    current = []

    @contextlib.contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    layer, x = make(), activations()
    monkeypatch.setattr(triton_block, "_route", lambda *_: ROUTES["fused"])
    monkeypatch.setattr(launch, "stream_of", lambda _: repeatable.STREAM if current else None)
    monkeypatch.setattr(torch.cuda, "device", device)
    runs = []
    original = recorded._Launch.__call__
    monkeypatch.setattr(
        recorded._Launch, "__call__", lambda *given: runs.append(1) or original(*given)
    )
    warm(layer, x)
    assert len(runs) == 3
    assert not current


def test_what_a_capture_leaves_unproved_is_not_recorded(monkeypatch):
    layer, x = make(), activations()
    monkeypatch.setattr(guard, "watched", lambda: True)
    monkeypatch.setattr(guard, "_concerns", lambda args: True)
    monkeypatch.setattr(guard, "_verdict", lambda *_: None)
    guard._known.clear()
    warm(layer, x)
    assert runs_launchers(layer, x)


def test_the_tf32_switch_is_read_at_every_call():
    layer, x = make(), activations()
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
    layer, x = make(), activations()
    odd = unaligned(x)
    warm(layer, odd)
    assert runs_launchers(layer, odd)
    assert runs_launchers(layer, x), "nothing was recorded with odd addresses"
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
    layer, x = make(), activations()
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
    layer, x = make(), activations()
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
    layer, x, upstream = make(), activations(), activations()
    kept = []
    for _ in range(4):
        found = step(layer, x, upstream)
        kept += [weakref.ref(t) for t in found]
    kept += [weakref.ref(t) for t in (x, upstream, *layer.parameters())]
    del layer, x, upstream, found
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_threads_repeat_one_recording():
    layer, given = make(), [activations() for _ in range(4)] * 4

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
    layer, x = make(), activations()
    expanded = torch.ones((), device=DEVICE).expand(x.shape)
    for grad in [activations(), activations(last=True), expanded] * 2:
        step(layer, x, grad)
    (call,) = calls
    assert len(call.recorded_gradients) == 2


def test_temporaries_of_kernels_are_one_allocation(monkeypatch):
    monkeypatch.setattr(triton_block, "_route", lambda *_: ROUTES["fused"])
    layer, x = make(), activations()
    warm(layer, x)
    allocate = mock.Mock(side_effect=torch.empty_strided)
    monkeypatch.setattr(torch, "empty_strided", allocate)
    warm(layer, x)
    assert allocate.call_count == 3 * 4  # the result, lse, G, and what the launches share
