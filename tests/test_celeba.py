"""CelebA from small files of the official layout, and some of the real faces where they are."""

import json
import os
import re
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from programs import run_here
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms.functional import center_crop

from biglearn_vae import data

TRAIN, VALID, TEST = range(1, 13), range(162_771, 162_775), range(182_638, 182_641)
ATTRIBUTES = ("Bald", "Smiling", "Young")


def name_of(number: int) -> str:
    return f"{number:06d}.jpg"


def write_face(path: Path, number: int) -> None:
    noise = np.random.default_rng(number).integers(0, 256, (27, 22, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((178, 218), Image.Resampling.BICUBIC).save(path, quality=80)


def make(folder: Path, *ranges: range) -> Path:
    """A folder that holds celeba/img_align_celeba with these images."""
    images = folder / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    for number in (n for numbers in ranges for n in numbers):
        write_face(images / name_of(number), number)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made"), TRAIN, VALID, TEST)


@pytest.fixture
def root(made, tmp_path) -> Path:
    """A copy to change."""
    shutil.copytree(made, tmp_path / "root")
    return tmp_path / "root"


def load(root: Path, **settings) -> data.Splits:
    return data.load("celeba", str(root), **{"image_size": 16} | settings)


def parts(splits: data.Splits) -> list[data.ImageSet]:
    return [getattr(splits, name) for name in data.PARTS]


def assert_holds(splits: data.Splits, root: Path, *ranges, size: int = 16, crop: int = 148) -> None:
    """The three parts are these images, in the order of their names."""
    for part, numbers in zip(parts(splits), ranges, strict=True):
        assert part.pixels.shape == (len(numbers), 3, size, size)
        for pixels, number in zip(part.pixels, numbers, strict=True):
            with Image.open(root / "celeba" / "img_align_celeba" / name_of(number)) as image:
                face = center_crop(image, [crop, crop]).resize((size, size), Image.Resampling.BICUBIC)
            assert torch.equal(pixels, torch.from_numpy(np.array(face)).permute(2, 0, 1)), number


# --- images ---


@pytest.mark.parametrize("cached", [False, True])
def test_the_official_ranges_without_a_partition(made, tmp_path, cached):
    for _ in range(2):
        splits = load(made, cache=str(tmp_path / "cache") if cached else None)
        assert_holds(splits, made, TRAIN, VALID, TEST)
        assert splits.note == "202,580 of 202,599 images of the partition are not there"
        assert splits.label_names == () and all(part.labels is None for part in parts(splits))
    # One after the other in one piece of memory, the file where there is a cache: nothing was copied.
    ends = [part.pixels.data_ptr() + part.pixels.numel() for part in parts(splits)]
    assert ends[:2] == [part.pixels.data_ptr() for part in parts(splits)][1:]


@pytest.mark.parametrize("inner", [".", "celeba"])
def test_the_root_may_be_the_folder_itself(made, inner):
    splits = load(made / inner)
    assert_holds(splits, made, TRAIN, VALID, TEST)


def test_other_sizes_and_crops(made):
    assert_holds(load(made, image_size=20, crop=100), made, TRAIN, VALID, TEST, size=20, crop=100)
    largest = load(made, crop=None).train.pixels
    assert torch.equal(largest, load(made, crop=1000).train.pixels)
    assert not torch.equal(largest, load(made).train.pixels)
    assert load(made, channels=1).train.pixels.shape == (12, 1, 16, 16)
    assert load(made, image_size=None).train.pixels.shape == (12, 3, 128, 128)


def test_images_of_a_split(made):
    assert torch.equal(data.images("celeba", "valid", str(made), 16, crop=100), load(made, crop=100).valid[:])


def test_images_that_cannot_be_read_are_skipped(root, tmp_path):
    images = root / "celeba" / "img_align_celeba"
    (images / name_of(5)).write_bytes((images / name_of(5)).read_bytes()[:3000])
    write_attributes(root, {n: (n % 2, 1, 0) for n in (*TRAIN, *VALID, *TEST)})
    for cache in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        with pytest.warns(
            UserWarning, match=r"1 of 19 image files could not be read.*000005\.jpg \(image file is trunc"
        ):
            splits = load(root, cache=cache)
        left = [n for n in TRAIN if n != 5]
        assert_holds(splits, root, left, VALID, TEST)
        assert splits.train.labels[:, 0].tolist() == [n % 2 for n in left]
        assert splits.note.startswith("202,580 of 202,599 images of the partition are not there; 1 of 19 image files")


# --- the partition ---


def write_partition(root: Path, lines: list[str]) -> Path:
    path = root / "celeba" / "list_eval_partition.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def official_lines() -> list[str]:
    return [f"{name_of(n)} {(n > 162_770) + (n > 182_637)}" for n in range(1, 202_600)]


def test_the_official_file_gives_the_official_ranges(root):
    expected = load(root)
    write_partition(root, official_lines())
    splits = load(root)
    assert splits.note == expected.note
    assert [part.fingerprint() for part in parts(splits)] == [part.fingerprint() for part in parts(expected)]


def test_the_files_partition_is_followed(root):
    lines = [f"{name_of(n)} {n % 3}" for n in reversed(TRAIN)]
    write_partition(root, [*lines, "", f"{name_of(99)}   2"])
    splits = load(root)
    assert_holds(splits, root, (3, 6, 9, 12), (1, 4, 7, 10), (2, 5, 8, 11))
    assert splits.note == (
        "1 of 13 images of the partition are not there; 7 files that the partition does not name were ignored"
    )


@pytest.mark.parametrize(
    "line", ["000003.jpg", "000003.jpg 3", "000003.jpg 0 0", "3.jpg 0", "000003.png 0", "000001.jpg 0", "\0\xff"]
)
def test_a_malformed_partition_is_refused(root, line):
    path = write_partition(root, ["000001.jpg 0", "000002.jpg 0", line])
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 3: expected an image and its part")):
        load(root)


@pytest.mark.parametrize(("ranges", "part"), [((VALID, TEST), "train"), ((TRAIN, TEST), "valid"), ((TRAIN,), "valid")])
def test_a_part_without_images_is_refused(tmp_path, ranges, part):
    make(tmp_path, *ranges)
    count, example = sum(map(len, ranges)), {"train": "000001.jpg", "valid": "162771.jpg"}[part]
    with pytest.raises(ValueError) as caught:
        load(tmp_path)
    folder = tmp_path / "celeba" / "img_align_celeba"
    assert f"{folder} holds no readable {part} image, such as {example}, of {count} images" in str(caught.value)
    write_partition(tmp_path, ["000001.jpg 1"])
    with pytest.raises(ValueError, match=r"list_eval_partition.txt beside .* names no train image"):
        load(tmp_path)


# --- attributes ---


def write_attributes(root: Path, rows: dict[int, tuple[int, ...]]) -> Path:
    path = root / "celeba" / "list_attr_celeba.txt"
    lines = [f"{name_of(n)} " + " ".join("-1" if not value else " 1" for value in row) for n, row in rows.items()]
    path.write_text("\n".join([str(len(rows)), " ".join(ATTRIBUTES) + " ", *lines]) + "\n")
    return path


def test_attributes_become_labels(root):
    generator = np.random.default_rng(0)
    rows = {
        n: tuple(generator.integers(0, 2, 3).tolist()) for n in (*TEST, *TRAIN, 77, *VALID) if n not in (4, 162_772)
    }
    write_attributes(root, rows)
    splits = load(root)
    assert splits.label_names == ATTRIBUTES
    for part, numbers in zip(parts(splits), (TRAIN, VALID, TEST), strict=True):
        assert part.labels.dtype == torch.int64
        assert part.labels.tolist() == [list(rows.get(n, (-1, -1, -1))) for n in numbers]
    chosen = splits.train.select(torch.tensor([7, 0, 7]))
    assert chosen.labels.tolist() == [list(rows[n]) for n in (8, 1, 8)]


def test_attributes_that_were_cut_short_are_warned_of(root):
    path = write_attributes(root, {n: (1, 0, 1) for n in (*TRAIN, *VALID, *TEST)})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + "".join(lines[:12]), encoding="utf-8")  # as some editors begin
    with pytest.warns(UserWarning, match=r"says that it has 19 images and has 10: it may have been cut short"):
        splits = load(root)
    assert splits.note.endswith("9 images have no attributes") and (splits.test.labels == -1).all()


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        ([], 1, "expected a number of images"),
        (["many", "Bald Young"], 1, "expected a number of images"),
        (["2"], 1, "expected a number of images"),
        (["2", "Bald Young", "000001.jpg 1"], 3, "2 numbers that are 1 or -1, got '000001.jpg 1'"),
        (["2", "Bald Young", "000001.jpg 1 -1", "000002.jpg 1 0"], 4, "2 numbers that are 1 or -1"),
        (["2", "Bald Young", "000001.jpg 1 -1", "", "000001.jpg 1 1"], 5, "each once"),
    ],
)
def test_malformed_attributes_are_refused(root, lines, number, words):
    path = root / "celeba" / "list_attr_celeba.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {number}: ") + f".*{re.escape(words)}"):
        load(root)


