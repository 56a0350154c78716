import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from biglearn_vae import (
    BigLearnELBO,
    BigLearnVAE,
    ImageSet,
    MaskSampler,
    Patchify,
    UniversalViT,
    data,
    evaluation,
    masks,
    probe,
)
from biglearn_vae.distributed import StepRandom, derive_seed
from biglearn_vae.losses import has_model

N, Z = 6, 3


def make(channels: int = 1, size=8) -> BigLearnVAE:
    tokenizer = Patchify(size, 2, channels)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=2, z_dim=Z, heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return BigLearnVAE(net, tokenizer)


@pytest.fixture(params=["grey", "colour"])
def vae(request) -> BigLearnVAE:
    return make() if request.param == "grey" else make(3, (4, 6))


def pictures(vae: BigLearnVAE, count: int = N, seed: int = 0) -> Tensor:
    return torch.rand(count, *vae.image_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def direct_elbo(vae, x: Tensor, S: Tensor, T: Tensor, noise: Tensor, beta: float, prior: str) -> dict[str, float]:
    """Eq. 6 from the network's outputs, image by image, with torch's own distributions."""
    q, p, rows = vae.net(x, S | T), vae.net(x, S), []
    means = vae.net(x, S, q.mean + q.std * noise)
    for n in range(len(x)):
        target = x[n][T[n]].double()
        likelihood, nats = (Normal(means[n][T[n]].double(), std).log_prob(target).sum() for std in (1.0, beta**0.5))
        constant = -0.5 * target.numel() * math.log(2 * math.pi)
        other = Normal(p.mean[n], p.std[n]) if prior == "learned" else Normal(torch.zeros(Z), torch.ones(Z))
        kl = kl_divergence(Normal(q.mean[n], q.std[n]), other).sum()
        rows.append((likelihood - constant - beta * kl, likelihood - constant, kl, nats - kl))
    values = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(zip(("elbo", "reconstruction", "kl", "elbo_nats"), values, strict=True))


@pytest.mark.parametrize("prior", ["learned", "standard"])
def test_joint_elbo(vae, prior):
    x = pictures(vae)
    tokens = vae.tokenizer.encode(x)
    nothing = torch.zeros(N, vae.num_tokens, dtype=torch.bool)
    noise = torch.randn(N, Z, generator=torch.Generator().manual_seed(4))
    expected = direct_elbo(vae, tokens, nothing, ~nothing, noise, 0.37, prior)
    # The warm-up and q(S, T) have no say in the final joint number.
    loss = BigLearnELBO(0.37, MaskSampler((5, 1), (1, 5)), prior, beta_warmup_steps=1000)
    if prior != vae.prior:
        with pytest.raises(ValueError, match="the loss has the standard prior, the model the learned one"):
            evaluation.elbo(vae, x, loss)
    vae = BigLearnVAE(vae.net, vae.tokenizer, prior=prior)
    assert evaluation.elbo(vae, x, loss, seed=4) == pytest.approx(expected, rel=1e-5)


def test_elbo_of_sampled_tasks(vae):
    x, sampler = pictures(vae), MaskSampler((2, 1), (1, 1))
    generator = torch.Generator().manual_seed(4)
    S, T = sampler(N, vae.num_tokens, generator)
    noise = torch.randn(N, Z, generator=generator)
    assert S.any() and not (S | T).all()
    expected = direct_elbo(vae, vae.tokenizer.encode(x), S, T, noise, 0.37, "learned")
    assert evaluation.elbo(vae, x, BigLearnELBO(0.37, sampler), joint=False, seed=4) == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("joint", [True, False])
def test_elbo_repeats_for_a_seed(vae, joint):
    x, loss = pictures(vae), BigLearnELBO(0.1)
    numbers = [evaluation.elbo(vae, x, loss, joint, seed) for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1]
    assert numbers[0]["elbo"] != numbers[2]["elbo"]
    torch.manual_seed(99)
    assert evaluation.elbo(vae, x, loss, joint) == numbers[0]


def test_elbo_of_sampled_tasks_does_not_share_their_ratios(vae):
    """As the batches of such a training do; of one pair of ratios for all images it would be a single task."""
    x = pictures(vae)
    alone, shared = (BigLearnELBO(0.1, MaskSampler(ratios_per=per)) for per in ("sample", "step"))
    assert evaluation.elbo(vae, x, shared, joint=False) == evaluation.elbo(vae, x, alone, joint=False)
    assert shared.masks.ratios_per == "step"


def test_elbo_is_a_mean_over_images_whatever_the_chunks(vae, monkeypatch):
    x, loss = pictures(vae, 7), BigLearnELBO(0.1)
    expected = evaluation.elbo(vae, x, loss)["kl"]  # the one part of the joint ELBO that depends on no noise
    monkeypatch.setattr(data, "CHUNK", 3)
    assert evaluation.elbo(vae, x, loss)["kl"] == pytest.approx(expected, rel=1e-6)


def test_elbo_beta_weighs_the_kl_alone(vae):
    x = pictures(vae)
    one, other = (evaluation.elbo(vae, x, BigLearnELBO(beta)) for beta in (0.0, 2.0))
    assert one["elbo"] == one["reconstruction"] == other["reconstruction"] and one["kl"] == other["kl"] > 0
    assert other["elbo"] == pytest.approx(other["reconstruction"] - 2 * other["kl"], rel=1e-6)


# --- masks ---


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 64])
def test_hidden_masks_hide_at_least_one_patch(num_tokens):
    ratios = [0.0, 0.3, 0.5, 0.9, 0.999]
    result = evaluation.hidden_masks(50, (1, num_tokens), ratios)
    assert list(result) == ratios
    for ratio, S in result.items():
        assert S.shape == (50, num_tokens) and S.dtype == torch.bool
        assert (S.sum(-1) == min(round(ratio * num_tokens), num_tokens - 1)).all()
    assert not result[0.0].any()


