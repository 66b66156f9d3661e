import contextlib

import pytest
import torch

from bench import formulations, problems, providers
from bench.formulations import EagerDoubleAttention
from bench.problems import FORWARD, STEP
from bench.providers import EAGER, GRAPH
from bench.workloads import UsageError
from da_triton import DoubleAttention

CPU = torch.device("cpu")


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("heads", [1, 2])
def test_eager_block_shares_parameters_with_the_layer(axes, heads):
    eager = EagerDoubleAttention(8, 4, 6, heads, axes).double()
    layer = DoubleAttention(8, 4, 6, heads=heads, residual=True, backend="eager").double()
    layer.load_state_dict(eager.state_dict())
    x = torch.randn(2, 8, *(3, 4, 5)[:axes], dtype=torch.float64)
    torch.testing.assert_close(eager(x), layer(x))


@pytest.mark.parametrize("channels_last", [False, True])
def test_closures_read_their_own_input_in_its_format(table, channels_last):
    for workload in table:
        problem = problems.draw(workload, STEP, torch.float32, CPU).in_format(channels_last)
        seen = []

        def make(problem, seen=seen):
            block = formulations.eager_block(problem)
            block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            return block

        results = providers.setup_block(problem, make)()
        assert seen[0] is problem.x
        assert (problem.x.stride(1) == 1) == channels_last
        assert problem.grad.stride() == problem.x.stride()
        assert len(results) == 2 + 8
        assert results[1].shape == problem.x.shape


def test_forward_builds_no_graph(tiny):
    problem = problems.draw(tiny, FORWARD, torch.float32, CPU).in_format(False)
    (out,) = providers.setup_block(problem, formulations.eager_block)()
    assert not out.requires_grad


def test_compiled_block_is_compiled_for_static_shapes(tiny, monkeypatch):
    asked = []

    def compile_(block, **options):
        asked.append(options)
        return block

    monkeypatch.setattr(torch, "compile", compile_)
    problem = problems.draw(tiny, STEP, torch.float32, CPU).in_format(False)
    closure = providers.setup_block(problem, formulations.eager_block, compile_mode="max-autotune")
    problem.show(problem.fresh)
    assert max(problem.errors(closure())) < 1e-4
    assert asked == [{"mode": "max-autotune", "dynamic": False, "fullgraph": True}]


def test_logits_are_peaky_and_the_branch_is_as_large_as_x(table):
    for workload in table:
        problem = problems.draw(workload, FORWARD, torch.float32, CPU)
        fresh = problem.fresh.flatten(2)
        logits = problem.state["convB.weight"].flatten(1) @ fresh
        assert logits.std().item() == pytest.approx(problems.LOGIT_STD, rel=1e-4)
        branch = problem.expected[0] - problem.fresh
        assert branch.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
        assert not torch.equal(problem.fresh, problem.features)


def test_every_gpu_sweep_has_what_its_ratios_refer_to():
    """And each group da_triton, whichever stage of a run it belongs to."""
    both = {(name, layout) for name in ("eager", "triton") for layout in providers.LAYOUTS}
    for stage in providers.STAGES:
        for sweep in providers.gpu_sweeps(stage):
            assert len({p.launch for p in sweep}) == 1
            timed = {(p.name, p.layout) for p in sweep}
            assert timed >= both
            assert len(timed) == len(sweep)
            assert {(p.name, p.layout) for p in sweep if p.baseline} == {
                ("eager", layout) for layout in providers.LAYOUTS
            }
            assert stage == "compiled" or not any(p.compiles for p in sweep)
            assert all(p.compiles == p.name.startswith("compile") for p in sweep)


def names_of(sweep):
    return {p.name for p in sweep} - {"fla"}


