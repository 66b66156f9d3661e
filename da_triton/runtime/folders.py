"""Folders of the user that the package reads and writes."""

import os
from pathlib import Path


def cache() -> Path:
    """Folder of verdicts: DA_TRITON_CACHE_DIR, or da_triton in the user's cache."""
    if named := os.environ.get("DA_TRITON_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "da_triton"


def tiles() -> Path:
    """Folder of tuned tile tables: DA_TRITON_TILES, or ``tiles`` in the cache."""
    named = os.environ.get("DA_TRITON_TILES")
    return Path(named) if named else cache() / "tiles"
