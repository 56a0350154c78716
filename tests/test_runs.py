"""Runs: names, what is in a folder, and that nothing in one is lost."""

import errno
import json
import os
import re
import shutil
import signal
import time

import pytest
import torch
from omegaconf import OmegaConf
from programs import SMALL, assert_same_runs, finish, metrics, run_here, start

from biglearn_vae import checkpoint, commands, config, files, runs
from biglearn_vae.files import read_json


def test_run_names():
    def name(*overrides):
        return runs.name_of(config.compose(list(overrides)), overrides)

    assert name() == "digits-tiny-biglearn_u-seed0"
    assert name("case=case4", "data=mnist", "data.root=/somewhere", "trainer.steps=9") == "mnist-case4-biglearn_u-seed0"
    assert name("method=vae", "seed=3", "optim.lr=1e-3") == "digits-tiny-vae-seed3-optim.lr-0.001"
    assert name("method=vae", "seed=3", "optim.lr=0.0010") == "digits-tiny-vae-seed3-optim.lr-0.001"  # as in a sweep
    assert name("trainer.cuda_graph=false", "trainer.compile=true", "device=cpu") == "digits-tiny-biglearn_u-seed0"
    assert name("name=mine", "optim.lr=1e-4") == "mine"
    assert name("data=image_folder", "data.root=/pictures/cats") == "cats-tiny-biglearn_u-seed0"
    assert name("data=array_file", "data.root=/arrays/cats.1.npz") == "cats.1-tiny-biglearn_u-seed0"
    words = ("data=torch_dataset", "data._target_=my_data.Slices", "data.root=/scans", "+data.year=2020")
    assert name(*words) == "Slices-tiny-biglearn_u-seed0--data.year-2020"
    assert len(name(*[f"optim.lr={k}e-{k}" for k in range(10, 60)])) < 100
    assert name("output_dir=a/b", "masks.s_ratio=[1,2]") == "digits-tiny-biglearn_u-seed0-masks.s_ratio-1-2"
    for bad in (".", "..", "../up", "a/../../b", "/absolute"):
        with pytest.raises(ValueError, match="name must be that of a folder in output_dir"):
            name(f"name={bad}")
    assert name("name=a/b") == "a/b" and name("name=2024") == "2024"


def test_a_sweep_over_data_that_share_their_name_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    text = (config.folder() / "data/digits.yaml").read_text()
    (tmp_path / "data/coarse.yaml").write_text(text.replace("patch_size: 2", "patch_size: 4"))
    config.search_also(tmp_path)
    try:
        with pytest.raises(ValueError, match="a sweep over data would use one folder"):
            runs.refuse_shared_folders(["data=digits,coarse"], "train")
    finally:
        config.search_also(None)


def test_a_name_may_hold_a_setting_and_not_a_group_of_them():
    with pytest.raises(ValueError, match=r"name holds settings, .*: a case is called \$\{case\.name\}"):
        runs.name_of(config.compose(["name=x-${case}"]), [])


def test_runs_behind_links_are_found_once(tmp_path):
    cfg, place = config.compose([]), tmp_path / "elsewhere" / "run"
    for run in (place, tmp_path / "outputs" / "other"):
        run.mkdir(parents=True)
        OmegaConf.save(cfg, run / "config.yaml")
        (run / "summary.json").write_text('{"steps": 1500}')
    (tmp_path / "outputs" / "linked").symlink_to(place)
    (tmp_path / "outputs" / "latest").symlink_to(tmp_path / "outputs" / "other")
    for up in ("up", "again"):  # of two such there are exponentially many ways
        (tmp_path / "outputs" / up).symlink_to(tmp_path / "outputs")
    found = [row["run"] for row in runs.summaries(tmp_path / "outputs")]
    assert found == [str(tmp_path / "outputs" / name) for name in ("linked", "other")]


