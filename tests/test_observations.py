"""Gaussian and Bernoulli observations; of the latter against a model whose likelihoods are found by integration."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Normal

from biglearn_vae import (
    BigLearnELBO,
    BigLearnVAE,
    DiagGaussian,
    ImageSet,
    Patchify,
    UniversalViT,
    evaluation,
    gibbs,
    load,
    losses,
)
from biglearn_vae.capabilities import best_variance
from biglearn_vae.data import Splits, binarized
from biglearn_vae.losses import InpaintingRegression
from biglearn_vae.observations import Bernoulli as BernoulliObservations
from biglearn_vae.observations import Gaussian, Observations, as_observations

ALL = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64).view(16, 2, 2)  # (N, L, D)


class Pixels(nn.Module):
    """Two patches of two pixels that are white with probability sigmoid(w z + b), z ~ N(0, 1) of one dimension.

    What it says of p(z | x_S) is near Bayes' posterior and not it.
    """

    grid, num_tokens, token_dim, z_dim = (1, 2), 2, 2, 1

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[2.0, -1.5], [1.0, 2.5]], dtype=torch.float64))
        self.b = torch.tensor([[-0.5, 0.3], [0.2, -1.0]], dtype=torch.float64)

    def forward(self, x: Tensor, S: Tensor, z: Tensor | None = None, T=None) -> DiagGaussian | Tensor:
        if z is not None:
            return z.unsqueeze(-1) * self.w + self.b
        seen = S.unsqueeze(-1)
        mean = 0.5 * ((x - 0.5) * self.w).masked_fill(~seen, 0).sum((1, 2))
        precision = 1 + 0.15 * (self.w.square() * seen).sum((1, 2))
        return DiagGaussian(mean.unsqueeze(-1), -precision.log().unsqueeze(-1))

    @torch.no_grad()
    def log_prob(self, x: Tensor, T: Tensor) -> Tensor:
        """The truth, log p(x_T), by Simpson's rule over z."""
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        weights = torch.tensor([1.0] + [4.0, 2.0] * 1999 + [4.0, 1.0], dtype=torch.float64) * (24 / 4000 / 3)
        of_pixels = Bernoulli(logits=z.view(-1, 1, 1, 1) * self.w + self.b).log_prob(x)
        of_images = (of_pixels * T.unsqueeze(-1)).sum((-2, -1)) + Normal(0.0, 1.0).log_prob(z).unsqueeze(-1)
        return (of_images + weights.log().unsqueeze(-1)).logsumexp(0)


def model(prior: str = "learned") -> BigLearnVAE:
    return BigLearnVAE(Pixels(), Rows(), prior, observations="bernoulli", chunk=10**6)


class Rows(nn.Module):
    """Images (B, 1, 1, 4) as two tokens of two pixels."""

    grid, token_dim, image_shape = (1, 2), 2, (1, 1, 4)

    def encode(self, images: Tensor) -> Tensor:
        return images.reshape(-1, 2, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(-1, 1, 1, 4)


BOTH = torch.ones(1, 2, dtype=torch.bool)
FIRST = torch.tensor([[True, False]])


def test_terms_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    x, output = (torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    T = x[..., 0] > 0.4
    for name, variance, truth in (
        ("gaussian", 0.3, Normal(output, 0.3**0.5).log_prob(x)),
        ("bernoulli", 1.0, Bernoulli(logits=output).log_prob(x.round())),
    ):
        kind = as_observations(name)
        own = x.round() if name == "bernoulli" else x
        expected = (truth * T.unsqueeze(-1)).sum((1, 2))
        found = kind.nats(kind.reconstruction(own, output, T), 5 * T.sum(-1).double(), variance)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    far = torch.tensor([800.0, -800.0])  # log-odds of what is all but certain
    terms = as_observations("bernoulli").terms(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), far)
    assert terms.tolist() == [[0, 0], [-800, -800]]


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "discretized_gaussian"])
def test_what_is_not_asked_for_may_be_nan_and_has_no_gradient(name):
    x, T = torch.rand(2, 3, 4).round(), torch.tensor([True, False, True])
    x[:, 1] = torch.nan
    output = torch.rand(2, 3, 4, requires_grad=True)
    as_observations(name).reconstruction(x, output, T).sum().backward()
    assert output.grad.isfinite().all() and not output.grad[:, 1].any() and output.grad[:, 0].all()


