"""Searches: a sweeper of Hydra that proposes settings is told how good each run is, on validation images."""

import json
import os
import time
from contextlib import ExitStack

import pytest
import yaml
from omegaconf import OmegaConf
from programs import SMALL, metrics, run_here

import biglearn_vae as blv
from biglearn_vae import config, runs, search, stages
from biglearn_vae.files import locked

OPTUNA = ["hydra/sweeper=optuna", "hydra.sweeper.sampler.seed=0", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
MAXIMIZE = "hydra.sweeper.direction=maximize"


@pytest.fixture
def optuna():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")


@pytest.mark.parametrize("words", [["case=tiny"], ["--config-name=patch_ae", "data=digits", "data.patch_size=4"]])
def test_the_summary_has_what_the_best_checkpoint_had_on_validation_images(here, monkeypatch, words):
    small = [word for word in SMALL if words[0] == "case=tiny" or word.startswith(("trainer.", "device="))]
    assert run_here(monkeypatch, *words, *small, "name=run") == 0
    summary = json.loads((here / "outputs/run/summary.json").read_text())
    rows = [row for row in metrics(here / "outputs/run") if search.metrics(config.saved("outputs/run"))[0] in row]
    best = next(row for row in rows if row["step"] == summary["best_step"])
    named = stages.of(config.saved("outputs/run")).metrics
    assert set(named) <= set(best) and {name: summary[name] for name in best if name != "step"} == {
        name: value for name, value in best.items() if name != "step"
    }


def test_what_a_sweeper_is_told():
    one, two = (config.compose([f"optimized_metric={m}"]) for m in ("valid/joint_kl", "[valid/elbo,valid/psnr_0.5]"))
    summary = {"name": "run", "valid/elbo": -2.0, "valid/joint_kl": 3.0, "valid/psnr_0.5": 14.0}
    assert search.value(one, summary) == 3.0
    assert search.value(two, summary) == [-2.0, 14.0]
    with pytest.raises(ValueError, match=r"summary.json of run has no valid/joint_kl, being of an earlier version"):
        search.value(one, {"name": "run"})
    for word, got in {
        "null": "None",
        "[]": r"\[\]",
        "test_joint_elbo": "'test_joint_elbo'",
        "[1]": "1",
        "5": "5",
    }.items():
        with pytest.raises(ValueError, match=rf"optimized_metric must be valid/elbo, .* got {got}"):
            search.metrics(config.compose([f"optimized_metric={word}"]))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "direction=minimize would look for the worst valid/elbo: give hydra.sweeper.direction=maximize"),
        (["optimized_metric=valid/psnr"], "got 'valid/psnr'"),
        (["optimized_metric=[valid/elbo]", MAXIMIZE], None),
        (["optimized_metric=[valid/elbo,valid/joint_kl]", MAXIMIZE], "such as [maximize,maximize], got maximize"),
        (["optimized_metric=[valid/elbo,valid/joint_kl]", "hydra.sweeper.direction=[maximize,minimize]"], None),
        (["optimized_metric=valid/joint_kl"], None),
        (["optimized_metric=valid/joint_kl", "hydra.sweeper.direction=max"], "must be minimize or maximize, got 'max'"),
        (["hydra.sweeper.direction=null"], "must be minimize or maximize, got 'None'"),
        (["method=glob(*)", MAXIMIZE], "method=glob(*) cannot be searched over"),
        ([MAXIMIZE], None),
    ],
)
def test_a_search_for_the_worst_is_refused(optuna, words, expected):
    words = ["optim.lr=interval(1e-4,1e-2)", *OPTUNA, *words]
    config.check(words, "train", sweep=True)
    if expected is None:
        assert search.check(words, "train")
        return
    with pytest.raises(ValueError) as caught:
        search.check(words, "train")
    assert expected in str(caught.value)


def test_a_number_that_depends_on_what_is_searched_over_is_warned_of(optuna, recwarn):
    words = [*OPTUNA, MAXIMIZE, "loss.beta=interval(0.001,0.1)", "masks.joint=0,0.1", "optim.lr=1e-3,1e-2"]
    search.check(words, "train")
    said = str(recwarn.pop().message)
    assert "valid/elbo is measured with each run's own loss.beta, masks, over which" in said
    assert said.endswith(": optimized_metric=valid/psnr_0.5 does")
    search.check([*OPTUNA, MAXIMIZE, "loss.observations=null,discretized_gaussian"], "train")
    assert "own loss.observations, over which" in str(recwarn.pop().message)
    search.check([*words, "optimized_metric=valid/psnr_0.5"], "train")
    search.check([*words[:5], "loss.beta_warmup_steps=choice(10,20)"], "train")  # with which nothing is measured
    assert not search.check([*words[5:], "seed=0,1"], "train")  # of Hydra's own sweeper, which tries all
    assert not recwarn.list
    search.check([*words[:5], "missing=0,0.5", "optimized_metric=valid/psnr_0.5"], "train")
    assert str(recwarn.pop().message).endswith(
        "own missing, over which this searches, so it does not tell which is better"
    )


