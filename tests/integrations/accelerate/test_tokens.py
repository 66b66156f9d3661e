"""accelerate() on attention layers of tokens (N, L, C), with linear layers."""

import copy

import pytest
import torch
from torch import nn

from da_triton.integrations import accelerate, restore
from da_triton.integrations.accelerate.search import Accelerated
from da_triton.integrations.accelerate.verify import Reference
from support.numerics import relative_rms

X = (2, 14, 12)
THREE = ("to_q", "to_k", "to_v")


class Tokens(nn.Module):
    """Linear attention; subclasses change a step."""

    def __init__(self, names=THREE, last="to_out", dropout=None, **steps):
        super().__init__()
        self.names, self.last, self.steps = names, last, steps
        setattr(self, "num_heads" if "proj" in (last, *names) else "heads", 2)
        for name in names:
            width = 24 if len(names) == 1 else 8
            setattr(self, name, nn.Linear(12, width, bias=steps.get("bias", True)))
        if steps.get("norm"):
            self.norm = nn.LayerNorm(12)
            nn.init.normal_(self.norm.weight)
        if last is not None:
            setattr(self, last, steps.get("out") or nn.Linear(8, 12))
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)

    def core(self, q, k, v):
        """q, k and v are (N, heads, L, channels)."""
        q = q.softmax(-1) if self.steps.get("softmax", True) else q
        q = q * 4**-0.5 if self.steps.get("scaled", True) else q
        return q @ (k.softmax(-2).mT @ v)

    def forward(self, x, mask=None):
        y = self.norm(x) if self.steps.get("norm") else x
        projected = [getattr(self, name)(y) for name in self.names]
        projected = projected if len(projected) == 3 else projected[0].chunk(3, -1)
        q, k, v = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in projected)
        if mask is not None:
            k = k.masked_fill(~mask[:, None, :, None], -torch.inf)
        y = self.core(q, k, v).transpose(1, 2).flatten(2)
        y = y if self.last is None else getattr(self, self.last)(y)
        y = self.dropout(y) if hasattr(self, "dropout") else y
        return x + y if self.steps.get("residual") else y


SAME = {
    "apart": Tokens,
    "without_bias": lambda: Tokens(bias=False),
    "together": lambda: Tokens(("to_qkv",)),
    "qkv_proj": lambda: Tokens(("qkv",), "proj"),
    "query_key_value": lambda: Tokens(("query", "key", "value"), None),
    "query_proj": lambda: Tokens(("query", "key", "value"), "proj"),
    "raw_queries": lambda: Tokens(softmax=False),
    "unscaled": lambda: Tokens(scaled=False),
    "raw_unscaled_together": lambda: Tokens(("to_qkv",), softmax=False, scaled=False),
    "norm": lambda: Tokens(norm=True),
    "residual": lambda: Tokens(residual=True),
    "norm_residual": lambda: Tokens(("to_qkv",), norm=True, residual=True),
    "norm_unused": lambda: unused(Tokens(), norm=nn.LayerNorm(12)),
    "sequential": lambda: Tokens(out=nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.3))),
    "dropout": lambda: Tokens(dropout=0.3),
    "dropout_of_zero": lambda: Tokens(dropout=0.0),
    "dropout_unused": lambda: unused(Tokens(), proj_drop=nn.Dropout(0.3)),
    "identity": lambda: unused(Tokens(), norm=nn.Identity()),
}


def unused(layer, **children):
    for name, child in children.items():
        setattr(layer, name, child)
    return layer


