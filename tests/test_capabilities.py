import re

import pytest
import torch
from torch import Tensor

from biglearn_vae import BigLearnVAE, Patchify, TwoStackViT, UniversalViT, masks

B, Z = 5, 3


def make(name: str = "universal", **settings) -> BigLearnVAE:
    """An untrained tiny model: nothing here depends on what was learned."""
    tokenizer = Patchify((4, 8), 2, 3) if name == "colour" else Patchify(8, 2, 1)
    sizes = dict(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, z_dim=Z, heads=2)
    torch.manual_seed(0)
    net = TwoStackViT(**sizes, depth=(1, 2)) if name == "two-stack" else UniversalViT(**sizes, depth=2)
    with torch.no_grad():
        for parameter in net.parameters():  # no parameter at a special value such as a zero bias
            parameter += 0.1 * torch.randn_like(parameter)
    return BigLearnVAE(net, tokenizer, **settings)


@pytest.fixture(params=["universal", "two-stack", "colour"])
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


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images_of(vae: BigLearnVAE, tokens: Tensor, x: Tensor | None = None, S: Tensor | None = None) -> Tensor:
    """The network's tokens as images in [0, 1], with what is observed of the tokens x in its place."""
    tokens = tokens.clamp(0, 1)
    return vae.tokenizer.decode(tokens if x is None else torch.where(S.unsqueeze(-1), x, tokens))


