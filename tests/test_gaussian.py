import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close

from biglearn_vae import DiagGaussian, masks

EXACT = dict(rtol=1e-12, atol=1e-12)


def gaussian(seed: int, shape=(4, 6)) -> DiagGaussian:
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    return DiagGaussian(mean, 2 * logvar)


def reference(q: DiagGaussian) -> Independent:
    return Independent(Normal(q.mean, torch.exp(q.logvar / 2)), 1)


def test_moments():
    q = gaussian(0)
    assert_close(q.std, reference(q).stddev, **EXACT)
    assert_close(q.var, reference(q).variance, **EXACT)


def test_log_prob():
    q, z = gaussian(0), gaussian(1).mean
    assert_close(q.log_prob(z), reference(q).log_prob(z), **EXACT)
    draws = torch.stack([z, 3 * z, -z])  # a leading axis broadcasts
    assert_close(q.log_prob(draws), reference(q).log_prob(draws), **EXACT)


def test_kl():
    q, p = gaussian(0), gaussian(1)
    assert_close(q.kl(p), kl_divergence(reference(q), reference(p)), **EXACT)
    assert torch.equal(q.kl(q), torch.zeros(4, dtype=torch.float64))


def test_kl_without_other_is_to_the_standard_normal():
    q = gaussian(0)
    standard = DiagGaussian(torch.zeros_like(q.mean), torch.zeros_like(q.mean))
    assert_close(q.kl(), q.kl(standard), **EXACT)
    assert_close(q.kl(), kl_divergence(reference(q), reference(standard)), **EXACT)


def test_given_noise_is_used_exactly():
    q, noise = gaussian(0), gaussian(1).mean
    assert torch.equal(q.sample(noise), q.mean + q.std * noise)
    assert torch.equal(q.sample(torch.zeros_like(noise)), q.mean)


def test_sample_is_reparameterised():
    mean, logvar = gaussian(0).mean.requires_grad_(), gaussian(0).logvar.requires_grad_()
    noise = gaussian(1).mean
    DiagGaussian(mean, logvar).sample(noise).sum().backward()
    assert torch.equal(mean.grad, torch.ones_like(mean))
    assert_close(logvar.grad, 0.5 * torch.exp(0.5 * logvar.detach()) * noise, **EXACT)


def test_seed_repeats_and_leaves_the_global_generator_alone():
    q = gaussian(0)
    before = torch.get_rng_state()
    assert torch.equal(q.sample(seed=0), q.sample(seed=0))
    assert not torch.equal(q.sample(seed=0), q.sample(seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(q.sample(), q.sample())


def test_draws_add_a_leading_axis():
    q = gaussian(0)
    assert q.sample().shape == (4, 6)
    assert q.sample(draws=1).shape == (1, 4, 6)
    z = q.sample(draws=20_000, seed=0)
    assert z.shape == (20_000, 4, 6) and z.dtype == torch.float64
    standard = (z - q.mean) / q.std
    assert standard.mean(0).abs().max() < 5 / 20_000**0.5
    assert (standard.var(0) - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


def test_indexing():
    q = gaussian(0)
    chosen = torch.tensor([True, False, True, False])
    for index in (1, slice(1, 3), [2, 0], chosen, (slice(None), 2)):
        assert torch.equal(q[index].mean, q.mean[index])
        assert torch.equal(q[index].logvar, q.logvar[index])
    assert torch.equal(q[chosen].kl(), q.kl()[chosen])


def test_noise_of_another_shape_is_refused():
    q, noise = gaussian(0), gaussian(1).mean
    assert q.sample(torch.stack([noise, noise])).shape == (2, *noise.shape)
    for wrong in (noise[0], noise[:1], noise[:, :-1]):
        with pytest.raises(ValueError, match=r"noise must be a tensor \(4, .*\), or several of these, got"):
            q.sample(wrong)
    for also in (dict(draws=5), dict(seed=0)):
        with pytest.raises(ValueError, match="not both"):
            q.sample(noise, **also)


def test_noise_is_independent_of_the_masks_of_the_same_seed():
    """On a CPU, of one seed and without more ado, both would be functions of the same uniform numbers."""
    L = 16
    q = DiagGaussian(torch.zeros(L), torch.zeros(L))
    S = torch.stack([masks.random(1, L, 0.5, seed=seed)[0] for seed in range(5000)]).double()
    z = torch.stack([q.sample(seed=seed) for seed in range(5000)]).double()
    for moment in (z, z.square()):
        pairs = torch.corrcoef(torch.cat([S, moment], 1).T)[:L, L:]
        assert pairs.abs().max() < 5 / math.sqrt(5000)


def test_what_is_no_distribution_nor_noise_nor_code_of_it_is_refused():
    q = DiagGaussian(torch.zeros(4, 6), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"noise must be a tensor \(4, 6\), .* got int; draws=10 draws so many"):
        q.sample(10)
    with pytest.raises(ValueError, match="expected another DiagGaussian, got Normal"):
        q.kl(torch.distributions.Normal(0, 1))
    for z in (torch.zeros(4, 1), torch.zeros(4, 5), 0.0):
        with pytest.raises(ValueError, match=r"expected a tensor z \(\.\.\., 6\), got"):
            q.log_prob(z)
