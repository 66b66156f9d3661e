"""Ultralytics trains, saves, reloads, exports and distributes a YOLO with double attention."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from da_triton.integrations import register_ultralytics, ultralytics_config, yolo
from support.yolo import CLASSES, QUICK, TRAINING, blocks, fresh, predict

pytestmark = [
    pytest.mark.xdist_group("ultralytics"),
    pytest.mark.usefixtures("quiet_ultralytics"),
]


def test_training(trained, data):
    network = trained.model
    assert list(blocks(network.model)) == [16, 20, 24]
    assert all(block.norm.weight.any() for block in blocks(network.model).values())
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert network.names == dict(enumerate(CLASSES))
    losses = Path(trained.trainer.save_dir, "results.csv").read_text().splitlines()
    assert len(losses) == 3  # a header and two epochs
    metrics = trained.val(data=str(data), **QUICK)
    assert np.isfinite(list(metrics.results_dict.values())).all()


def test_fresh_process(trained, data, tmp_path):
    """A process that only loads the checkpoint."""
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
            predicted = yolo.model(x)[0]
        boxes = yolo.predict(image, conf=1e-4, **quick)[0].boxes.data
        fitness = yolo.val(data=data, **quick).fitness
        traced = torch.jit.load(yolo.export(format="torchscript", imgsz=64, device="cpu"))(x[:1])
        yolo.train(data=data, epochs=1, project=runs, name="second", **training)
        torch.save([predicted, boxes, fitness, traced, yolo.model.state_dict()], "found.pt")
    """
    done = fresh(code, tmp_path, best, image, data, tmp_path / "runs")
    assert done.returncode == 0, done.stderr
    predicted, boxes, fitness, traced, after = torch.load(tmp_path / "found.pt", weights_only=False)

    yolo = YOLO(best)
    before = copy.deepcopy(yolo.model.state_dict())
    torch.testing.assert_close(predict(yolo.model, x), predicted)
    torch.testing.assert_close(traced, predicted[:1], rtol=1e-4, atol=1e-3)
    here = yolo.predict(image, conf=1e-4, **QUICK)[0].boxes.data
    assert len(here)
    torch.testing.assert_close(here, boxes, rtol=1e-4, atol=1e-3)
    assert fitness == pytest.approx(yolo.val(data=str(data), **QUICK).fitness)
    assert after.keys() == before.keys()
    moved = "model.24.norm.weight"
    assert not torch.equal(after[moved], before[moved])
    kept = "model.24.attention.convA.weight"  # two small steps do not hide where they began
    torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("dynamic", "opset"), [(False, None), (True, None), pytest.param(False, 11, id="opset11")]
)
def test_onnx(trained, dynamic, opset, tmp_path):
    """Opset 11 is what some boards' compilers accept."""
    import onnx
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
    options = {"dynamic": dynamic, "opset": opset, "simplify": False, "device": "cpu"}
    file = yolo.export(format="onnx", imgsz=(64, 96), **options)
    if opset is not None:
        assert onnx.load(file).opset_import[0].version == opset
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for shape in [(1, 3, 64, 96), *([(2, 3, 96, 64), (1, 3, 128, 96)] if dynamic else [])]:
        x = torch.rand(shape)
        (found,) = map(torch.from_numpy, session.run(None, {"images": x.numpy()}))
        expected = predict(network, x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        assert not torch.allclose(predict(silent, x), expected, rtol=1e-4, atol=1e-3)


def test_interrupted_training_is_resumed(data, tmp_path):
    from ultralytics import YOLO

    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    register_ultralytics()
    first = YOLO(ultralytics_config("yolov8n"))
    first.add_callback("on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        first.train(data=str(data), epochs=2, project=str(tmp_path), **TRAINING)
    second = YOLO(first.trainer.last)
    second.train(resume=True)
    assert (second.trainer.start_epoch, second.trainer.epoch) == (1, 1)
    assert second.trainer.save_dir == first.trainer.save_dir
    assert list(blocks(YOLO(second.trainer.best).model.model)) == [10]


# Command line


def test_command_line(data, tmp_path):
    """By the name of one of the package's files, in a process that has registered nothing."""
    from ultralytics import YOLO

    options = TRAINING | {"data": data, "epochs": 1, "project": tmp_path, "name": "run"}
    arguments = [f"{key}={value}" for key, value in options.items()]
    model = "model=yolo11n-double-attention.yaml"
    done = fresh_module(
        "da_triton.integrations.yolo", tmp_path, "detect", "train", model, *arguments
    )
    assert done.returncode == 0, done.stderr
    last = tmp_path / "run/weights/last.pt"
    assert list(blocks(YOLO(last).model.model)) == [11]
    # A checkpoint needs no more than the library's own command.
    options = QUICK | {"data": data, "project": tmp_path, "name": "val"}
    arguments = [f"{key}={value}" for key, value in options.items()]
    done = fresh_module("ultralytics.cfg.__init__", tmp_path, "val", f"model={last}", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "val").is_dir()


def fresh_module(name, directory, *arguments):
    code = f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"
    return fresh(code, directory, *arguments)


def test_names_on_the_command_line(monkeypatch, tmp_path):
    """Those of the package's files become paths; others, and files that are there, do not."""
    monkeypatch.chdir(tmp_path)
    name = "yolov8s-double-attention-outputs.yaml"
    path = ultralytics_config("yolov8s", outputs=True)
    assert yolo._with_path(f"model={name}") == f"model={path}"
    assert yolo._with_path("model=yolo11n-double-attention.yaml").endswith(
        "configs/yolo11n-double-attention.yaml"
    )
    for argument in ("train", f"data={name}", "model=yolov8n.pt", f"model=mine/{name}"):
        assert yolo._with_path(argument) == argument
    with pytest.raises(ValueError, match=r"one of yolov8n, .*, got 'yolov5n'"):
        yolo._with_path("model=yolov5n-double-attention.yaml")
    (tmp_path / name).touch()
    assert yolo._with_path(f"model={name}") == f"model={name}"
