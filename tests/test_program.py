"""Whole commands, as a user types them."""

import json
import math
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from programs import ROOT, SMALL, assert_same_runs, finish, metrics, own_case, run_here, start

import biglearn_vae as blv
from biglearn_vae import checkpoint, commands


@pytest.mark.parametrize("method", ["biglearn_u", "biglearn_t", "vae"])
def test_train_then_evaluate(here, monkeypatch, capsys, method):
    assert run_here(monkeypatch, *SMALL, f"method={method}", "name=run") == 0
    printed = capsys.readouterr().out
    run = here / "outputs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert f"{summary['parameters']:,} parameters ({summary['parameters'] / 2**20:.4f} x 2^20)" in printed
    assert (
        summary["steps"] == 24 and summary["epochs"] > 0 and summary["seconds"] > 0 and summary["images_per_second"] > 0
    )
    elbo = summary["test_reconstruction"] - 0.01 * summary["test_kl"]
    assert summary["test_joint_elbo"] == pytest.approx(elbo, rel=1e-5)
    assert list(summary["inpainting_psnr"]) == list(summary["nearest_psnr"]) == ["0.1", "0.3", "0.5", "0.7"]
    rows = metrics(run)
    first, last = (
        next(r["valid/joint_elbo"] for r in order if "valid/joint_elbo" in r) for order in (rows, rows[::-1])
    )
    assert last > first
    pictures = [f"figures/{name}" for name in ("index.html", "inference.png", "inpainting.png")]
    for name in (*pictures, "config.yaml", "environment.json", "pictures/inpainting-0000024.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())

    assert run_here(monkeypatch, "run=outputs/run", "images=20", "draws=2", "masks=2", script="evaluate") == 0
    again = json.loads((run / "evaluation.json").read_text())
    for key in ("parameters", "test_joint_elbo", "test_kl", "inpainting_psnr", "nearest_psnr"):
        assert again[key] == pytest.approx(summary[key])

    before = (run / "summary.json").stat().st_mtime_ns
    capsys.readouterr()
    assert run_here(monkeypatch, *SMALL, f"method={method}", "name=run") == 0
    assert "is finished: 24 steps" in capsys.readouterr().out
    assert (run / "summary.json").stat().st_mtime_ns == before


def test_without_an_average_the_weights_themselves_are_evaluated_and_train_on(here, monkeypatch):
    assert run_here(monkeypatch, *SMALL, "name=run", "optim.ema_decay=0") == 0
    elbos = [row["valid/elbo"] for row in metrics(here / "outputs" / "run") if "valid/elbo" in row]
    assert len(elbos) == 3 and elbos == sorted(elbos)
    assert checkpoint.load(here / "outputs/run/checkpoints" / checkpoint.LATEST)["average"] is None


def test_other_data_under_the_same_name_is_refused(here, monkeypatch, capsys):
    from PIL import Image

    for folder, grey in (("a", 50), ("b", 200)):
        (here / folder).mkdir()
        for k in range(12):
            Image.new("L", (8, 8), grey + k).save(here / folder / f"{k}.png")
    words = [*SMALL, "data=image_folder", "data.image_size=8", "data.patch_size=4", "name=run"]
    assert run_here(monkeypatch, *words, "data.root=a") == 0
    assert run_here(monkeypatch, *words, "data.root=b", "trainer.steps=30") == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_more_steps_continue_and_other_settings_are_refused(here, trained, monkeypatch, capsys):
    (older := here / "outputs/run/figures/interpolation.png").write_bytes(b"of the network of 24 steps")
    assert run_here(monkeypatch, *SMALL, "name=run", "evaluation.draws=3") == 0 and older.exists()
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30") == 0 and not older.exists()
    assert "going on with outputs/run" in capsys.readouterr().out
    summary = json.loads((here / "outputs/run/summary.json").read_text())
    assert summary["steps"] == 30 and summary["epochs"] == 30 * 16 / 1200
    assert run_here(monkeypatch, *SMALL, "name=run", "optim.lr=0.5") == 2
    error = capsys.readouterr().err
    assert "other settings (optim.lr: 0.002, now 0.5)" in error and "name=NAME" in error
    assert json.loads((here / "outputs/run/summary.json").read_text())["steps"] == 30
    assert run_here(monkeypatch, *SMALL, "name=run", "trainer.steps=30", "trainer.report_every=7") == 0
    capsys.readouterr()
    for steps, word in {"abc": "a whole number, got 'abc'", "1.5": "a whole number", "0": "at least 1, got 0"}.items():
        assert run_here(monkeypatch, *SMALL, "name=run", f"trainer.steps={steps}") == 2
        assert f"error: trainer.steps must be {word}" in capsys.readouterr().err


def test_a_sweep_skips_what_is_done_and_goes_on_with_what_is_not(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "seed=1") == 0
    capsys.readouterr()
    words = ["-m", *SMALL, "seed=0,1", "method=biglearn_u,vae"]
    assert run_here(monkeypatch, *words) == 0
    assert capsys.readouterr().out.count("is finished: 24 steps") == 1
    runs = sorted(path.parent.name for path in (here / "outputs").glob("*/summary.json"))
    assert len(runs) == 4 and all("seed" in name for name in runs)
    rows = blv.summaries()
    assert [row["run"] for row in rows] == [f"outputs/{name}" for name in runs]
    assert len({(row["seed"], row["method.name"]) for row in rows}) == 4
    summary = json.loads((here / rows[0]["run"] / "summary.json").read_text())
    assert rows[0]["inpainting_psnr.0.5"] == summary["inpainting_psnr"]["0.5"] and rows[0]["optim.lr"] == 0.002
    with pytest.raises(ValueError, match="there is no folder nowhere of runs"):
        blv.summaries("nowhere")
    assert run_here(monkeypatch, *words) == 0
    assert capsys.readouterr().out.count("is finished: 24 steps") == 4


STAGE_1 = [
    "data=digits",
    "data.image_size=[8,12]",
    "data.patch_size=4",
    "model.width=8",
    "trainer.steps=2",
    "device=cpu",
]


def test_images_that_are_no_squares(here, monkeypatch, capsys):
    words = [*SMALL, "data.image_size=[6,10]", "trainer.steps=2", "name=run"]
    assert run_here(monkeypatch, *words) == 0
    assert run_here(monkeypatch, *words) == 0 and "is finished: 2 steps" in capsys.readouterr().out
    vae = blv.load("outputs/run", device="cpu")
    assert vae.image_shape == (1, 6, 10) and vae.grid == (3, 5)
    for script in ("evaluate", "figures"):
        options = ["images=4", "draws=2", "likelihood_images=0"] if script == "evaluate" else ["figures=[inpainting]"]
        assert run_here(monkeypatch, "run=outputs/run", *options, script=script) == 0
    assert run_here(monkeypatch, "--config-name=patch_ae", *STAGE_1, "name=codes") == 0
    words_of_codes = [
        "data.image_size=[8,12]",
        "tokens=patch_ae",
        "data.patch_size=4",
        "tokens.run=outputs/codes",
        "trainer.steps=2",
    ]
    assert run_here(monkeypatch, *SMALL, *words_of_codes, "name=ae") == 0
    assert blv.load("outputs/ae", device="cpu").image_shape == (1, 8, 12)
    capsys.readouterr()
    for size, message in {
        "[6,9]": "a 6 x 9 image cannot be cut into patches of 2",
        "[6]": "one whole number or two",
    }.items():
        assert run_here(monkeypatch, *words[:-1], f"data.image_size={size}") == 2
        assert message in capsys.readouterr().err


def test_jobs_of_a_sweep_that_fail_are_named(here, monkeypatch, capsys):
    same = ["trainer.steps=1", "trainer.compile=false", "evaluation.ratios=[0.5, 0.7]", "seed=1"]
    assert run_here(monkeypatch, "-m", *SMALL, *same, "masks.joint=3,0.5,-1") == 2
    lines = capsys.readouterr().err.splitlines()
    for word in ("failed: ", "error: "):  # when it happens, and at the end
        assert [line for line in lines if line.startswith(word)] == [
            f"{word}masks.joint={value}: masks: joint must be a number in [0, 1], got {value}" for value in (3, -1)
        ]
    assert len(blv.summaries()) == 1


def test_a_job_that_crashes_hides_no_errors_of_others(here, own_parts, monkeypatch, capsys):
    words = ["masks._target_=own_parts.columns", "+masks.first=4,5,6,1", "trainer.steps=1"]
    assert run_here(monkeypatch, "-m", *SMALL, *words) == 1  # 5 is a mistake in the user's own code
    error = capsys.readouterr().err
    for first in (4, 6):
        assert f"error: +masks.first={first}: S and T must be disjoint" in error
    assert "IndexError: five" in error and len(blv.summaries()) == 1


def test_a_training_from_the_weights_of_another(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "method=vae", "name=first") == 0
    capsys.readouterr()
    words = [*SMALL, "method=biglearn_t", "init_from=outputs/first"]
    assert run_here(monkeypatch, *words, "name=second", "optim.lr=1e-30", "optim.muon_lr=1e-30") == 0
    assert "training outputs/second, from the weights of outputs/first\n" in capsys.readouterr().out
    first, second = (blv.load(f"outputs/{name}", device="cpu") for name in ("first", "second"))
    assert (first.prior, second.prior) == ("standard", "learned")
    for name, value in first.net.state_dict().items():  # a rate of nothing shows what it began with
        torch.testing.assert_close(second.net.state_dict()[name], value, rtol=1e-5, atol=1e-7)

    first.save("model.pt")
    assert run_here(monkeypatch, *words, "name=whole") == 0
    assert run_here(monkeypatch, *words, "name=whole", "trainer.steps=30") == 0
    words[-1] = "init_from=model.pt"
    assert run_here(monkeypatch, *words, "name=part") == 0
    (here / "model.pt").unlink()  # what goes on has weights of its own
    assert run_here(monkeypatch, *words, "name=part", "trainer.steps=30") == 0
    assert_same_runs(here / "outputs/whole", here / "outputs/part")
    assert run_here(monkeypatch, *SMALL, "method=biglearn_t", "name=whole") == 2
    assert "other settings (init_from: outputs/first, now None)" in capsys.readouterr().err

    for changed, expected in {
        "init_from=model.pt": "there is no file model.pt, nor a run of that name",
        "model.z_dim=3": "outputs/first holds another architecture than TwoStackViT of these settings: latent_in.0",
        "method=biglearn_u": "outputs/first holds another architecture than UniversalViT of these settings",
        "init_from=[1]": "init_from must be a word or null, got [1]",
        "init_from=": "there is no run in ",
        "init_from=absent.pt": "there is no file absent.pt, nor a run of that name",
        "model.heads=4": "outputs/first has 2 attention heads, these settings have 4: model.heads=2",
    }.items():
        assert run_here(monkeypatch, *SMALL, "method=biglearn_t", "init_from=outputs/first", changed, "name=new") == 2
        assert expected in capsys.readouterr().err
    assert not (here / "outputs/new").exists()


def test_a_folder_whose_name_is_a_number_and_a_network_larger_than_any_memory(here, monkeypatch, capsys):
    words = ["data=image_folder", "data.root=2024", "data.image_size=8"]
    assert run_here(monkeypatch, *SMALL, *words) == 2
    assert "data.root must be a word or null, got 2024: 'data.root=\"2024\"' gives it" in capsys.readouterr().err
    for size in (10**13, 10**18):
        assert run_here(monkeypatch, *SMALL, f"model.z_dim={size}") == 2
        assert "error: there is not enough memory for " in capsys.readouterr().err


OWN_PARTS = """
from __future__ import annotations
import functools
import typing
import torch
from biglearn_vae import BigLearnELBO, DiagGaussian, TwoStackViT, observations
from biglearn_vae.loggers import Logger
if typing.TYPE_CHECKING:
    from pathlib import Path

class Columns:
    def __init__(self, first: int, last=3):
        self.first, self.last = first, last

    def __call__(self, batch_size, num_tokens, generator):
        seen = torch.arange(num_tokens) % 4
        return [(mask).expand(batch_size, -1) for mask in (seen < self.first, seen >= self.last)]

def columns(first: int, path: Path = None, counts: typing.List = (), **others):
    if first == 5:
        raise IndexError("five")
    return Columns(first)

class Told(Logger):
    def __init__(self, run, settings):
        self.file = open(run / "told.txt", "a")
        print(settings["seed"], file=self.file)

    def scalars(self, step, values):
        print(step, *sorted(values), file=self.file)

    def close(self):
        print("closed", file=self.file)
        self.file.close()

class Deaf:
    def __init__(self, *_):
        self.scalars = print

def rows(batch_size, num_tokens, generator, first=1):
    return Columns(first)(batch_size, num_tokens, generator)

part = functools.partial(Columns, last=2)

class Half(BigLearnELBO):
    def __init__(self, masks):
        super().__init__(beta=0.005, masks=masks, prior="standard")

def no_objective(masks):
    return lambda net, x, **others: net

class Other(torch.nn.Module):
    def __init__(self, grid, token_dim, **others):
        super().__init__()

class Net(TwoStackViT):
    pass

class Bare(torch.nn.Linear):
    # Looks at hidden patches, too, if it is given them.
    z_dim = 3

    def __init__(self, grid, token_dim, **others):
        super().__init__(token_dim, 6)
        self.out = torch.nn.Linear(token_dim + 3, token_dim)
        self.grid, self.token_dim, self.num_tokens = grid, token_dim, grid[0] * grid[1]

    def forward(self, x, S, z=None, T=None):
        if z is None:
            return DiagGaussian(*super().forward(x).mean(1).chunk(2, -1))
        return self.out(torch.cat([x, z.unsqueeze(1).expand(-1, x.shape[1], -1)], -1))

class Wrong(Bare):
    def forward(self, x, S, z=None, T=None):
        return x.mean(1)

class Uncallable(Bare):
    def forward(self, x):
        return x

class Bernoulli(BigLearnELBO):
    def terms(self, net, x, S, T, noise):
        q, p = self._posterior_and_prior(net, x, S, T)
        logits = net(x, S, q.sample(noise), T)
        error = torch.nn.functional.binary_cross_entropy_with_logits(logits, x.clamp(0, 1), reduction="none")
        return -error.masked_fill(~T.unsqueeze(-1), 0).sum((1, 2)), q.kl(p)

class Sharp(observations.Bernoulli):
    pass

class Binary(BigLearnELBO):
    def __init__(self, beta, masks=None, **others):
        super().__init__(beta, masks, **others | {"observations": "bernoulli"})

class Binary_by_its_own(BigLearnELBO):
    def __init__(self, beta, masks=None, **others):
        super().__init__(beta, masks, **others | {"observations": Sharp()})

class Fixed(BigLearnELBO):
    def __init__(self, beta, masks=None, **others):
        super().__init__(0.04, masks, **others)

class Bare_parts(BigLearnELBO):
    def __call__(self, net, x, *arguments, **options):
        found = super().__call__(net, x, *arguments, **options)
        return type("Parts", (), {"loss": found.loss, "scalars": found.scalars})()

NUMBER = 3
"""


@pytest.fixture
def own_parts(here, monkeypatch):
    """A module of a user's own that Python finds."""
    (here / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.syspath_prepend(here)
    yield
    sys.modules.pop("own_parts", None)


NO_MASKS = [f"~masks.{name}" for name in ("s_ratio", "t_ratio", "joint", "ratios_per")]
NO_LOSS = [f"~loss.{name}" for name in ("beta", "prior", "beta_warmup_steps", "beta_warmup_start")]


def test_masks_a_network_and_an_objective_of_ones_own(here, own_parts, monkeypatch, capsys):
    words = [
        "masks._target_=own_parts.columns",
        "+masks.first=1",
        "+masks.other=x",
        "+masks.path=x",
        "+masks.counts=[1]",
    ]
    assert run_here(monkeypatch, *SMALL, *words, "trainer.steps=1") == 0
    words = ["masks._target_=own_parts.rows", "+masks.first=2", *NO_MASKS, "trainer.steps=1", "name=rows"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    kept = torch.load("outputs/rows/checkpoints/latest.pt", weights_only=True)
    assert (kept["loss"]["masks"], kept["loss"]["masks.first"]) == ("rows", 2)
    words = ["loss._target_=own_parts.Half", *NO_LOSS, "trainer.steps=1", "name=half"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    half = blv.load("outputs/half", device="cpu")
    assert (half.prior, half.variance) == ("standard", 0.005)
    words = ["masks._target_=own_parts.Columns", "+masks.first=2", *NO_MASKS, "name=own"]
    words += ["model._target_=own_parts.Net", "model.depth=[1,1]"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    assert type(blv.load("outputs/own", device="cpu").net).__name__ == "Net"
    assert run_here(monkeypatch, "run=outputs/own", "images=9", "likelihood_images=0", script="evaluate") == 0
    capsys.readouterr()
    assert run_here(monkeypatch, *SMALL, *words, "+masks.last=2") == 2
    assert "other settings (masks.last: absent, now 2)" in capsys.readouterr().err


def test_loggers_of_ones_own(here, own_parts, monkeypatch, capsys):
    words = [*SMALL, "name=run", "trainer.steps=2", "trainer.report_every=1"]
    assert run_here(monkeypatch, *words, "loggers=[own_parts.Told]") == 0
    first, *lines, last = Path("outputs/run/told.txt").read_text().splitlines()
    assert first == "0" and last == "closed"
    assert [(line.split()[0], "valid/elbo" in line) for line in lines] == [
        ("0", True),
        ("1", False),
        ("2", False),
        ("2", True),
    ]
    words[-2] = "trainer.steps=3"
    assert run_here(monkeypatch, *words) == 0  # they are no part of what the run is
    assert Path("outputs/run/told.txt").read_text().splitlines() == [first, *lines, last]
    for name, why in (
        ("own_parts.Deaf", "loggers: Deaf lacks picture, close, which a subclass of biglearn_vae.loggers.Logger has"),
        ("own_parts.Absent", "loggers must name a class or a function of a module that Python finds"),
    ):
        assert run_here(monkeypatch, *SMALL, "name=other", f"loggers=[{name}]") == 2
        assert why in capsys.readouterr().err


COLUMNS = "masks._target_=own_parts.Columns"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            [COLUMNS],
            "masks: Columns takes first, last, not s_ratio, t_ratio, joint, ratios_per; settings of the default are",
        ),
        ([COLUMNS, *NO_MASKS], "masks: Columns.__init__() missing 1 required positional argument: 'first'"),
        ([COLUMNS, *NO_MASKS, "+masks.first=two"], "masks.first must be a whole number, got 'two'"),
        ([COLUMNS, *NO_MASKS, "masks.first=2"], "there is no masks.first yet: +masks.first=2 adds it"),
        ([COLUMNS, *NO_MASKS, "~masks.typo"], "there is no masks.typo to be left out"),
        (
            ["masks._target_=own_parts.rows", "+masks.batch_size=3", *NO_MASKS],
            "masks: no settings, but given with each call: batch_size",
        ),
        (["~masks"], "masks cannot be left out: masks._target_=MODULE.CLASS takes another"),
        (["~masks._target_"], "masks._target_ says what masks is and cannot be left out"),
        (["masks._target_=own_parts.part", "+masks.first=x", *NO_MASKS, "loss.beta=-1"], "loss: beta must be a number"),
        (["masks._target_=own_parts.Rows"], "masks._target_ must name a class or a function of a module that Python"),
        (["masks._target_=absent.Rows"], "(PYTHONPATH=FOLDER), got 'absent.Rows': No module named 'absent'"),
        (["masks._target_=own_parts.NUMBER"], "got 'own_parts.NUMBER': 3 is not a callable object"),
        (["trainer._target_=own_parts.Net"], "trainer._target_: there is no such setting"),
        (["loss._target_=own_parts.no_objective", *NO_LOSS], "an objective like BigLearnELBO, got one without masks"),
        (["model._target_=own_parts.Other"], "model: expected a network such as UniversalViT, unwrapped"),
        (
            ["model._target_=own_parts.Wrong"],
            "error: Wrong: net(x, S) must give a DiagGaussian over z, (B, 3), got",
        ),
        (
            ["model._target_=own_parts.Uncallable"],
            "error: Uncallable cannot be called as UniversalViT is, net(x, S)",
        ),
    ],
)
def test_parts_of_ones_own_that_do_not_fit(here, own_parts, monkeypatch, capsys, words, expected):
    assert run_here(monkeypatch, *SMALL, *words) == 2
    assert expected in capsys.readouterr().err
    assert not (here / "outputs").exists()


def test_a_likelihood_and_a_network_of_ones_own(here, own_parts, monkeypatch, capsys):
    words = ["loss._target_=own_parts.Bernoulli", "model._target_=own_parts.Bare", "~model.dim", "optim.muon_lr=0.01"]
    words += ["trainer.steps=2", "name=own"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    assert "nats" not in capsys.readouterr().out
    assert "test_joint_bound_nats" not in json.loads(Path("outputs/own/summary.json").read_text())
    assert blv.load("outputs/own", device="cpu").variance == 0  # beta is none of such a model
    words = ["run=outputs/own", "likelihood_images=2", "samples=2", "images=9"]
    assert run_here(monkeypatch, *words, script="evaluate") == 0
    found = json.loads(Path("outputs/own/evaluation.json").read_text())
    assert "likelihood" not in found and found["objective"] == "Bernoulli"
    printed = capsys.readouterr().out
    assert "no log-likelihoods and no consistency: the objective" in printed and "JointELBO by Bernoulli" in printed
    words = ["run=outputs/own", "tasks=[0.5]", "images=5", "likelihood_images=2", "iterations=[]", "draws=2"]
    assert run_here(monkeypatch, *words, script="complete") == 0
    assert "nats" not in json.loads(Path("outputs/own/completion.json").read_text())["tasks"]["0.5"]
    words = ["run=outputs/own", "draws=1", "ratios=[0.5]", "train_images=40", "test_images=20", "ceiling_steps=2"]
    assert run_here(monkeypatch, *words, script="probe") == 0
    capsys.readouterr()
    assert run_here(monkeypatch, *SMALL, "model._target_=own_parts.Bare", "~model.dim") == 2
    assert "optim.muon_lr: Interpolation key 'model.dim' not found: give optim.muon_lr" in capsys.readouterr().err
    assert run_here(monkeypatch, *SMALL, "loss._target_=own_parts.Bare_parts") == 2
    assert "expected of the loss an ELBO, or what has its parts" in capsys.readouterr().err


def test_binary_images_from_training_to_every_measure(here, monkeypatch, capsys):
    words = [*SMALL, "loss.observations=bernoulli", "loss.beta=1", "name=run"]
    assert run_here(monkeypatch, *words) == 2
    assert "error: Bernoulli observations are pixels that are 0 or 1" in capsys.readouterr().err
    assert run_here(monkeypatch, *words, "binarize=threshold", "name=binary") == 0
    assert " nats of Bernoulli observations" in capsys.readouterr().out
    summary = json.loads(Path("outputs/binary/summary.json").read_text())
    assert summary["observations"] == "bernoulli" and "objective" not in summary
    # Of beta = 1 and no constant, it is the ELBO itself.
    assert summary["test_joint_bound_nats"] == pytest.approx(summary["test_joint_elbo"])
    vae, x = blv.load("outputs/binary", device="cpu"), (blv.images("digits", "test") >= 0.5).float()
    found = blv.evaluation.elbo(vae, x, blv.BigLearnELBO(1.0, observations="bernoulli"))
    assert found["elbo"] == pytest.approx(summary["test_joint_elbo"])
    few = ["run=outputs/binary", "images=9", "draws=2", "samples=2"]
    assert run_here(monkeypatch, *few, "likelihood_images=3", "passes=[2]", script="evaluate") == 0
    found = json.loads(Path("outputs/binary/evaluation.json").read_text())
    assert "variance" not in found["likelihood"]["model"] and "fitted" not in found["likelihood"]
    assert found["likelihood"]["model"]["joint_nats"] == pytest.approx(
        blv.evaluation.likelihood(vae, x[:3], samples=2)["joint_nats"]
    )
    assert found["passes"]["scores"]["2"].keys() == {"precision", "recall", "seconds", "joint_nats"}
    assert "bounds on log p of Bernoulli observations" in capsys.readouterr().out
    assert run_here(monkeypatch, *few, "tasks=[0.5]", "likelihood_images=2", "iterations=[]", script="complete") == 0
    nats = json.loads(Path("outputs/binary/completion.json").read_text())["tasks"]["0.5"]["nats"]
    assert nats["mean"] < 0 and "variance" not in nats and "variance" not in capsys.readouterr().out
    words = ["run=outputs/binary", "draws=1", "ratios=[0.5]", "train_images=40", "test_images=20"]
    assert run_here(monkeypatch, *words, script="probe") == 0
    assert run_here(monkeypatch, "run=outputs/binary", "figures=[passes]", script="figures") == 0


def test_bytes_from_training_to_every_measure(here, monkeypatch, capsys):
    words = [*SMALL, "loss.observations=discretized_gaussian", "name=run"]
    assert run_here(monkeypatch, *words, "loss.beta=0") == 2
    assert "need a variance, beta, in [1/255^2, 1], got 0.0" in capsys.readouterr().err
    assert run_here(monkeypatch, *words) == 0
    assert " nats of Discretized Gaussian observations" in capsys.readouterr().out
    summary = json.loads(Path("outputs/run/summary.json").read_text())
    assert summary["observations"] == "discretized_gaussian" and "objective" not in summary
    assert 0.01 * summary["test_joint_bound_nats"] == pytest.approx(summary["test_joint_elbo"])
    vae, x = blv.load("outputs/run", device="cpu"), blv.images("digits", "test")
    assert vae.observations.variance == 0.01
    loss = blv.BigLearnELBO(0.01, observations="discretized_gaussian")
    assert blv.evaluation.elbo(vae, x, loss)["elbo"] == pytest.approx(summary["test_joint_elbo"])
    few = ["run=outputs/run", "images=9", "draws=2", "samples=2"]
    assert run_here(monkeypatch, *few, "likelihood_images=3", "passes=[2]", script="evaluate") == 0
    found = json.loads(Path("outputs/run/evaluation.json").read_text())["likelihood"]
    assert "variance" not in found["model"] and "fitted" not in found
    nats = blv.evaluation.likelihood(vae, x[:3], samples=2)["joint_nats"]
    assert found["model"]["joint_nats"] == pytest.approx(nats) and nats < 0
    assert "bounds on log p of Discretized Gaussian observations" in capsys.readouterr().out
    iterations = ["iterations=[2]", "chain_tasks=[0.5]"]
    assert run_here(monkeypatch, *few, "tasks=[0.5]", "likelihood_images=2", *iterations, script="complete") == 0


@pytest.mark.parametrize("observations", ["null", "discretized_gaussian"])
def test_an_objective_of_ones_own_that_fixes_beta_is_measured_under_it(here, own_parts, monkeypatch, observations):
    words = [*SMALL, "loss._target_=own_parts.Fixed", f"loss.observations={observations}", "name=run"]
    assert run_here(monkeypatch, *words) == 0
    vae, x = blv.load("outputs/run", device="cpu"), blv.images("digits", "test")
    assert vae.variance == 0.04
    summary = json.loads(Path("outputs/run/summary.json").read_text())
    loss = blv.BigLearnELBO(0.04, observations=vae.observations)
    assert blv.evaluation.elbo(vae, x, loss)["elbo_nats"] == pytest.approx(summary["test_joint_bound_nats"])
    few = ["run=outputs/run", "likelihood_images=3", "images=9", "draws=2", "samples=2"]
    assert run_here(monkeypatch, *few, script="evaluate") == 0
    found = json.loads(Path("outputs/run/evaluation.json").read_text())["likelihood"]["model"]
    assert found.get("variance", 0.04) == 0.04
    assert found["joint_nats"] == pytest.approx(blv.evaluation.likelihood(vae, x[:3], samples=2)["joint_nats"])
    # Both kinds predict means, so that either may begin with weights of the other.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*these settings are for")
        assert run_here(monkeypatch, *SMALL, "init_from=outputs/run", "name=next") == 0


@pytest.mark.parametrize("loss", ["Binary", "Binary_by_its_own"])
def test_an_objective_of_ones_own_that_fixes_its_observations(here, own_parts, monkeypatch, loss):
    words = ["binarize=threshold", f"loss._target_=own_parts.{loss}", "loss.beta=1", "name=own"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    words = ["binarize=threshold", "loss.observations=bernoulli", "loss.beta=1", "name=usual"]
    assert run_here(monkeypatch, *SMALL, *words) == 0
    x = (blv.images("digits", "test")[:20] >= 0.5).float()
    own, usual = (blv.load(f"outputs/{name}", device="cpu").log_prob(x, seed=0) for name in ("own", "usual"))
    torch.testing.assert_close(own, usual, rtol=1e-6, atol=0)
    few = ["run=outputs/own", "images=9", "draws=2", "likelihood_images=2", "samples=2"]
    assert run_here(monkeypatch, *few, script="evaluate") == 0
    with pytest.warns(match="observations, these settings are for gaussian ones"):
        assert run_here(monkeypatch, *SMALL, "init_from=outputs/own", "name=grey", "trainer.steps=2") == 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loss.observations=bernoulli", "the benchmark is of Gaussian observations, which take as long"),
        ("model._target_=own_parts.Bare", "knows how UniversalViT and TwoStackViT work alone, got a Bare"),
        ("loss._target_=own_parts.Bernoulli", "which terms or masks of one's own are not, got Bernoulli with MaskSam"),
        (
            "masks._target_=own_parts.columns",
            "masks of one's own are not, got BigLearnELBO with Columns",
        ),
    ],
)
def test_the_benchmark_refuses_what_it_does_not_know(own_parts, monkeypatch, capsys, word, expected):
    own = ["+masks.first=1"] if word.startswith("masks") else []
    assert run_here(monkeypatch, word, *own, "device=cpu", script="benchmark") == 2
    assert expected in capsys.readouterr().err


def test_a_run_killed_at_any_step_resumes_to_the_same_bits(here, trained, monkeypatch, capsys):
    process = start(*SMALL, "name=killed", cwd=here)
    latest = here / "outputs" / "killed" / "checkpoints" / checkpoint.LATEST
    while not latest.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    finish(process, -signal.SIGKILL)
    assert run_here(monkeypatch, *SMALL, "name=killed") == 0
    assert "going on with" in capsys.readouterr().out
    assert_same_runs(trained, here / "outputs" / "killed")


def test_a_run_killed_before_its_first_checkpoint_starts_anew(here, trained, monkeypatch, capsys):
    process = start(*SMALL, "name=killed", "trainer.steps=100000", "trainer.checkpoint_every=7", cwd=here)
    log = here / "outputs" / "killed" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.002)
    process.kill()
    finish(process, -signal.SIGKILL)
    for left in (here / "outputs" / "killed" / "checkpoints").glob("*"):  # as if killed a moment earlier
        left.unlink()
    capsys.readouterr()
    assert run_here(monkeypatch, *SMALL, "name=killed") == 0
    assert "training outputs/killed" in capsys.readouterr().out
    assert_same_runs(trained, here / "outputs" / "killed")


def test_a_machine_without_git_and_damaged_leftovers(here, monkeypatch, capsys):
    commands._commit.cache_clear()
    monkeypatch.setenv("PATH", str(here))
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    run = here / "outputs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text("{")
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    again = json.loads((run / "summary.json").read_text())
    assert again["test_joint_elbo"] == summary["test_joint_elbo"]
    (run / "config.yaml").write_text("{ broken")
    assert run_here(monkeypatch, *SMALL, "name=run") == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert json.loads((run / "environment.json").read_text())["commit"] is None
    commands._commit.cache_clear()


def test_sweeps_are_checked_before_they_start(here, monkeypatch, capsys):
    for words in (["trainer.steps=2,4"], ["name=x", "seed=0,1"], ["case=case1,case9"]):
        assert run_here(monkeypatch, "-m", *SMALL, *words) == 2
    error = capsys.readouterr().err
    assert "a sweep over trainer.steps would use one folder" in error and "got case9" in error
    assert not (here / "outputs").exists()


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(here, trained, monkeypatch, capsys, recwarn):
    shutil.copytree(trained, here / "outputs/whole")
    run = here / "outputs" / "run"
    (run / "summary.json").unlink()
    latest = run / "checkpoints" / checkpoint.LATEST
    latest.write_bytes(latest.read_bytes()[:5000])
    assert run_here(monkeypatch, *SMALL, "name=run") == 0
    assert any(
        "latest.pt is not a readable checkpoint" in str(w.message) and "previous.pt" in str(w.message) for w in recwarn
    )
    assert_same_runs(here / "outputs" / "whole", run)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_ends_cleanly(tmp_path, monkeypatch, capsys, number):
    words = [*SMALL, "name=run", "trainer.evaluate_every=100000", "trainer.checkpoint_every=100000"]
    process = start(*words, "trainer.steps=100000", cwd=tmp_path)
    log = tmp_path / "outputs" / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and '"train/loss"' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(number)
    output = finish(process)
    assert "a checkpoint is written, the same command goes on" in output and "Traceback" not in output
    state = checkpoint.load(tmp_path / "outputs" / "run" / "checkpoints" / checkpoint.LATEST)
    assert f"stopped at step {state['step']} of 100000" in output
    # Called finished there, it is evaluated there, not where it was the last time.
    monkeypatch.chdir(tmp_path)
    steps = state["step"]
    assert run_here(monkeypatch, *words, f"trainer.steps={steps}") == 0
    assert json.loads((tmp_path / "outputs/run/summary.json").read_text())["best_step"] == steps
    assert (
        run_here(monkeypatch, "run=outputs/run", "images=2", "draws=2", "likelihood_images=0", script="evaluate") == 0
    )
    assert f"outputs/run: best.pt, of step {steps}; the run has {steps}" in capsys.readouterr().out


def test_two_processes_train_like_one(here, monkeypatch):
    assert run_here(monkeypatch, *SMALL, "name=one") == 0
    output = finish(start(*SMALL, "name=two", cwd=here, torchrun=2))
    assert output.count("training outputs/two") == 1  # rank 0 alone prints
    one, two = (metrics(here / "outputs" / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_a_sweep_under_torchrun_is_refused(tmp_path):
    # What torchrun gives its processes, without torchrun's own report of a failed process around it.
    os_environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", "seed=0,1"]
    environment = os.environ | os_environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "cannot run under torchrun" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["case=case9"], "case9"),
        (["trainer.stepz=3"], "trainer.stepz: there is no such setting; did you mean trainer.steps"),
        (["optim=null"], "optim must be one of adamw, celeba, muon, paper, got null"),
        (["method.name=vae"], "method.name says what was chosen and chooses nothing: give method=vae"),
        (["lr=0.1"], "lr: there is no such setting; did you mean optim.lr? --help lists all"),
        (["+optm.lr=0.1"], "optm.lr: there is no such setting; did you mean optim.lr?"),
        (
            ["-m", "evaluation.ratio=[0.1],[0.2]"],
            "evaluation.ratio: there is no such setting; did you mean evaluation.ratios",
        ),
        (["data.patch_size=3"], "data: patch_size must divide the image"),
        (["model.z_dim=0"], "z_dim must be at least 1, got 0"),
        (["masks.s_ratio=[0,1]"], "s_ratio must be 2 numbers in (0, inf), got [0, 1]: parameters of a Beta"),
        (["loss.beta=-0.1"], "beta must be a number in [0, inf), got -0.1"),
        (["seed=zero"], "seed must be a whole number, got 'zero'"),
        (["trainer.steps=1.5"], "trainer.steps must be a whole number, got 1.5"),
        (["trainer.steps=0"], "trainer.steps must be at least 1, got 0"),
        (["trainer.batch_size=0"], "trainer: batch_size must be at least 1, got 0"),
        (["data=image_folder", "data.root=empty"], "holds 0 readable image files"),
        (["data=image_folder", "data.root=absent"], "there is no folder absent"),
        (["data=image_folder"], "data.root=... must be given: folder of the data"),
        (["data=array_file"], "data.root=... must be given: the .npz or .npy file"),
        (
            ["data=array_file", "data.root=empty"],
            "empty is a folder: point data.root at an .npz or .npy file of images",
        ),
        (["+trainer.stepz=3"], "trainer.stepz: there is no such setting"),
        (["evaluation.ratios=[2]"], "evaluation.ratios must be shares in [0, 1), as something must be hidden"),
        (["evaluation.ratios=[0.5,1]"], "evaluation.ratios must be shares in [0, 1)"),
        (["evaluation.draws=0"], "evaluation.draws must be at least 1, got 0"),
        (["evaluation.images=all"], "evaluation.images must be a whole number, got 'all'"),
        (["device=cuda:99"], "not available here"),
        (["device=abacus"], "unknown device"),
        (["device=cpu", "trainer.cuda_graph=true"], "trainer: cuda_graph=true needs a GPU, one process and shapes"),
    ],
)
def test_errors_are_a_line_that_says_what_to_do(here, monkeypatch, capsys, words, expected):
    (here / "empty").mkdir()
    assert run_here(monkeypatch, *words) == 2
    output = capsys.readouterr()
    assert expected in output.err + output.out
    assert "Traceback" not in output.err
    assert not (here / "outputs").exists()


def test_evaluating_what_is_not_there(here, monkeypatch, capsys):
    assert run_here(monkeypatch, "run=outputs/nothing", script="evaluate") == 2
    assert "there is no run in outputs/nothing" in capsys.readouterr().err
    (here / "outputs/one").mkdir(parents=True)
    (here / "outputs/one/config.yaml").write_text("")
    assert run_here(monkeypatch, "run=outputs/nothing", script="evaluate") == 2
    assert "it has no config.yaml. There are outputs/one.\n" in capsys.readouterr().err
    assert run_here(monkeypatch, script="evaluate") == 2
    assert "run" in capsys.readouterr().err
    (here / "model.pt").write_bytes(b"")
    assert run_here(monkeypatch, "run=model.pt", script="probe") == 2
    assert "model.pt is a file, and the folder of a run is needed" in capsys.readouterr().err


def test_other_images_under_the_same_name_are_not_taken_for_the_first(here, monkeypatch, capsys):
    from PIL import Image

    for number, folder in enumerate(("a/pictures", "b/pictures")):
        (here / folder).mkdir(parents=True)
        for k in range(12):
            Image.new("L", (8, 8), 9 * k + number).save(here / folder / f"{k}.png")
    words = [*SMALL, "data=image_folder", "data.image_size=8", "data.patch_size=4"]
    assert run_here(monkeypatch, *words, "data.root=a/pictures") == 0
    assert run_here(monkeypatch, *words, "data.root=b/pictures") == 2
    assert "other data" in capsys.readouterr().err
    (here / "a").rename(here / "moved")
    assert run_here(monkeypatch, *words, "data.root=moved/pictures") == 0
    assert run_here(monkeypatch, *words, "data.root=nowhere/pictures") == 2


def test_arrays_that_lack_pixels_are_trained_on_measured_and_drawn(here, monkeypatch, capsys):
    images = np.random.default_rng(0).random((40, 8, 8))
    images[images < 0.1] = np.nan
    np.savez(here / "arrays.npz", images=images, labels=np.array(["a", "b"] * 20))
    words = ["data=array_file", "data.root=arrays.npz", "data.image_size=8", "data.patch_size=2", "data.channels=1"]
    assert run_here(monkeypatch, *SMALL, *words, "name=run") == 0
    summary = json.loads((here / "outputs/run/summary.json").read_text())
    assert math.isfinite(summary["test_joint_elbo"]) and math.isfinite(summary["inpainting_psnr"]["0.5"])
    assert run_here(monkeypatch, "run=outputs/run", "draws=1", "ratios=[0.5]", script="probe") == 0
    probed = json.loads((here / "outputs/run/probe.json").read_text())
    assert probed["test_images"] == 4 and 0 <= probed["codes"]["0.5"]["mean"] <= 1
    np.savez(here / "arrays.npz", images=np.flip(images, 1))
    assert run_here(monkeypatch, "run=outputs/run", script="probe") == 2
    assert "was trained on other images" in capsys.readouterr().err


def test_a_torch_dataset_of_ones_own_is_trained_on_and_measured(here, monkeypatch, capsys):
    code = """
        from pathlib import Path
        import torch
        from torch.utils.data import TensorDataset

        def stripes(split: str, count: int, crop: list, root: str):
            first = float(Path(root).read_text()) if Path(root).is_file() else 0.5
            exponents = first + torch.arange(count if split == "train" else 9)
            images = torch.linspace(0, 1, 8).repeat(8, 1) ** exponents.view(-1, 1, 1, 1)
            return TensorDataset(images, torch.arange(len(images)) % 2)
    """
    (here / "my_stripes.py").write_text(textwrap.dedent(code))
    (here / "one").write_text("0.5")
    (here / "other").write_text("1.5")
    monkeypatch.syspath_prepend(here)
    words = ["data=torch_dataset", "data._target_=my_stripes.stripes", "+data.count=40", "+data.crop=[1,2]"]
    words += ["data.image_size=8", "data.patch_size=2", "data.channels=1", *SMALL, "trainer.steps=4"]
    words = [*words, "data.root=null", "name=run"]
    assert run_here(monkeypatch, *words) == run_here(monkeypatch, *words) == 0
    assert "is finished" in capsys.readouterr().out
    (run,) = (here / "outputs").iterdir()
    assert run_here(monkeypatch, f"run={run}", "draws=1", "ratios=[0.5]", script="probe") == 0
    assert json.loads((run / "probe.json").read_text())["test_images"] == 9
    capsys.readouterr()
    assert run_here(monkeypatch, *words[:-2], "data.root=one", "name=run") == 0  # the same images
    assert run_here(monkeypatch, *words[:-2], "data.root=other", "name=run") == 2
    assert "was trained on other data: start another run" in capsys.readouterr().err


def test_what_was_measured_on_other_test_images_is_kept(here, monkeypatch, capsys):
    train, one, other = np.random.default_rng(0).integers(256, size=(3, 20, 8, 8), dtype=np.uint8)
    for name, test in (("one", one), ("other", other)):
        np.savez(here / f"{name}.npz", train_images=train, test_images=test)
    words = ["data=array_file", "data.root=one.npz", "data.image_size=8", "data.patch_size=2", "data.channels=1"]
    assert run_here(monkeypatch, *SMALL, *words, "trainer.steps=2", "method=vae", "name=run") == 0
    words = ["run=outputs/run", "images=9", "draws=2", "likelihood_images=2", "samples=2"]
    for more in ([], ["data_root=other.npz"], ["data_root=other.npz"]):
        assert run_here(monkeypatch, *words, *more, script="evaluate") == 0
    out, run = capsys.readouterr().out, here / "outputs/run"
    assert out.count("what was measured before, with other settings, on other images or at another step") == 1
    assert "conditional and consistency: by an encoder and a decoder that never saw a part of an image" in out
    found = [json.loads((run / name).read_text()) for name in ("evaluation-1.json", "evaluation.json")]
    assert found[0]["settings"] == found[1]["settings"] and found[0]["data"] != found[1]["data"]
    assert found[0]["test_joint_elbo"] != found[1]["test_joint_elbo"] and not (run / "evaluation-2.json").exists()


def test_evaluating_images_of_one_patch(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "data.patch_size=8", "name=run") == 0
    words = ["run=outputs/run", "images=4", "draws=2", "likelihood_images=2", "samples=2"]
    with pytest.warns(UserWarning, match=r"^0 of 1 patches are observed at 0.1 and 0.3 and 0.5 and 0.7$"):
        assert run_here(monkeypatch, *words, script="evaluate") == 0
    out = capsys.readouterr().out
    assert "nats, variance 0.01 (beta)" in out and "outputs/run/evaluation.json" in out
    words = ["run=outputs/run", "draws=1", "train_images=40", "test_images=20", "ratios=[1.0,0.3,0]"]
    with pytest.warns(UserWarning, match=r"^0 of 1 patches are observed at 0.3 and 0$"):
        assert run_here(monkeypatch, *words, script="probe") == 0


def test_evaluating_samples_in_passes(here, trained, monkeypatch, capsys):
    import biglearn_vae as blv
    from biglearn_vae import samples

    words = ["run=outputs/run", "images=9", "draws=2", "samples=2", "passes=[1,3]", "device=cpu"]
    for count in (2, 0):
        assert run_here(monkeypatch, *words, f"likelihood_images={count}", script="evaluate") == 0
        out = capsys.readouterr().out
        assert "samples, by number of passes" in out and "  real  " in out
        found = json.loads((here / "outputs/run/evaluation.json").read_text())["passes"]
        vae, images = blv.load("outputs/run", device="cpu"), blv.images("digits", split="test")[:9]
        train = blv.images("digits", split="train")[: 10 * count]
        expected = samples.by_passes(vae, images, [1, 3], train, count, 2, 0)
        for passes, scores in found["scores"].items():
            timeless = {name: value for name, value in scores.items() if name != "seconds"}
            assert timeless == pytest.approx({name: expected[passes][name] for name in timeless})
            assert ("joint_nats" in scores) == ("variance" in scores) == (count > 0)
    assert found["images"] == 9
    assert found["real"] == samples.precision_recall(blv.images("digits", split="train")[:9], images)
    # Others than those that are measured, and as many: balls shrink with their number.
    assert run_here(monkeypatch, *words, "split=train", "likelihood_images=0", script="evaluate") == 0
    found = json.loads((here / "outputs/run/evaluation.json").read_text())["passes"]
    train = blv.images("digits", split="train")
    assert found["real"] == samples.precision_recall(train[9:18], train[:9])
    capsys.readouterr()
    assert run_here(monkeypatch, *words, "images=3", script="evaluate") == 0
    assert "fewer than 4 of these 3 images were recorded as a whole" in capsys.readouterr().out
    assert "passes" not in json.loads((here / "outputs/run/evaluation.json").read_text())


def test_evaluating_images_of_which_none_was_recorded_as_a_whole(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "missing=0.5", "name=run") == 0
    assert run_here(monkeypatch, "run=outputs/run", "split=valid", "images=4", "draws=2", script="evaluate") == 0
    assert "images was recorded as a whole: no log-likelihoods" in capsys.readouterr().out
    result = json.loads((here / "outputs/run/evaluation.json").read_text())
    assert "valid_joint_elbo" in result and "likelihood" not in result


def test_evaluating_on_other_data_than_the_run_was_trained_on(here, trained, monkeypatch, capsys):
    config_file = here / "outputs/run/config.yaml"
    config_file.write_text(config_file.read_text().replace("name: digits", "name: image_folder\n  root: a"))
    from PIL import Image

    (here / "a").mkdir()
    for k in range(12):
        Image.new("L", (8, 8), k).save(here / "a" / f"{k}.png")
    assert run_here(monkeypatch, "run=outputs/run", script="evaluate") == 2
    assert "was trained on other images" in capsys.readouterr().err
    (here / "a").rename(here / "b")
    assert run_here(monkeypatch, "run=outputs/run", script="evaluate") == 2
    assert "there is no folder a: point data_root at a folder" in capsys.readouterr().err  # as it is named here


def test_a_run_that_cannot_be_written_to_is_refused_before_it_is_measured(here, trained, monkeypatch, capsys):
    run = here / "outputs/run"
    run.chmod(0o500)
    try:
        if os.access(run, os.W_OK):
            pytest.skip("this user may write anywhere")
        for script in ("evaluate", "complete", "probe", "figures"):
            assert run_here(monkeypatch, "run=outputs/run", script=script) == 2
            error = capsys.readouterr().err
            assert "outputs/run cannot be written" in error and "copy it" in error and "Traceback" not in error
    finally:
        run.chmod(0o700)


@pytest.mark.parametrize(
    "word", ["split=note", "seed=abc", "checkpoint=worst", "run=5", "ratios=[]", "passes=[0]", "passes=4"]
)
def test_evaluate_refuses_what_it_cannot_use(here, monkeypatch, capsys, word):
    (here / "outputs").mkdir()
    words = [word] if word.startswith("run=") else ["run=outputs/run", word]
    assert run_here(monkeypatch, *words, script="evaluate") == 2
    assert word.split("=")[0] in capsys.readouterr().err


def test_probe_a_run(here, trained, monkeypatch, capsys):
    capsys.readouterr()
    words = ["run=outputs/run", "device=cpu", "draws=2", "ratios=[1.0,0.3]", "train_images=200", "test_images=50"]
    assert run_here(monkeypatch, *words, "split=valid", "ceiling_steps=3", script="probe") == 0
    printed = capsys.readouterr().out
    result = json.loads((here / "outputs/run/probe.json").read_text())
    assert (result["name"], result["checkpoint"], result["step"]) == ("run", "best.pt", 24)
    assert (result["train_images"], result["test_images"], result["metric"]) == (200, 50, "accuracy")
    assert result["settings"]["split"] == "valid" and result["settings"]["ceiling_steps"] == 3
    for name in ("codes", "pixels", "ceiling"):
        assert list(result[name]) == ["1.0", "0.3"] and result[name]["0.3"]["std"] is not None
        cells = (f"{100 * x['mean']:.1f} ± {100 * x['std']:.1f}" for x in result[name].values())
        assert all(cell in printed for cell in cells)
    vae, splits = blv.load("outputs/run", device="cpu"), blv.data.load("digits")
    train, test = (blv.probe.some(part, n) for part, n in ((splits.train, 200), (splits.valid, 50)))
    direct = blv.probe.linear_probe(vae, train, test, [1.0, 0.3], draws=2)
    assert result["codes"]["0.3"] == direct["codes"][0.3] and result["pixels"]["1.0"] == direct["pixels"][1.0]

    assert run_here(monkeypatch, *words, "split=valid", "ceiling_steps=3", script="probe") == 0
    again = json.loads((here / "outputs/run/probe.json").read_text())
    assert again.pop("environment")["device"] == result.pop("environment")["device"] and again == result
    assert not (here / "outputs/run/probe-1.json").exists()
    capsys.readouterr()
    assert run_here(monkeypatch, *words, "pixels=false", "draws=1", script="probe") == 0
    assert "probe-1.json" in capsys.readouterr().out
    kept = json.loads((here / "outputs/run/probe-1.json").read_text())
    assert kept.pop("environment") and kept == again
    other = json.loads((here / "outputs/run/probe.json").read_text())
    assert "pixels" not in other and "ceiling" not in other and other["settings"]["split"] == "test"


def test_probing_images_without_labels(here, monkeypatch, capsys):
    from PIL import Image

    (here / "a").mkdir()
    for k in range(12):
        Image.new("L", (8, 8), 20 * k).save(here / "a" / f"{k}.png")
    words = ["data=image_folder", "data.root=a", "data.image_size=8", "data.patch_size=2", "data.channels=1"]
    assert run_here(monkeypatch, *SMALL, *words, "name=run") == 0
    assert run_here(monkeypatch, "run=outputs/run", script="probe") == 2
    error = capsys.readouterr().err
    assert "the training images have no labels" in error and "Traceback" not in error


@pytest.mark.parametrize(
    "word",
    [
        *("split=train", "seed=abc", "checkpoint=worst", "run=5", "ratios=[2]", "ratios=[]", "draws=0", "pixels=1"),
        *("train_images=0", "test_images=some", "ceiling_steps=-1"),
    ],
)
def test_probe_refuses_what_it_cannot_use(here, monkeypatch, capsys, word):
    (here / "outputs").mkdir()
    words = [word] if word.startswith("run=") else ["run=outputs/run", word]
    assert run_here(monkeypatch, *words, script="probe") == 2
    error = capsys.readouterr().err
    assert word.split("=")[0] in error and "Traceback" not in error


def test_a_checkpoint_of_another_architecture(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "name=a") == 0
    assert run_here(monkeypatch, *SMALL, "name=b", "model.dim=8") == 0
    name = Path("checkpoints") / checkpoint.BEST
    (here / "outputs/a" / name).write_bytes((here / "outputs/b" / name).read_bytes())
    assert run_here(monkeypatch, "run=outputs/a", script="evaluate") == 2
    assert "holds another architecture" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(here, monkeypatch, capsys):
    words = [*SMALL, "name=run", "optim.lr=1e30", "optim.clip_norm=null"]
    assert run_here(monkeypatch, *words) == 2
    error = capsys.readouterr().err
    assert "the loss is not finite at step" in error and "reconstruction" in error and "Traceback" not in error


def test_what_is_typed_beside_settings(here, monkeypatch, capsys):
    assert run_here(monkeypatch, "--help", "-m", "seed=0,1", "case=case4") == 0
    assert "model.dim=512" in capsys.readouterr().out
    assert run_here(monkeypatch, "seed=1", "--info", "defaults") == 0
    assert run_here(monkeypatch, "seed=0,1", "name=x", "hydra.mode=MULTIRUN") == 2
    assert "name=x would be the folder of several runs" in capsys.readouterr().err
    (here / "own").mkdir()
    assert run_here(monkeypatch, "-m", "--config-dir=own", "seed=0,1", "name=x") == 2
    assert "name=x would be the folder of several runs" in capsys.readouterr().err
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="case must be one of"):
        run_here(monkeypatch, "case=case9")


