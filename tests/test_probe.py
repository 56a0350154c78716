import itertools
import math
import statistics
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor, nn
from torch.distributions import Normal
from torch.testing import assert_close

from biglearn_vae import BigLearnVAE, Optim, PatchAE, Patchify, StepRandom, UniversalViT, World, masks, probe
from biglearn_vae.data import ImageSet

RECIPE = Optim(lr=2e-3, muon_lr=0.024, warmup_steps=300, schedule="cosine", clip_norm=1.0)

N, Z = 7, 3


def network(tokenizer: Patchify) -> UniversalViT:
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=2, z_dim=Z, heads=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


@pytest.fixture
def vae() -> BigLearnVAE:
    """Colour images of 4 x 6, L = 6."""
    tokenizer = Patchify((4, 6), 2, 3)
    return BigLearnVAE(network(tokenizer).double(), tokenizer)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pictures(vae: BigLearnVAE, count: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *vae.image_shape, dtype=torch.float64, generator=generator)


def labelled(vae: BigLearnVAE, count: int, seed: int = 0) -> ImageSet:
    """Dark and bright images: the class is how bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (count,), generator=generator)
    pixels = 80 * y.view(-1, 1, 1, 1) + torch.randint(60, (count, *vae.image_shape), generator=generator)
    return ImageSet(pixels.to(torch.uint8), 10 * y)


def attributes(count: int, seed: int = 0, unknown: float = 0.3) -> tuple[Tensor, Tensor]:
    """Features (N, 4), and attributes (N, 3) of them, the second rare, a share of which is not known."""
    x = noise(count, 4, seed=seed)
    y = torch.stack([x[:, 0] > 0, x[:, 1] + x[:, 2] > 2, x[:, 3] + noise(count, seed=seed + 1) > 0], dim=1).long()
    hidden = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) < unknown
    return x, y.masked_fill(hidden, -1)


def by_hand(train_x: Tensor, train_y: Tensor, test_x: Tensor, weight: str | None = None) -> np.ndarray:
    """Predictions of scikit-learn's logistic regression on features that are standardised here."""
    mean, std = train_x.numpy().mean(0), train_x.numpy().std(0)
    solver = LogisticRegression(C=32 / train_x.shape[1], max_iter=500, class_weight=weight)
    solver.fit((train_x.numpy() - mean) / std, train_y.numpy())
    return solver.predict((test_x.numpy() - mean) / std)


# --- features and pixels ---


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.17, 0.0])
def test_features_are_the_means_of_p_z_given_x_s_image_by_image(vae, monkeypatch, ratio):
    x, S = pictures(vae), masks.random(N, vae.num_tokens, ratio, seed=5)
    expected = torch.stack([vae.encode(x[n], S[n]).mean for n in range(N)])
    assert_close(probe.features(vae, x, ratio, seed=5), expected, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(vae, "chunk", 3)
    assert_close(probe.features(vae, x, ratio, seed=5), expected, rtol=1e-10, atol=1e-12)


def test_pixels_are_those_of_observed_patches_and_zeros(vae, monkeypatch):
    x, S = pictures(vae), masks.random(N, vae.num_tokens, 0.5, seed=5)
    tokens = vae.tokenizer.encode(x).clone()
    tokens[~S] = 0
    expected = vae.tokenizer.decode(tokens).flatten(1)
    assert torch.equal(probe.pixels(vae, x, 0.5, seed=5), expected)
    monkeypatch.setattr(vae, "chunk", 3)
    assert torch.equal(probe.pixels(vae, x, 0.5, seed=5), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.5, 0.3, 0.05])
def test_each_image_shows_the_share_of_its_patches_that_is_asked_for(vae, ratio):
    seen = probe.pixels(vae, torch.ones_like(pictures(vae, 50)), ratio, seed=1)
    assert torch.equal(seen.mean(1), torch.full((50,), round(6 * ratio) / 6, dtype=torch.float64))
    if 0 < round(6 * ratio) < 6:
        assert len(seen.unique(dim=0)) > 5


def test_masks_of_training_and_test_ratios_and_draws_differ():
    seeds = [s for ratio in probe.RATIOS for draw in range(5) for s in probe.mask_seeds(0, ratio, draw)]
    seeds += probe.mask_seeds(1, 1.0, 0)
    assert len(set(seeds)) == len(seeds) == 72
    assert probe.mask_seeds(0, 1, 0) == probe.mask_seeds(0, 1.0, 0)


