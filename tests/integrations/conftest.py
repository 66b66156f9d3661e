"""Fixtures of the tests that train with Ultralytics."""

import pytest

from da_triton.integrations import register_ultralytics, ultralytics_config
from da_triton.integrations import ultralytics as ours
from support import yolo as support


@pytest.fixture(scope="module")
def quiet_ultralytics(tmp_path_factory):
    with support.quiet_ultralytics(tmp_path_factory.mktemp("settings")):
        yield


@pytest.fixture
def tasks(monkeypatch, quiet_ultralytics):
    """The library's namespace and callbacks as they are before a registration."""
    from ultralytics.nn import tasks
    from ultralytics.utils import callbacks

    for name in support.NAMES:
        monkeypatch.delattr(tasks, name, raising=False)
    default = [c for c in support.events(callbacks.default_callbacks) if c is not ours._FOR_WORKERS]
    monkeypatch.setitem(callbacks.default_callbacks, "on_pretrain_routine_start", default)
    return tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory, quiet_ultralytics):
    return support.write_photographs(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """YOLOv8n with blocks on its outputs after two epochs."""
    from ultralytics import YOLO

    register_ultralytics()
    yolo = YOLO(ultralytics_config("yolov8n", outputs=True))
    runs = tmp_path_factory.mktemp("runs")
    yolo.train(data=str(data), epochs=2, project=str(runs), name="first", **support.TRAINING)
    return yolo
