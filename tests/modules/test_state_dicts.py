"""State dicts of the implementations in circulation load into the layer."""

import pytest
import torch

from da_triton import DoubleAttention


def source():
    torch.manual_seed(7)
    return DoubleAttention(16, 8, 12).state_dict()


def renamed(state, last, prefix, axes):
    out = {}
    for name, value in state.items():
        child, kind = name.split(".")
        child = last if child == "conv_reconstruct" else child
        out[f"{prefix}{child}.{kind}"] = (
            value.flatten(1).reshape(*value.shape[:2], *axes) if kind == "weight" else value
        )
    return out


@pytest.mark.parametrize("axes", [(), (1,), (1, 1), (1, 1, 1)], ids=len)
@pytest.mark.parametrize("prefix", ["", "_mask."])
@pytest.mark.parametrize("last", ["conv_reconstruct", "proj", "convC", "convZ"])
def test_known_names_and_shapes(last, prefix, axes):
    state = source()
    block = DoubleAttention(16, 8, 12)
    given = renamed(state, last, prefix, axes)
    block.load_state_dict(given)
    for name, value in state.items():
        assert torch.equal(block.state_dict()[name], value), name
    assert set(given) == set(renamed(state, last, prefix, axes)), "the caller's dict is untouched"


def test_inside_a_model():
    state = source()
    model = torch.nn.Sequential(torch.nn.ReLU(), DoubleAttention(16, 8, 12))
    model.load_state_dict({f"1.{k}": v for k, v in renamed(state, "proj", "_mask.", ()).items()})
    assert torch.equal(model[1].conv_reconstruct.weight, state["conv_reconstruct.weight"])


def test_a_file_without_the_last_convolution():
    state = {k: v for k, v in source().items() if "reconstruct" not in k}
    DoubleAttention(16, 8, 12, reconstruct=False).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*conv_reconstruct\.weight"):
        DoubleAttention(16, 8, 12).load_state_dict(state)


@pytest.mark.parametrize("kind", [torch.nn.Conv1d, torch.nn.Conv3d])
def test_a_replaced_child_keeps_its_own_shape(kind):
    block = DoubleAttention(16, 8, 12)
    block.convA = kind(16, 8, 1)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    torch.nn.init.zeros_(block.convA.weight)
    block.load_state_dict(state)
    assert torch.equal(block.convA.weight, state["convA.weight"])


def test_nothing_is_swallowed():
    """A file that holds the last convolution twice, unknown names, wrong shapes: all rejected."""
    state = source()
    twice = {**state, "proj.weight": state["conv_reconstruct.weight"] + 1}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*proj\.weight"):
        DoubleAttention(16, 8, 12).load_state_dict(twice)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other\.weight"):
        DoubleAttention(16, 8, 12).load_state_dict({**state, "other.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for convA\.weight"):
        DoubleAttention(16, 8, 12).load_state_dict({**state, "convA.weight": torch.zeros(9, 16)})
    spatial = {**state, "convA.weight": torch.zeros(8, 16, 3, 3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for convA\.weight"):
        DoubleAttention(16, 8, 12).load_state_dict(spatial)
