import errno
import os
import random
import re

import numpy as np
import pytest
import torch

from biglearn_vae import TwoStackViT, UniversalViT, checkpoint

SIZES = dict(grid=(2, 2), token_dim=3, dim=8, z_dim=2, heads=1)


def example(step: int = 7) -> dict:
    """Everything a run keeps: tensors of several types, nested settings, numbers."""
    generator = torch.Generator().manual_seed(step)
    return {
        "step": step,
        "optimizers": [{"state": {}}],
        "best": -0.1 - step / 3,
        "net": {
            "float": torch.randn(5, 7, generator=generator),
            "double": torch.randn(3, dtype=torch.float64, generator=generator),
            "bfloat": torch.randn(4, generator=generator).bfloat16(),
            "special": torch.tensor([float("nan"), float("inf"), -0.0]),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(3),
            "view": torch.arange(12).view(3, 4).T,
        },
        "rng": torch.get_rng_state(),
        "metadata": {"config": {"name": "a name with ü", "sizes": [1, 2.5, None, True]}, "pairs": (1, "two")},
    }


def assert_same(one, other) -> None:
    """Equal in value, type and, for tensors, every bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
        assert torch.equal(*as_bytes)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def same(one, other) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folders" / "best.pt"
    checkpoint.save(path, example())
    assert_same(checkpoint.load(path), example())
    assert_same(checkpoint.load(str(path)), example())
    assert names(path.parent) == ["best.pt"]


def test_saving_replaces(tmp_path):
    path = tmp_path / "best.pt"
    for step in (1, 2):
        checkpoint.save(path, example(step))
        assert_same(checkpoint.load(path), example(step))
    assert names(tmp_path) == ["best.pt"]


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("cannot be written")


@pytest.mark.parametrize("write", [checkpoint.save, lambda path, state: checkpoint.save_latest(path.parent, state)])
def test_a_failed_save_leaves_the_old_file(tmp_path, write):
    path = tmp_path / checkpoint.LATEST
    write(path, example(1))
    before = path.read_bytes()
    with pytest.raises(OSError, match=r"disk full.*cannot be written"):
        write(path, example(2) | {"last": Unpicklable()})
    assert path.read_bytes() == before
    assert_same(checkpoint.load_latest(tmp_path), example(1))
    write(path, example(3))  # and whatever it left does not disturb the next one
    assert_same(checkpoint.load_latest(tmp_path), example(3))
    assert not list(tmp_path.glob("*.partial"))


def test_save_latest_keeps_the_previous_one(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.save_latest(folder, example(1))
    assert names(folder) == ["latest.pt"]
    for step in (2, 3, 4):
        checkpoint.save_latest(folder, example(step))
        assert names(folder) == ["latest.pt", "previous.pt"]
        assert_same(checkpoint.load(folder / "latest.pt"), example(step))
        assert_same(checkpoint.load(folder / "previous.pt"), example(step - 1))
        assert_same(checkpoint.load_latest(folder), example(step))


def test_load_latest_without_any(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.load_latest(tmp_path / "absent") is None


def damages(content: bytes) -> dict[str, bytes]:
    """Ways in which a file can be spoilt, by name."""
    rng = random.Random(0)
    cuts = [1, len(content) - 1, *(rng.randrange(2, len(content) - 1) for _ in range(15))]
    data = example(2)["net"]["float"].numpy().tobytes()
    middle = content.index(data) + len(data) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        **{f"cut at {cut}": content[:cut] for cut in cuts},
        "empty": b"",
        "garbage": rng.randbytes(len(content)),
        "text": b"not a checkpoint",
        "a flipped bit": flipped,
        "zeros at the end": content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
    }


def test_load_latest_falls_back(tmp_path):
    for step in (1, 2):
        checkpoint.save_latest(tmp_path, example(step))
    latest = tmp_path / checkpoint.LATEST
    for name, content in damages(latest.read_bytes()).items():
        latest.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(latest))):
            checkpoint.load(latest)
        with pytest.warns(UserWarning, match=re.escape(str(latest)) + r".*previous\.pt, step 1"):
            assert same(checkpoint.load_latest(tmp_path), example(1)), name


def test_no_flipped_byte_changes_what_is_loaded(tmp_path):
    path, state = tmp_path / "best.pt", example()
    checkpoint.save(path, state)
    content, rng = path.read_bytes(), random.Random(1)
    refused = 0
    for position in rng.sample(range(len(content)), 300):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ rng.randrange(1, 256)]) + content[position + 1 :]
        )
        try:
            loaded = checkpoint.load(path)
        except ValueError:
            refused += 1
        else:  # padding, say
            assert same(loaded, state), position
    assert refused > 0


def test_load_latest_without_latest(tmp_path, recwarn):
    # What a kill between the two renames of `save_latest` leaves.
    for step in (1, 2):
        checkpoint.save_latest(tmp_path, example(step))
    (tmp_path / checkpoint.LATEST).rename(tmp_path / checkpoint.FRESH)
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"damaged")  # which then took the place of the good one
    assert_same(checkpoint.load_latest(tmp_path), example(2))
    assert checkpoint.steps_in(tmp_path) == 2 and checkpoint.step_of(tmp_path / checkpoint.PREVIOUS) is None
    assert not recwarn
    checkpoint.save_latest(tmp_path, example(5))
    assert_same(checkpoint.load_latest(tmp_path), example(5))


def test_load_latest_with_both_damaged(tmp_path):
    for step in (1, 2):
        checkpoint.save_latest(tmp_path, example(step))
    for name in (checkpoint.LATEST, checkpoint.PREVIOUS):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(ValueError) as caught:
        checkpoint.load_latest(tmp_path)
    assert str(tmp_path / "latest.pt") in str(caught.value) and str(tmp_path / "previous.pt") in str(caught.value)
    (tmp_path / checkpoint.PREVIOUS).unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "latest.pt"))):
        checkpoint.load_latest(tmp_path)


def test_why_a_file_cannot_be_written_is_said_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not write .*file/a\.pt \(.*File exists"):
        checkpoint.save(tmp_path / "file/a.pt", example())
    for error in (OSError(errno.ENOSPC, "No space left"), RuntimeError("PytorchStreamWriter failed writing file")):
        monkeypatch.setattr(torch, "save", lambda *_, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(OSError, match=r"could not write .*a\.pt, is the disk full\? \("):
            checkpoint.save(tmp_path / "a.pt", example())
    assert names(tmp_path) == ["file"]


def test_load_names_a_missing_file(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(ValueError, match="no checkpoint " + re.escape(str(path))):
            checkpoint.load(path)


class Code:
    """Runs a command when it is unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    path, made = tmp_path / "best.pt", tmp_path / "made"
    checkpoint.save(path, {"step": 1, "code": Code(made)})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        checkpoint.load(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # so the file was one that would have


def test_load_weights(tmp_path):
    torch.manual_seed(0)
    one, other = (UniversalViT(**SIZES, depth=2) for _ in range(2))
    checkpoint.save(tmp_path / "best.pt", one.state_dict())
    checkpoint.load_weights(other, checkpoint.load(tmp_path / "best.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    x, S = torch.randn(3, 4, 3), torch.rand(3, 4) < 0.5
    assert torch.equal(one(x, S).mean, other(x, S).mean)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (UniversalViT(**SIZES, depth=3), "it has blocks.2.norm1.weight"),
        (UniversalViT(**SIZES, depth=1), "it lacks blocks.1.norm1.weight"),
        (TwoStackViT(**SIZES, depth=(1, 1)), "it lacks blocks.0.norm1.weight"),
        (UniversalViT(**SIZES | dict(z_dim=5), depth=2), r"latent_in.0.weight is \(16, 5\) there and \(16, 2\) here"),
        (UniversalViT(**SIZES | dict(dim=12), depth=2), r"token_mask is \(12,\) there and \(8,\) here"),
    ],
)
def test_load_weights_of_another_architecture(other, difference):
    net = UniversalViT(**SIZES, depth=2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=f"runs/a/best.pt .*UniversalViT.*{difference}"):
        checkpoint.load_weights(net, other.state_dict(), source="runs/a/best.pt")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_numbers_of_numpy_can_be_read_again(tmp_path):
    state = {"a": np.int64(3), np.str_("b"): [np.float32(0.5), (np.bool_(True), torch.ones(2))], "c": {"d": "e"}}
    checkpoint.save(tmp_path / "x.pt", state)
    found = checkpoint.load(tmp_path / "x.pt")
    assert (found["a"], found["b"][0], found["b"][1][0], found["c"]) == (3, 0.5, True, {"d": "e"})
    assert type(found["a"]) is int and found["b"][1][1].equal(torch.ones(2))