@pytest.mark.parametrize("task", [1, 1.5, -0.1, "foo"])
def test_tasks_that_are_none(vae, task):
    with pytest.raises(ValueError, match=r"expected shares in \[0, 1\), .* or some of centre, top, left"):
        evaluation.inpainting_psnr(vae, pictures(vae), [0.5, task])
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluation.inpainting_psnr(vae, pictures(vae), [0.5], draws=0)


def test_hidden_masks_depend_on_the_seed_alone():
    one, same, other = (evaluation.hidden_masks(20, (4, 4), [0.25, 0.75], seed) for seed in (0, 0, 1))
    for ratio in one:
        assert torch.equal(one[ratio], same[ratio]) and not torch.equal(one[ratio], other[ratio])
        assert len(set(map(tuple, one[ratio].tolist()))) > 1  # a mask of its own for each image


def test_pixel_masks_are_those_of_the_patches(vae):
    S = masks.random(N, vae.num_tokens, 0.5, seed=0)
    pixels = vae.pixel_mask(S)
    assert pixels.dtype == torch.bool and pixels.shape == (N, 1, *vae.image_shape[1:])
    assert torch.equal(masks.from_pixels(pixels[:, 0], vae.grid), S)
    assert torch.equal(~masks.from_pixels(~pixels[:, 0], vae.grid), S)  # no patch is seen in part
    tokens = vae.tokenizer.encode(pixels.expand(-1, vae.image_shape[0], -1, -1))
    assert torch.equal(tokens, S.unsqueeze(-1).expand_as(tokens))


# --- PSNR ---


def slow_psnr(completed: Tensor, images: Tensor, observed: Tensor) -> float:
    errors = [
        (completed[n, c, i, j].item() - images[n, c, i, j].item()) ** 2
        for n in range(images.shape[0])
        for c in range(images.shape[1])
        for i in range(images.shape[2])
        for j in range(images.shape[3])
        if not observed[n, 0, i, j]
    ]
    return 10 * math.log10(1 / (sum(errors) / len(errors)))


def test_psnr_is_over_hidden_pixels(vae):
    completed, images = pictures(vae, seed=1), pictures(vae, seed=2)
    observed = torch.rand(N, 1, *vae.image_shape[1:], generator=torch.Generator().manual_seed(0)) < 0.6
    value = evaluation.psnr(completed, images, ~observed)
    assert value == pytest.approx(slow_psnr(completed, images, observed), rel=1e-6)
    elsewhere = torch.where(observed, completed + 7, completed)
    assert evaluation.psnr(elsewhere, images, ~observed) == value


def test_psnr_of_a_known_error():
    images = torch.full((2, 3, 4, 4), 0.25)
    everything = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    assert evaluation.psnr(images + 0.5, images, everything) == pytest.approx(10 * math.log10(4))
    assert evaluation.psnr(images + 1, images, everything) == 0


def test_psnr_of_no_error_is_infinite(vae):
    x = pictures(vae)
    assert evaluation.psnr(x, x, torch.ones(N, 1, *vae.image_shape[1:], dtype=torch.bool)) == math.inf


class Recorder(BigLearnVAE):
    """Keeps what it is asked and what it answers."""

    def inpaint(self, x, S, draws=None, seed=None):
        result = super().inpaint(x, S, draws, seed)
        self.kept.append((S, result if draws is not None else result.unsqueeze(0)))
        return result


@pytest.mark.parametrize("draws", [1, 5])
def test_inpainting_psnr_is_that_of_the_mean_completion(vae, draws):
    recorder = Recorder(vae.net, vae.tokenizer)
    recorder.kept = []
    x, ratios = pictures(vae), [0.0, 0.5, 0.99]
    result = evaluation.inpainting_psnr(recorder, x, ratios, draws=draws, seed=3)
    assert list(result) == ratios
    for ratio, S in evaluation.hidden_masks(N, vae.grid, ratios, seed=3).items():
        completions = torch.cat([answer for asked, answer in recorder.kept if torch.equal(asked, S)])
        assert len(completions) == draws
        assert len({tuple(completion.flatten().tolist()) for completion in completions}) == draws
        observed = vae.tokenizer.decode(S.unsqueeze(-1).expand(-1, -1, vae.tokenizer.token_dim).float())[:, :1].bool()
        expected = slow_psnr(completions.double().mean(0), x, observed)
        assert result[ratio] == pytest.approx(expected, rel=1e-5)


def test_inpainting_psnr_of_one_draw_is_that_of_inpaint(vae):
    x = pictures(vae)
    S = evaluation.hidden_masks(N, vae.grid, [0.5], seed=3)[0.5]
    expected = evaluation.psnr(vae.inpaint(x, S, seed=3), x, vae.pixel_mask(~S))
    assert evaluation.inpainting_psnr(vae, x, [0.5], draws=1, seed=3) == pytest.approx({0.5: expected})


def test_inpainting_psnr_repeats_for_a_seed(vae):
    x = pictures(vae)
    one, same, other = (evaluation.inpainting_psnr(vae, x, [0.5], draws=2, seed=seed) for seed in (0, 0, 1))
    assert one == same != other


# --- nearest training images ---


def tokens(count: int, seed: int, length: int = 6, dim: int = 5) -> Tensor:
    return torch.rand(count, length, dim, generator=torch.Generator().manual_seed(seed))


