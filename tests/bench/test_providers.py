import pytest
import torch

from bench import problems, providers
from bench.problems import BACKWARD, FORWARD
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
        problem = problems.draw(workload, BACKWARD, torch.float32, CPU).in_format(channels_last)
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
    problem = problems.draw(tiny, BACKWARD, torch.float32, CPU).in_format(False)
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
        assert {p.name for p in sweep if p.baseline} == {"eager", "eager channels_last"}
        assert len({p.name for p in sweep}) == len(sweep)
    ours = {(p.name, p.launch) for sweep in sweeps for p in sweep if not p.baseline}
    assert ours == {
        ("triton", EAGER),
        ("triton channels_last", EAGER),
        ("compile eager", EAGER),
        ("compile eager max-autotune", EAGER),
        ("compile triton", EAGER),
        ("triton", GRAPH),
        ("triton channels_last", GRAPH),
        ("compile eager max-autotune", GRAPH),
        ("compile triton max-autotune", GRAPH),
    }
    assert all(p.compiles == p.name.startswith("compile") for sweep in sweeps for p in sweep)
