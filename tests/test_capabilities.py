import math
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian, noise
from torch import Tensor, nn
from torch.distributions import Normal

from biglearn_vae import BigLearnVAE, DiagGaussian, PatchAE, Patchify, TwoStackViT, UniversalViT, gaussian, masks
from biglearn_vae.capabilities import Sensitivity, check_calls
from biglearn_vae.distributed import derive_seed

B, Z = 5, 3


def make(name: str = "universal", **settings) -> BigLearnVAE:
    """An untrained tiny model, the two-stack one in colour: nothing here depends on what was learned."""
    tokenizer = Patchify((6, 8), 2, 3) if name == "two-stack" else Patchify(8, 2, 1)
    sizes = dict(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, z_dim=Z, heads=2)
    torch.manual_seed(0)
    net = TwoStackViT(**sizes, depth=(1, 2)) if name == "two-stack" else UniversalViT(**sizes, depth=2)
    with torch.no_grad():
        for parameter in net.parameters():  # no parameter at a special value such as a zero bias
            parameter += 0.1 * torch.randn_like(parameter)
    return BigLearnVAE(net, tokenizer, **settings)


@pytest.fixture(params=["universal", "two-stack"])
def vae(request) -> BigLearnVAE:
    return make(request.param)


def pictures(vae: BigLearnVAE, count: int = B, seed: int = 0) -> Tensor:
    return torch.rand(count, *vae.image_shape, generator=torch.Generator().manual_seed(seed))


def some(vae: BigLearnVAE, count: int = B, seed: int = 0) -> Tensor:
    return masks.random(count, vae.num_tokens, 0.5, seed=seed)


def pixels_of(vae: BigLearnVAE, S: Tensor) -> Tensor:
    """Patch masks (B, L) -> pixel masks (B, H, W), by the tokenizer."""
    tokens = S.unsqueeze(-1).expand(-1, -1, vae.tokenizer.token_dim).float()
    return vae.tokenizer.decode(tokens)[:, 0].bool()


def latents(count: int = B, seed: int = 0) -> Tensor:
    return noise(seed, count, Z)


def images_of(vae: BigLearnVAE, tokens: Tensor, x: Tensor | None = None, S: Tensor | None = None) -> Tensor:
    """The network's tokens as images in [0, 1], with what is observed of the tokens x in its place."""
    tokens = tokens.clamp(0, 1)
    return vae.tokenizer.decode(tokens if x is None else torch.where(S.unsqueeze(-1), x, tokens))


