import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from biglearn_vae import DiagGaussian, annealing, gaussian

Z = 4
MEANS = torch.tensor([[1.0, -1.0, 0.5, 0.0], [0.0, 2.0, 0.0, -1.0]]).double()  # of two integrals
LOGS = torch.tensor([3.0, -40.0]).double()  # and their logarithms
BASE = DiagGaussian(torch.zeros(2, Z).double(), torch.tensor([[0.2], [-0.1]]).double().expand(2, Z))


def gammas(scale: float) -> list[MultivariateNormal]:
    """Two correlated normal distributions."""
    factor = torch.randn(Z, Z, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cov = factor @ factor.T / Z + 0.2 * torch.eye(Z).double()
    return [MultivariateNormal(mean, scale**2 * cov) for mean in MEANS]


def target(scale: float):
    """exp(LOGS) times these, a function of z (k, 2, Z)."""
    parts = gammas(scale)
    return lambda z: torch.stack([parts[n].log_prob(z[:, n]) + LOGS[n] for n in range(2)], -1)


def log_mean(weights: Tensor) -> Tensor:
    return weights.logsumexp(0) - math.log(len(weights))


def test_one_step_is_importance_sampling():
    weights = annealing.log_weights(target(0.7), BASE, draws=5, steps=1, seed=3)
    noise = torch.randn(5, 2, Z, generator=gaussian.generator(torch.device("cpu"), 3), dtype=torch.float64)
    z = BASE.sample(noise)
    torch.testing.assert_close(weights, target(0.7)(z) - BASE.log_prob(z), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps, power", [(2, 1.0), (4, 2.0), (8, 3.0)])
def test_the_mean_weight_is_the_integral(steps, power):
    """However few the steps: it holds only if every transition leaves its distribution as it is."""
    weights = annealing.log_weights(target(0.7), BASE, 20_000, steps, power, seed=steps)
    relative = (weights - LOGS).exp()
    error = relative.std(0) / len(relative) ** 0.5
    assert ((relative.mean(0) - 1).abs() < 4 * error).all() and (error < 0.1).all()


def test_more_steps_narrow_the_weights():
    plain, some, many = (annealing.log_weights(target(0.3), BASE, 64, steps, 4, seed=0) for steps in (1, 50, 800))
    assert (plain.std(0) > 4 * some.std(0)).all() and (some.std(0) > 4 * many.std(0)).all()
    torch.testing.assert_close(log_mean(many), LOGS, rtol=0, atol=0.25)


def test_a_base_that_is_the_target_gives_equal_weights():
    weights = annealing.log_weights(lambda z: BASE.log_prob(z) + LOGS, BASE, 6, 10, seed=0)
    torch.testing.assert_close(weights, LOGS.expand(6, 2), rtol=0, atol=1e-12)


def test_a_float32_target_and_a_seed():
    one, same, other = (
        annealing.log_weights(lambda z: target(0.3)(z).float(), BASE, 4, 20, seed=seed) for seed in (0, 0, 1)
    )
    assert one.dtype == torch.float64 and one.shape == (4, 2)
    assert torch.equal(one, same) and not torch.isclose(one, other).any()


def test_transitions_are_accepted_as_often_as_is_aimed_at():
    path = annealing._Path(target(0.05), BASE, [(t / 300) ** 4 for t in range(301)], torch.Generator().manual_seed(0))
    taken, move = [], path._move
    path._move = lambda *arguments: taken.append((result := move(*arguments))[-1].double().mean()) or result
    path.follow(32)
    assert torch.stack(taken[50:]).mean() == pytest.approx(annealing.ACCEPTED, abs=0.1)


@pytest.mark.parametrize("settings", [dict(draws=0), dict(steps=0), dict(power=0.0), dict(power=math.inf)])
def test_refusals(settings):
    (name,) = settings
    expected = r"a number in \(0, inf\), got" if name == "power" else "at least 1, got 0"
    with pytest.raises(ValueError, match=f"{name} must be {expected}"):
        annealing.log_weights(target(1), BASE, **settings)
