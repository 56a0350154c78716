import itertools
import math

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor
from torch.distributions import Normal

from biglearn_vae import BigLearnVAE, Patchify, TwoStackViT, UniversalViT, gaussian, gibbs, masks

CHAINS = 4000
WRONG = dict(shift=0.5, widen=1.3)  # a proposal that is off by half a standard deviation and too wide by 30 %
S = torch.tensor([[True, False, False, False, True, False], [False, False, True, True, False, False]])


def last(states, count: int) -> gibbs.State:
    return next(itertools.islice(states, count - 1, None))


def standard_errors(x: Tensor, truth, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """How far the mean and covariance of independent chains (K, L, D) are from the truth, in their standard errors."""
    drawn = x[:, hidden].flatten(1)  # (K, n)
    cov, var = truth.covariance_matrix, truth.variance
    mean = (drawn.mean(0) - truth.loc) / (var / len(x)).sqrt()
    # Wishart: Var S_ij = (C_ij^2 + C_ii C_jj) / (K - 1)
    spread = (drawn.T.cov() - cov) / ((cov.square() + var.outer(var)) / (len(x) - 1)).sqrt()
    return mean.abs().max(), spread.abs().max()


@pytest.mark.parametrize("pseudo", [0, 10**6], ids=["metropolis", "pseudo-gibbs"])
def test_with_the_exact_posterior_both_are_gibbs_samplers(pseudo):
    """Every proposal is taken, and the chains end in p(x_hid | x_obs), which is known in closed form."""
    net = LinearGaussian()
    x = net.data(2)
    states = list(itertools.islice(gibbs.chain(net.model(), x, S, CHAINS, pseudo, seed=0), 60))
    assert all(state.accepted.all() for state in states)
    for n in range(2):
        mean, spread = standard_errors(states[-1].x[:, n], net.conditional(x[n], S[n]), ~S[n])
        assert mean < 4 and spread < 4.5  # the largest of 16 and of 136 normal numbers


def test_with_a_wrong_proposal_only_metropolis_is_right():
    net = LinearGaussian(**WRONG)
    x = net.data(2)
    right = last(gibbs.chain(net.model(), x, S, CHAINS, seed=1), 200)
    wrong = last(gibbs.chain(net.model(), x, S, CHAINS, pseudo=10**6, seed=1), 200)
    assert 0.2 < right.accepted.double().mean() < 0.95
    for n in range(2):
        truth = net.conditional(x[n], S[n])
        mean, spread = standard_errors(right.x[:, n], truth, ~S[n])
        assert mean < 4 and spread < 4.5
        mean, spread = standard_errors(wrong.x[:, n], truth, ~S[n])
        assert mean > 20 and spread > 10


def chains(net, x: Tensor, S: Tensor) -> gibbs._Chains:
    return gibbs._Chains(net.model(), x, S, True, net.variance, 0)


def test_acceptance_is_in_detailed_balance():
    """p(z | x) q(z' | x) a(z, z') = p(z' | x) q(z | x) a(z', z), with p(z | x) by Bayes' rule."""
    net = LinearGaussian(**WRONG)
    x, everything = net.data(1).expand(1, -1, -1), torch.ones(1, 6, dtype=torch.bool)
    z = torch.randn(2, 50, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = x.expand(50, -1, -1, -1)
    with torch.no_grad():
        q = net(x, everything)
        means = [net(x, everything, one[:, 0]).unsqueeze(1) for one in z]
        ours = [
            chains(net, x, everything).log_weight(one, mean, tokens, q).flatten()
            for one, mean in zip(z, means, strict=True)
        ]
    log_posterior, log_proposal = [], []
    for one, mean in zip(z, means, strict=True):
        likelihood = Normal(mean[:, 0].flatten(1), net.variance**0.5).log_prob(x.flatten()).sum(-1)
        log_posterior.append(
            likelihood + Normal(0.0, 1.0).log_prob(one).sum((1, 2)) - net.joint().log_prob(x.flatten())
        )
        log_proposal.append(Normal(q.mean, q.std).log_prob(one).sum((1, 2)))
    for a, b in ((0, 1), (1, 0)):
        ratio = log_posterior[b] - log_posterior[a] + log_proposal[a] - log_proposal[b]
        torch.testing.assert_close(ours[b] - ours[a], ratio, rtol=1e-9, atol=1e-9)
    there = log_posterior[0] + log_proposal[1] + (ours[1] - ours[0]).clamp(max=0)
    back = log_posterior[1] + log_proposal[0] + (ours[0] - ours[1]).clamp(max=0)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-9)


def test_acceptance_rate_is_that_of_the_ratio():
    """With nothing hidden z' ~ q(z | x) is a proposal independent of z: E min(1, w(z') / w(z)), z and z' from q."""
    net = LinearGaussian(**WRONG)
    x, everything = net.data(1), torch.ones(1, 6, dtype=torch.bool)
    state = last(gibbs.chain(net.model(), x, everything, 100_000, pseudo=1, seed=0), 2)
    weights = net.model().log_weights(x, samples=200_000, seed=1)[:, 0]
    expected = (weights[::2] - weights[1::2]).exp().clamp(max=1).mean()
    assert state.accepted.double().mean() == pytest.approx(expected.item(), abs=4 * 2**0.5 * 0.5 / 100_000**0.5)


# --- a network ---

N = 5


@pytest.fixture(params=["standard", "learned", "drop"])
def vae(request) -> BigLearnVAE:
    tokenizer, sizes = Patchify((4, 6), 2, 3), dict(dim=16, z_dim=3, heads=2)
    torch.manual_seed(0)
    two = request.param == "standard"
    kind, extra = (TwoStackViT, {"depth": (1, 1)}) if two else (UniversalViT, {"depth": 2})
    extra["hidden"] = "drop" if request.param == "drop" else "mask"
    net = kind(grid=tokenizer.grid, token_dim=tokenizer.token_dim, **sizes, **extra).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return BigLearnVAE(net, tokenizer, "standard" if two else "learned", variance=0.5)


def pictures(vae: BigLearnVAE, count: int = N) -> Tensor:
    return torch.rand(count, *vae.image_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def observed(vae: BigLearnVAE) -> Tensor:
    return masks.random(N, vae.num_tokens, 0.5, seed=1)


def pixels(vae: BigLearnVAE, S: Tensor) -> Tensor:
    return masks.to_pixels(S, vae.grid, vae.image_shape[1:]).unsqueeze(1)


SAMPLERS = [gibbs.pseudo_gibbs, gibbs.metropolis_within_gibbs]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("junk", [math.nan, math.inf, 7.0])
def test_what_is_observed_is_kept_and_what_is_hidden_has_no_influence(vae, sampler, junk):
    x, S = pictures(vae), observed(vae)
    result = sampler(vae, x, S, (1, 4), draws=3, seed=2)
    seen = pixels(vae, S)
    other = sampler(vae, torch.where(seen, x, junk), S, (1, 4), draws=3, seed=2)
    for count, images in result.images.items():
        assert images.shape == (3, N, *vae.image_shape) and images.min() >= 0 and images.max() <= 1
        assert torch.equal(torch.where(seen, images, 0), torch.where(seen, x, 0).expand_as(images))
        assert torch.equal(images, other.images[count])
    changed = sampler(vae, 1 - x, S, (1, 4), draws=3, seed=2).images[4]
    assert not torch.isclose(changed, result.images[4]).all()


@pytest.mark.parametrize("pseudo", [0, 2, 10])
def test_one_iteration_by_hand(vae, pseudo):
    """The first four iterations from the same random numbers, from the network's two kinds of call."""
    x, S = vae.tokenizer.encode(pictures(vae)), observed(vae)
    everything, generator = torch.ones_like(S), gaussian.generator(torch.device("cpu"), 3)
    prior = vae.encode(x, ~everything)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def decode(z):
        return vae.net(torch.zeros_like(x), ~everything, z)

    def log_density(image, z, mean):
        return Normal(mean, 0.5**0.5).log_prob(image).sum((1, 2)) + Normal(prior.mean, prior.std).log_prob(z).sum(-1)

    with torch.no_grad():
        z = prior.mean + prior.std * normal(1, N, 3)[0]
        mean = decode(z)
        image = torch.where(S.unsqueeze(-1), x, mean + 0.5**0.5 * normal(1, *x.shape)[0])
        for step, state in zip(range(1, 5), gibbs.chain(vae, x, S, 1, pseudo, seed=3), strict=False):
            q = vae.net(image, everything)
            new = q.mean + q.std * normal(1, N, 3)[0]
            gain = log_density(image, new, decode(new)) - log_density(image, z, mean)
            gain += (Normal(q.mean, q.std).log_prob(z) - Normal(q.mean, q.std).log_prob(new)).sum(-1)
            taken = torch.ones(N, dtype=torch.bool)
            if step > pseudo:
                taken = torch.rand(1, N, generator=generator, dtype=torch.float64)[0] < gain.exp()
            z = torch.where(taken.unsqueeze(-1), new, z)
            mean = decode(z)
            image = torch.where(S.unsqueeze(-1), x, mean + 0.5**0.5 * normal(1, *x.shape)[0])
            assert torch.equal(state.accepted[0], taken)
            for ours, theirs in ((state.z, z), (state.mean, mean), (state.x, image)):
                torch.testing.assert_close(ours[0], theirs, rtol=1e-10, atol=1e-10)


def test_completions_are_means_of_the_last_codes(vae):
    x, S = pictures(vae), observed(vae)
    result = gibbs.metropolis_within_gibbs(vae, x, S, [5, 1, 3], draws=2, pseudo=2, seed=4)
    assert list(result.images) == list(result.seconds) == list(result.acceptance) == [1, 3, 5]
    states = list(itertools.islice(gibbs.chain(vae, x, S, 2, 2, seed=4), 5))
    for count, images in result.images.items():
        expected = torch.where(pixels(vae, S), x, vae.decode(states[count - 1].z))
        torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    taken = [state.accepted.double().mean().item() for state in states]
    assert result.acceptance == pytest.approx({1: 1.0, 3: taken[2], 5: sum(taken[2:]) / 3})
    assert 0 < result.seconds[1] < result.seconds[3] < result.seconds[5]


def test_the_first_iteration_from_a_start_is_pseudo_gibbs_and_no_acceptance(vae):
    x, S = pictures(vae), observed(vae)
    result = gibbs.metropolis_within_gibbs(vae, x, S, [1, 3], draws=2, pseudo=0, start=x, seed=4)
    states = list(itertools.islice(gibbs.chain(vae, x, S, 2, 0, start=x, seed=4), 3))
    taken = [state.accepted.double().mean().item() for state in states]
    assert taken[0] == 1 and min(taken[1:]) < 1
    assert result.acceptance == pytest.approx({1: 1.0, 3: sum(taken[1:]) / 2})


def test_pseudo_gibbs_is_metropolis_that_never_begins(vae):
    x, S = pictures(vae), observed(vae)
    one = gibbs.pseudo_gibbs(vae, x, S, (2, 5), draws=2, seed=4)
    other = gibbs.metropolis_within_gibbs(vae, x, S, (2, 5), draws=2, pseudo=5, seed=4)
    assert one.acceptance == other.acceptance == {2: 1.0, 5: 1.0}
    assert all(torch.equal(one.images[count], other.images[count]) for count in (2, 5))


def test_without_noise_what_is_hidden_is_the_mean(vae):
    x, S = pictures(vae), observed(vae)
    for state in itertools.islice(gibbs.chain(vae, x, S, 2, 10, noisy=False, seed=4), 3):
        assert torch.equal(state.x, torch.where(S.unsqueeze(-1), vae.tokenizer.encode(x), state.mean))


def test_a_start_takes_the_place_of_what_is_hidden(vae):
    x, S, start = pictures(vae), observed(vae), 1 - pictures(vae)
    state = next(gibbs.chain(vae, x, S, 2, start=start, seed=4))
    noise = torch.randn(2, N, 3, generator=gaussian.generator(torch.device("cpu"), 4), dtype=torch.float64)
    q = vae.encode(torch.where(pixels(vae, S), x, start))
    torch.testing.assert_close(state.z, q.sample(noise), rtol=1e-10, atol=1e-10)
    for same in (vae.tokenizer.encode(start), start.expand(2, -1, -1, -1, -1)):
        torch.testing.assert_close(next(gibbs.chain(vae, x, S, 2, start=same, seed=4)).z, state.z, rtol=0, atol=0)


def test_a_start_of_tokens_is_not_taken_for_an_image():
    torch.manual_seed(0)
    net = TwoStackViT(grid=(2, 2), token_dim=4, dim=8, depth=(1, 1), z_dim=3, heads=2)
    vae = BigLearnVAE(net, Patchify(4, 2, 1), prior="standard", variance=0.1)  # an image is (1, 4, 4), as its tokens
    x, start, S = torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), torch.tensor([True, False, False, True])
    tokens = vae.tokenizer.encode(start)[0]
    states = [next(gibbs.chain(vae, x, S, 1, start=same, seed=4)).z for same in (start, tokens)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_form_of_the_data_and_size_of_the_parts_do_not_matter(vae):
    x, S = pictures(vae), observed(vae)

    def run(x, S):
        return gibbs.metropolis_within_gibbs(vae, x, S, (4,), draws=3, pseudo=1, seed=5).images[4]

    expected = run(x, S)
    assert torch.equal(run(x, S), expected)
    for form in ((vae.tokenizer.encode(x), S), (x, pixels(vae, S).squeeze(1))):
        torch.testing.assert_close(run(*form), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(run(x[0], S[0]), run(x[:1], S[:1])[:, 0])
    vae.chunk = 2
    torch.testing.assert_close(run(x, S), expected, rtol=1e-10, atol=1e-10)


def test_the_network_takes_no_more_than_a_chunk(vae):
    sizes = []
    vae.net.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    vae.chunk = 4
    gibbs.metropolis_within_gibbs(vae, pictures(vae), observed(vae), (2,), draws=3, seed=0)
    assert max(sizes) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(iterations=()), "iterations"),
        (dict(iterations=(0, 3)), "iterations .*0, 3"),
        (dict(draws=0), "draws"),
        (dict(pseudo=-1), "pseudo"),
        (dict(variance=0.0), r"variance must be a number in \(0, inf\), got 0\.0"),
        (dict(variance=math.inf), "variance"),
        (dict(start=torch.full((N, 3, 4, 6), math.nan)), "finite"),
        (dict(start=torch.zeros(N + 1, 3, 4, 6)), "start for each"),
        (dict(start=torch.zeros(N, 6)), "start|images"),
        (dict(start=torch.zeros(N, 3, 4, 6).numpy()), "start must be a tensor, got ndarray: torch.as_tensor"),
        (dict(start=torch.full((N, 3, 4, 6), 255.0)), "from 255 to 255 where S says observed: divide"),
        (dict(iterations=3), "iterations must be a list of numbers from 1 on, at least one, got 3"),
        (dict(iterations=(1.5,)), r"iterations must be a list .*got \(1\.5,\)"),
        (dict(iterations="12"), "iterations must be a list .*got 12"),
        (dict(draws=1.5), r"draws must be a whole number, got 1\.5"),
        (dict(pseudo=None), "pseudo must be a whole number, got None"),
        (dict(variance="0.1"), r"variance must be a number in \(0, inf\), got '0\.1'"),
        (dict(seed=1.5), r"seed must be a whole number, got 1\.5"),
        (dict(seed=2**70), r"seed must be in \[-2\^63, 2\^64\)"),
    ],
)
def test_refusals(settings, message):
    tokenizer = Patchify((4, 6), 2, 3)
    vae = BigLearnVAE(TwoStackViT(grid=(2, 3), token_dim=12, dim=16, depth=(1, 1), z_dim=3), tokenizer, "standard")
    x = torch.rand(N, 3, 4, 6)
    with pytest.raises(ValueError, match=message):
        gibbs.metropolis_within_gibbs(vae, x, observed(vae), **settings)
    with pytest.raises(ValueError, match="finite values where S says observed"):
        gibbs.pseudo_gibbs(vae, x.index_fill(0, torch.tensor(1), math.nan), observed(vae))
    with pytest.raises(ValueError, match="divide those in"):
        gibbs.pseudo_gibbs(vae, 255 * x, observed(vae))
    with pytest.raises(ValueError, match=r"expected a BigLearnVAE.*got TwoStackViT"):
        gibbs.pseudo_gibbs(vae.net, x, observed(vae))


def test_states_far_outside_of_0_and_1_are_gone_on_with(vae):
    """x_hid is drawn from a Gaussian: pixels beyond any that would be taken as observed are no error."""
    x, S = pictures(vae), observed(vae)
    states = list(itertools.islice(gibbs.chain(vae, x, S, draws=3, variance=1e4, seed=0), 4))
    assert states[-1].x.abs().max() > 100
    assert gibbs.pseudo_gibbs(vae, x, S, (3,), variance=1e4, start=5 * x - 2, seed=0).images[3].isfinite().all()