@pytest.mark.parametrize("extract", [probe.features, probe.pixels])
@pytest.mark.parametrize("junk", [0.0, 1.0, math.nan])
def test_hidden_pixels_have_no_influence(vae, extract, junk):
    x = pictures(vae)
    hidden = probe.pixels(vae, torch.ones_like(x), 0.5, seed=2).view_as(x) == 0
    assert torch.equal(extract(vae, x.masked_fill(hidden, junk), 0.5, seed=2), extract(vae, x, 0.5, seed=2))


def test_what_was_never_recorded_is_not_observed(vae):
    recorded = masks.random(N, vae.num_tokens, 0.5, seed=9)
    x = pictures(vae)
    holes = x.masked_fill(~masks.to_pixels(recorded, vae.grid, (4, 6)).unsqueeze(1), math.nan)
    S = masks.random(N, vae.num_tokens, 0.7, 3, recorded)
    assert_close(probe.features(vae, holes, 0.7, seed=3), vae.encode(x, S).mean, rtol=1e-10, atol=1e-12)
    seen = masks.to_pixels(S, vae.grid, (4, 6)).unsqueeze(1).expand_as(x)
    assert torch.equal(probe.pixels(vae, holes, 0.7, seed=3), x.masked_fill(~seen, 0).flatten(1))


@pytest.mark.parametrize("count", [1, 3])
def test_the_tokens_of_one_image_are_not_taken_for_an_image(count):
    torch.manual_seed(0)
    net = UniversalViT(grid=(2, 2), token_dim=4, dim=8, depth=1, z_dim=3, heads=2)
    # An image is (1, 4, 4), and so are its tokens; the last part has one.
    vae = BigLearnVAE(net, Patchify(4, 2, 1), chunk=2)
    x = torch.rand(count, 1, 4, 4)
    S = masks.random(count, 4, 0.5, seed=3)
    expected = torch.stack([vae.encode(image, seen).mean for image, seen in zip(x, S, strict=True)])
    for given in (x, vae.tokenizer.encode(x)):
        assert_close(probe.features(vae, given, 0.5, seed=3), expected)


def test_features_of_tokens_are_those_of_their_images(vae, monkeypatch):
    monkeypatch.setattr(vae, "chunk", 3)
    recorded = masks.random(N, vae.num_tokens, 0.5, seed=9)
    x = pictures(vae).masked_fill(~masks.to_pixels(recorded, vae.grid, (4, 6)).unsqueeze(1), math.nan)
    tokens = probe.tokens_of(vae, x)
    assert tokens.shape == (N, vae.num_tokens, vae.net.token_dim)
    assert torch.equal(probe.features(vae, tokens, 0.7, seed=3), probe.features(vae, x, 0.7, seed=3))
    assert probe.tokens_of(vae, x, most=tokens.numel()) is not x
    assert probe.tokens_of(vae, x, most=tokens.numel() - 1) is x


def test_tokens_are_kept_without_what_made_them():
    tokenizer = PatchAE(image_size=8, patch_size=4, channels=1, width=4)
    vae = BigLearnVAE(network(tokenizer), tokenizer)
    tokens = probe.tokens_of(vae, torch.rand(2, *vae.image_shape))
    assert tokenizer.encoder[0].weight.requires_grad and not tokens.requires_grad


def test_a_model_of_bfloat16_is_probed(vae):
    expected = probe.features(vae, pictures(vae), 0.5, seed=3)
    found = probe.features(vae.to(torch.bfloat16), pictures(vae), 0.5, seed=3)
    assert found.dtype == torch.float32
    assert_close(found, expected.float(), rtol=0.1, atol=0.1)


class InParts(ImageSet):
    """A set of which only small parts may be read."""

    def __getitem__(self, index) -> Tensor:
        assert isinstance(index, slice) and index.stop - index.start <= 4
        return super().__getitem__(index)


@pytest.mark.parametrize("extract", [probe.features, probe.pixels])
def test_a_set_is_read_in_parts(vae, monkeypatch, extract):
    images = labelled(vae, 10)
    expected = extract(vae, images[:], 0.5, seed=0)
    monkeypatch.setattr(vae, "chunk", 4)
    assert_close(extract(vae, InParts(images.pixels), 0.5, seed=0), expected)


