"""``python -m bench compare OLD.csv NEW.csv``: what got slower beyond the noise of both runs.

A row is slower if the 20th percentile of the new run is above the 80th of the old one, by more than
a margin that the clock and the caches make even without other work. Faster is the reverse. A row
that was timed and now fails or disagrees is a regression, too.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from .measure import OK
from .report import IDENTITY
from .tables import markdown
from .workloads import UsageError

MARGIN = 0.02
KEY = [name for name in IDENTITY if name != "device"]
NEEDED = (*IDENTITY, "status", "median_ms", "p20_ms", "p80_ms", "machine")
SHOWN = ["workload", "dtype", "layout", "mode", "launch", "provider"]
TIMES = {"median_ms_old": "old ms", "median_ms": "new ms", "ratio": "new / old"}
VERDICTS = SLOWER, FASTER, SAME, BROKEN, MISSING = (
    "slower", "faster", "within the noise", "broken", "not in the new run",
)  # fmt: skip
COLUMNS = {SLOWER: TIMES, FASTER: TIMES, BROKEN: {"status": "status"}, MISSING: {}}


def read(path: Path) -> pd.DataFrame:
    """A results file.

    Raises:
        UsageError: it is not one.
    """
    try:
        frame = pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as CSV: {error}.") from error
    if lacking := [name for name in NEEDED if name not in frame]:
        raise UsageError(
            f"{path} is not a results file of `python -m bench`: it lacks {', '.join(lacking)}."
        )
    return frame


def compare(old: pd.DataFrame, new: pd.DataFrame, across: bool = False) -> pd.DataFrame:
    """Rows timed in the old run, with their times in both and a ``verdict``, worst first.

    Raises:
        UsageError: nothing in common, or, but for ``across``, other machines.
    """
    machines = {*old["machine"].unique(), *new["machine"].unique()}
    if len(machines) > 1 and not across:
        named = " and ".join(sorted(map(str, machines)))
        raise UsageError(
            f"the files are of different machines, {named}: their times differ for other reasons "
            "than the code. --across compares them all the same."
        )
    old, new = (frame.drop_duplicates(KEY, keep="last") for frame in (old, new))
    found = old.merge(new, "left", KEY, suffixes=("_old", ""), indicator="found")
    if not (found["found"] == "both").any():
        raise UsageError("the files have no measurement in common.")
    found = found[found["status_old"] == OK]
    verdicts = {  # the first that holds
        MISSING: found["found"] == "left_only",
        BROKEN: found["status"] != OK,
        FASTER: found["p80_ms"] * (1 + MARGIN) < found["p20_ms_old"],
        SLOWER: found["p20_ms"] > found["p80_ms_old"] * (1 + MARGIN),
    }
    verdict = np.select([*verdicts.values()], [*verdicts], SAME)
    found = found.assign(ratio=found["median_ms"] / found["median_ms_old"], verdict=verdict)
    return found.sort_values("ratio", ascending=False)


def regressed(found: pd.DataFrame) -> bool:
    return bool(found["verdict"].isin([SLOWER, BROKEN]).any())


def text(found: pd.DataFrame) -> str:
    """The number of rows with each verdict, and the rows that are not as before."""
    parts = [", ".join(f"{(found['verdict'] == verdict).sum()} {verdict}" for verdict in VERDICTS)]
    for verdict, titles in COLUMNS.items():
        rows = found[found["verdict"] == verdict]
        rows = rows[::-1] if verdict == FASTER else rows  # the largest change first
        if len(rows):
            shown = rows[[*SHOWN, *titles]].rename(columns=titles)
            digits = {"old ms": 3, "new ms": 3, "new / old": 2}
            parts += [f"{verdict.capitalize()}:", markdown(shown, digits)]
    return "\n\n".join(parts)
