"""Replaces layers that are double attention under any name, after proving that they are."""

from .search import Report, accelerate, restore

__all__ = ["Report", "accelerate", "restore"]
