"""load_ultralytics: the weights of a network without double attention."""

import copy
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._pytree import tree_leaves

from da_triton.integrations.ultralytics import (
    load_ultralytics,
    register_ultralytics,
    ultralytics_config,
)
from support.yolo import QUICK, TRAINING, awaken, fresh, predict, trainer_of

pytestmark = [
    pytest.mark.xdist_group("ultralytics"),
    pytest.mark.usefixtures("quiet_ultralytics"),
]


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


def with_a_block(name, at):
    """The library's table ``name`` with a block as row ``at``."""
    import ultralytics

    models = Path(ultralytics.__file__).parent / "cfg/models"
    table = yaml.safe_load(next(models.rglob(name)).read_text())
    rows = []
    for inputs, *rest in table["backbone"] + table["head"]:
        inputs = [j + (j >= at) for j in ([inputs] if isinstance(inputs, int) else inputs)]
        rows.append([inputs if len(inputs) > 1 else inputs[0], *rest])
    rows.insert(at, [-1, 1, "ResidualDoubleAttention", ["c2"]])
    backbone = len(table["backbone"]) + 1
    return table | {"backbone": rows[:backbone], "head": rows[backbone:]}


@pytest.mark.parametrize(
    ("family", "name", "at"),
    [
        ("yolov8-seg", "yolov8n-seg", 10),
        ("yolov8-pose", "yolov8n-pose", 10),
        ("yolov8-obb", "yolov8n-obb", 10),
        ("yolov8-cls", "yolov8n-cls", 9),
        ("yolov8-world", "yolov8n-world", 10),
        ("yolo11-seg", "yolo11n-seg", 11),
        ("yolov10n", "yolov10n", 11),
        ("rtdetr-resnet50", "rtdetr-resnet50", 5),
    ],
)
def test_every_task_and_family(family, name, at, tmp_path):
    from ultralytics import RTDETR, YOLO

    register_ultralytics()
    file = tmp_path / f"{name}-mine.yaml"
    file.write_text(yaml.safe_dump(with_a_block(f"{family}.yaml", at)))
    kind = RTDETR if "rtdetr" in name else YOLO
    stock, model = kind(f"{name}.yaml"), kind(str(file))
    awaken(stock.model)
    if hasattr(stock.model, "txt_feats"):  # random in each network
        model.model.txt_feats = stock.model.txt_feats
    load_ultralytics(model, stock)
    x = torch.rand(1, 3, 160, 160)
    with torch.no_grad():
        expected, found = (tree_leaves(m.model.eval()(x)) for m in (stock, model))
    pairs = [pair for pair in zip(found, expected, strict=True) if torch.is_tensor(pair[0])]
    assert pairs
    assert all(torch.equal(*pair) for pair in pairs)


# After a load


def start_of_training(yolo, data, directory, **options):
    """The weights that ``yolo.train`` begins with."""
    found = {}

    def stop(trainer):
        found.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        raise StopAsyncIteration  # anything that the library does not raise

    yolo.add_callback("on_train_start", stop)
    with pytest.raises(StopAsyncIteration):
        yolo.train(data=str(data), epochs=1, project=str(directory), **TRAINING | options)
    yolo.callbacks["on_train_start"].remove(stop)
    return found


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A checkpoint of YOLOv8n, with the four classes of the photographs."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    yolo = YOLO("yolov8n.yaml")
    yolo.model = awaken(DetectionModel("yolov8n.yaml", nc=4, verbose=False))
    yolo.model.args, yolo.model.task = {}, "detect"
    file = tmp_path_factory.mktemp("stock") / "stock.pt"
    yolo.save(file)
    return file


def differences(found, given):
    return [name for name, value in given.items() if not torch.equal(found[name], value)]


def without_classes(state):
    """Without the detector's branch for classes, which depends on their number."""
    return {name: value for name, value in state.items() if ".cv3." not in name}


