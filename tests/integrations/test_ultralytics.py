"""Double attention in Ultralytics' YOLO, from a YAML row to an exported network."""

import copy
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from da_triton.integrations import residual
from da_triton.integrations import ultralytics as ours
from da_triton.integrations.ultralytics import register_ultralytics, ultralytics_config
from support.yolo import NAMES, awaken, blocks, events, features, predict

pytestmark = [
    pytest.mark.xdist_group("ultralytics"),
    pytest.mark.usefixtures("quiet_ultralytics"),
]

FILES = sorted(file.name for file in ours.CONFIGS.iterdir())


def test_names_are_known_once(tasks):
    from ultralytics import YOLO
    from ultralytics.utils import callbacks

    register_ultralytics()
    register_ultralytics()
    assert [getattr(tasks, name) for name in NAMES] == list(ours.BLOCKS)
    default = callbacks.get_default_callbacks()
    assert events(default).count(ours._FOR_WORKERS) == 1
    # The library recognises its own callbacks by this.
    assert default == callbacks.get_default_callbacks()
    yolo = YOLO(ultralytics_config())
    yolo.reset_callbacks()
    assert ours._FOR_WORKERS in events(yolo.callbacks)


def test_other_class_of_that_name(tasks, monkeypatch):
    monkeypatch.setattr(tasks, "ResidualDoubleAttention", torch.nn.Identity, raising=False)
    with pytest.raises(RuntimeError, match=r"Identity.* already"):
        register_ultralytics()
    assert tasks.ResidualDoubleAttention is torch.nn.Identity
    assert not hasattr(tasks, "DoubleAttention")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics.nn", None)
    with pytest.raises(ImportError, match="pip install ultralytics"):
        register_ultralytics()


@pytest.mark.parametrize("name", NAMES)
def test_unpickling_registers(tasks, name):
    block = getattr(ours, name)(8, 4, 2).eval()
    assert not hasattr(tasks, name)
    other = pickle.loads(pickle.dumps(block))
    assert getattr(tasks, name) is type(block) is type(other)
    x = torch.randn(2, 8, 5, 4)
    assert torch.equal(block(x), other(x))
    assert [n for n in NAMES if hasattr(tasks, n)] == [name]


# YAML files


def test_paths():
    assert len(FILES) == 4
    assert Path(ultralytics_config()).name == "yolov8n-double-attention.yaml"
    path = Path(ultralytics_config("yolo11x", outputs=True))
    assert path == ours.CONFIGS / "yolo11x-double-attention-outputs.yaml"


@pytest.mark.parametrize("model", ["yolov8", "yolov5n", "yolo11h", None])
def test_unknown_model(model):
    with pytest.raises(ValueError, match=r"one of yolov8n, .*, yolo11x, got"):
        ultralytics_config(model)


def test_directory_that_looks_like_a_scale(monkeypatch, tmp_path):
    """The message is true, and its advice works."""
    from ultralytics import YOLO

    register_ultralytics()
    configs = tmp_path / "yolov8s-project" / "configs"
    shutil.copytree(ours.CONFIGS, configs)
    with pytest.raises(FileNotFoundError):
        YOLO(str(configs / "yolov8n-double-attention.yaml"))
    monkeypatch.setattr(ours, "CONFIGS", configs)
    message = "'8s'.*Copy yolov8-double-attention.yaml there .* yolov8n-double-attention.yaml"
    with pytest.raises(RuntimeError, match=message):
        ultralytics_config("yolov8n")
    copied = configs / "yolov8n-double-attention.yaml"
    shutil.copy(configs / "yolov8-double-attention.yaml", copied)
    assert blocks(YOLO(str(copied)).model.model)[10].attention.in_channels == 256


def absolute(table):
    """Rows with the numbers of their inputs counted from the first row."""
    rows = []
    for i, (inputs, *rest) in enumerate(table["backbone"] + table["head"]):
        inputs = [inputs] if isinstance(inputs, int) else inputs
        rows.append([[i + j if j < 0 else j for j in inputs], *rest])
    return rows


def without_blocks(rows):
    """Rows without blocks, renumbered; readers of a block's row read the block's input."""
    numbers, kept = {-1: -1}, []
    for i, (inputs, *rest) in enumerate(rows):
        if rest[1] in NAMES:
            assert rest == [1, "ResidualDoubleAttention", ["c2"]]
            assert inputs == [i - 1]  # c2 belongs to that row
            numbers[i] = numbers[i - 1]
        else:
            numbers[i] = len(kept)
            kept.append([[numbers[j] for j in inputs], *rest])
    return kept


@pytest.mark.parametrize("name", FILES)
def test_rest_is_the_librarys_own_table(name):
    import ultralytics

    family = name.split("-")[0]
    models = Path(ultralytics.__file__).parent / "cfg/models"
    stock = yaml.safe_load((models / family.removeprefix("yolo") / f"{family}.yaml").read_text())
    table = yaml.safe_load((ours.CONFIGS / name).read_text())
    assert without_blocks(absolute(table)) == absolute(stock)
    assert absolute(table) != absolute(stock)
    assert {k: v for k, v in table.items() if k not in ("backbone", "head")} == {
        k: v for k, v in stock.items() if k not in ("backbone", "head")
    }
    moved = copy.deepcopy(table)
    moved["head"][1][0] = [-1, 5]
    assert without_blocks(absolute(moved)) != absolute(stock)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize("family", ["yolov8", "yolo11"])