@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
def test_samples_have_the_mean_and_the_variance(name):
    kind, output = as_observations(name), torch.tensor([-2.0, 0.0, 0.7], dtype=torch.float64)
    drawn = kind.sample(output.expand(200_000, 3), 0.3, torch.Generator().manual_seed(0))
    p = output.sigmoid()
    expected = (p, p * (1 - p)) if name == "bernoulli" else (output, torch.full((3,), 0.3).double())
    torch.testing.assert_close(kind.mean(output), expected[0])
    torch.testing.assert_close(drawn.mean(0), expected[0], rtol=0, atol=5e-3)
    torch.testing.assert_close(drawn.var(0), expected[1], rtol=0, atol=5e-3)


def test_probabilities_of_all_images_are_those_of_integration_and_sum_to_1():
    vae = model()
    truth = vae.net.log_prob(ALL, BOTH)
    torch.testing.assert_close(truth.logsumexp(0), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-10)
    found = vae.log_prob(ALL, samples=60_000, seed=0)
    torch.testing.assert_close(found, truth, rtol=0, atol=0.02)
    annealed = evaluation.annealed_log_prob(vae, ALL, samples=64, steps=50)
    assert ((annealed.nats - truth).abs() < 5 * annealed.error + 1e-3).all()
    few = torch.stack([vae.log_prob(ALL, samples=1, seed=seed) for seed in range(2000)]).mean(0)
    assert (few < truth).all()  # the bound of one draw


def test_conditionals_and_marginals_are_those_of_integration():
    vae = model()
    marginal = vae.log_prob(ALL, FIRST, samples=20_000, seed=1)
    torch.testing.assert_close(marginal, vae.net.log_prob(ALL, FIRST), rtol=0, atol=0.02)
    assert vae.log_prob(ALL[:3], FIRST, unit="bits_per_dim", samples=2, seed=1).shape == (3,)
    conditional = evaluation.conditional_log_prob_joint(vae, ALL, FIRST, samples=64, steps=100)
    truth = vae.net.log_prob(ALL, BOTH) - vae.net.log_prob(ALL, FIRST)
    assert ((conditional.nats - truth).abs() < 5 * conditional.error + 1e-3).all()


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.0])
def test_the_elbo_bounds_the_likelihood_whatever_beta_is(beta):
    vae, loss = model(), BigLearnELBO(beta, observations="bernoulli")
    few = [evaluation.elbo(vae, ALL, loss, seed=seed) for seed in range(300)]
    for numbers in few[:3]:
        assert numbers["elbo"] == pytest.approx(numbers["reconstruction"] - beta * numbers["kl"])
        assert numbers["elbo_nats"] == pytest.approx(numbers["reconstruction"] - numbers["kl"])
    mean = sum(numbers["elbo_nats"] for numbers in few) / 300
    bound = torch.stack([vae.log_prob(ALL, samples=1, seed=seed) for seed in range(300)]).mean()
    assert mean == pytest.approx(bound.item(), abs=0.05) and mean < vae.net.log_prob(ALL, BOTH).mean()


@pytest.mark.parametrize("pseudo", [0, 10**6], ids=["metropolis", "pseudo-gibbs"])
def test_chains_end_in_the_conditional_distribution_if_they_weigh(pseudo):
    """Hidden are two pixels, so four cases; the encoder is not Bayes' posterior, and pseudo-Gibbs is off."""
    vae, count = model(), 20_000
    x = ALL[12]  # white, white, black, black
    states = gibbs.chain(vae, x, FIRST[0], count, pseudo, seed=0)
    state = next(itertools.islice(states, 60, None))
    cases = (state.x[:, 0, 1] * torch.tensor([2.0, 1.0])).sum(-1).long()
    found = torch.bincount(cases, minlength=4).double() / count
    same = ALL[12:16]  # all that agree with what is observed
    truth = (vae.net.log_prob(same, BOTH) - vae.net.log_prob(same[:1], FIRST)).exp()
    errors = ((found - truth) / (truth * (1 - truth) / count).sqrt()).abs()
    assert errors.max() < 4.5 if pseudo == 0 else errors.max() > 8
    assert torch.equal(state.mean, state.output.sigmoid())


