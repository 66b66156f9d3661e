"""Four photographs with boxes for Ultralytics, and the library without the network."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import da_triton
from da_triton.integrations import ultralytics as ours

NAMES = ("DoubleAttention", "ResidualDoubleAttention")

# Pixels; the photographs come with scikit-learn and with Ultralytics.
BOXES = {
    "china.jpg": [("pagoda", 62, 28, 375, 427)],
    "flower.jpg": [("flower", 168, 84, 446, 358), ("flower", 288, 374, 468, 427)],
    "bus.jpg": [("bus", 22, 230, 805, 755), ("person", 50, 400, 245, 905)],
    "zidane.jpg": [("person", 123, 197, 1111, 711), ("person", 747, 41, 1142, 712)],
}
CLASSES = ("person", "bus", "flower", "pagoda")


def write_photographs(root):
    """Writes them, small, as the library reads them; gives the path of data.yaml."""
    import cv2
    import sklearn.datasets
    import ultralytics

    places = (
        Path(sklearn.datasets.__file__).parent / "images",
        Path(ultralytics.__file__).parent / "assets",
    )
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for name, boxes in BOXES.items():
        image = cv2.imread(str(next(p / name for p in places if (p / name).exists())))
        height, width = image.shape[:2]
        small = cv2.resize(image, (96 * width // height, 96), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(root / "images" / name), small)
        lines = [
            f"{CLASSES.index(kind)} {(x0 + x1) / 2 / width} {(y0 + y1) / 2 / height} "
            f"{(x1 - x0) / width} {(y1 - y0) / height}\n"
            for kind, x0, y0, x1, y1 in boxes
        ]
        (root / "labels" / name).with_suffix(".txt").write_text("".join(lines))
    file = root / "data.yaml"
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(CLASSES))
    file.write_text(f"path: {root}\ntrain: images\nval: images\nnames:\n{names}")
    return file


@contextlib.contextmanager
def quiet_ultralytics(home):
    """The library, with its settings in a directory of the test's, and without the network."""
    threads = torch.get_num_threads()
    quiet = {"YOLO_CONFIG_DIR": str(home), "YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}
    with mock.patch.dict(os.environ, quiet), pytest.MonkeyPatch.context() as patch:
        import matplotlib
        from ultralytics.utils import checks, dist

        try:
            from ultralytics.utils.events import events
        except ImportError:  # before 8.3.200
            from ultralytics.hub.utils import events

        directory = home / "Ultralytics"
        directory.mkdir(exist_ok=True)
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        shutil.copy(fonts / "DejaVuSans.ttf", directory / "Arial.ttf")  # which it would download
        # Another test may have imported the library before.
        patch.setattr(checks, "ONLINE", False)
        patch.setattr(checks, "USER_CONFIG_DIR", directory)
        patch.setattr(dist, "USER_CONFIG_DIR", directory)
        patch.setattr(events, "enabled", False)
        yield
    torch.set_num_threads(threads)


QUICK = {
    "imgsz": 64, "batch": 2, "workers": 0, "device": "cpu", "plots": False, "verbose": False,
}  # fmt: skip
# amp would fetch a network to try it with. A step for each batch, at once at the full rate.
TRAINING = QUICK | {
    "amp": False, "optimizer": "SGD", "lr0": 0.01, "nbs": 2, "warmup_epochs": 0,
}  # fmt: skip


def fresh(code, directory, *arguments, **environment):
    """Runs a program in a process that has not imported da_triton."""
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


def features(network, x):
    """The feature maps that the detector reads; the form of its output depends on the version."""
    found = []
    hook = network.model[-1].register_forward_pre_hook(lambda _, inputs: found.extend(inputs[0]))
    network(x)
    hook.remove()
    return found


def trainer_of(path, data, directory, **options):
    from ultralytics.models.yolo.detect import DetectionTrainer

    # What it sets to be deterministic, only the end of its training would take back.
    options = {"data": str(data), "epochs": 1, "project": str(directory), **options}
    return DetectionTrainer(overrides={"model": str(path), "deterministic": False} | options)


def events(callbacks):
    return callbacks["on_pretrain_routine_start"]