def slow_nearest(x: Tensor, S: Tensor, train: Tensor, neighbours: int) -> Tensor:
    result = []
    for n in range(len(x)):
        distances = []
        for m in range(len(train)):
            seen = [(x[n, k, d].item() - train[m, k, d].item()) ** 2 for k in range(6) if S[n, k] for d in range(5)]
            distances.append((sum(seen), m))
        distances.sort()
        gaps = [b[0] - a[0] for a, b in pairwise(distances)]
        assert min(gaps) > 1e-6  # no ties, so that there is one answer
        result.append(train[[m for _, m in distances[:neighbours]]].double().mean(0))
    return torch.stack(result).float()


@pytest.mark.parametrize("neighbours", [1, 3, 10, 12, 13, 100])
def test_nearest_completion_by_brute_force(neighbours):
    x, train = tokens(7, 0), tokens(12, 1)
    S = masks.random(7, 6, 0.5, seed=2)
    expected = slow_nearest(x, S, train, neighbours)
    torch.testing.assert_close(evaluation.nearest_completion(x, S, train, neighbours), expected, rtol=0, atol=1e-6)


def test_nearest_completion_in_chunks(monkeypatch):
    x, train, S = tokens(7, 0), tokens(12, 1), masks.random(7, 6, 0.5, seed=2)
    expected = evaluation.nearest_completion(x, S, train, 3)
    monkeypatch.setattr(data, "CHUNK", 2)
    torch.testing.assert_close(evaluation.nearest_completion(x, S, train, 3), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("missing", [0, 0.2])
def test_nearest_images_of_numbers_far_from_zero(missing):
    """Squares of such numbers are large, and what is left of their difference in float32 would be noise."""
    x, train, S = tokens(7, 0), tokens(12, 1), masks.random(7, 6, 0.5, seed=2)
    train[~masks.random(12, 6, 1 - missing, seed=3)] = math.nan
    x, train = (torch.round(part, decimals=2) for part in (x, train))
    expected = evaluation.nearest_completion(x.double(), S, train.double(), 3)
    found = evaluation.nearest_completion(x + 1000, S, train + 1000, 3) - 1000
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)


def test_nearest_completion_does_not_look_at_what_is_hidden():
    x, train, S = tokens(7, 0), tokens(12, 1), masks.random(7, 6, 0.5, seed=2)
    changed = torch.where(S.unsqueeze(-1), x, tokens(7, 5) * 100)
    expected = evaluation.nearest_completion(x, S, train, 3)
    assert torch.equal(evaluation.nearest_completion(changed, S, train, 3), expected)


def test_a_training_image_is_completed_exactly(vae):
    train = pictures(vae, 30)
    chosen = torch.tensor([4, 17, 29, 0])
    x = vae.tokenizer.encode(train)
    for S in evaluation.hidden_masks(4, vae.grid, [0.25, 0.5, 0.99]).values():
        assert torch.equal(evaluation.nearest_completion(x[chosen], S, x, neighbours=1), x[chosen])
    ratios = [0.25, 0.5, 0.99]
    result = evaluation.nearest_psnr(vae, train[chosen], train, ratios, neighbours=1)
    assert result == dict.fromkeys(ratios, math.inf)


def test_there_are_no_nearest_of_no_training_images(vae):
    images, S = torch.rand(2, *vae.image_shape), masks.random(2, vae.num_tokens, 0.5, seed=0)
    x, nothing = vae.tokenizer.encode(images), images[:0]
    for ask in (
        lambda: evaluation.nearest_psnr(vae, images, nothing, [0.5]),
        lambda: evaluation.nearest_positions(vae, images, S.unsqueeze(1), nothing),
        lambda: evaluation.nearest_completion(x, S, x[:0]),
        lambda: probe.nearest_by_codes(torch.rand(0, 3), torch.zeros(0).long(), torch.rand(2, 3)),
    ):
        with pytest.raises(ValueError, match="expected at least one training"):
            ask()


def test_nearest_psnr_is_that_of_the_completion(vae):
    x, train = pictures(vae, seed=1), pictures(vae, 20, seed=2)
    result = evaluation.nearest_psnr(vae, x, train, [0.25, 0.75], neighbours=4, seed=5)
    assert list(result) == [0.25, 0.75]
    for ratio, S in evaluation.hidden_masks(N, vae.grid, [0.25, 0.75], seed=5).items():
        seen = vae.pixel_mask(S)  # (N, 1, H, W)
        distances = ((x[:, None] - train[None]).double().square() * seen[:, None]).sum((2, 3, 4))  # (N, M)
        completed = train[distances.argsort(dim=1)[:, :4]].mean(1)
        assert result[ratio] == pytest.approx(slow_psnr(completed, x, seen), rel=1e-5)


def test_where_nothing_is_observed_none_is_nearer(vae):
    x, train = pictures(vae, seed=1), pictures(vae, 40, seed=2)
    ratios = [0.0, 0.5]
    nearest, mean = (f(vae, x, train, ratios) for f in (evaluation.nearest_psnr, evaluation.training_mean_psnr))
    assert nearest[0.0] == pytest.approx(mean[0.0], rel=1e-6) and nearest[0.5] != pytest.approx(mean[0.5], rel=1e-3)
    tokens, S = vae.tokenizer.encode(train), torch.zeros(1, vae.num_tokens, dtype=torch.bool)
    completed = evaluation.nearest_completion(tokens[:1], S, tokens)
    torch.testing.assert_close(completed[0], tokens.mean(0), rtol=0, atol=1e-6)