def test_a_sweep_notes_what_it_was_where_its_runs_are(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here / "home"))
    words = [*SMALL, "-m", "seed=0,1", "trainer.steps=1", 'output_dir="~/runs"']
    assert run_here(monkeypatch, *words) == 0
    assert (here / "home/runs/multirun.yaml").is_file() and not (here / "~").exists()
    assert len(list((here / "home/runs").glob("*/summary.json"))) == 2
    monkeypatch.chdir(next((here / "home/runs").glob("*seed0*")))
    assert run_here(monkeypatch, "run=.", "images=2", "likelihood_images=0", script="evaluate") == 0
    assert json.loads(Path("evaluation.json").read_text())["name"] == Path.cwd().name


def test_settings_of_ones_own_folder(here, monkeypatch, capsys):
    own_case(here / "own", "wide")
    assert run_here(monkeypatch, "--config-dir=own", "case=wide", *SMALL, "name=run") == 0
    assert run_here(monkeypatch, "--config-dir=own", "case=wide", "modle.dim=8") == 2
    assert "error: modle.dim: there is no such setting; did you mean model.dim?" in capsys.readouterr().err
    assert run_here(monkeypatch, "--config-dir=own", "--help") == 0
    assert "celeba_small, tiny, wide\n" in capsys.readouterr().out
    (here / "own/mine.yaml").write_text("defaults:\n  - train\n  - override case: wide\n  - _self_\n")
    own = ["--config-dir", "own", "--config-name=mine"]
    assert run_here(monkeypatch, *own, "-m", "trainer.steps=6,8") == 2
    assert "a sweep over trainer.steps would use one folder" in capsys.readouterr().err
    named = "defaults:\n  - train\n  - _self_\nname: fixed\n"
    (here / "own/named.yaml").write_text(named)
    assert run_here(monkeypatch, "--config-dir=own", "--config-name=named", "-m", "seed=0,1") == 2
    assert "name=fixed would be the folder of several runs of a sweep over seed" in capsys.readouterr().err
    assert run_here(monkeypatch, *own, script="evaluate") == 2
    assert "--config-name must be evaluate, got 'mine'" in capsys.readouterr().err
    assert run_here(monkeypatch, *own, *SMALL, "-m", "seed=0,1", "trainer.steps=2", "hydra.job.chdir=true") == 0
    assert run_here(monkeypatch, "run=outputs/run", "images=2", "likelihood_images=0", script="evaluate") == 0