def test_only_a_training_can_be_searched(optuna):
    with pytest.raises(ValueError, match=r"a number that scripts/train.py alone gives"):
        search.check([*OPTUNA, MAXIMIZE, "run=a,b"], "evaluate")


def test_a_search_over_nothing_and_a_search_that_is_no_sweep(optuna):
    with pytest.raises(ValueError, match="there is nothing to search over"):
        search.check([*OPTUNA, MAXIMIZE, "optim.lr=1"], "train")
    with pytest.raises(ValueError, match=r"hydra/sweeper=optuna is for a sweep: it needs -m"):
        config.check(["hydra/sweeper=optuna"])


def test_help_beside_the_words_of_a_search(optuna, here, monkeypatch, capsys):
    assert run_here(monkeypatch, "-m", *OPTUNA, MAXIMIZE, "case=case4", "--help") == 0
    assert "model.dim=512" in capsys.readouterr().out


def test_a_sweeper_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"hydra/sweeper must be one of basic.*, got 'ax'; extras have optuna"):
        config.check(["hydra/sweeper=ax"], sweep=True)
    with pytest.raises(ValueError, match=r"gives an interval"):
        config.check(["hydra/sweeper=basic", "optim.lr=interval(1,2)"], sweep=True)


def test_a_search_finds_the_best_run_and_goes_on_where_it_was(optuna, here, monkeypatch, capsys):
    words = ["-m", *OPTUNA, MAXIMIZE, *SMALL, "evaluation.images=8", "optim.lr=tag(log,interval(1e-4,1e-1))"]
    assert run_here(monkeypatch, *words, "optimized_metric=valid/psnr_0.5") == 0
    rows = blv.summaries()
    found = yaml.safe_load((here / "outputs/optimization_results.yaml").read_text())
    best = max(rows, key=lambda row: row["valid/psnr_0.5"])
    assert len(rows) == 2 and found["best_value"] == best["valid/psnr_0.5"]
    assert OmegaConf.create(found["best_params"])["optim.lr"] == pytest.approx(best["optim.lr"])
    capsys.readouterr()
    # Another number of the same runs: none is trained again, and one that fails is no end of the search.
    again = ["hydra.sweeper.n_trials=3", "optimized_metric=valid/elbo"]
    saved = here / rows[0]["run"] / "config.yaml"
    saved.write_text(saved.read_text().replace("beta: 0.01", "beta: 0.02"))
    assert run_here(monkeypatch, *words, *again) == 0
    said = capsys.readouterr()
    assert said.out.count("is finished: 24 steps") == 1 and said.out.count("training outputs") == 1
    assert "holds a run with other settings (loss.beta: 0.02, now 0.01)" in said.err


def test_a_search_of_which_every_run_fails_says_so_in_a_line(optuna, here, monkeypatch, capsys):
    words = ["-m", *OPTUNA, MAXIMIZE, *SMALL, "model.heads=3", "optim.lr=interval(1e-4,1e-1)"]
    assert run_here(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert said.count("failed: optim.lr=") == 2 and "error: No trials are completed yet." in said
    assert "ValueError: No trials" not in said and "HYDRA_FULL_ERROR" not in os.environ


def test_a_search_waits_for_what_another_process_trains(optuna, here, monkeypatch, capsys):
    words = [*SMALL, "optim.lr=0.001"]
    run = here / "outputs" / runs.name_of(config.compose(words), words)
    run.mkdir(parents=True)
    with ExitStack() as other:
        other.enter_context(locked(run, "trains"))
        monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
        search_words = ["-m", *OPTUNA, MAXIMIZE, *SMALL, "optim.lr=choice(0.001)", "hydra.sweeper.n_trials=1"]
        assert run_here(monkeypatch, *search_words) == 0
    assert capsys.readouterr().out.count("waiting for another process: ") == 1
    assert (run / "summary.json").exists() and (here / "outputs/optimization_results.yaml").exists()