def test_some_images_are_always_the_same_ones(vae):
    images = labelled(vae, 50)
    assert probe.some(images, None) is images and probe.some(images, 50) is images
    few, more = probe.some(images, 5), probe.some(images, 20)
    places = [[int((images.pixels == x).flatten(1).all(1).nonzero()) for x in part.pixels] for part in (few, more)]
    assert set(places[0]) < set(places[1]) and places == [sorted(place) for place in places]
    assert places[0] != list(range(5)) and torch.equal(few.labels, images.labels[places[0]])


# --- the classifier ---


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.0])
def test_two_gaussian_blobs_are_told_apart_as_well_as_they_can_be(distance):
    y = torch.arange(20_000) % 2
    x = noise(20_000, 5)
    x[:, 2] += distance * (2 * y - 1)
    x = 3 * x @ noise(5, 5, seed=1) + 7  # any linear map: the answer is the same
    score = probe.fit_and_score(x[:10_000], y[:10_000], x[10_000:], y[10_000:])
    assert score.value == pytest.approx(Normal(0, 1).cdf(torch.tensor(distance)).item(), abs=0.01)
    assert score.attributes is None and score.unconverged == 0


def test_distant_blobs_and_features_that_say_nothing():
    y = torch.tensor([4, 1, 7, 4, 4]).repeat(20)
    x = F.one_hot(y, 8).double() + 0.01 * noise(100, 8)
    assert probe.fit_and_score(x, y, x, y).value == 1
    assert probe.fit_and_score(torch.full_like(x, 0.3), y, x, y).value == 0.6  # the share of the commonest class
    other = torch.where(y == 1, 2, y)
    assert probe.fit_and_score(x, y, x, other).value == 0.8  # a class that was never seen is never right


def test_accuracy_is_that_of_scikit_learn_on_features_standardised_by_training_statistics():
    x, y = noise(300, 4), torch.arange(300) % 3
    x += noise(3, 4, seed=1)[y]
    x = x * torch.tensor([1, 100, 0.01, 1]) + torch.tensor([0, 1e3, 5, -2])
    train_x, train_y, test_x, test_y = x[:200], y[:200], x[200:], y[200:]
    expected = by_hand(train_x, train_y, test_x)
    assert torch.equal(probe.fit(train_x, train_y).predict(test_x), torch.from_numpy(expected))
    assert probe.fit_and_score(train_x, train_y, test_x, test_y).value == accuracy_score(test_y, expected)


def test_the_features_of_test_images_do_not_enter_the_standardisation():
    x, y = noise(300, 4), torch.arange(300) % 3
    x += noise(3, 4, seed=1)[y]
    moved = 2 * x[200:] + 3
    expected = accuracy_score(y[200:], by_hand(x[:200], y[:200], moved))
    assert probe.fit_and_score(x[:200], y[:200], moved, y[200:]).value == expected
    # Their own statistics would have undone the shift.
    assert expected < 0.1 + probe.fit_and_score(x[:200], y[:200], x[200:], y[200:]).value
    assert expected != probe.fit_and_score(x[:200], y[:200], x[200:], y[200:]).value


def test_tokens_have_no_pixels(vae):
    with pytest.raises(ValueError, match=r"of bytes, or an ImageSet, got torch\.float32 \(2, 6, 12\)"):
        probe.pixels(vae, vae.tokenizer.encode(torch.rand(2, *vae.image_shape)), 0.5)


@pytest.mark.parametrize("y", [torch.ones(9, dtype=torch.long), torch.arange(9).view(9, 1)], ids=["one class", "2-D"])
def test_a_classifier_needs_classes(y):
    with pytest.raises(ValueError, match=r"expected classes \(N,\), at least two of them, got "):
        probe.fit(noise(9, 4), y)


def test_equal_channels_change_nothing():
    x, y = noise(300, 4), torch.arange(300) % 3
    x += noise(3, 4, seed=1)[y]
    one, three = (probe.fit(part, y) for part in (x, torch.cat([x, x, x], dim=1)))
    probabilities = one.pipeline.predict_proba(x.numpy()), three.pipeline.predict_proba(x.repeat(1, 3).numpy())
    assert np.abs(probabilities[0] - probabilities[1]).max() < 2e-3  # the solver's tolerance