def test_a_damaged_file_of_settings_is_told_what_may_replace_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").touch()
    for text in ("", "{", "- a\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"Delete it: the checkpoints hold the same settings"):
            config.saved(tmp_path)


def test_differences_ignore_what_may_change():
    old = config.compose(["data=mnist"])
    free = [
        "data=mnist",
        "trainer.steps=7",
        "device=cpu",
        "data.root=there",
        "name=x",
        "evaluation.draws=1",
        "trainer.shard=true",
    ]
    assert runs.differences(old, config.compose(free)) == []
    assert runs.differences(old, config.compose(["data=mnist", "optim.lr=0.5"])) == ["optim.lr: 0.002, now 0.5"]


@pytest.mark.parametrize(
    ("words", "script", "expected"),
    [
        (["trainer.steps=2,4"], "train", "a sweep over trainer.steps would use one folder"),
        (["++trainer.steps=2,4"], "train", "a sweep over trainer.steps would use one folder"),
        (["trainer.steps=range(3)"], "train", "a sweep over trainer.steps would use one folder"),
        (["device=cpu,cuda"], "patch_ae", "a sweep over device would use one folder"),
        (["name=x", "seed=0,1"], "train", "name=x would be the folder of several runs of a sweep over seed"),
        (["name=x,y", "optim.lr=1,2"], "train", "let it hold '${optim.lr}'"),
        (["name=x-${seed}", "seed=0,1", "case=case1,case2"], "train", "over case: leave name= out"),
        (["name=x", "case=case1,case2"], "train", "let it hold '${case.name}'"),
        (["trainer.steps=interval(2,4)"], "train", "a sweep over trainer.steps would use one folder"),
        (["data=mnist", "data.root=a,b"], "train", "a sweep over data.root would use one folder"),
        (["data=image_folder", "data.root=a/x,b/x"], "train", "a sweep over data.root would use one folder"),
        (["data=array_file", "data.root=a/x.npz,a/x.npy"], "train", "a sweep over data.root would use one folder"),
        (["data=torch_dataset", "data._target_=a.X,b.X"], "train", "a sweep over data._target_ would use one folder"),
        (["json=x.json", "case=case1,case2"], "benchmark", "json=x.json would be the file of several benchmarks"),
        (["json='${seed}.json'", "seed=0,1", "model.dim=32,64"], "benchmark", "of a sweep over model.dim"),
        (["run=x", "draws=4,8"], "evaluate", "a sweep over draws would keep the last result alone"),
        (["run=x,y", "seed=0,1"], "probe", "a sweep over seed would keep the last result alone"),
    ],
)
def test_sweeps_that_would_write_over_their_own_results(words, script, expected):
    with pytest.raises(ValueError) as caught:
        runs.refuse_shared_folders(words, script)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("words", "script"),
    [
        (["seed=0,1", "masks.s_ratio=[1,2]"], "train"),
        (["name=x1,x2"], "train"),
        (["name=null", "seed=0,1"], "train"),
        (["seed=0,1,0"], "train"),  # the last one is done then
        (["name='x-${hydra:job.num}'", "seed=0,1"], "train"),
        (["json='x-${hydra:job.num}.json'", "seed=0,1"], "benchmark"),
        (["output_dir=a,b", "name=x"], "train"),
        (["name=x-${seed}-${case.name}", "seed=0,1", "case=case1,case2"], "train"),
        (["data=image_folder", "data.root=a/x,a/y"], "train"),
        (["data=array_file", "data.root=a/x.npz,a/y.npy"], "train"),
        (["data=torch_dataset", "data._target_=a.X,b.Y"], "train"),
        (["json=${case.name}.json", "case=case1,case2"], "benchmark"),
        (["run=x", "figures=inpainting,inference"], "figures"),
        (["run=x,y", "draws=4", "ratios=[0.1,0.3]"], "evaluate"),
        (["preset=mnist,masks"], "reproduce"),
    ],
)
def test_sweeps_whose_jobs_have_folders_of_their_own(words, script):
    runs.refuse_shared_folders(words, script)


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path):
    refused = pytest.raises(ValueError, match=r"process \d+ on .* is busy")
    with files.locked(tmp_path), refused, files.locked(tmp_path, "is busy"):
        raise AssertionError
    with files.locked(tmp_path, "is busy"):
        pass