# --- options ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="digits", crop=4), "data set digits takes no crop"),
        (dict(name="mnist", cache="x"), "data set mnist takes no cache"),
        (dict(name="celeba", crops=4), "data set celeba takes no crops"),
        (dict(name="celeba", crop=0), "crop must be at least 1, got 0"),
        (dict(name="image_folder", crop=-3), "crop must be at least 1"),
    ],
)
def test_options_that_a_data_set_does_not_take(settings, message):
    with pytest.raises(ValueError, match=message):
        data.load(**settings)


# --- nothing there ---


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A folder whose files stand for those of the official server; without them there is no network."""
    folder = tmp_path / "server"

    def download(file_id: str, root: str, filename: str, md5: str) -> None:
        Path(root).mkdir(parents=True, exist_ok=True)
        if not (folder / filename).exists():
            raise RuntimeError("no network\nnowhere")
        shutil.copy(folder / filename, root)

    monkeypatch.setattr(torchvision.datasets.celeba, "download_file_from_google_drive", download)
    return folder


@pytest.mark.parametrize("root", ["root", "root/deeper"])
def test_what_to_do_where_nothing_is(server, tmp_path, root):
    with pytest.raises(ValueError) as caught:
        load(tmp_path / root)
    message, place = str(caught.value), tmp_path / root / "celeba"
    assert f"CelebA is not in {place} and could not be downloaded (no network). Unpack" in message
    for words in (
        f"{place}/img_align_celeba holds 000001.jpg to 202599.jpg",
        "list_eval_partition.txt",
        "list_attr_celeba.txt",
        "point data.root at the folder that holds celeba",
    ):
        assert words in message
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays_when_nothing_can_be_downloaded(server, tmp_path):
    (tmp_path / "celeba" / "img_align_celeba").mkdir(parents=True)
    (tmp_path / "celeba" / "identity_CelebA.txt").write_text("something")
    with pytest.raises(ValueError, match="could not be downloaded"):
        load(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"celeba", "img_align_celeba", "identity_CelebA.txt"}


def test_a_download_is_unpacked_and_read(made, server, tmp_path, monkeypatch):
    server.mkdir()
    with zipfile.ZipFile(server / "img_align_celeba.zip", "w") as archive:
        for path in (made / "celeba" / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    names = [name_of(n) for numbers in (TRAIN, VALID, TEST) for n in numbers]
    heads = {"list_attr_celeba.txt": "19\nBald Young\n", "identity_CelebA.txt": "", "list_eval_partition.txt": ""}
    heads |= {f"list_{kind}_celeba.txt": "19\na b\n" for kind in ("bbox", "landmarks_align")}
    rows = {"list_attr_celeba.txt": "1 -1", "list_eval_partition.txt": None}
    for file, head in heads.items():
        row = {name: rows.get(file, "1 2") or f"{(name > '1') + (name > '18')}" for name in names}
        (server / file).write_text(head + "".join(f"{name} {values}\n" for name, values in row.items()))
    source = torchvision.datasets.CelebA
    files = [(key, calculate_md5(server / name), name) for key, _, name in source.file_list]
    monkeypatch.setattr(source, "file_list", files)
    splits = load(tmp_path / "root")
    assert_holds(splits, tmp_path / "root", TRAIN, VALID, TEST)
    assert splits.note == "" and splits.train.labels.tolist() == [[1, 0]] * 12


# --- whole commands ---

SMALL = ["data=celeba", "data.image_size=16", "data.patch_size=8", "model.dim=16", "model.heads=2", "case.depth=2"]
SMALL += ["case.split=[1,1]", "trainer.batch_size=4", "trainer.report_every=2", "trainer.evaluate_every=2"]
SMALL += ["evaluation.draws=2", "evaluation.valid_draws=2", "device=cpu", "name=run"]


def test_training_and_evaluating(root, tmp_path, monkeypatch, capsys):
    write_attributes(root, {n: (n % 2, 1, 0) for n in TRAIN})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BIGLEARN_CACHE", raising=False)
    assert run_here(monkeypatch, *SMALL, f"data.root={root}", "trainer.steps=2") == 0
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 1
    monkeypatch.setenv("BIGLEARN_CACHE", str(tmp_path / "elsewhere"))
    assert run_here(monkeypatch, *SMALL, f"data.root={root}", "trainer.steps=4") == 0
    assert "going on with outputs/run" in capsys.readouterr().out
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    words = ["run=outputs/run", "images=2", "draws=2", "masks=2", "likelihood_images=2", "samples=2"]
    assert run_here(monkeypatch, *words, script="evaluate") == 0
    run = tmp_path / "outputs" / "run"
    summary, evaluation = (json.loads((run / f"{name}.json").read_text()) for name in ("summary", "evaluation"))
    assert summary["steps"] == 4 and summary["data_note"].startswith("202,580 of 202,599")
    assert evaluation["test_joint_elbo"] == pytest.approx(summary["test_joint_elbo"])
    assert (run / "figures" / "inference.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.crop=0", "crop must be at least 1"),
        ("data.crop=wide", "data.crop must be a whole number or null, got 'wide'"),
        ("data.cache=3", "data.cache must be a word or null, got 3"),
        ("data.cache=file/deeper", "cannot be written"),
    ],
)
def test_settings_that_cannot_be_used(made, tmp_path, monkeypatch, capsys, word, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert run_here(monkeypatch, *SMALL, f"data.root={made}", "trainer.steps=2", word) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "outputs").exists()


# --- the real faces ---


@pytest.fixture
def real(tmp_path) -> Path:
    """A folder with links to 100 of the real training images and 30 of each other part, and with their lists."""
    source = Path(os.environ.get("BIGLEARN_DATA", "absent"), "celeba")
    if not (source / "img_align_celeba").is_dir():
        pytest.skip("the environment variable BIGLEARN_DATA names no folder that holds celeba/img_align_celeba")
    names = sorted(os.listdir(source / "img_align_celeba"))
    folder = tmp_path / "real" / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    edges = [0, *(int(np.searchsorted(names, name_of(last), "right")) for last in data.CELEBA_LAST.values())]
    for (start, end), count in zip(pairwise(edges), (100, 30, 30), strict=True):
        for name in names[start:end][:count]:
            (folder / "img_align_celeba" / name).symlink_to((source / "img_align_celeba" / name).resolve())
    for name in ("list_eval_partition.txt", "list_attr_celeba.txt"):
        (folder / name).symlink_to((source / name).resolve())
    return tmp_path / "real"


def test_real_faces(real, tmp_path):
    splits = data.load("celeba", str(real), cache=str(tmp_path / "cache"))
    assert [len(part) for part in parts(splits)] == [100, 30, 30]
    assert splits.note == "202,439 of 202,599 images of the partition are not there"
    assert len(splits.label_names) == 40 and splits.label_names[20] == "Male"
    images = sorted((real / "celeba" / "img_align_celeba").iterdir())
    rows = (real / "celeba" / "list_attr_celeba.txt").read_text().splitlines()[2:]
    rows = {row.split()[0]: [int(value) for value in row.split()[1:]] for row in rows}
    pixels, labels = (torch.cat([getattr(part, name) for part in parts(splits)]) for name in ("pixels", "labels"))
    assert pixels.shape == (160, 3, 128, 128) and 80 < pixels.float().mean() < 160
    for path, face, label in zip(images, pixels, labels, strict=True):
        with Image.open(path) as image:
            expected = center_crop(image, [148, 148]).resize((128, 128), Image.Resampling.BICUBIC)
        assert torch.equal(face, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
        assert (2 * label - 1).tolist() == rows[path.name]
    (real / "celeba" / "list_eval_partition.txt").unlink()
    again = data.load("celeba", str(real), cache=str(tmp_path / "cache"))
    assert [part.fingerprint() for part in parts(again)] == [part.fingerprint() for part in parts(splits)]