def test_a_solver_that_stops_early_is_counted_and_says_nothing(monkeypatch):
    monkeypatch.setattr(probe, "MAX_ITER", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = attributes(200, unknown=0)
        assert probe.fit_and_score(x, y, x, y).unconverged == 3
        assert probe.fit_and_score(x, y[:, 0], x, y[:, 0]).unconverged == 1


# --- attributes ---


def test_attributes_are_scored_as_if_the_unknown_had_been_dropped():
    (train_x, train_y), (test_x, test_y) = attributes(400), attributes(300, seed=7)
    score = probe.fit_and_score(train_x, train_y, test_x, test_y)
    expected = []
    for a in range(3):
        train, test = train_y[:, a] != -1, test_y[:, a] != -1
        assert 0 < train.sum() < 400 and 0 < test.sum() < 300
        predicted = by_hand(train_x[train], train_y[train, a], test_x[test], "balanced")
        expected.append(balanced_accuracy_score(test_y[test, a], predicted))
    assert score.attributes == pytest.approx(expected, abs=1e-12)
    assert score.value == pytest.approx(statistics.fmean(expected), abs=1e-12)
    assert min(expected) > 0.7  # the rare one, too


def test_attributes_without_both_classes_are_left_out():
    (train_x, train_y), (test_x, test_y) = attributes(400), attributes(300, seed=7)
    whole = probe.fit_and_score(train_x, train_y, test_x, test_y).attributes
    train_y[:, 0], test_y[:, 2] = train_y[:, 0].clamp(max=0), -1
    score = probe.fit_and_score(train_x, train_y, test_x, test_y)
    assert score.attributes == (None, whole[1], None) and score.value == whole[1]


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (dict(train_x=torch.zeros(6, 2, 2)), r"training features of shape \(N, F\).*got \(6, 2, 2\)"),
        (dict(test_x=torch.zeros(4, 3)), r"test features of shape \(N, F\).*got \(4, 3\)"),
        (dict(test_x=torch.zeros(0, 2), test_y=torch.zeros(0)), "N at least 1"),
        (dict(train_x=torch.full((6, 2), math.nan)), "finite training features, got NaN"),
        (dict(test_y=torch.zeros(5)), "a label for each of the 4 test images, got 5"),
        (dict(train_y=torch.zeros(6, 2)), r"got \(6, 2\) and \(4,\)"),
        (dict(train_y=torch.zeros(6)), "at least two classes among the training images, got one"),
        (dict(train_y=torch.ones(6, 1).long(), test_y=torch.ones(4, 1).long()), "no attribute has both classes"),
        (
            dict(train_y=torch.full((6, 1), 2), test_y=torch.ones(4, 1).long()),
            r"1, 0 and -1 .* got the values \[1, 2\]",
        ),
    ],
)
def test_features_and_labels_that_do_not_fit_are_refused(change, expected):
    x = noise(6, 2)
    given = dict(train_x=x, train_y=torch.arange(6) % 2, test_x=x[:4], test_y=torch.arange(4) % 2) | change
    with pytest.raises(ValueError, match=expected):
        probe.fit_and_score(**given)


def test_images_without_labels_are_refused_with_what_to_do(vae):
    images = labelled(vae, 8)
    none = ImageSet(images.pixels)
    for train, test, what in ((none, images, "training"), (images, none, "test")):
        with pytest.raises(ValueError, match=f"the {what} images have no labels.*image_folder with a subfolder"):
            probe.linear_probe(vae, train, test)
    with pytest.raises(ValueError, match="the training images have no labels"):
        probe.train_ceiling(network(vae.tokenizer), vae, none, RECIPE, steps=1)


def test_ratios_draws_and_empty_sets_are_checked(vae):
    images = labelled(vae, 8)
    with pytest.raises(ValueError, match=r"ratio must be a number in \[0, 1\], got 1.5"):
        probe.linear_probe(vae, images, images, [1.5])
    for ratios in (0.5, [], "0.5"):
        with pytest.raises(ValueError, match=r"ratios must be S-ratios in \[0, 1\], in a list of at least one, got"):
            probe.linear_probe(vae, images, images, ratios)
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        probe.linear_probe(vae, images, images, [0.5], draws=0)
    with pytest.raises(ValueError, match="at least one image"):
        probe.features(vae, images.pixels[:0], 0.5)


# --- the ceiling ---


