"""Decoding many files, and the cache: the same bytes by every way, and nothing half-made ever passes for whole."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from biglearn_vae import image_files
from biglearn_vae.files import LOCK
from biglearn_vae.image_files import Files, Recipe

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(4, 3)


def write_images(
    folder: Path, count: int, size: tuple[int, int] = (6, 5), first: int = 0, suffix: str = "png"
) -> Files:
    """Noise, another for each, and the files in an order that is not that of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(first, first + count):
        noise = np.random.default_rng(k).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{k:04d}.{suffix}")
    return listed(folder)


def listed(folder: Path) -> Files:
    sizes = image_files.scan(folder)
    return Files(folder, {name: sizes[name] for name in sorted(sizes, key=lambda name: name[::-1])})


def in_memory(files: Files, recipe: Recipe = RECIPE) -> torch.Tensor:
    return image_files.read(files, recipe).pixels


def the_cache(cache: Path) -> Path:
    (folder,) = cache.iterdir()
    return folder


def bytes_of(folder: Path) -> bytes:
    return (folder / image_files.PIXELS).read_bytes()


def garble(path: Path) -> None:
    """Other content of the same size and time."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def files(tmp_path) -> Files:
    return write_images(tmp_path / "images", 20)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(image_files, "CHUNK_FILES", 3)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


# --- one file ---


@pytest.mark.parametrize(("size", "crop"), [((40, 60), 30), ((61, 40), 33), ((40, 60), 40)])
def test_the_crop_is_the_square_in_the_middle(tmp_path, size, crop):
    (name,) = write_images(tmp_path, 1, size).stats
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    with Image.open(tmp_path / name) as image:
        square = image.crop((left, top, left + crop, top + crop))
        for side in (crop, 16):
            expected = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
            decoded = image_files.decode(tmp_path / name, Recipe(side, 3, crop))
            assert torch.equal(decoded, torch.from_numpy(expected.copy()).permute(2, 0, 1))


@pytest.mark.parametrize("crop", [41, 1000])
def test_of_an_image_smaller_than_the_crop_the_largest_square_is_taken(tmp_path, crop):
    (name,) = write_images(tmp_path, 1, (40, 60)).stats
    decoded = [image_files.decode(tmp_path / name, Recipe(16, 3, side)) for side in (crop, None)]
    assert torch.equal(*decoded)


def test_files_are_found_with_their_sizes(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, size in (("x.png", 3), ("a/y.txt", 5), ("a/b/z.JPG", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "link.png").symlink_to(tmp_path / "a" / "b" / "z.JPG")
    (tmp_path / "nothing.png").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "folder.png").symlink_to(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")  # and so on without end
    top = {"x.png": 3, "link.png": 7, "nothing.png": 0, "loop.png": 0}  # the last cannot be read, and are told then
    assert {name: size for name, (size, _) in image_files.scan(tmp_path).items()} == top
    found = {"a/y.txt": 5, "a/b/z.JPG": 7, "folder.png/z.JPG": 7, "folder.png/up/y.txt": 5}
    deep = image_files.scan(tmp_path, deep=True)
    assert {name: size for name, (size, _) in deep.items()} == top | found
    assert deep["link.png"][1] == (tmp_path / "a/b/z.JPG").stat().st_mtime_ns
    names = [name for name in deep if image_files.is_image(name)]
    with pytest.warns(UserWarning, match=r"6 of 6 .*nothing\.png .*No such file"):
        image_files.read(Files(tmp_path, {name: deep[name] for name in sorted(names, reverse=True)}), RECIPE)
    texts = {name for name in image_files.scan(tmp_path, True) if not image_files.is_image(name)}
    assert texts == {"a/y.txt", "folder.png/up/y.txt"}


# --- the cache holds what decoding into memory gives ---


@pytest.mark.parametrize("recipe", [RECIPE, Recipe(7, 1), Recipe(3, 3, crop=4)], ids=str)
def test_cached_and_decoded_images_are_the_same(files, cache, small_chunks, recipe):
    expected = in_memory(files, recipe)
    assert expected.shape == (20, *recipe.shape) and expected.dtype == torch.uint8
    for row, name in zip(expected, files.stats, strict=True):
        assert torch.equal(row, image_files.decode(files.root / name, recipe))
    for _ in range(2):
        decoded = image_files.read(files, recipe, cache)
        assert torch.equal(decoded.pixels, expected)
        assert (decoded.names, decoded.note) == (list(files.stats), "")
    assert bytes_of(the_cache(cache)) == expected.numpy().tobytes()


def test_later_reads_open_no_file(files, cache):
    expected = in_memory(files)
    image_files.read(files, RECIPE, cache)
    for name in files.stats:
        garble(files.root / name)
    assert torch.equal(image_files.read(listed(files.root), RECIPE, cache).pixels, expected)


def test_what_is_written_to_mapped_images_stays_out_of_the_cache(files, cache):
    expected = in_memory(files)
    image_files.read(files, RECIPE, cache).pixels.zero_()
    assert torch.equal(image_files.read(files, RECIPE, cache).pixels, expected)


def test_each_recipe_kind_and_folder_has_a_cache_of_its_own(files, cache, tmp_path):
    shutil.copytree(files.root, tmp_path / "copy")
    for kind, recipe, source in (
        ("a", RECIPE, files.root),
        ("a", Recipe(4, 1), files.root),
        ("a", Recipe(5, 3), files.root),
        ("a", Recipe(4, 3, 4), files.root),
        ("b", RECIPE, files.root),
        ("a", RECIPE, tmp_path / "copy"),
    ):
        decoded = image_files.read(Files(source, files.stats), recipe, cache, kind)
        assert torch.equal(decoded.pixels, in_memory(files, recipe))
    names = sorted(folder.name.rpartition("-")[0] for folder in cache.iterdir())
    assert names == ["a-4", "a-4", "a-4", "a-4-crop4", "a-5", "b-4"]


def test_another_path_to_the_same_folder_is_the_same_cache(files, cache, tmp_path, monkeypatch):
    image_files.read(files, RECIPE, cache)
    (tmp_path / "link").symlink_to(files.root)
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "link", Path("images")):
        image_files.read(Files(root, files.stats), RECIPE, cache)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("name", [None, "cache"])
def test_files_that_cannot_be_read_are_remembered(files, tmp_path, small_chunks, name):
    names = list(files.stats)
    for bad in (names[0], names[7], names[19]):
        (files.root / bad).write_bytes(b"no image")
    files = listed(files.root)
    for _ in range(2):
        with pytest.warns(UserWarning) as caught:
            decoded = image_files.read(files, RECIPE, name and tmp_path / name)
        assert [str(warning.message) for warning in caught] == [decoded.note]
        assert decoded.note.startswith("3 of 20 image files could not be read and were skipped: ")
        assert all(str(files.root / bad) in decoded.note for bad in (names[0], names[7], names[19]))
        assert decoded.names == [n for n in names if n not in (names[0], names[7], names[19])]
        for row, readable in zip(decoded.pixels, decoded.names, strict=True):
            assert torch.equal(row, image_files.decode(files.root / readable, RECIPE))


@pytest.mark.parametrize("name", [None, "cache"])
def test_no_file_at_all_and_none_that_can_be_read(tmp_path, name):
    cache = name and tmp_path / name
    assert image_files.read(Files(tmp_path, {}), RECIPE, cache).pixels.shape == (0, 3, 4, 4)
    assert not (tmp_path / "cache").exists()
    (tmp_path / "a.png").write_bytes(b"no image")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 of 1 image files"):
            assert image_files.read(Files(tmp_path, {"a.png": (8, 0)}), RECIPE, cache).pixels.shape == (0, 3, 4, 4)


# --- other files than the cache was made of ---


def test_changed_files_are_decoded_again(files, cache):
    image_files.read(files, RECIPE, cache)
    write_images(files.root, 5, first=20)
    changes = [listed(files.root)]
    (files.root / "0003.png").unlink()
    (files.root / "0004.png").rename(files.root / "0099.png")
    shutil.copy(files.root / "0005.png", files.root / "0006.png")
    changes += [listed(files.root), Files(files.root, dict(reversed(listed(files.root).stats.items())))]
    for changed, words in zip(
        changes[1:], ("20 files then, 24 now", "other names, sizes, times or order"), strict=True
    ):
        with pytest.warns(UserWarning, match=f"was made of other images .{words}. and is made again"):
            pixels = image_files.read(changed, RECIPE, cache).pixels
        assert torch.equal(pixels, in_memory(changed))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_files.read(changes[-1], RECIPE, cache)


def test_files_of_the_same_size_that_were_written_anew_are_decoded_again(tmp_path, cache):
    names = [f"{k}.bmp" for k in range(4)]
    for name in names:
        Image.new("RGB", (4, 4), "red").save(tmp_path / name)
    files = listed(tmp_path)
    image_files.read(files, RECIPE, cache)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / names[2])
    with pytest.warns(UserWarning, match=r"was made of other images \(other names, sizes, times or order\)"):
        pixels = image_files.read(listed(tmp_path), RECIPE, cache).pixels
    assert torch.equal(pixels, in_memory(files))
    for one, other in ((names[2], "kept"), (names[0], names[2]), ("kept", names[0])):  # they change places, older times
        (tmp_path / one).rename(tmp_path / other)
    with pytest.warns(UserWarning, match="was made of other images"):
        swapped = image_files.read(listed(tmp_path), RECIPE, cache).pixels
    assert torch.equal(swapped, in_memory(files)) and not torch.equal(swapped, pixels)


def test_an_image_whose_turn_is_not_known_is_taken_as_it_is(tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", exif=b"Exif\0\0garbage")
    one, other = (image_files.decode(tmp_path / name, RECIPE) for name in ("a.png", "b.png"))
    assert torch.equal(one, other)


def test_dark_images_of_16_bits_are_dark_in_any_format(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 250, (8, 8), dtype=np.uint16)
    (tmp_path / "dark.pgm").write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
    Image.fromarray(pixels).save(tmp_path / "dark.png")
    one, other = (image_files.decode(tmp_path / name, Recipe(8, 1)) for name in ("dark.pgm", "dark.png"))
    assert torch.equal(one, other) and one.max() == 1


def test_images_that_are_in_use_survive_when_their_cache_is_made_again(files, cache):
    pixels, expected = image_files.read(files, RECIPE, cache).pixels, in_memory(files)
    write_images(files.root, 5, first=20)
    with pytest.warns(UserWarning, match="made again"):
        image_files.read(listed(files.root), RECIPE, cache)
    assert torch.equal(pixels, expected)


# --- what cannot be used ---


def change_index(**values):
    def change(folder: Path) -> None:
        path = folder / image_files.INDEX
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def rename_folder(folder: Path) -> None:
    """The name of another recipe's cache."""
    cache, images = folder.parent, folder.parents[1] / "images"
    image_files.read(listed(images), Recipe(5, 3), cache)
    (other,) = set(cache.iterdir()) - {folder}
    shutil.rmtree(folder)
    other.rename(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / image_files.INDEX).write_text("{ half"), "index.json is damaged: it cannot be read"),
        (lambda folder: (folder / image_files.INDEX).write_bytes(b"\xff\xfe"), "index.json is damaged"),
        (lambda folder: (folder / image_files.INDEX).write_text("[]"), "index.json is damaged"),
        (change_index(other=3), "index.json is damaged"),
        (change_index(files="20"), "index.json is damaged: it holds something else"),
        (change_index(done=19), "index.json is damaged: 19 of 20 files"),
        (lambda folder: (folder / image_files.PIXELS).unlink(), "pixels.u8 is not there, 960 bytes were expected"),
        (lambda folder: os.truncate(folder / image_files.PIXELS, 959), "pixels.u8 has 959 bytes, 960 bytes were"),
        (lambda folder: os.truncate(folder / image_files.PIXELS, 961), "pixels.u8 has 961 bytes"),
        (rename_folder, "its size is 5, not 4"),
    ],
)
def test_a_damaged_cache_is_refused_until_it_is_deleted(files, cache, damage, words):
    image_files.read(files, RECIPE, cache)
    folder = the_cache(cache)
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        image_files.read(files, RECIPE, cache)
    assert f"the cache {folder} cannot be used" in str(caught.value)
    assert "Delete that folder, or give data.cache=FOLDER" in str(caught.value)
    shutil.rmtree(folder)
    assert torch.equal(image_files.read(files, RECIPE, cache).pixels, in_memory(files))


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_cache_that_cannot_be_written(files, tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the cache .*file.* cannot be written \(.*give data.cache=FOLDER"):
        image_files.read(files, RECIPE, tmp_path / "file" / below)


def test_a_full_disk_stops_the_work_and_the_next_start_goes_on(files, cache, small_chunks):
    expected, limits = in_memory(files), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (11 * RECIPE.bytes, limits[1]))
    try:
        with pytest.raises(ValueError, match=r"cannot be written \(File too large\): make room or give data.cache"):
            image_files.read(files, RECIPE, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    folder = the_cache(cache)
    assert not (folder / image_files.INDEX).exists()
    assert json.loads((folder / image_files.PROGRESS).read_text())["done"] == 9
    assert torch.equal(image_files.read(files, RECIPE, cache).pixels, expected)


def test_more_images_than_the_disk_or_the_memory_holds(files, cache):
    recipe = Recipe(2_000_000, 3)
    with pytest.raises(ValueError, match=r"cannot be written \(240000.0 GB are needed and .* are free\)"):
        image_files.read(files, recipe, cache)
    with pytest.raises(ValueError, match=r"20 images of 2000000 x 2000000 pixels need 240000.0 GB of memory"):
        image_files.read(files, recipe)


# --- interrupted work ---


def test_an_interrupted_build_goes_on_from_the_last_chunk(files, cache, small_chunks):
    expected = in_memory(files)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &

    def interrupt():
        while not list(cache.glob(f"*/{image_files.PROGRESS}")):
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        image_files.read(Files(Slow(files.root), files.stats), RECIPE, cache)
    thread.join()
    signal.signal(signal.SIGINT, before)
    go_on(files, cache, expected)


class Slow(type(Path())):
    """A folder whose files take a while, so that a signal comes before the end."""

    def __truediv__(self, name):
        time.sleep(0.01)
        return Path(self) / name


def go_on(files: Files, cache: Path, expected: torch.Tensor) -> None:
    """Finish what was interrupted: the files that were done are not opened again."""
    folder = the_cache(cache)
    progress = json.loads((folder / image_files.PROGRESS).read_text())
    assert not (folder / image_files.INDEX).exists() and 0 < progress["done"] < len(files)
    with (folder / image_files.PIXELS).open("ab") as out:
        out.write(b"part of a chunk")
    for name in list(files.stats)[: progress["done"]]:
        garble(files.root / name)
    assert torch.equal(image_files.read(files, RECIPE, cache).pixels, expected)
    assert not (folder / image_files.PROGRESS).exists()
    assert bytes_of(folder) == expected.numpy().tobytes()


def in_another_process(files: Files, cache: Path) -> int:
    """Read slowly there; returns the process's number."""
    number = os.fork()
    if number:
        return number
    try:
        warnings.simplefilter("ignore")
        image_files.read(Files(Slow(files.root), files.stats), RECIPE, cache)
        os._exit(0)
    finally:
        os._exit(1)


def test_a_killed_build_goes_on_from_the_last_chunk(tmp_path, cache, small_chunks):
    files = write_images(tmp_path / "images", 60)
    expected = in_memory(files)
    number = in_another_process(files, cache)
    while not list(cache.glob(f"*/{image_files.PROGRESS}")):
        time.sleep(0.001)
    os.kill(number, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
    go_on(files, cache, expected)


@pytest.mark.parametrize("left", ["other files", "damaged", "short"])
def test_unfinished_work_that_is_of_no_use_is_done_anew(files, cache, left):
    expected = in_memory(files)
    image_files.read(files, RECIPE, cache)
    folder = the_cache(cache)
    (folder / image_files.INDEX).rename(folder / image_files.PROGRESS)
    if left == "other files":
        write_images(files.root, 1, first=20)
        files = listed(files.root)
        expected = in_memory(files)
    elif left == "damaged":
        (folder / image_files.PROGRESS).write_text("{ half")
    else:
        os.truncate(folder / image_files.PIXELS, 500)
    (folder / image_files.PIXELS).write_bytes(bytes((folder / image_files.PIXELS).stat().st_size))
    assert torch.equal(image_files.read(files, RECIPE, cache).pixels, expected)


# --- several processes ---


def test_a_process_waits_for_the_one_that_writes(files, cache):
    image_files.read(files, RECIPE, cache)
    folder, expected = the_cache(cache), in_memory(files)
    (folder / image_files.INDEX).unlink()
    holder = (folder / LOCK).open("w")
    fcntl.flock(holder, fcntl.LOCK_EX)
    print("process 17 on elsewhere", file=holder, flush=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def let_go():
            while not caught:
                time.sleep(0.001)
            holder.close()

        thread = threading.Thread(target=let_go)
        thread.start()
        pixels = image_files.read(files, RECIPE, cache).pixels
        thread.join()
    assert [str(w.message) for w in caught] == [f"waiting for process 17 on elsewhere, which is making {folder}"]
    assert torch.equal(pixels, expected)


def test_several_processes_at_once_make_one_cache(files, cache, small_chunks):
    expected = in_memory(files)
    numbers = [in_another_process(files, cache) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pixels = image_files.read(files, RECIPE, cache).pixels
    assert [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers] == [0, 0, 0]
    assert torch.equal(pixels, expected)
    assert bytes_of(the_cache(cache)) == expected.numpy().tobytes()


# --- memory ---


def test_memory_does_not_grow_with_the_images(tmp_path):
    """From 200 to 2,000 images, 22 MB more as bytes and 88 MB as floats, with everything in parts of 4 MB."""
    write_images(tmp_path / "files", 8, (64, 64), suffix="bmp")
    for name, count in (("few", 200), ("many", 2000)):
        (tmp_path / name).mkdir()
        for k in range(count):
            os.link(tmp_path / "files" / f"{k % 8:04d}.bmp", tmp_path / name / f"{k:04d}.bmp")
    code = f"from test_image_files import *; measure_memory(Path({str(tmp_path)!r}))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    environment |= {
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_ARENA_MAX": "1",
    }  # what is freed counts as free at once
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 16_000, f"{few} kB of anonymous memory, {many} kB with many images"


def measure_memory(folder: Path) -> None:
    """Print the most anonymous memory in kB at any time, with the few images and then with the many."""
    from biglearn_vae import Batches, BigLearnELBO, BigLearnVAE, ImageSet, Patchify, UniversalViT, data, evaluation

    data.NUMBERS, image_files.CHUNK_BYTES = 2**20, 2**22
    tokens = Patchify(64, 32, 3)
    net = UniversalViT(grid=tokens.grid, token_dim=tokens.token_dim, dim=16, depth=1, z_dim=3, heads=2)
    vae, most = BigLearnVAE(net, tokens), [0]

    def watch():
        while True:
            status = Path("/proc/self/status").read_text()
            most[0] = max(most[0], int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]))
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    for name in ("few", "many"):
        images = ImageSet(image_files.read(listed(folder / name), Recipe(64, 3), folder / "cache").pixels)
        Batches(images, 8)(0)
        images.fingerprint()
        evaluation.elbo(vae, images, BigLearnELBO(0.1))
        evaluation.nearest_psnr(vae, images.select(slice(8)), images, [0.3, 0.7])
        time.sleep(0.02)
        print(most[0])
