"""Trainer, on a network, a loss and batches that have nothing to do with the model."""

import copy
import functools
import gc
import math
import shutil
import signal
import weakref
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from biglearn_vae import (
    BigLearnELBO,
    MaskSampler,
    Optim,
    Patchify,
    Trainer,
    TrainingError,
    UniversalViT,
    World,
    checkpoint,
    data,
    layers,
)
from biglearn_vae.cuda_graph import StepGraph
from biglearn_vae.data import Batches
from biglearn_vae.distributed import pick_device
from biglearn_vae.loggers import Logger
from biglearn_vae.trainer import Interrupted, Interruption, choose_compile, choose_cuda_graph, choose_precision

OPTIM = Optim(lr=0.05, warmup_steps=3, schedule="cosine", clip_norm=1.0, ema_decay=0.9)


@dataclass
class Parts:
    loss: torch.Tensor

    def scalars(self):
        return {"loss": self.loss, "root": self.loss.sqrt()}


def noisy_squares(net, batch, *, random, step):
    return Parts(
        (net(batch) - batch.sum(-1, keepdim=True) + 0.1 * random.normal((len(batch), 1), batch.dtype)).square().mean()
    )


class Points:
    batch_size = 4

    def __call__(self, step):
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


class Images:
    batch_size = 8

    def __call__(self, step):
        return torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(step))


class Recorder(Logger):
    def __init__(self):
        self.rows = []

    def scalars(self, step, values):
        timing = ("seconds", "images_per_second")
        self.rows.append((step, {k: v for k, v in values.items() if k not in timing}))


class Perceptron(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer[0](x) if isinstance(layer, nn.ModuleList) else layer(x)
        return x


def network():
    torch.manual_seed(0)
    return Perceptron(nn.Linear(3, 8), nn.Tanh(), nn.ModuleList([nn.Linear(8, 8)]), nn.Tanh(), nn.Linear(8, 1))


def distance(net):
    x = torch.ones(1, 3)
    return {"valid/elbo": -(net(x) - 3).square().item()}, {}


def make_trainer(folder=None, steps=20, loss=noisy_squares, batches=None, optim=OPTIM, **options):
    options = dict(report_every=5, evaluate_every=8, checkpoint_every=6) | options
    return Trainer(
        network(), loss, batches or Points(), optim, steps=steps, folder=folder, evaluate=distance, **options
    )


make = make_trainer


def assert_same(a, b):
    assert a.step == b.step
    for x, y in zip(a.net.parameters(), b.net.parameters(), strict=True):
        assert x.equal(y)
    for x, y in zip(a.average.parameters(), b.average.parameters(), strict=True):
        assert x.equal(y)
    for one, other in zip(a.optimizers, b.optimizers, strict=True):
        for x, y in zip(one.state.values(), other.state.values(), strict=True):
            assert all(x[key].equal(y[key]) for key in x)


@pytest.mark.parametrize("optim", [OPTIM, replace(OPTIM, muon_lr=0.02)], ids=["adamw", "muon"])
@pytest.mark.parametrize("lost", [6, 7, 8, 11, 13, 19])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, lost, optim):
    make = functools.partial(make_trainer, optim=optim)
    whole, log = make(tmp_path / "a"), Recorder()
    whole.fit([log])

    def dies(net, batch, *, random, step):
        if step == lost:
            raise SystemExit  # of which nothing takes notice
        return noisy_squares(net, batch, random=random, step=step)

    first = Recorder()
    with pytest.raises(SystemExit):
        make(tmp_path / "b", loss=dies).fit([first])
    second, resumed = Recorder(), make(tmp_path / "b")
    start = resumed.resume()
    assert start == lost // 6 * 6
    resumed.fit([second])
    assert_same(whole, resumed)
    assert log.rows == [row for row in first.rows if row[0] <= start] + second.rows
    best = [checkpoint.load(tmp_path / name / checkpoint.BEST) for name in "ab"]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]


def test_what_comes_from_the_global_generator_is_a_function_of_seed_and_step(tmp_path):
    class Crops(Points):
        lost = None

        def __call__(self, step):
            if step == self.lost:
                raise SystemExit  # of which nothing takes notice
            return super().__call__(step) + torch.randn(4, 1)

    def make(folder, **options):
        options = dict(batches=Crops(), steps=12, checkpoint_every=6) | options
        net = nn.Sequential(network(), nn.Dropout(0.5))
        return Trainer(net, noisy_squares, optim=OPTIM, folder=tmp_path / folder, **options)

    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    whole = make("a")
    torch.manual_seed(1)
    whole.fit()
    assert torch.rand(3).equal(expected)  # a training in between is not seen in what is drawn after it
    resumed, killed = make("b"), make("b")
    killed.batches.lost = 8
    with pytest.raises(SystemExit):
        killed.fit()
    assert resumed.resume() == 6
    resumed.fit()
    other = make("c", seed=1)
    other.fit()
    weights = [torch.cat([p.flatten() for p in trainer.net.parameters()]) for trainer in (whole, resumed, other)]
    assert not weights[0].equal(weights[2])
    assert_same(whole, resumed)


def test_more_steps_continue_a_finished_run(tmp_path):
    make(tmp_path, steps=6).fit()
    longer = make(tmp_path, steps=20)
    assert longer.resume() == 6
    longer.fit()
    assert longer.step == 20


class Signalled(Points):
    """A signal comes in the tenth step."""

    def __init__(self, number):
        self.number = number

    def __call__(self, step):
        if step == 9:
            signal.raise_signal(self.number)
        return super().__call__(step)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, number):
    before = signal.getsignal(number)
    stopped = make(tmp_path, batches=Signalled(number))
    with pytest.raises(KeyboardInterrupt, match="stopped at step 10 of 20; a checkpoint is written"):
        stopped.fit()
    assert stopped.step == 10 and stopped.interrupted and signal.getsignal(number) == before
    whole, resumed = make(tmp_path / "whole"), make(tmp_path)
    assert resumed.resume() == 10
    whole.fit()
    resumed.fit()
    assert_same(whole, resumed)
    stopped.fit()  # in the process that was interrupted, too
    assert not stopped.interrupted
    assert_same(whole, stopped)


@pytest.mark.parametrize("bad", [0, 7, 13])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, bad):
    def breaks(net, batch, *, random, step):
        parts = noisy_squares(net, batch, random=random, step=step)
        return Parts(parts.loss * (math.inf if step == bad else 1))

    with pytest.raises(TrainingError, match=rf"not finite at step {bad}: loss inf, root inf"):
        make(tmp_path, loss=breaks).fit()
    kept = bad // 6 * 6
    state = checkpoint.load_latest(tmp_path)
    assert state["step"] == kept if kept else state is None
    if kept:
        assert all(value.isfinite().all() for value in state["net"].values())