def test_channels_follow_the_scale(family, scale, outputs):
    from ultralytics.nn.tasks import parse_model, yaml_model_load

    register_ultralytics()
    table = yaml_model_load(ultralytics_config(family + scale, outputs))
    assert table["scale"] == scale
    _, width, most = table["scales"][scale]
    with torch.device("meta"):
        layers, _ = parse_model(table, ch=3, verbose=False)
    found = {i: block.attention.in_channels for i, block in blocks(layers).items()}
    wanted = [256, 512, 1024] if outputs else [1024]
    assert list(found.values()) == [int(min(channels, most) * width) for channels in wanted]
    assert [block.attention.c_n for block in blocks(layers).values()] == [
        channels // 2 for channels in found.values()
    ]
    if outputs:
        assert layers[-1].f == list(found)


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("model", ["yolov8n", "yolov8s", "yolo11n", "yolo11s"])
def test_forward_and_backward(model, outputs):
    from ultralytics import YOLO

    register_ultralytics()
    network = YOLO(ultralytics_config(model, outputs)).model.train()
    assert predict(network.eval(), torch.rand(2, 3, 64, 96)).shape == (2, 84, 12 * 8 + 6 * 4 + 6)
    activations = features(network.train(), torch.rand(2, 3, 64, 64))
    assert [tuple(m.shape[2:]) for m in activations] == [(8, 8), (4, 4), (2, 2)]
    sum(m.square().sum() for m in activations).backward()
    for block in blocks(network.model).values():
        assert block.norm.weight.grad.any()


TINY = """
nc: 4
scales: {{n: [0.33, 0.50, 1024]}}
backbone:
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [128, 3, 2]]
  - [-1, 1, Conv, [256, 3, 2]]
head:
  - {row}
  - [[3], 1, Detect, [nc]]
"""


def network_with(row, directory):
    """A network with ``row`` as row 3, after rows of 32, 64 and 128 channels."""
    from ultralytics import YOLO

    register_ultralytics()
    file = directory / "yolov8n-mine.yaml"
    file.write_text(TINY.format(row=row))
    return YOLO(str(file)).model


def test_rows_with_sizes(tmp_path):
    network = network_with("[-1, 6, DoubleAttention, [c2, 12, 20]]", tmp_path)
    row = network.model[3]
    assert [type(block) for block in row] == [ours.DoubleAttention] * 2  # 6 times depth 0.33
    assert (row[0].in_channels, row[0].c_m, row[0].c_n) == (128, 12, 20)
    assert predict(network.eval(), torch.rand(1, 3, 64, 64)).shape == (1, 8, 64)


@pytest.mark.parametrize("sizes", ["", "64, 32, ", "None, null, "])
def test_rows_with_named_options(sizes, tmp_path):
    """Each reaches the block, alone and in a checkpoint."""
    options = (
        "{heads: 4, norm: null, zero_init: false, softmax_v: false, order: XH, backend: torch}"
    )
    network = network_with(
        f"[-1, 1, ResidualDoubleAttention, [c2, {sizes}{options}]]", tmp_path
    ).eval()
    x = torch.rand(2, 128, 4, 5)
    for block in (network.model[3], pickle.loads(pickle.dumps(network)).model[3]):
        attention = block.attention
        assert (attention.heads, attention.order, attention.backend) == (4, "XH", "torch")
        assert block.norm is None
        assert not block.zero_init
        assert not attention.softmax_v
        assert (attention.c_m, attention.c_n) == ((64, 32) if "64" in sizes else (64, 64))
        plain = residual.ResidualDoubleAttention(
            128, attention.c_m, attention.c_n, heads=4, norm=None, softmax_v=False
        )
        plain.load_state_dict(block.state_dict())
        torch.testing.assert_close(block(x), plain(x))
    # The table of a network is what its next training is built from.
    again = type(network)(network.yaml, verbose=False)
    assert again.model[3].attention.heads == 4


