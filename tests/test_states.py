"""Models in files of their own."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from linear_gaussian import LinearGaussian
from torch import nn

import biglearn_vae as blv
from biglearn_vae import BigLearnVAE, PatchAE, Patchify, TwoStackViT, UniversalViT, checkpoint, masks


def trained(net: nn.Module) -> nn.Module:
    """With no parameter at a special value, such as a zero bias."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def universal(**settings) -> BigLearnVAE:
    net = UniversalViT(grid=(4, 4), token_dim=4, dim=16, depth=2, z_dim=3, heads=2, mlp_ratio=3)
    return BigLearnVAE(trained(net), Patchify(8, 2, 1), **settings)


def two_stacks() -> BigLearnVAE:
    net = TwoStackViT(grid=(3, 4), token_dim=12, dim=16, depth=(1, 2), z_dim=3)
    return BigLearnVAE(trained(net), Patchify((6, 8), 2, 3), prior="standard", variance=0.02)


def dropping() -> BigLearnVAE:
    net = UniversalViT(grid=(4, 4), token_dim=4, dim=16, depth=1, z_dim=3, hidden="drop").double()
    return BigLearnVAE(trained(net), Patchify(8, 2, 1), variance=0.0)


def on_codes() -> BigLearnVAE:
    tokens = trained(PatchAE(image_size=8, patch_size=4, channels=1, width=8))
    tokens.fit_statistics([torch.rand(9, 1, 8, 8)])
    net = UniversalViT(grid=tokens.grid, token_dim=tokens.token_dim, dim=16, depth=1, z_dim=2)
    return BigLearnVAE(trained(net), tokens.eval())


@pytest.mark.parametrize("make", [universal, two_stacks, dropping, on_codes])
def test_a_saved_model_is_the_same_model(tmp_path, make: Callable[[], BigLearnVAE]):
    torch.manual_seed(0)
    vae = make()
    vae.net.requires_grad_(False)  # as a loaded one; torch 2.11 rounds otherwise where gradients may be wanted
    vae.tokenizer.requires_grad_(False)
    vae.save(tmp_path / "models" / "one.pt")
    loaded = blv.load(tmp_path / "models" / "one.pt", device="cpu")
    x, S = torch.rand(5, *vae.image_shape), masks.random(5, vae.num_tokens, 0.5, seed=0)
    for result in ("mean", "logvar"):
        assert torch.equal(getattr(loaded.encode(x, S), result), getattr(vae.encode(x, S), result))
    assert torch.equal(loaded.inpaint(x, S, seed=1, passes=2), vae.inpaint(x, S, seed=1, passes=2))
    assert torch.equal(loaded.sample(3, seed=1), vae.sample(3, seed=1))
    likelihoods = [model.log_prob(x, samples=3, seed=1, variance=vae.variance or 0.1) for model in (loaded, vae)]
    assert torch.equal(*likelihoods)
    assert (loaded.prior, loaded.variance, loaded.net.sizes) == (vae.prior, vae.variance, vae.net.sizes)
    assert loaded.sample(1).dtype == vae.sample(1).dtype  # of a network in float64
    assert not any(p.requires_grad for part in (loaded.net, loaded.tokenizer) for p in part.parameters())


def test_a_model_says_what_it_is():
    assert repr(two_stacks()) == (
        "BigLearnVAE(TwoStackViT, images (3, 6, 8), 3 x 4 patches, z of 3, standard prior, on cpu)"
    )


def test_sizes_make_another_network_and_tokenizer():
    for vae in (universal(), two_stacks(), dropping(), on_codes()):
        for part in (vae.net, vae.tokenizer):
            other = type(part)(**part.sizes)
            assert other.sizes == part.sizes
            assert {k: v.shape for k, v in other.state_dict().items()} == {
                k: v.shape for k, v in part.state_dict().items()
            }
    assert universal().net.sizes == dict(
        grid=(4, 4), token_dim=4, dim=16, depth=2, z_dim=3, mlp_ratio=3, heads=2, hidden="mask"
    )


def test_what_is_loaded_can_be_saved_again(tmp_path):
    universal().save(tmp_path / "a.pt")
    blv.load(tmp_path / "a.pt").save(tmp_path / "b.pt")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_numbers_of_any_type_are_saved(tmp_path):
    sizes = {name: np.int64(size) for name, size in dict(token_dim=4, dim=16, depth=1, z_dim=3, heads=2).items()}
    net = UniversalViT(grid=np.array([4, 4]), **sizes)
    BigLearnVAE(net, Patchify(np.int64(8), np.int64(2), np.int64(1)), variance=torch.tensor(0.5)).save(
        tmp_path / "a.pt"
    )
    assert blv.load(tmp_path / "a.pt").variance == 0.5
    tokens = PatchAE(image_size=np.int64(8), patch_size=np.int64(4), channels=1, width=np.int64(8))
    net = UniversalViT(grid=tokens.grid, token_dim=tokens.token_dim, dim=16, depth=1, z_dim=2)
    BigLearnVAE(net, tokens, variance=np.float64(0.5)).save(tmp_path / "b.pt")
    assert blv.load(tmp_path / "b.pt").net.sizes == net.sizes


