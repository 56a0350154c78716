"""How good samples are: precision and recall, and what `samples.by_passes` puts together."""

import math

import pytest
import torch
from test_evaluation import make, pictures
from torch import Tensor

from biglearn_vae import samples
from biglearn_vae.capabilities import best_variance


def slow_covered(x: Tensor, y: Tensor, k: int) -> float:
    """The share of x within the ball of one of y that reaches to its k-th nearest other."""
    radii = [sorted((a - b).square().sum().sqrt().item() for b in y)[k] for a in y]
    inside = [any((a - b).square().sum().sqrt().item() <= r for b, r in zip(y, radii, strict=True)) for a in x]
    return sum(inside) / len(inside)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [7, 2**12])
def test_precision_and_recall_by_hand(monkeypatch, k, block):
    monkeypatch.setattr(samples, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    drawn = 0.7 * torch.randn(25, 1, 2, 2, dtype=torch.float64, generator=generator)
    real = torch.randn(30, 1, 2, 2, dtype=torch.float64, generator=generator)
    found = samples.precision_recall(drawn, real, k)
    expected = {"precision": slow_covered(drawn, real, k), "recall": slow_covered(real, drawn, k)}
    assert found == pytest.approx(expected) and 0 < found["recall"] < found["precision"]


def test_precision_and_recall_of_a_few_and_of_strangers():
    real = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    assert samples.precision_recall(real, real) == {"precision": 1, "recall": 1}
    assert samples.precision_recall(real + 9, real) == {"precision": 0, "recall": 0}
    alike = real[:1].expand(40, -1, -1, -1)  # one mode: nothing but right, and hardly anything
    assert samples.precision_recall(alike, real) == {"precision": 1, "recall": 1 / 40}


def test_precision_recall_refuses():
    x = torch.zeros(4, 1, 2, 2)
    for drawn, real in ((x[:3], x), (x, x[:3]), (x[:, 0], x), (torch.zeros(4, 1, 2, 3), x)):
        with pytest.raises(ValueError, match="more than 3 of each"):
            samples.precision_recall(drawn, real)
    with pytest.raises(ValueError, match="images must be finite"):
        samples.precision_recall(x, x * math.nan)
    for wrong in ((255 * x).byte(), x.numpy()):
        with pytest.raises(ValueError, match="images must be a tensor of floating-point numbers"):
            samples.precision_recall(x, wrong)
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        samples.precision_recall(x, x, 0)


def test_every_number_is_that_of_its_own_function():
    vae = make()
    images = pictures(vae)
    train = pictures(vae, seed=5)
    found = samples.by_passes(vae, images, [1, 3], train, likelihood_images=4, samples=2, seed=6)
    assert list(found) == ["1", "3"]
    for count in (1, 3):
        scores = found[str(count)]
        drawn = vae.sample(len(images), seed=6, passes=count)
        variance = best_variance(vae, train[:4], count, 2, 6)
        nats = vae.log_prob(images[:4], samples=2, variance=variance, seed=6, passes=count).mean().item()
        expected = samples.precision_recall(drawn, images) | {"joint_nats": nats, "variance": variance}
        expected |= {"seconds": scores["seconds"]}
        assert scores == pytest.approx(expected) and scores["seconds"] > 0
    assert "joint_nats" not in samples.by_passes(vae, images, [1])["1"]


@pytest.mark.parametrize("K", [1, 5])
@pytest.mark.parametrize("passes", [1, 3])
def test_the_best_variance_is_that_of_the_largest_bound(passes, K):
    vae, generator = make(), torch.Generator().manual_seed(1)
    for parameter in vae.net.double().parameters():  # so that codes differ in what is decoded of them
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    images = pictures(vae).double()
    best = best_variance(vae, images, passes, K, seed=2)

    def bound(variance: float) -> float:
        return vae.log_prob(images, samples=K, variance=variance, seed=2, passes=passes).mean().item()

    assert bound(best) > max(bound(factor * best) for factor in (0.5, 0.9, 0.999, 1.001, 1.1, 2))


def test_a_table_leaves_what_was_not_measured_empty():
    found = {"1": dict(precision=0.5, recall=0.25, joint_nats=12.345, variance=0.01, seconds=1.5)}
    lines = samples.table(found, dict(precision=1.0, recall=0.75))
    assert lines[2].split() == ["1", "0.500", "0.250", "12.35", "0.01000", "1.50"]
    assert lines[3].split() == ["real", "1.000", "0.750"] and lines[4] == ""