def test_the_average_and_the_update_by_hand():
    trainer = make(steps=7)
    by_hand, reference = network(), copy.deepcopy(trainer.average)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in by_hand.parameters() if p.ndim > 1], "weight_decay": OPTIM.weight_decay},
            {"params": [p for p in by_hand.parameters() if p.ndim < 2], "weight_decay": 0},
        ],
        betas=OPTIM.betas,
        eps=OPTIM.eps,
    )
    trainer.fit()
    from biglearn_vae import StepRandom, World

    for step in range(7):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / 7))
        optimizer.zero_grad()
        noisy_squares(by_hand, Points()(step), random=StepRandom.at(0, step, World()), step=step).loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        decay = min(0.9, (1 + step) / (10 + step))
        for average, value in zip(reference.parameters(), by_hand.parameters(), strict=True):
            average.data = decay * average.data + (1 - decay) * value.data
    for x, y in zip(trainer.net.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(x, y)
    for x, y in zip(trainer.result.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_numbers_of_numpy_are_kept_and_compared_like_others(tmp_path):
    """A checkpoint with one of NumPy's could not be read again."""

    def run(folder, steps, number=float, beta=0.01):
        images = data.ImageSet(torch.zeros(12, 1, 2, 3, dtype=torch.uint8))
        tokens = Batches(
            images, number(4) if number is np.int64 else 4, np.int64(1), transform=lambda x: x.view(-1, 6, 1)
        )
        net = UniversalViT(grid=(2, 3), token_dim=1, dim=8, depth=1, z_dim=2, heads=1)
        settings = dict(loss=BigLearnELBO(beta), batches=tokens, optim=Optim(), monitor=np.str_("valid/a"))
        return Trainer(
            net,
            **settings,
            steps=steps,
            folder=folder,
            seed=np.int64(2),
            evaluate=lambda _: ({np.str_("valid/a"): 0.0}, {}),
        )

    run(tmp_path, 2, np.int64).fit()
    again = run(tmp_path, 4)
    assert again.resume() == 2
    again.fit()
    for beta in (np.float64(0.5), 0.5):
        with pytest.raises(ValueError, match=r"another loss, whose beta was 0\.01, now it is 0\.5"):
            run(tmp_path, 4, beta=beta).resume()
    with pytest.raises(ValueError, match="seed must be a whole number, got None"):
        make(seed=None)


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_batch_of_another_length_is_taken_whole_or_refused(accumulate):
    class Short(Points):
        def __call__(self, step):
            return super().__call__(step)[: 3 if step == 2 else 4]

    trainer = make(batches=Short(), accumulate=accumulate, steps=5)
    if accumulate == 1:
        trainer.fit()
        return
    with pytest.raises(
        ValueError, match=r"batches gave 3 images at step 2, where each of 1 processes takes 4 of the 4"
    ):
        trainer.fit()


def test_a_step_that_was_cut_off_is_not_taken_twice(tmp_path):
    """A second Ctrl-C may come between the updates of two optimizers."""
    optim = replace(OPTIM, muon_lr=0.02)
    expected = make(optim=optim)
    expected.fit()

    def cut_off(trainer):
        step, calls = trainer.optimizers[1].step, []

        def interrupted():
            calls.append(trainer.step)
            if len(calls) == 14:
                raise KeyboardInterrupt
            step()

        trainer.optimizers[1].step = interrupted
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        return trainer

    trainer = cut_off(make(tmp_path, optim=optim))
    trainer.fit()
    assert_same(trainer, expected)
    with pytest.raises(ValueError, match=r"the last step was cut off .* no checkpoint to go on from"):
        cut_off(make(optim=optim)).fit()


def test_weights_that_a_bad_step_spoilt_are_never_the_best(tmp_path):
    def loss(net, batch, *, random, step):
        parts = noisy_squares(net, batch, random=random, step=step)
        return Parts(parts.loss * (math.nan if step == 4 else 1))

    trainer = make(tmp_path, loss=loss, report_every=100, evaluate_every=5, checkpoint_every=2)
    trainer.evaluate = lambda net: ({"valid/elbo": 1.0 + trainer.step}, {})
    with pytest.raises(TrainingError, match="the loss is not finite at step 4"):
        trainer.fit()
    for name in (checkpoint.BEST, checkpoint.LATEST):
        weights = checkpoint.load(tmp_path / name)["net"].values()
        assert all(part.isfinite().all() for part in weights)


def test_under_torchrun_a_trainer_is_told_of_the_others(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"give world=blv\.distributed\.start\(\)"):
        make()


def test_signals_that_are_ignored_stay_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert not interruption.requested
            signal.raise_signal(signal.SIGTERM)
            assert interruption.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_best_checkpoint_is_that_of_the_largest_value(tmp_path):
    log = Recorder()
    make(tmp_path, evaluate_every=1).fit([log])
    values = {step: row["valid/elbo"] for step, row in log.rows if "valid/elbo" in row}
    state = checkpoint.load(tmp_path / checkpoint.BEST)
    assert state["step"] == max(values, key=values.get)
    net = network()
    net.load_state_dict(state["net"])
    assert distance(net)[0]["valid/elbo"] == values[state["step"]]


def test_of_values_that_are_all_without_end_there_is_a_best_checkpoint_too(tmp_path):
    trainer = make_trainer(tmp_path, steps=8)
    trainer.evaluate = lambda net: ({"valid/elbo": -math.inf}, {})
    trainer.fit()
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 8


def test_reports_are_means_over_their_steps():
    every, grouped = Recorder(), Recorder()
    make(report_every=1).fit([every])
    make(report_every=5).fit([grouped])
    single = [row["train/loss"] for _, row in every.rows if "train/loss" in row]
    means = [row["train/loss"] for _, row in grouped.rows if "train/loss" in row]
    assert means == pytest.approx([sum(single[k : k + 5]) / 5 for k in range(0, 20, 5)])


@pytest.mark.parametrize("name", ["steps", "accumulate", "report_every", "evaluate_every", "checkpoint_every"])
def test_intervals_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make(**{name: 0})
    for other in ("3", 1.5):
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got {other!r}"):
            make(**{name: other})


def test_what_a_trainer_is_made_of_is_checked_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match=r"optim must be an Optim, .* got AdamW"):
        make_trainer(optim=torch.optim.AdamW(network().parameters()))
    for batches in ([1, 2], lambda step: torch.ones(4, 2)):
        with pytest.raises(ValueError, match=r"batches must be like Batches, .* got (list|function)"):
            make_trainer(batches=batches)
    with pytest.raises(ValueError, match=r"expected a network, .* \(of a BigLearnVAE its .net\), got Linear"):
        Trainer(type("Linear", (), {})(), noisy_squares, Points(), OPTIM, steps=1)
    make_trainer(str(tmp_path), steps=2).fit()  # a folder may be text
    assert checkpoint.load_latest(tmp_path)["step"] == 2


def test_a_frozen_network_is_refused_with_what_to_do():
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match=r"all are frozen.*deepcopy\(vae.net\).requires_grad_\(True\)"):
        Trainer(frozen, noisy_squares, Points(), OPTIM, steps=1)


