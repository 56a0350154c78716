import io
import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from biglearn_vae.loggers import MetricsFile, Pictures, Progress, TensorBoard

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


# --- MetricsFile ---


def log(path, steps, resume_step=0, factor=1.0) -> None:
    logger = MetricsFile(path, resume_step)
    for step in steps:
        logger.scalars(step, {"train/loss": factor * step / 3, "lr": 1e-3})
    logger.close()


def read(path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = path.read_text()
    assert content == "" or content.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in content.splitlines()]


def expected(steps, factor=1.0) -> list[dict]:
    return [{"step": step, "train/loss": factor * step / 3, "lr": 1e-3} for step in steps]


@pytest.mark.parametrize("line", [b'{"step": 3, "x\xff\xfe', b'{"step": "a"}', b"[1]", b"3", b'{"step": null}'])
def test_damaged_lines_are_dropped(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    log(path, range(1, 4))
    path.write_bytes(path.read_bytes() + line + b"\n")
    log(path, [4], resume_step=3)
    assert read(path) == expected(range(1, 5))


def test_metrics_read_back_exactly(tmp_path):
    log(tmp_path / "metrics.jsonl", range(1, 6))
    assert read(tmp_path / "metrics.jsonl") == expected(range(1, 6))


def test_metrics_are_on_disk_at_once(tmp_path):
    logger = MetricsFile(tmp_path / "metrics.jsonl")
    logger.scalars(1, {"a": 0.1})
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.1}]
    logger.close()


def test_metrics_that_are_not_finite_become_null(tmp_path):
    logger = MetricsFile(tmp_path / "metrics.jsonl")
    logger.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    logger.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1.5}]


def test_resuming_drops_later_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, range(1, 8))
    log(path, range(5, 10), resume_step=4, factor=-2.0)
    assert read(path) == expected(range(1, 5)) + expected(range(5, 10), factor=-2.0)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_keeps_every_line_of_the_step_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricsFile(path)
    logger.scalars(4, {"train/loss": 1.0})
    logger.scalars(4, {"valid/elbo": -2.0})
    logger.close()
    MetricsFile(path, resume_step=4).close()
    assert read(path) == [{"step": 4, "train/loss": 1.0}, {"step": 4, "valid/elbo": -2.0}]


def test_starting_anew_drops_all_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, range(1, 8))
    log(path, range(1, 3), factor=5.0)
    assert read(path) == expected(range(1, 3), factor=5.0)


def test_resuming_drops_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, range(1, 4))
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in range(2, last + 1):  # all of the last line but its line end is a whole line
        path.write_bytes(content[:-cut])
        log(path, [4], resume_step=100)
        assert read(path) == expected([1, 2, 4])
    path.write_bytes(content[:-1])
    log(path, [4], resume_step=100)
    assert read(path) == expected([1, 2, 3, 4])


@pytest.mark.parametrize("line", ["", "12", "null", "[]", '"step"', "{}", '{"train/loss": 1}', '{"step": 2, "a":'])
def test_resuming_drops_foreign_lines(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    log(path, [1, 2])
    path.write_text(path.read_text() + line + "\n")
    log(path, [3], resume_step=2)
    assert read(path) == expected([1, 2, 3])


# --- TensorBoard ---


def log_events(folder, steps, resume_step=0, factor=1.0) -> None:
    logger = TensorBoard(folder, resume_step)
    for step in steps:
        logger.scalars(step, {"train/loss": factor * step / 3, "lr": 1e-3})
        logger.picture(step, "inpainting", PIXELS)
    logger.close()


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder, name: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(name)]


def age(folder) -> None:
    """Let the event files be those of an earlier second: TensorBoard reads them in the order of their names."""
    for path in list(folder.iterdir()):
        head, _, tail = path.name.partition("tfevents.")
        path.rename(path.with_name(f"{head}tfevents.0000000001{tail[10:]}"))


def single(value: float) -> float:
    """As TensorBoard stores it."""
    return float(np.float32(value))


def test_tensorboard_reads_back(tmp_path):
    log_events(tmp_path, [1, 5, 9])
    assert scalars(tmp_path, "train/loss") == [(step, single(step / 3)) for step in (1, 5, 9)]
    assert scalars(tmp_path, "lr") == [(step, single(1e-3)) for step in (1, 5, 9)]
    images = events(tmp_path).Images("inpainting")
    assert [image.step for image in images] == [1, 5, 9]
    for image in images:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), PIXELS)


@pytest.mark.parametrize("resume_step", [0, 2, 4, 6])
def test_resuming_hides_later_events(tmp_path, resume_step):
    log_events(tmp_path, range(1, 7))
    age(tmp_path)
    log_events(tmp_path, range(resume_step + 1, 9), resume_step, factor=-2.0)
    expected = [(step, single((1 if step <= resume_step else -2) * step / 3)) for step in range(1, 9)]
    assert scalars(tmp_path, "train/loss") == expected
    assert [image.step for image in events(tmp_path).Images("inpainting")] == list(range(1, 9))


# --- Pictures ---


def test_pictures_read_back(tmp_path):
    logger = Pictures(tmp_path / "made" / "by it")
    for step in (0, 20, 1_234_567):
        logger.picture(step, "inpainting", PIXELS + np.uint8(step % 7))
    logger.close()
    paths = sorted((tmp_path / "made" / "by it").iterdir())
    names = ["inpainting-0000000.png", "inpainting-0000020.png", "inpainting-1234567.png"]
    assert [path.name for path in paths] == names
    for path, step in zip(paths, (0, 20, 1_234_567), strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), PIXELS + np.uint8(step % 7))


# --- Progress ---


def test_progress_without_a_terminal_is_a_line_per_report():
    stream = io.StringIO()
    logger = Progress(1000, first_step=100, stream=stream)
    logger.scalars(200, {"train/loss": 1.23456, "train/kl": 1234.5, "valid/elbo": -0.5})
    logger.scalars(300, {"train/loss": math.nan})
    logger.picture(300, "inpainting", PIXELS)
    logger.close()
    assert stream.getvalue() == "step 200/1000  loss 1.235  kl 1,234  valid/elbo -0.500\nstep 300/1000  loss nan\n"


def test_progress_leaves_out_what_is_for_the_files():
    # The names under which the trainer reports.
    stream = io.StringIO()
    logger = Progress(10, stream=stream)
    logger.scalars(2, {"train/loss": 1.0, "train/grad_norm": 77.0, "lr": 55.0, "seconds": 66.0})
    assert stream.getvalue() == "step 2/10  loss 1.000\n"


def test_a_picture_says_what_it_is_of(tmp_path):
    path = tmp_path / "one.png"
    for about in ("best.pt of step 9, « test » images", ""):
        Pictures.save(path, np.zeros((2, 3, 3), dtype=np.uint8), about)
        assert Pictures.about(path) == about
    path.write_bytes(path.read_bytes()[:20])
    assert Pictures.about(path) == "" and Pictures.about(tmp_path / "none.png") == ""