def test_the_mean_of_images_is_that_of_what_was_recorded():
    train = torch.tensor([[0.2, 0.4, torch.nan, torch.nan], [0.4, torch.nan, 0.9, torch.nan]]).view(2, 1, 2, 2)
    mean = evaluation._mean_image(train)
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.3, 0.4, 0.9, 1.9 / 4]).double(), rtol=0, atol=1e-7)


def test_two_patches_can_be_consistent():
    tokenizer = Patchify((4, 8), 4, 1)
    vae = BigLearnVAE(UniversalViT(grid=(1, 2), token_dim=16, dim=8, depth=1, z_dim=Z, heads=1), tokenizer)
    assert evaluation.consistency(vae, pictures(vae), 4)["order_gap"] >= 0


def test_images_of_one_patch():
    tokenizer = Patchify(4, 4, 1)
    vae = BigLearnVAE(UniversalViT(grid=(1, 1), token_dim=16, dim=8, depth=1, z_dim=Z, heads=1), tokenizer)
    x = pictures(vae)
    assert list(evaluation.likelihood(vae, x, 4)) == ["joint_nats", "joint_bits_per_dim"]
    with pytest.raises(ValueError, match="at least two patches, got one"):
        evaluation.consistency(vae, x, 4)
    assert evaluation.fit_variance(vae, x[:1]) > 0  # whose tokens (1, 1, 16) have a shape that an image may have


def test_no_images_and_nothing_recorded(vae):
    with pytest.raises(ValueError, match="at least one image, got none"):
        evaluation.elbo(vae, pictures(vae)[:0], BigLearnELBO(0.1))
    with pytest.raises(ValueError, match="something was recorded"):
        evaluation.fit_variance(vae, torch.full_like(pictures(vae), torch.nan))


def test_patches_lose_nothing(vae):
    x = pictures(vae)
    scores = evaluation.reconstruction(vae.tokenizer, x)
    assert scores["psnr"] == math.inf and scores["seam_ratio"] == scores["seam_ratio_of_images"]


class Halved(Patchify):
    """Tokens that are no pixels."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) / 2

    def decode(self, tokens: Tensor) -> Tensor:
        return super().decode(2 * tokens)


def test_nearest_images_are_nearest_in_pixels_whatever_the_tokens_are(vae):
    x, train = pictures(vae, seed=1), pictures(vae, 20, seed=2)
    other = BigLearnVAE(vae.net, Halved(vae.image_shape[1:], 2, vae.image_shape[0]))
    results = [evaluation.nearest_psnr(model, x, train, [0.25, 0.75], neighbours=4) for model in (vae, other)]
    assert results[0] == results[1]


# --- sets of images, and parts of them ---


@pytest.mark.parametrize("joint", [True, False])
def test_how_many_pass_at_once_does_not_change_the_elbo(joint):
    torch.manual_seed(0)
    net = UniversalViT(grid=(2, 3), token_dim=4, dim=8, depth=1, z_dim=5, heads=2).double()  # 5: no multiple of 16
    x, loss = torch.rand(41, 1, 4, 6, dtype=torch.float64), BigLearnELBO(0.1)
    found = [
        evaluation.elbo(BigLearnVAE(net, Patchify((4, 6), 2, 1), chunk=chunk), x, loss, joint=joint)
        for chunk in (1024, 40, 7, 1)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-12)


class Counting(UniversalViT):
    """Keeps how many images pass at once."""

    most = 0

    def forward(self, x, *more):
        self.most = max(self.most, len(x))
        return super().forward(x, *more)


@pytest.mark.parametrize("hidden", ["mask", "drop"])
def test_no_more_images_pass_at_once_than_asked_for(hidden):
    net = Counting(grid=(2, 3), token_dim=4, dim=8, depth=1, z_dim=5, heads=2, hidden=hidden)
    vae = BigLearnVAE(net, Patchify((4, 6), 2, 1), chunk=8)
    x = pictures(vae, 41)
    x[::3, :, :2, :2] = math.nan
    evaluation.fit_variance(vae, x)
    assert net.most == 8
    for joint in (True, False):
        evaluation.elbo(vae, x, BigLearnELBO(0.1), joint=joint)
        assert net.most == (16 if hidden == "mask" else 8)  # both encodings of 8 images are one pass


@pytest.fixture(params=["complete", "incomplete"])
def sets(vae, request) -> tuple[ImageSet, ImageSet]:
    """A few images and some to train."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, *vae.image_shape), generator=generator, dtype=torch.uint8)
        recorded = torch.rand(count, *vae.grid, generator=generator) < 0.7
        return ImageSet(pixels, None, recorded if request.param == "incomplete" else None)

    return draw(9), draw(30)


def everything(vae: BigLearnVAE, x, train) -> dict[str, float]:
    """What does not depend on how draws are shared out among parts."""
    joint = evaluation.elbo(vae, x, BigLearnELBO(0.1))
    nearest = evaluation.nearest_psnr(vae, x, train, [0.5, 0.75], neighbours=4)
    inpainting = evaluation.inpainting_psnr(vae, x, [0.5, 0.75], draws=2)
    return {"kl": joint["kl"], "nearest": nearest, "inpainting": inpainting} | {
        "variance": evaluation.fit_variance(vae, train)
    }


def test_a_set_is_measured_like_the_tensor_of_its_images(vae, sets):
    x, train = sets
    loss = BigLearnELBO(0.1)
    assert everything(vae, x, train) == everything(vae, x[:], train[:])
    for joint in (True, False):
        assert evaluation.elbo(vae, x, loss, joint) == evaluation.elbo(vae, x[:], loss, joint)
    if x.recorded is None:
        for measure in (evaluation.likelihood, evaluation.consistency):
            assert measure(vae, x, 3) == measure(vae, x[:], 3)