def test_rows_with_an_option_that_is_unknown_or_given_twice(tmp_path):
    for arguments, message in {
        "c2, {head: 4}": "unexpected keyword argument 'head'",
        "c2, 8, {c_m: 8}": "multiple values for argument 'c_m'",
        "c2, {backend: cuda}": "backend must be one of .*'torch'.*, got 'cuda'",
        "{heads: 4}": "missing 1 required positional argument: 'in_channels'",
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            network_with(f"[-1, 1, ResidualDoubleAttention, [{arguments}]]", tmp_path)


@pytest.mark.parametrize("block", NAMES)
@pytest.mark.parametrize("arguments", ["ch, f", "ch, f, 8, 4", "ch, f, {c_m: 8}"])
@pytest.mark.parametrize(("source", "channels"), [(-1, 128), (0, 32), (-2, 64)])
def test_rows_that_read_another_row(source, channels, arguments, block, tmp_path):
    network = network_with(f"[{source}, 1, {block}, [{arguments}]]", tmp_path)
    row = network.model[3]
    assert type(row) is getattr(ours, block)
    attention = getattr(row, "attention", row)
    assert attention.convA.in_channels == attention.conv_reconstruct.out_channels == channels
    assert attention.c_m == (8 if "8" in arguments else channels // 2)


@pytest.mark.parametrize("block", NAMES)
def test_rows_with_channels_of_another_row(block, tmp_path):
    """The message names the row and the remedy, which works."""
    message = (
        r"x must have 128 channels .*, got shape \(1, 32, .*\)\. Row 3 of the YAML file was given "
        r"128 channels and reads 32\. .* write ch, f instead .*: \[0, 1, (\w+), \[ch, f\]\]\."
    )
    with pytest.raises(ValueError, match=message) as caught:
        network_with(f"[0, 1, {block}, [c2]]", tmp_path)
    remedy = str(caught.value).split(": ")[-1].removesuffix(".")
    assert remedy == f"[0, 1, {block}, [ch, f]]"
    network_with(remedy, tmp_path)
    with pytest.raises(ValueError, match=r"Row 3 .* was given 100 channels and reads 128\."):
        network_with(f"[-1, 1, {block}, [100]]", tmp_path)
    with pytest.raises(ValueError, match=r"\. The row .* was given 100 channels and reads 128\."):
        network_with(f"[-1, 6, {block}, [100]]", tmp_path)


def test_other_errors_of_a_block_stay_as_they_are():
    block = ours.ResidualDoubleAttention(8)
    with pytest.raises(ValueError, match=r"x must be \(N, channels, \*positions\)"):
        block(torch.ones(3))
    with pytest.raises(ValueError, match=r"ch must be followed by f"):
        ours.ResidualDoubleAttention([8, 16])
    with pytest.raises(ValueError, match="mask") as caught:
        block(torch.rand(1, 8, 3, 3), torch.ones(1, 2, 2, dtype=torch.bool))
    assert "YAML" not in str(caught.value)


@pytest.mark.parametrize("block", NAMES)
def test_rows_compile_and_export_whole(block):
    block = getattr(ours, block)([3, 8, 16], 1, 4, {"backend": "torch"}).eval()
    x = torch.rand(2, 8, 4, 3)
    expected = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(block, x)(x), expected)


# Networks with blocks


def joined_features(network, x):
    """Inputs of the detector, in float64: the outputs of the blocks."""
    with torch.no_grad():
        return torch.cat([m.double().flatten(1) for m in features(network, x)], 1)


def distance(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


@pytest.fixture(scope="module", params=["yolov8n", "yolo11n"])
def awake(request):
    """A network, and one whose blocks are the identity."""
    from ultralytics import YOLO

    register_ultralytics()
    torch.manual_seed(3)
    network = awaken(YOLO(ultralytics_config(request.param, outputs=True)).model)
    silent = copy.deepcopy(network)
    for block in blocks(silent.model).values():
        torch.nn.init.zeros_(block.norm.weight)
        torch.nn.init.zeros_(block.norm.bias)
    return network, silent


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(awake, dtype):
    """The blocks round no worse than the layers of the network do."""
    x = torch.rand(2, 3, 64, 96)
    cast, autocast = [], []
    for network in awake:
        exact = joined_features(copy.deepcopy(network).double(), x.double())
        cast.append(distance(joined_features(copy.deepcopy(network).to(dtype), x.to(dtype)), exact))
        with torch.autocast("cpu", dtype):
            autocast.append(distance(joined_features(network, x), exact))
    assert cast[0] < 1.5 * cast[1] < 16 * torch.finfo(dtype).eps
    assert autocast[0] < 1.5 * autocast[1] < 16 * torch.finfo(dtype).eps


def test_copies_fusion_and_channels_last(awake):
    network, silent = awake
    x = torch.rand(2, 3, 64, 96)
    expected = joined_features(network, x)
    assert distance(joined_features(silent, x), expected) > 0.5
    assert torch.equal(joined_features(copy.deepcopy(network), x), expected)
    assert torch.equal(joined_features(pickle.loads(pickle.dumps(network)), x), expected)
    fused = copy.deepcopy(network).fuse(verbose=False)
    assert fused.is_fused()
    assert distance(joined_features(fused, x), expected) < 1e-6
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    assert distance(joined_features(last, y), expected) < 1e-6
    block = next(iter(blocks(last.model).values()))
    out = block(torch.rand(2, 64, 8, 12).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_deterministic(awake, poisoned):
    network = copy.deepcopy(awake[0]).train()
    x = torch.rand(2, 3, 64, 64)
    twice = []
    for _ in range(2):
        network.zero_grad()
        sum(m.square().sum() for m in features(network, x)).backward()
        twice.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert any("attention" in name for name in twice[0])
    assert all(torch.equal(grad, twice[1][name]) for name, grad in twice[0].items())
