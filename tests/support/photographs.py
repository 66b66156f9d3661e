"""Four photographs with boxes for Ultralytics, and the library without the network."""

import contextlib
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

# Pixels; the photographs come with scikit-learn and with Ultralytics.
BOXES = {
    "china.jpg": [("pagoda", 62, 28, 375, 427)],
    "flower.jpg": [("flower", 168, 84, 446, 358), ("flower", 288, 374, 468, 427)],
    "bus.jpg": [("bus", 22, 230, 805, 755), ("person", 50, 400, 245, 905)],
    "zidane.jpg": [("person", 123, 197, 1111, 711), ("person", 747, 41, 1142, 712)],
}
CLASSES = ("person", "bus", "flower", "pagoda")


def write(root):
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
        from ultralytics.utils import checks, dist, events

        directory = home / "Ultralytics"
        directory.mkdir(exist_ok=True)
        (directory / "Arial.ttf").touch()  # nothing is drawn, but it would be fetched
        # Another test may have imported the library before.
        patch.setattr(checks, "ONLINE", False)
        patch.setattr(checks, "USER_CONFIG_DIR", directory)
        patch.setattr(dist, "USER_CONFIG_DIR", directory)
        patch.setattr(events.events, "enabled", False)
        yield
    torch.set_num_threads(threads)
