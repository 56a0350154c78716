"""The main programs of the scripts, inside a test's process."""

import sys

from biglearn_vae import commands


def run_here(monkeypatch, *words: str, script: str = "train") -> int:
    """A script's main program inside this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    try:
        commands.main(getattr(commands, script), config_name=script)
    except SystemExit as stop:
        return stop.code or 0
    return 0
