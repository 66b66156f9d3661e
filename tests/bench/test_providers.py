"""Providers: their problems, closures and formulations, and which are timed in turns."""

import contextlib
import types

import pytest
import torch

from bench import formulations, problems, providers
from bench.formulations import EagerDoubleAttention, eager_block
from bench.problems import BACKWARD, FORWARD, STEP
from bench.providers import CHANNELS_LAST, EAGER, GRAPH, LAYOUTS, NCHW, setup_block
from bench.workloads import UsageError
from da_triton import DoubleAttention

CPU = torch.device("cpu")


def drawn(workload, mode=FORWARD, channels_last=False, dtype=torch.float32):
    return problems.draw(workload, mode, dtype, CPU).in_format(channels_last)


def errors(problem, closure):
    """The largest error on values that the closure has not read before."""
    problem.show(problem.fresh)
    return max(problem.errors(closure()))


def chosen(name, dtype=torch.float32, layouts=LAYOUTS):
    return providers.select([name], EAGER, CPU, dtype, layouts)


# --- problems and closures ------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_closures_read_their_own_input_in_its_format(table, channels_last):
    for workload in table:
        problem = drawn(workload, STEP, channels_last)
        seen = []

        def make(problem, seen=seen):
            block = eager_block(problem)
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            return block

        results = setup_block(problem, make)()
        assert seen[0] is problem.x
        assert (problem.x.stride(1) == 1) == channels_last
        assert problem.grad.stride() == problem.x.stride()
        assert len(results) == 2 + 8
        assert results[1].shape == problem.x.shape


def test_forward_builds_no_graph(tiny):
    (out,) = setup_block(drawn(tiny), eager_block)()
    assert not out.requires_grad


def test_compiled_block_is_compiled_for_static_shapes(tiny, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda block, **options: asked.append(options) or block)
    problem = drawn(tiny, STEP)
    assert errors(problem, setup_block(problem, eager_block, compile_mode="max-autotune")) < 1e-4
    assert asked == [{"mode": "max-autotune", "dynamic": False, "fullgraph": True}]


def test_logits_are_peaky_and_the_branch_is_as_large_as_x(table):
    for workload in table:
        problem = drawn(workload)
        logits = problem.state["convB.weight"].flatten(1) @ problem.fresh.flatten(2)
        assert logits.std().item() == pytest.approx(problems.LOGIT_STD, rel=1e-4)
        branch = problem.expected[0] - problem.fresh
        assert branch.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
        assert not torch.equal(problem.fresh, problem.features)


@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_problem_without_a_bias_of_v(table, mode):
    """It is another problem, with another reference output."""
    for workload in table:
        problem = problems.draw(workload, mode, torch.float32, CPU)
        given = problem.without_bias_of_v
        assert given is problem.without_bias_of_v
        zero = {**problem.state, "convV.bias": torch.zeros_like(problem.state["convV.bias"])}
        expected = problems._definition(workload, zero, problem.fresh, problem.grad)
        torch.testing.assert_close(given.expected, expected)
        assert max(problem.errors(given.expected)) > 1e-3
        for name, biased in (("absorbed unbiased", False), ("absorbed", True)):
            assert ("convV.bias" in chosen(name)[0].problem(problem).state) == biased


def test_compiled_with_convolutions_as_products(tiny):
    """The options are accepted, and no convolution is left in what Inductor generates."""
    from torch._inductor.utils import run_and_get_code

    options = providers.matmul_options("max-autotune-no-cudagraphs")["options"]
    assert all(options[k] for k in ("max_autotune", "conv_1x1_as_mm", "triton.native_matmul"))
    problem = drawn(tiny, channels_last=True)
    problem.show(problem.fresh)
    for as_matmul in (False, True):
        torch.compiler.reset()
        call = setup_block(problem, eager_block, compile_mode="default", as_matmul=as_matmul)
        results, (code,) = run_and_get_code(call)
        assert max(problem.errors(results)) < 1e-5
        assert ("extern_kernels.convolution(" in code) != as_matmul


def test_backward_alone_is_not_captured(tiny):
    with pytest.raises(ValueError, match="backward alone is not captured"):
        setup_block(drawn(tiny, BACKWARD), eager_block, capture=True)


def test_compiled_forward_is_kept_for_a_later_backward(tiny, monkeypatch):
    """Two forward passes before either's backward, in a graph that may reuse no buffer."""
    original, donated = torch.compile, []

    def compiled(block, **_):
        run = original(block, backend="aot_eager", dynamic=False)
        return lambda x: donated.append(torch._functorch.config.donated_buffer) or run(x)

    monkeypatch.setattr(torch, "compile", compiled)
    problem = drawn(tiny, BACKWARD)
    call = setup_block(problem, eager_block, compile_mode="default")
    problem.show(problem.fresh)
    call.before()
    first, call.out = call.out, None
    call.before()
    assert max(problem.errors(call())) < 1e-4
    call.out = first
    assert max(problem.errors(call())) < 1e-4
    assert donated == [False, False]


def test_autocast_keeps_weights_in_float32(tiny):
    problem = drawn(tiny, STEP, dtype=torch.bfloat16)
    call = chosen("eager autocast", torch.bfloat16, [NCHW])[0].setup(problem)
    assert errors(problem, call) < problems.TOLERANCE[torch.bfloat16]
    assert {t.dtype for t in call.inputs[1:]} == {torch.float32}
    assert call()[0].dtype == torch.bfloat16