def test_parameters_of_a_loss_are_refused_unless_they_are_the_networks():
    class Learned(BigLearnELBO):
        pass

    class Module(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, net, batch, *, random, step):
            return noisy_squares(net, batch, random=random, step=step)

    loss, net = Learned(0.1), network()
    loss.log_sigma, loss.fixed = nn.Parameter(torch.zeros(())), torch.zeros(())
    for given, name in ((loss, "log_sigma"), (Module(nn.Linear(2, 2)), "part.weight, part.bias")):
        with pytest.raises(ValueError, match=f"the loss has parameters of its own, {name}, which nothing would train"):
            Trainer(net, given, Points(), OPTIM, steps=1)
    for given in (Module(net), Module(nn.Linear(2, 2).requires_grad_(False))):
        Trainer(net, given, Points(), OPTIM, steps=1).fit()


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        (lambda loss: loss, r"expected of the loss what has .loss, .* got torch.float32 \(\)"),
        (lambda loss: type("P", (), {"loss": loss, "scalars": lambda _: {"a": 1.0}})(), "got a: float"),
        (
            lambda loss: type("P", (), {"loss": loss, "scalars": lambda _: {"a": torch.ones(2)}})(),
            r"a: torch.float32 \(",
        ),
    ],
)
def test_what_a_loss_gives_is_checked(gives, message):
    with pytest.raises(ValueError, match=message):
        make(loss=lambda *given, **options: gives(noisy_squares(*given, **options).loss)).fit()


def test_a_trained_network_is_one_to_evaluate():
    for evaluate_every in (1, 5):  # by itself the evaluation leaves it so at its own steps
        trainer = make(steps=6, optim=Optim(lr=0.01), evaluate_every=evaluate_every)
        trainer.fit()
        assert not trainer.result.training and not any(module.training for module in trainer.net.modules())


def test_a_folder_that_holds_a_run_is_not_written_over(tmp_path):
    first = make(tmp_path, steps=6)
    first.fit()
    with pytest.raises(ValueError, match=f"{tmp_path} holds a run.*call resume\\(\\) before fit"):
        make(tmp_path, steps=2).fit()
    assert checkpoint.load_latest(tmp_path)["step"] == 6
    first.steps = 8  # the trainer whose run it is goes on
    first.fit()
    assert checkpoint.load_latest(tmp_path)["step"] == 8


@pytest.mark.parametrize("steps", [9, 10])
def test_a_run_that_was_stopped_and_is_called_finished_is_evaluated_where_it_stopped(tmp_path, steps):
    partly = make(tmp_path / "run", evaluate_every=100, batches=Signalled(signal.SIGTERM))
    with pytest.raises(Interrupted):
        partly.fit()
    assert partly.step == 10
    log, closed = Recorder(), make(tmp_path / "run", steps=steps, evaluate_every=100)
    closed.resume()
    closed.fit([log])
    assert [step for step, row in log.rows if "valid/elbo" in row] == [10]
    assert checkpoint.load(tmp_path / "run" / checkpoint.BEST)["step"] == 10
    again = make(tmp_path / "run", steps=steps, evaluate_every=100)
    again.resume()
    again.fit([log])
    assert [step for step, row in log.rows if "valid/elbo" in row] == [10]  # once


def test_what_an_evaluation_gives_is_checked():
    for given in ({"valid/elbo": 1.0}, ({"valid/elbo": 1.0}, None), 3.0):
        trainer = make(steps=2)
        trainer.evaluate = lambda net, given=given: given
        with pytest.raises(ValueError, match=r"evaluate must return numbers and pictures, two dictionaries.* got "):
            trainer.fit()


class Plain(Optim):
    """Gradient descent, its momentum written into the code."""

    momentum = 0.5

    def optimizers(self, net, fused=None, capturable=False):
        return [torch.optim.SGD(net.parameters(), self.lr, self.momentum)]


def test_checkpoints_of_other_optimizers_are_refused(tmp_path, monkeypatch):
    make(tmp_path / "adamw", steps=6).fit()
    plain = Plain(**asdict(OPTIM))
    with pytest.raises(ValueError, match=r"trained by other optimizers.*with muon_lr or without"):
        make(tmp_path / "adamw", steps=6, optim=plain).resume()
    make(tmp_path / "plain", steps=6, optim=plain).fit()
    monkeypatch.setattr(Plain, "momentum", 0.25)
    with pytest.raises(ValueError, match=r"whose momentum was 0.5, now it is 0.25"):
        make(tmp_path / "plain", steps=6, optim=plain).resume()