def test_two_processes_do_not_train_in_one_folder(here, monkeypatch, capsys):
    words = [*SMALL, "name=run", "trainer.steps=100000"]
    first = start(*words, cwd=here)
    log = here / "outputs" / "run" / "metrics.jsonl"
    while first.poll() is None and not (log.exists() and '"train/loss"' in log.read_text()):
        time.sleep(0.01)
    assert run_here(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert f"process {first.pid} on " in said and "trains in outputs/run: wait for it" in said
    first.send_signal(signal.SIGTERM)
    assert "a checkpoint is written" in finish(first)
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=1") == 2
    end = re.search(r"more than the 1 asked for.* (trainer\.steps=\d+) to end it there", capsys.readouterr().err)[1]
    for _ in range(2):
        assert run_here(monkeypatch, *SMALL, "name=run", end) == 0
    assert "is finished" in capsys.readouterr().out and len(runs.summaries()) == 1


def test_that_a_run_is_busy_is_known_before_the_data_is_read(here, monkeypatch, capsys):
    (here / "outputs/run").mkdir(parents=True)
    monkeypatch.setattr(commands, "_dataset", lambda *_: pytest.fail("the data is read"))
    with files.locked(here / "outputs/run"):
        assert run_here(monkeypatch, *SMALL, "name=run") == 2
    assert "trains in outputs/run" in capsys.readouterr().err


def test_a_summary_is_of_the_run_as_it_is_and_as_it_is_asked_for(here, monkeypatch, capsys):
    run, words = here / "outputs/run", [*SMALL, "name=run"]
    assert run_here(monkeypatch, *words) == 0
    whole = read_json(run / "summary.json")

    def cut(*_):
        raise KeyboardInterrupt

    def asked_for_in_vain(*more):
        with monkeypatch.context() as patch:
            patch.setattr(commands, "_finish", cut)
            assert run_here(patch, *words, *more) == 2

    # Cut off while it was measured with more draws, what was measured with fewer is no answer.
    asked_for_in_vain("evaluation.draws=4")
    assert runs.summaries()[0]["evaluation.draws"] == 2  # as its numbers are
    assert run_here(monkeypatch, *words, "evaluation.draws=4") == 0
    more = read_json(run / "summary.json")
    assert more["inpainting_psnr"] != whole["inpainting_psnr"] and more["test_joint_elbo"] == whole["test_joint_elbo"]
    # Trained on, it is no run of as many steps as its summary says.
    asked_for_in_vain("trainer.steps=30")
    assert run_here(monkeypatch, *words) == 2
    assert "holds a run of 30 steps, more than the 24 asked for" in capsys.readouterr().err
    # With another best checkpoint than the one measured neither.
    assert run_here(monkeypatch, *words, "trainer.steps=30") == 0
    best = checkpoint.load(run / "checkpoints/best.pt")
    checkpoint.save(run / "checkpoints/best.pt", best | {"step": 7})
    assert run_here(monkeypatch, *words, "trainer.steps=30") == 0
    assert read_json(run / "summary.json")["best_step"] == 7


def test_a_sweep_leaves_to_another_process_what_that_trains(here, monkeypatch, capsys):
    sweep = ["-m", *SMALL, "seed=0,1"]
    assert run_here(monkeypatch, *sweep, "trainer.steps=2") == 0
    (busy,) = (here / "outputs").glob("*-seed1-*")
    capsys.readouterr()
    with files.locked(busy):  # by one that trains for 2 steps
        assert run_here(monkeypatch, *sweep) == 2
    assert f"failed: seed=1: process {os.getpid()} on " in capsys.readouterr().err
    settings = (busy / "config.yaml").read_text()
    (busy / "config.yaml").write_text(settings.replace("steps: 2\n", "steps: 24\n"))
    (busy / "summary.json").unlink()
    with files.locked(busy):  # by one that goes on with it
        assert run_here(monkeypatch, *sweep) == 0
    out, err = capsys.readouterr()
    assert f"left to another process: seed=1: process {os.getpid()} on " in out and "failed" not in err
    assert [row["steps"] for row in runs.summaries()] == [24]
    assert run_here(monkeypatch, *sweep) == 0
    assert [row["steps"] for row in runs.summaries()] == [24, 24]


def test_a_folder_that_cannot_be_made(here, monkeypatch, capsys):
    (here / "file").write_text("")
    assert run_here(monkeypatch, *SMALL, "output_dir=file") == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and "output_dir=" in error and "Traceback" not in error


def test_a_finished_run_whose_checkpoints_are_gone_is_not_trained_over(here, trained, monkeypatch, capsys):
    run = here / "outputs" / "run"
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        (run / "checkpoints" / name).unlink()
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    capsys.readouterr()
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    assert "is finished: 24 steps" in capsys.readouterr().out
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30") == 2
    assert "holds a run of 24 steps whose checkpoints are gone" in capsys.readouterr().err
    assert run_here(monkeypatch, *SMALL, "name=run", "optim.lr=0.5") == 2
    assert "holds a run with other settings (optim.lr: 0.002, now 0.5)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before


def test_a_run_does_not_go_back_to_fewer_steps(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    said = "warning: loss.beta rises over 1000 steps (loss.beta_warmup_steps), and this run has 24: it is not reached"
    assert said in capsys.readouterr().out
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=12") == 2
    assert "holds a run of 24 steps, more than the 12 asked for" in capsys.readouterr().err
    assert len(runs.summaries()) == 1
    path = here / "outputs/run/config.yaml"  # as of a run that goes on to more, and was stopped
    path.write_text(path.read_text().replace("steps: 24", "steps: 300"))
    assert runs.summaries() == []


def test_a_lost_config_is_taken_from_the_checkpoint(here, trained, monkeypatch, capsys):
    path = here / "outputs" / "run" / "config.yaml"
    saved = config.saved("outputs/run")
    path.unlink()
    assert config.saved("outputs/run") == saved
    assert runs.load("outputs/run", device="cpu").num_tokens == 16
    assert run_here(monkeypatch, *SMALL, "name=run", "optim.lr=0.5", "trainer.steps=30") == 2
    assert "holds a run with other settings (optim.lr: 0.002, now 0.5)" in capsys.readouterr().err
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30") == 0
    assert "going on with outputs/run" in capsys.readouterr().out and path.exists()
    path.write_text("{ broken")
    assert run_here(monkeypatch, *SMALL, "name=run") == 2
    assert "config.yaml cannot be read" in (said := capsys.readouterr().err) and "Delete it" in said
    path.unlink()
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30") == 0


def test_a_file_that_is_no_checkpoint_is_told(here, trained):
    path = here / "outputs" / "run" / "checkpoints" / checkpoint.BEST
    state = checkpoint.load(path)
    for lacking, kept in (("net", ("step", "metadata")), ("step, net, metadata", ())):
        checkpoint.save(path, {key: state[key] for key in kept})
        with pytest.raises(ValueError, match=f"not a checkpoint of a run, it lacks {lacking}: the other one"):
            runs.load("outputs/run")
    assert runs.load("outputs/run", which="latest").z_dim == state["metadata"]["config"]["model"]["z_dim"]


def test_a_lost_best_checkpoint_is_made_again(here, trained, monkeypatch):
    shutil.copytree(trained, here / "outputs/whole")
    run = here / "outputs" / "run"
    (run / "checkpoints" / checkpoint.BEST).unlink()
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    assert_same_runs(here / "outputs" / "whole", run, but=1)  # the evaluation that made it
    elbo = [
        json.loads((here / "outputs" / x / "summary.json").read_text())["test_joint_elbo"] for x in ("whole", "run")
    ]
    assert elbo[0] == elbo[1]


def test_numbers_of_an_earlier_network_do_not_stay_beside_another(here, trained, monkeypatch):
    assert (
        run_here(monkeypatch, "run=outputs/run", "images=4", "draws=2", "likelihood_images=0", script="evaluate") == 0
    )
    run = here / "outputs" / "run"
    measured = json.loads((run / "evaluation.json").read_text())
    (row,), (whole,) = runs.summaries(), runs.summaries(measured=True)
    assert row == {name: value for name, value in whole.items() if not name.startswith("evaluate.")}
    assert whole["evaluate.inpainting_psnr.0.5"] == measured["inpainting_psnr"]["0.5"] and whole["evaluate.step"] == 24
    assert measured["settings"]["draws"] == 2 and measured["settings"]["seed"] == 0
    assert not {"run", "device", "checkpoint", "data_root"} & set(measured["settings"])
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30") == 0
    assert json.loads((run / "evaluation.json").read_text())["step"] == 24  # of the network then
    (run / "evaluation-1.json").write_text("{}")
    (run / "evaluation-of-mine.json").write_text("{}")
    for path in (*(run / "checkpoints").iterdir(), run / "summary.json"):
        path.unlink()
    assert run_here(monkeypatch, *SMALL, "name=run", "seed=1") == 0
    assert not (run / "evaluation.json").exists() and metrics(run)[0]["step"] == 0
    assert [path.name for path in run.glob("evaluation*")] == ["evaluation-of-mine.json"]


def test_measurements_with_other_settings_are_kept_once_each(tmp_path):
    def found(draws, step=24, **numbers):
        return {"checkpoint": "best.pt", "step": step, "settings": {"draws": draws, "ratios": (0.1, 0.5)}} | numbers

    def there():
        known = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
        return {name: (of["step"], of["settings"]["draws"], of["psnr"]) for name, of in known.items()}

    assert runs.write_measured(tmp_path, "probe", found(1, psnr=1)) is None
    assert runs.write_measured(tmp_path, "probe", found(1, psnr=2)) is None  # the same, measured anew
    assert there() == {"probe.json": (24, 1, 2)}
    assert runs.write_measured(tmp_path, "probe", found(9, psnr=3)) == tmp_path / "probe-1.json"
    assert runs.write_measured(tmp_path, "probe", found(9, step=30, psnr=4)) == tmp_path / "probe-2.json"
    assert there() == {"probe.json": (30, 9, 4), "probe-1.json": (24, 1, 2), "probe-2.json": (24, 9, 3)}
    assert runs.write_measured(tmp_path, "probe", found(1, psnr=5)) == tmp_path / "probe-1.json"
    assert there() == {"probe.json": (24, 1, 5), "probe-1.json": (30, 9, 4), "probe-2.json": (24, 9, 3)}
    with pytest.raises(TypeError):  # what cannot be written takes the place of nothing
        runs.write_measured(tmp_path, "probe", found(9, step=30, psnr=torch.ones(1)))
    assert {(30, 9, 4), (24, 1, 5), (24, 9, 3)} <= set(there().values())


def test_a_finished_run_is_measured_anew_if_that_is_asked_for(here, trained, monkeypatch, capsys):
    before, rows = json.loads((here / "outputs/run/summary.json").read_text()), metrics(here / "outputs/run")
    words = [*SMALL, "name=run", "evaluation.draws=3", "evaluation.ratios=[0.5]"]
    assert run_here(monkeypatch, *words) == 0
    assert "is finished" not in capsys.readouterr().out
    after = json.loads((here / "outputs/run/summary.json").read_text())
    was, now = before["inpainting_psnr"], after["inpainting_psnr"]
    assert list(now) == ["0.5"] and now["0.5"] != was["0.5"]
    assert after["test_joint_elbo"] == before["test_joint_elbo"] and after["seconds"] == before["seconds"]
    assert metrics(here / "outputs/run") == rows
    assert run_here(monkeypatch, *words) == 0
    assert "is finished: 24 steps" in capsys.readouterr().out


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked here"), files.locked(tmp_path, "is busy"):
        pass
