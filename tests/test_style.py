"""The shape of train_gpt.py, and ruff's rules for every file."""

import ast
import subprocess
import sys

from conftest import ROOT

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_the_functions_of_the_script_have_at_most_60_lines():
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
