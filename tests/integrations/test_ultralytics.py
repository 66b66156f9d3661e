"""Double attention in Ultralytics' YOLO, from a YAML row to an exported network."""

import copy
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from da_triton.integrations import ultralytics as ours
from da_triton.integrations.ultralytics import (
    load_ultralytics,
    register_ultralytics,
    ultralytics_config,
)
from support.yolo import NAMES, awaken, blocks, events, predict

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
    # The library tells by this whether callbacks are its own.
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
    """What the message says is so, and helps."""
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
    """The rows of others, renumbered; who reads a block's row reads the block's input."""
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
    from ultralytics.utils import YAML

    family = name.split("-")[0]
    models = Path(ultralytics.__file__).parent / "cfg/models"
    stock = YAML.load(models / family.removeprefix("yolo") / f"{family}.yaml")
    table = YAML.load(ours.CONFIGS / name)
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
    maps = network.train()(torch.rand(2, 3, 64, 64))["feats"]
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4), (2, 2)]
    sum(m.square().sum() for m in maps).backward()
    for block in blocks(network.model).values():
        assert block.norm.weight.grad.any()


def test_rows_with_options(tmp_path):
    from ultralytics import YOLO

    register_ultralytics()
    text = (ours.CONFIGS / FILES[-2]).read_text()
    assert text.count("ResidualDoubleAttention, [c2]") == 3
    text = text.replace("1, ResidualDoubleAttention, [c2]", "6, DoubleAttention, [c2, 12, 20]", 1)
    file = tmp_path / "yolov8n-mine.yaml"
    file.write_text(text)
    network = YOLO(str(file)).model
    row = network.model[16]
    assert [type(block) for block in row] == [ours.DoubleAttention] * 2  # 6 times depth 0.33
    assert (row[0].in_channels, row[0].c_m, row[0].c_n) == (64, 12, 20)
    assert predict(network.eval(), torch.rand(1, 3, 64, 64)).shape == (1, 84, 84)


# Weights of the network without double attention


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("model", ["yolov8n", "yolo11n"])
def test_starts_as_the_network_it_came_from(model, outputs, tmp_path):
    from ultralytics import YOLO

    register_ultralytics()
    stock = YOLO(f"{model}.yaml")
    awaken(stock.model)
    stock.model.names = {i: f"kind {i}" for i in range(80)}
    stock.save(tmp_path / "stock.pt")
    stock = YOLO(tmp_path / "stock.pt")  # as float16 has it
    x = torch.rand(2, 3, 64, 96)
    expected = predict(stock.model, x)
    for source in (stock, tmp_path / "stock.pt"):
        yolo = YOLO(ultralytics_config(model, outputs))
        load_ultralytics(yolo, source)
        assert torch.equal(predict(yolo.model.eval(), x), expected)
        assert yolo.model.names == stock.model.names
    yolo = YOLO(ultralytics_config(model, outputs))
    yolo.load(tmp_path / "stock.pt")
    assert not torch.allclose(predict(yolo.model.eval(), x), expected, rtol=0.1)


def test_weights_for_other_classes():
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    register_ultralytics()
    stock, yolo = YOLO("yolov8n.yaml"), YOLO(ultralytics_config())
    yolo.model = DetectionModel(ultralytics_config(), nc=3, verbose=False)
    load_ultralytics(yolo, stock)
    found, given = yolo.model.state_dict(), stock.model.state_dict()
    assert torch.equal(found["model.22.cv1.conv.weight"], given["model.21.cv1.conv.weight"])
    name = "cv2.0.0.conv.weight"  # the detector's branch for boxes
    assert torch.equal(found[f"model.23.{name}"], given[f"model.22.{name}"])
    assert yolo.model.model[-1].nc == 3


def test_weights_of_another_network():
    from ultralytics import YOLO

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n"))
    before = copy.deepcopy(yolo.model.state_dict())
    for name, message in {
        "yolov8s.yaml": r"expected \(16, 3, 3, 3\) for model.0.conv.weight, got \(32, 3, 3, 3\)",
        "yolo11n.yaml": "expected 23 rows, got 24",
        ultralytics_config("yolov8n"): "expected 23 rows, got 24",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_ultralytics(yolo, YOLO(name))
    with pytest.raises(ValueError, match="got nothing"):
        load_ultralytics(yolo, _fused(YOLO("yolov8n.yaml")))
    with pytest.raises(ValueError, match=r"Use yolo\.load"):
        load_ultralytics(YOLO("yolov8n.yaml"), yolo)
    assert all(torch.equal(before[k], v) for k, v in yolo.model.state_dict().items())


def _fused(yolo):
    yolo.fuse()
    return yolo


# Training, and what becomes of a trained network


def features(network, x):
    """What the detector reads, in float64: the outputs of the blocks."""
    with torch.no_grad():
        maps = network(x)[1]["feats"]
    return torch.cat([m.double().flatten(1) for m in maps], 1)


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
        exact = features(copy.deepcopy(network).double(), x.double())
        cast.append(distance(features(copy.deepcopy(network).to(dtype), x.to(dtype)), exact))
        with torch.autocast("cpu", dtype):
            autocast.append(distance(features(network, x), exact))
    assert cast[0] < 1.5 * cast[1] < 16 * torch.finfo(dtype).eps
    assert autocast[0] < 1.5 * autocast[1] < 16 * torch.finfo(dtype).eps


def test_copies_fusion_and_channels_last(awake):
    network, silent = awake
    x = torch.rand(2, 3, 64, 96)
    expected = features(network, x)
    assert distance(features(silent, x), expected) > 0.5
    assert torch.equal(features(copy.deepcopy(network), x), expected)
    assert torch.equal(features(pickle.loads(pickle.dumps(network)), x), expected)
    fused = copy.deepcopy(network).fuse(verbose=False)
    assert fused.is_fused()
    assert distance(features(fused, x), expected) < 1e-6
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    y = x.to(memory_format=torch.channels_last)
    assert distance(features(last, y), expected) < 1e-6
    block = next(iter(blocks(last.model).values()))
    out = block(torch.rand(2, 64, 8, 12).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_deterministic(awake, poisoned):
    network = copy.deepcopy(awake[0]).train()
    x = torch.rand(2, 3, 64, 64)
    twice = []
    for _ in range(2):
        network.zero_grad()
        sum(m.square().sum() for m in network(x)["feats"]).backward()
        twice.append({n: p.grad for n, p in network.named_parameters() if p.grad is not None})
    assert any("attention" in name for name in twice[0])
    assert all(torch.equal(grad, twice[1][name]) for name, grad in twice[0].items())