def test_stages_of_the_gpu_sweep():
    graphs, launched = providers.gpu_sweeps("eager")
    assert (graphs[0].launch, launched[0].launch) == (GRAPH, EAGER)
    assert names_of(graphs) == {
        "eager", "triton", "torch", "eager autocast", "einsum", "sdpa", "absorbed",
        "absorbed unbiased",
    }  # fmt: skip
    assert names_of(launched) == {"eager", "triton"}

    compiled, autotuned, rivals, launched, tuned_rivals = providers.gpu_sweeps("compiled")
    found = [compiled, autotuned, rivals, launched, tuned_rivals]
    assert [s[0].launch for s in found] == [GRAPH, GRAPH, GRAPH, EAGER, GRAPH]
    for sweep, name in (
        (compiled, "compile eager"), (autotuned, "compile eager max-autotune"),
    ):  # fmt: skip
        formats = {(p.name, p.layout) for p in sweep}
        assert formats >= {(name, layout) for layout in providers.LAYOUTS}
    assert names_of(compiled) == {"eager", "triton", "compile eager", "compile triton"}
    assert names_of(rivals) == {
        "eager", "triton", "compile eager mm", "compile absorbed unbiased", "compile absorbed flex",
    }  # fmt: skip
    assert names_of(tuned_rivals) == {
        "eager", "triton", "compile eager mm max-autotune", "compile absorbed flex max-autotune",
    }  # fmt: skip
    assert names_of(launched) == {"eager", "triton", "compile eager", "compile triton"}
    for sweep in found:
        assert all(p.layout == "channels_last" for p in sweep if "absorbed" in p.name)


@pytest.mark.parametrize(
    "name", ["eager", "einsum", "sdpa", "torch", "absorbed", "absorbed unbiased"]
)
def test_formulations_agree_with_the_definition(bench, table, name):
    chosen = providers.select([name], EAGER, CPU, torch.float32)
    assert len(chosen) == (1 if "absorbed" in name else 2)
    for workload in table:
        for mode in problems.MODES:
            rows = bench.measure(workload, mode, chosen)
            assert {row["status"] for row in rows} == {"ok"}
            assert max(row["error"] for row in rows) < 1e-5
            assert {row["layout"] for row in rows} == {p.layout for p in chosen}


@pytest.mark.parametrize("mode", [FORWARD, STEP])
def test_problem_without_a_bias_of_v(table, mode):
    """It is another problem, and the definition's answer is another."""
    for workload in table:
        problem = problems.draw(workload, mode, torch.float32, CPU)
        given = problem.without_bias_of_v
        assert given is problem.without_bias_of_v
        zero = {**problem.state, "convV.bias": torch.zeros_like(problem.state["convV.bias"])}
        expected = problems._definition(workload, zero, problem.fresh, problem.grad)
        torch.testing.assert_close(given.expected, expected)
        assert max(problem.errors(given.expected)) > 1e-3
        (chosen,) = providers.select(["absorbed unbiased"], EAGER, CPU, torch.float32)
        assert "convV.bias" not in chosen.problem(problem).state
        (chosen,) = providers.select(["absorbed"], EAGER, CPU, torch.float32)
        assert "convV.bias" in chosen.problem(problem).state


def test_absorbed_attention_has_a_mask_only_for_the_bias_of_v(tiny, monkeypatch):
    masks = []
    original = formulations.scaled_dot_product_attention

    def attention(*args, attn_mask=None, **options):
        masks.append(attn_mask is not None)
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(formulations, "scaled_dot_product_attention", attention)
    problem = problems.draw(tiny, FORWARD, torch.float32, CPU)
    for name in ("absorbed", "absorbed unbiased"):
        (chosen,) = providers.select([name], EAGER, CPU, torch.float32)
        (out,) = chosen.setup(chosen.problem(problem))()
        assert out.is_contiguous(memory_format=torch.channels_last)  # no copy at the end
    assert masks == [False, True, False, False]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_absorbed_flex_attention(tiny, compiled):
    """Forward: FlexAttention has no backward on a CPU."""
    problem = problems.draw(tiny, FORWARD, torch.float32, CPU).in_format(True)
    problem.show(problem.fresh)
    block = formulations.eager_block(problem, formulations.AbsorbedFlexAttention)
    block.load_state_dict(problem.state)
    block.requires_grad_(False)
    run = torch.compile(block, dynamic=False) if compiled else block
    assert max(problem.errors((run(problem.x),))) < 1e-5


def test_compiled_with_convolutions_as_products(tiny):
    """The options are accepted, and no convolution is left in what Inductor generates."""
    from torch._inductor.utils import run_and_get_code

    options = providers.matmul_options("max-autotune-no-cudagraphs")["options"]
    assert options["max_autotune"]
    assert options["conv_1x1_as_mm"]
    assert options["triton.native_matmul"]
    problem = problems.draw(tiny, FORWARD, torch.float32, CPU).in_format(True)
    problem.show(problem.fresh)
    for as_matmul in (False, True):
        torch.compiler.reset()
        call = providers.setup_block(
            problem, formulations.eager_block, compile_mode="default", as_matmul=as_matmul
        )
        results, (code,) = run_and_get_code(call)
        assert max(problem.errors(results)) < 1e-5
        assert ("extern_kernels.convolution(" in code) != as_matmul


