"""Sheets: images in rows and columns with headings and labels, as one picture, uint8 (height, width, 3).

R rows and Q columns of a block, H x W pixels of each image in it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

DPI, FONT = 100, "DejaVu Sans"  # the font comes with matplotlib
SMALL, MEDIUM, LARGE = 8, 9, 12  # font sizes in points
GAP, MARGIN = 5, 16  # between images, around everything, in pixels
WIDEST = 2000  # a sheet of large images, in pixels
SPARE = 4  # pixels beside a line of text, into which its letters may reach
OUTLINE = (1.0, 0.75, 0.0)

Columns = Sequence[tuple[str, np.ndarray]]  # label and images (R, H, W, 3) of each


@dataclass(eq=False)
class Block:
    """Images in rows and columns under a heading.

    Args:
        cells: float (R, Q, H, W, 3) in [0, 1].
        heading: above.
        columns: a label for each column, or none.
        rows: a label for each row, or none.
        group: every `group` rows are followed by more space; 0 for none.

    Attributes:
        outlined: (R, Q, H, W), areas that get an outline each, by their numbers from 1 on; 0 elsewhere.
    """

    cells: np.ndarray
    heading: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[str] = ()
    group: int = 0
    outlined: np.ndarray = field(init=False)

    def __post_init__(self):
        self.outlined = np.zeros(self.cells.shape[:-1], dtype=int)

    @classmethod
    def of(cls, columns: Columns, heading: str = "", rows: Sequence[str] = (), group: int = 0):
        """From labelled columns, each (R, H, W, 3)."""
        labels, cells = zip(*columns, strict=True)
        return cls(np.stack(cells, axis=1), heading, labels, rows, group)


class _Word(NamedTuple):
    """A line of text: the left end of its baseline, in pixels from the top left, and its size in points."""

    x: int
    y: int
    text: str
    size: int
    bold: bool = False


class _Piece(NamedTuple):
    """A part of a sheet: its size, words, and images uint8 (h, w, 3) with their left and top."""

    width: int
    height: int
    words: list[_Word]
    images: list[tuple[int, int, np.ndarray]]

    def moved(self, x: int, y: int) -> "_Piece":
        """The same further right and down, with a size that still counts from the top left corner of the whole."""
        words = [word._replace(x=word.x + x, y=word.y + y) for word in self.words]
        images = [(left + x, top + y, pixels) for left, top, pixels in self.images]
        return _Piece(self.width + x, self.height + y, words, images)


def sheet(title: str, caption: str, blocks: Sequence[Block], cell: int = 64, width: int = 1250) -> np.ndarray:
    """Blocks under a title and a caption as one picture, uint8 (height, width, 3).

    Images are enlarged by a whole factor to about `cell` pixels, and not at all if they are larger. Blocks stand side
    by side as far as `width` allows, which is more for large images.
    """
    pieces = [_lay_out(block, cell) for block in blocks]
    if len(pieces) > 1:  # of large images, too, two find room side by side
        width = max(width, min(WIDEST, 2 * max(piece.width for piece in pieces) + 2 * MARGIN))
    body = _flow(pieces, width)
    inner = max(body.width, 480)
    head = [_paragraph(title, LARGE, inner, bold=True), _paragraph(caption, MEDIUM, inner)]
    return _draw(_stacked([*head, body], (GAP, 2 * GAP, 0)).moved(MARGIN, MARGIN))


def _lay_out(block: Block, cell: int) -> _Piece:
    """A block: heading, column labels, then the rows with their labels to the left."""
    pixels = _enlarged(block, cell)
    side = [_paragraph(label, SMALL, 110) for label in block.rows]
    left = max((label.width + 2 * GAP for label in side), default=0)
    longest = max((text_width(word, SMALL) for label in block.columns for word in label.split()), default=0)
    pitch = max(pixels.shape[3], longest) + GAP
    heading = _paragraph(block.heading, MEDIUM, max(left + pixels.shape[1] * pitch, 200), bold=True)
    rows = _rows(pixels, side, left, pitch, block.group)
    return _stacked([heading, _column_labels(block.columns, pitch).moved(left, 0), rows], (GAP, 3, 0))


def _column_labels(labels: Sequence[str], pitch: int) -> _Piece:
    """Labels in the middle of columns, standing on one line."""
    pieces = [_paragraph(label, SMALL, pitch - GAP, centred=True) for label in labels]
    foot = max((piece.height for piece in pieces), default=0)
    places = [(c * pitch + (pitch - GAP - piece.width) // 2, foot - piece.height) for c, piece in enumerate(pieces)]
    return _joined([piece.moved(*place) for piece, place in zip(pieces, places, strict=True)])


def _rows(pixels: np.ndarray, side: Sequence[_Piece], left: int, pitch: int, group: int) -> _Piece:
    """Images (R, Q, h, w, 3) from `left` on, in the middle of columns, and beside each row its label, if there are."""
    rows, columns, height, width, _ = pixels.shape
    parts, y = [], 0
    for r in range(rows):
        tall = max([height, *(label.height for label in side[r : r + 1])])
        parts += [label.moved(0, y + (tall - label.height) // 2) for label in side[r : r + 1]]
        for c in range(columns):
            image = _Piece(width, height, [], [(0, 0, pixels[r, c])])
            parts.append(image.moved(left + c * pitch + (pitch - GAP - width) // 2, y + (tall - height) // 2))
        y += tall + (3 * GAP if group and (r + 1) % group == 0 else GAP)
    return _joined(parts)


def _stacked(pieces: Sequence[_Piece], gaps: Sequence[int]) -> _Piece:
    """Pieces from top to bottom, each with space below unless it is empty."""
    parts, y = [], 0
    for piece, gap in zip(pieces, gaps, strict=True):
        parts.append(piece.moved(0, y))
        y += piece.height + gap if piece.height else 0
    return _joined(parts)


def _flow(pieces: Sequence[_Piece], width: int) -> _Piece:
    """Pieces from left to right, in as many lines as it takes."""
    parts, x, y, line = [], 0, 0, 0
    for piece in pieces:
        if x and x + piece.width > width:
            x, y, line = 0, y + line + 2 * MARGIN, 0
        parts.append(piece.moved(x, y))
        x, line = x + piece.width + 2 * MARGIN, max(line, piece.height)
    return _joined(parts)


def _joined(parts: Sequence[_Piece]) -> _Piece:
    """Pieces that have their places as one."""
    size = max((part.width for part in parts), default=0), max((part.height for part in parts), default=0)
    return _Piece(*size, [w for part in parts for w in part.words], [i for part in parts for i in part.images])


def _enlarged(block: Block, cell: int) -> np.ndarray:
    """The cells as uint8 (R, Q, h, w, 3), enlarged by a whole factor, with outlines."""
    scale = max(1, round(cell / max(block.cells.shape[2:4])))
    pixels: np.ndarray = (block.cells * 255).round().astype(np.uint8).repeat(scale, axis=2).repeat(scale, axis=3)
    area = block.outlined.repeat(scale, axis=2).repeat(scale, axis=3)
    wide = np.pad(area, ((0, 0), (0, 0), (2, 2), (2, 2)))
    inner = np.ones_like(area, dtype=bool)
    for axis, shift in itertools.product((2, 3), (2, -2)):  # what is 2 pixels away from the end of its area
        inner &= (np.roll(wide, shift, axis) == wide)[:, :, 2:-2, 2:-2]
    pixels[(area > 0) & ~inner] = np.round(255 * np.array(OUTLINE))
    return pixels


def _paragraph(words: str, size: int, width: float, bold: bool = False, centred: bool = False) -> _Piece:
    """Words wrapped to a width in pixels, as far as the longest of them allows."""
    lines: list[str] = []
    for word in filter(None, words.split(" ")):  # a no-break space is no place for a break
        if lines and text_width(f"{lines[-1]} {word}", size, bold) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    pitch = round(1.35 * size * DPI / 72)
    widths = [text_width(line, size, bold) for line in lines]
    widest = max(widths, default=0)
    starts = [(widest - own) // 2 if centred else 0 for own in widths]
    placed = [_Word(starts[k], round((k + 0.75) * pitch), line, size, bold) for k, line in enumerate(lines)]
    return _Piece(widest, pitch * len(lines), placed, [])


@lru_cache(maxsize=4096)
def text_width(words: str, size: int, bold: bool = False) -> int:
    """Width in pixels of a line of text."""
    return int(np.ceil(_renderer(1, 1).get_text_width_height_descent(words, _font(size, bold), ismath=False)[0]))


def drawable(words: str) -> str:
    """Words with a question mark for each letter that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=FONT)))
    return "".join(letter if font.get_char_index(ord(letter)) else "?" for letter in words)


