import pytest
import torch
from torch.testing import assert_close

from biglearn_vae import TwoStackViT, UniversalViT, count_parameters
from biglearn_vae.models import LOGVAR_BOUND

NETS = {"universal": UniversalViT, "two-stack": TwoStackViT}

# case: blocks, (encoder, decoder), d, Z, D, r, parameters, the paper's number in units of 2^20 (Tables 3 and 4)
TABLE = {
    "case1": (8, (4, 4), 128, 32, 48, 2, 1_269_104, "1.2103"),
    "case2": (8, (4, 4), 256, 32, 48, 2, 4_962_928, "4.7330"),
    "case3": (8, (4, 4), 256, 64, 48, 2, 5_012_144, "4.7800"),
    "case4": (10, (6, 4), 512, 128, 48, 2, 24_125_744, "23.0081"),
    "celeba": (12, (6, 6), 768, 128, 512, 4, 94_311_168, "89.9421"),
}


def build(kind: str, **changed):
    depth = 3 if kind == "universal" else (2, 1)
    return NETS[kind](**(dict(grid=(2, 3), token_dim=5, dim=16, depth=depth, z_dim=3, heads=2) | changed))


def batch(scale: float = 1.0, dtype=torch.float64, seed: int = 0):
    """Tokens (4, 6, 5), masks with nothing, something and everything observed, latents (4, 3)."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(4, 6, 5, dtype=dtype, generator=generator)
    z = scale * torch.randn(4, 3, dtype=dtype, generator=generator)
    S = torch.zeros(4, 6, dtype=torch.bool)
    S[1, 2] = S[2, [0, 3, 4]] = S[3] = True
    return x, S, z


def outputs(net, x, S, z, T=None) -> list[torch.Tensor]:
    q = net(x, S)
    return [q.mean, q.logvar, net(x, S, z, T)]


def gradients(net) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("case", TABLE)
def test_parameter_counts_of_the_paper(case, kind):
    n, stacks, d, z, D, r, parameters, printed = TABLE[case]
    depth = n if kind == "universal" else stacks
    with torch.device("meta"):
        net = NETS[kind](grid=(8, 8), token_dim=D, dim=d, depth=depth, z_dim=z, mlp_ratio=r)
    assert count_parameters(net) == parameters
    assert f"{count_parameters(net) / 2**20:.4f}" == printed
    blocks = n * ((4 + 2 * r) * d**2 + (9 + r) * d)
    rest = (8 + r) * d**2 + (2 + 2 * r) * d * z + 3 * D * d + (16 + r) * d + 2 * z + D
    assert blocks + rest == parameters


def test_heads_change_no_count():
    assert count_parameters(build("universal", heads=1)) == count_parameters(build("universal", heads=8))
    default = UniversalViT(grid=(2, 2), token_dim=5, dim=256, depth=1, z_dim=3)
    assert default.blocks[0].attention.heads == 4  # 64 dimensions each


def test_shapes(tiny_net):
    x, S, z = batch()
    q = tiny_net(x, S)
    assert q.mean.shape == q.logvar.shape == (4, 3)
    assert tiny_net(x, S, z).shape == (4, 6, 5)


@pytest.mark.parametrize("junk", [1e6, float("nan"), float("inf"), "noise"])
def test_hidden_tokens_have_no_influence(tiny_net, junk):
    x, S, z = batch()
    hidden = (~S).unsqueeze(-1)
    changed = torch.where(hidden, torch.randn_like(x), x) if junk == "noise" else x.masked_fill(hidden, junk)
    for before, after in zip(outputs(tiny_net, x, S, z), outputs(tiny_net, changed, S, z), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_hidden_tokens_have_no_influence_on_gradients(tiny_net, junk):
    x, S, z = batch()
    found = []
    for tokens in (x, x.masked_fill(~S.unsqueeze(-1), junk)):
        tokens, latents = tokens.clone().requires_grad_(), z.clone().requires_grad_()
        sum(out.square().sum() for out in outputs(tiny_net, tokens, S, latents)).backward()
        assert not tokens.grad[~S].any() and tokens.grad[S].any(-1).all()
        found.append(gradients(tiny_net) | {"x": tokens.grad, "z": latents.grad})
    clean, dirty = found
    assert clean.keys() == dirty.keys() == dict(tiny_net.named_parameters()).keys() | {"x", "z"}
    for name, gradient in clean.items():
        assert gradient.isfinite().all() and torch.equal(gradient, dirty[name]), name


def test_each_observed_token_influences_all_outputs(tiny_net):
    x, S, z = batch()
    everywhere = torch.ones_like(S)
    for position in range(6):
        changed = x.clone()
        changed[:, position, 0] += 1
        before, after = (outputs(tiny_net, tokens, everywhere, z, everywhere) for tokens in (x, changed))
        assert (before[0] - after[0]).abs().amax(-1).min() > 1e-6  # means
        assert (before[1] - after[1]).abs().amax(-1).min() > 1e-6  # log-variances
        assert (before[2] - after[2]).abs().amax(-1).min() > 1e-6  # every position of the decoding


def test_the_mask_itself_is_information(tiny_net):
    # A hidden token is not the same as an observed token of zeros.
    x, S, z = batch()
    observed, hidden = (torch.full_like(S, value) for value in (True, False))
    for a, b in zip(outputs(tiny_net, 0 * x, observed, z), outputs(tiny_net, 0 * x, hidden, z), strict=True):
        assert not torch.isclose(a, b).all()


def test_with_z_given_targets_reach_the_decoder_only_through_z(tiny_net):
    x, _, _ = batch()
    S = torch.tensor([[True, False, True, False, False, False]]).expand(4, -1)
    T = torch.tensor([[False, True, False, False, True, False]]).expand(4, -1)
    changed = torch.where(T.unsqueeze(-1), x + 1, x)
    q, q_changed = tiny_net(x, S | T), tiny_net(changed, S | T)
    assert not torch.isclose(q.mean, q_changed.mean).any(-1).all()
    assert torch.equal(tiny_net(x, S, q.mean), tiny_net(changed, S, q.mean))
    assert not torch.isclose(tiny_net(x, S, q.mean), tiny_net(x, S, q_changed.mean)).all()


def test_each_latent_influences_every_position(tiny_net):
    x, S, z = batch()
    everywhere = torch.ones_like(S)
    before = tiny_net(x, S, z, everywhere)
    for latent in range(3):
        changed = z.clone()
        changed[:, latent] += 1
        assert (before - tiny_net(x, S, changed, everywhere)).abs().amax(-1).min() > 1e-6


def test_position_matters(tiny_net):
    x, _, _ = batch()
    S = torch.ones(4, 6, dtype=torch.bool)
    permuted = x.clone()
    permuted[:, [1, 4]] = x[:, [4, 1]]
    assert (tiny_net(x, S).mean - tiny_net(permuted, S).mean).abs().amax(-1).min() > 1e-6


def test_rows_do_not_influence_each_other(tiny_net):
    x, S, z = batch()
    for row in range(4):
        one = slice(row, row + 1)
        alone = outputs(tiny_net, x[one], S[one], z[one])
        for value, all_rows in zip(alone, outputs(tiny_net, x, S, z), strict=True):
            assert_close(value, all_rows[one], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e3, 1e10, 1e30])
def test_inputs_of_any_scale_stay_finite(tiny_net, scale):
    net = tiny_net.float()
    x, S, z = batch(scale, torch.float32)
    q, p = net(x, torch.ones_like(S)), net(x, S)
    values = [*outputs(net, x, S, z), q.mean, q.logvar, q.kl(), q.kl(p), p.kl(q), q.log_prob(p.sample(seed=0))]
    assert all(value.isfinite().all() for value in values)


def test_log_variances_saturate_and_still_learn(tiny_net):
    net = tiny_net.float()
    x, S, _ = batch(dtype=torch.float32)
    with torch.no_grad():
        net.latent_out[-1].weight *= 1e4
        net.latent_out[-1].bias.zero_()
    low, high = net(x, S).logvar.min().item(), net(x, S).logvar.max().item()
    assert -LOGVAR_BOUND <= low < -0.99 * LOGVAR_BOUND and 0.99 * LOGVAR_BOUND < high <= LOGVAR_BOUND
    q, p = net(x, S), net(x, torch.ones_like(S))
    for value in (q.kl(), q.kl(p), p.kl(q), q.log_prob(p.mean), p.var, 1 / p.var):
        assert value.isfinite().all()


def test_the_bound_is_the_identity_near_zero(tiny_net):
    # 12 tanh(v / 12) = v (1 - v^2 / 432 + ...): shrinking the head a thousandfold shrinks log-variances as much.
    x, S, _ = batch()
    before = tiny_net(x, S).logvar
    with torch.no_grad():
        for parameter in tiny_net.latent_out[-1].parameters():
            parameter /= 1000
    unbounded = LOGVAR_BOUND * torch.atanh(before / LOGVAR_BOUND)
    assert_close(1000 * tiny_net(x, S).logvar, unbounded, rtol=1e-6, atol=1e-9)


def test_universal_encoder_is_its_decoder():
    net = build("universal")
    assert UniversalViT.encoder is UniversalViT.decoder
    assert net.encoder is net.decoder is net.blocks and len(net.blocks) == 3


def test_two_stacks_are_apart():
    net = build("two-stack").double()
    assert (len(net.encoder), len(net.decoder)) == (2, 1)
    x, S, z = batch()
    net(x, S, z).square().sum().backward()
    decoding = gradients(net)
    q = net(x, S)
    (q.mean.square() + q.logvar).sum().backward()
    encoding = gradients(net)
    names = dict(net.named_parameters()).keys()
    own = {
        "encoding": {
            name for name in names if name.startswith(("encoder", "latent_norm", "latent_out", "latent_mask"))
        },
        "decoding": {name for name in names if name.startswith(("decoder", "token_norm", "token_out", "latent_in"))},
    }
    assert names - decoding.keys() == own["encoding"]
    assert names - encoding.keys() == own["decoding"]
    assert all(gradient.isfinite().all() for gradient in (*decoding.values(), *encoding.values()))


@pytest.mark.parametrize("shape", [(4, 5, 5), (4, 6, 4), (6, 5), (4, 2, 3, 5)])
def test_wrong_tokens_are_named(tiny_net, shape):
    with pytest.raises(ValueError) as error:
        tiny_net(torch.zeros(shape, dtype=torch.float64), torch.ones(4, 6, dtype=torch.bool))
    assert "(B, 6, 5)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize(
    "S", [torch.ones(4, 6), torch.ones(4, 6, dtype=torch.long), torch.ones(4, 5) > 0, torch.ones(6) > 0]
)
def test_wrong_masks_are_named(tiny_net, S):
    x, _, z = batch()
    for given in ((), (z,)):
        with pytest.raises(ValueError) as error:
            tiny_net(x, S, *given)
        assert "boolean mask S of shape (4, 6)" in str(error.value)
        assert f"{S.dtype} {tuple(S.shape)}" in str(error.value)


@pytest.mark.parametrize("shape", [(4, 2), (3, 3), (3,), (1, 4, 3)])
def test_wrong_latents_are_named(tiny_net, shape):
    x, S, _ = batch()
    with pytest.raises(ValueError) as error:
        tiny_net(x, S, torch.zeros(shape, dtype=torch.float64))
    assert "latents z of shape (4, 3)" in str(error.value) and str(shape) in str(error.value)


def test_numbers_of_another_precision_are_named(tiny_net):
    x, S, z = batch()
    for dtype in (torch.float32, torch.bfloat16):
        for given in ((x.to(dtype), S), (x.to(dtype), S, z), (x, S, z.to(dtype))):
            name = "tokens x" if given[0] is not x else "latents z"
            with pytest.raises(ValueError, match=f"expected {name} in the network's torch.float64, got {dtype}"):
                tiny_net(*given)
    tiny_net.float()
    with torch.autocast("cpu", torch.bfloat16):  # which brings them together
        found = tiny_net(x.bfloat16(), S)
    torch.testing.assert_close(found.mean.double(), tiny_net(x.float(), S).mean.double(), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(x=batch()[0].numpy()), "floating-point tokens.*got ndarray: torch.as_tensor"),
        (dict(x="tokens"), "floating-point tokens.*got str"),
        (dict(x=batch()[0].long()), r"floating-point tokens.*got torch.int64 \(4, 6, 5\)"),
        (dict(S=batch()[1].numpy()), r"mask S of shape \(4, 6\), got ndarray: torch.as_tensor"),
        (dict(S=None), r"mask S of shape \(4, 6\), got NoneType"),
        (dict(T=batch()[1].tolist()), r"mask T of shape \(4, 6\), got list"),
        (dict(z=batch()[2].numpy()), r"latents z of shape \(4, 3\), got ndarray: torch.as_tensor"),
    ],
)
def test_what_is_no_tensor_is_named(tiny_net, changed, message):
    x, S, z = batch()
    with pytest.raises(ValueError, match=message):
        tiny_net(**dict(x=x, S=S, z=z) | changed)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(z_dim=0), "z_dim must be at least 1, got 0"),
        (dict(token_dim=0), "token_dim must be at least 1, got 0"),
        (dict(dim=0), "dim must be at least 1, got 0"),
        (dict(mlp_ratio=0), "mlp_ratio must be at least 1, got 0"),
        (dict(dim=18), "multiple of 4.*18"),
        (dict(heads=3), "heads=3 and dim=16"),
        (dict(heads=0), "heads must be at least 1, got 0"),
        (dict(heads=1.5), "heads must be a whole number, got 1.5"),
        (dict(token_dim=4.5), "token_dim must be a whole number, got 4.5"),
        (dict(dim="16"), "dim must be a whole number, got '16'"),
        (dict(z_dim=None), "z_dim must be a whole number, got None"),
        (dict(mlp_ratio=1.5), "mlp_ratio must be a whole number, got 1.5"),
        (dict(grid=4), "grid must be two numbers.*got 4"),
        (dict(grid="44"), "grid must be two numbers.*got 44"),
        (dict(grid=(2.0, 3)), r"grid must be two numbers.*got \(2.0, 3\)"),
        (dict(grid=(2, 0)), r"grid must be two numbers.*got \(2, 0\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(kind, changed, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **changed)


@pytest.mark.parametrize(
    ("kind", "depth", "message"),
    [
        ("universal", 0, "depth must be at least 1, got 0"),
        ("two-stack", (0, 2), "depth must be at least 1, got 0"),
        ("two-stack", (2, 0), "depth must be at least 1, got 0"),
        ("two-stack", (1, 2, 3), r"two numbers.*\(1, 2, 3\)"),
        ("two-stack", 4, "two numbers.*got 4"),
        ("universal", 1.5, r"depth must be a whole number, got 1\.5"),
        ("universal", True, "depth must be a whole number, got True"),
        ("two-stack", (1, 1.5), r"depth must be a whole number, got 1\.5"),
        ("universal", (4, 4), r"one number of blocks for each stack, got \(4, 4\)"),
    ],
)
def test_depths_that_do_not_fit_are_refused(kind, depth, message):
    with pytest.raises(ValueError, match=message):
        build(kind, depth=depth)


# ---- Hidden tokens left out of the sequence --------------------------------------------------------------------------


def random_tasks(rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """S and T of every size, disjoint: nothing, something and everything observed."""
    places = torch.rand(rows, 6, generator=torch.Generator().manual_seed(3))
    S, T = places < 0.4, places > 0.6
    S[0], T[0], S[1], T[1] = False, True, True, False
    return S, T


@pytest.mark.parametrize("kind", NETS)
def test_a_batch_of_many_sizes_is_its_images_one_by_one(kind):
    torch.manual_seed(0)
    net = build(kind, hidden="drop").double()
    x, z, (S, T) = torch.randn(7, 6, 5).double(), torch.randn(7, 3).double(), random_tasks()
    q, mean = net(x, S), net(x, S, z, T)
    assert not mean[~T].any() and mean[T].all()
    for i in range(7):
        row = slice(i, i + 1)
        alone = net(x[row], S[row])
        assert_close(q.mean[row], alone.mean)
        assert_close(q.logvar[row], alone.logvar)
        assert_close(mean[row], net(x[row], S[row], z[row], T[row]))


@pytest.mark.parametrize("kind", NETS)
def test_with_nothing_to_leave_out_both_kinds_are_one(kind):
    torch.manual_seed(0)
    masked, dropping = (build(kind, hidden=hidden).double() for hidden in ("mask", "drop"))
    dropping.load_state_dict(masked.state_dict())
    x, z, (S, _) = torch.randn(7, 6, 5).double(), torch.randn(7, 3).double(), random_tasks()
    assert_close(dropping(x, S | True).mean, masked(x, S | True).mean)
    assert_close(dropping(x, S, z)[~S], masked(x, S, z)[~S])
    assert_close(dropping(x, S, z, S | True), masked(x, S, z))
    assert not torch.isclose(dropping(x, S).mean[2:], masked(x, S).mean[2:]).all()


def test_with_mask_tokens_what_is_asked_for_is_indexing():
    torch.manual_seed(0)
    net = build("universal").double()
    x, z, (S, T) = torch.randn(7, 6, 5).double(), torch.randn(7, 3).double(), random_tasks()
    assert torch.equal(net(x, S, z, T), net(x, S, z))


@pytest.mark.parametrize("kind", NETS)
def test_a_code_is_what_the_whole_last_block_gives(kind):
    torch.manual_seed(0)
    net = build(kind).double()
    (x, S, _), blocks = batch(), net.encoder
    sequence = net._embed(x, S, None)
    for block in blocks:
        sequence = sum(block(sequence))
    mean, _ = net.latent_out(net.latent_norm(sequence[:, 0])).chunk(2, dim=-1)
    assert_close(net(x, S).mean, mean)


def test_an_empty_batch_of_either_kind():
    for hidden in ("mask", "drop"):
        net = build("universal", hidden=hidden)
        x, S = torch.zeros(0, 6, 5), torch.zeros(0, 6, dtype=torch.bool)
        assert net(x, S).mean.shape == (0, 3) and net(x, S, torch.zeros(0, 3), S).shape == (0, 6, 5)


def test_unknown_words_and_masks_are_named():
    with pytest.raises(ValueError, match="hidden must be mask or drop, got 'none'"):
        build("universal", hidden="none")
    x, S, z = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"boolean mask T of shape \(4, 6\), got torch.bool \(4, 5\)"):
        build("universal")(x, S, z, S[:, :5])


@pytest.mark.parametrize(("dim", "heads"), [(16, 1), (64, 1), (128, 2), (224, 2), (352, 4), (768, 12)])
def test_by_default_there_are_as_many_heads_of_64_numbers_as_divide_the_width(dim, heads):
    assert build("universal", dim=dim, heads=None).blocks[0].attention.heads == heads