def test_backward_alone_is_not_captured(tiny):
    problem = problems.draw(tiny, problems.BACKWARD, torch.float32, CPU).in_format(False)
    with pytest.raises(ValueError, match="backward alone is not captured"):
        providers.setup_block(problem, formulations.eager_block, capture=True)


def test_compiled_forward_is_kept_for_a_later_backward(tiny, monkeypatch):
    """Two forward passes before either's backward, in a graph that may reuse no buffer."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda block, **_: original(block, backend="aot_eager", dynamic=False)
    )
    problem = problems.draw(tiny, problems.BACKWARD, torch.float32, CPU).in_format(False)
    call = providers.setup_block(problem, formulations.eager_block, compile_mode="default")
    problem.show(problem.fresh)
    call.before()
    first, call.out = call.out, None
    call.before()
    assert max(problem.errors(call())) < 1e-4
    call.out = first
    assert max(problem.errors(call())) < 1e-4


def test_autocast_keeps_weights_in_float32(tiny):
    problem = problems.draw(tiny, STEP, torch.bfloat16, CPU).in_format(False)
    (chosen,) = providers.select(["eager autocast"], EAGER, CPU, torch.bfloat16, ["nchw"])
    call = chosen.setup(problem)
    problem.show(problem.fresh)
    results = call()
    assert max(problem.errors(results)) < problems.TOLERANCE[torch.bfloat16]
    assert {t.dtype for t in call.inputs[1:]} == {torch.float32}
    assert results[0].dtype == torch.bfloat16


def test_selection_by_name():
    everything = providers.select([], EAGER, CPU, torch.float32)
    names = {p.name for p in everything}
    assert names >= {"eager", "torch", "einsum", "sdpa", "compile eager", "compile torch"}
    assert not names & {"triton", "eager autocast", "compile triton"}
    with pytest.raises(UsageError, match="did you mean 'triton'"):
        providers.select(["tritn"], EAGER, CPU, torch.float32)
    with pytest.raises(UsageError, match="'triton' needs a GPU"):
        providers.select(["triton"], EAGER, CPU, torch.float32)
    with pytest.raises(UsageError, match="needs float16 or bfloat16"):
        providers.select(["eager autocast"], EAGER, CPU, torch.float32)
    with pytest.raises(UsageError, match="'absorbed' needs layout channels_last"):
        providers.select(["absorbed"], EAGER, CPU, torch.float32, ["nchw"])
    assert "absorbed" not in {
        p.name for p in providers.select([], EAGER, CPU, torch.float32, ["nchw"])
    }
    with pytest.raises(UsageError, match="did you mean 'nchw'"):
        providers.select(["eager"], EAGER, CPU, torch.float32, ["nchv"])


def test_every_graph_is_captured_in_the_same_way():
    """None is left to Inductor's own graphs, which copy inputs and are launched from Python."""
    launched = {p.name: p.setup.keywords for p in providers.catalogue(EAGER)}
    for provider in providers.catalogue(GRAPH):
        options = dict(provider.setup.keywords)
        assert options.pop("capture"), provider.name
        same = dict(launched[provider.name])
        assert not same.pop("capture")
        for given in (options, same):
            given["make"] = str(given["make"])
        assert options == same
        mode = options.get("compile_mode")
        assert mode in (None, "default", "max-autotune-no-cudagraphs")
        assert ("max-autotune" in provider.name) == (mode == "max-autotune-no-cudagraphs")


def test_failed_capture_leaves_the_stream_as_it_was(monkeypatch):
    """``torch.cuda.graph`` itself does not, where ending the capture fails."""
    current = []

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def stream(one):
        before, current[0] = current[0], one
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            current[0] = "capturing"

        def __exit__(self, *_):
            raise RuntimeError("operation failed due to a previous error during capture")

    default = Stream()
    current.append(default)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        providers.Replay(lambda: ())
    assert current[0] is default