def _font(size: int, bold: bool):
    from matplotlib.font_manager import FontProperties

    return FontProperties(family=FONT, size=size, weight="bold" if bold else "normal")


def _renderer(width: int, height: int):
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(width, height, DPI)


@lru_cache(maxsize=4096)
def _ink(words: str, size: int, bold: bool) -> np.ndarray:
    """The ink of a line of text, uint8 (3 size, width), 255 for black, with its baseline 2 size from the top and its
    beginning SPARE from the left. Cached: sheets share most words, and drawing them is what takes time."""
    renderer = _renderer(text_width(words, size, bold) + 2 * SPARE, 3 * size)
    renderer.draw_text(renderer.new_gc(), SPARE, 2 * size, words, _font(size, bold), 0)
    return np.asarray(renderer.buffer_rgba())[..., 3].copy()


def _draw(piece: _Piece) -> np.ndarray:
    """On white: uint8 (height, width, 3)."""
    picture: np.ndarray = np.full((piece.height + MARGIN, piece.width + MARGIN, 3), 255, dtype=np.uint8)
    for x, y, words, size, bold in piece.words:
        ink, top, left = _ink(words, size, bold), max(0, y - 2 * size), max(0, x - SPARE)
        own = picture[top : y + size, left : x - SPARE + ink.shape[1]]
        ink = ink[top - (y - 2 * size) :, left - (x - SPARE) :][: own.shape[0], : own.shape[1], None]
        np.minimum(own, 255 - ink, out=own)
    for left, top, pixels in piece.images:
        picture[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return picture


def rendered(figure) -> np.ndarray:
    """A matplotlib figure as uint8 (height, width, 3), without pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
