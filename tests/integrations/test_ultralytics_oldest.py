"""The tests of Ultralytics on the oldest supported version.

pip puts it in a folder of its own, without dependencies, which takes a second. The newest version,
which the other tests run on, stays as it is. Without a package index this fails: nothing else would
show that the oldest version still works.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("test_ultralytics.py", "test_ultralytics_weights.py", "test_ultralytics_training.py")
PROGRAM = """if True:
    import importlib.util, sys
    import pytest
    folder, *arguments = sys.argv[1:]
    found = importlib.util.find_spec("ultralytics").origin
    assert found.startswith(folder), f"{found} is not in {folder}"
    sys.exit(pytest.main(arguments))
"""


@pytest.mark.xdist_group("ultralytics_oldest")
def test_oldest_version(tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'"ultralytics>=([\d.]+)"', project)
    folder = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={folder}"]
    done = subprocess.run([*pip, f"ultralytics=={oldest}"], capture_output=True, text=True)
    assert done.returncode == 0, f"pip cannot install ultralytics=={oldest}:\n{done.stderr}"

    arguments = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'tests'}"]
    # The oldest version exports with PyTorch's dynamo exporter, which starts at opset 18.
    arguments += ["-k", "not opset11"]
    files = [f"tests/integrations/{name}" for name in FILES]
    path = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *arguments, *files],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^\d+ passed, 1 deselected", done.stdout.splitlines()[-1]), done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]
