import math

import pytest
import torch
from torch import distributed as dist
from torch.distributions import Normal, kl_divergence
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from biglearn_vae import (
    BigLearnELBO,
    DiagGaussian,
    MaskSampler,
    Optim,
    PatchAELoss,
    StepRandom,
    Trainer,
    UniversalViT,
    World,
)
from biglearn_vae.losses import InpaintingRegression

CLOSE = dict(rtol=1e-10, atol=1e-10)
BETA = 0.3


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (6, 6, 5) and noise (6, 3)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 6, 5, dtype=torch.float64, generator=generator)
    return x, torch.randn(6, 3, dtype=torch.float64, generator=generator)


def tasks() -> tuple[torch.Tensor, torch.Tensor]:
    """S and T of six images: joint, two marginal, three conditional (the first leaves nothing out)."""
    S, T = torch.zeros(2, 6, 6, dtype=torch.bool)
    T[0] = True
    T[1, 3] = T[2, [0, 1, 5]] = True
    S[3, [0, 2]] = T[3, [1, 3, 4, 5]] = True
    S[4, [5, 1, 2]] = T[4, [0, 4]] = True
    S[5, 3] = T[5, 0] = True
    return S, T


def by_hand(net, x, S, T, noise, prior="learned", variance=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 6 and 7 image by image and target by target: log p(x_T | z, x_S) in nats, and the KL."""
    likelihoods, divergences = [], []
    for i in range(len(x)):
        image, observed, both = x[i : i + 1], S[i : i + 1], (S | T)[i : i + 1]
        posterior = net(image, both)
        q = Normal(posterior.mean[0], torch.exp(0.5 * posterior.logvar[0]))
        if prior == "learned":
            p = Normal(net(image, observed).mean[0], torch.exp(0.5 * net(image, observed).logvar[0]))
        else:
            p = Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean))
        z = q.mean + q.stddev * noise[i]
        mean = net(image, observed, z.unsqueeze(0), T[i : i + 1])[0]
        likelihoods.append(sum(Normal(mean[j], variance**0.5).log_prob(x[i, j]).sum() for j in range(6) if T[i, j]))
        divergences.append(kl_divergence(q, p).sum())
    return torch.stack(likelihoods), torch.stack(divergences)


def gradients(net, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(net.parameters())))


def test_a_network_of_bfloat16_has_a_loss_of_more_digits():
    """Summed in bfloat16, numbers of thousands would come in steps of 16."""

    class Constant(torch.nn.Module):
        z_dim = 3

        def forward(self, x, S, z=None, T=None):
            if z is None:
                mean = 33 * S.to(x.dtype).mean(1, keepdim=True).expand(-1, 3)
                return DiagGaussian(mean, torch.zeros_like(mean))
            return torch.full_like(x, 0.5)

    x = torch.rand(2, 64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    S, T = torch.zeros(2, 64, dtype=torch.bool), torch.ones(2, 64, dtype=torch.bool)
    parts = BigLearnELBO(BETA)(Constant(), x, S, T, torch.zeros(2, 3).bfloat16())
    exact = -0.5 * (x.double() - 0.5).square().sum((1, 2)) - BETA * 1.5 * 33**2
    assert_close(parts.elbo.double(), exact, rtol=1e-6, atol=0)
    exact_nats = exact / BETA - 0.5 * 64 * 48 * math.log(2 * math.pi * BETA)
    assert_close(parts.elbo_nats.double(), exact_nats, rtol=1e-6, atol=0)


def test_a_network_may_have_an_attribute_that_wrappers_have(tiny_net):
    (x, noise), (S, T) = data(), tasks()
    expected = BigLearnELBO(BETA)(tiny_net, x, S, T, noise).loss
    tiny_net.module = torch.nn.Identity()
    assert BigLearnELBO(BETA)(tiny_net, x, S, T, noise).loss == expected


@pytest.mark.parametrize("loss", [BigLearnELBO(BETA), BigLearnELBO(BETA, prior="standard"), InpaintingRegression()])
def test_no_network_gets_to_see_what_it_is_to_predict(tiny_net, loss, monkeypatch):
    (x, noise), (S, T), calls = data(), tasks(), []
    forward = tiny_net.forward
    monkeypatch.setattr(tiny_net, "forward", lambda x, S, *more: calls.append((x, S)) or forward(x, S, *more))
    noise = {} if isinstance(loss, InpaintingRegression) else {"noise": noise}
    loss(tiny_net, torch.where((S | T).unsqueeze(-1), x, torch.nan), S, T, **noise)
    assert calls
    for given, seen in calls:
        tokens = x.repeat(len(given) // len(x), 1, 1)
        assert given.equal(torch.where(seen.unsqueeze(-1), tokens, 0))


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_all_parts_by_hand(tiny_net, prior):
    (x, noise), (S, T) = data(), tasks()
    parts = BigLearnELBO(BETA, prior=prior)(tiny_net, x, S, T, noise)
    log_likelihood, kl = by_hand(tiny_net, x, S, T, noise, prior)
    constant = 2.5 * math.log(2 * math.pi) * T.double().sum(-1)  # D / 2 = 2.5
    assert_close(parts.kl, kl, **CLOSE)
    assert_close(parts.reconstruction, log_likelihood + constant, **CLOSE)
    assert_close(parts.elbo, log_likelihood + constant - BETA * kl, **CLOSE)
    of_variance, _ = by_hand(tiny_net, x, S, T, noise, prior, variance=BETA)
    assert_close(parts.elbo_nats, of_variance - kl, **CLOSE)
    assert parts.num_targets.tolist() == [6, 1, 3, 4, 2, 1] and parts.token_dim == 5 and parts.beta == BETA


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_gradients_by_hand(tiny_net, prior):
    (x, noise), (S, T) = data(), tasks()
    loss = BigLearnELBO(BETA, prior=prior)(tiny_net, x, S, T, noise).loss
    log_likelihood, kl = by_hand(tiny_net, x, S, T, noise, prior)
    expected = gradients(tiny_net, -(log_likelihood - BETA * kl).mean())
    for found, reference in zip(gradients(tiny_net, loss), expected, strict=True):
        assert_close(found, reference, **CLOSE)


def normal(distribution) -> Normal:
    return Normal(distribution.mean, distribution.std)


def test_joint_elbo(tiny_net):
    """Eq. 1: E_{q(z|x)} log p(x|z) - KL[q(z|x) || p(z)], of N(mu, beta I)."""
    x, noise = data()
    everything = torch.ones(6, 6, dtype=torch.bool)
    q, prior = normal(tiny_net(x, everything)), normal(tiny_net(torch.zeros_like(x), ~everything))
    z = q.mean + q.stddev * noise
    log_likelihood = Normal(tiny_net(torch.zeros_like(x), ~everything, z), BETA**0.5).log_prob(x).sum((1, 2))
    expected = log_likelihood - kl_divergence(q, prior).sum(-1)
    assert_close(BigLearnELBO(BETA)(tiny_net, x, ~everything, everything, noise).elbo_nats, expected, **CLOSE)
    standard = log_likelihood - kl_divergence(q, Normal(0.0, 1.0)).sum(-1)  # the ordinary VAE
    vae = BigLearnELBO(BETA, prior="standard")(tiny_net, x, ~everything, everything, noise)
    assert_close(vae.elbo_nats, standard, **CLOSE)


def test_margin_elbo(tiny_net):
    """Eq. 4: E_{q(z|x_T)} log p(x_T|z) - KL[q(z|x_T) || p(z)], of N(mu, beta I)."""
    x, noise = data()
    targets = [1, 2, 5]
    T = torch.zeros(6, 6, dtype=torch.bool)
    T[:, targets] = True
    none = torch.zeros_like(T)
    x_T = torch.zeros_like(x)
    x_T[:, targets] = x[:, targets]
    q, prior = normal(tiny_net(x_T, T)), normal(tiny_net(torch.zeros_like(x), none))
    means = tiny_net(torch.zeros_like(x), none, q.mean + q.stddev * noise, T)[:, targets]
    log_likelihood = Normal(means, BETA**0.5).log_prob(x[:, targets]).sum((1, 2))
    expected = log_likelihood - kl_divergence(q, prior).sum(-1)
    assert_close(BigLearnELBO(BETA)(tiny_net, x, none, T, noise).elbo_nats, expected, **CLOSE)


def test_condition_elbo(tiny_net):
    """Eq. 5: E_{q(z|x_SuT)} log p(x_T|z, x_S) - KL[q(z|x_SuT) || p(z|x_S)], of N(mu, beta I)."""
    x, noise = data()
    observed, targets = [0, 4], [1, 2]
    S, T = torch.zeros(2, 6, 6, dtype=torch.bool)
    S[:, observed] = T[:, targets] = True
    x_S, x_ST = torch.zeros_like(x), torch.zeros_like(x)
    x_S[:, observed] = x[:, observed]
    x_ST[:, observed + targets] = x[:, observed + targets]
    q, prior = normal(tiny_net(x_ST, S | T)), normal(tiny_net(x_S, S))
    means = tiny_net(x_S, S, q.mean + q.stddev * noise, T)[:, targets]
    log_likelihood = Normal(means, BETA**0.5).log_prob(x[:, targets]).sum((1, 2))
    expected = log_likelihood - kl_divergence(q, prior).sum(-1)
    assert_close(BigLearnELBO(BETA)(tiny_net, x, S, T, noise).elbo_nats, expected, **CLOSE)


def test_nats_need_a_beta(tiny_net):
    parts = BigLearnELBO(0)(tiny_net, data()[0], *tasks(), data()[1])
    with pytest.raises(ValueError, match=r"^with beta = 0 there is no N\(mu, beta I\)"):
        _ = parts.elbo_nats


def test_loss_and_scalars_are_batch_means(tiny_net):
    parts = BigLearnELBO(BETA)(tiny_net, data()[0], *tasks(), data()[1])
    assert_close(parts.loss, -sum(parts.elbo) / 6, **CLOSE)
    expected = {
        "loss": -sum(parts.elbo) / 6,
        "elbo": sum(parts.elbo) / 6,
        "reconstruction": sum(parts.reconstruction) / 6,
        "kl": sum(parts.kl) / 6,
    }
    assert parts.scalars().keys() == expected.keys()
    for name, value in parts.scalars().items():
        assert_close(value, expected[name], **CLOSE)


def test_targets_reach_the_reconstruction_only_as_data_and_through_z(tiny_net):
    """d reconstruction / d x = -(x - mu) on T + (dz / dx) (d reconstruction / dz) on S u T + (d mu / d x_S) on S."""
    (x, noise), (S, T) = data(), tasks()
    x.requires_grad_()
    total = torch.autograd.grad(BigLearnELBO(BETA)(tiny_net, x, S, T, noise).reconstruction.sum(), x)[0]

    z = tiny_net(x, S | T).sample(noise)
    fixed = z.detach().requires_grad_()
    means = tiny_net(x, S, fixed, T)
    error = (x.detach() - means)[T]
    to_z, to_observed = torch.autograd.grad(-0.5 * error.square().sum(), (fixed, x))
    through_z = torch.autograd.grad(z, x, to_z)[0]
    assert not to_observed[T].any() and not through_z[~(S | T)].any()
    direct = torch.where(T.unsqueeze(-1), means.detach() - x.detach(), 0)
    assert_close(total, direct + through_z + to_observed, **CLOSE)


@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e6])
def test_tokens_outside_s_and_t_have_no_influence(tiny_net, junk, prior):
    (x, noise), (S, T) = data(), tasks()
    assert (~(S | T)).any()
    objective = BigLearnELBO(BETA, prior=prior)
    clean, dirty = (
        objective(tiny_net, tokens, S, T, noise) for tokens in (x, x.masked_fill(~(S | T).unsqueeze(-1), junk))
    )
    assert torch.equal(clean.reconstruction, dirty.reconstruction) and torch.equal(clean.kl, dirty.kl)
    for a, b in zip(gradients(tiny_net, clean.loss), gradients(tiny_net, dirty.loss), strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


def test_warm_up_weights():
    ramp = BigLearnELBO(0.8, beta_warmup_steps=4, beta_warmup_start=0.25)
    assert [ramp.weight(step) for step in range(4)] == pytest.approx([0.2, 0.35, 0.5, 0.65], abs=1e-15)
    assert ramp.weight(4) == ramp.weight(5) == ramp.weight(10**9) == ramp.weight(None) == 0.8
    for step in (0, 3, 4, 9):  # as a tensor, in a CUDA graph
        assert ramp.weight(torch.tensor(float(step))).item() == pytest.approx(ramp.weight(step), rel=1e-6)
    assert BigLearnELBO(0.8, beta_warmup_steps=4).weight(0) == 0
    assert BigLearnELBO(0.8, beta_warmup_steps=4, beta_warmup_start=1.0).weight(1) == 0.8
    assert BigLearnELBO(0.8).weight(0) == BigLearnELBO(0.8).weight(None) == 0.8


def test_step_weighs_the_kl_and_nothing_else(tiny_net):
    (x, noise), (S, T) = data(), tasks()
    objective = BigLearnELBO(0.8, beta_warmup_steps=4, beta_warmup_start=0.25)
    final = objective(tiny_net, x, S, T, noise)
    for step, beta in [(0, 0.2), (1, 0.35), (4, 0.8)]:
        parts = objective(tiny_net, x, S, T, noise, step=step)
        assert torch.equal(parts.reconstruction, final.reconstruction) and torch.equal(parts.kl, final.kl)
        assert_close(parts.elbo, final.reconstruction - beta * final.kl, **CLOSE)


def test_random_repeats_by_seed_and_step(tiny_net):
    x, _ = data()
    objective = BigLearnELBO(BETA, MaskSampler(joint=0.2))

    def draw(seed, step):
        return objective(tiny_net, x, random=StepRandom.at(seed, step, World()))

    first, again = draw(0, 3), draw(0, 3)
    assert torch.equal(first.elbo, again.elbo) and torch.equal(first.num_targets, again.num_targets)
    for other in (draw(0, 4), draw(1, 3)):
        assert not torch.isclose(first.elbo, other.elbo).any()


def test_random_draws_masks_then_noise(tiny_net):
    x, _ = data()
    sampler = MaskSampler((2, 1), (1, 2), joint=0.2)
    objective = BigLearnELBO(BETA, sampler)
    parts = objective(tiny_net, x, random=StepRandom.at(0, 3, World()))
    random = StepRandom.at(0, 3, World())
    S, T = sampler(6, 6, random.generator)
    noise = random.normal((6, 3), torch.float64)
    assert torch.equal(parts.elbo, objective(tiny_net, x, S, T, noise).elbo)


class Stripes(MaskSampler):
    """Every other token of all images, from the first or the second on."""

    def __call__(self, batch_size, num_tokens, generator):
        first = torch.randint(2, (batch_size, 1), generator=generator, device=generator.device)
        S = (torch.arange(num_tokens, device=generator.device) + first) % 2 == 0
        return S, ~S


def test_masks_that_are_not_two(tiny_net):
    for masks, got in (
        (lambda rows, count, generator: torch.ones(rows, count) > 0, "torch.bool"),
        (lambda *_: (), "0"),
    ):
        with pytest.raises(ValueError, match=rf"expected masks to draw two, \(S, T\), got {got}"):
            BigLearnELBO(BETA, masks)(tiny_net, data()[0], random=StepRandom.at(0, 3, World()))


@pytest.mark.parametrize("objective", [lambda masks: BigLearnELBO(BETA, masks), InpaintingRegression])
@pytest.mark.parametrize("masks", [Stripes(), Stripes().__call__], ids=["subclass", "function"])
def test_masks_may_be_drawn_by_any_function(tiny_net, objective, masks):
    x, _ = data()
    found = objective(masks)(tiny_net, x, random=StepRandom.at(0, 3, World()))
    random = StepRandom.at(0, 3, World())
    S, T = masks(6, 6, random.generator)
    assert S.sum() == 18 and len(S.unique(dim=0)) == 2
    expected = objective(None)(tiny_net, x, S, T, random=random)
    assert torch.equal(found.elbo, expected.elbo) and torch.equal(found.num_targets, T.sum(-1))
    # Each process draws for all and takes its rows.
    rows = [objective(masks)(tiny_net, x[k : k + 3], random=StepRandom.at(0, 3, World(k // 3, 2))) for k in (0, 3)]
    assert torch.equal(torch.cat([row.num_targets for row in rows]), found.num_targets)
    recorded = torch.ones(6, 6, dtype=torch.bool)
    recorded[:, :2] = False
    part = objective(masks)(tiny_net, (x, recorded), random=StepRandom.at(0, 3, World()))
    assert torch.equal(part.num_targets, (T & recorded).sum(-1))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda rows, tokens, generator: (torch.ones(rows, tokens), torch.zeros(rows, tokens)), "a boolean mask S"),
        (lambda rows, tokens, generator: [torch.ones(rows, tokens).bool()] * 2, "S and T must be disjoint"),
        (lambda rows, tokens, generator: [torch.zeros(rows, tokens).bool()] * 2, "6 images without T"),
    ],
)
def test_masks_of_a_function_are_checked(tiny_net, masks, message):
    with pytest.raises(ValueError, match=message):
        BigLearnELBO(BETA, masks)(tiny_net, data()[0], random=StepRandom.at(0, 0, World()))


def test_what_is_given_is_not_drawn(tiny_net):
    (x, noise), (S, T) = data(), tasks()
    objective = BigLearnELBO(BETA)
    given = objective(tiny_net, x, S, T, noise)
    both = objective(tiny_net, x, S, T, noise, random=StepRandom.at(0, 0, World()))
    assert torch.equal(both.elbo, given.elbo)
    drawn = StepRandom.at(0, 0, World()).normal((6, 3), torch.float64)
    masks_given = objective(tiny_net, x, S, T, random=StepRandom.at(0, 0, World()))
    assert torch.equal(masks_given.elbo, objective(tiny_net, x, S, T, drawn).elbo)


@pytest.mark.parametrize("given", ["S", "T"])
def test_one_mask_without_the_other_is_refused(tiny_net, given):
    # Drawing both would drop the given one in silence.
    mask = dict(zip("ST", tasks(), strict=True))[given]
    with pytest.raises(ValueError, match="S and T"):
        BigLearnELBO(BETA)(tiny_net, data()[0], **{given: mask}, random=StepRandom.at(0, 0, World()))


@pytest.mark.parametrize("missing", ["S", "T", "noise"])
def test_missing_random_is_named(tiny_net, missing):
    (x, noise), (S, T) = data(), tasks()
    given = {name: value for name, value in dict(S=S, T=T, noise=noise).items() if name != missing}
    with pytest.raises(ValueError, match=r"S, T and noise, or random"):
        BigLearnELBO(BETA)(tiny_net, x, **given)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(beta=-0.1), r"beta .*-0\.1"),
        (dict(beta=float("nan")), "beta .*nan"),
        (dict(beta=float("inf")), "beta .*inf"),
        (dict(beta=1, prior="normal"), "prior must be learned or standard, got 'normal'"),
        (dict(beta=1, beta_warmup_steps=-1), "beta_warmup_steps .*-1"),
        (dict(beta=1, beta_warmup_start=-0.5), r"beta_warmup_start .*-0\.5"),
        (dict(beta=1, beta_warmup_start=1.5), r"beta_warmup_start .*1\.5"),
        (dict(beta="0.1"), r"beta must be a number in \[0, inf\), got '0\.1'"),
        (dict(beta=None), "beta .*None"),
        (dict(beta=1, beta_warmup_steps=2.5), r"beta_warmup_steps must be a whole number, got 2\.5"),
        (dict(beta=1, beta_warmup_start="half"), "beta_warmup_start .*half"),
        (dict(beta=1, masks=MaskSampler), "masks must be a MaskSampler, .*class"),
        (dict(beta=1, masks=(1, 2)), r"masks must be a MaskSampler, .*\(1, 2\)"),
    ],
)
def test_objective_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        BigLearnELBO(**settings)


MISUSE = {  # of either loss, as arguments that replace the right ones
    "tokens as an array": (dict(x=data()[0].numpy()), r"tokens \(B, L, D\), got ndarray.*torch.as_tensor"),
    "tokens as lists": (dict(x=data()[0].tolist()), r"tokens \(B, L, D\), got list"),
    "images": (dict(x=torch.zeros(6, 1, 8, 8)), r"tokens \(B, L, D\), got .*\(6, 1, 8, 8\); `Patchify`"),
    "whole numbers": (dict(x=data()[0].long()), "floating-point tokens.*got torch.int64"),
    "no pair": (dict(x=(data()[0],)), r"tokens \(B, L, D\), got tuple"),
    "what was recorded as an array": (dict(x=(data()[0], tasks()[0].numpy())), "what was recorded.*got ndarray"),
    "S as an array": (dict(S=tasks()[0].numpy()), r"boolean mask S of shape \(6, 6\), got ndarray"),
    "T as lists": (dict(T=tasks()[1].tolist()), r"boolean mask T of shape \(6, 6\), got list"),
    "S of numbers": (dict(S=tasks()[0].float()), r"boolean mask S of shape \(6, 6\), got torch.float32"),
    "T too short": (dict(T=tasks()[1][:, :5]), r"boolean mask T of shape \(6, 6\), got torch.bool \(6, 5\)"),
    "T of another batch": (dict(T=tasks()[1][:3]), r"boolean mask T of shape \(6, 6\), got torch.bool \(3, 6\)"),
    "S in T": (dict(T=tasks()[0] | tasks()[1]), "disjoint.*got 6 tokens in both and 0 images without T: T & ~S"),
    "S is T": (dict(S=tasks()[1]), "disjoint.*got 17 tokens in both"),
    "no T": (dict(T=tasks()[1] & False), "got 0 tokens in both and 6 images without T"),
    "an image without T": (dict(T=tasks()[1].index_fill(0, torch.tensor(2), False)), "and 1 images without T"),
    "a generator": (dict(random=torch.Generator()), r"random must be a StepRandom, such as .*got Generator"),
    "a seed": (dict(random=0), "random must be a StepRandom.*got int"),
    "no network": (dict(net="model.pt"), r"network such as UniversalViT \(of a BigLearnVAE its .net\), got str"),
}


@pytest.mark.parametrize("loss", [BigLearnELBO(BETA), InpaintingRegression()], ids=["ELBO", "regression"])
@pytest.mark.parametrize(("changed", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_named(tiny_net, loss, changed, message):
    (x, noise), (S, T) = data(), tasks()
    arguments = dict(net=tiny_net, x=x, S=S, T=T) | (dict(noise=noise) if isinstance(loss, BigLearnELBO) else {})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        loss(**arguments | changed)


@pytest.mark.parametrize("wrong", [0, data()[1].numpy(), data()[1][:, :2], data()[1].expand(2, 6, 3)])
def test_wrong_noise_is_named(tiny_net, wrong):
    with pytest.raises(ValueError, match=r"noise, a tensor of standard normal numbers of shape \(6, 3\), got"):
        BigLearnELBO(BETA)(tiny_net, data()[0], *tasks(), wrong)


@pytest.mark.parametrize("loss", [BigLearnELBO(BETA), InpaintingRegression()], ids=["ELBO", "regression"])
def test_training_does_not_wait_for_what_masks_hold(loss, monkeypatch):
    """Neither where they are drawn, nor with a step, nor in a compiled graph, which the question would break."""
    net = UniversalViT(grid=(2, 3), token_dim=5, dim=16, depth=1, z_dim=3).double()
    (x, noise), (S, T) = data(), tasks()
    given = dict(noise=noise) if isinstance(loss, BigLearnELBO) else {}
    expected = loss(net, x, S, T, **given).loss

    def wait(_):
        raise AssertionError("a value was asked for")

    random = StepRandom.at(0, 0, World())
    monkeypatch.setattr(torch.Tensor, "__bool__", wait)
    found = loss(net, x, S, T, **given, step=0).loss
    loss(net, x, random=random, step=0)
    loss(net, x, random=random)
    with pytest.raises(AssertionError, match="asked for"):
        loss(net, x, S, T, **given)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    loss(net, x, S, T, **given)
    monkeypatch.undo()
    assert torch.equal(found, expected)


def test_masks_for_all_images_and_images_of_which_nothing_was_recorded(tiny_net):
    (x, noise), (S, T) = data(), tasks()
    objective = BigLearnELBO(BETA)
    for one in (lambda mask: mask[4], lambda mask: mask[4:5]):
        found = objective(tiny_net, x, one(S), one(T), noise)
        assert torch.equal(found.elbo, objective(tiny_net, x, S[4].expand(6, 6), T[4].expand(6, 6), noise).elbo)
    recorded = unrecorded()
    S, T = MaskSampler()(6, 6, torch.Generator().manual_seed(0), recorded)
    assert not T[-1].any()
    assert objective(tiny_net, (x, recorded), S, T, noise).elbo.isfinite().all()


# --- data that is incomplete itself ---


def unrecorded() -> torch.Tensor:
    """What was recorded of six images of six tokens: everything of the first, nothing of the last."""
    recorded = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) < 0.5
    recorded[0], recorded[-1] = True, False
    return recorded


@pytest.mark.parametrize("given", [False, True])
def test_what_was_not_recorded_is_in_no_task(tiny_net, given):
    (x, noise), recorded = data(), unrecorded()
    S, T = tasks() if given else (None, None)
    objective = BigLearnELBO(BETA, MaskSampler(joint=0.3))
    results = []
    for junk in (torch.nan, 0.0, 1e30):
        spoilt = x.masked_fill(~recorded.unsqueeze(-1), junk)
        random = StepRandom(torch.Generator().manual_seed(1))
        parts = objective(tiny_net, (spoilt, recorded), S, T, noise if given else None, random=random)
        results.append([parts.loss, parts.kl, parts.reconstruction, *gradients(tiny_net, parts.loss)])
        assert (parts.num_targets <= recorded.sum(-1)).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert all(part.isfinite().all() for part in results[0])


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_an_image_of_which_nothing_was_recorded_teaches_nothing(tiny_net, prior):
    (x, noise), (S, T) = data(), tasks()
    x[[0, 4]] = torch.nan
    parts = BigLearnELBO(BETA, prior=prior)(tiny_net, x, S, T, noise)
    assert_close(parts.elbo[[0, 4]], torch.zeros(2, dtype=torch.float64), **CLOSE)
    assert all(g.abs().max() < 1e-12 for g in gradients(tiny_net, parts.elbo[[0, 4]].sum()))
    assert (parts.kl[[1, 2, 3, 5]] > 0).all()


def test_nan_and_a_mask_say_the_same(tiny_net):
    (x, _), recorded = data(), unrecorded()
    with_nan = x.clone()
    with_nan[..., 2][~recorded] = torch.nan  # one number of a token is enough
    objective = BigLearnELBO(BETA, MaskSampler())
    a, b = (
        objective(tiny_net, batch, random=StepRandom(torch.Generator().manual_seed(1)))
        for batch in (with_nan, (x, recorded))
    )
    assert torch.equal(a.elbo, b.elbo) and torch.equal(a.num_targets, b.num_targets)


def test_an_image_of_which_nothing_was_recorded_counts_for_nothing(tiny_net):
    (x, noise), recorded = data(), unrecorded()
    nothing, everything = torch.zeros(2, 6, 6, dtype=torch.bool)
    parts = BigLearnELBO(BETA)(tiny_net, (x, recorded), nothing, ~everything, noise)
    assert parts.elbo[-1] == 0 and parts.num_targets[-1] == 0
    assert (parts.elbo[:-1] != 0).all()


def test_recorded_tokens_alone_are_a_margin_elbo(tiny_net):
    (x, noise), recorded = data(), unrecorded()
    recorded[-1, 0] = True  # T is to hold something of each image
    nothing = torch.zeros(6, 6, dtype=torch.bool)
    incomplete = BigLearnELBO(BETA)(tiny_net, (x, recorded), nothing, ~nothing, noise)
    margin = BigLearnELBO(BETA)(tiny_net, x, nothing, recorded, noise)
    assert torch.equal(incomplete.elbo, margin.elbo)


def test_the_draws_of_a_process_do_not_depend_on_what_others_recorded(tiny_net):
    (x, _), recorded = data(), unrecorded()
    objective = BigLearnELBO(BETA, MaskSampler())
    whole = objective(tiny_net, (x, recorded), random=StepRandom.at(0, 0, World()))
    halves = [
        objective(tiny_net, (x[rows], recorded[rows]), random=StepRandom.at(0, 0, World(rank, 2)))
        for rank, rows in enumerate((slice(0, 3), slice(3, 6)))
    ]
    assert torch.equal(torch.cat([half.num_targets for half in halves]), whole.num_targets)
    assert_close(torch.cat([half.elbo for half in halves]), whole.elbo, **CLOSE)


@pytest.mark.parametrize("recorded", [torch.ones(6, 6), torch.ones(6, 5, dtype=torch.bool)])
def test_a_mask_of_another_kind_is_refused(tiny_net, recorded):
    with pytest.raises(ValueError, match="boolean mask of what was recorded"):
        BigLearnELBO(BETA)(tiny_net, (data()[0], recorded), *tasks(), data()[1])


def test_gradients_in_bfloat16_are_near_those_in_float32():
    """Half of the digits of a float are gone, so 5 % of the gradient's length; its direction is kept."""
    torch.manual_seed(0)
    net = UniversalViT(grid=(2, 3), token_dim=5, dim=32, depth=3, z_dim=3, heads=2)
    x, noise = (part.float() for part in data())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            parts = BigLearnELBO(BETA)(net, x, *tasks(), noise)
        assert parts.kl.dtype == parts.reconstruction.dtype == torch.float32
        results.append((parts.loss, torch.cat([g.flatten() for g in gradients(net, parts.loss)])))
    (loss, exact), (low_loss, low) = results
    assert low_loss != loss  # it was in effect
    assert_close(low_loss, loss, rtol=0.02, atol=0)
    assert (low - exact).norm() < 0.05 * exact.norm()


# --- the regressor without a latent ---


def zero_code(net):
    """The network with p(z | x_S) = N(0, I), whatever is observed."""
    with torch.no_grad():
        net.latent_out[-1].weight.zero_()
        net.latent_out[-1].bias.zero_()
    return net


@pytest.mark.parametrize("given", [False, True])
def test_regression_is_the_reconstruction_at_z_0(tiny_net, given):
    (x, _), recorded = data(), unrecorded()
    S, T = tasks() if given else (None, None)
    sampler, none = MaskSampler((2, 1), (1, 2), joint=0.2), torch.zeros(6, 3, dtype=torch.float64)
    for batch in (x, (x, recorded), x.masked_fill(~recorded.unsqueeze(-1), torch.nan)):
        random = [StepRandom.at(0, 3, World()) for _ in range(2)]
        parts = InpaintingRegression(sampler)(tiny_net, batch, S, T, random=random[0], step=7)
        expected = BigLearnELBO(BETA, sampler)(zero_code(tiny_net), batch, S, T, none, random=random[1])
        assert torch.equal(parts.reconstruction, expected.reconstruction)
        assert torch.equal(parts.elbo, expected.reconstruction) and not parts.kl.any()
        assert torch.equal(parts.num_targets, expected.num_targets) and parts.token_dim == expected.token_dim
        assert parts.scalars().keys() == expected.scalars().keys()


def test_regression_by_hand(tiny_net):
    (x, _), (S, T) = data(), tasks()
    mean = tiny_net(x, S, torch.zeros(6, 3, dtype=torch.float64), T)
    errors = torch.stack([0.5 * (x - mean)[i][T[i]].square().sum() for i in range(6)])
    assert_close(InpaintingRegression()(tiny_net, x, S, T).loss, errors.mean(), **CLOSE)


def test_regression_has_no_gradient_in_what_encodes(tiny_net):
    """Nor does freezing that change what is left."""
    x, (S, T) = data()[0], tasks()
    objective, parameters = InpaintingRegression(), dict(tiny_net.named_parameters())
    objective(tiny_net, x, S, T).loss.backward()
    before = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    tiny_net.zero_grad()
    objective.freeze(tiny_net)
    objective(tiny_net, x, S, T).loss.backward()
    assert before.keys() == {name for name, p in parameters.items() if p.requires_grad}
    assert all(torch.equal(parameters[name].grad, gradient) for name, gradient in before.items())
    assert {"latent_mask", "latent_out.0.weight", "latent_norm.weight"} & before.keys() == set()
    assert {"latent_in.0.bias", "token_mask", "token_out.0.weight"} <= before.keys()


def test_regression_of_a_wrapped_network(tiny_net, tmp_path):
    x, objective = data()[0], InpaintingRegression()
    expected = gradients_of_steps(tiny_net, objective, x)
    objective.freeze(tiny_net)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        found = gradients_of_steps(DistributedDataParallel(tiny_net), objective, x)
    finally:
        dist.destroy_process_group()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def gradients_of_steps(net, objective, x: torch.Tensor) -> list[torch.Tensor]:
    """Two steps: it is the second at which one that waits for gradients would notice that some do not come."""
    for step in range(2):
        net.zero_grad()
        objective(net, x, random=StepRandom.at(0, step, World())).loss.backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


class Batch:
    batch_size = 6

    def __call__(self, step: int) -> torch.Tensor:
        return data()[0].sigmoid()


def test_the_trainer_takes_the_regression(tiny_net):
    before = {name: p.detach().clone() for name, p in tiny_net.named_parameters()}
    S, T = tasks()
    first = InpaintingRegression()(tiny_net, Batch()(0), S, T).loss.item()
    trainer = Trainer(tiny_net, InpaintingRegression(), Batch(), Optim(lr=0.01), steps=40, precision="float32")
    trainer.fit()
    assert InpaintingRegression()(tiny_net, Batch()(0), S, T).loss.item() < 0.5 * first
    for name, p in tiny_net.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(("latent_mask", "latent_out", "latent_norm", "encoder"))


def test_regression_refuses(tiny_net):
    (x, _), (S, T) = data(), tasks()
    with pytest.raises(ValueError, match="S and T, or random"):
        InpaintingRegression()(tiny_net, x)
    for given in (dict(S=S), dict(T=T)):
        with pytest.raises(ValueError, match="both S and T"):
            InpaintingRegression()(tiny_net, x, **given)


# --- the loss of a PatchAE ---


@pytest.mark.parametrize("settings", [dict(share="all"), dict(share=None), dict(border_weight="2")])
def test_patch_loss_refuses_what_is_no_number(settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        PatchAELoss(**settings)


@pytest.mark.parametrize(
    "patches", [torch.zeros(2, 16, 4), torch.zeros(2, 1, 8, 8), torch.zeros(2, 4, 1, 2, 2).numpy()]
)
def test_patch_loss_wants_patches(patches):
    with pytest.raises(ValueError, match=r"patches \(B, L, C, P, P\), got .*; `Patchify.cut`"):
        PatchAELoss()(torch.nn.Identity(), patches, random=StepRandom(torch.Generator()))
