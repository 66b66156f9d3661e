"""Rows as a run makes them, with times that a test chooses."""

import re

from bench.measure import OK
from bench.report import COLUMNS


def row(provider="torch", mode="forward", launch="eager", workload="tiny", **others):
    facts = {
        "workload": workload, "n": 1, "c": 8, "positions": "4x5", "c_m": 4, "c_n": 4, "heads": 1,
        "device": "cpu", "dtype": "float32", "layout": "nchw", "mode": mode, "launch": launch,
        "provider": provider, "baseline": provider == "eager", "status": OK, "median_ms": 2.0,
        "p20_ms": 1.9, "p80_ms": 2.1, "repetitions": 5, "ratio_to_eager": 1.0, "gb_s": 2.0,
        "tflop_s": 0.01,
    }  # fmt: skip
    assert set(facts) | set(others) <= set(COLUMNS)
    return facts | others


def unpadded(text):
    """Markdown whose cells have one space on either side."""
    return re.sub(" +", " ", text)