def test_what_comes_back_are_probabilities():
    vae = model()
    z = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    expected = (z.unsqueeze(-1) * vae.net.w + vae.net.b).sigmoid()
    torch.testing.assert_close(vae.decode(z).view(2, 2, 2), expected.detach())
    completed = vae.decode(z, ALL[[12, 12]], FIRST).view(2, 2, 2)
    torch.testing.assert_close(completed[:, 1], expected[:, 1].detach())
    assert torch.equal(completed[:, 0], ALL[[12, 12], 0])


def test_passes_observe_draws():
    """Of two passes the first draws one of the patches from its marginal, and the second completes the other."""
    vae, count = model(), 40_000
    tokens = vae.sample(count, seed=0, passes=2).view(count, 2, 2)
    drawn = ((tokens == 0) | (tokens == 1)).all(-1)
    assert (drawn.sum(-1) == 1).all()
    for patch in range(2):
        own = tokens[drawn[:, patch], patch]
        cases = (own * torch.tensor([2.0, 1.0])).sum(-1).long()
        found, T = torch.bincount(cases, minlength=4).double() / len(own), torch.zeros(1, 2, dtype=torch.bool)
        T[0, patch] = True
        all_four = torch.zeros(4, 2, 2, dtype=torch.float64)
        all_four[:, patch] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
        truth = vae.net.log_prob(all_four, T).exp()
        assert ((found - truth).abs() < 4.5 * (truth * (1 - truth) / len(own)).sqrt()).all()
    same = vae.sample(count, seed=0, passes=2).view(count, 2, 2)
    assert torch.equal(same, tokens)
    x = ALL[[12, 3]]
    completed = vae.inpaint(x, FIRST, draws=3, seed=1, passes=4).view(3, 2, 2, 2)
    assert torch.equal(completed[:, :, 0], x[:, 0].expand(3, 2, 2))  # one patch was missing, so it is one pass
    assert torch.equal(completed, vae.inpaint(x, FIRST, draws=3, seed=1).view(3, 2, 2, 2))


def test_a_file_keeps_what_observations_are(tmp_path):
    tokens = Patchify(4, 2, 1)
    net = UniversalViT(grid=tokens.grid, token_dim=4, dim=8, depth=1, z_dim=2)
    loss = BigLearnELBO(0.5, observations="bernoulli")
    vae = BigLearnVAE.of(net, tokens, loss)
    assert (vae.prior, vae.variance, vae.observations) == ("learned", 0.5, loss.observations)
    vae.save(tmp_path / "model.pt")
    other, x = load(tmp_path / "model.pt", device="cpu"), torch.rand(3, 1, 4, 4).round()
    assert other.observations.name == "bernoulli"
    torch.testing.assert_close(other.log_prob(x, seed=0), vae.log_prob(x, seed=0), rtol=1e-6, atol=0)
    assert BigLearnVAE.of(net, tokens, BigLearnELBO(0.5)).observations.name == "gaussian"

    class Own(Gaussian):
        """N(output, I) by another name."""

    own = BigLearnVAE(net, tokens, observations=Own())
    assert torch.equal(own.log_prob(x, seed=0), BigLearnVAE(net, tokens).log_prob(x, seed=0))
    with pytest.raises(ValueError, match="observations of one's own, Own, cannot be written"):
        own.save(tmp_path / "own.pt")


