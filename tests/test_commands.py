"""What scripts do, called from a program or notebook of one's own."""

import json
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from programs import SMALL, assert_same_runs, run_here

import biglearn_vae as blv
from biglearn_vae import checkpoint
from biglearn_vae.trainer import Interrupted

# Masks that ask for an end of the training that draws them, the 30th time that they are drawn.
SIGNALLED = """
import signal
from biglearn_vae import MaskSampler
DRAWN = 0
class Signalled(MaskSampler):
    def draw(self, *sizes):
        global DRAWN
        DRAWN += 1
        if DRAWN == 30:
            signal.raise_signal(signal.SIGTERM)
        return super().draw(*sizes)
"""


def command_of(run: Path) -> list[str]:
    return shlex.split(json.loads((run / "environment.json").read_text())["command"])


def test_what_is_called_is_what_is_typed(here, monkeypatch, capsys):
    tf32 = torch.backends.cudnn.allow_tf32
    found = blv.run_script("train", [*SMALL, "name=called"])
    assert torch.backends.cudnn.allow_tf32 == tf32
    assert run_here(monkeypatch, *SMALL, "name=typed") == 0
    assert_same_runs(here / "outputs/called", here / "outputs/typed")
    assert found.pop("run") == "outputs/called"
    assert found == json.loads(Path("outputs/called/summary.json").read_text())
    assert command_of(Path("outputs/called")) == ["-m", "biglearn_vae", "train", *SMALL, "name=called"]
    capsys.readouterr()
    assert blv.run_script("train", [*SMALL, "name=called"]) == {"run": "outputs/called"} | found
    assert "outputs/called is finished: 24 steps" in capsys.readouterr().out
    words = ["run=outputs/called", "train_images=60", "test_images=20", "draws=1"]
    probe = blv.run_script("probe", words)
    assert probe == json.loads(Path("outputs/called/probe.json").read_text())
    assert probe["environment"]["command"] == " ".join(["-m biglearn_vae probe", *words])
    page = blv.run_script("figures", ["run=outputs/called", "figures=interpolation", "images=2"])
    assert page == Path("outputs/called/figures/index.html") and page.exists()


def test_stage_1_has_settings_of_another_name(here):
    small = ["data=digits", "data.patch_size=4", "model.width=8", "trainer.steps=2", "device=cpu"]
    found = blv.run_script("train", small, config_name="patch_ae")
    assert (Path(found["run"]) / "patch_ae.pt").exists()
    assert command_of(Path(found["run"])) == ["-m", "biglearn_vae", "train", "--config-name=patch_ae", *small]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "script must be train, evaluate, figures, complete, probe, benchmark or reproduce, got 'trian'"),
        (("train", "case=case1"), "expected a list of settings, such as ['case=case1'], got the text 'case=case1'"),
        (("train", [1]), "1 cannot be read: expected NAME=VALUE"),
        (("train", ["-m", "seed=0"]), "'-m' cannot be read: expected NAME=VALUE"),
        (("train", ["seed=0,1"]), "seed=0,1 gives several values"),
        (("train", ["hydra.mode=MULTIRUN"]), "hydra.mode=MULTIRUN is Hydra's, which starts scripts"),
        (("train", ["seed=1", "hydra.run.dir=x"]), "hydra.run.dir=x is Hydra's, which starts scripts"),
        (("train", None), "expected a list of settings, such as ['seed=1'], got None"),
        (("train", ["optim.lrr=1"]), "optim.lrr: there is no such setting; did you mean optim.lr"),
        (("train", ["data=array_file"]), "data.root=... must be given: the .npz or .npy file"),
        (("train", [], "probe"), "config_name must be train or patch_ae, got 'probe'"),
        (("probe",), "run=... must be given: folder of the run"),
        (("probe", ["run=nothing"]), "there is no run in nothing"),
    ],
)
def test_errors_say_what_to_do(here, arguments, message):
    with pytest.raises(ValueError) as error:
        blv.run_script(*arguments)
    assert message in str(error.value)
    assert not any(here.iterdir())


def test_calls_in_threads_take_turns(here):
    words = [*SMALL, "trainer.steps=2"]
    tf32 = torch.backends.cudnn.allow_tf32
    found = [blv.run_script("train", [*words, "name=alone"])]
    with ThreadPoolExecutor(2) as pool:
        found += pool.map(lambda name: blv.run_script("train", [*words, f"name={name}"]), ("a", "b"))
    assert found[0]["test_joint_elbo"] == found[1]["test_joint_elbo"] == found[2]["test_joint_elbo"]
    assert [command_of(Path(run["run"]))[-1] for run in found] == ["name=alone", "name=a", "name=b"]
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_an_interrupted_training_is_no_result(here, monkeypatch, capsys):
    (here / "signalled.py").write_text(SIGNALLED)
    monkeypatch.syspath_prepend(here)
    words = [*SMALL, "masks._target_=signalled.Signalled"]
    for module in ("called", "typed"):
        sys.modules.pop("signalled", None)
        if module == "called":
            with pytest.raises(Interrupted) as stopped:
                blv.run_script("train", [*words, "name=called", "trainer.steps=100"])
            assert stopped.value.kept
        else:
            assert run_here(monkeypatch, *words, "name=typed", "trainer.steps=100") == 0
        step = checkpoint.load(Path("outputs", module, "checkpoints", checkpoint.LATEST))["step"]
        assert f"stopped at step {step} of 100; a checkpoint is written, the same command" in capsys.readouterr().out
    assert blv.run_script("train", [*words, "name=called", "trainer.steps=100"])["steps"] == 100
    # What a measuring script trains is not kept, and there is nothing to go on from.
    sys.modules.pop("signalled")
    assert run_here(monkeypatch, "run=outputs/called", "regressor_steps=50", "images=4", script="complete") == 2
    assert "error: interrupted\n" in capsys.readouterr().err


def test_settings_of_ones_own_folder_are_found_but_for_a_sweep(here):
    (here / "own").mkdir()
    text = "defaults: [train, _self_]\ntrainer:\n  steps: 2\n"
    (here / "own/mine.yaml").write_text(text)
    (here / "own/many.yaml").write_text(f"{text}hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 0,1\n")
    try:
        blv.config.search_also("own")
        words = [word for word in SMALL if not word.startswith("trainer.steps")]
        found = blv.run_script("train", words, config_name="mine")
        assert found["steps"] == 2
        expected = ["-m", "biglearn_vae", "train", "--config-name=mine", f"--config-dir={here / 'own'}", *words]
        assert command_of(Path(found["run"])) == expected
        with pytest.raises(ValueError, match=r"many is a sweep \(hydra.mode: MULTIRUN\), which is started as a script"):
            blv.run_script("train", words, config_name="many")
    finally:
        blv.config.search_also(None)
