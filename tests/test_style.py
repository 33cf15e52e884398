"""The shape of train_gpt.py, ruff's rules for every file, and the help of every tool."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT

SOURCE = (ROOT / "train_gpt.py").read_text(encoding="utf-8")


def test_the_functions_of_the_script_have_at_most_60_lines():
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_ruff_finds_nothing():
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


PLACES = "*/*.py", "tests/*/*.py", "records/ideas/*.py"
TOOLS = [path for place in PLACES for path in sorted(ROOT.glob(place))
         if "ArgumentParser(" in path.read_text(encoding="utf-8") and path != Path(__file__)]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.name)
def test_a_tools_help_is_the_same_where_python_drops_docstrings(tool, monkeypatch, capsys):
    """As python -OO does, and PYTHONOPTIMIZE=2; test_settings has train_gpt.py's."""
    monkeypatch.setattr(sys, "path", [str(tool.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", [tool.name, "--help"])
    shown = []
    for optimize in (0, 2):
        code = compile(tool.read_text(encoding="utf-8"), tool, "exec", optimize=optimize)
        with pytest.raises(SystemExit, match="0"):
            exec(code, dict(__name__="__main__", __file__=str(tool)))
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "\noptions:\n" in shown[0]