def test_settings_tell_bernoulli_from_gaussian_ones_which_are_those_of_before():
    assert BigLearnELBO(1.0).settings["observations"] is None
    assert BigLearnELBO(1.0, observations="gaussian").settings == BigLearnELBO(1.0).settings
    assert BigLearnELBO(1.0, observations="bernoulli").settings["observations"] == "bernoulli"
    with pytest.raises(
        ValueError,
        match="observations must be gaussian, bernoulli, discretized_gaussian, or an object of Observations, got 'po",
    ):
        BigLearnELBO(1.0, observations="poisson")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae, x: vae.log_prob(x, variance=0.1), "bernoulli observations have no variance: leave variance=0.1"),
        (lambda vae, x: evaluation.fit_variance(vae, x), "bernoulli observations have no variance to be fitted"),
        (lambda vae, x: best_variance(vae, x), "bernoulli observations have no variance to be fitted"),
        (lambda vae, x: vae.log_prob(x / 2), "0 or 1, got other numbers in 24 patches: of images"),
        (lambda vae, x: gibbs.pseudo_gibbs(vae, x / 2, FIRST), "0 or 1, got other numbers in 12 patches"),
        (
            lambda vae, x: evaluation.elbo(vae, x / 2, BigLearnELBO(1.0, observations="bernoulli")),
            "0 or 1, got other numbers in 24 patches",
        ),
        (
            lambda vae, x: evaluation.elbo(vae, x, BigLearnELBO(1.0)),
            'the loss has gaussian observations, the model bernoulli ones: give the loss observations="bernoulli"',
        ),
    ],
)
def test_what_has_no_meaning_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(model(), ALL)


def test_hidden_and_unrecorded_pixels_may_be_anything():
    vae, x = model(), ALL.clone()
    x[:, 1] = torch.nan
    assert torch.equal(vae.log_prob(x, FIRST, samples=4, seed=0), vae.log_prob(ALL, FIRST, samples=4, seed=0))
    x[:, 1] = 0.5
    assert vae.log_prob(x, FIRST, samples=4, seed=0).isfinite().all()


def test_the_regressor_has_squared_errors_whatever_the_model():
    vae, x = model(), ALL
    found = InpaintingRegression()(vae.net, x, FIRST.expand(16, -1), ~FIRST.expand(16, -1))
    error = (x - vae.net.b).square()[:, 1].sum(-1)
    torch.testing.assert_close(found.reconstruction, -0.5 * error)


def test_observations_of_ones_own():
    class Laplace(Observations):
        def terms(self, x, output):
            return -(x - output).abs() - math.log(2)

        def nats(self, reconstruction, numbers, variance):
            return reconstruction

        def mean(self, output):
            return output

    vae = BigLearnVAE(Pixels(), Rows(), observations=Laplace(), chunk=10**6)
    x = torch.linspace(-1, 2, 8, dtype=torch.float64).view(2, 2, 2)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    density = torch.distributions.Laplace(z.view(-1, 1, 1, 1) * vae.net.w + vae.net.b, 1.0).log_prob(x).sum((-2, -1))
    truth = (density + Normal(0.0, 1.0).log_prob(z).unsqueeze(-1)).logsumexp(0) + math.log(24 / 4000)
    torch.testing.assert_close(vae.log_prob(x, samples=50_000, seed=0), truth.detach(), rtol=0, atol=0.05)


BYTES = torch.arange(256, dtype=torch.float64) / 255
VARIANCES = [1 / 255**2, 1e-3, 0.01, 0.3, 1.0]


def discretized(variance: float) -> Observations:
    return as_observations("discretized_gaussian").under(variance)