def test_a_setting_may_be_that_of_another(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL, "trainer.steps=2", "name=run", "model.z_dim=${model.dim}") == 0
    config = OmegaConf.load("outputs/run/config.yaml")
    assert config.model.z_dim == 16 == config.model.dim
    command = json.loads(Path("outputs/run/environment.json").read_text())["command"]
    assert shlex.split(command) == ["train.py", *SMALL, "trainer.steps=2", "name=run", "model.z_dim=${model.dim}"]
    assert run_here(monkeypatch, *SMALL, "model.z_dim=${model.dims}") == 2
    assert (
        "\nerror: model.z_dim: Interpolation key 'model.dims' not found: give model.z_dim itself\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("word", "why"),
    [
        (
            "hydra.mode=FOO",
            "Error merging override hydra.mode=FOO: Invalid value 'FOO', expected one of [RUN, MULTIRUN]",
        ),
        ("hydra.foo=1", "Could not override 'hydra.foo'. To append to your config use +hydra.foo=1"),
    ],
)
def test_what_hydra_refuses_of_its_own_settings_is_a_line(here, monkeypatch, capsys, word, why):
    assert run_here(monkeypatch, *SMALL, word) == 2
    assert capsys.readouterr().err == f"error: {why}\n"


def test_a_sweep_in_a_file_of_ones_own(here, monkeypatch, capsys):
    own = ["--config-dir=own", "--config-name=mine", *SMALL]
    (here / "own").mkdir()

    def write(mode, **params):
        lines = "".join(f"      {name.replace('__', '.')}: {values}\n" for name, values in params.items())
        text = f"defaults: [train, _self_]\nhydra:\n  mode: {mode}\n  sweeper:\n    params:\n{lines}"
        (here / "own/mine.yaml").write_text(text)

    for params, expected in {
        ("trainer__accumulate", "1,2"): "a sweep over trainer.accumulate would use one folder",
        ("trainer__stepz", "2,4"): "trainer.stepz: there is no such setting",
        ("optim__lr", "range(0)"): "optim.lr=range(0) has no values",
        ("optim__lr", "interval(1,2)"): "gives an interval, of which a sweep cannot take every value",
    }.items():
        write("MULTIRUN", **dict([params]))
        assert run_here(monkeypatch, *own) == 2
        assert expected in capsys.readouterr().err
    write("MULTIRUN", seed="0,1", model__z_dim="4,x")
    assert run_here(monkeypatch, *own) == 2
    assert len(list((here / "outputs").glob("*/summary.json"))) == 2
    assert "error: seed=0 model.z_dim=x: " in capsys.readouterr().err
    assert run_here(monkeypatch, *own, "hydra.mode=RUN", "optim.lr=1,2") == 2
    assert "gives several values: a sweep over them needs -m" in capsys.readouterr().err
    write("RUN", seed="0,1", trainer__steps="2,4")
    typed = ["trainer.steps=2", "output_dir=other", "model.z_dim=4"]  # the first in place of what the file has
    assert run_here(monkeypatch, *own, "-m", *typed) == 0
    assert len(list((here / "other").glob("*/summary.json"))) == 2
    write("RUN", seed="0,1")
    assert run_here(monkeypatch, *own, "-m", "name=x") == 2
    assert "name=x would be the folder of several runs of a sweep over seed" in capsys.readouterr().err


