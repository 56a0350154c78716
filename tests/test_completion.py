"""Scores of completions, their floors, and log p(x_hid | x_S) of a joint VAE."""

import itertools
import math

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from test_evaluation import N, make, pictures, slow_psnr, spoil
from torch import Tensor

from biglearn_vae import BigLearnVAE, Patchify, TwoStackViT, data, evaluation, masks


@pytest.fixture(params=["grey", "colour"])
def vae(request) -> BigLearnVAE:
    return make() if request.param == "grey" else make(3, (4, 6))


def several(vae: BigLearnVAE, K: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Draws (K, N, C, H, W), the truth and hidden pixels."""
    draws = torch.stack([pictures(vae, seed=seed) for seed in range(1, K + 1)])
    return draws, pictures(vae), vae.pixel_mask(masks.random(N, vae.num_tokens, 0.4, seed=1))


def test_scores_by_hand(vae):
    draws, images, hidden = several(vae)
    errors = [-slow_psnr(draw, images, ~hidden) / 10 * math.log(10) for draw in draws]
    everywhere = hidden.expand_as(images)
    pairs = [(a - b)[everywhere].double().square().mean() / 2 for a, b in itertools.combinations(draws, 2)]
    assert evaluation.completion_scores(draws, images, hidden) == pytest.approx(
        {
            "psnr_draw": -10 * math.log10(sum(map(math.exp, errors)) / 4),
            "psnr_mean": slow_psnr(draws.double().mean(0), images, ~hidden),
            "diversity": (sum(pairs) / len(pairs)).sqrt().item(),
        },
        rel=1e-6,
    )


def test_error_of_a_draw_is_that_of_the_mean_and_the_spread(vae):
    draws, images, hidden = several(vae)
    scores = evaluation.completion_scores(draws, images, hidden)
    one, mean = (10 ** (-scores[name] / 10) for name in ("psnr_draw", "psnr_mean"))
    assert one == pytest.approx(mean + (1 - 1 / 4) * scores["diversity"] ** 2, rel=1e-9)


def test_scores_of_equal_draws(vae):
    draws, images, hidden = several(vae)
    scores = evaluation.completion_scores(draws[:1].expand_as(draws), images, hidden)
    psnr = evaluation.psnr(draws[0], images, hidden)
    assert scores == pytest.approx({"psnr_draw": psnr, "psnr_mean": psnr, "diversity": 0}, abs=1e-6)
    assert evaluation.completion_scores(images.expand_as(draws), images, hidden)["psnr_draw"] == math.inf


def test_scores_look_at_hidden_pixels_alone(vae):
    draws, images, hidden = several(vae)
    expected = evaluation.completion_scores(draws, images, hidden)
    for other in (7.0, math.nan):
        spoilt = (torch.where(hidden, part, other) for part in (draws, images))
        assert evaluation.completion_scores(*spoilt, hidden) == expected


def test_scores_refuse(vae):
    draws, images, hidden = several(vae)
    for wrong in (draws[:1], draws[0], draws[:, :2]):
        with pytest.raises(ValueError, match="at least 2 draws"):
            evaluation.completion_scores(wrong, images, hidden)
    for wrong in (torch.zeros_like(hidden), hidden.long(), hidden[:, 0], hidden[:2]):
        with pytest.raises(ValueError, match="hidden must be a boolean mask of pixels"):
            evaluation.completion_scores(draws, images, wrong)


# --- any completion, and the mean training image ---


@pytest.mark.parametrize("chunk", [1024, 4])
def test_psnr_of_a_completion(vae, monkeypatch, chunk):
    monkeypatch.setattr(data, "CHUNK", chunk)
    x, recorded = pictures(vae), masks.random(N, vae.num_tokens, 0.8, seed=9)

    def complete(x: Tensor, S: Tensor) -> Tensor:
        return vae.decode(vae.encode(x, S).mean, x, S)

    result = evaluation.completion_psnr(vae, spoil(vae, x, recorded), [0.25, 0.75], complete, seed=3)
    assert list(result) == [0.25, 0.75]
    for ratio, S in evaluation.hidden_masks(N, vae.grid, [0.25, 0.75], seed=3).items():
        asked = vae.pixel_mask(~S & recorded)
        assert result[ratio] == pytest.approx(slow_psnr(complete(x, S & recorded), x, ~asked), rel=1e-5)


def test_bytes_score_as_the_images_that_they_are(vae):
    x = (255 * pictures(vae)).round().to(torch.uint8)
    hidden, drawn = vae.pixel_mask(~masks.random(N, vae.num_tokens, 0.5, seed=1)), vae.inpaint(x, ~masks.half(vae.grid))
    drawn = torch.stack([drawn, 0.5 * drawn])
    assert evaluation.psnr(drawn[0], x, hidden) == evaluation.psnr(drawn[0], x / 255, hidden)
    assert evaluation.psnr(x, x / 255, hidden) == math.inf
    assert evaluation.completion_scores(drawn, x, hidden) == evaluation.completion_scores(drawn, x / 255, hidden)


def test_one_draw_scores_as_in_inpainting_psnr(vae):
    x = pictures(vae)
    expected = evaluation.inpainting_psnr(vae, x, [0.5], draws=1, seed=3)
    result = evaluation.completion_psnr(vae, x, [0.5], lambda x, S: vae.inpaint(x, S, seed=3), seed=3)
    assert result == pytest.approx(expected, rel=1e-6)


class Slices:
    """Images that come as slices alone."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice) -> Tensor:
        assert isinstance(index, slice) and len(range(*index.indices(len(self)))) <= data.CHUNK
        return self.images[index]


def test_mean_training_image(vae, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)
    x, train = pictures(vae, seed=1), pictures(vae, 30, seed=2)
    mean = train.double().mean(0).expand_as(x)
    for known in (train, Slices(train)):
        result = evaluation.training_mean_psnr(vae, x, known, [0.25, 0.75], seed=5)
        for ratio, S in evaluation.hidden_masks(N, vae.grid, [0.25, 0.75], seed=5).items():
            assert result[ratio] == pytest.approx(slow_psnr(mean, x, vae.pixel_mask(S)), rel=1e-6)


def test_mean_training_image_of_what_was_recorded(vae):
    train = pictures(vae, 30, seed=2)
    train[:20, :, 1] = torch.nan
    train[:, :, 2, 3] = torch.nan
    result = evaluation._mean_image(train)
    expected = train.double().nanmean(0)
    never = expected.isnan()
    assert never.sum() == len(train[0])
    torch.testing.assert_close(result[~never], expected[~never], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result[never], train.double().nanmean().expand(len(train[0])), rtol=1e-12, atol=1e-12)


# --- log-likelihoods by annealing, of any model and of a joint VAE ---

COUNT = 12


def linear(**inexact) -> tuple[LinearGaussian, BigLearnVAE, Tensor, Tensor, Tensor]:
    """A model with its data as images, what is observed, and the true log p(x_hid | x_S)."""
    net = LinearGaussian(**inexact)
    tokens, vae = net.data(COUNT), net.model("standard")
    S = masks.random(COUNT, 6, 0.5, seed=4)
    return net, vae, vae.tokenizer.decode(tokens), S, net.log_prob(tokens, ~S, S)


def test_no_more_chains_pass_through_the_network_at_once_than_asked_for(monkeypatch):
    net, _, x, S, truth = linear()
    passed, forward = [], net.forward
    monkeypatch.setattr(net, "forward", lambda x, *more: passed.append(len(x)) or forward(x, *more))
    vae = BigLearnVAE(net, net.model("standard").tokenizer, "standard", net.variance, chunk=8)
    found = evaluation.annealed_log_prob(vae, x[:2], ~S[:2], S[:2], samples=20, steps=8, seed=1)
    assert max(passed) <= 8 and found.nats == pytest.approx(truth[:2], abs=0.5)


@pytest.mark.parametrize("given", [False, True])
def test_annealed_likelihood_is_the_truth(given):
    """Of overlapping posteriors that are half a standard deviation off and half as wide; the rest is not looked at."""
    net = LinearGaussian(0.5, 0.5, inexact=lambda S: S.sum(-1) == 5)
    tokens, rank = net.data(COUNT), torch.rand(COUNT, 6, generator=torch.Generator().manual_seed(0)).argsort(-1)
    S, T = (rank < 2, (rank >= 2) & (rank < 5)) if given else (torch.zeros(COUNT, 6, dtype=torch.bool), rank < 5)
    vae, truth = net.model(), net.log_prob(tokens, T, S)
    x = spoil(vae, vae.tokenizer.decode(tokens), S | T)
    result = evaluation.annealed_log_prob(vae, x, T, S if given else None, samples=64, steps=50, seed=0)
    off = (result.nats - truth) / result.error
    assert off.abs().max() < 4 and 0.5 < off.square().mean().sqrt() < 2
    assert result.error.max() < 0.15


def test_one_step_is_the_bound_of_log_prob():
    net = LinearGaussian(0.5, 0.8)
    x, S = net.model().tokenizer.decode(net.data(COUNT)), masks.random(COUNT, 6, 0.5, seed=4)
    ours = evaluation.annealed_log_prob(net.model(), x, None, S, samples=20_000, steps=1, seed=0)
    other = net.model().log_prob(x, None, S, samples=20_000, seed=1)
    assert (ours.nats - other).abs().max() < 4 * 2**0.5 * ours.error.max() < 0.3


def test_annealing_a_network_is_above_its_bound(vae):
    x, S = pictures(vae), masks.random(N, vae.num_tokens, 0.4, seed=1)
    bound = vae.log_prob(x, None, S, samples=16, variance=0.01, seed=0)
    result = evaluation.annealed_log_prob(vae, x, None, S, samples=16, variance=0.01, steps=30, seed=0)
    assert (result.nats > bound + 3 * result.error).all()


def test_annealed_likelihoods_of_images_tokens_and_single_ones():
    _, vae, x, S, _ = linear()
    options = dict(samples=4, steps=5, seed=np.int64(2))
    tokens = vae.tokenizer.encode(x[:1])
    for given, shape in ((x[:1], (1,)), (x[0], ()), (tokens, (1,)), (tokens[0], ())):
        one = evaluation.annealed_log_prob(vae, given, ~S[:1], S[:1], **options)
        other = evaluation.conditional_log_prob_joint(vae, given, S[:1], **options)
        again = evaluation.conditional_log_prob_joint(vae, given, S[:1], **options, joint=other.joint)
        for found in (one, other, again):
            assert found.nats.shape == found.error.shape == shape
        assert torch.equal(
            one.nats, evaluation.annealed_log_prob(vae, x[:1], ~S[:1], S[:1], **options).nats.view(shape)
        )
        assert torch.equal(other.nats, again.nats)


def test_annealed_likelihoods_refuse():
    _, vae, x, S, _ = linear()
    for T, given in ((S, S), (torch.zeros_like(S), None), (None, torch.ones_like(S))):
        with pytest.raises(ValueError, match=r"T and given must be disjoint|T must hold at least one patch"):
            evaluation.annealed_log_prob(vae, x, T, given)
    with pytest.raises(ValueError, match=r"expected images .* or tokens"):
        evaluation.annealed_log_prob(vae, x[0, 0])
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        evaluation.annealed_log_prob(vae, x, samples=0)


@pytest.mark.parametrize("wrong", [{}, dict(shift=0.5, widen=0.5)], ids=["exact", "inexact"])
def test_conditional_of_a_joint_vae_is_the_truth(wrong):
    _, vae, x, S, truth = linear(**wrong)
    result = evaluation.conditional_log_prob_joint(vae, x, S, samples=64, steps=100, seed=0)
    off = (result.nats - truth) / result.error
    assert off.abs().max() < 4 and 0.5 < off.square().mean().sqrt() < 2
    assert result.error.max() < 0.15


def test_a_marginal_of_a_joint_network_is_that_of_its_means_of_whole_images():
    """By quadrature over one z. Asked for a part alone, a network that drops tokens has other means of it."""
    x = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    S, z = masks.random(5, 4, 0.5, seed=0), torch.linspace(-8, 8, 4001).double()
    short = {}
    for hidden in ("mask", "drop"):
        torch.manual_seed(1)
        net = TwoStackViT(grid=(2, 2), token_dim=4, dim=16, depth=(1, 2), z_dim=1, heads=2, hidden=hidden).double()
        vae = BigLearnVAE(net, Patchify(4, 2, 1), prior="standard", variance=0.5)
        # Longer chains make more of the difference in rounding: after 50 steps it is 1e-9 on some machines.
        short[hidden] = evaluation.conditional_log_prob_joint(vae, x, S, samples=64, steps=10, seed=0)
    found = evaluation.conditional_log_prob_joint(vae, x, S, samples=64, steps=50, seed=0)
    means = net(torch.zeros(len(z), 4, 4).double(), torch.zeros(len(z), 4, dtype=torch.bool), z[:, None])
    logs = torch.distributions.Normal(means[:, None], 0.5**0.5).log_prob(vae.tokenizer.encode(x)).sum(-1)  # (., N, L)
    prior = -z.square() / 2 - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
    marginal = ((logs * S).sum(-1) + prior[:, None]).logsumexp(0)
    assert ((found.marginal.nats - marginal).abs() < 4 * found.marginal.error).all()
    assert found.marginal.error.max() < 0.1
    torch.testing.assert_close(short["drop"].nats, short["mask"].nats, rtol=0, atol=1e-9)


def test_it_nears_the_truth_with_samples_and_steps():
    _, vae, x, S, truth = linear(shift=0.5, widen=0.5)

    def distance(samples: int, steps: int) -> float:
        result = evaluation.conditional_log_prob_joint(vae, x, S, samples, steps=steps, seed=1)
        return (result.nats - truth).square().mean().sqrt().item()

    samples = [distance(K, 20) for K in (8, 64, 512)]
    steps = [distance(16, steps) for steps in (1, 16, 256)]
    for first, second, third in (samples, steps):
        assert first > 1.5 * second > 2.25 * third and third < 0.2


def test_its_two_parts():
    net, vae, x, S, _ = linear()
    everything, nothing = torch.ones_like(S), torch.zeros_like(S)
    tokens = vae.tokenizer.encode(x)
    result = evaluation.conditional_log_prob_joint(vae, x, S, samples=4, steps=20, seed=0)
    # From the exact posterior all weights are p(x).
    torch.testing.assert_close(result.joint.nats, net.log_prob(tokens, everything, nothing), rtol=1e-9, atol=1e-9)
    assert result.joint.error.max() < 1e-9
    assert torch.equal(result.nats, result.joint.nats - result.marginal.nats)
    torch.testing.assert_close(result.error, result.marginal.error, rtol=1e-9, atol=1e-9)
    again = evaluation.conditional_log_prob_joint(vae, x, S, samples=4, steps=20, seed=0, joint=result.joint)
    assert again.joint is result.joint and torch.equal(again.nats, result.nats)
    # Of nothing the probability is 1, from the prior all weights.
    result = evaluation.conditional_log_prob_joint(vae, x, nothing, samples=4, steps=20, seed=0)
    torch.testing.assert_close(result.marginal.nats, torch.zeros(COUNT).double(), rtol=0, atol=1e-9)


def test_a_model_is_scored_under_the_variance_that_is_asked_for():
    net, vae, x, S, truth = linear()
    vae.variance = 7.0
    result = evaluation.conditional_log_prob_joint(vae, x, S, samples=64, variance=net.variance, steps=100, seed=0)
    assert ((result.nats - truth) / result.error).abs().max() < 4


def test_images_in_parts_and_a_seed():
    _, vae, x, S, truth = linear(shift=0.5, widen=0.5)
    vae.chunk = 32 * 5
    one, same, other = (
        evaluation.conditional_log_prob_joint(vae, x, S, samples=32, steps=25, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.nats, same.nats) and not torch.isclose(one.nats, other.nats).any()
    assert ((one.nats - truth) / one.error).abs().max() < 4


def test_the_conditional_refuses():
    _, vae, x, S, _ = linear()
    for S_wrong in (S | (torch.arange(COUNT) == 3).unsqueeze(-1), S[0, :5]):
        with pytest.raises(ValueError, match=r"hidden|mask of patches"):
            evaluation.conditional_log_prob_joint(vae, x, S_wrong)
    with pytest.raises(ValueError, match=r"variance must be a number in \(0, inf\), got 0"):
        evaluation.conditional_log_prob_joint(vae, x, S, variance=0.0)
    with pytest.raises(ValueError, match="finite"):
        evaluation.conditional_log_prob_joint(vae, spoil(vae, x, torch.eye(COUNT, 6) == 0), S)
    joint = evaluation.conditional_log_prob_joint(vae, x[:2], S[:2], samples=2, steps=2).joint
    with pytest.raises(ValueError, match=f"joint must be of these {COUNT} images, got 2 numbers"):
        evaluation.conditional_log_prob_joint(vae, x, S, joint=joint)