class Asked:
    """What an evaluation reads images through: a length and slices, which it keeps."""

    def __init__(self, images: ImageSet | Tensor):
        self.images, self.slices, self.counts = images, [], []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        part = self.images[index]
        self.slices += [index] if isinstance(index, slice) else []
        self.counts.append(len(part))
        return part


def test_nothing_larger_than_a_part_is_ever_made_floats(vae, sets, monkeypatch):
    whole = everything(vae, *sets)
    monkeypatch.setattr(data, "NUMBERS", 4 * math.prod(vae.image_shape))
    x, train = map(Asked, sets)
    parts = everything(vae, x, train)
    assert max(x.counts) == max(train.counts) == 4
    assert parts["kl"] == pytest.approx(whole["kl"], rel=1e-6)
    assert parts["nearest"] == pytest.approx(whole["nearest"], rel=1e-5)
    assert parts["inpainting"] == pytest.approx(whole["inpainting"], rel=0.1)  # other draws
    assert parts["variance"] == pytest.approx(whole["variance"], rel=0.1)


def test_likelihoods_and_consistency_in_parts(monkeypatch):
    net = LinearGaussian()  # whose bounds are exact, whatever is drawn
    x = net.model().tokenizer.decode(net.data(30))
    whole = [measure(net.model(), x, 5) for measure in (evaluation.likelihood, evaluation.consistency)]
    monkeypatch.setattr(data, "NUMBERS", 7 * x[0].numel())
    parts = [measure(net.model(), x, 5) for measure in (evaluation.likelihood, evaluation.consistency)]
    for one, other in zip(whole, parts, strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9)


def test_the_training_images_are_read_once_for_all_ratios(vae, monkeypatch):
    x, train = pictures(vae, seed=1), Asked(pictures(vae, 20, seed=2))
    monkeypatch.setattr(data, "NUMBERS", 8 * x[0].numel())
    evaluation.nearest_psnr(vae, x, train, [0.25, 0.5, 0.75])
    assert [k for part in train.slices for k in range(20)[part]] == list(range(20))


