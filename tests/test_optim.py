"""Optimizers: their schedules, which parameters they take, and Muon's steps against torch's and against an SVD."""

import copy
import math

import pytest
import torch
from torch import nn

from biglearn_vae import Optim, optim


def test_schedules():
    constant = Optim(lr=2.0, warmup_steps=9)
    assert [constant.share_at(step, 100) for step in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    cosine = Optim(lr=2.0, schedule="cosine")
    assert [cosine.share_at(step, 100) for step in (0, 50, 100)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lr="a"), r"lr must be a number in \(0, inf\), got 'a'"),
        (dict(lr=0), r"lr must be a number in \(0, inf\), got 0"),
        (dict(betas=0.9), r"betas must be 2 numbers in \[0, 1\), got 0\.9"),
        (dict(betas=(0.9, 1.0)), r"betas must be 2 numbers in \[0, 1\), got \[0\.9, 1\.0\]"),
        (dict(eps=None), "eps must be a number"),
        (dict(weight_decay=-0.1), r"weight_decay must be a number in \[0, inf\), got -0\.1"),
        (dict(warmup_steps=1.5), "warmup_steps must be a whole number, got 1.5"),
        (dict(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (dict(schedule="step"), "schedule must be constant or cosine, got 'step'"),
        (dict(clip_norm=0.0), r"clip_norm must be a number in \(0, inf\), got 0\.0, or None"),
        (dict(ema_decay=1.0), r"ema_decay must be a number in \[0, 1\), got 1\.0"),
        (dict(muon_lr=math.inf), r"muon_lr must be a number in \(0, inf\), got inf, or None"),
    ],
)
def test_settings_outside_their_ranges_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Optim(**settings)


def test_the_average_follows_closely_at_first():
    decays = [Optim(lr=1.0, ema_decay=0.9).ema_decay_at(step) for step in (0, 8, 80, 10**6)]
    assert decays == [1 / 10, 9 / 18, 81 / 90, 0.9]


@pytest.mark.parametrize("change", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_the_average_moves_towards_the_weights(change):
    torch.manual_seed(0)
    average, net = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).requires_grad_(which) for which in (False, True))
    net[1].running_mean.fill_(5)
    expected = [
        0.75 * mean + 0.25 * weight for mean, weight in zip(average.parameters(), net.parameters(), strict=True)
    ]
    Optim.update_average(average, net, change)
    for found, truth in zip(average.parameters(), expected, strict=True):
        torch.testing.assert_close(found, truth)
        assert found.grad is None
    assert average[1].running_mean.tolist() == [5, 5]


@pytest.mark.parametrize("muon_lr", [None, 0.02])
def test_the_optimizers_take_every_parameter_once(muon_lr):
    blocks = nn.ModuleList([nn.Linear(2, 4), nn.LayerNorm(4)])
    net = nn.ModuleDict({"in": nn.Linear(1, 2), "blocks": blocks, "map": nn.Conv2d(1, 2, 3)})
    settings = Optim(lr=0.1, weight_decay=0.3, muon_lr=muon_lr)
    optimizers = settings.optimizers(net)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    taken = [p.data_ptr() for group in groups for p in group["params"]]  # a kernel is taken by a view of it
    assert sorted(taken) == sorted(p.data_ptr() for p in net.parameters())
    for group in groups:
        assert group["weight_decay"] == (0.3 if group["params"][0].ndim > 1 else 0.0)
    settings.set_rates(optimizers, settings.share_at(0, 10))
    rates = {p.data_ptr(): group["lr"] for group in groups for p in group["params"]}
    hidden = {p.data_ptr() for p in (blocks[0].weight, net["map"].weight)}
    assert {rates[p] for p in hidden} == {muon_lr or 0.1}
    assert {rate for p, rate in rates.items() if p not in hidden} == {0.1}


@pytest.mark.parametrize(("net", "shape"), [(nn.Linear(6, 4), (32, 6)), (nn.Conv2d(3, 4, (1, 2)), (8, 3, 5, 5))])
def test_muon_orthogonalises_the_update_of_a_matrix(net, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = net.weight.detach().clone()
    settings = Optim(muon_lr=0.1, weight_decay=0.0)
    optimizers = settings.optimizers(nn.ModuleList([net]))
    net(x).square().sum().backward()
    settings.set_rates(optimizers, settings.share_at(0, 10))
    for optimizer in optimizers:
        optimizer.step()
    update = (before - net.weight.detach()).flatten(1) / (0.1 * 0.2 * math.sqrt(6))
    u, _, vh = torch.linalg.svd(net.weight.grad.flatten(1), full_matrices=False)
    # Newton-Schulz iterations bring singular values near 1, not to it.
    assert torch.linalg.svdvals(update).min() > 0.6 and torch.linalg.svdvals(update).max() < 1.3
    assert (update * (u @ vh)).sum() / update.norm() / 2 > 0.97


SHAPES = ((6, 4), (4, 6), (6, 4), (4, 4), (200, 180))  # two are stacked, the last is large
COEFFICIENTS, STEPS, EPS = (3.4445, -4.775, 2.0315), 5, 1e-7  # torch's


def matrices(dtype: torch.dtype) -> list[nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]


def steps_of(optimizer: torch.optim.Optimizer, count: int = 3) -> None:
    """So many steps under gradients that are the same for every optimizer; the second matrix has none at first."""
    weights, g = optimizer.param_groups[0]["params"], torch.Generator().manual_seed(1)
    for step in range(count):
        for i, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=g, dtype=weight.dtype)
            weight.grad = None if step == 0 and i == 1 else gradient
        optimizer.step()