def test_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    """``torch.cuda.graph`` itself does not, where ending the capture fails."""
    default = types.SimpleNamespace(wait_stream=lambda other: None)
    current = [default]

    @contextlib.contextmanager
    def stream(one):
        before, current[0] = current[0], one
        try:
            yield
        finally:
            current[0] = before

    @contextlib.contextmanager
    def graph(_):
        current[0] = "capturing"
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(**vars(default)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        providers.Replay(lambda: ())
    assert current[0] is default


# --- formulations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_eager_block_shares_parameters_with_the_layer(axes, heads):
    eager = EagerDoubleAttention(8, 4, 6, heads, axes).double()
    layer = DoubleAttention(8, 4, 6, heads=heads, residual=True, backend="eager").double()
    layer.load_state_dict(eager.state_dict())
    x = torch.randn(2, 8, *(3, 4, 5)[:axes], dtype=torch.float64)
    torch.testing.assert_close(eager(x), layer(x))


@pytest.mark.parametrize(
    "name", ["eager", "einsum", "sdpa", "torch", "absorbed", "absorbed unbiased"]
)
def test_formulations_agree_with_the_definition(bench, table, name):
    layouts = [CHANNELS_LAST] if "absorbed" in name else [NCHW, CHANNELS_LAST]
    for workload in table:
        for mode in problems.MODES:
            rows = bench.measure(workload, mode, chosen(name))
            assert {row["status"] for row in rows} == {"ok"}
            assert max(row["error"] for row in rows) < 1e-5
            assert [row["layout"] for row in rows] == layouts


def test_absorbed_attention_has_a_mask_only_for_the_bias_of_v(tiny, monkeypatch):
    masks = []
    original = formulations.scaled_dot_product_attention

    def attention(*args, attn_mask=None, **options):
        masks.append(attn_mask is not None)
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(formulations, "scaled_dot_product_attention", attention)
    problem = problems.draw(tiny, FORWARD, torch.float32, CPU)
    for name in ("absorbed", "absorbed unbiased"):
        (provider,) = chosen(name)
        (out,) = provider.setup(provider.problem(problem))()
        assert out.is_contiguous(memory_format=torch.channels_last)  # no copy at the end
    assert masks == [False, True, False, False]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_absorbed_flex_attention(tiny, compiled):
    """Forward: FlexAttention has no backward on a CPU."""
    problem = drawn(tiny, channels_last=True)
    block = eager_block(problem, formulations.AbsorbedFlexAttention)
    block.load_state_dict(problem.state)
    block.requires_grad_(False)
    run = torch.compile(block, dynamic=False) if compiled else block
    assert errors(problem, lambda: (run(problem.x),)) < 1e-5


# --- the catalogue --------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", providers.STAGES)
def test_every_gpu_sweep_has_what_its_ratios_refer_to(stage):
    """Both layouts of eager, da_triton and what is compiled of eager; the rivals' one layout."""
    groups = providers.gpu_sweeps(stage)
    for sweep, (launch, *others) in zip(groups, providers.STAGES[stage], strict=True):
        assert {p.launch for p in sweep} == {launch}
        timed = [(p.name, p.layout) for p in sweep]
        assert len(set(timed)) == len(timed)
        assert {name for name, _ in timed} | {"fla"} == {"eager", "triton", *others, "fla"}
        both = {"eager", "triton", *(name for name in others if name.startswith("compile eager"))}
        assert {(name, layout) for name in both for layout in LAYOUTS} <= set(timed)
        assert {p.layout for p in sweep if "absorbed" in p.name} <= {CHANNELS_LAST}
        assert {p.name for p in sweep if p.baseline} == {"eager"}
        assert stage == "compiled" or not any(p.compiles for p in sweep)
        assert all(p.compiles == p.name.startswith("compile") for p in sweep)


@pytest.mark.parametrize(
    ("name", "layouts", "message"),
    [
        ("triton", LAYOUTS, "'triton' needs a GPU"),
        ("eager autocast", LAYOUTS, "needs float16 or bfloat16"),
        ("absorbed", [NCHW], "'absorbed' needs layout channels_last"),
    ],
)
def test_provider_that_does_not_run_here(name, layouts, message):
    with pytest.raises(UsageError, match=message):
        chosen(name, layouts=layouts)


def test_all_providers_that_run_here():
    names = {p.name for p in providers.select([], EAGER, CPU, torch.float32)}
    assert names >= {"eager", "torch", "einsum", "sdpa", "compile eager", "compile torch"}
    assert not names & {"triton", "eager autocast", "compile triton"}
    in_nchw = {p.name for p in providers.select([], EAGER, CPU, torch.float32, [NCHW])}
    assert names - in_nchw == {"absorbed", "absorbed unbiased", "compile absorbed unbiased"}


def test_every_graph_is_captured_in_the_same_way():
    """None is left to Inductor's own graphs, which copy inputs and are launched from Python."""
    for launched, graph in zip(providers.catalogue(EAGER), providers.catalogue(GRAPH), strict=True):
        before, after = launched.setup.keywords, graph.setup.keywords
        assert {k for k in after if after[k] != before[k]} - {"make"} == {"capture"}
        assert str(after["make"]) == str(before["make"])
        assert after["capture"]
        mode = after["compile_mode"]
        assert mode in (None, "default", "max-autotune-no-cudagraphs")
        assert ("max-autotune" in graph.name) == (mode == "max-autotune-no-cudagraphs")