class Lion(torch.optim.Optimizer):
    """With a state that is not all tensors, as some have it."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["step"] = state.get("step", 0) + 1
                state["mean"] = 0.9 * state.get("mean", torch.zeros_like(p)) + 0.1 * p.grad
                p -= group["lr"] / state["step"] * state["mean"].sign()


def test_any_optimizer_goes_on_where_it_was(tmp_path):
    class Own(Optim):
        rate = 0.01

        def optimizers(self, net, **_):
            return (Lion([p], self.rate) for p in net.parameters())  # which can be gone through once

    make(tmp_path / "own", steps=6, optim=Own(lr=1.0)).fit()
    again, whole = make(tmp_path / "own", steps=12, optim=Own(lr=1.0)), make(steps=12, optim=Own(lr=1.0))
    assert again.resume() == 6
    again.fit()
    whole.fit()
    assert all(a.equal(b) for a, b in zip(again.net.parameters(), whole.net.parameters(), strict=True))
    assert not any(a.equal(b) for a, b in zip(whole.net.parameters(), network().parameters(), strict=True))
    Own.rate = 0.02
    with pytest.raises(ValueError, match=r"another optim, whose peak was 0.01, now it is 0.02"):
        make(tmp_path / "own", steps=12, optim=Own(lr=1.0)).resume()


@pytest.mark.parametrize(("made", "got"), [([], "got none"), ([3], "got int"), (None, "got NoneType")])
def test_what_is_no_list_of_optimizers_is_refused(made, got):
    class Own(Optim):
        def optimizers(self, net, **_):
            return made

    with pytest.raises(ValueError, match=rf"Own.optimizers must return a list of torch's optimizers.*{got}"):
        make(optim=Own(lr=1.0))


def test_processes_with_different_data_do_not_train_together(tmp_path):
    class OfTwo(World):
        def agrees(self, own):  # the other process has the same step and other data
            return own == 0

    with pytest.raises(ValueError, match="the processes have different data: all must see"):
        make(tmp_path, world=OfTwo(), metadata={"data": "mine"}).resume()


def test_precision_does_not_depend_on_how_a_batch_is_shared(monkeypatch):
    monkeypatch.setattr("biglearn_vae.trainer.has_fast_bfloat16", lambda device: True)
    net = UniversalViT(grid=(8, 8), token_dim=5, dim=8, depth=1, z_dim=3, heads=2)
    batches = Images()
    batches.batch_size = 16
    for accumulate in (1, 2, 16):
        trainer = Trainer(net, BigLearnELBO(0.01), batches, OPTIM, steps=2, accumulate=accumulate)
        assert trainer.precision == "bfloat16"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(lr=0.5), "lr was 0.05, now it is 0.5"),
        (dict(weight_decay=0.25), "weight_decay was .*, now it is 0.25"),
        (dict(betas=(0.5, 0.6)), r"betas was .*, now it is \(0.5, 0.6\)"),
        (dict(muon_lr=0.01), "muon_lr was 0.02, now it is 0.01"),
        (dict(muon_lr=None), "muon_lr was 0.02, now it is None"),
        (dict(warmup_steps=1), "warmup_steps was 3, now it is 1"),
        (dict(schedule="constant"), "schedule was cosine, now it is constant"),
        (dict(clip_norm=0.125), "clip_norm was 1.0, now it is 0.125"),
        (dict(ema_decay=0.75), "ema_decay was 0.9, now it is 0.75"),
    ],
)
def test_a_run_goes_on_with_the_numbers_of_its_optimizers_alone(tmp_path, other, says):
    optim = replace(OPTIM, muon_lr=0.02)
    make(tmp_path / "own", steps=6, optim=optim).fit()
    with pytest.raises(ValueError, match=f"the run in {tmp_path / 'own'} was trained with another optim, whose {says}"):
        make(tmp_path / "own", steps=12, optim=replace(optim, **other)).resume()
    assert make(tmp_path / "own", steps=12, optim=optim).resume() == 6


@pytest.mark.parametrize(
    ("other", "says"),
    [(dict(seed=4), "seed was 3, now it is 4"), (dict(monitor="valid/joint_elbo"), "monitor was valid/elbo, now")],
)
def test_a_run_goes_on_with_its_seed_and_what_chooses_its_best_checkpoint(tmp_path, other, says):
    own = dict(seed=np.int64(3), monitor="valid/elbo")
    make(tmp_path / "own", steps=6, **own).fit()
    with pytest.raises(ValueError, match=f"was trained with another trainer, whose {says}"):
        make(tmp_path / "own", steps=12, **(own | other)).resume()
    assert make(tmp_path / "own", steps=12, **own).resume() == 6


def test_numbers_of_any_type_are_kept_with_a_run_that_goes_on(tmp_path):
    class Word(StrEnum):
        COSINE = "cosine"

    @dataclass(frozen=True)
    class Own(Optim):
        rule: object = None

    given = dict(lr=np.float64(0.0625), betas=np.array([0.5, 0.75]).tolist(), warmup_steps=np.int64(3))
    given |= dict(clip_norm=np.float32(1.0), ema_decay=np.float64(0.5), schedule=Word.COSINE)
    make(tmp_path, steps=6, optim=Own(**given, rule=lambda: 1)).fit()
    plain = Own(lr=0.0625, betas=(0.5, 0.75), warmup_steps=3, clip_norm=1, ema_decay=0.5, schedule="cosine")
    assert make(tmp_path, steps=12, optim=plain).resume() == 6


def test_the_folder_to_delete_is_that_of_the_run_alone(tmp_path):
    for folder, run in ((tmp_path / "outputs/own", "outputs/own"), (tmp_path / "run/checkpoints", "run")):
        make(folder, steps=12).fit()
        for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
            (folder / name).write_bytes(b"torn")
        with pytest.raises(ValueError, match=f"Delete {tmp_path / run} to start anew"):
            make(folder).resume()


@pytest.mark.parametrize("fails", [15, 16, 20])  # a logger, the evaluation, the last one
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_beside_a_step_loses_no_step_and_is_made_up_for(tmp_path, fails, error):
    class Full(Recorder):
        def scalars(self, step, values):
            super().scalars(step, values)
            if fails == step == 15:
                raise error

    def evaluate(net):
        if fails == trainer.step != 15:
            raise error
        return distance(net)

    trainer, first, second, log = make(tmp_path / "run", checkpoint_every=100), Full(), Recorder(), Recorder()
    trainer.evaluate = evaluate
    with pytest.raises(error):
        trainer.fit([first])
    again, whole = make(tmp_path / "run", checkpoint_every=100), make(tmp_path / "whole")
    assert again.resume() == trainer.step == fails
    again.fit([second])
    whole.fit([log])
    assert_same(whole, again)
    assert first.rows + second.rows == log.rows
    best = [checkpoint.load(tmp_path / name / checkpoint.BEST) for name in ("run", "whole")]
    assert best[0]["step"] == best[1]["step"] and best[0]["metrics"] == best[1]["metrics"]
    assert checkpoint.load(tmp_path / "run" / checkpoint.LATEST)["evaluated"] == 20


@pytest.mark.parametrize("what", ["data", "loss"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_what_fails_in_a_step_loses_none_before_it(tmp_path, what, error):
    def fails(step):
        if step == failing:
            raise error
        return step

    class Batches(Points):
        def __call__(self, step):
            return super().__call__(fails(step) if what == "data" else step)

    def loss(*arguments, step, **options):
        return noisy_squares(*arguments, step=fails(step) if what == "loss" else step, **options)

    options = dict(checkpoint_every=100, loss=loss, batches=Batches())
    for failing in (0, 7, 15, 15):  # at the first step there is nothing to keep, nor a run that could be lost
        trainer = make(tmp_path / "run", **options)
        trainer.resume()
        with pytest.raises(error):
            trainer.fit()
        assert checkpoint.is_resumable(tmp_path / "run") == bool(failing) and trainer.step == failing
    failing = None
    again, whole = make(tmp_path / "run", **options), make(tmp_path / "whole")
    assert again.resume() == 15
    again.fit()
    whole.fit()
    assert_same(whole, again)


def test_a_step_that_fails_is_not_kept_in_part(tmp_path):
    def loss(net, batch, *, random, step):
        parts = noisy_squares(net, batch, random=random, step=step)
        if step == failing:
            raise OSError  # the statistics of the network are those of another step by now
        return parts

    def make(folder):
        net = nn.Sequential(nn.BatchNorm1d(3), network())
        return Trainer(net, loss, Points(), OPTIM, steps=9, folder=tmp_path / folder, checkpoint_every=2)

    failing = 5
    with pytest.raises(OSError):
        make("run").fit()
    failing = None
    again, whole = make("run"), make("whole")
    assert again.resume() == 4
    again.fit()
    whole.fit()
    assert_same(whole, again)
    assert all(a.equal(b) for a, b in zip(again.net.buffers(), whole.net.buffers(), strict=True))


def test_buffers_that_a_step_leaves_alone_are_kept_when_it_fails(tmp_path):
    def loss(net, batch, *, random, step):
        parts = noisy_squares(net, batch, random=random, step=step)
        if step == 5 and not failed:
            failed.append(step)
            raise OSError
        return parts

    def make(folder):
        net = nn.Sequential(nn.BatchNorm1d(3, momentum=0.0).eval(), network())
        net[0].train = lambda mode: net[0]  # whose statistics stay as they are
        return Trainer(net, loss, Points(), OPTIM, steps=9, folder=folder and tmp_path / folder, checkpoint_every=100)

    for folder in ("run", None):
        failed: list[int] = []
        trainer = make(folder)
        with pytest.raises(OSError):
            trainer.fit()
        assert folder is None or checkpoint.load(tmp_path / folder / checkpoint.LATEST)["step"] == 5
        trainer.fit()
        whole = make(None)
        whole.fit()
        assert_same(trainer, whole)


def test_the_names_of_what_a_loss_reports_stay(tmp_path):
    @dataclass
    class Named(Parts):
        names: tuple[str, ...]

        def scalars(self):
            return dict.fromkeys(self.names, self.loss)

    def loss(net, batch, *, random, step):
        names = ("a", "c") if step == 7 else ("a", "b")
        return Named(noisy_squares(net, batch, random=random, step=step).loss, names)

    with pytest.raises(ValueError, match=r"the loss gave a, c, .* at step 7 and a, b, .* before: .* the same names"):
        make(tmp_path, loss=loss, checkpoint_every=100).fit()
    assert checkpoint.load(tmp_path / checkpoint.LATEST)["step"] == 7


def test_a_logger_that_fails_keeps_nothing_from_the_others():
    class Full(Logger):
        def scalars(self, step, values):
            raise OSError("the disk is full")

    trainer, log = make(), Recorder()
    with pytest.raises(OSError, match="the disk is full"):
        trainer.fit([Full(), log, Full()])
    assert [step for step, _ in log.rows] == [trainer.step]


def test_a_run_goes_on_in_the_numbers_of_its_weights(tmp_path):
    def make():
        return Trainer(network().to(dtype), squares, Points(), OPTIM, steps=2, folder=tmp_path)

    def squares(net, batch, *, random, step):
        return noisy_squares(net, batch.to(dtype), random=random, step=step)

    dtype = torch.float64
    make().fit()
    assert make().resume() == 2
    dtype = torch.float32
    with pytest.raises(ValueError, match=r"another network, whose 0.bias was torch.float64, now it is torch.float32"):
        make().resume()


def test_a_batch_that_is_taken_in_parts_is_of_tensors():
    class Named(Points):
        def __call__(self, step):
            return {"x": super().__call__(step)}

    with pytest.raises(ValueError, match=r"accumulate=2 takes a batch in parts, .* got dict"):
        make(batches=Named(), accumulate=2).fit()


def test_a_cuda_graph_of_other_optimizers_is_asked_for():
    """What they keep in Python, or put new tensors for, a replay would not see."""

    class Own(Optim):
        def optimizers(self, net, **_):
            return [torch.optim.SGD(net.parameters(), self.lr)]

    class Rate(Optim):
        lr = 0.1

    on_a_gpu = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    chosen = [choose_cuda_graph(asked, on_a_gpu, World(), of()) for of in (Optim, Rate, Own) for asked in (None, True)]
    assert chosen == [True, True, True, True, False, True]


def test_a_network_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"the network is on meta and would be trained on cpu: give world=World\(dev"):
        Trainer(nn.Linear(3, 3, device="meta"), noisy_squares, Points(), OPTIM, steps=1)


def test_a_batch_that_a_cuda_graph_cannot_take_is_described():
    for batch, got in ((torch.zeros(1), "Tensor on cpu"), ([], "none"), ([torch.zeros(1), 3], "Tensor on cpu, int")):
        with pytest.raises(ValueError, match=f"a tensor on a GPU or several, got {got}; cuda_graph=False takes any"):
            StepGraph([])(lambda batch: batch, batch)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_cuda_graph_wants_statistics_where_they_were(in_place):
    class Counted(nn.Linear):
        def __init__(self):
            super().__init__(3, 2)
            self.register_buffer("seen", torch.zeros(()), persistent=False)

        def forward(self, x):
            new = self.seen + len(x)
            self.seen = self.seen.copy_(new) if in_place else new
            return super().forward(x)

    trainer = Trainer(Counted(), noisy_squares, Points(), OPTIM, steps=2)
    trainer._graph = lambda function, *step: function(*step)  # in place of a CUDA graph
    trainer._graph.replays, trainer._graph.calls = False, 2
    if in_place:
        trainer.fit()
        assert trainer.net.seen > 0
    else:
        with pytest.raises(ValueError, match="puts new tensors in the place of seen, and a CUDA graph would go on"):
            trainer.fit()


@pytest.mark.parametrize("replays", [False, True])
def test_a_recorded_step_is_cut_off_once_it_is_replayed(tmp_path, replays):
    class Graph:  # in place of a CUDA graph
        def __init__(self):
            self.replays, self.calls = False, 1

        def __call__(self, function, *step):
            self.replays = replays and trainer.step == 14
            if trainer.step == 14:
                raise KeyboardInterrupt
            return function(*step)

    trainer, expected = make(tmp_path, checkpoint_every=6), make()
    trainer._graph = Graph()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer._graph = None
    assert trainer._torn == replays
    trainer.fit()
    expected.fit()
    assert_same(trainer, expected)


def test_gradients_that_are_off_are_on_in_a_training(tmp_path):
    whole, without = make(steps=3), make(steps=3)
    whole.fit()
    with torch.no_grad():
        without.fit()
        assert not torch.is_grad_enabled()
    assert_same(whole, without)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"cannot be called in torch.inference_mode\(\)"):
        make(tmp_path).fit()


def valued(folder, values, **options):
    """A trainer whose evaluation at each step gives these values."""
    trainer = make(folder, evaluate_every=1, **options)
    trainer.evaluate = lambda net: ({"valid/elbo": values[trainer.step]}, {})
    return trainer


def test_the_best_checkpoint_is_of_the_course_that_goes_on(tmp_path):
    class Killed(Points):
        def __call__(self, step):
            if step == 7:
                raise SystemExit
            return super().__call__(step)

    for rest, best in ((5.0, 6), (1.0, 7)):  # as before, or on another device, say
        folder = tmp_path / str(best)
        with pytest.raises(SystemExit):  # the latest checkpoint is of step 6, the best one of 7
            valued(folder, [0, 1, 2, 3, 3, 3, 4 if best == 6 else 2, 9], batches=Killed()).fit()
        assert checkpoint.load(folder / checkpoint.BEST)["step"] == 7
        resumed = valued(folder, [None] * 7 + [rest] + [0.5] * 20)
        assert resumed.resume() == 6
        resumed.fit()
        assert checkpoint.load(folder / checkpoint.BEST)["step"] == 7 and resumed.best == rest


def test_a_best_checkpoint_that_could_not_be_written_is_made_up_for(tmp_path):
    trainer = valued(tmp_path, [0, 1, 2, 3, 2.5, 2])
    partial = tmp_path / "best.partial"

    def evaluate(net, found=trainer.evaluate):
        if trainer.step == 3:
            partial.mkdir()  # where the file would be written
        return found(net)

    trainer.evaluate = evaluate
    with pytest.raises(OSError, match=r"could not write .*best\.pt"):
        trainer.fit()
    partial.rmdir()
    again = valued(tmp_path, [0, 1, 2, 3, 2.5, 2], steps=5)
    assert again.resume() == 3 and again.best == trainer.best == 2
    again.fit()
    assert again.best == 3 and checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 3


def test_a_damaged_best_checkpoint_is_made_anew(tmp_path):
    make(tmp_path, steps=8).fit()
    (tmp_path / checkpoint.BEST).write_bytes(b"damaged")
    again = make(tmp_path, steps=8)
    with pytest.warns(UserWarning, match=r"best\.pt is not a readable checkpoint.*; it is made anew"):
        again.resume()
    again.fit()
    assert checkpoint.load(tmp_path / checkpoint.BEST)["step"] == 8


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(metadata={"data": "other"}), "was trained on other data"),
        (dict(seed=1), "whose seed was 0, now it is 1"),
        (dict(optim=replace(OPTIM, lr=0.5)), "whose lr was"),
        (dict(optim=replace(OPTIM, muon_lr=0.5)), "whose muon_lr was"),
    ],
)
def test_a_refused_resume_changes_nothing_and_is_no_leave_to_train(tmp_path, other, said):
    make(tmp_path, steps=6).fit()
    kept = checkpoint.load_latest(tmp_path)["net"]
    trainer = make(tmp_path, **other)
    with pytest.raises(ValueError, match=said):
        trainer.resume()
    assert trainer.step == 0
    assert all(own.equal(fresh) for own, fresh in zip(trainer.net.parameters(), network().parameters(), strict=True))
    with pytest.raises(ValueError, match="holds a run, whose checkpoints would be lost"):
        trainer.fit()
    assert checkpoint.load_latest(tmp_path)["net"].keys() == kept.keys()


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(beta=0.1), "beta was 0.01, now it is 0.1"),
        (dict(prior="standard"), "prior was learned, now it is standard"),
        (dict(beta_warmup_steps=3), "beta_warmup_steps was 0, now it is 3"),
        (dict(masks=MaskSampler(joint=0.5)), "masks.joint was 0.0, now it is 0.5"),
        (dict(masks=MaskSampler(s_ratio=(3, 1.0))), r"masks.s_ratio was \(1.0, 2.0\), now it is \(3, 1.0\)"),
    ],
)
def test_another_objective_is_another_training(tmp_path, other, says):
    def trainer(**settings):
        net = UniversalViT(grid=(2, 3), token_dim=5, dim=16, depth=1, z_dim=3, heads=2)
        return Trainer(net, BigLearnELBO(**settings), Images(), OPTIM, steps=2, folder=tmp_path)

    trainer(beta=0.01).fit()
    with pytest.raises(ValueError, match=f"was trained with another loss, whose {says}"):
        trainer(**dict(beta=0.01) | other).resume()
    assert trainer(beta=0.01, masks=MaskSampler()).resume() == 2


def test_what_a_loss_changes_does_not_make_it_another(tmp_path):
    class Annealed(BigLearnELBO):
        def __call__(self, *arguments, **options):
            self.beta *= 1.5
            return super().__call__(*arguments, **options)

    def trainer(loss, steps=2):
        net = UniversalViT(grid=(2, 3), token_dim=5, dim=16, depth=1, z_dim=3, heads=2)
        return Trainer(net, loss, Images(), OPTIM, steps=steps, folder=tmp_path)

    trainer(Annealed(0.01)).fit()
    assert trainer(Annealed(0.01), steps=4).resume() == 2
    with pytest.raises(ValueError, match=r"another loss, whose beta was 0.01, now it is 0.02"):
        trainer(Annealed(0.02)).resume()
    with pytest.raises(ValueError, match=r"another loss, whose objective was .*Annealed, now it is BigLearnELBO"):
        trainer(BigLearnELBO(0.01)).resume()
    with pytest.raises(ValueError, match=r"another loss, whose masks was MaskSampler, now it is .*own"):

        def own(*sizes):
            return MaskSampler()(*sizes)

        trainer(Annealed(0.01, masks=own)).resume()


def test_a_loss_of_ones_own_says_what_tells_it_from_others(tmp_path):
    class Scaled:
        def __init__(self, scale, tells=False):
            self.scale = scale
            if tells:
                self.settings = {"scale": scale, "images": torch.ones(2)}  # the latter no checkpoint holds

        def __call__(self, *arguments, **options):
            return Parts(self.scale * noisy_squares(*arguments, **options).loss)

    make(tmp_path / "silent", steps=6, loss=Scaled(2.0)).fit()
    assert make(tmp_path / "silent", steps=6, loss=Scaled(3.0)).resume() == 6
    make(tmp_path / "told", steps=6, loss=Scaled(2.0, tells=True)).fit()
    with pytest.raises(ValueError, match=r"another loss, whose scale was 2.0, now it is 3.0"):
        make(tmp_path / "told", loss=Scaled(3.0, tells=True)).resume()


def test_what_a_subclass_of_the_objective_and_of_the_masks_was_made_with_counts(tmp_path):
    class Scaled(BigLearnELBO):
        def __init__(self, scale, **others):
            super().__init__(0.1, **others)
            self.scale, self.calls = scale, 0

        def terms(self, *given):
            self.calls += 1
            return super().terms(*given)

    class Wider(MaskSampler):
        def __init__(self, width=1, **others):
            super().__init__(**others)
            object.__setattr__(self, "width", width)

    def trainer(**settings):
        net = UniversalViT(grid=(2, 3), token_dim=5, dim=16, depth=1, z_dim=3, heads=2)
        return Trainer(net, Scaled(**settings), Images(), OPTIM, steps=2, folder=tmp_path)

    trainer(scale=1.0, masks=Wider(2)).fit()
    for other, says in (
        (dict(scale=3.0, masks=Wider(2)), "scale was 1.0, now it is 3.0"),
        (dict(scale=1.0, masks=Wider(4)), "masks.width was 2, now it is 4"),
        (dict(scale=1.0, masks=Wider(2, joint=0.5)), "masks.joint was 0.0, now it is 0.5"),
    ):
        with pytest.raises(ValueError, match=f"was trained with another loss, whose {says}"):
            trainer(**other).resume()
    assert trainer(scale=1.0, masks=Wider(2)).resume() == 2


def test_another_batch_size_is_another_training(tmp_path):
    class Fewer(Points):
        batch_size = 2

    make(tmp_path, steps=6).fit()
    with pytest.raises(ValueError, match=f"whose batch_size was {Points.batch_size}, now it is 2"):
        make(tmp_path, batches=Fewer()).resume()


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_deleted_is_not_written_into(tmp_path, again):
    def evaluate(net):
        if trainer.step == 8:
            shutil.rmtree(tmp_path / "run")
            if again:  # by another training
                (tmp_path / "run").mkdir()
        return distance(net)

    trainer = make(tmp_path / "run")
    trainer.evaluate = evaluate
    with pytest.raises(TrainingError, match="run was deleted while this process trained there"):
        trainer.fit()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_numbers_of_numpy_are_numbers(tmp_path):
    trainer = make(tmp_path, steps=2)
    trainer.evaluate = lambda net: ({"valid/elbo": np.float64(1), "accuracy": np.float32(0.5)}, {})
    trainer.fit()
    assert make(tmp_path).resume() == 2
    assert checkpoint.load(tmp_path / checkpoint.BEST)["metrics"] == {"valid/elbo": 1.0, "accuracy": 0.5}
    assert type(make(metadata={"a": np.float64(1)}).metadata["a"]) is float
    with pytest.raises(ValueError, match=r"metadata must be .*: 'a' is <module 'math'"):
        make(metadata={"a": math})


def test_the_average_of_a_network_has_its_statistics():
    class Normed(nn.Sequential):
        pass

    torch.manual_seed(0)
    net = Normed(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optim = Optim(lr=0.01, ema_decay=0.9)
    trainer = Trainer(net, noisy_squares, Points(), optim, steps=5)
    trainer.fit()
    for name, own in net.named_buffers():
        assert own.equal(trainer.result.get_buffer(name)) and own.any()


def test_any_optimizer_of_torch_can_be_given():
    class SGD(Optim):
        def optimizers(self, net, fused=None, capturable=False):
            return [torch.optim.SGD(net.parameters(), self.lr)]

    def squares(net, batch, *, random, step):
        return Parts((net(batch) - batch.sum(-1, keepdim=True)).square().mean())

    trainer = make(steps=10, loss=squares, optim=SGD(lr=0.25, warmup_steps=4))
    net, batches = network(), Points()
    for step in range(10):
        loss = squares(net, batches(step), random=None, step=step).loss
        rate = 0.25 * min(1.0, (step + 1) / 5)
        for parameter, gradient in zip(
            net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
        ):
            parameter.data -= rate * gradient
    trainer.fit()
    for mine, theirs in zip(net.parameters(), trainer.net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_checkpoints_of_another_network_are_refused(tmp_path):
    make(tmp_path, steps=6).fit()
    other = Trainer(nn.Linear(3, 1), noisy_squares, Points(), OPTIM, steps=6, folder=tmp_path)
    with pytest.raises(ValueError, match="another architecture"):
        other.resume()


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_are_computed_in_the_precision_asked_for(precision, dtype):
    seen = []

    def loss(net, batch, *, random, step):
        seen.append(net(batch).dtype)
        return noisy_squares(net, batch, random=random, step=step)

    trainer = make(loss=loss, steps=2, precision=precision)
    trainer.fit()
    assert seen == [dtype, dtype]
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in trainer.net.parameters())


def test_a_network_trains_in_training_mode_whatever_it_comes_in():
    modes = []

    def loss(net, batch, *, random, step):
        modes.append(net.training)
        return noisy_squares(net, batch, random=random, step=step)

    trainer = make(loss=loss, steps=4, evaluate_every=2, optim=replace(OPTIM, ema_decay=0.0))  # measured itself
    trainer.net.eval()
    trainer.fit()
    assert modes == [True] * 4


def test_a_run_keeps_the_precision_it_was_started_with(tmp_path):
    make(tmp_path, steps=6, precision="bfloat16").fit()
    again = make(tmp_path, steps=12, precision="auto")
    again.resume()
    assert again.precision == "bfloat16"


@pytest.mark.parametrize("fast", [False, True, None])
def test_automatic_precision(fast, monkeypatch):
    if fast is not None:
        monkeypatch.setattr("biglearn_vae.trainer.has_fast_bfloat16", lambda device: fast)
    tiny, wide, vectors = nn.Linear(8, 8), nn.Linear(256, 8), nn.Linear(8, 300)  # 300 biases make no product large
    assert choose_precision("auto", tiny, 1023) == choose_precision("auto", vectors, 1023) == "float32"
    on_this_machine = choose_precision("auto", wide, 1)
    assert on_this_machine in {None: ("float32", "bfloat16"), False: ("float32",), True: ("bfloat16",)}[fast]
    assert choose_precision("auto", tiny, 1024) == on_this_machine
    tiny.num_tokens = 15
    assert choose_precision("auto", tiny, 63) == "float32" and choose_precision("auto", tiny, 64) == on_this_machine
    with pytest.raises(ValueError, match="precision must be auto, float32 or bfloat16, got 'fp8'"):
        make(precision="fp8")


@pytest.mark.parametrize("pair", [False, True])
def test_a_step_in_parts_is_the_step(pair):
    class Pairs(Points):
        def __call__(self, step):
            batch = super().__call__(step)
            return (batch, batch) if pair else batch

    def loss(net, batch, **rest):
        return noisy_squares(net, batch[0] if pair else batch, **rest)

    runs = [make(loss=loss, batches=Pairs(), accumulate=parts) for parts in (1, 2, 4)]
    for run in runs:
        run.fit()
        for a, b in zip(runs[0].net.parameters(), run.net.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_must_be_of_equal_parts():
    with pytest.raises(ValueError, match="accumulate must divide the 4 images of a step of each process, got 3"):
        make(accumulate=3)


def test_automatic_compilation():
    assert not make().compiled  # it is on the CPU
    assert choose_compile(True, nn.Linear(1, 1), 1) and not choose_compile(False, nn.Linear(1, 1), 10**6)
    with pytest.raises(ValueError, match="compile must be true, false or auto, got 'fast'"):
        make(compile="fast")
    dropping = UniversalViT(grid=(2, 2), token_dim=1, dim=4, z_dim=1, heads=1, depth=1, hidden="drop")
    assert not choose_compile("auto", dropping, 10**6) and not choose_compile(False, dropping, 10**6)
    with pytest.raises(ValueError, match="compile=true needs shapes that stay"):
        choose_compile(True, dropping, 10**6)


def test_a_cuda_graph_needs_a_gpu_one_process_and_fixed_shapes():
    assert not make().on_graph and not choose_cuda_graph(None, nn.Linear(1, 1), World())
    with pytest.raises(ValueError, match=r"cuda_graph=true needs a GPU, .* got cpu, 2 processes: cuda_graph=null"):
        choose_cuda_graph(True, nn.Linear(1, 1), World(0, 2))
    dropping = UniversalViT(grid=(2, 2), token_dim=1, dim=4, z_dim=1, heads=1, depth=1, hidden="drop")
    with pytest.raises(ValueError, match="got cpu, 1 process, hidden=drop"):
        choose_cuda_graph(True, dropping, World())


@pytest.mark.parametrize("muon_lr", [None, 0.01])
def test_a_step_is_the_same_with_its_numbers_as_tensors(muon_lr):
    """As they are in a CUDA graph."""
    trainers = [
        on_a_gpu(muon_lr, "cpu", precision="float32", accumulate=2, loss=BigLearnELBO(0.3, beta_warmup_steps=3))
        for _ in range(2)
    ]
    plain, tensors = trainers
    advance = tensors._advance
    tensors._advance = lambda batch, *numbers: advance(batch, *torch.tensor(numbers).unbind())
    for _ in range(5):
        for trainer in trainers:
            trainer._train_step()
    one, other = (torch.stack(trainer._pending) for trainer in trainers)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    rates = [group["lr"] for state in tensors._state()["optimizers"] for group in state["param_groups"]]
    assert all(isinstance(rate, float) for rate in rates)
    torch.testing.assert_close(rates, [g["lr"] for o in plain.optimizers for g in o.param_groups], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("precision", "expected"), [("float32", "ieee"), ("bfloat16", "tf32")])
def test_what_makes_a_batch_is_as_exact_as_the_step(precision, expected):
    """Also where TF32 was refused by torch's new words for it, which its old ones do not go with."""
    convolutions = torch.backends.cudnn.conv
    trainer, seen, before = on_a_gpu(device="cpu", precision=precision), [], convolutions.fp32_precision
    batches = trainer.batches
    trainer.batches = lambda step: seen.append(convolutions.fp32_precision) or batches(step)
    convolutions.fp32_precision = "ieee"
    try:
        trainer._train_step()
        assert seen == [expected] and convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before


