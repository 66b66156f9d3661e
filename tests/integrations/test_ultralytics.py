"""Double attention in Ultralytics' YOLO, from a YAML row to an exported network."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import da_triton
from da_triton.integrations import ultralytics as ours
from da_triton.integrations.ultralytics import (
    load_ultralytics,
    register_ultralytics,
    ultralytics_config,
)
from support import photographs

pytestmark = pytest.mark.xdist_group("ultralytics")

NAMES = ("DoubleAttention", "ResidualDoubleAttention")
FILES = sorted(file.name for file in ours.CONFIGS.iterdir())
QUICK = {
    "imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False,
}  # fmt: skip
# amp would fetch a network to try it with. A step for each batch, at once at the full rate.
TRAINING = QUICK | {
    "amp": False, "optimizer": "SGD", "lr0": 0.01, "nbs": 2, "warmup_epochs": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory):
    with photographs.quiet_ultralytics(tmp_path_factory.mktemp("settings")):
        yield


@pytest.fixture
def tasks(monkeypatch):
    """The library's namespace and callbacks as they are before a registration."""
    from ultralytics.nn import tasks
    from ultralytics.utils import callbacks

    for name in NAMES:
        monkeypatch.delattr(tasks, name, raising=False)
    default = [c for c in events(callbacks.default_callbacks) if c is not ours._FOR_WORKERS]
    monkeypatch.setitem(callbacks.default_callbacks, "on_pretrain_routine_start", default)
    return tasks