def close(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def same(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return torch.equal(one.mean, other.mean) and torch.equal(one.logvar, other.logvar)


CALLS = {  # every method that takes data, as a function of data and mask alone
    "encode": lambda vae, x, S: vae.encode(x, S),
    "decode": lambda vae, x, S: vae.decode(latents(len(x)), x, S),
    "reconstruct": lambda vae, x, S: vae.reconstruct(x, S, seed=3),
    "inpaint": lambda vae, x, S: vae.inpaint(x, S, seed=3),
    "inpaint, several": lambda vae, x, S: vae.inpaint(x, S, draws=3, seed=3),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def test_sizes():
    vae, colour = make(), make("colour")
    assert (vae.num_tokens, vae.grid, vae.z_dim, vae.image_shape) == (16, (4, 4), Z, (1, 8, 8))
    assert (colour.num_tokens, colour.grid, colour.z_dim, colour.image_shape) == (8, (2, 4), Z, (3, 4, 8))
    assert vae.device == torch.device("cpu")


def test_results_carry_no_gradient_and_the_net_can_still_train():
    net = UniversalViT(grid=(4, 4), token_dim=4, dim=16, depth=1, z_dim=Z).train()
    vae = BigLearnVAE(net, Patchify(8, 2, 1))
    assert vae.net is net and not any(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    x = pictures(vae).requires_grad_()
    for call in CALLS.values():
        result = call(vae, x, some(vae))
        assert not (result if isinstance(result, Tensor) else result.mean).requires_grad


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


def test_inpaint_by_its_formula(vae):
    x, S = pictures(vae), some(vae)
    tokens = vae.tokenizer.encode(x)
    q = vae.net(tokens, S)
    several = vae.inpaint(x, S, draws=4, seed=5)
    assert several.shape == (4, B, *vae.image_shape)
    for result, e in zip(several, noise(5, 4, B, Z), strict=True):
        z = q.mean + (0.5 * q.logvar).exp() * e
        close(result, images_of(vae, vae.net(tokens, S, z), tokens, S))


@pytest.mark.parametrize("name", ["universal", "two-stack", "colour"])
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


def test_combined_observations(vae):
    x, S1, S2 = pictures(vae), some(vae, seed=1), some(vae, seed=2)
    assert ((S1 | S2) != S1).any() and ((S1 | S2) != S2).any()
    expected = vae.net(vae.tokenizer.encode(x), S1 | S2)
    close(vae.encode(x, S1 | S2).mean, expected.mean)
    only_one = vae.encode(x, S1)
    assert not torch.allclose(vae.encode(x, S1 | S2).mean, only_one.mean)


# --- forms of data ---


@every_call
def test_images_and_tokens_are_the_same(vae, call):
    x, S = pictures(vae), some(vae)
    assert same(call(vae, x, S), call(vae, vae.tokenizer.encode(x), S))


@every_call
def test_bytes_are_divided_by_255(vae, call):
    x = (pictures(vae) * 255).round().to(torch.uint8)
    assert same(call(vae, x, some(vae)), call(vae, x.float() / 255, some(vae)))
    assert same(call(vae, (x.double() / 255), some(vae)), call(vae, (x.double() / 255).float(), some(vae)))


def test_a_single_one_is_a_batch_of_one(vae):
    x, S, z = pictures(vae, 1), some(vae, 1), latents(1)
    tokens = vae.tokenizer.encode(x)
    shape = vae.image_shape
    for one in (x[0], tokens[0]):
        for mask in (S[0], S, pixels_of(vae, S)[0], pixels_of(vae, S)):
            q = vae.encode(one, mask)
            assert q.mean.shape == q.logvar.shape == (Z,) and torch.equal(q.mean, vae.encode(x, S).mean[0])
            assert torch.equal(vae.inpaint(one, mask, seed=1), vae.inpaint(x, S, seed=1)[0])
            several = vae.inpaint(one, mask, draws=2, seed=1)
            assert several.shape == (2, *shape)
            assert torch.equal(several, vae.inpaint(x, S, draws=2, seed=1)[:, 0])
            assert torch.equal(vae.reconstruct(one, mask, seed=1), vae.reconstruct(x, S, seed=1)[0])
            assert torch.equal(vae.decode(z[0], one, mask), vae.decode(z, x, S)[0])
    assert vae.reconstruct(x[0]).shape == vae.inpaint(x[0], S[0]).shape == vae.decode(z[0]).shape == shape
    assert torch.equal(vae.decode(z[0]), vae.decode(z)[0])


def test_shapes_of_a_batch(vae):
    x, S = pictures(vae), some(vae)
    shape = (B, *vae.image_shape)
    assert vae.reconstruct(x).shape == vae.inpaint(x, S).shape == vae.decode(latents()).shape == shape
    assert vae.sample(7).shape == (7, *vae.image_shape)
    assert vae.sample(1).shape == (1, *vae.image_shape)
    assert vae.encode(x, S).sample(draws=4).shape == (4, B, Z)


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
    assert same(call(vae, x, pixels), call(vae, x, S))


def test_patch_masks_that_look_like_pixel_masks():
    # 16 x 16 pixels in 16 patches, and a batch of 16: masks (B, L) have the shape of one of pixels (H, W).
    tokenizer = Patchify(16, 4, 1)
    torch.manual_seed(0)
    net = UniversalViT(grid=tokenizer.grid, token_dim=tokenizer.token_dim, dim=16, depth=1, z_dim=Z, heads=2)
    vae = BigLearnVAE(net, tokenizer)
    x, S = pictures(vae, 16), some(vae, 16)
    expected = vae.net(tokenizer.encode(x), S).mean
    try:
        q = vae.encode(x, S)
    except ValueError:
        return  # to refuse what has two meanings is as good
    close(q.mean, expected)


# --- what is observed stays, what is hidden has no influence ---


def test_observed_patches_come_back_bit_for_bit(vae):
    x, S = pictures(vae), some(vae)
    seen = pixels_of(vae, S).unsqueeze(1).expand_as(x)
    for result in (vae.inpaint(x, S), *vae.inpaint(x, S, draws=3), vae.decode(latents(), x, S)):
        assert torch.equal(result[seen], x[seen])
        assert not (result[~seen] == x[~seen]).any()
    everything = torch.ones_like(S)
    assert torch.equal(vae.inpaint(x, everything), x)
    assert torch.equal(vae.decode(latents(), x, everything), x)
    bytes_ = (x * 255).to(torch.uint8)
    assert torch.equal(vae.inpaint(bytes_, S)[seen], bytes_[seen].float() / 255)


@every_call
@pytest.mark.parametrize("other", [float("nan"), float("inf"), 0.0, None], ids=["nan", "inf", "zero", "noise"])
def test_what_is_hidden_has_no_influence(vae, call, other):
    x, S = pictures(vae), some(vae)
    replacement = pictures(vae, seed=9) if other is None else torch.full_like(x, other)
    changed = torch.where(pixels_of(vae, S).unsqueeze(1), x, replacement)
    expected = call(vae, x, S)
    assert (expected if isinstance(expected, Tensor) else expected.mean).isfinite().all()
    assert same(call(vae, changed, S), expected)


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


# --- seeds and draws ---


def test_seeds_repeat_and_differ(vae):
    x, S = pictures(vae), some(vae)
    calls = (
        lambda seed: vae.sample(B, seed=seed),
        lambda seed: vae.reconstruct(x, seed=seed),
        lambda seed: vae.inpaint(x, S, seed=seed),
        lambda seed: vae.inpaint(x, S, draws=2, seed=seed),
        lambda seed: vae.encode(x, S).sample(seed=seed),
    )
    for call in calls:
        assert torch.equal(call(0), call(0))
        assert not torch.equal(call(0), call(1))
        assert not torch.equal(call(None), call(None))


def test_a_seed_leaves_the_global_generator_alone(vae):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    vae.sample(2, seed=1), vae.inpaint(pictures(vae), some(vae), draws=2, seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_draws_are_an_axis(vae):
    x, S = pictures(vae), some(vae)
    assert torch.equal(vae.inpaint(x, S, draws=1, seed=4), vae.inpaint(x, S, seed=4).unsqueeze(0))
    five = vae.inpaint(x, S, draws=5, seed=4)
    assert all(not torch.equal(five[i], five[j]) for i in range(5) for j in range(i))


@pytest.mark.parametrize("name", ["universal", "two-stack", "colour"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(name, chunk):
    whole, parts = make(name), make(name, chunk=chunk)
    x, S, one = pictures(whole, 7), some(whole, 7), some(whole, 1)
    for call in CALLS.values():
        for mask in (S, one):
            a, b = call(whole, x, mask), call(parts, x, mask)
            for one_part, other in [(a, b)] if isinstance(a, Tensor) else [(a.mean, b.mean), (a.logvar, b.logvar)]:
                close(one_part, other)
    close(whole.sample(7, seed=0), parts.sample(7, seed=0))
    close(whole.decode(latents(7)), parts.decode(latents(7)))
    close(whole.decode(latents(7), x[0], one), parts.decode(latents(7), x[0], one))


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


@pytest.mark.parametrize("shape", WRONG_DATA.values(), ids=WRONG_DATA)
def test_wrong_data(shape):
    vae, S = make(), torch.ones(16, dtype=torch.bool)
    x = torch.zeros(shape)
    for call in (
        lambda: vae.encode(x),
        lambda: vae.encode(x, S),
        lambda: vae.reconstruct(x),
        lambda: vae.inpaint(x, S),
        lambda: vae.decode(latents(2), x, S),
    ):
        with pytest.raises(ValueError, match=message("(B, 1, 8, 8)", "(B, 16, 4)", f"got {shape}")):
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
}


@pytest.mark.parametrize("shape", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_wrong_masks(shape):
    vae, S = make(), torch.ones(shape, dtype=torch.bool)
    x = pictures(vae, 2)
    for call in (
        lambda: vae.encode(x, S),
        lambda: vae.reconstruct(x, S),
        lambda: vae.inpaint(x, S),
        lambda: vae.decode(latents(2), x, S),
    ):
        with pytest.raises(
            ValueError, match=message("(B, L)", "(B, H, W)", "B = 2", "L = 16", "8 x 8", f"got {shape}")
        ):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(16,), (2, 16), (8, 8), (2, 8, 8)])
def test_masks_that_are_not_boolean(dtype, shape):
    vae = make()
    with pytest.raises(ValueError, match=message("boolean", f"got {dtype}")):
        vae.inpaint(pictures(vae, 2), torch.ones(shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, Z + 1), (Z - 1,), (2, 2, 2, Z), (0, Z), ()])
def test_wrong_latents(shape):
    with pytest.raises(ValueError, match=message("(B, 3)", f"got {shape}")):
        make().decode(torch.zeros(shape))


def test_other_wrong_arguments():
    vae = make()
    x, S = pictures(vae, 2), some(vae, 2)
    with pytest.raises(ValueError, match="both x and S"):
        vae.decode(latents(2), x)
    with pytest.raises(ValueError, match="both x and S"):
        vae.decode(latents(2), S=S)
    with pytest.raises(ValueError, match=message("3 latents", "got 2")):
        vae.decode(latents(3), x, S[0])
    with pytest.raises(ValueError, match=message("1 latents", "got 2")):
        vae.decode(latents(1)[0], x, S)
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"draws must be at least 1, got {count}"):
            vae.inpaint(x, S, draws=count)
        with pytest.raises(ValueError, match=f"at least 1, got {count}"):
            vae.sample(count)