def test_flags_may_come_anywhere(here, monkeypatch, capsys):
    assert run_here(monkeypatch, *SMALL[:4], "-m", *SMALL[4:], "seed=0,1") == 0
    assert len(list((here / "outputs").glob("*/summary.json"))) == 2
    assert run_here(monkeypatch, "--config-name=evaluate") == 2
    assert "--config-name must be train or patch_ae, got 'evaluate'" in capsys.readouterr().err


def test_the_module_says_which_scripts_there_are(capsys, monkeypatch):
    for words, code in (["--help"], None), ([], 1), (["draw"], 1):
        monkeypatch.setattr(sys, "argv", ["-m", *words])
        with pytest.raises(SystemExit) as end:
            runpy.run_module("biglearn_vae", run_name="__main__")
        said = capsys.readouterr().out if code is None else end.value.code
        assert "SCRIPT being one of train, evaluate" in said and isinstance(end.value.code, str) == bool(code)


def test_help_explains_the_settings(here, monkeypatch, capsys):
    assert run_here(monkeypatch, "--help", "case=case4") == 0
    printed = capsys.readouterr().out
    assert "model.dim=512" in printed and "loss.beta=0.01" in printed and "weight of the KL" in printed
    assert "(a sweep): seed=0,1,2. Hydra's own flags: --hydra-help.\n" in printed
    for script, words in {"probe": "(a sweep): run=outputs/a,outputs/b. Hydra's", "reproduce": "\n\nHydra's"}.items():
        assert run_here(monkeypatch, "--help", script=script) == 0
        assert words in capsys.readouterr().out


@pytest.mark.gpu
def test_a_run_made_on_a_gpu_gives_the_same_numbers_on_a_cpu(here, monkeypatch):
    assert run_here(monkeypatch, *SMALL, "name=run", "device=cuda") == 0
    there, back = (blv.load("outputs/run", device=device) for device in ("cuda", "cpu"))
    x = blv.images("digits", split="test")[:8]
    S = blv.masks.random(8, back.num_tokens, ratio=0.5, seed=0)
    z = torch.randn(8, back.z_dim, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(there.encode(x, S).mean.cpu(), back.encode(x, S).mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there.decode(z, x, S).cpu(), back.decode(z, x, S), rtol=1e-3, atol=1e-4)
    assert run_here(monkeypatch, *SMALL, "name=run", "device=cuda", "trainer.steps=30") == 0
    assert json.loads((here / "outputs/run/summary.json").read_text())["steps"] == 30