@pytest.mark.parametrize("variance", VARIANCES)
def test_probabilities_of_bytes_are_integrals_of_the_density(variance):
    kind, output = discretized(variance), torch.tensor([-3.0, -0.2, 0.0, 0.003, 0.5, 0.7001, 1.0, 5.0]).double()
    log = kind.nats(kind.terms(BYTES.unsqueeze(-1), output), torch.ones(()), variance)  # (256, outputs)
    torch.testing.assert_close(log.exp().sum(0), torch.ones(8).double(), rtol=0, atol=1e-12)
    # Simpson's rule in logarithms, so that it is exact far from the mean, too; the outer bytes have all that is beyond.
    u = torch.linspace(-0.5, 0.5, 4001, dtype=torch.float64) / 255
    weights = torch.tensor([1.0] + [4.0, 2.0] * 1999 + [4.0, 1.0]).double() / (4000 * 255 * 3)
    density = Normal(output, variance**0.5).log_prob((BYTES[1:-1, None] + u).unsqueeze(-1))
    truth = (density + weights.log().unsqueeze(-1)).logsumexp(1)
    torch.testing.assert_close(log[1:-1], truth, rtol=1e-7, atol=1e-7)
    for end, sign in ((0, 1), (255, -1)):
        beyond = torch.special.log_ndtr((sign * (BYTES[end] - output) + 0.5 / 255) / variance**0.5)
        torch.testing.assert_close(log[end], beyond)
    single = kind.terms(BYTES.float().unsqueeze(-1), output.float()) / variance
    torch.testing.assert_close(single.double(), log, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bytes_are_drawn_as_often_as_is_probable(variance):
    kind, output, count = discretized(variance), torch.tensor([-0.1, 0.3, 0.99]).double(), 100_000
    probabilities = (kind.terms(BYTES.unsqueeze(-1), output) / variance).exp()
    drawn = kind.sample(output.expand(count, 3), 1.0, torch.Generator().manual_seed(0))
    kind.check(drawn.unsqueeze(0), torch.ones(1, count, dtype=torch.bool))
    levels = (drawn * 255).round().long()
    found = torch.stack([torch.bincount(own, minlength=256) for own in levels.T], -1) / count
    error = (probabilities * (1 - probabilities) / count).sqrt() + 3 / count
    assert ((found - probabilities).abs() < 5 * error).all()
    expected = (probabilities * BYTES.unsqueeze(-1)).sum(0)
    torch.testing.assert_close(kind.mean(output), expected, rtol=0, atol=1e-4)
    assert torch.equal(kind.as_observed(torch.tensor([-0.2, 0.101, 1.7])), torch.tensor([0.0, 26 / 255, 1.0]))


def test_a_model_of_bytes_is_that_of_integration():
    """`Pixels` with N(mu, 0.09 I) rounded to bytes in place of Bernoulli observations."""
    variance, generator = 0.09, torch.Generator().manual_seed(0)
    x = (255 * torch.rand(5, 2, 2, generator=generator, dtype=torch.float64)).round() / 255
    x[0, 0], x[1, 1] = 0, 1
    vae = BigLearnVAE(Pixels(), Rows(), variance=variance, observations="discretized_gaussian", chunk=10**6)
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    output = (z.view(-1, 1, 1, 1) * vae.net.w + vae.net.b).detach()
    cdf = Normal(output, variance**0.5).cdf
    upper, lower = cdf(x + 0.5 / 255).masked_fill(x == 1, 1), cdf(x - 0.5 / 255).masked_fill(x == 0, 0)
    of_images = (upper - lower).clamp(min=1e-300).log().sum((-2, -1)) + Normal(0.0, 1.0).log_prob(z).unsqueeze(-1)
    truth = of_images.logsumexp(0) + math.log(24 / 4000)
    torch.testing.assert_close(vae.log_prob(x, samples=50_000, seed=0), truth, rtol=0, atol=0.05)
    bits = vae.log_prob(x, samples=9, seed=0, unit="bits_per_dim")
    torch.testing.assert_close(bits, -vae.log_prob(x, samples=9, seed=0) / (4 * math.log(2)))
    annealed = evaluation.annealed_log_prob(vae, x, samples=64, steps=200)
    assert ((annealed.nats - truth).abs() < 5 * annealed.error + 1e-3).all()


@pytest.mark.parametrize("beta", [0.01, 0.25])
def test_beta_is_the_variance_of_bytes(beta, tmp_path):
    tokens = Patchify(4, 2, 1)
    net = UniversalViT(grid=tokens.grid, token_dim=4, dim=8, depth=1, z_dim=2)
    loss = BigLearnELBO(beta, observations="discretized_gaussian", beta_warmup_steps=10)
    vae = BigLearnVAE.of(net, tokens, loss)
    assert vae.variance == vae.observations.variance == loss.observations.variance == beta
    x = (255 * torch.rand(3, 1, 4, 4)).round() / 255
    S, T, noise = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool), torch.randn(3, 2)
    parts = loss(net, tokens.encode(x), S, T, noise)
    torch.testing.assert_close(parts.elbo, beta * parts.elbo_nats)
    numbers = evaluation.elbo(vae, x, loss, seed=0)
    assert numbers["elbo"] == pytest.approx(beta * numbers["elbo_nats"])
    # The bytes are small beside the noise, so it is the density times their size, but for what lies outside [0, 1].
    middle, far = torch.full((1, 1, 4), 102 / 255).double(), torch.full((1, 1, 4), 0.45).double()
    of_bytes = loss.observations.reconstruction(middle, far, T[:1, :1]) / beta
    density = Gaussian().nats(Gaussian().reconstruction(middle, far, T[:1, :1]), torch.tensor(4.0).double(), beta)
    torch.testing.assert_close(of_bytes, density - 4 * math.log(255), rtol=0, atol=1e-3)
    vae.save(tmp_path / "model.pt")
    other = load(tmp_path / "model.pt", device="cpu")
    assert (other.observations.name, other.observations.variance) == ("discretized_gaussian", beta)
    torch.testing.assert_close(other.log_prob(x, seed=0), vae.log_prob(x, seed=0), rtol=1e-6, atol=0)
    as_trained = BigLearnVAE.of(net, tokens, BigLearnELBO(beta))  # for squared errors
    own = BigLearnVAE(net, tokens, variance=beta, observations="discretized_gaussian")
    assert torch.equal(own.log_prob(x, seed=0), vae.log_prob(x, seed=0)) and as_trained.variance == beta
    completed = vae.inpaint(x, S.index_fill(1, torch.tensor(0), True), seed=0, passes=2)
    assert ((completed * 255 - (completed * 255).round()).abs() < 1e-3).flatten(1).sum(1).min() >= 8


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: BigLearnELBO(0.0, observations="discretized_gaussian"), r"in \[1/255\^2, 1\], got 0.0"),
        (lambda: BigLearnELBO(1.5, observations="discretized_gaussian"), r"in \[1/255\^2, 1\], got 1.5"),
        (lambda: bytes_model().log_prob(ALL * 0.5), "are bytes / 255, got other numbers in 24 patches: of images in"),
        (lambda: bytes_model().log_prob(ALL - 0.5 / 255), "are bytes / 255, got other numbers in 32 patches"),
        (lambda: bytes_model().log_prob(2 * ALL), "are bytes / 255, got other numbers in 24 patches"),
        (lambda: bytes_model().log_prob(ALL, variance=0.1), "have no variance but the model's: leave variance=0.1 out"),
        (lambda: evaluation.fit_variance(bytes_model(), ALL), "have no variance to be fitted"),
    ],
)
def test_what_bytes_cannot_have_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def bytes_model() -> BigLearnVAE:
    return BigLearnVAE(Pixels(), Rows(), observations="discretized_gaussian")


