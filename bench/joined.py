"""One folder of results for several invocations of ``python -m bench gpu``.

It holds at most eight files: ``results.csv``, ``report.md``, ``environment.json``, plots, the two
files of ``scaling``, and ``logs.tar.gz``, all of the same code. What is added replaces an earlier
row of the same measurement; only a row that was cut short leaves an earlier timing of the same
assembler in place.
"""

import io
import json
import os
import tarfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from . import tables
from .environment import columns
from .measure import OK, Row, cut_short
from .observe import describe
from .report import IDENTITY, PARTIAL, Report, replace

METRICS = ("time", "ratio", "floor", "memory", "launches")
LOGS = "logs.tar.gz"
ROWS = "rows.jsonl"  # in the archive: all that is known of rows, ratios included
LONGEST_LOG = 4 * 2**20  # bytes of a log that are kept, from its end
PTXAS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def assembler() -> str:
    """The ptxas that this run's kernels are made with."""
    return os.environ.get(PTXAS[0]) or "of Triton"


class JoinedReport(Report):
    """The report of all invocations with one folder.

    ``facts`` are those of this invocation's environment. ``logs`` is a folder that its archive is
    unpacked into and made of; ``remarks`` are this invocation's.

    Raises:
        ValueError: the folder has results of other code.
    """

    def __init__(self, out: Path, title: str, logs: Path, facts: dict[str, Any]) -> None:
        super().__init__(out, title, METRICS)
        self.trusts = lambda row: not self.objection(row.get("assembler", assembler()))
        self.logs = logs
        self.remarks: list[str] = []
        for path in out.glob(f"*{PARTIAL}"):  # of an invocation that was killed
            path.unlink()
        known = out / "environment.json"
        earlier = json.loads(known.read_text(encoding="utf-8")) if known.exists() else facts
        if earlier.get("code") != facts.get("code"):
            raise ValueError(f"its results are of other code, {earlier.get('code')}")
        if (out / LOGS).exists():
            with tarfile.open(out / LOGS) as archive:
                archive.extractall(logs, filter="data")
        if (logs / ROWS).exists():
            lines = (logs / ROWS).read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines]
        self.record(**earlier | facts)

    def add(self, rows: Sequence[Row]) -> None:
        """Adds rows, with the machine and date of this invocation, and writes everything."""
        known = {_identity(row): row for row in self.rows}
        for row in rows:
            row |= {**columns(self.environment), "assembler": assembler()}
            earlier = known.get(_identity(row), row)
            timed_alike = (earlier["status"], earlier["assembler"]) == (OK, row["assembler"])
            if not (cut_short(row) and timed_alike):
                known[_identity(row)] = row
        self.rows = [*known.values()]
        self._save()

    def objection(self, made_with: str) -> str:
        """Why nothing that was compiled by some assembler has ratios; empty if it has.

        Ratios need tests that passed, and kernels that gave right results.
        """
        outcome = str(self.environment.get("tests", "they were not run on this code"))
        if not outcome.startswith("passed"):
            return f"THE TESTS DID NOT PASS, so there are raw times only: {outcome}"
        smoke = (self.environment.get("smoke") or {}).get(made_with, {"status": 0})
        if smoke["status"] == 0:
            return ""
        if smoke["status"] == 1:
            return "THE KERNELS GAVE WRONG RESULTS in the smoke check: raw times only."
        return f"THE SMOKE CHECK DID NOT FINISH ({smoke['verdict']}): raw times only."

    def _noted(self) -> Iterator[str]:
        """What the checks say of the rows, remarks, and how long the stages took."""
        if objection := self.objection(assembler()):
            yield objection
        elif assembler() not in (self.environment.get("smoke") or {}):
            yield "The smoke check was not run on this code."
        untrusted = sum(not self.trusts(row) for row in self.rows)
        if 0 < untrusted < len(self.rows):
            yield (
                f"{untrusted} of {len(self.rows)} rows have no ratios: with their assembler, the "
                "smoke check did not pass."
            )
        yield from self.remarks
        if stages := self.environment.get("stages"):
            spent = [(name, stage["seconds"]) for name, stage in stages.items()]
            table = tables.markdown(pd.DataFrame(spent, columns=["stage", "seconds"]))
            yield f"Seconds by stage:\n\n{table}"

    def _save(self) -> None:
        if self.rows:
            super().add([])
        text = "".join(json.dumps(row, default=str) + "\n" for row in self.rows)
        replace(self.logs / ROWS, text)
        self.pack()

    def pack(self) -> None:
        """The logs as one file, replaced in one step."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=5) as archive:
            for path in sorted(self.logs.iterdir()):
                data = path.read_bytes()
                data = data[-LONGEST_LOG:] if path.suffix == ".txt" else data
                member = tarfile.TarInfo(path.name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        replace(self.out / LOGS, packed.getvalue())

    def written(self) -> str:
        """Writes the report; what cannot be drawn does not take the rest with it."""
        self.notes = [*self._noted()]
        try:
            return self.finish(short=True)
        except Exception as error:
            (self.logs / "report-error.txt").write_text(traceback.format_exc(), encoding="utf-8")
            self.notes.append(f"Parts of the report failed: {describe(error)}")
            rows = pd.DataFrame(self.rows).to_string()
            text = "\n\n".join([f"# {self.title}", *self.notes, rows])
            replace(self.out / "report.md", text + "\n")
            return text
        finally:
            self._save()


def _identity(row: Row) -> tuple:
    """A measurement is repeated in each group that compares with it."""
    return tuple(row.get(name) for name in (*IDENTITY, "group"))