def orthogonalised_by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """What Newton-Schulz iterations do to singular values, done to them alone."""
    a, b, c = COEFFICIENTS
    u, s, vh = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return u * s @ vh


def test_orthogonalised_matrices(monkeypatch):
    monkeypatch.setattr(optim, "has_fast_bfloat16", lambda device: False)
    for shape in SHAPES:
        several = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = torch.stack([orthogonalised_by_svd(matrix) for matrix in several])
        for found in (
            optim.orthogonalised(several, COEFFICIENTS, STEPS, EPS),
            torch.stack([optim.orthogonalised(matrix, COEFFICIENTS, STEPS, EPS) for matrix in several]),
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fast", [False, True])
def test_muon_steps_as_torch_does(fast, monkeypatch):
    monkeypatch.setattr(optim, "has_fast_bfloat16", lambda device: fast)
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    before = copy.deepcopy(ours)
    options = dict(lr=0.1, weight_decay=0.3)
    steps_of(mine := optim.Muon(ours, **options))
    steps_of(other := torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options))
    for own, their, start in zip(ours, theirs, before, strict=True):
        moved = (their - start).norm()
        assert (own - their).norm() < 0.02 * moved, "they differ by more than bfloat16 does"
        torch.testing.assert_close(mine.state[own]["momentum_buffer"], other.state[their]["momentum_buffer"])


def test_muon_goes_on_from_its_state_and_from_that_of_torch(monkeypatch):
    monkeypatch.setattr(optim, "has_fast_bfloat16", lambda device: False)
    options = dict(lr=0.1, weight_decay=0.3)
    for kind in (optim.Muon, torch.optim.Muon):
        others = {} if kind is optim.Muon else {"adjust_lr_fn": "match_rms_adamw"}
        first = kind(matrices(torch.float64), **options, **others)
        steps_of(first)
        weights = [nn.Parameter(weight.detach().clone()) for weight in first.param_groups[0]["params"]]
        second = optim.Muon(weights, **options)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        steps_of(first)
        steps_of(second)
        for one, other in zip(first.param_groups[0]["params"], weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2 if others else 1e-12, atol=1e-2 if others else 1e-12)


def test_a_closure_takes_the_gradients_of_muons_step():
    ours, theirs = matrices(torch.float64), matrices(torch.float64)
    mine, other = (optim.Muon(weights, lr=0.1, weight_decay=0.3) for weights in (ours, theirs))

    def loss_of(weights):
        loss = sum(weight.square().sum() for weight in weights)
        loss.backward()
        return loss.item()

    loss = loss_of(theirs)
    with torch.no_grad():  # a closure has gradients all the same
        assert mine.step(lambda: loss_of(ours)) == loss
    assert other.step() is None
    for own, their in zip(ours, theirs, strict=True):
        assert torch.equal(own, their)


def test_muon_alone_and_what_it_cannot_take():
    def net(*members):
        return nn.ModuleList(members)

    settings = Optim(lr=0.1, muon_lr=0.1, weight_decay=0.0)
    (alone,) = settings.optimizers(net(nn.Linear(4, 4, bias=False)))
    assert isinstance(alone, optim.Muon)
    kernels = nn.Conv2d(2, 3, 2, bias=False).to(memory_format=torch.channels_last)
    adamw, muon = settings.optimizers(net(nn.Linear(4, 4, bias=False), nn.Linear(4, 0, bias=False), kernels))
    taken = {tuple(p.shape) for group in adamw.param_groups for p in group["params"]}
    assert taken == {(0, 4), (3, 2, 2, 2)} and [p.shape for p in muon.param_groups[0]["params"]] == [(4, 4)]


def test_muon_leaves_no_gradient_of_a_view_of_a_kernel():
    conv = nn.Conv2d(2, 3, 2)
    before = conv.weight.clone()
    conv(torch.ones(1, 2, 2, 2)).sum().backward()
    _, muon = Optim(lr=0.1, muon_lr=0.1, weight_decay=0.0).optimizers(conv)
    muon.step()
    (view,) = muon.param_groups[0]["params"]
    assert view is not conv.weight and view.grad is None and not conv.weight.equal(before)


def test_what_is_decayed_and_what_muon_takes_of_a_network_of_ones_own():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 6))
            self.positions = nn.Parameter(torch.ones(1, 6, 4, 4))
            self.number = nn.Parameter(torch.ones(()))
            self.channels = nn.Parameter(torch.ones(6, 1, 1))
            self.image, self.line, self.out = nn.Conv2d(3, 6, 2), nn.Conv1d(3, 6, 2), nn.Linear(6, 1)
            self.computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 2, bias=False))

    own = Own()
    length, direction = own.computed.parametrizations.weight.parameters()
    adamw, muon = Optim(muon_lr=0.02).optimizers(own)
    decayed, plain = ([id(p) for p in group["params"]] for group in adamw.param_groups)
    assert decayed == [id(p) for p in (own.positions, own.line.weight, own.out.weight, direction)]
    vectors = (own.token, own.number, own.channels, own.image.bias, own.line.bias, own.out.bias, length)
    assert plain == [id(p) for p in vectors]
    assert [p.data_ptr() for p in muon.param_groups[0]["params"]] == [own.image.weight.data_ptr()]


def test_complex_numbers_are_trained():
    weights = nn.ParameterList([torch.ones(3, dtype=torch.complex64), torch.ones(2, 2, dtype=torch.complex64)])
    (adamw,) = Optim(lr=0.1, muon_lr=0.1).optimizers(nn.ModuleList([weights]))
    (weights[0] - 1j).abs().square().sum().backward()
    adamw.step()
    assert weights[0].detach().real.lt(1).all() and weights[0].detach().imag.gt(0).all()
