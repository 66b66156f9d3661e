import json

import pandas as pd
import pytest

from bench import __main__ as cli
from bench import pages
from bench.names import UnknownNameError
from bench.report import COLUMNS
from support.rows import row

TEXT = "before\n<!-- figures: {} -->\nold\n<!-- -->\nafter\n"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "a_cpu"
    folder.mkdir(parents=True)
    rows = [
        row("eager"), row("torch", ratio_to_eager=4.0),
        row("torch", workload="b", ratio_to_eager=1.0), row("torch", status="failed"),
    ]  # fmt: skip
    frame = pd.DataFrame([{"machine": "A card", **r} for r in rows], columns=list(COLUMNS))
    frame.to_csv(folder / "results.csv", index=False)
    facts = {"threads": 2, "torch": "2.14", "date": "2026-11-26T01:02:03"}
    (folder / "environment.json").write_text(json.dumps(facts))
    return tmp_path / "results"


def test_readme_is_what_the_results_make_of_it():
    text = pages.README.read_text(encoding="utf-8")
    assert set(pages.FIGURES) == {name for _, name, _ in pages.MARK.findall(text)}
    assert pages.filled(text, pages.RESULTS) == text, "run `python -m bench readme`"


def test_marked_parts_are_made_anew_and_nothing_else(results):
    text = pages.filled(TEXT.format("cpu"), results)
    assert text.startswith("before\n<!-- figures: cpu -->\nA card, float32, 2 threads")
    assert text.endswith("<!-- -->\nafter\n")
    assert "old" not in text
    assert "| eager | forward | torch | nchw | 2.00 | 1.00 | b |  |" in text
    assert "bench/results/a_cpu/bars.png" in text
    assert pages.filled(text, results) == text


def test_where_nothing_was_measured(results):
    assert pages.NOTHING in pages.filled(TEXT.format("gpu"), results)


def test_unknown_mark(results):
    with pytest.raises(UnknownNameError, match="did you mean 'cpu'"):
        pages.filled(TEXT.format("cpus"), results)


def test_command(tmp_path, monkeypatch, results, capsys):
    monkeypatch.setattr(pages, "RESULTS", results)
    path = tmp_path / "README.md"
    path.write_text(TEXT.format("cpu"))
    assert cli.main(["readme", "--check", "--file", str(path)]) == 1
    assert "old" in path.read_text()
    assert cli.main(["readme", "--file", str(path)]) == 0
    assert cli.main(["readme", "--check", "--file", str(path)]) == 0
    assert "A card" in path.read_text()
