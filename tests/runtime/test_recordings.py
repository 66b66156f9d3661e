"""Functions of ATen alone, recorded and repeated: what is repeated, what is not, and memory."""

import itertools
import random

import pytest
import torch

from da_triton.runtime import recorded
from da_triton.runtime.recorded import Recorded
from support import repeatable
from support.numerics import DEVICE

FIRST = recorded.FIRST


@pytest.fixture(autouse=True)
def _kernels():
    with repeatable.kernels():
        yield


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


def test_tensors_are_dropped_after_their_last_use():
    ready = Recorded(lambda x: (((x @ x) @ x).relu() @ x,))
    for _ in range(2):
        ready(square())
    assert [type(step) for step in ready.program.steps] == [
        recorded._Operation, recorded._Operation, recorded._Drop, recorded._Operation,
        recorded._Drop, recorded._Operation, recorded._Drop,
    ]  # fmt: skip
    assert [step.numbers for step in ready.program.steps if type(step) is recorded._Drop] == [
        [1], [2], [3],
    ]  # fmt: skip


def test_views_are_made_where_they_must_be():
    def function(x, y):
        made = torch.empty(2, 2, 4, device=DEVICE)
        torch.mm(x, y, out=made.view(4, 4))
        return made, torch.add(made, other=y.view(2, 2, 4)), x[1:]

    ready = Recorded(function)
    for _ in range(2):
        ready(square(), square())
    whole, joined, part = ready.program.results
    assert (type(whole), type(joined), type(part)) == (int, int, recorded._View)
    product, addition = (s for s in ready.program.steps if type(s) is recorded._Operation)
    assert [x.shape for x in product.args] == [None, None]
    assert product.kwargs["out"].shape == (4, 4)
    assert addition.args[0].shape is None


def test_absent_tensors():
    assert repeats(lambda x, none, y: (x @ y, none), square(), None, square())


@pytest.mark.parametrize(
    "function",
    [lambda x: (x * x.sum().item(),), lambda x: (torch.rand_like(x),), lambda x: (x[x > 0],),
     lambda x: (torch.cat([x, x]),), lambda x: tuple(x.topk(2)), lambda x: (x + CONSTANT,),
     lambda x: (x.view(torch.int32) + 1,), lambda x: (x,),
     lambda x: (x.clone().resize_(2, 8),),
     lambda x: (x.new_empty(0).set_(CONSTANT.untyped_storage()),),
     lambda x: (tail(x),), lambda x: (x.nonzero(),),
     lambda x: (torch.empty(4, 4, device="meta"), x @ x),
     lambda x: (x.clone().bernoulli_(0.5, generator=torch.Generator(DEVICE)),)],
    ids=["a value on the host", "random numbers", "a shape from values", "a list of tensors",
         "two results", "a tensor from elsewhere", "bits", "nothing", "another shape in place",
         "a storage", "a result inside a storage", "as many rows as numbers", "another device",
         "a generator"],
)  # fmt: skip
def test_what_is_not_known_to_be_repeatable_is_not_repeated(function):
    calls = []
    ready = Recorded(lambda x: calls.append(1) or function(x))
    for _ in range(5):
        ready(square())
    assert len(calls) == 5
    assert ready.program is None


@torch.library.custom_op("da_triton_tests::tail", mutates_args=())
def tail(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, 2 * x])[len(x) :]


CONSTANT = torch.ones(4, device=DEVICE)


def test_lives_that_overlap_share_no_bytes():
    numbers = random.Random(0)
    for _ in range(200):
        lives = {}
        for number in range(numbers.randint(1, 12)):
            first, last = sorted(numbers.choices(range(7), k=2))
            lives[number] = first, last, numbers.randint(1, 2000)
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
