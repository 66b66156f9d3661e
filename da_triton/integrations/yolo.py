"""``python -m da_triton.integrations.yolo``: Ultralytics' ``yolo`` command with double attention.

    python -m da_triton.integrations.yolo detect train model=yolov8n-double-attention.yaml data=…

The arguments are those of ``yolo``. The name of a YAML file of this package is enough: see
:func:`da_triton.integrations.ultralytics_config`.
"""

import re
import sys
from pathlib import Path

from .ultralytics import register_ultralytics, ultralytics_config


def main() -> None:
    register_ultralytics()
    from ultralytics.cfg import entrypoint

    sys.argv[1:] = map(_with_path, sys.argv[1:])
    entrypoint()


def _with_path(argument: str) -> str:
    ours = re.fullmatch(r"model=((\w+)-double-attention(-outputs)?\.yaml)", argument)
    if not ours or Path(ours[1]).exists():
        return argument
    return f"model={ultralytics_config(ours[2], outputs=bool(ours[3]))}"


if __name__ == "__main__":
    main()
