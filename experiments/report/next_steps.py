"""What to do with a finished comparison, as commands."""

from __future__ import annotations

import shlex
from pathlib import Path

from experiments.report.numbers import Data


def next_steps(data: Data, report: Path) -> list[str]:
    """Lines for the console, each with one command.

    Args:
      data: the content of `results.json`.
      report: the page that was written beside it.
    """
    settings, folder = data["settings"], shlex.quote(str(report.parent))
    pattern = settings["patterns"][0]
    methods = [t["method"] for t in data["trials"] if t["part"] == "main"]
    # A dense network has nothing to pack.
    sparse = [name for name in methods if name != "dense"]
    method = "sr_ste" if "sr_ste" in sparse else "".join(sparse[:1])
    lines = [
        f"to read the report: python -m webbrowser {shlex.quote(report.resolve().as_uri())}",
        f"to rank the methods: python -m experiments.ladder {folder}",
    ]
    if method and ":" not in settings["task"]:
        packed = shlex.quote(str(report.parent / "network.safetensors"))
        lines.append(
            "to train one network and pack it: python -m experiments.train "
            f"--task {settings['task']} --method {method} --pattern {pattern} --packed {packed}"
        )
    return lines
