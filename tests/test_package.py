"""The package for a user: imports, names, required and optional dependencies."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import da_triton
from da_triton.tracing import constant

ROOT = Path(__file__).parents[1]


def python(code, **env):
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False,
        env={**base, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def test_public_names():
    for name in da_triton.__all__:
        assert getattr(da_triton, name) is not None
    assert set(da_triton.__all__) >= {
        "DoubleAttention", "gather", "distribute", "double_attention", "double_attention_block",
    }  # fmt: skip


USE = "import da_triton, torch; print(da_triton.DoubleAttention(8)(torch.ones(1, 8, 4, 4)).shape)"


def test_import_without_a_gpu_and_without_warnings():
    result = python(USE)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 8, 4, 4])" in result.stdout
    assert result.stderr == ""


def test_import_without_triton():
    hide = "import sys; sys.modules['triton'] = None; import importlib.util as u; f = u.find_spec\n"
    hide += "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)\n"
    result = python(hide + USE)
    assert result.returncode == 0, result.stderr
    rejected = python(
        hide + "import da_triton, torch; x = torch.ones(1, 2, 3)\n"
        "da_triton.gather(x, x, backend='triton')"
    )
    assert "Triton is not installed" in rejected.stderr


def test_import_does_not_import_triton():
    result = python("import da_triton, sys; print('da_triton.kernels.gather' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_import_does_not_import_the_compiler():
    """They take seconds, and most processes never compile."""
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "triton"}
    before = python(f"import torch, sys; print(sorted({heavy} & set(sys.modules)))")
    after = python(f"import da_triton, sys; print(sorted({heavy} & set(sys.modules)))")
    assert after.stdout == before.stdout, after.stderr


def test_what_the_compiler_is_told_is_what_pytorch_says():
    ours, theirs = (
        mark(lambda: None) for mark in (constant, torch.compiler.assume_constant_result)
    )
    assert vars(ours) == vars(theirs) != {}


def test_bfloat16_is_rejected_in_the_interpreter_without_the_correction():
    code = "import torch, da_triton; x = torch.ones(1, 2, 3).bfloat16()\n"
    code += "da_triton.gather(x, x, backend='triton')"
    result = python(code, TRITON_INTERPRET="1")
    assert "does not compute bfloat16 correctly" in result.stderr


def test_cpu_tensors_are_rejected_without_the_interpreter():
    code = "import torch, da_triton; x = torch.ones(1, 2, 3)\n"
    code += "da_triton.gather(x, x, backend='triton')"
    result = python(code)
    assert "RuntimeError: backend='triton' cannot run here" in result.stderr
    assert "TRITON_INTERPRET=1" in result.stderr


def test_no_module_uses_a_name_that_is_private_to_another():
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "da_triton").rglob("*.py")}
    own = {path: private_names(tree) for path, tree in trees.items()}
    everyones = set().union(*own.values())
    for path, tree in trees.items():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imported = {name for name in imports_within_the_package(tree) if re.match("_[^_]", name)}
        assert not (used & everyones | imported) - own[path], path


def private_names(tree):
    """Functions, classes, variables and attributes of self that begin with one underscore."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case (
                ast.FunctionDef(name=name)
                | ast.ClassDef(name=name)
                | ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store())
            ):
                found.add(name)
    return {name for name in found if re.match("_[^_]", name)}


def imports_within_the_package(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("da_triton")):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("folder", ["da_triton", "bench", "tests"])
def test_no_assert_in_the_package_and_no_dead_markers(folder):
    for path in (ROOT / folder).rglob("*.py"):
        lines = path.read_text().splitlines()
        if folder == "da_triton":
            assert not [x for x in lines if x.lstrip().startswith("assert ")], path
        assert len(lines) < 460, f"{path} has {len(lines)} lines"