def parts(result) -> list[Tensor]:
    """The tensors of any result."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, DiagGaussian):
        return [result.mean, result.logvar]
    return parts(result.before) + parts(result.after)


def close(one, other) -> None:
    tolerance = 1e-10 if parts(one)[0].dtype == torch.float64 else 5e-6  # results of other batches round differently
    torch.testing.assert_close(parts(one), parts(other), rtol=tolerance, atol=tolerance)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


def batch_of(vae: BigLearnVAE, x: Tensor) -> tuple[int, ...]:
    """(B,), or () for a single image or its tokens."""
    return () if tuple(x.shape) in (vae.image_shape, (vae.num_tokens, vae.tokenizer.token_dim)) else (len(x),)


def beside(vae: BigLearnVAE, x: Tensor) -> Tensor:
    """Other images, as many as x."""
    return pictures(vae, *batch_of(vae, x), seed=8) if batch_of(vae, x) else pictures(vae, 1, seed=8)[0]


def latents_for(vae: BigLearnVAE, x: Tensor, *draws: int) -> Tensor:
    return noise(0, *draws, *batch_of(vae, x), Z)


def upper(vae: BigLearnVAE, S: Tensor) -> Tensor:
    """The upper half of an image as a mask of the same form as S."""
    half, size = masks.half(vae.grid, "top"), vae.image_shape[1:]
    return masks.to_pixels(half, vae.grid, size) if tuple(S.shape[-2:]) == size else half


CALLS = {  # every method that takes data, as a function of data and mask alone; K = 2 or 3 so that no axis is 1
    "encode": lambda vae, x, S: vae.encode(x, S),
    "decode": lambda vae, x, S: vae.decode(latents_for(vae, x), x, S),
    "decode, several": lambda vae, x, S: vae.decode(latents_for(vae, x, 2), x, S),
    "reconstruct": lambda vae, x, S: vae.reconstruct(x, S, seed=3),
    "reconstruct, several": lambda vae, x, S: vae.reconstruct(x, S, draws=2, seed=3),
    "inpaint": lambda vae, x, S: vae.inpaint(x, S, seed=3),
    "inpaint, several": lambda vae, x, S: vae.inpaint(x, S, draws=3, seed=3),
    "inpaint, in passes": lambda vae, x, S: vae.inpaint(x, S, draws=2, seed=3, passes=3),
    "combine": lambda vae, x, S: vae.inpaint(*vae.combine((x, S), (beside(vae, x), masks.half(vae.grid))), seed=3),
    "decoding_sensitivity": lambda vae, x, S: vae.decoding_sensitivity(x, S, dims=[2, 0]),
    "encoding_sensitivity": lambda vae, x, S: vae.encoding_sensitivity(x, S, torch.tensor(0.3)),
    "log_weights": lambda vae, x, S: vae.log_weights(x, S, samples=3, seed=3),
    "log_prob, marginal": lambda vae, x, S: vae.log_prob(x, S, samples=3, variance=0.1, seed=3),
    "log_prob, conditional": lambda vae, x, S: vae.log_prob(x, S & ~upper(vae, S), S & upper(vae, S), 3, seed=3),
    "log_prob, in passes": lambda vae, x, S: vae.log_prob(x, S, samples=3, seed=3, passes=2),
}
WHOLE = {  # those for which what is outside S counts as well
    "interpolate": lambda vae, x, S: vae.interpolate(x, beside(vae, x), 3, S),
    "log_prob of the rest": lambda vae, x, S: vae.log_prob(x, given=S, samples=3, seed=3, unit="bits_per_dim"),
}
every_call = pytest.mark.parametrize("call", (CALLS | WHOLE).values(), ids=CALLS | WHOLE)
every_masked_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def as_images(vae: BigLearnVAE, x: Tensor) -> Tensor:
    return x


def as_tokens(vae: BigLearnVAE, x: Tensor) -> Tensor:
    return vae.tokenizer.encode(x)


every_pair = pytest.mark.parametrize(
    ("form", "other_form"), [(as_images, as_images), (as_images, as_tokens), (as_tokens, as_images)]
)


def test_sizes():
    vae, colour = make(), make("two-stack")
    assert (vae.num_tokens, vae.grid, vae.z_dim, vae.image_shape) == (16, (4, 4), Z, (1, 8, 8))
    assert (colour.num_tokens, colour.grid, colour.z_dim, colour.image_shape) == (12, (3, 4), Z, (3, 6, 8))
    assert vae.device == torch.device("cpu")


def test_results_carry_no_gradient_and_the_net_can_still_train():
    net = UniversalViT(grid=(4, 4), token_dim=4, dim=16, depth=1, z_dim=Z).train()
    vae = BigLearnVAE(net, Patchify(8, 2, 1))
    assert vae.net is net and not any(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    x = pictures(vae).requires_grad_()
    for call in (CALLS | WHOLE).values():
        assert not any(part.requires_grad for part in parts(call(vae, x, some(vae))))


# --- what each method computes ---


def test_encode_is_the_net(vae):
    x, S = pictures(vae), some(vae)
    tokens = vae.tokenizer.encode(x)
    q, expected = vae.encode(x, S), vae.net(tokens, S)
    close(q.mean, expected.mean)
    close(q.logvar, expected.logvar)
    assert q.mean.shape == q.logvar.shape == (B, Z)
    everything = vae.net(tokens, torch.ones_like(S))
    close(vae.encode(x).mean, everything.mean)
    assert same(vae.encode(x), vae.encode(x, torch.ones_like(S)))


def test_encode_nothing_is_the_learned_prior(vae):
    nothing = torch.zeros(B, vae.num_tokens, dtype=torch.bool)
    p = vae.net(torch.zeros(B, vae.num_tokens, vae.tokenizer.token_dim), nothing)
    for seed in (0, 1):
        q = vae.encode(pictures(vae, seed=seed), nothing)
        close(q.mean, p.mean)
        close(q.logvar, p.logvar)


@pytest.mark.parametrize("name", ["universal", "two-stack"])
def test_encode_nothing_is_standard_normal_for_the_ordinary_vae(name):
    vae, learned = make(name, prior="standard"), make(name)
    x, S = pictures(vae), some(vae)
    S[::2] = False
    q = vae.encode(x, S)
    assert not q.mean[::2].any() and not q.logvar[::2].any()
    assert same(q[1::2], learned.encode(x, S)[1::2])
    assert learned.encode(x, S).mean[::2].all()
    close(vae.inpaint(x[0], S[0], draws=4, seed=2), vae.sample(4, seed=2))


def test_decode_is_the_net(vae):
    x, S, z = pictures(vae), some(vae), latents()
    tokens = vae.tokenizer.encode(x)
    nothing = torch.zeros_like(S)
    close(vae.decode(z), images_of(vae, vae.net(tokens, nothing, z)))
    close(vae.decode(z, x, S), images_of(vae, vae.net(tokens, S, z), tokens, S))
    assert torch.equal(vae.decode(z, x, nothing), vae.decode(z))


def test_decode_several_latents_under_one_image(vae):
    x, S, z = pictures(vae, 1), some(vae, 1), latents()
    expected = vae.decode(z, x.expand(B, -1, -1, -1), S.expand(B, -1))
    assert torch.equal(vae.decode(z, x, S), expected)
    assert torch.equal(vae.decode(z, x[0], S[0]), expected)


def test_decode_draws_of_latents(vae):
    x, S, z = pictures(vae), some(vae), noise(0, 3, B, Z)
    close(vae.decode(z), torch.stack([vae.decode(one) for one in z]))
    close(vae.decode(z, x, S), torch.stack([vae.decode(one, x, S) for one in z]))
    close(vae.decode(z, x[0], S[0]), torch.stack([vae.decode(one, x[0], S[0]) for one in z]))


def test_decode_takes_latents_of_any_precision(vae):
    z = latents()
    assert torch.equal(vae.decode(z.double()), vae.decode(z))
    assert torch.equal(
        vae.decode(z.double(), pictures(vae).double(), some(vae)), vae.decode(z, pictures(vae), some(vae))
    )


def test_reconstruct_by_its_formula(vae):
    x, S = pictures(vae), some(vae)
    for given, seen in ((None, torch.ones_like(S)), (S, S)):
        tokens = vae.tokenizer.encode(x)
        q = vae.net(tokens, seen)
        z = q.mean + (0.5 * q.logvar).exp() * noise(11, B, Z)
        expected = images_of(vae, vae.net(tokens, torch.zeros_like(S), z))
        close(vae.reconstruct(x, given, seed=11), expected)
        several = torch.stack([vae.decode(q.mean + q.std * e) for e in noise(11, 4, B, Z)])
        close(vae.reconstruct(x, given, draws=4, seed=11), several)


def test_inpaint_by_its_formula(vae):
    x, S = pictures(vae), some(vae)
    tokens = vae.tokenizer.encode(x)
    q = vae.net(tokens, S)
    several = vae.inpaint(x, S, draws=4, seed=5)
    assert several.shape == (4, B, *vae.image_shape)
    for result, e in zip(several, noise(5, 4, B, Z), strict=True):
        z = q.mean + (0.5 * q.logvar).exp() * e
        close(result, images_of(vae, vae.net(tokens, S, z), tokens, S))


@pytest.mark.parametrize("name", ["universal", "two-stack"])
@pytest.mark.parametrize("n", [1, 6])
def test_sample_by_its_formula(name, n):
    for prior in ("learned", "standard"):
        vae = make(name, prior=prior)
        nothing = torch.zeros(n, vae.num_tokens, dtype=torch.bool)
        zeros = torch.zeros(n, vae.num_tokens, vae.tokenizer.token_dim)
        z = noise(2, n, Z)
        if prior == "learned":
            p = vae.net(zeros, nothing)
            z = p.mean + (0.5 * p.logvar).exp() * z
        close(vae.sample(n, seed=2), images_of(vae, vae.net(zeros, nothing, z)))


@pytest.mark.parametrize("form", [as_images, as_tokens])
@pytest.mark.parametrize("draws", [None, 3])
def test_inpaint_in_passes_goes_on_from_what_it_completed(vae, form, draws):
    x, S, passes = form(vae, pictures(vae)), some(vae), 3
    S[0], S[1, 1:] = True, True  # nothing is missing, and fewer patches than there are passes
    result = vae.inpaint(x, S, draws, 5, passes)
    several = result if draws else result.unsqueeze(0)
    turns = masks.turns(~S.repeat(len(several), 1), passes, derive_seed("turns", 5)).view(len(several), *S.shape)
    seen, flat = S.repeat(len(several), 1), several.flatten(0, 1)
    for turn in range(passes):
        if turn == 0:
            one = vae.inpaint(x, S, draws, 5).view(flat.shape)
        else:
            one = vae.inpaint(flat, seen, seed=derive_seed("pass", turn, 5))
        own = (turns == turn).flatten(0, 1)
        assert own.any()
        close(torch.where(vae.pixel_mask(own), flat, 0), torch.where(vae.pixel_mask(own), one, 0))
        seen = seen | own
    assert seen.all()
    close(several, torch.where(vae.pixel_mask(S), pictures(vae), several))


@pytest.mark.parametrize("form", [as_images, as_tokens])
def test_passes_of_codes_observe_what_was_decoded_and_what_was_given_as_it_came(form):
    torch.manual_seed(3)
    ae = PatchAE(image_size=8, patch_size=4, channels=1, width=4).eval()
    net = UniversalViT(grid=ae.grid, token_dim=ae.token_dim, dim=16, depth=1, z_dim=Z, heads=2)
    vae, calls = BigLearnVAE(net, ae), []
    x = pictures(vae)
    S = torch.tensor([[True, False, False, False]]).expand(B, -1)
    given = form(vae, x)
    net.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    result = vae.inpaint(given, S, seed=1, passes=3)
    encodings = [inputs for inputs in calls if len(inputs) == 2]
    assert [int(mask[0].sum()) for _, mask in encodings] == [1, 2, 3]
    tokens, mask = encodings[-1]
    torch.testing.assert_close(tokens[mask & ~S], ae.encode(result).detach()[mask & ~S], rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens[S], ae.encode(x).detach()[S]) and (tokens[~mask] == 0).all()


def test_samples_in_passes_complete_nothing(vae):
    nothing = torch.zeros(vae.num_tokens, dtype=torch.bool)
    expected = vae.inpaint(torch.zeros(vae.image_shape), nothing, draws=4, seed=2, passes=5)
    assert torch.equal(vae.sample(4, seed=2, passes=5), expected)
    assert not torch.equal(expected, vae.sample(4, seed=2))


def test_one_pass_is_the_default_and_there_is_at_most_one_a_patch(vae):
    x, S, L = pictures(vae), some(vae), vae.num_tokens
    assert torch.equal(vae.sample(2, seed=1, passes=1), vae.sample(2, seed=1))
    assert torch.equal(vae.sample(2, seed=1, passes=L), vae.sample(2, seed=1, passes=10 * L))
    assert torch.equal(vae.inpaint(x, S, seed=1, passes=L // 2), vae.inpaint(x, S, seed=1, passes=L))
    assert torch.equal(vae.log_prob(x, seed=1, passes=1), vae.log_prob(x, seed=1))
    assert torch.equal(vae.log_prob(x, S, seed=1, passes=L // 2), vae.log_prob(x, S, seed=1, passes=L))


@every_pair
def test_combine_parts_of_one_image(vae, form, other_form):
    x, S1, S2 = pictures(vae), some(vae, seed=1), some(vae, seed=2)
    assert (S1 & ~S2).any() and (S2 & ~S1).any() and (S1 & S2).any()
    observations = (form(vae, x), S1), (other_form(vae, x), pixels_of(vae, S2))
    assert same(vae.encode(*vae.combine(*observations)), vae.encode(x, S1 | S2))
    assert same(vae.encode(*vae.combine(observations[0])), vae.encode(x, S1))
    assert same(vae.encode(*vae.combine(*observations, (x, ~S1))), vae.encode(x))
    single = vae.combine((form(vae, x)[0], S1[0]), (other_form(vae, x)[0], S2[0]))
    assert same(vae.encode(*single), vae.encode(x[0], S1[0] | S2[0]))


@every_pair
def test_combine_takes_each_patch_from_the_first_that_observes_it(vae, form, other_form):
    a, b, S1, S2 = pictures(vae, seed=1), pictures(vae, seed=2), some(vae, seed=1), some(vae, seed=2)
    first, second = (pixels_of(vae, mask).unsqueeze(1) for mask in (S1, S2))
    expected = torch.where(first, a, torch.where(second, b, 0))
    a, b = a.where(first, float("nan")), b.where(second, float("inf"))
    x, S = vae.combine((form(vae, a), S1), (other_form(vae, b), S2))
    assert torch.equal(S, S1 | S2)
    images = form is other_form is as_images
    assert torch.equal(x, expected if images else vae.tokenizer.encode(expected))


@pytest.mark.parametrize("steps", [2, 5])
def test_interpolate_by_its_formula(vae, steps):
    a, b, S = pictures(vae), pictures(vae, seed=1), some(vae)
    start, end = vae.encode(a).mean, vae.encode(b).mean
    free, bound = vae.interpolate(a, b, steps), vae.interpolate(a, b, steps, S)
    for i in range(steps):
        z = start + i / (steps - 1) * (end - start)
        close(free[i], vae.decode(z))
        close(bound[i], vae.decode(z, a, S))
    assert len(free) == len(bound) == steps
    close(free[-1], vae.decode(end))
    close(vae.interpolate(a, b, 3)[1], vae.decode((start + end) / 2))
    close(vae.interpolate(b, a, steps), free.flip(0))


def test_interpolation_from_parts_leaves_out_what_was_never_recorded(vae):
    a, b, S = pictures(vae), pictures(vae, seed=1), some(vae)
    other = S.roll(1, -1)
    lost = [torch.where(vae.pixel_mask(mask), x, torch.nan) for x, mask in ((a, S), (b, other))]
    start, end = vae.encode(a, S).mean, vae.encode(b, other).mean
    path = torch.lerp(start, end, torch.tensor([0.0, 0.5, 1.0]).view(-1, 1, 1))
    close(vae.interpolate(*lost, 3, S), vae.decode(path, a, S))


def test_the_pixel_mask_of_one_image(vae):
    S = some(vae)
    one = vae.pixel_mask(S[1])
    assert one.shape == (1, *vae.image_shape[1:]) and one.equal(vae.pixel_mask(S)[1])


@pytest.mark.parametrize("delta", [5.0, -2, [1.5, -3.0, 0.5], torch.tensor([1.5, -3.0, 0.5])])
@pytest.mark.parametrize("dims", [[2, 0, 2], torch.tensor([2, 0, 1])])
def test_decoding_sensitivity_by_its_formula(vae, dims, delta):
    x, S = pictures(vae), some(vae)
    result = vae.decoding_sensitivity(x, S, dims, delta)
    z = vae.encode(x, S).mean
    close(result.before, vae.decode(z, x, S))
    for i, (dim, moved_by) in enumerate(zip(dims, torch.as_tensor(delta).expand(3), strict=True)):
        moved = z.clone()
        moved[:, dim] += moved_by
        close(result.after[i], vae.decode(moved, x, S))
        assert not torch.allclose(result.after[i], result.before)


def test_decoding_sensitivity_by_default_moves_by_5_and_by_0_not_at_all(vae):
    x, S = pictures(vae), some(vae)
    assert same(vae.decoding_sensitivity(x, S, range(Z)), vae.decoding_sensitivity(x, S, [0, 1, 2], 5.0))
    still = vae.decoding_sensitivity(x, S, [1], 0.0)
    assert torch.equal(still.after[0], still.before)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32, torch.float64])
def test_encoding_sensitivity_by_its_formula(vae, precision):
    x, S, change = pictures(vae).to(precision), some(vae), 0.001 * noise(4, B, *vae.image_shape)
    before, after = vae.encode(x, S), vae.encode(x.float() + change, S)
    assert not same(before, after)
    tokens, change_of_tokens = vae.tokenizer.encode(x), vae.tokenizer.encode(change)
    close(vae.encoding_sensitivity(x, S, change), Sensitivity(before, after))
    close(vae.encoding_sensitivity(tokens, S, change_of_tokens.double()), Sensitivity(before, after))
    everywhere = vae.encode(x.float() + change[1], S)
    close(vae.encoding_sensitivity(x, S, change[1]).after, everywhere)  # one change for all
    close(vae.encoding_sensitivity(x[0], S[0], change[0]).after, after[0])
    close(vae.encoding_sensitivity(x, None, change).after, vae.encode(x.float() + change))


@pytest.mark.parametrize("outside", [float("nan"), float("inf"), 0.7])
def test_encoding_sensitivity_sees_no_change_outside(vae, outside):
    x, S = pictures(vae), some(vae)
    change = torch.where(pixels_of(vae, S).unsqueeze(1), 0.0, outside).expand_as(x)
    result = vae.encoding_sensitivity(x, S, change)
    assert same(result.after, result.before) and same(result.before, vae.encode(x, S))
    assert result.after.mean.isfinite().all()


# --- forms of data ---


@every_call
def test_images_and_tokens_are_the_same(vae, call):
    x, S = pictures(vae), some(vae)
    assert same(call(vae, x, S), call(vae, vae.tokenizer.encode(x), S))


@every_call
def test_bytes_are_divided_by_255(vae, call):
    x = (pictures(vae) * 255).round().to(torch.uint8)
    assert same(call(vae, x, some(vae)), call(vae, x.float() / 255, some(vae)))
    assert same(call(vae, x.double() / 255, some(vae)), call(vae, (x.double() / 255).float(), some(vae)))


@every_call
def test_a_single_one_is_a_batch_of_one(vae, call):
    x, S = pictures(vae, 1), some(vae, 1)
    expected = [part.squeeze(part.shape.index(1)) for part in parts(call(vae, x, S))]
    for one in (x[0], vae.tokenizer.encode(x)[0]):
        for mask in (S[0], S, pixels_of(vae, S)[0], pixels_of(vae, S)):
            torch.testing.assert_close(parts(call(vae, one, mask)), expected, rtol=0, atol=0)


def test_a_single_one_without_a_mask(vae):
    x, z = pictures(vae, 1), latents(1)
    assert torch.equal(vae.decode(z[0]), vae.decode(z)[0])
    assert same(vae.encode(x[0]), vae.encode(x)[0])
    assert torch.equal(vae.reconstruct(x[0], seed=1), vae.reconstruct(x, seed=1)[0])
    assert torch.equal(vae.interpolate(x[0], x[0] / 2), vae.interpolate(x, x / 2)[:, 0])
    assert torch.equal(vae.log_prob(x[0], samples=2, seed=1), vae.log_prob(x, samples=2, seed=1)[0])


def test_shapes_of_a_batch(vae):
    x, S, image = pictures(vae), some(vae), vae.image_shape
    shapes = {
        "encode": [(B, Z), (B, Z)],
        "decode": [(B, *image)],
        "decode, several": [(2, B, *image)],
        "reconstruct": [(B, *image)],
        "reconstruct, several": [(2, B, *image)],
        "inpaint": [(B, *image)],
        "inpaint, several": [(3, B, *image)],
        "inpaint, in passes": [(2, B, *image)],
        "combine": [(B, *image)],
        "decoding_sensitivity": [(B, *image), (2, B, *image)],
        "encoding_sensitivity": [(B, Z)] * 4,
        "log_weights": [(3, B)],
        "log_prob, marginal": [(B,)],
        "log_prob, conditional": [(B,)],
        "log_prob, in passes": [(B,)],
        "interpolate": [(3, B, *image)],
        "log_prob of the rest": [(B,)],
    }
    results = {name: parts(call(vae, x, S)) for name, call in (CALLS | WHOLE).items()}
    assert {name: [tuple(part.shape) for part in result] for name, result in results.items()} == shapes
    for name, result in results.items():
        assert all(part.dtype == (torch.float64 if "log" in name else torch.float32) for part in result)
    assert vae.decode(latents()).shape == (B, *image)
    assert vae.interpolate(x, x).shape == (9, B, *image)
    assert vae.sample(7).shape == (7, *image)
    assert vae.sample(1).shape == (1, *image)


def test_images_are_in_range(vae):
    with torch.no_grad():
        vae.net.token_out[-1].weight *= 30  # far outside on both sides
    x, S = pictures(vae).clamp(0.1, 0.9), some(vae)
    results = [part for call in (CALLS | WHOLE).values() for part in parts(call(vae, x, S))]
    images = [part for part in results if tuple(part.shape[-3:]) == vae.image_shape]
    assert len(images) == 11
    for part in (*images, vae.sample(4, seed=0), vae.decode(latents()), vae.interpolate(x, x.flip(0))):
        assert part.min() == 0 and part.max() == 1


# --- forms of masks ---


@every_call
def test_pixel_masks_are_patch_masks(vae, call):
    x, S = pictures(vae), some(vae)
    assert same(call(vae, x, pixels_of(vae, S)), call(vae, x, S))


@every_call
def test_one_mask_for_all(vae, call):
    x, S = pictures(vae), some(vae, 1)
    expected = call(vae, x, S.expand(B, -1))
    for mask in (S[0], S, pixels_of(vae, S)[0], pixels_of(vae, S)):
        assert same(call(vae, x, mask), expected)


@every_call
def test_a_patch_is_observed_if_all_of_its_pixels_are(vae, call):
    x, S = pictures(vae), some(vae)
    pixels = pixels_of(vae, S)
    first = int(S[0].int().argmax())  # an observed patch of the first image loses one pixel
    row, column = 2 * (first // vae.grid[1]) + 1, 2 * (first % vae.grid[1])
    assert pixels[0, row, column]
    pixels[0, row, column] = False
    S[0, first] = False
    kept = pixels.unsqueeze(1) & ~vae.pixel_mask(S)  # what is left of that patch, which completions leave as it is
    for found, expected in zip(parts(call(vae, x, pixels)), parts(call(vae, x, S)), strict=True):
        if tuple(found.shape[-3:]) == vae.image_shape and not found.equal(expected):
            if call is not CALLS["inpaint, in passes"]:  # the next passes see what was kept
                assert found.where(~kept, 0).equal(expected.where(~kept, 0))
            assert found.where(kept, 0).equal(x.where(kept, 0).expand_as(found))
        else:
            assert found.equal(expected)


@pytest.mark.parametrize("passes", [1, 3])
def test_single_pixels_that_are_observed_stay(vae, passes):
    x = pictures(vae)
    pixels = torch.rand(B, *vae.image_shape[1:], generator=torch.Generator().manual_seed(5)) < 0.8
    assert pixels.any((1, 2)).all() and (pixels & ~vae.pixel_mask(vae.observe(x, pixels).mask)[:, 0]).any()
    spoilt = x.where(pixels.unsqueeze(1), torch.nan)
    found = vae.inpaint(spoilt, pixels, draws=2, seed=3, passes=passes)
    kept = pixels.unsqueeze(1)
    assert found.isfinite().all() and found.where(kept, 0).equal(x.where(kept, 0).expand_as(found))
    if passes == 1:  # the network sees whole patches alone
        patches = vae.inpaint(x, vae.observe(x, pixels).mask, draws=2, seed=3)
        assert found.where(~kept, 0).equal(patches.where(~kept, 0))


def test_single_pixels_of_combined_observations_stay(vae):
    one, two, S = pictures(vae), pictures(vae).flip(0), some(vae)
    pixels = pixels_of(vae, S)
    pixels[:, 0] = True  # and a row of pixels of which only some patches are whole
    x, both = vae.combine((one, pixels), (two, S.roll(1, -1)))
    second = vae.pixel_mask(S.roll(1, -1)) & ~vae.pixel_mask(S)
    expected = one.where(pixels.unsqueeze(1), 0).where(~second, two)
    assert both.equal(pixels | second[:, 0]) and x.equal(expected)
    kept = both.unsqueeze(1)
    assert vae.inpaint(x, both, seed=3).where(kept, 0).equal(expected.where(kept, 0))
    alone, mask = vae.combine((one[0], pixels[0]))
    assert mask.equal(pixels[:1]) and vae.inpaint(alone, mask, seed=1).equal(vae.inpaint(one[0], pixels[0], seed=1))
    assert vae.combine((one, S), (two, S))[1].equal(S)  # masks of patches stay such
    halves = torch.zeros(B, *vae.image_shape[1:], dtype=torch.bool)
    halves[..., ::2] = True
    three = (one, halves), (one, ~halves), (two, S)  # two that make whole patches, of which a third then takes none
    assert all(map(torch.equal, vae.combine(*three), vae.combine(vae.combine(*three[:2]), three[2])))
    assert vae.combine(*three)[0].equal(one)


def test_patch_masks_that_look_like_pixel_masks():
    # 16 x 16 pixels in 16 patches, and a batch of 16: masks (B, L) have the shape of one of pixels (H, W).
    tokenizer = Patchify(16, 4, 1)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=1, z_dim=Z, heads=2)
    vae = BigLearnVAE(net, tokenizer)
    x, S = pictures(vae, 16), some(vae, 16)
    close(vae.encode(x, S).mean, vae.net(tokenizer.encode(x), S).mean)
    # What a mask means does not hang on how many images there are: (H, W) is never one of pixels here.
    top = masks.half(vae.grid)
    pixels = masks.to_pixels(top, vae.grid, (16, 16))
    with pytest.raises(ValueError, match=message("B = 5", "got (16, 16)", "as W = L", "is (1, 16, 16)")):
        vae.encode(x[:5], pixels)
    for count in (5, 16):
        assert same(vae.encode(x[:count], pixels[None]), vae.encode(x[:count], top))
    # So a combined observation of single images is one that every method takes.
    whole = vae.combine((x[0], pixels[None]), (x[0], ~pixels[None]))
    assert same(vae.encode(*whole), vae.encode(x[0]))


@every_masked_call
def test_pixel_masks_may_have_a_channel(vae, call):
    x, S = pictures(vae), some(vae)
    assert same(call(vae, x, vae.pixel_mask(S)), call(vae, x, S))
    assert same(call(vae, x, vae.pixel_mask(S[:1])), call(vae, x, S[:1]))


# --- what is observed stays, what is hidden has no influence ---


def test_observed_patches_come_back_bit_for_bit(vae):
    x, S = pictures(vae), some(vae)
    seen = pixels_of(vae, S).unsqueeze(1).expand_as(x)
    for result in (
        vae.inpaint(x, S),
        *vae.inpaint(x, S, draws=3),
        vae.decode(latents(), x, S),
        *vae.decode(noise(0, 2, B, Z), x, S),
        *vae.interpolate(x, pictures(vae, seed=1), 3, S),
        vae.decoding_sensitivity(x, S, [0, 1]).before,
        *vae.decoding_sensitivity(x, S, [0, 1]).after,
    ):
        assert torch.equal(result[seen], x[seen])
        assert not (result[~seen] == x[~seen]).any()
    everything = torch.ones_like(S)
    assert torch.equal(vae.inpaint(x, everything), x)
    assert torch.equal(vae.decode(latents(), x, everything), x)
    bytes_ = (x * 255).to(torch.uint8)
    assert torch.equal(vae.inpaint(bytes_, S)[seen], bytes_[seen].float() / 255)


@every_masked_call
def test_what_is_hidden_has_no_influence(vae, call):
    x, S = pictures(vae), some(vae)
    expected = call(vae, x, S)
    assert all(part.isfinite().all() for part in parts(expected))
    for other in (torch.tensor(float("nan")), torch.tensor(float("inf")), torch.tensor(0.0), pictures(vae, seed=9)):
        assert same(call(vae, torch.where(pixels_of(vae, S).unsqueeze(1), x, other), S), expected)


@every_call
def test_what_is_observed_has_influence(vae, call):
    x, S = pictures(vae), some(vae)
    changed = torch.where(pixels_of(vae, S).unsqueeze(1), pictures(vae, seed=9), x)
    assert not same(call(vae, changed, S), call(vae, x, S))


@every_call
def test_the_callers_tensors_are_left_alone(vae, call):
    x, S = pictures(vae), some(vae)
    call(vae, x, S)
    assert torch.equal(x, pictures(vae)) and torch.equal(S, some(vae))


def test_no_gradients_pass_through(vae):
    x, S = pictures(vae).requires_grad_(), some(vae)
    combined, observed = vae.combine((x, S), (x, ~S))[0], vae.observe(x, S)
    for result in (vae.encode(x, S).mean, vae.inpaint(x, S), combined, observed.tokens):
        assert not result.requires_grad


class Shifting(Patchify):
    """Does something else in training, as a batch norm does."""

    def encode(self, images: Tensor) -> Tensor:
        return super().encode(images) + self.training


def test_a_tokenizer_is_put_into_evaluation_mode():
    vae = make()
    other = BigLearnVAE(vae.net, Shifting(8, 2, 1))
    assert same(other.encode(pictures(vae)), vae.encode(pictures(vae)))


class Analytic(nn.Module):
    """A model that has nothing to learn: buffers alone, or not even these."""

    grid, num_tokens, token_dim, z_dim = (4, 4), 16, 4, 3

    def __init__(self, *buffers: Tensor):
        super().__init__()
        for number, buffer in enumerate(buffers):
            self.register_buffer(f"number{number}", buffer)

    def forward(self, x, S, z=None, T=None):
        return DiagGaussian(*x.new_zeros(2, len(x), 3)) if z is None else x.new_full(x.shape, 0.5)


@pytest.mark.parametrize("buffers", [(), (torch.arange(3), torch.zeros(2, dtype=torch.float64))])
def test_a_network_needs_no_parameters(buffers):
    vae = BigLearnVAE(Analytic(*buffers), Patchify(8, 2, 1))
    assert vae.dtype == (torch.float64 if buffers else torch.float32) and vae.device.type == "cpu"
    assert vae.sample(2, seed=0).eq(0.5).all() and vae.sample(2).shape == (2, 1, 8, 8)


def test_a_compiled_network_is_saved_as_what_it_is(tmp_path):
    vae = make()
    compiled = BigLearnVAE(torch.compile(vae.net, backend="eager"), vae.tokenizer)
    compiled.save(tmp_path / "model.pt")
    loaded = BigLearnVAE.from_file(tmp_path / "model.pt")
    assert type(loaded.net) is UniversalViT
    close(loaded.encode(pictures(vae)).mean, vae.encode(pictures(vae)).mean)


# --- seeds and draws ---


def test_seeds_repeat_and_differ(vae):
    x, S = pictures(vae), some(vae)
    calls = (
        lambda seed: vae.sample(B, seed=seed),
        lambda seed: vae.reconstruct(x, seed=seed),
        lambda seed: vae.inpaint(x, S, seed=seed),
        lambda seed: vae.inpaint(x, S, draws=2, seed=seed),
        lambda seed: vae.inpaint(x, S, seed=seed, passes=2),
        lambda seed: vae.sample(B, seed=seed, passes=2),
        lambda seed: vae.log_prob(x, S, samples=2, seed=seed, passes=2),
        lambda seed: vae.reconstruct(x, S, draws=2, seed=seed),
        lambda seed: vae.log_weights(x, S, samples=2, seed=seed),
        lambda seed: vae.log_prob(x, S, ~S, samples=2, seed=seed),
        lambda seed: vae.log_prob(x, samples=2, seed=seed, unit="bits_per_dim"),
        lambda seed: vae.encode(x, S).sample(seed=seed),
    )
    for call in calls:
        assert torch.equal(call(0), call(0))
        assert not torch.equal(call(0), call(1))
        assert not torch.equal(call(None), call(None))


def test_seeds_may_be_of_any_type(vae):
    x, S = pictures(vae), some(vae)
    for seed in (np.int64(3), torch.tensor(3)):
        assert torch.equal(vae.inpaint(x, S, seed=seed, passes=3), vae.inpaint(x, S, seed=3, passes=3))
        assert torch.equal(vae.log_prob(x, S, seed=seed, passes=3), vae.log_prob(x, S, seed=3, passes=3))


def test_a_seed_leaves_the_global_generator_alone(vae):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    vae.sample(2, seed=1), vae.inpaint(pictures(vae), some(vae), draws=2, seed=1, passes=2)
    vae.reconstruct(pictures(vae), seed=1), vae.log_prob(pictures(vae), samples=2, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_an_axis(vae):
    x, S = pictures(vae), some(vae)
    for method in (vae.inpaint, vae.reconstruct):
        assert torch.equal(method(x, S, draws=1, seed=4), method(x, S, seed=4).unsqueeze(0))
        five = method(x, S, draws=5, seed=4)
        assert all(not torch.equal(five[i], five[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("name", ["universal", "two-stack"])
@pytest.mark.parametrize("chunk", [1, 3, 15])
def test_chunks_change_nothing(name, chunk):
    whole, split = make(name), make(name, chunk=chunk)
    whole.net.double(), split.net.double()  # so that rounding, which depends on the batch, is far below the tolerance
    x, S, one = pictures(whole, 7), some(whole, 7), some(whole, 1)
    for call in (CALLS | WHOLE).values():
        close(call(split, x, S), call(whole, x, S))
    close(split.sample(7, seed=0), whole.sample(7, seed=0))
    close(split.sample(7, seed=0, passes=3), whole.sample(7, seed=0, passes=3))
    close(split.decode(latents(7)), whole.decode(latents(7)))
    close(split.decode(latents(7), x[0], one), whole.decode(latents(7), x[0], one))
    close(split.log_prob(x[0], samples=40, seed=0), whole.log_prob(x[0], samples=40, seed=0))


# --- densities ---

TASKS = {  # (T, S), None being the default
    "joint": lambda T, S: (None, None),
    "marginal": lambda T, S: (T, None),
    "conditional": lambda T, S: (T, S),
    "the rest": lambda T, S: (None, S),
}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def disjoint(seed: int, count: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """T and S that share no patch, of other sizes in each image."""
    S, T = masks.MaskSampler((1, 2), (2, 1))(count, num_tokens, torch.Generator().manual_seed(seed))
    S[0] = False  # as a conditional among others, too
    assert len(set(T.sum(-1).tolist())) > 2 and (S.sum(-1) > 1).any() and not (S | T).all()
    return T, S


@every_task
@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize(("samples", "variance"), [(1, None), (4, 0.05)])
def test_log_prob_by_its_formula(task, prior, samples, variance):
    vae = make(prior=prior, variance=0.3)
    vae.net.double()
    x = pictures(vae).double()
    tokens = vae.tokenizer.encode(x)
    T, S = task(*disjoint(0, B, vae.num_tokens))
    given = torch.zeros(B, vae.num_tokens, dtype=torch.bool) if S is None else S
    target = ~given if T is None else T
    q, p = vae.net(tokens, given | target), vae.net(tokens, given)
    std, generator = (variance or 0.3) ** 0.5, gaussian.generator(torch.device("cpu"), 6)
    log_weights = torch.zeros(samples, B, dtype=torch.float64)
    for k in range(samples):
        z = q.mean + q.std * torch.randn(B, Z, dtype=torch.float64, generator=generator)
        mean = vae.net(tokens, given, z)
        for b in range(B):
            ordinary = prior == "standard" and not given[b].any()
            p_b, q_b = Normal(0, 1) if ordinary else Normal(p.mean[b], p.std[b]), Normal(q.mean[b], q.std[b])
            log_weights[k, b] = Normal(mean[b], std).log_prob(tokens[b])[target[b]].sum()
            log_weights[k, b] += p_b.log_prob(z[b]).sum() - q_b.log_prob(z[b]).sum()
    bound = log_weights.logsumexp(0) - math.log(samples)
    bits = -bound / target.sum(-1) / vae.tokenizer.token_dim / math.log(2)
    arguments = (x, T, S, samples, variance, 6)
    close(vae.log_weights(*arguments), log_weights)
    close(vae.log_prob(*arguments), bound)
    close(vae.log_prob(*arguments, unit="bits_per_dim"), bits)


@every_task
@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize("samples", [1, 5])
def test_log_prob_is_exact_where_the_posterior_is(task, prior, samples):
    net = LinearGaussian()
    x = net.data(16)
    T, S = task(*disjoint(3, 16, 6))
    given = torch.zeros(16, 6, dtype=torch.bool) if S is None else S
    truth = net.log_prob(x, ~given if T is None else T, given)
    bound = net.model(prior).log_prob(x, T, S, samples=samples)
    close(bound, truth)
    chain = net.log_prob(x, given, torch.zeros_like(given)) + net.log_prob(x, ~given, given)
    close(net.model(prior).log_prob(x, samples=samples), chain)


@every_task
@pytest.mark.parametrize("prior", ["learned", "standard"])
@pytest.mark.parametrize("passes", [2, 4, 6])
def test_log_prob_in_passes_is_exact_where_the_posteriors_are(task, prior, passes):
    net = LinearGaussian()
    x = net.data(16)
    T, S = task(*disjoint(3, 16, 6))
    given = torch.zeros(16, 6, dtype=torch.bool) if S is None else S
    target = ~given if T is None else T
    truth = net.log_prob(x, target, given)
    bound = net.model(prior).log_prob(x, T, S, samples=2, seed=1, passes=passes)
    close(bound, truth)
    bits = net.model(prior).log_prob(x, T, S, 2, seed=1, passes=passes, unit="bits_per_dim")
    close(bits, -truth / math.log(2) / (4 * target.sum(-1)))


def test_log_prob_in_passes_is_the_sum_over_its_parts(vae):
    x, (T, S) = pictures(vae), disjoint(1, B, vae.num_tokens)
    T[:, :2], S[:, :2] = True, False  # at least one patch for each pass
    first = masks.turns(T, 2, derive_seed("turns", 4)) == 0
    total = vae.log_prob(x, first, S, 3, seed=4)
    total += vae.log_prob(x, T & ~first, S | first, 3, seed=derive_seed("pass", 1, 4))
    close(vae.log_prob(x, T, S, 3, seed=4, passes=2), total)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_log_prob_with_another_posterior_approaches_the_truth_from_below(conditional, seed):
    net, S = LinearGaussian(shift=1.0, widen=1.5), masks.random(64, 6, 0.5 * conditional, seed=4)
    x = net.data(64)
    gap = net.model().log_prob(x, given=S, samples=4096, seed=seed) - net.log_prob(x, ~S, S)
    assert gap.abs().max() > 1e-3  # the posterior is another one
    assert -0.02 < gap.mean() < 3 * gap.std() / 64**0.5


def test_log_prob_grows_with_the_number_of_samples():
    net, nothing = LinearGaussian(shift=1.0, widen=1.5), torch.zeros(512, 6, dtype=torch.bool)
    x = net.data(512)
    truth = net.log_prob(x, ~nothing, nothing)
    gaps = [net.model().log_prob(x, samples=K, seed=K) - truth for K in (1, 4, 16, 64)]
    assert all(one.mean() < more.mean() for one, more in pairwise(gaps))
    # With one sample it is Eq. 5's bound, which is off by the KL divergence of the two posteriors.
    kl = Z * (0.5 * (1.5**2 + 1.0**2 - 1) - math.log(1.5))
    assert abs(gaps[0].mean() + kl) < 3 * gaps[0].std() / 512**0.5


def test_log_probs_of_parts_add_up():
    net, A = LinearGaussian(shift=1.0, widen=1.5), masks.random(64, 6, 0.5, seed=4)
    x, vae = net.data(64), net.model()
    marginal, rest, joint = vae.log_prob(x, A), vae.log_prob(x, ~A, A, 4096, seed=1), vae.log_prob(x, None, None, 4096)
    assert abs((marginal + rest - joint).mean()) < 0.02


# --- errors ---


def message(*parts) -> str:
    """A pattern: these parts in this order."""
    return "(?s)" + ".*".join(re.escape(str(part)) for part in parts)


WRONG_DATA = {
    "size": (2, 1, 8, 6),
    "channels": (2, 3, 8, 8),
    "empty batch": (0, 1, 8, 8),
    "empty batch of tokens": (0, 16, 4),
    "no channel": (2, 8, 8),
    "tokens too few": (2, 15, 4),
    "tokens too wide": (2, 16, 5),
    "two batch axes": (2, 2, 1, 8, 8),
    "a number": (),
}


def attempts(vae: BigLearnVAE, x, S) -> tuple:
    """Each use of data x, for two images, and of a mask S of them."""
    right, everything = pictures(vae, 2), torch.ones(16, dtype=torch.bool)
    return (
        lambda: vae.encode(x, S),
        lambda: vae.decode(latents(2), x, S),
        lambda: vae.reconstruct(x, S),
        lambda: vae.inpaint(x, S),
        lambda: vae.combine((x, S)),
        lambda: vae.combine((right, everything), (x, S)),
        lambda: vae.interpolate(x, right, 3, S),
        lambda: vae.decoding_sensitivity(x, S, [0]),
        lambda: vae.encoding_sensitivity(x, S, torch.tensor(0.1)),
        lambda: vae.log_weights(x, S),
        lambda: vae.log_prob(x, S),
        lambda: vae.log_prob(x, given=S),
    )


def attempts_without_mask(vae: BigLearnVAE, x) -> tuple:
    return (
        lambda: vae.encode(x),
        lambda: vae.reconstruct(x),
        lambda: vae.interpolate(x, pictures(vae, 2)),
        lambda: vae.interpolate(pictures(vae, 2), x),
        lambda: vae.encoding_sensitivity(x, None, torch.tensor(0.1)),
        lambda: vae.log_prob(x),
    )


@pytest.mark.parametrize("shape", WRONG_DATA.values(), ids=WRONG_DATA)
def test_wrong_data(shape):
    vae, S = make(), torch.ones(16, dtype=torch.bool)
    x = torch.zeros(shape)
    for call in (*attempts(vae, x, S), *attempts_without_mask(vae, x)):
        with pytest.raises(ValueError, match=message("(B, 1, 8, 8)", "(B, 16, 4)", f"got {shape}")):
            call()


@pytest.mark.parametrize(
    ("convert", "got"),
    [(Tensor.numpy, "ndarray"), (Tensor.tolist, "list"), (Tensor.long, torch.int64), (Tensor.bool, torch.bool)],
)
def test_data_of_another_type(convert, got):
    vae, S = make(), torch.ones(16, dtype=torch.bool)
    x = convert(pictures(vae, 2))
    for call in (*attempts(vae, x, S), *attempts_without_mask(vae, x)):
        with pytest.raises(ValueError, match=message("tensor of images in [0, 1] or tokens", f"got {got}")):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_observed_values_that_are_not_finite(bad):
    vae, S = make(), torch.ones(2, 16, dtype=torch.bool)
    S[:, 3] = False
    x = pictures(vae, 2)
    x[1, 0, 5, 1:3] = bad  # patches 8 and 9
    for data in (x, vae.tokenizer.encode(x)):
        for call in (*attempts(vae, data, S), *attempts_without_mask(vae, data)):
            with pytest.raises(ValueError, match=message("finite", "got NaN or infinity in 2 observed patches")):
                call()


WRONG_MASKS = {
    "too short": (15,),
    "too long": (2, 17),
    "of another batch": (3, 16),
    "no axis": (),
    "wrong pixels": (8, 6),
    "one axis too many": (1, 2, 16),
    "grid": (4, 4),
    "empty": (0, 16),
    "pixels of another batch": (3, 8, 8),
    "pixels of none": (0, 8, 8),
    "pixels of several channels": (2, 2, 8, 8),
    "pixels with an axis more": (1, 2, 1, 8, 8),
}


@pytest.mark.parametrize("shape", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_wrong_masks(shape):
    vae, S = make(), torch.ones(shape, dtype=torch.bool)
    for call in attempts(vae, pictures(vae, 2), S):
        with pytest.raises(
            ValueError, match=message("(B, L)", "(B, H, W)", "B = 2", "L = 16", "8 x 8", f"got {shape}")
        ):
            call()


@pytest.mark.parametrize(
    ("convert", "got"),
    [
        (Tensor.float, torch.float32),
        (Tensor.byte, torch.uint8),
        (Tensor.long, torch.int64),
        (Tensor.numpy, "ndarray"),
        (Tensor.tolist, "list"),
    ],
)
@pytest.mark.parametrize("shape", [(16,), (2, 16), (8, 8), (2, 8, 8)])
def test_masks_that_are_not_boolean(convert, got, shape):
    vae = make()
    for call in attempts(vae, pictures(vae, 2), convert(torch.ones(shape, dtype=torch.bool))):
        with pytest.raises(ValueError, match=message("boolean", f"got {got}")):
            call()


@pytest.mark.parametrize("shape", [(2, Z + 1), (Z - 1,), (2, 2, 2, Z), (0, Z), (0, 2, Z), (2, 0, Z), ()])
def test_wrong_latents(shape):
    with pytest.raises(ValueError, match=message("(B, 3)", f"got {shape}")):
        make().decode(torch.zeros(shape))


@pytest.mark.parametrize(("convert", "got"), [(Tensor.numpy, "ndarray"), (Tensor.tolist, "list")])
def test_latents_of_another_type(convert, got):
    with pytest.raises(ValueError, match=message("latents", "(B, 3)", f"got {got}")):
        make().decode(convert(latents()))


def test_models_that_make_no_sense():
    net = make().net
    for settings, words in (
        (dict(prior="Learned"), "prior must be learned or standard, got 'Learned'"),
        (dict(prior=None), "prior must be learned or standard, got None"),
        (dict(chunk=0), "chunk must be at least 1, got 0"),
        (dict(chunk=1.5), r"chunk must be a whole number, got 1\.5"),
        (dict(chunk=None), "chunk must be a whole number, got None"),
        *(
            (dict(variance=v), rf"variance must be a number in \[0, inf\), got {v!r}")
            for v in (-1, float("nan"), float("inf"), None, "1")
        ),
    ):
        with pytest.raises(ValueError, match=words):
            make(**settings)
    for other in (Patchify((4, 16), 2, 1), Patchify(8, 2, 3)):  # as many tokens, or as many rows and columns
        with pytest.raises(ValueError, match=r"must give the network's \(4, 4\) tokens of 4 numbers, got"):
            BigLearnVAE(net, other)
    for part, got in (("outputs/run", "str"), (None, "NoneType"), (UniversalViT, "type"), (nn.Linear(2, 2), "Linear")):
        with pytest.raises(ValueError, match=message("a network such as UniversalViT, unwrapped", f"got {got}")):
            BigLearnVAE(part, Patchify(8, 2, 1))
        with pytest.raises(ValueError, match=message("a tokenizer such as Patchify", f"got {got}")):
            BigLearnVAE(net, part)
    with pytest.raises(ValueError, match=message("a network such as UniversalViT, unwrapped", "got Patchify")):
        BigLearnVAE(Patchify(8, 2, 1), net)


def test_where_the_sizes_fit_both_masks_are_of_patches_and_data_are_images():
    """Of 16 images of 16 x 16 pixels in patches of 4 x 4, masks (16, 16) could be either, (1, 16, 16) an image."""
    tokenizer = Patchify(16, 4, 1)
    torch.manual_seed(0)
    vae = BigLearnVAE(UniversalViT(grid=(4, 4), token_dim=16, dim=16, depth=1, z_dim=Z, heads=2), tokenizer)
    x, pixels = torch.rand(16, 1, 16, 16), torch.zeros(16, 16, dtype=torch.bool)
    pixels[8:] = True
    patches = masks.from_pixels(pixels, vae.grid)
    for S, same in ((pixels[None], patches), (pixels, pixels), (pixels.expand(16, -1, -1), patches)):
        assert torch.equal(vae.encode(x, S).mean, vae.encode(x, same.expand(16, -1)).mean)
    assert vae.encode(x[0]).mean.shape == (Z,)


def test_other_wrong_arguments():
    vae = make()
    x, S = pictures(vae, 2), some(vae, 2)
    with pytest.raises(ValueError, match="both x and S"):
        vae.decode(latents(2), x)
    with pytest.raises(ValueError, match="both x and S"):
        vae.decode(latents(2), S=S)
    with pytest.raises(ValueError, match=message("3 latents", "got 2")):
        vae.decode(latents(3), x, S[0])
    with pytest.raises(ValueError, match=message("3 latents", "got 2")):
        vae.decode(noise(0, 2, 3, Z), x, S)
    with pytest.raises(ValueError, match="expected finite latents z, got NaN or infinity in 2 numbers"):
        vae.decode(torch.tensor([[0.0, math.nan, 1.0], [0.0, 1.0, -math.inf]]))
    with pytest.raises(ValueError, match=message("1 latents", "got 2")):
        vae.decode(latents(1)[0], x, S)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"draws must be at least 1, got {count}"):
            vae.inpaint(x, S, draws=count)
        with pytest.raises(ValueError, match=f"draws must be at least 1, got {count}"):
            vae.reconstruct(x, S, draws=count)
        with pytest.raises(ValueError, match=f"samples must be at least 1, got {count}"):
            vae.log_prob(x, S, samples=count)
        with pytest.raises(ValueError, match=f"samples must be at least 1, got {count}"):
            vae.log_weights(x, S, samples=count)
        with pytest.raises(ValueError, match=f"at least 1, got {count}"):
            vae.sample(count)


def test_nothing_or_different_batches_to_combine():
    vae = make()
    one, two, three = ((pictures(vae, n), some(vae, n)) for n in (1, 2, 3))
    with pytest.raises(ValueError, match=message("at least one pair (x, S)", "got none")):
        vae.combine()
    with pytest.raises(ValueError, match=message("batches of one size", "got [2, 2, 3]")):
        vae.combine(two, two, three)
    with pytest.raises(ValueError, match=message("batches of one size", "got [2, 1]")):
        vae.combine(two, one)


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_too_few_steps(steps):
    vae = make()
    with pytest.raises(ValueError, match=f"steps must be at least 2.*got {steps}"):
        vae.interpolate(pictures(vae), pictures(vae), steps)


def test_different_ends():
    vae = make()
    for a, b in ((pictures(vae, 2), pictures(vae, 3)), (pictures(vae, 1)[0], pictures(vae, 2))):
        with pytest.raises(ValueError, match=message("as many images", tuple(a.shape), tuple(b.shape))):
            vae.interpolate(a, b)


@pytest.mark.parametrize("dims", [[-1], [Z], [0, 7], []])
def test_dims_outside_the_latent_space(dims):
    vae = make()
    with pytest.raises(ValueError, match=message("[0, 3)", "at least one", f"got {dims}")):
        vae.decoding_sensitivity(pictures(vae), some(vae), dims)


# What a notebook may get wrong beside the above. x are two images, S patches of them.
NAN, INF = float("nan"), float("inf")
MISUSE = {
    "sample a fraction": (lambda vae, x, S: vae.sample(2.5), "number of samples must be a whole number, got 2.5"),
    "sample a word": (lambda vae, x, S: vae.sample("3"), "number of samples must be a whole number, got '3'"),
    "sample a truth": (lambda vae, x, S: vae.sample(True), "number of samples must be a whole number, got True"),
    "sample nothing": (lambda vae, x, S: vae.sample(None), "number of samples must be a whole number, got None"),
    "draws": (lambda vae, x, S: vae.inpaint(x, S, draws=1.5), "draws must be a whole number, got 1.5"),
    "draws in a list": (lambda vae, x, S: vae.reconstruct(x, draws=[2]), "draws must be a whole number, got [2]"),
    "seed of samples": (lambda vae, x, S: vae.sample(2, seed=1.5), "seed must be a whole number, got 1.5"),
    "seed of inpaint": (lambda vae, x, S: vae.inpaint(x, S, seed="a"), "seed must be a whole number, got 'a'"),
    "seed of reconstruct": (lambda vae, x, S: vae.reconstruct(x, seed=2**70), f"in [-2^63, 2^64), got {2**70}"),
    "seed of log_prob": (lambda vae, x, S: vae.log_prob(x, seed=-(2**64)), f"in [-2^63, 2^64), got {-(2**64)}"),
    "samples": (lambda vae, x, S: vae.log_prob(x, samples=2.5), "samples must be a whole number, got 2.5"),
    "no samples": (lambda vae, x, S: vae.log_weights(x, samples=None), "samples must be a whole number, got None"),
    "no passes": (lambda vae, x, S: vae.inpaint(x, S, passes=0), "passes must be at least 1, got 0"),
    "passes of samples": (lambda vae, x, S: vae.sample(2, passes=1.5), "passes must be a whole number, got 1.5"),
    "passes of log_prob": (lambda vae, x, S: vae.log_prob(x, passes=[2]), "passes must be a whole number, got [2]"),
    "steps": (lambda vae, x, S: vae.interpolate(x, x, steps=2.5), "steps must be a whole number, got 2.5"),
    "no steps": (lambda vae, x, S: vae.interpolate(x, x, None), "steps must be a whole number, got None"),
    "dims not in a list": (lambda vae, x, S: vae.decoding_sensitivity(x, S, 3), "dims must be a list of latent"),
    "a tensor of one dim": (
        lambda vae, x, S: vae.decoding_sensitivity(x, S, torch.tensor(1)),
        "dims must be a list of latent",
    ),
    "fractions of dims": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0, 1.5]), "at least one, got [0, 1.5]"),
    "dims in a word": (lambda vae, x, S: vae.decoding_sensitivity(x, S, "12"), "at least one, got 12"),
    "delta NaN": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0], NAN), "finite, got nan"),
    "delta infinite": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0, 1], [1, INF]), "finite, got [1, inf]"),
    "delta a word": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0], "5"), "finite, got '5'"),
    "delta None": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0], None), "finite, got None"),
    "deltas": (lambda vae, x, S: vae.decoding_sensitivity(x, S, [0, 1], [[1], [1, 2]]), "got [[1], [1, 2]]"),
    "no pairs": (lambda vae, x, S: vae.combine(x, S), "pairs of data and a mask, combine((x1, S1), (x2, S2)), got"),
    "half a pair": (lambda vae, x, S: vae.combine((x, S), (x,)), "pairs of data and a mask"),
    "a path": (lambda vae, x, S: vae.encode("faces/1.png"), "a tensor of images in [0, 1] or tokens"),
    "an array": (lambda vae, x, S: vae.encode(x.numpy()), "got ndarray: torch.as_tensor(...) makes a tensor of it"),
    "a mask in an array": (lambda vae, x, S: vae.encode(x, S.numpy()), "got ndarray: torch.as_tensor(...) makes"),
    "a mask of numbers": (lambda vae, x, S: vae.encode(x, S.float()), "S.bool() makes one of zeros and ones"),
    "pixels of an array": (lambda vae, x, S: vae.pixel_mask(S.numpy()), "boolean mask of shape (..., 16), got nda"),
    "pixels of numbers": (lambda vae, x, S: vae.pixel_mask(S.float()), "boolean mask of shape (..., 16), got torch.f"),
    "pixels of few": (lambda vae, x, S: vae.pixel_mask(S[:, :3]), "(..., 16), got torch.bool (2, 3)"),
}


@pytest.mark.parametrize(("call", "words"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_named(call, words):
    vae = make()
    with pytest.raises(ValueError, match=re.escape(words)):
        call(vae, pictures(vae, 2), some(vae, 2))


@pytest.mark.parametrize("precision", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [255, 16, -20])
def test_images_that_were_not_divided(scale, precision):
    vae, S = make(), torch.ones(2, 16, dtype=torch.bool)
    S[:, 3] = False
    x = (scale * pictures(vae, 2)).to(precision)
    x[0, 0, 0, 0] = scale
    low, high = sorted((x.min().item(), x.max().item()))
    for call in (*attempts(vae, x, S), *attempts_without_mask(vae, x)):
        with pytest.raises(ValueError, match=message("images with values in [0, 1]", "divide those in 0..255", "255")):
            call()
    with pytest.raises(ValueError, match=message(f"from {low:g} to {high:g} where S says observed")):
        vae.encode(x)


@every_call
def test_images_between_minus_1_and_1_are_warned_of(vae, call):
    x, S = pictures(vae), some(vae)
    with pytest.warns(UserWarning, match=r"if they are in \[-1, 1\], \(x \+ 1\) / 2 is in \[0, 1\]"):
        call(vae, 2 * x - 1, S)


def test_a_warning_is_of_the_line_that_gave_the_images():
    vae = make()
    with pytest.warns(UserWarning) as caught:
        vae.encode(2 * pictures(vae) - 1)
        vae.inpaint(2 * pictures(vae) - 1, some(vae))
    assert [warning.filename for warning in caught] == [__file__, __file__]
    assert caught[0].lineno != caught[1].lineno


@every_masked_call
@pytest.mark.filterwarnings("error")
def test_noise_tokens_and_hidden_pixels_are_no_images_between_minus_1_and_1(vae, call):
    x, S = pictures(vae), some(vae)
    black = x.masked_fill(torch.rand(x.shape) < 0.8, 0)  # as of handwritten digits
    call(vae, black + 0.2 * torch.randn(x.shape), S)
    call(vae, torch.where(vae.pixel_mask(S), x, 2 * x - 3), S)
    call(vae, vae.tokenizer.encode(2 * x - 1), S)


@every_masked_call
def test_hidden_pixels_may_be_of_any_size(vae, call):
    x, S = pictures(vae), some(vae)
    bright = torch.where(pixels_of(vae, S).unsqueeze(1), x, 255.0)
    assert same(call(vae, bright, S), call(vae, x, S))
    assert same(call(vae, bright, pixels_of(vae, S)), call(vae, x, S))


@every_call
def test_pixels_may_lie_somewhat_outside_of_0_and_1(vae, call):
    x = 8 * pictures(vae) - 3.5
    assert all(part.isfinite().all() for part in parts(call(vae, x, some(vae))))


@every_call
def test_tokens_may_be_of_any_size(call):
    """Those of a PatchAE are codes; its images must be within the limit like any."""
    torch.manual_seed(0)
    tokenizer = PatchAE(image_size=8, patch_size=2, channels=1, width=4)
    vae = BigLearnVAE(make().net, tokenizer)
    x, S = pictures(vae), some(vae)
    for data in (x, 300 * noise(5, B, 16, 4)):
        assert all(part.isfinite().all() for part in parts(call(vae, data, S)))
    with pytest.raises(ValueError, match="divide those in"):
        call(vae, 255 * x, S)


@pytest.mark.parametrize("size", [-5.0, 0.5, 5.0])
def test_changes_that_lead_outside_of_0_and_1(vae, size):
    x, S = pictures(vae), some(vae)
    result = vae.encoding_sensitivity(x, S, torch.tensor(size))
    assert same(result.after, vae.encode(x + size, S))


def test_numbers_may_be_of_any_type(vae):
    x, S = pictures(vae, 2), some(vae, 2)
    for of in (np.int64, torch.tensor):
        assert torch.equal(vae.sample(of(2), seed=of(3)), vae.sample(2, seed=3))
        assert torch.equal(vae.inpaint(x, S, of(2), of(3)), vae.inpaint(x, S, 2, 3))
        assert torch.equal(vae.interpolate(x, x / 2, of(3)), vae.interpolate(x, x / 2, 3))
        assert torch.equal(vae.log_prob(x, samples=of(2), seed=of(3)), vae.log_prob(x, samples=2, seed=3))
        assert same(vae.decoding_sensitivity(x, S, [of(1)]), vae.decoding_sensitivity(x, S, [1]))
    assert torch.equal(vae.log_prob(x, variance=np.float32(0.5), seed=3), vae.log_prob(x, variance=0.5, seed=3))
    for seed in (-1, -(2**63), 2**64 - 1):
        assert torch.equal(vae.sample(2, seed=seed), vae.sample(2, seed=seed))


@pytest.mark.parametrize("delta", [[1.0, 2.0, 3.0], torch.ones(2, 2), []])
def test_wrong_delta(delta):
    vae = make()
    shape = tuple(torch.as_tensor(delta).shape)
    with pytest.raises(ValueError, match=message("one number or one for each of the 2 dims", f"got {shape}")):
        vae.decoding_sensitivity(pictures(vae), some(vae), [0, 1], delta)


@pytest.mark.parametrize("shape", [(B + 1, 1, 8, 8), (B, 3, 8, 8), (8, 6), (1, B, 1, 8, 8), (0, 1, 8, 8), (16, 4)])
def test_wrong_change(shape):
    vae = make()
    with pytest.raises(ValueError, match=message("broadcasts to x", (B, 1, 8, 8), f"got {shape}")):
        vae.encoding_sensitivity(pictures(vae), some(vae), torch.zeros(shape))


@pytest.mark.parametrize(("change", "got"), [(torch.zeros(B, 1, 8, 8).numpy(), "ndarray"), (0.1, "float")])
def test_change_of_another_type(change, got):
    vae = make()
    with pytest.raises(ValueError, match=message("tensor", "broadcasts to x", f"got {got}")):
        vae.encoding_sensitivity(pictures(vae), some(vae), change)


def test_nothing_observed_that_could_change():
    vae, S = make(), some(make())
    S[2] = False
    for mask in (torch.zeros_like(S), torch.zeros_like(S[0]), S, pixels_of(vae, S)):
        with pytest.raises(ValueError, match="at least one observed patch in each image"):
            vae.encoding_sensitivity(pictures(vae), mask, torch.tensor(0.1))


@pytest.mark.parametrize("method", ["log_prob", "log_weights"])
def test_wrong_tasks(method):
    vae, S = make(), some(make())
    x, ask = pictures(vae), getattr(vae, method)
    none, one_without = torch.zeros_like(S), S.clone()
    one_without[2] = False
    incomplete = pixels_of(vae, ~none)
    incomplete[:, ::2] = False
    for T, given in ((none, None), (none[0], S), (one_without, None), (incomplete, None), (None, ~none)):
        with pytest.raises(ValueError, match="T must hold at least one patch of each image"):
            ask(x, T, given)
    with pytest.raises(ValueError, match=f"T and given must be disjoint, {B * 8} patches are in both"):
        ask(x, S, S)
    with pytest.raises(ValueError, match="T and given must be disjoint, 1 patches are in both"):
        ask(x[0], torch.arange(16) < 9, torch.arange(16) > 7)
    with pytest.raises(ValueError, match=message("B = 5", "got (2, 16)")):
        ask(x, S, ~S[:2])


@pytest.mark.parametrize("method", ["log_prob", "log_weights"])
@pytest.mark.parametrize("variance", [0, -1.0, float("nan"), float("inf"), "0.1", [1]])
def test_wrong_variance(method, variance):
    vae = make()
    with pytest.raises(ValueError, match=message("variance must be a number in (0, inf)", f"got {variance!r}")):
        getattr(vae, method)(pictures(vae), variance=variance)


def test_a_model_without_a_variance_wants_one_in_each_call():
    vae = make(variance=0)
    with pytest.raises(ValueError, match=message("variance must be a number in (0, inf), got 0.0: give one")):
        vae.log_prob(pictures(vae))
    assert vae.log_prob(pictures(vae), variance=0.1).isfinite().all()


def test_without_a_seed_torch_manual_seed_makes_everything_repeatable(vae):
    x, S = pictures(vae), some(vae)
    calls = {
        "sample": lambda: vae.sample(2),
        "passes": lambda: vae.sample(2, passes=3),
        "inpaint": lambda: vae.inpaint(x, S, passes=2),
        "log_prob": lambda: vae.log_prob(x, samples=4),
        "masks": lambda: masks.random(5, 12, 0.5),
        "codes": lambda: vae.encode(x).sample(),
    }
    for name, call in calls.items():
        torch.manual_seed(5)
        one, other = call(), call()
        assert not one.equal(other), name
        torch.manual_seed(5)
        assert call().equal(one), name
    before = torch.get_rng_state()
    vae.log_prob(x, samples=4, seed=0), vae.sample(2, seed=0, passes=2), masks.random(5, 12, 0.5, seed=0)
    assert torch.get_rng_state().equal(before)  # with a seed nothing else is touched


def test_asking_a_network_of_ones_own_leaves_it_as_it_was(monkeypatch):
    net = LinearGaussian().train()
    net.frozen = nn.Dropout().eval()
    check_calls(net)
    assert net.training and not net.frozen.training

    def forward(*_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(net, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):  # which says nothing of its calls
        check_calls(net)


@pytest.mark.parametrize("wrong", [lambda mean: mean[:, :1], lambda mean: mean.mean(1), lambda mean: [mean]])
def test_means_of_another_shape_of_a_network_of_ones_own_are_refused(monkeypatch, wrong):
    net = LinearGaussian()
    right = net.forward
    monkeypatch.setattr(net, "forward", lambda x, S, *more: wrong(right(x, S, *more)) if more else right(x, S))
    shape = rf"\(B, {net.num_tokens}, {net.token_dim}\)"
    with pytest.raises(ValueError, match=rf"LinearGaussian: net\(x, S, z, T\) must give {shape}, got "):
        check_calls(net)


def test_a_model_moves_as_a_whole():
    tokens = PatchAE(image_size=16, patch_size=8, channels=1, width=8)
    vae = BigLearnVAE(UniversalViT(grid=(2, 2), token_dim=tokens.token_dim, dim=16, depth=1, z_dim=2, heads=2), tokens)
    x = torch.rand(3, 1, 16, 16)
    before = vae.encode(x).mean
    assert vae.to(torch.float64) is vae and vae.dtype == torch.float64
    torch.testing.assert_close(vae.encode(x).mean, before.double(), rtol=1e-4, atol=1e-5)
    assert vae.inpaint(x, torch.tensor([True, False, False, True]), seed=0).dtype == torch.float64
    assert vae.to("cpu", torch.float32).encode(x).mean.equal(before)
    assert vae.to(dtype=torch.float64).dtype == torch.float64 and vae.to(device="cpu").device.type == "cpu"


def test_unknown_unit():
    vae = make()
    with pytest.raises(ValueError, match=message("unit must be nats or bits_per_dim, got 'bits'")):
        vae.log_prob(pictures(vae), unit="bits")