@pytest.mark.parametrize("variance", VARIANCES[:3])
def test_gradients_in_float32_pull_back_from_far_away(variance):
    """As large as those of Gaussian terms: x - output, towards the nearest number that rounds to x."""
    x, far = torch.tensor([0.0, 128 / 255, 1.0]), torch.tensor([1.0, 3.0, 8.0, 30.0, 100.0, 1000.0, -2.0, -50.0])
    found = []
    for dtype in (torch.float32, torch.float64):
        output = (x + far.unsqueeze(-1)).to(dtype).requires_grad_()
        discretized(variance).terms(x.to(dtype), output).sum().backward()
        found.append(output.grad.double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1][:, 1], -far.double(), rtol=1e-2, atol=0)
    mean = discretized(variance).mean(torch.tensor([-1e30, -1e3, 1e5, 1e30]))
    torch.testing.assert_close(mean, torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_beta_that_is_set_later_is_the_variance():
    loss = BigLearnELBO(0.01, observations="discretized_gaussian")
    settings = loss.settings
    loss.beta = 0.04
    assert loss.observations.variance == 0.04 and loss.settings == settings | {"beta": 0.04}
    with pytest.raises(ValueError, match=r"have the variance 0\.04, the model 1\.0: give variance=0\.04, or observ"):
        BigLearnVAE(Pixels(), Rows(), observations=loss.observations)
    vae = BigLearnVAE(Pixels(), Rows(), variance=0.04, observations=loss.observations)
    assert vae.variance == vae.observations.variance == 0.04
    first = vae.log_prob(ALL, seed=0)
    vae.variance = 0.09
    assert vae.observations.variance == 0.09 and loss.observations.variance == 0.04
    same = BigLearnVAE(Pixels(), Rows(), variance=0.09, observations="discretized_gaussian").log_prob(ALL, seed=0)
    assert torch.equal(vae.log_prob(ALL, seed=0), same) and not torch.equal(first, same)
    with pytest.raises(ValueError, match="need a variance, beta"):
        loss.beta = 2.0
    assert loss.beta == 0.04
    assert BigLearnVAE(Pixels(), Rows()).variance == 1.0


def test_terms_of_ones_own_may_be_of_bytes():
    class Own(BigLearnELBO):
        def terms(self, net, x, S, T, noise):
            reconstruction, kl = super().terms(net, x, S, T, noise)
            return 2 * reconstruction, kl

    loss = Own(0.04, observations="discretized_gaussian")
    vae = BigLearnVAE.of(Pixels(), Rows(), loss)
    assert not losses.has_model(loss) and vae.observations.variance == 0.04
    assert set(evaluation.elbo(vae, ALL, loss)) == {"elbo", "reconstruction", "kl"}


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_black_and_white(channels):
    grey = torch.tensor([0, 51, 127, 128, 255], dtype=torch.uint8)
    images = ImageSet(grey.view(1, 1, 1, 5).expand(20_000, channels, 1, 5), labels=torch.arange(20_000))
    splits = Splits(train=images, valid=images.select(slice(100)), test=images.select(slice(0)), note="a note")
    white = binarized(splits, "threshold")
    assert white.train[:1].flatten(0, 2)[0].tolist() == [0, 0, 0, 1, 1] and white.note == "a note"
    assert torch.equal(white.train.labels, images.labels) and len(white.test) == 0
    drawn, again = binarized(splits, "sample"), binarized(splits, "sample")
    assert drawn.train.pixels.unique().tolist() == [0, 255] and torch.equal(drawn.valid.pixels, again.valid.pixels)
    torch.testing.assert_close(drawn.train[:].mean((0, 1, 2)), grey / 255, rtol=0, atol=0.02)
    assert (drawn.train.pixels == drawn.train.pixels[:, :1]).all()  # grey images stay grey
    half = ImageSet(torch.tensor([127, 128], dtype=torch.uint8).view(1, 2, 1, 1))
    assert binarized(Splits(half, half, half), "threshold").train.pixels.flatten().tolist() == [255, 255]
    with pytest.raises(ValueError, match="binarize must be threshold or sample, got 'otsu'"):
        binarized(splits, "otsu")


def test_other_observations_have_other_names():
    class Noisy(BernoulliObservations):
        pass

    assert (Noisy().name, Gaussian().name) == ("noisy", "gaussian")
    vae = model()
    with pytest.raises(ValueError, match="the loss has noisy observations, the model bernoulli ones"):
        evaluation.elbo(vae, ALL, BigLearnELBO(1.0, observations=Noisy()))
    with pytest.raises(ValueError, match="discretized_gaussian, or an object of Observations, got <class"):
        BigLearnELBO(1.0, observations=Noisy)
    with pytest.raises(ValueError, match="0 or 1, got other numbers in 24 patches"):
        BigLearnELBO(1.0, observations="bernoulli")(vae.net, ALL / 2, ~BOTH, BOTH, torch.zeros(16, 1).double())
    assert BigLearnVAE.of(vae.net, Rows(), BigLearnELBO(1.0), variance=0.3).variance == 0.3