@pytest.mark.gpu
def test_a_set_in_memory_is_measured_on_the_gpu(vae, sets):
    x, train = sets
    expected = everything(vae, x, train)
    there = BigLearnVAE(vae.net.cuda(), vae.tokenizer)
    result = everything(there, x, train)
    assert result["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert result["nearest"] == pytest.approx(expected["nearest"], rel=1e-4)
    on_gpu = [images.to(torch.device("cuda", 0)) for images in sets]
    again = everything(there, *on_gpu)
    for name, value in result.items():
        assert again[name] == pytest.approx(value, rel=1e-5)


# --- what was never recorded ---


def spoil(vae: BigLearnVAE, images: Tensor, recorded: Tensor, junk: float = math.nan) -> Tensor:
    """Images with junk in the patches that were not recorded."""
    tokens = vae.tokenizer.encode(images)
    return vae.tokenizer.decode(tokens.masked_fill(~recorded.unsqueeze(-1), junk))


def test_unrecorded_patches_are_neither_observed_nor_asked_for(vae):
    x, recorded = pictures(vae), masks.random(N, vae.num_tokens, 0.6, seed=9)
    recorder = Recorder(vae.net, vae.tokenizer)
    recorder.kept = []
    result = evaluation.inpainting_psnr(recorder, spoil(vae, x, recorded), [0.5], draws=2, seed=3)
    (S, answer), expected = recorder.kept[0], evaluation.hidden_masks(N, vae.grid, [0.5], seed=3)[0.5] & recorded
    assert torch.equal(S, expected)
    asked = vae.pixel_mask(recorded & ~S)
    assert result[0.5] == pytest.approx(slow_psnr(answer.double().mean(0), x, ~asked), rel=1e-5)


def test_elbo_of_incomplete_images_is_that_of_what_was_recorded(vae):
    x, recorded = pictures(vae), masks.random(N, vae.num_tokens, 0.6, seed=9)
    numbers = evaluation.elbo(vae, spoil(vae, x, recorded), BigLearnELBO(0.3), seed=2)
    noise = torch.randn(N, Z, generator=torch.Generator().manual_seed(2))
    nothing = torch.zeros_like(recorded)
    expected = direct_elbo(vae, vae.tokenizer.encode(x), nothing, recorded, noise, 0.3, "learned")
    assert numbers == pytest.approx(expected, rel=1e-5)


def test_images_of_which_nothing_was_recorded_are_no_perfect_ones(vae):
    x = pictures(vae)
    x[1::2] = torch.nan
    for joint in (True, False):
        found = evaluation.elbo(vae, x, BigLearnELBO(0.3), joint, seed=2)
        random = StepRandom(torch.Generator().manual_seed(2))
        tokens, S = vae.tokenizer.encode(x), torch.zeros(N, vae.num_tokens, dtype=torch.bool)
        masks_given = (S, ~S) if joint else (None, None)
        each = BigLearnELBO(0.3)(vae.net, tokens, *masks_given, random=random)
        assert found["elbo"] == pytest.approx(each.elbo[::2].double().mean().item())
        assert found["elbo_nats"] == pytest.approx(each.elbo_nats[::2].double().mean().item())


def test_masks_of_a_class_of_ones_own_keep_what_they_have(vae):
    class Half(MaskSampler):
        """Observes the first half of the patches, or the last."""

        def __init__(self, first, **others):
            super().__init__(**others)
            object.__setattr__(self, "first", first)

        def __call__(self, batch_size, num_tokens, generator, recorded=None):
            S = (torch.arange(num_tokens) < num_tokens // 2) == self.first
            return S.expand(batch_size, -1), ~S.expand(batch_size, -1)

    x = pictures(vae)
    for first in (True, False):
        one = BigLearnELBO(0.3, masks=Half(first, ratios_per="step"))
        other = BigLearnELBO(0.3, masks=lambda *sizes, masks=one.masks: masks(*sizes))
        assert evaluation.elbo(vae, x, one, joint=False) == evaluation.elbo(vae, x, other, joint=False)
        assert one.masks.ratios_per == "step"


def test_nats_are_those_of_a_gaussian_alone(vae):
    class Laplace(BigLearnELBO):
        def terms(self, net, x, S, T, noise):
            q, p = self._posterior_and_prior(net, x, S, T)
            return -(net(x, S, q.sample(noise), T) - x).abs().masked_fill(~T.unsqueeze(-1), 0).sum((1, 2)), q.kl(p)

    assert "elbo_nats" not in evaluation.elbo(vae, pictures(vae), Laplace(0.3))
    assert "elbo_nats" not in evaluation.elbo(vae, pictures(vae), BigLearnELBO(0))

    class Weighted(BigLearnELBO):
        """Of importance weights, say: of the same observations."""

        same_model = True

        def terms(self, *arguments):
            return tuple(2 * part for part in super().terms(*arguments))

    for joint in (True, False):  # they are measured as all others are
        expected = evaluation.elbo(vae, pictures(vae), BigLearnELBO(0.3), joint, seed=1)
        assert evaluation.elbo(vae, pictures(vae), Weighted(0.3), joint, seed=1) == expected
    assert has_model(Weighted(0.3)) and not has_model(Laplace(0.3)) and not has_model(lambda *_: None)
    with pytest.raises(ValueError, match=r"expected an objective, such as BigLearnELBO\(beta\), got 0.3"):
        evaluation.elbo(vae, pictures(vae), 0.3)


@pytest.mark.parametrize("joint", [True, False])
def test_an_objective_with_a_call_of_its_own_is_measured_by_it(vae, joint):
    class Doubled(BigLearnELBO):
        def __call__(self, *arguments, **options):
            found = super().__call__(*arguments, **options)
            return replace(found, reconstruction=2 * found.reconstruction)

    expected = evaluation.elbo(vae, pictures(vae), BigLearnELBO(0.3), joint, seed=1)
    found = evaluation.elbo(vae, pictures(vae), Doubled(0.3), joint, seed=1)
    assert found == {
        "elbo": pytest.approx(expected["elbo"] + expected["reconstruction"]),
        "reconstruction": pytest.approx(2 * expected["reconstruction"]),
        "kl": pytest.approx(expected["kl"]),
    }


def test_an_objective_that_draws_by_itself_is_measured_alike(vae):
    class Drawn(BigLearnELBO):
        def terms(self, net, x, S, T, noise):
            return super().terms(net, x, S, T, torch.randn_like(noise))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = (evaluation.elbo(vae, pictures(vae), Drawn(0.3), seed=seed) for seed in (1, 1, 2))
    assert first == second != other and torch.equal(torch.get_rng_state(), before)


def test_masks_of_ones_own_on_incomplete_images(vae):
    """T may be what was never recorded, which then counts for nothing."""
    x = pictures(vae)
    x[0, ..., : x.shape[-1] // 2] = torch.nan
    recorded = masks.recorded(vae.tokenizer.encode(x))
    T = ~recorded[:1]

    def missing(batch_size, num_tokens, generator):
        return ~T.expand(batch_size, -1), T.expand(batch_size, -1)

    found = evaluation.elbo(vae, x, BigLearnELBO(0.3, masks=missing), joint=False, seed=2)
    noise = StepRandom(torch.Generator().manual_seed(2)).normal((N, Z), x.dtype)
    each = BigLearnELBO(0.3)(vae.net, vae.tokenizer.encode(x[1:]), ~T, T, noise[1:])
    assert found["elbo"] == pytest.approx(each.elbo.double().mean().item())


def slow_nearest_of_incomplete(x: Tensor, S: Tensor, train: Tensor, neighbours: int) -> Tensor:
    result, mean = torch.empty_like(x), train.nanmean(0)
    variance = (train - mean).square().nanmean(0)
    for n in range(len(x)):
        expected = (x[n] - mean).square() + variance
        squares = torch.where(train.isnan(), expected, (train - x[n]).square())  # (M, L, D)
        nearest = squares[:, S[n]].nan_to_num(0).sum((1, 2)).argsort()[:neighbours]
        result[n] = train[nearest].nanmean(0)
        result[n] = torch.where(result[n].isnan(), train.nanmean(0), result[n])
    return result


def test_nearest_completion_of_incomplete_training_images():
    x, train, S = tokens(7, 0), tokens(12, 1), masks.random(7, 6, 0.5, seed=2)
    train[~masks.random(12, 6, 0.6, seed=3)] = math.nan
    for neighbours in (1, 3):  # with one neighbour some numbers are the mean of all
        expected = slow_nearest_of_incomplete(x, S, train, neighbours)
        result = evaluation.nearest_completion(x, S, train, neighbours)
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_images_of_which_little_was_recorded_are_not_the_nearest_for_it():
    x, S = tokens(1, 0), torch.ones(1, 6, dtype=torch.bool)
    train = torch.cat([x + 0.1, tokens(40, 1)])
    train[-1, 1:], train[-1, :1] = math.nan, x[0, :1]  # the same in all that it has
    torch.testing.assert_close(evaluation.nearest_completion(x, S, train, 1)[0], train[0])


def test_what_is_no_number_of_neighbours_and_no_image():
    x, S = tokens(3, 0), torch.ones(3, 6, dtype=torch.bool)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"neighbours must be at least 1, got {count}"):
            evaluation.nearest_completion(x, S, tokens(5, 1), count)


def test_what_no_training_image_has_is_completed_by_the_mean_of_all_numbers():
    x, train, S = tokens(7, 0), tokens(12, 1), masks.random(7, 6, 0.5, seed=2)
    train[:, 2] = math.nan
    result, rest = evaluation.nearest_completion(x, S, train, 3), [0, 1, 3, 4, 5]
    torch.testing.assert_close(result[:, 2], train.nanmean().expand_as(result[:, 2]))
    others = S & (torch.arange(6) != 2)
    expected = evaluation.nearest_completion(x[:, rest], others[:, rest], train[:, rest], 3)
    seen = others.any(-1)
    torch.testing.assert_close(result[seen][:, rest], expected[seen])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_of_another_precision_is_measured_on_the_same_images(vae, dtype):
    images = ImageSet((255 * pictures(vae)).round().to(torch.uint8), None)
    loss = BigLearnELBO(0.1)
    single = [evaluation.elbo(vae, images, loss, joint)["kl"] for joint in (True, False)]
    single.append(evaluation.fit_variance(vae, images))
    vae.net.to(dtype)
    found = [evaluation.elbo(vae, images, loss, joint)["kl"] for joint in (True, False)]
    found.append(evaluation.fit_variance(vae, images))
    if dtype == torch.float64:
        assert found[:2] == pytest.approx(single[:2], rel=1e-4)
    assert all(map(math.isfinite, found))
    in_float64 = evaluation.nearest_psnr(vae, images[:].double(), images, [0.5])
    assert in_float64 == pytest.approx(evaluation.nearest_psnr(vae, images, images, [0.5]), rel=1e-4)


def test_fitted_variance_is_the_mean_squared_error_of_what_was_recorded(vae):
    x, recorded = pictures(vae), masks.random(N, vae.num_tokens, 0.6, seed=9)
    value = evaluation.fit_variance(vae, spoil(vae, x, recorded), seed=4)
    z = vae.encode(x, recorded).sample(seed=derive_seed("variance", 4, 0))
    error = vae.tokenizer.encode(x) - vae.net(vae.tokenizer.encode(x), torch.zeros_like(recorded), z)
    assert value == pytest.approx(error[recorded].double().square().mean().item(), rel=1e-6)
    bounds = {
        variance: BigLearnVAE(vae.net, vae.tokenizer)
        .log_prob(x, recorded, samples=400, variance=variance, seed=0)
        .mean()
        for variance in (value / 2, value, value * 2)
    }
    assert bounds[value] > max(bounds[value / 2], bounds[value * 2])


# --- likelihoods ---


def test_likelihoods_are_bounds_of_the_tasks_they_name(vae):
    x, A = pictures(vae), masks.random(N, vae.num_tokens, 0.5, seed=7)
    result = evaluation.likelihood(vae, x, samples=5, variance=0.3, seed=7)
    tasks = {"joint": (None, None), "marginal": (A, None), "conditional": (~A, A)}
    assert len(result) == 2 * len(tasks)
    for name, (T, given) in tasks.items():
        for unit in ("nats", "bits_per_dim"):
            expected = vae.log_prob(x, T, given, 5, 0.3, seed=7, unit=unit).mean().item()
            assert result[f"{name}_{unit}"] == pytest.approx(expected, rel=1e-9)


def test_annealed_likelihoods_are_those_of_annealing(vae):
    x, A = pictures(vae), masks.random(N, vae.num_tokens, 0.5, seed=7)
    result = evaluation.likelihood(vae, x, 2, 0.3, seed=7, annealing_steps=3)
    for name, (T, given) in {"joint": (A | ~A, None), "marginal": (A, None), "conditional": (~A, A)}.items():
        expected = evaluation.annealed_log_prob(vae, x, T, given, 2, 0.3, seed=7, steps=3).nats.mean().item()
        assert result[f"{name}_nats"] == pytest.approx(expected, rel=1e-9)


# --- consistency ---


def test_an_exact_model_is_consistent():
    net = LinearGaussian()
    x = net.model().tokenizer.decode(net.data(30))
    result = evaluation.consistency(net.model(), x, samples=7)
    expected = {"order_gap": 0, "order_noise": 0, "posterior_gap": 0, "effective_samples": 1}
    assert result == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shift, widen", [(0.5, 1.0), (0.0, 1.3), (0.3, 1.2)])
def test_posterior_gap_is_the_divergence_from_bayes_rule(shift, widen):
    net = LinearGaussian(shift, widen, inexact=lambda S: S.any(-1))
    x = net.model().tokenizer.decode(net.data(60))
    result = evaluation.consistency(net.model(), x, samples=4096)
    divergence = 0.5 * 3 * (widen**2 + shift**2 - 1 - math.log(widen**2))  # of three dimensions
    assert result["posterior_gap"] == pytest.approx(divergence, rel=0.05)
    assert 0.05 < result["effective_samples"] < 0.95


def test_a_large_posterior_gap_is_seen_by_annealing_and_hardly_without():
    net = LinearGaussian(0.0, 0.1, inexact=lambda S: S.any(-1))
    x = net.model().tokenizer.decode(net.data(10))
    divergence = 0.5 * 3 * (0.1**2 - 1 - math.log(0.1**2))  # 5.4 nats
    without, annealed = (evaluation.consistency(net.model(), x, 64, annealing_steps=steps) for steps in (None, 50))
    assert without["posterior_gap"] < 0.5 * divergence < 0.7 * divergence < annealed["posterior_gap"] < divergence
    assert without["effective_samples"] == annealed["effective_samples"]


def test_order_gap_tells_disagreement_from_estimation():
    """A wrong posterior of single patches is a wrong prior for what follows, in one order and not in the other."""
    net = LinearGaussian(2.0, 1.0, inexact=lambda S: S.sum(-1) == 1)
    x = net.model().tokenizer.decode(net.data(60))
    result = evaluation.consistency(net.model(), x, samples=8192)
    assert result["order_gap"] > 10 * result["order_noise"] > 0
    # Wrong proposals alone, of the full set, are no disagreement.
    net.inexact = lambda S: S.all(-1)
    result = evaluation.consistency(net.model(), x, samples=512)
    assert result["order_gap"] < 5 * result["order_noise"]


@pytest.mark.parametrize("num_tokens", [2, 3, 16])
def test_pairs_of_sets_are_disjoint_and_not_empty(num_tokens):
    A, B = evaluation._disjoint_pairs(2000, num_tokens, 0)
    assert A.any(-1).all() and B.any(-1).all() and not (A & B).any()
    for mask in (A, B):
        assert mask.sum(-1).max() == num_tokens - 1
    assert ((A | B).all(-1)).any()
    torch.set_default_dtype(torch.float64)
    try:
        again = evaluation._disjoint_pairs(2000, num_tokens, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.stack(again), torch.stack([A, B]))


MEASURES = {
    "elbo": lambda vae, x: evaluation.elbo(vae, x, BigLearnELBO(beta=0.01)),
    "inpainting_psnr": lambda vae, x: evaluation.inpainting_psnr(vae, x, [0.5], draws=2),
    "nearest_psnr": lambda vae, x: evaluation.nearest_psnr(vae, x, x, [0.5], neighbours=2),
    "training_mean_psnr": lambda vae, x: evaluation.training_mean_psnr(vae, x, x, [0.5]),
    "fit_variance": lambda vae, x: {"variance": evaluation.fit_variance(vae, x)},
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_images_are_bytes_or_in_0_and_1(vae, measure):
    pixels = (255 * pictures(vae)).to(torch.uint8)
    floats = measure(vae, pixels.float() / 255)
    assert measure(vae, pixels) == measure(vae, ImageSet(pixels)) == floats
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got values from .* divide those in 0\.\.255 by 255"):
        measure(vae, pixels.float())
    with pytest.warns(UserWarning, match=r"if they are in \[-1, 1\]") as caught:
        measure(vae, pixels.float() / 127.5 - 1)
    assert {warning.filename for warning in caught} == {__file__}


def test_what_was_never_recorded_is_no_wrong_pixel(recwarn):
    vae = make()
    x = pictures(vae)
    x[:, :, :6] = torch.nan
    assert math.isfinite(evaluation.inpainting_psnr(vae, x, [0.5], draws=2)[0.5])
    assert not [warning for warning in recwarn if "[-1, 1]" in str(warning.message)]
    with pytest.raises(ValueError, match="got values from 0 to 300"):
        x[0, 0, 7, :2] = torch.tensor([0.0, 300.0])
        evaluation.inpainting_psnr(vae, x, [0.5], draws=2)


def test_what_no_psnr_is_of_is_refused(vae):
    x = pictures(vae)
    hidden = vae.pixel_mask(torch.ones(vae.num_tokens, dtype=torch.bool))
    assert evaluation.psnr(x, x, hidden) == math.inf
    assert evaluation.psnr(x[0] + 0.1, x[0], hidden) == pytest.approx(20, abs=1e-4)  # one image, several draws
    assert evaluation.psnr(torch.stack([x, x]) + 0.1, torch.stack([x, x]), hidden) == pytest.approx(20, abs=1e-4)
    each = hidden.expand(len(x), *hidden.shape[1:])  # (N, H, W) may look like one of channels
    more = hidden.expand(len(x) + 1, 1, *hidden.shape[1:])
    wrong = (torch.ones(vae.num_tokens, dtype=torch.bool), hidden.long(), hidden.float(), each, more)
    for completed, mask in ((x[..., 1:], hidden), *((x, mask) for mask in wrong)):
        with pytest.raises(ValueError, match=r"expected completions of the size of the images, .*vae\.pixel_mask"):
            evaluation.psnr(completed, x, mask)
    with pytest.raises(ValueError, match=r"in a list of at least one, got \[None\]"):
        evaluation.inpainting_psnr(vae, x, [None])
    with pytest.raises(ValueError, match="neighbours must be at least 1, got -1"):
        evaluation.nearest_psnr(vae, x, x, [0.5], neighbours=-1)
    with pytest.raises(ValueError, match=r"in a list of at least one, got 0\.5"):
        evaluation.inpainting_psnr(vae, x, 0.5)
    for images in (x.numpy(), x[0, 0]):
        with pytest.raises(ValueError, match="expected images, a tensor"):
            evaluation.inpainting_psnr(vae, images, [0.5])
    tokens = vae.tokenizer.encode(x)
    with pytest.raises(ValueError, match=r"of bytes, or an ImageSet, got torch\.float\d\d \("):
        evaluation.training_mean_psnr(vae, x, tokens, [0.5])
    with pytest.raises(ValueError, match=r"training images of the size of the images, \(.*\), got \(., ., 2\)"):
        evaluation.training_mean_psnr(vae, x, x[..., :2], [0.5])
    with torch.inference_mode(), pytest.raises(ValueError, match=r"take torch\.no_grad\(\)"):
        evaluation.annealed_log_prob(vae, x, samples=2, steps=2)