def events(callbacks):
    return callbacks["on_pretrain_routine_start"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return photographs.write(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """YOLOv8n with blocks on its outputs after two epochs."""
    from ultralytics import YOLO

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n", outputs=True))
    runs = tmp_path_factory.mktemp("runs")
    yolo.train(data=str(data), epochs=2, project=str(runs), name="first", **TRAINING)
    return yolo


def fresh(code, directory, *arguments, **environment):
    """Runs a program in a process that has imported nothing of ours."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    path = os.pathsep.join([str(Path(da_triton.__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def awaken(network):
    """Random weights that matter, in the blocks and in all normalisations."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def blocks(layers):
    rows = enumerate(layers)
    return {i: layer for i, layer in rows if isinstance(layer, ours.ResidualDoubleAttention)}


def predict(network, x):
    """Boxes and scores of all anchors."""
    with torch.no_grad():
        out = network(x)
    return out[0] if isinstance(out, (tuple, list)) else out


# Registration


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


def test_training(trained, data):
    network = trained.model
    assert list(blocks(network.model)) == [16, 20, 24]
    assert all(block.norm.weight.any() for block in blocks(network.model).values())
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert network.names == dict(enumerate(photographs.CLASSES))
    losses = Path(trained.trainer.save_dir, "results.csv").read_text().splitlines()
    assert len(losses) == 3  # a header and two epochs
    metrics = trained.val(data=str(data), **QUICK)
    assert np.isfinite(list(metrics.results_dict.values())).all()


def test_fresh_process(trained, data, tmp_path):
    """Which knows nothing of the blocks but what the checkpoint brings."""
    from ultralytics import YOLO

    best, image = trained.trainer.best, data.parent / "images/bus.jpg"
    x = torch.rand(2, 3, 64, 64)
    torch.save([x, QUICK, TRAINING], tmp_path / "given.pt")
    code = """if True:
        import sys
        import torch
        from ultralytics import YOLO
        best, image, data, runs = sys.argv[1:]
        torch.set_num_threads(1)
        x, quick, training = torch.load("given.pt")
        assert not any(name.startswith("da_triton") for name in sys.modules)
        yolo = YOLO(best)
        with torch.no_grad():
            maps = yolo.model(x)[0]
        boxes = yolo.predict(image, conf=1e-4, **quick)[0].boxes.data
        fitness = yolo.val(data=data, **quick).fitness
        traced = torch.jit.load(yolo.export(format="torchscript", imgsz=64, device="cpu"))(x[:1])
        yolo.train(data=data, epochs=1, project=runs, name="second", **training)
        torch.save([maps, boxes, fitness, traced, yolo.model.state_dict()], "found.pt")
    """
    done = fresh(code, tmp_path, best, image, data, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    maps, boxes, fitness, traced, after = torch.load(tmp_path / "found.pt", weights_only=False)

    yolo = YOLO(best)
    before = copy.deepcopy(yolo.model.state_dict())
    torch.testing.assert_close(predict(yolo.model, x), maps)
    torch.testing.assert_close(traced, maps[:1], rtol=1e-4, atol=1e-3)
    here = yolo.predict(image, conf=1e-4, **QUICK)[0].boxes.data
    assert len(here)
    torch.testing.assert_close(here, boxes, rtol=1e-4, atol=1e-3)
    assert fitness == pytest.approx(yolo.val(data=str(data), **QUICK).fitness)
    assert after.keys() == before.keys()
    moved = "model.24.norm.weight"
    assert not torch.equal(after[moved], before[moved])
    kept = "model.24.attention.convA.weight"  # two small steps do not hide where they began
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0.01)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx(trained, dynamic, tmp_path):
    import onnxruntime
    from ultralytics import YOLO

    yolo = YOLO(trained.trainer.best)
    for block in blocks(yolo.model.model).values():
        torch.nn.init.uniform_(block.norm.weight, 0.5, 1.5)
    silent = copy.deepcopy(yolo.model)
    for block in blocks(silent.model).values():
        torch.nn.init.zeros_(block.norm.weight)
    yolo.save(tmp_path / "network.pt")
    yolo = YOLO(tmp_path / "network.pt")
    network = copy.deepcopy(yolo.model)
    options = {"dynamic": dynamic, "simplify": False, "device": "cpu"}
    file = yolo.export(format="onnx", imgsz=(64, 96), **options)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in [(1, 3, 64, 96), *([(2, 3, 96, 64), (1, 3, 128, 96)] if dynamic else [])]:
        x = torch.rand(shape)
        (found,) = map(torch.from_numpy, session.run(None, {"images": x.numpy()}))
        expected = predict(network, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(predict(silent, x), expected, rtol=1e-4, atol=1e-3)


def trainer_of(path, data, directory):
    from ultralytics.models.yolo.detect import DetectionTrainer

    # What it sets to be deterministic, only the end of its training would take back.
    options = {"data": str(data), "epochs": 1, "project": str(directory), "deterministic": False}
    return DetectionTrainer(overrides={"model": path, **options, **TRAINING})


def test_worker_of_distributed_training(data, tmp_path):
    """The script that the library writes for its workers, run as it is."""
    from ultralytics.utils import dist

    register_ultralytics()
    trainer = trainer_of(ultralytics_config("yolo11n"), data, tmp_path)
    code = Path(dist.generate_ddp_file(trainer)).read_text()
    assert "da_triton" not in code
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(trainer.save_dir, "weights", "last.pt").exists()


def test_what_makes_a_worker_know(tasks, data, tmp_path):
    """The callback, where it is given the path of a YAML file, or a block."""
    from ultralytics.utils import dist
    from ultralytics.utils.patches import torch_load

    def state(of):
        """What a worker reads, once this process has forgotten the names."""
        file = Path(dist.generate_ddp_file(of)).with_suffix(".pt")
        for name in NAMES:
            delattr(tasks, name)
        return torch_load(file)

    path = ultralytics_config("yolov8n")
    register_ultralytics()
    trainer = trainer_of(path, data, tmp_path)
    assert state(trainer)["model"] == path
    assert all(hasattr(tasks, name) for name in NAMES)
    trainer.callbacks = {}
    state(trainer)
    assert not any(hasattr(tasks, name) for name in NAMES)
    with pytest.raises(KeyError, match="ResidualDoubleAttention"):
        tasks.DetectionModel(path, verbose=False)
    register_ultralytics()
    trainer.model = trainer.get_model(cfg=path, verbose=False)
    network = state(trainer)["model"]
    tasks.DetectionModel(network.yaml, verbose=False).load(network, verbose=False)


def test_restricted_loading(trained, tmp_path):
    """ULTRALYTICS_SAFE_LOAD imports nothing for a checkpoint; who has registered can load it."""
    code = """if True:
        import sys
        from da_triton.integrations.ultralytics import register_ultralytics
        assert "ultralytics" not in sys.modules
        from ultralytics import YOLO
        from ultralytics.nn.tasks import DetectionModel, _SafeLoad
        assert _SafeLoad.restricted()
        try:
            YOLO(sys.argv[1])
        except TypeError as error:
            assert "references types outside" in str(error)
        else:
            raise SystemExit("loaded unknown types")
        register_ultralytics()
        yolo = YOLO(sys.argv[1])
        DetectionModel(yolo.model.yaml, verbose=False).load(yolo.model, verbose=False)
    """
    done = fresh(code, tmp_path, trained.trainer.best, ULTRALYTICS_SAFE_LOAD="1")
    assert done.returncode == 0, done.stderr


# Precision, memory formats, copies


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