class Block(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.second = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = layer
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    with torch.random.fork_rng():
        torch.manual_seed(0)  # dropout alike
        out = model(x)
    out.square().sum().backward()
    used = [p for p in model.parameters() if p.grad is not None]
    return [out.detach(), x.grad, *(p.grad.clone() for p in used)]


@pytest.mark.parametrize("name", SAME)
def test_layer_is_replaced_by_the_same_function(name):
    layer = SAME[name]()
    model = nn.Sequential(nn.Linear(12, 12), layer).double()
    x = torch.randn(X, dtype=torch.float64)
    before, keys = gradients(model, x), list(model.state_dict())
    report = accelerate(model, x)
    assert [f.family for f in report.replaced] == ["linear attention on tokens"]
    assert not report.skipped
    assert report.replaced[0].error < 1e-12
    assert isinstance(layer, Accelerated)
    assert list(model.state_dict()) == keys
    for found, expected in zip(gradients(model, x), before, strict=True):
        assert (found - expected).norm() <= 1e-10 * (1 + expected.norm())
    assert restore(model) == ["1"]
    assert type(layer) is Tokens
    assert torch.equal(gradients(model, x)[0], before[0])


@pytest.mark.parametrize("name", ["apart", "qkv_proj"])
def test_results_are_contiguous_and_on_the_interpreted_kernels(name):
    layer, x = SAME[name](), torch.randn(2, 6, 12)
    expected = layer(x)
    assert len(accelerate(layer, x, backend="triton").replaced) == 1
    assert relative_rms(layer(x), expected) < 1e-5
    assert layer(x).is_contiguous()


def test_a_token_transformer():
    model = nn.Sequential(*(Block(SAME[name]()) for name in ("apart", "together", "qkv_proj")))
    x = torch.randn(X)
    before = gradients(model, x)
    report = accelerate(model, x)
    assert [f.name for f in report.replaced] == ["0.attention", "1.attention", "2.attention"]
    assert not report.skipped
    for found, expected in zip(gradients(model, x), before, strict=True):
        assert (found - expected).norm() <= 1e-4 * (1 + expected.norm())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert len(restore(model)) == 3
    assert torch.equal(model(x), before[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["apart", "raw_unscaled_together", "norm_residual"])
def test_half_precision(name, dtype):
    layer, x = SAME[name]().to(dtype), torch.randn(X).to(dtype)
    expected = layer(x)
    assert len(accelerate(layer, x).replaced) == 1
    found = layer(x)
    restore(layer)
    exact = layer.double()(x.double())
    assert found.dtype == dtype
    floor = {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative_rms(found, exact) < max(floor, 2 * relative_rms(expected, exact))


def test_compiled_exported_and_traced():
    model, x = nn.Sequential(Block(Tokens()), Block(Tokens(("to_qkv",)))), torch.randn(X)
    expected = model(x)
    accelerate(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(x), expected) < 1e-5
    shapes = {"x": {0: torch.export.Dim("n"), 1: torch.export.Dim("length")}, "mask": None}
    program = torch.export.export(model[0].attention, (x, None), dynamic_shapes=shapes)
    longer = torch.randn(3, 20, 12)
    assert relative_rms(program.module()(longer, None), model[0].attention(longer)) < 1e-5
    assert relative_rms(torch.jit.trace(model, x)(x), expected) < 1e-5


def test_groups_of_tokens():
    class Grouped(Tokens):
        def forward(self, x):
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    layer, x = Grouped(), torch.randn(2, 3, 14, 12)
    expected = layer(x)
    (finding,) = accelerate(layer, x).replaced
    assert "frame by frame" in finding.note
    assert relative_rms(layer(x), expected) < 1e-5


def test_a_mask_at_its_default_and_another():
    layer, x = Tokens(), torch.randn(X)
    expected = layer(x)
    assert len(accelerate(layer, x).replaced) == 1
    assert relative_rms(layer(x, mask=None), expected) < 1e-5
    with pytest.raises(TypeError, match="Tokens by a formula without mask"):
        layer(x, torch.ones(2, 14, dtype=torch.bool))


class Quadratic(Tokens):
    def core(self, q, k, v):
        return (q @ k.mT * 4**-0.5).softmax(-1) @ v


class SoftmaxOfFeatures(Tokens):
    def core(self, q, k, v):
        return q.softmax(-1) * 4**-0.5 @ (k.softmax(-1).mT @ v)


class Causal(Tokens):
    def core(self, q, k, v):
        weights = k.exp()
        context = (weights[..., None] * v[..., None, :]).cumsum(-3)
        context = context / weights.cumsum(-2)[..., None]
        return (q.softmax(-1)[..., None, :] @ context).squeeze(-2)


class Temperature(Tokens):
    def core(self, q, k, v):
        return super().core(q, k * (1 + 1e-6), v)


class HeadsInside(Tokens):
    """Channels of a head are apart: head h has channels h, h + 2, h + 4 and so on."""

    def core(self, q, k, v):
        q, k, v = (
            t.transpose(1, 2).flatten(2).unflatten(2, (-1, 2)).permute(0, 3, 1, 2)
            for t in (q, k, v)
        )
        return super().core(q, k, v)


class DropsWeights(Tokens):
    def core(self, q, k, v):
        return super().core(q, nn.functional.dropout(k, 0.5, self.training), v)


class Pair(Tokens):
    def forward(self, x):
        return super().forward(x), None


QUADRATIC = r"it is softmax\(Q Kᵀ\) attention, of quadratic cost: another operation"
OTHERS = [
    (Quadratic, QUADRATIC),
    (SoftmaxOfFeatures, "the softmax of its keys runs over features, not over positions: another"),
    (Causal, "nearest formula's relative error is"),
    (Temperature, "nearest formula's relative error is"),
    (HeadsInside, "nearest formula's relative error is"),
    (DropsWeights, "nearest formula's relative error is"),
    (Pair, "it returns tuple, not one tensor"),
]


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("names", [THREE, ("to_qkv",)])
@pytest.mark.parametrize(("kind", "why"), OTHERS)
def test_other_layers_are_left(kind, why, names, example):
    layer = kind(names)
    with pytest.warns(UserWarning, match=why):
        accelerate(layer, torch.randn(X) if example else None)
    assert type(layer) is kind


def test_without_an_example_a_mask_is_an_obstacle():
    with pytest.warns(UserWarning, match="its forward also takes mask: give an example"):
        accelerate(Tokens())


def test_a_mask_in_the_example():
    mask = torch.ones(2, 14, dtype=torch.bool)
    with pytest.warns(UserWarning, match="in the model it gets mask, which the formula lacks"):
        accelerate(Tokens(), (torch.randn(X), mask))


def test_another_meaning_of_a_class_is_tried_first(monkeypatch):
    compared = []
    error = Reference.error

    def counted(*args, **options):
        compared.append(args)
        return error(*args, **options)

    def comparisons(count):
        compared.clear()
        with pytest.warns(UserWarning, match=f"skipped: {count}"):
            report = accelerate(nn.Sequential(*(Quadratic() for _ in range(count))))
        assert all("softmax(Q Kᵀ)" in f.note for f in report.skipped)
        return len(compared)

    monkeypatch.setattr(Reference, "error", counted)
    assert comparisons(3) == comparisons(1) + 2


def test_a_class_with_several_meanings():
    class Either(Tokens):
        linear = False

        def core(self, q, k, v):
            return (Tokens if self.linear else Quadratic).core(self, q, k, v)

    model, x = nn.Sequential(*(Either() for _ in range(5))), torch.randn(X)
    model[1].linear = model[3].linear = model[4].linear = True
    report = accelerate(model, x)
    assert [f.name for f in report.replaced] == ["1", "3", "4"]
    assert ["softmax(Q Kᵀ)" in f.note for f in report.skipped] == [True, True]


@pytest.mark.parametrize(
    "children",
    [
        {"heads": None}, {"to_k": None}, {"to_q": nn.Conv1d(12, 8, 1)},
        {"to_out": nn.ModuleList([nn.Linear(8, 12)])},
    ],
)  # fmt: skip
def test_modules_that_are_not_candidates(children):
    layer = unused(Tokens(), **children)
    with pytest.warns(UserWarning, match="no layer that looks like double attention"):
        accelerate(layer)
