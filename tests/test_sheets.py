"""Sheets: every image exactly and in its place, and no words over anything."""

import itertools

import numpy as np
import pytest

from biglearn_vae import sheets


def find(picture: np.ndarray, pixels: np.ndarray) -> list[tuple[int, int]]:
    """Every place (top, left) where these pixels are part of the picture."""
    height, width, _ = pixels.shape
    places = np.argwhere((picture == pixels[0, 0]).all(-1)).tolist()
    return [(y, x) for y, x in places if np.array_equal(picture[y : y + height, x : x + width], pixels)]


@pytest.mark.parametrize(("size", "scale"), [((8, 8), 8), ((4, 12), 5), ((28, 28), 2), ((70, 100), 1)])
def test_a_sheet_shows_every_image_exactly_and_in_its_place(size, scale):
    cells = np.random.default_rng(0).random((3, 4, *size, 3))
    columns, rows = ["one", "two words here", "incomprehensibilities", ""], ["a", "a label of many words", "c"]
    picture = sheets.sheet("title", "caption", [sheets.Block(cells, "heading", columns, rows, group=2)])
    assert picture.dtype == np.uint8
    enlarged = (cells * 255).round().astype(np.uint8).repeat(scale, 2).repeat(scale, 3)
    places = np.array([[find(picture, enlarged[r, c]) for c in range(4)] for r in range(3)])
    assert places.shape == (3, 4, 1, 2)  # each once
    tops, lefts = places[:, :, 0, 0], places[:, :, 0, 1]
    assert (tops == tops[:, :1]).all() and (lefts == lefts[:1]).all()
    assert (np.diff(tops[:, 0]) > size[0] * scale).all() and (np.diff(lefts[0]) > size[1] * scale).all()
    assert tops[2, 0] - tops[1, 0] > tops[1, 0] - tops[0, 0]  # more space after a group


LONG = "words that must be wrapped since they are many and the block below them is narrow"


def test_nothing_on_a_sheet_overlaps_or_is_cut_off(monkeypatch):
    pieces = []
    real = sheets._draw
    monkeypatch.setattr(sheets, "_draw", lambda piece: pieces.append(piece) or real(piece))
    blocks = [
        sheets.Block(np.zeros((2, columns, 8, size, 3)), LONG, ["a", LONG, "disproportionately"][:columns], [LONG, "b"])
        for columns, size in ((1, 8), (3, 8), (2, 90), (1, 3))
    ]
    picture = sheets.sheet(LONG, 5 * LONG, blocks, width=500)
    (piece,) = pieces
    boxes = [(left, top, left + pixels.shape[1], top + pixels.shape[0]) for left, top, pixels in piece.images]
    for x, y, words, size, bold in piece.words:
        boxes.append((x, y - size, x + sheets.text_width(words, size, bold), y + 3))
    height, width, _ = picture.shape
    assert all(0 <= left <= right <= width and 0 <= top <= bottom <= height for left, top, right, bottom in boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert picture[[0, -1]].min() == picture[:, [0, -1]].min() == 255


def test_words_are_drawn_as_wide_as_they_are_measured():
    ink = sheets.sheet("", "a_b $x^2$ \\alpha ~ p(z | x)", [sheets.Block(np.ones((1, 1, 4, 4, 3)))]).min(-1) < 128
    columns = np.nonzero(ink.any(0))[0]
    assert np.ptp(columns) + 1 == pytest.approx(sheets.text_width("a_b $x^2$ \\alpha ~ p(z | x)", 9), abs=4)


def test_areas_beside_each_other_have_an_outline_each():
    block = sheets.Block(np.full((1, 1, 8, 8, 3), 0.5))
    block.outlined[0, 0, :4, :4], block.outlined[0, 0, :4, 4:] = 1, 2
    marked = (sheets._enlarged(block, 64)[0, 0] == np.round(255 * np.array(sheets.OUTLINE))).all(-1)
    assert marked[16].nonzero()[0].tolist() == [0, 1, 30, 31, 32, 33, 62, 63]


def test_an_outline_covers_the_edge_of_an_area_alone():
    block = sheets.Block(np.full((1, 2, 8, 8, 3), 0.5))
    block.outlined[0, 1, 2:4, 2:6] = True
    pixels = sheets._enlarged(block, 64)
    marked = (pixels == np.round(255 * np.array(sheets.OUTLINE))).all(-1)
    expected = np.zeros((64, 64), bool)
    expected[16:32, 16:48] = True
    expected[18:30, 18:46] = False
    assert not marked[0, 0].any() and np.array_equal(marked[0, 1], expected)
    assert (pixels[0, 1][~expected] == 128).all()
