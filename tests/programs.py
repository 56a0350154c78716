"""Whole commands, as a user types them: inside a test's process, and in one of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from biglearn_vae import checkpoint, commands

ROOT = Path(__file__).parents[1]
# A network and a schedule so small that a run takes a second.
SMALL = [
    "device=cpu",
    "model.dim=16",
    "model.heads=2",
    "case.depth=2",
    "case.split=[1,1]",
    "trainer.steps=24",
    "trainer.batch_size=16",
    "trainer.report_every=5",
    "trainer.evaluate_every=12",
    "trainer.checkpoint_every=7",
    "evaluation.draws=2",
    "evaluation.masks=2",
    "evaluation.images=20",
    "evaluation.valid_images=40",
    "evaluation.valid_draws=2",
]


def own_case(folder: Path, name: str, settings: str = "") -> None:
    """Put a case into a folder of settings of one's own: as tiny but for these."""
    (folder / "case").mkdir(parents=True, exist_ok=True)
    text = f"# @package _global_\ndefaults:\n  - tiny\n  - _self_\ncase:\n  name: {name}\n{settings}"
    (folder / f"case/{name}.yaml").write_text(text)


def run_here(monkeypatch, *words: str, script: str = "train") -> int:
    """A script's main program inside this process: its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    try:
        commands.main(getattr(commands, script), config_name=script)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def start(*words: str, cwd: Path, script: str = "train", torchrun: int = 0) -> subprocess.Popen:
    """A script in a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
    command = [sys.executable, *launcher, str(ROOT / "scripts" / f"{script}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def assert_same_runs(a: Path, b: Path, but: int = 0) -> None:
    """To the bit, but for so many lines that the metrics of the second have more."""
    assert metrics(a) == metrics(b)[: len(metrics(b)) - but]
    states = [checkpoint.load(run / "checkpoints" / checkpoint.LATEST) for run in (a, b)]
    for key in ("step", "names", "best"):
        assert states[0][key] == states[1][key]
    torch.testing.assert_close(states[0]["net"], states[1]["net"], rtol=0, atol=0)
    torch.testing.assert_close(states[0]["average"], states[1]["average"], rtol=0, atol=0)
    moments = [[optimizer["state"] for optimizer in state["optimizers"]] for state in states]
    torch.testing.assert_close(moments[0], moments[1], rtol=0, atol=0)
