"""Features of Ultralytics 8.4.140 or newer beyond the oldest supported version."""

from pathlib import Path

import pytest

from da_triton.integrations.ultralytics import register_ultralytics, ultralytics_config
from support.yolo import NAMES, TRAINING, fresh, trainer_of

pytestmark = [
    pytest.mark.xdist_group("ultralytics"),
    pytest.mark.usefixtures("quiet_ultralytics"),
]


def test_worker_of_distributed_training(data, tmp_path):
    """The script that the library writes for its workers, run as it is."""
    from ultralytics.utils import dist

    register_ultralytics()
    trainer = trainer_of(ultralytics_config("yolo11n"), data, tmp_path, **TRAINING)
    code = Path(dist.generate_ddp_file(trainer)).read_text()
    assert "da_triton" not in code
    done = fresh(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(trainer.save_dir, "weights", "last.pt").exists()


def test_workers_register_by_the_callback(tasks, data, tmp_path):
    """The callback, where it is given the path of a YAML file, or a block."""
    from ultralytics.utils import dist
    from ultralytics.utils.patches import torch_load

    def state(of):
        """State that a worker reads, once this process has forgotten the names."""
        file = Path(dist.generate_ddp_file(of)).with_suffix(".pt")
        for name in NAMES:
            delattr(tasks, name)
        return torch_load(file)

    path = ultralytics_config("yolov8n")
    register_ultralytics()
    trainer = trainer_of(path, data, tmp_path, **TRAINING)
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
