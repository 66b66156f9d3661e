"""Ultralytics trains, saves, reloads, exports and distributes a YOLO with double attention."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from da_triton.integrations.ultralytics import (
    register_ultralytics,
    ultralytics_config,
)
from support.yolo import CLASSES, NAMES, QUICK, TRAINING, blocks, fresh, predict

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