@pytest.mark.parametrize("outputs", [False, True])
@pytest.mark.parametrize("before", ["nothing", "load"])
@pytest.mark.parametrize("opened", [False, True])
def test_training_starts_from_what_was_loaded(outputs, before, opened, stock, data, tmp_path):
    """Every parameter and buffer, also where other weights had been loaded before."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n", outputs))
    yolo.model = DetectionModel(ultralytics_config("yolov8n", outputs), nc=4, verbose=False)
    if before == "load":
        YOLO("yolov8n.yaml").save(tmp_path / "other.pt")
        yolo.load(tmp_path / "other.pt")
    load_ultralytics(yolo, YOLO(stock) if opened else stock)
    given = copy.deepcopy(yolo.model.state_dict())
    assert differences(given, YOLO(stock).model.model[0].state_dict(prefix="model.0.")) == []
    assert differences(start_of_training(yolo, data, tmp_path), given) == []


def test_training_of_a_detector_for_other_classes(data, tmp_path):
    """The recipe of most users: 80 classes in the checkpoint, 4 in the data."""
    from ultralytics import YOLO

    register_ultralytics()
    yolo, stock = YOLO(ultralytics_config("yolov8n")), YOLO("yolov8n.yaml")
    awaken(stock.model)
    load_ultralytics(yolo, stock)
    given = copy.deepcopy(yolo.model.state_dict())
    assert differences(start_of_training(yolo, data, tmp_path), without_classes(given)) == []


@pytest.mark.parametrize("resume", [False, True])
def test_training_twice_and_resuming_a_load(resume, stock, data, tmp_path):
    """A load has no run to resume: the library warns, and trains from what was loaded."""
    from ultralytics import YOLO

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n"))
    load_ultralytics(yolo, stock)
    given = copy.deepcopy(yolo.model.state_dict())
    kept = without_classes(given)
    options = {"resume": True} if resume else {}
    assert differences(start_of_training(yolo, data, tmp_path, **options), kept) == []
    assert differences(start_of_training(yolo, data, tmp_path), kept) == []


def test_saving_and_a_worker_that_is_given_a_path(stock, data, tmp_path):
    """A saved network brings blocks and weights to processes that know only its path."""
    from ultralytics import YOLO
    from ultralytics.utils import dist

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n"))
    load_ultralytics(yolo, stock)
    torch.nn.init.normal_(yolo.model.model[10].norm.weight)
    yolo.save(tmp_path / "start.pt")
    still = TRAINING | {"lr0": 0.0, "weight_decay": 0.0}
    trainer = trainer_of(tmp_path / "start.pt", data, tmp_path, **still)
    done = fresh(Path(dist.generate_ddp_file(trainer)).read_text(), tmp_path)
    assert done.returncode == 0, done.stderr
    trained = YOLO(Path(trainer.save_dir, "weights", "last.pt")).model
    given = {name: value.half().float() for name, value in yolo.model.named_parameters()}
    assert differences(dict(trained.named_parameters()), without_classes(given)) == []


def test_prediction_before_and_after_a_load(data, tmp_path):
    """Boxes of the loaded network, not of the one that had predicted before."""
    from ultralytics import YOLO

    register_ultralytics()
    image = data.parent / "images/bus.jpg"
    stock, yolo = YOLO("yolov8n.yaml"), YOLO(ultralytics_config("yolov8n"))
    awaken(stock.model)
    stock.save(tmp_path / "stock.pt")
    options = QUICK | {"conf": 1e-7}
    yolo.predict(image, **options)
    if yolo.model.is_fused():  # by the prediction, in versions before 8.4
        with pytest.raises(ValueError, match=r"neither fused.*predict\(\)"):
            load_ultralytics(yolo, tmp_path / "stock.pt")
        return
    load_ultralytics(yolo, tmp_path / "stock.pt")
    found = yolo.predict(image, **options)[0].boxes.data
    expected = YOLO(tmp_path / "stock.pt").predict(image, **options)[0].boxes.data
    assert len(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
