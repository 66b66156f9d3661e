"""Every recipe of the README runs as it stands, in at most ten lines."""

import re
from pathlib import Path

import pytest
import torch

from support import hub, yolo
from support.published import DoubleAttentionCopy


class TheirBlock(DoubleAttentionCopy):
    def __init__(self):
        super().__init__(16, c_m=8, c_n=4)


README = Path(__file__).parents[1] / "README.md"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Inputs that a recipe assumes.
GIVEN = {
    "images": lambda: torch.randn(2, 3, 32, 32),
    "clips": lambda: torch.randn(1, 3, 4, 64, 64),
    "steps": lambda: torch.tensor([1, 500]),
    "video": lambda: torch.randn(3, 1, 16, 4, 4),
    "samples": lambda: [torch.randn(16, 3, 4), torch.randn(16, 2, 5)],
    "padded": lambda: torch.randn(2, 16, 4, 6),
    "TheirBlock": lambda: TheirBlock,
    "rows_of_this_rank": lambda: torch.randn(1, 16, 3, 8),
}


def recipes():
    text = README.read_text(encoding="utf-8")
    section = re.search(r"^## In your network\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)[1]
    found = []
    for part in section.split("\n### ")[1:]:
        title = part.splitlines()[0]
        codes = CODE.findall(part)
        found += [(f"{title} {i}" if i else title, code) for i, code in enumerate(codes)]
    return found


RECIPES = recipes()


def test_every_integration_has_a_recipe():
    titles = " ".join(title for title, _ in RECIPES)
    for name in (
        "torchvision", "Ultralytics", "timm", "OpenMMLab", "have such layers", "frame by frame",
        "kernels", "different sizes", "over devices", "Export", "looks",
    ):  # fmt: skip
        assert name in titles


@pytest.fixture
def ultralytics(tmp_path):
    yolo.write_photographs(tmp_path)
    with yolo.quiet_ultralytics(tmp_path):
        yield


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.xdist_group("ultralytics")
@pytest.mark.parametrize("code", [code for _, code in RECIPES], ids=[t for t, _ in RECIPES])
def test_recipe(code, tmp_path, monkeypatch, request):
    assert len(code.strip().splitlines()) <= 10
    if "ultralytics" in code:
        request.getfixturevalue("ultralytics")
    if "torch.distributed" in code:
        request.getfixturevalue("one_rank")
    monkeypatch.chdir(tmp_path)
    given = GIVEN | {"path": lambda: hub.publish(tmp_path)}
    names = {name: make() for name, make in given.items() if re.search(rf"\b{name}\b", code)}
    exec(compile(code, str(README), "exec"), names)
