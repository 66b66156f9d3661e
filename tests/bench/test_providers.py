import pytest
import torch

from bench import problems, providers
from bench.names import UnknownNameError
from bench.problems import FORWARD, STEP
from bench.providers import EAGER, GRAPH, EagerDoubleAttention
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
            block = providers.eager_block(problem)
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
    (out,) = providers.setup_block(problem, providers.eager_block)()
    assert not out.requires_grad


def test_compiled_block_is_compiled_for_static_shapes(tiny, monkeypatch):
    asked = []

    def compile_(block, **options):
        asked.append(options)
        return block

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    problem = problems.draw(tiny, STEP, torch.float32, CPU).in_format(False)
    closure = providers.setup_block(problem, providers.eager_block, compile_mode="max-autotune")
    problem.show(problem.fresh)
    assert max(problem.errors(closure())) < 1e-4
    assert asked == [{"mode": "max-autotune", "dynamic": False}]


def test_logits_are_peaky_and_the_branch_is_as_large_as_x(table):
    for workload in table:
        problem = problems.draw(workload, FORWARD, torch.float32, CPU)
        fresh = problem.fresh.flatten(2)
        logits = problem.state["convB.weight"].flatten(1) @ fresh
        assert logits.std().item() == pytest.approx(problems.LOGIT_STD, rel=1e-4)
        branch = problem.expected[0] - problem.fresh
        assert branch.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
        assert not torch.equal(problem.fresh, problem.features)


def test_every_gpu_sweep_compares_like_with_like():
    sweeps = providers.gpu_sweeps()
    for sweep in sweeps:
        assert len({p.launch for p in sweep}) == 1
        baselines = {(p.name, p.layout) for p in sweep if p.baseline}
        assert baselines == {("eager", "nchw"), ("eager", "channels_last")}
        assert len({(p.name, p.layout) for p in sweep}) == len(sweep)
        assert len({p.compiles for p in sweep if not p.baseline}) == 1
    timed = {(p.name, p.launch) for sweep in sweeps for p in sweep if p.name != "fla"}
    assert timed == {
        (name, launch)
        for launch in (EAGER, GRAPH)
        for name in (
            "eager", "eager autocast", "einsum", "sdpa", "torch", "triton", "compile eager",
            "compile eager max-autotune", "compile torch", "compile triton",
            "compile triton max-autotune",
        )
    }  # fmt: skip
    assert all(p.compiles == p.name.startswith("compile") for sweep in sweeps for p in sweep)
    assert not any(p.compiles for sweep in sweeps[:2] for p in sweep)


@pytest.mark.parametrize("name", ["eager", "einsum", "sdpa", "torch"])
@pytest.mark.parametrize("layout", providers.LAYOUTS)
def test_formulations_agree_with_the_definition(bench, table, name, layout):
    chosen = providers.select([name], EAGER, CPU, torch.float32, [layout])
    for workload in table:
        for mode in problems.MODES:
            (row,) = bench.measure(workload, mode, chosen)
            assert row["status"] == "ok", row["status"]
            assert row["layout"] == layout


def test_backward_alone_is_not_captured(tiny):
    problem = problems.draw(tiny, problems.BACKWARD, torch.float32, CPU).in_format(False)
    with pytest.raises(ValueError, match="backward alone is not captured"):
        providers.setup_block(problem, providers.eager_block, capture=True)


def test_compiled_forward_is_kept_for_a_later_backward(tiny, monkeypatch):
    """Two forward passes before either's backward, in a graph that may reuse no buffer."""
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda block, **_: original(block, backend="aot_eager", dynamic=False)
    )
    problem = problems.draw(tiny, problems.BACKWARD, torch.float32, CPU).in_format(False)
    call = providers.setup_block(problem, providers.eager_block, compile_mode="default")
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
    with pytest.raises(UnknownNameError, match="did you mean 'triton'"):
        providers.select(["tritn"], EAGER, CPU, torch.float32)
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        providers.select(["triton"], EAGER, CPU, torch.float32)
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        providers.select(["eager autocast"], EAGER, CPU, torch.float32)
    with pytest.raises(UnknownNameError, match="did you mean 'nchw'"):
        providers.select(["eager"], EAGER, CPU, torch.float32, ["nchv"])


def test_graphs_are_captured_but_where_compilation_records_them():
    asked = {}
    for provider in providers.catalogue(GRAPH):
        options = provider.setup.keywords
        asked[provider.name] = options.get("capture"), options.get("compile_mode")
    assert asked["triton"] == (True, None)
    assert asked["compile triton"] == (True, "default")
    assert asked["compile eager max-autotune"] == (False, "max-autotune")
    launched = {p.name: p.setup.keywords.get("compile_mode") for p in providers.catalogue(EAGER)}
    assert launched["compile eager max-autotune"] == "max-autotune-no-cudagraphs"
