"""``python -m bench compare OLD.csv NEW.csv``: what got slower beyond the noise of both runs.

A row is slower if the 20th percentile of the new run is above the 80th of the old one, by more than
a margin that the clock and the caches make even without other work. Faster is the reverse. A row
that was timed and now fails or disagrees is a regression, too.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .measure import OK
from .report import IDENTITY
from .tables import markdown
from .workloads import UsageError

MARGIN = 0.02
KEY = [name for name in IDENTITY if name != "device"]
NEEDED = (*IDENTITY, "status", "median_ms", "p20_ms", "p80_ms", "machine")


@dataclass(frozen=True)
class Comparison:
    slower: pd.DataFrame
    faster: pd.DataFrame
    broken: pd.DataFrame
    missing: pd.DataFrame  # timed in the old run, absent from the new one
    same: int

    @property
    def regressed(self) -> bool:
        return bool(len(self.slower) or len(self.broken))

    def __str__(self) -> str:
        parts = [
            f"{len(self.slower)} slower, {len(self.faster)} faster, {self.same} within the noise, "
            f"{len(self.broken)} broken, {len(self.missing)} not in the new run"
        ]
        names = {k: k for k in ("workload", "dtype", "layout", "mode", "launch", "provider")}
        times = {"median_ms_old": "old ms", "median_ms_new": "new ms", "ratio": "new / old"}
        formats = {"old ms": "{:.3f}", "new ms": "{:.3f}", "new / old": "{:.2f}"}
        for title, frame in (("Slower", self.slower), ("Faster", self.faster)):
            if len(frame):
                shown = frame[[*names, *times]].rename(columns=times)
                parts += [f"{title}:", markdown(shown, formats)]
        if len(self.broken):
            shown = self.broken[[*names, "status_new"]].rename(columns={"status_new": "status"})
            parts += ["Broken:", markdown(shown)]
        if len(self.missing):
            parts += ["Not in the new run:", markdown(self.missing[list(names)])]
        return "\n\n".join(parts)


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


def compare(old: pd.DataFrame, new: pd.DataFrame, across: bool = False) -> Comparison:
    """
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
    both = old.merge(new, on=KEY, suffixes=("_old", "_new"))
    if both.empty:
        raise UsageError("the files have no measurement in common.")
    timed = both["status_old"] == OK
    broken = both[timed & (both["status_new"] != OK)]
    pairs = both[timed & (both["status_new"] == OK)].copy()
    pairs["ratio"] = pairs["median_ms_new"] / pairs["median_ms_old"]
    slower = pairs["p20_ms_new"] > pairs["p80_ms_old"] * (1 + MARGIN)
    faster = pairs["p80_ms_new"] * (1 + MARGIN) < pairs["p20_ms_old"]
    gone = old[old["status"] == OK].merge(new[KEY], on=KEY, how="left", indicator=True)
    return Comparison(
        slower=pairs[slower].sort_values("ratio", ascending=False),
        faster=pairs[faster].sort_values("ratio"),
        broken=broken,
        missing=gone[gone["_merge"] == "left_only"],
        same=int((~slower & ~faster).sum()),
    )