def test_loading_draws_nothing_and_shares_nothing(tmp_path):
    vae = on_codes()
    vae.save(tmp_path / "a.pt")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    blv.load(tmp_path / "a.pt")
    assert torch.equal(torch.rand(3), expected)
    copy = PatchAE.from_state(vae.tokenizer.state())
    before = vae.tokenizer.code_mean.clone()
    copy.fit_statistics([torch.rand(9, 1, 8, 8)])
    assert torch.equal(vae.tokenizer.code_mean, before) and not torch.equal(copy.code_mean, before)


def test_a_file_of_another_version_is_named(tmp_path):
    universal().save(tmp_path / "a.pt")
    state = checkpoint.load(tmp_path / "a.pt")
    state["net"]["state"]["sizes"]["colour"] = 3
    checkpoint.save(tmp_path / "a.pt", state)
    with pytest.raises(ValueError, match=r"a\.pt: expected the state of a UniversalViT, sizes and weights: .*colour"):
        blv.load(tmp_path / "a.pt")


class Own(UniversalViT):
    """A network of a user's own, whose code no file can hold."""


class Cut(Patchify):
    """A tokenizer of a user's own."""


def test_parts_of_ones_own_take_their_weights(tmp_path):
    def own(dim: int = 16) -> Own:
        return Own(grid=(4, 4), token_dim=4, dim=dim, depth=1, z_dim=3)

    def exact() -> LinearGaussian:
        return LinearGaussian()

    for make, cut in ((own, (8, 2, 1)), (exact, ((4, 6), 2, 1))):
        vae = BigLearnVAE(trained(make()), Cut(*cut), "standard", 0.3)
        vae.save(tmp_path / "model.pt")
        again = blv.load(tmp_path / "model.pt", "cpu", net=make(), tokenizer=Cut(*cut))
        assert torch.equal(again.sample(3, seed=0), vae.sample(3, seed=0))
        assert (again.prior, again.variance, type(again.net)) == ("standard", 0.3, type(vae.net))
        assert not any(parameter.requires_grad for parameter in again.net.parameters())
        kind = type(vae.net).__name__
        with pytest.raises(ValueError, match=rf"model\.pt: its net is a {kind} of one's own, .*net={kind}\(\.\.\.\)"):
            blv.load(tmp_path / "model.pt")
        with pytest.raises(ValueError, match="its tokenizer is a Cut of one's own"):
            blv.load(tmp_path / "model.pt", net=make())
    BigLearnVAE(own(), Patchify(8, 2, 1)).save(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt: the file holds another architecture than Own"):
        blv.load(tmp_path / "model.pt", net=own(8))
    with pytest.raises(ValueError, match="its tokenizer is a Patchify, which needs no tokenizer="):
        blv.load(tmp_path / "model.pt", net=own(), tokenizer=Patchify(8, 2, 1))
    with pytest.raises(ValueError, match=r"net and tokenizer are for a file of BigLearnVAE\.save, .* is none"):
        blv.load(tmp_path, net=own())


def test_a_folder_is_no_file_to_save_into(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"such as {tmp_path / 'model.pt'}, got a folder")):
        universal().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_model_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"net": {}, "metadata": {"config": {}}})
    with pytest.raises(ValueError, match=r"is not a model that BigLearnVAE\.save wrote: load a run by its folder"):
        blv.load(path)
    checkpoint.save(path, {"optimizers": [], "metadata": {}, "net": {}})
    with pytest.raises(ValueError, match=r"it is of a Trainer, whose resume\(\) takes it"):
        blv.load(path)
    for content in ({"a": 1}, {"net": {"kind": "nn.Linear", "state": {}}}, {"net": 3}):
        checkpoint.save(path, content)
        with pytest.raises(ValueError, match=r"is not a model that BigLearnVAE\.save wrote$"):
            blv.load(path)
    path.write_bytes(b"other")
    with pytest.raises(ValueError, match=r"model\.pt is not a readable checkpoint"):
        blv.load(path)
    universal().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged"):
        blv.load(path)
    with pytest.raises(ValueError, match=r"there is no file .*, nor a run of that name"):
        blv.load(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint must be best or latest, got 'worst'"):
        blv.load(path, which="worst")
    with pytest.raises(OSError, match="could not write"):
        universal().save(path / "below.pt")