def test_a_trainer_is_let_go_at_once():
    """With all that it holds on a GPU, in a sweep."""
    trainer = make()
    trainer.fit()
    gone = weakref.ref(trainer.net)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


def on_a_gpu(
    muon_lr: float | None = None,
    device: str = "cuda",
    steps: int = 9,
    loss: BigLearnELBO | None = None,
    dim: int = 16,
    lr: float = OPTIM.lr,
    optim: Optim = OPTIM,
    **settings,
) -> Trainer:
    """A Trainer for digits on the first GPU, or elsewhere."""
    world, tokens = World(device=pick_device(device)), Patchify(8, 2, 1)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokens.grid, token_dim=tokens.token_dim, dim=dim, z_dim=3, heads=2, depth=2).to(
        world.device
    )
    batches = Batches(data.load("digits").train.to(world.device), 8, 0, world, transform=tokens.encode)
    optim = replace(optim, lr=lr, muon_lr=muon_lr)
    return Trainer(net, loss or BigLearnELBO(0.3), batches, optim, steps=steps, world=world, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("muon_lr", [None, 0.01])
@pytest.mark.parametrize(
    "settings",
    [{"compile": True, "cuda_graph": False}, {"compile": True}, {"compile": True, "accumulate": 2}, {"accumulate": 2}],
)
def test_a_gpu_trains_the_same_however_a_step_is_taken(settings, muon_lr, tmp_path):
    losses = []
    common = dict(precision="float32", report_every=1, evaluate_every=2)
    for i, own in enumerate(({"compile": False, "cuda_graph": False}, settings)):  # by default there is a graph
        trainer, log = on_a_gpu(muon_lr, folder=tmp_path / str(i), **common, **own), Recorder()
        trainer.fit([log])
        losses.append([row["train/loss"] for _, row in log.rows if "train/loss" in row])
    # Not the weights: those without a gradient, such as the biases of keys, follow the sign of its rounding.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and len(losses[1]) == 9
    for device, step in (("cuda", 9), ("cpu", 12)):  # what it left is what any other goes on from
        again = on_a_gpu(muon_lr, device, folder=tmp_path / "1", steps=step + 3, **common)
        assert again.resume() == step
        again.fit()
        assert again.step == step + 3


class OfLion(Optim):
    def optimizers(self, net, **_):
        return [Lion(net.parameters(), self.lr)]


@pytest.mark.gpu
def test_an_optimizer_that_counts_in_python_counts_on_a_gpu():
    trainers = [on_a_gpu(precision="float32", optim=OfLion(), cuda_graph=graph) for graph in (None, False)]
    for trainer in trainers:
        for _ in range(9):
            trainer._train_step()
    counts = {state["step"] for trainer in trainers for state in trainer.optimizers[0].state.values()}
    assert counts == {9} and not trainers[0].on_graph
    # Not the last: weights follow the signs of rounding.
    torch.testing.assert_close(*(trainer._pending[0] for trainer in trainers), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_cuda_graph_draws_what_its_steps_draw():
    trainers = [on_a_gpu(precision="float32", compile=False, cuda_graph=graph) for graph in (False, True)]
    for _ in range(9):
        for trainer in trainers:
            trainer._train_step()
    one, other = (torch.stack(trainer._pending) for trainer in trainers)
    # Other masks or noise would change the loss by far more.
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_trains_the_same_with_the_kernels_and_without(compile, monkeypatch):
    found = []
    for without in ((), ("attention", "biases", "norms")):
        for name in without:
            monkeypatch.setattr(layers, name, None)
        torch._dynamo.reset()
        # The weights hardly move: larger steps make much of how bfloat16 was rounded, whatever it was rounded by.
        trainer = on_a_gpu(dim=32, precision="bfloat16", compile=compile, lr=1e-7)
        for _ in range(9):
            trainer._train_step()
        found.append(torch.stack(trainer._pending))  # losses and norms of gradients; bfloat16 costs them up to 1 %
    assert "grad_norm" in trainer._names
    torch.testing.assert_close(*found, rtol=0.02, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("muon_lr", [None, 0.01])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_step_waits_for_nothing_on_a_gpu(muon_lr, cuda_graph):
    trainer = on_a_gpu(muon_lr, compile=False, cuda_graph=cuda_graph)
    for _ in range(5):
        trainer._train_step()  # the first ones make moments and workspaces, and are recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            trainer._train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiled_network_trains_the_same_and_is_compiled_once(monkeypatch):
    torch._dynamo.reset()
    # The same graphs, not translated to C++ or CUDA, which would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    sizes = dict(grid=(2, 3), token_dim=5, dim=8, z_dim=3, heads=2, depth=1)
    steps, graphs, first = {}, [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            UniversalViT(**sizes), BigLearnELBO(0.3), Images(), OPTIM, steps=6, compile=compiled, report_every=1
        )
        log = Recorder()
        torch._dynamo.utils.counters.clear()
        trainer._train_step()
        first.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        torch._dynamo.utils.counters.clear()
        trainer.fit([log])
        graphs.append(sum(torch._dynamo.utils.counters["stats"].values()))
        steps[compiled] = [row["train/loss"] for _, row in log.rows if "train/loss" in row]
        assert (0 < trainer.compile_seconds < trainer.seconds) == compiled
    assert first == [0, 1]  # all passes and the ELBO are one graph
    assert graphs == [0, 0]  # and nothing is compiled after the first step
    assert steps[True] == pytest.approx(steps[False], rel=1e-4) and len(steps[True]) == 5


def test_a_number_that_cannot_choose_a_checkpoint_ends_the_training_and_not_what_it_reached(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_every=100)
    trainer.evaluate = lambda net: ({"valid/elbo": math.nan if trainer.step == 16 else 0.0}, {})
    with pytest.raises(ValueError, match="valid/elbo, which says what checkpoint is the best, is NaN at step 16"):
        trainer.fit()
    assert make_trainer(tmp_path).resume() == 16
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"folder must be one for checkpoints, .*file is a file"):
        make_trainer(tmp_path / "file")