def by_loss(labels: Tensor, y: Tensor, logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a network that gives these logits, and the masks S that it is asked with."""
    asked = []

    def net(tokens: Tensor, S: Tensor) -> Tensor:
        asked.append(S)
        return logits

    loss = probe.LabelLoss(labels)(net, (x, y), random=StepRandom.at(0, 0, World()))
    assert loss.scalars() == {"loss": loss.loss}
    return loss.loss, asked[0]


def test_the_loss_of_classes_is_cross_entropy():
    logits, y = noise(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss, _ = by_loss(y, y, logits, noise(5, 6, 4))
    assert_close(loss, -logits.log_softmax(1)[range(5), y].mean())


def test_the_loss_of_attributes_weighs_both_classes_alike_and_leaves_out_the_unknown():
    logits, y = noise(4, 2), torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]])
    labels = torch.tensor([[1, -1], [0, 0], [0, 0], [0, 1], [-1, 1]])
    weights = {(0, 1): 4 / 2, (0, 0): 4 / 6, (1, 1): 4 / 4, (1, 0): 4 / 4}  # known / (2 of this class)
    terms = [
        -weights[a, int(y[n, a])] * F.logsigmoid(logits[n, a] if y[n, a] else -logits[n, a])
        for n in range(4)
        for a in range(2)
        if y[n, a] >= 0
    ]
    assert_close(by_loss(labels, y, logits, noise(4, 6, 4))[0], torch.stack(terms).mean())
    # So a constant guess costs log 2, whatever is rare.
    known = torch.tensor([[1, 0], [0, 0], [0, 1], [0, 1]])
    loss, _ = by_loss(known, known, torch.zeros(4, 2, dtype=torch.float64), noise(4, 6, 4))
    assert loss.item() == pytest.approx(math.log(2))


def test_the_ceiling_is_trained_under_masks_of_all_sizes_alike():
    x = noise(7000, 6, 4)
    S = by_loss(torch.arange(7000) % 2, torch.arange(7000) % 2, noise(7000, 2), x)[1]
    counts = torch.bincount(S.sum(1), minlength=7)
    assert len(counts) == 7 and (counts - 1000).abs().max() < 5 * math.sqrt(1000)
    assert (S.double().mean(0) - 0.5).abs().max() < 0.03
    x[:, [1, 4]] = math.nan
    S = by_loss(torch.arange(7000) % 2, torch.arange(7000) % 2, noise(7000, 2), x)[1]
    assert not S[:, [1, 4]].any()
    counts = torch.bincount(S.sum(1), minlength=5)
    assert len(counts) == 5 and (counts - 1400).abs().max() < 5 * math.sqrt(1400)


def test_labelled_batches_pair_tokens_with_their_labels(vae):
    images = labelled(vae, 30)
    batches, seen = probe.LabelledBatches(images, vae, seed=3), []
    for step in range(3):
        x, target = batches(step)
        assert x.shape == (128, 6, 12)
        assert torch.equal(target, (x.mean((1, 2)) * 255 / 80).long())  # brightness says the class, from 0 on
        seen.append(x)
    assert not torch.equal(seen[0], seen[1]) and torch.equal(batches(1)[0], seen[1])
    assert len(torch.cat(seen).unique(dim=0)) == 30


def test_the_logits_are_linear_in_the_mean_of_p_z_given_x_s(vae):
    model = probe.LabelledViT(vae.net, torch.tensor([5, 9, 9, 2])).double()
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    x, S = pictures(vae), masks.random(N, vae.num_tokens, 0.5, seed=0)
    logits = vae.encode(x, S).mean @ model.head.weight.T + model.head.bias
    tokens = vae.tokenizer.encode(x)
    assert_close(model(tokens, S), logits, rtol=1e-10, atol=1e-12)
    assert torch.equal(model.predict(tokens, S), torch.tensor([2, 5, 9])[logits.argmax(1)])
    two = probe.LabelledViT(vae.net, torch.zeros(4, 2)).double()
    nn.init.normal_(two.head.weight, generator=torch.Generator().manual_seed(0))
    assert torch.equal(two.predict(tokens, S), (two(tokens, S) > 0).long())


@pytest.fixture
def single() -> BigLearnVAE:
    tokenizer = Patchify((4, 6), 2, 3)
    return BigLearnVAE(network(tokenizer), tokenizer)


def test_the_ceiling_learns_what_the_labels_say(single):
    train, test = labelled(single, 200), labelled(single, 100, seed=1)
    before = {name: value.clone() for name, value in single.net.state_dict().items()}
    ceiling = probe.train_ceiling(network(single.tokenizer), single, train, RECIPE, steps=300)
    assert_close(dict(single.net.state_dict()), before, rtol=0, atol=0)  # the probed network is frozen
    assert not any(part.training for part in ceiling.modules())
    result = probe.linear_probe(single, train, test, [1.0, 0.5], draws=2, ceiling=ceiling)
    assert result["ceiling"][1.0]["mean"] > 0.97 and result["ceiling"][0.5]["mean"] > 0.9
    for draw in range(2):
        S = masks.random(100, 6, 0.5, seed=probe.mask_seeds(0, 0.5, draw)[1])
        predicted = ceiling.predict(single.tokenizer.encode(test[:]), S)
        assert result["ceiling"][0.5]["draws"][draw] == accuracy_score(test.labels, predicted)


@pytest.mark.parametrize("hidden", ["mask", "drop"])
def test_a_trainer_learns_from_the_ceiling_whether_its_shapes_change(hidden):
    net = UniversalViT(grid=(2, 3), token_dim=12, dim=16, depth=2, z_dim=Z, heads=2, hidden=hidden)
    assert probe.LabelledViT(net, torch.arange(3)).fixed_shapes == net.fixed_shapes == (hidden == "mask")


def test_the_ceiling_repeats_for_a_seed(single):
    train = labelled(single, 200)
    weights = [
        dict(probe.train_ceiling(network(single.tokenizer), single, train, RECIPE, steps=3, seed=seed).state_dict())
        for seed in (0, 0, 1)
    ]
    assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.equal(weights[0]["head.weight"], weights[2]["head.weight"])


def test_a_fit_takes_one_thread_whatever_there_are():
    x, y, found = noise(600, 300).float(), torch.arange(600) % 3, []
    before = torch.get_num_threads()
    for threads in (1, 3):
        with threadpool_limits(threads):
            found.append(probe.fit(x, y).pipeline[-1].coef_)
            assert all(pool["num_threads"] == threads for pool in threadpool_info())
    assert np.array_equal(*found) and torch.get_num_threads() == before


# --- the nearest training images ---


def votes_by_hand(x: np.ndarray, seen: np.ndarray, train: np.ndarray, labels: list[int], count: int) -> int:
    """The class that most of the nearest images have over pixels that are seen; of equals, that of the nearer ones."""
    if not seen.any():
        return Counter(sorted(labels)).most_common(1)[0][0]
    order = sorted(range(len(train)), key=lambda k: ((train[k] - x)[seen] ** 2).sum())[:count]
    near = [labels[k] for k in order]
    most = max(map(near.count, near))
    tied = [label for label in set(near) if near.count(label) == most]
    return min(tied, key=lambda label: (sum(place for place, other in enumerate(near) if other == label), label))


@pytest.mark.parametrize("neighbours", [1, 2, 4, 7, 50])
def test_nearest_classes_are_those_of_a_search_by_hand(vae, neighbours):
    train, test = labelled(vae, 50), labelled(vae, 12, seed=1)
    train = replace(train, pixels=torch.randint_like(train.pixels, 256))  # which say nothing: votes are divided
    S = torch.stack([masks.random(12, vae.num_tokens, ratio, seed=3) for ratio in (0.0, 0.2, 0.5, 1.0)], 1)
    found = probe.nearest_classes(vae, test, S, train, neighbours)
    assert found.shape == (12, 4)
    x, y = (part[:].double().numpy() for part in (test, train))
    for n, r in itertools.product(range(12), range(4)):
        seen = vae.pixel_mask(S[n : n + 1, r])[0].expand(vae.image_shape).numpy()
        assert found[n, r] == votes_by_hand(x[n], seen, y, train.labels.tolist(), neighbours)


def test_what_was_never_recorded_tells_nothing_of_the_class(vae):
    train, test = labelled(vae, 50), labelled(vae, 12, seed=1)
    recorded = masks.random(12, vae.num_tokens, 0.5, seed=1)
    holes = test[:].masked_fill(~vae.pixel_mask(recorded), math.nan)
    S = torch.stack([masks.random(12, vae.num_tokens, ratio, seed=3) for ratio in (0.5, 1.0)], 1)
    found = probe.nearest_classes(vae, holes, S, train)
    assert torch.equal(found, probe.nearest_classes(vae, test, S & recorded.unsqueeze(1), train))
    for neighbours in (0, -1):
        with pytest.raises(ValueError, match="neighbours must be at least 1"):
            probe.nearest_classes(vae, test, S, train, neighbours)


def test_nearest_attributes_are_those_that_are_more_frequent_nearby(vae):
    train, test = labelled(vae, 40), labelled(vae, 12, seed=1)
    y = torch.stack([(train.labels == 20).long(), torch.zeros(40).long(), torch.full((40,), -1)], 1)
    y[::3, 0] = -1
    train = ImageSet(train.pixels, y)
    S = torch.stack([masks.random(12, vae.num_tokens, ratio, seed=3) for ratio in (0.0, 1.0)], 1)
    found = probe.nearest_classes(vae, test, S, train, 5)
    assert found.shape == (12, 2, 3) and not found[:, 0].any() and not found[..., 1:].any()
    pixels = train[:].flatten(1)
    for x, one in zip(test[:].flatten(1), found[:, 1, 0], strict=True):
        near = y[(pixels - x).square().sum(1).argsort()[:5], 0]
        of_near, of_all = (column[column >= 0] for column in (near, y[:, 0]))
        assert one == (len(of_near) > 0 and of_near.double().mean() > of_all.double().mean())


@pytest.mark.parametrize("neighbours", [1, 4, 50])
def test_nearest_codes_vote_like_nearest_images(neighbours):
    y, train, test = torch.arange(50) % 3 + 10, noise(50, 5).float(), noise(12, 5, seed=1).float()
    found = probe.nearest_by_codes(train, y, test, neighbours)
    everywhere = np.ones(5, dtype=bool)
    for x, label in zip(test.numpy(), found.tolist(), strict=True):
        assert label == votes_by_hand(x, everywhere, train.numpy(), y.tolist(), neighbours)
    many = probe.nearest_by_codes(train, y, test.repeat(200, 1), neighbours)  # which are compared in parts
    assert torch.equal(many, found.repeat(200))
    attributes = torch.stack([y == 10, y < 0], 1).long()
    nearest = probe.nearest_by_codes(train, attributes, train, 1)
    assert torch.equal(nearest, attributes)  # each is nearest to itself
    same = 1 + 1e-6 * noise(50, 5, seed=2).float()  # codes of nothing
    rare = torch.cat([y[:20], y.new_full((30,), 12)])
    assert (probe.nearest_by_codes(same, rare, test, neighbours) == 12).all()
    assert not probe.nearest_by_codes(same, attributes, test, neighbours).any()
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        probe.nearest_by_codes(train, y, test, 0)


# --- all together ---


def test_the_probe_is_its_parts_draw_by_draw(vae, monkeypatch):
    train, test = labelled(vae, 60), labelled(vae, 40, seed=1)
    result = probe.linear_probe(vae, train, test, [1.0, 0.5], draws=3, seed=4)
    assert list(result) == ["metric", "neighbours", "codes", "nearest_codes", "pixels", "nearest"]
    assert result["metric"] == "accuracy" and result["neighbours"] == probe.NEIGHBOURS
    for name, extract in (("codes", probe.features), ("pixels", probe.pixels)):
        for ratio, numbers in result[name].items():
            scores = []
            for draw in range(3):
                seeds = probe.mask_seeds(4, ratio, draw)
                x, y = (extract(vae, part[:], ratio, seed) for part, seed in zip((train, test), seeds, strict=True))
                scores.append(probe.fit_and_score(x, train.labels, y, test.labels).value)
                if name == "codes":
                    right = probe.nearest_by_codes(x, train.labels, y) == test.labels
                    assert result["nearest_codes"][ratio]["draws"][draw] == right.double().mean()
            assert numbers["draws"] == scores and numbers["unconverged"] == 0
            assert numbers["mean"] == pytest.approx(np.mean(scores))
            assert numbers["std"] == pytest.approx(np.std(scores, ddof=1))
    for ratio, numbers in result["nearest"].items():
        seeds = [probe.mask_seeds(4, ratio, draw)[1] for draw in range(3)]
        S = torch.stack([masks.random(40, vae.num_tokens, ratio, seed=seed) for seed in seeds], 1)
        right = probe.nearest_classes(vae, test, S, train) == test.labels.unsqueeze(-1)
        assert numbers["draws"] == right.double().mean(0).tolist() and numbers["unconverged"] == 0
    assert len(set(result["codes"][0.5]["draws"])) > 1
    assert probe.linear_probe(vae, train, test, [0.5], draws=3, seed=4, raw=False) == {
        "metric": "accuracy",
        "neighbours": 10,
        "codes": {0.5: result["codes"][0.5]},
        "nearest_codes": {0.5: result["nearest_codes"][0.5]},
    }
    alone = probe.linear_probe(vae, train, test, [0.5], draws=3, seed=4, raw=False, neighbours=10)
    assert list(alone) == ["metric", "neighbours", "codes", "nearest_codes", "nearest"]
    assert all(alone[name][0.5] == result[name][0.5] for name in ("nearest_codes", "nearest"))
    none = probe.linear_probe(vae, train, test, [0.5], draws=1, raw=False, neighbours=0)
    assert list(none) == ["metric", "neighbours", "codes"] and none["neighbours"] == 0
    with pytest.raises(ValueError, match="neighbours must be at least 0"):
        probe.linear_probe(vae, train, test, [0.5], neighbours=-1)
    monkeypatch.setattr(probe, "RAW_NUMBERS", math.prod(vae.image_shape) - 1)
    assert "pixels" not in probe.linear_probe(vae, train, test, [0.5], draws=1)  # of large images they are left out
    single = probe.linear_probe(vae, train, test, [0.5], draws=1, seed=4)["codes"][0.5]
    assert single["mean"] == result["codes"][0.5]["draws"][0] and single["std"] is None


def test_of_equal_channels_one_is_probed(vae):
    def grey(count: int, seed: int) -> ImageSet:
        images = labelled(vae, count, seed)
        return ImageSet(images.pixels[:, :1].expand_as(images.pixels), images.labels)

    sets, seeds = (grey(60, 0), grey(40, 1)), probe.mask_seeds(0, 0.5, 0)
    (x, y), (more, _) = (
        [probe.pixels(vae, part[:][:, :channels], 0.5, seed=seed) for part, seed in zip(sets, seeds, strict=True)]
        for channels in (1, vae.image_shape[0])
    )
    labels = [part.labels for part in sets]
    assert more.shape[1] == vae.image_shape[0] * x.shape[1] > x.shape[1]
    expected = probe.fit_and_score(x, labels[0], y, labels[1]).value
    assert probe.linear_probe(vae, *sets, [0.5], draws=1)["pixels"][0.5]["draws"] == [expected]
    one, all_of_them = (probe.fit(features, labels[0]).pipeline for features in (x, more))
    assert_close(one.predict_proba(x.numpy()), all_of_them.predict_proba(more.numpy()), rtol=0.02, atol=2e-3)
    colour = (sets[0], labelled(vae, 40, seed=1))  # of one of the sets: all channels of both
    x, y = (probe.pixels(vae, part[:], 0.5, seed=seed) for part, seed in zip(colour, seeds, strict=True))
    expected = probe.fit_and_score(x, labels[0], y, colour[1].labels).value
    assert probe.linear_probe(vae, *colour, [0.5], draws=1)["pixels"][0.5]["draws"] == [expected]


def test_attributes_of_images(single):
    sets = []
    for count, seed in ((80, 0), (50, 1)):
        images = labelled(single, count, seed)
        y = torch.stack([images.labels >= 10, images.labels == 20, images.labels >= 0], dim=1).long()
        y[::5, 0] = -1
        sets.append(ImageSet(images.pixels, y))
    ceiling = probe.train_ceiling(network(single.tokenizer), single, sets[0], RECIPE, steps=2)
    result = probe.linear_probe(single, *sets, [1.0, 0.5], draws=2, ceiling=ceiling)
    assert result["metric"] == "balanced accuracy"
    for name in ("codes", "pixels", "ceiling"):
        for numbers in result[name].values():
            assert len(numbers["attributes"]) == 3 and numbers["attributes"][2] is None
            assert numbers["mean"] == pytest.approx(statistics.fmean(numbers["attributes"][:2]))
    assert result["pixels"][1.0]["mean"] == 1  # brightness says it all
    seeds = probe.mask_seeds(0, 0.5, 0)
    predicted = ceiling.predict(single.tokenizer.encode(sets[1][:]), masks.random(50, 6, 0.5, seed=seeds[1]))
    known = sets[1].labels[:, 0] >= 0
    of_each = [
        balanced_accuracy_score(sets[1].labels[known, 0], predicted[known, 0]),
        balanced_accuracy_score(sets[1].labels[:, 1], predicted[:, 1]),
    ]
    assert result["ceiling"][0.5]["draws"][0] == pytest.approx(statistics.fmean(of_each))
