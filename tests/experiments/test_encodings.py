"""Text files are UTF-8, whatever the locale."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("experiments/**/*.py"))
# Position of `encoding` among the arguments.
ENCODING = {"read_text": 0, "write_text": 1, "open": 2}


def lacks_encoding(call):
    """Whether a call opens a text file in the encoding of the locale."""
    name = getattr(call.func, "attr", "")
    if name not in ENCODING or getattr(getattr(call.func, "value", None), "id", "") == "Image":
        return False
    mode = ast.unparse(call.args[0]) if name == "open" and call.args else ""
    has_encoding = len(call.args) > ENCODING[name] or "encoding" in {k.arg for k in call.keywords}
    return "b" not in mode and not has_encoding


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("path.write_text(text)", True),
        ("path.write_text(text, 'utf-8')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('a')", True),
        ("path.open('rb')", False),
    ],
)
def test_calls_without_an_encoding_are_found(line, expected):
    assert lacks_encoding(ast.parse(line).body[0].value) == expected


def test_every_text_file_is_utf_8():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                assert not lacks_encoding(node), f"{file}:{node.lineno}: {ast.unparse(node)}"


def test_a_file_of_a_run_is_written_in_an_ascii_locale(tmp_path):
    code = "from experiments.checkpointing.run_folder import open_folder; from pathlib import Path;"
    code += "open_folder(Path(sys.argv[1]), {}, earlier='refuse', texts={'plan.txt': '1\\u00d74'})"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", f"import sys; {code}", str(tmp_path / "run")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **ascii_only}, check=True)
    assert (tmp_path / "run" / "plan.txt").read_bytes() == "1×4\n".encode()
