"""Double attention in other libraries. Each library is imported only when it is used."""

from .accelerate import Report, accelerate, restore
from .openmmlab import register_openmmlab
from .residual import ResidualDoubleAttention
from .resnet import (
    a2_resnet50,
    a2_resnet50_video,
    a2_resnet101,
    a2_resnet152,
    insert_double_attention,
)
from .ultralytics import load_ultralytics, register_ultralytics, ultralytics_config

__all__ = [
    "Report",
    "ResidualDoubleAttention",
    "a2_resnet50",
    "a2_resnet50_video",
    "a2_resnet101",
    "a2_resnet152",
    "accelerate",
    "insert_double_attention",
    "load_ultralytics",
    "register_openmmlab",
    "register_ultralytics",
    "restore",
    "ultralytics_config",
]
