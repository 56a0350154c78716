import re

import numpy as np
import pytest
import torch

from biglearn_vae import Patchify

SHAPES = [((8, 8), 4, 3), ((6, 10), 2, 1), ((12, 4), 4, 2), ((3, 5), 1, 3), ((4, 4), 4, 3)]


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_round_trips_are_exact(size, patch, channels):
    patchify = Patchify(size, patch, channels)
    images = torch.randn(3, channels, *size)
    assert torch.equal(patchify.decode(patchify.encode(images)), images)
    tokens = torch.randn(3, patchify.num_tokens, patchify.token_dim)
    assert torch.equal(patchify.encode(patchify.decode(tokens)), tokens)


@pytest.mark.parametrize(("size", "patch", "channels"), SHAPES)
def test_tokens_run_row_by_row_and_hold_row_column_channel(size, patch, channels):
    patchify = Patchify(size, patch, channels)
    image = torch.arange(channels * size[0] * size[1]).reshape(1, channels, *size)
    expected = []
    for top in range(0, size[0], patch):
        for left in range(0, size[1], patch):
            expected.append(
                [
                    image[0, channel, top + row, left + column].item()
                    for row in range(patch)
                    for column in range(patch)
                    for channel in range(channels)
                ]
            )
    assert patchify.encode(image).tolist() == [expected]
    assert patchify.grid == (size[0] // patch, size[1] // patch)
    assert (patchify.num_tokens, patchify.token_dim) == (len(expected), len(expected[0]))


def test_one_number_is_a_square():
    square = Patchify(8, 4)
    assert (square.image_shape, square.grid) == ((3, 8, 8), (2, 2))


@pytest.mark.parametrize(
    ("size", "patch"), [((8, 8), 3), ((8, 6), 4), ((6, 8), 4), ((8, 8), 0), ((8, 8), 16), ((0, 8), 4)]
)
def test_patch_that_does_not_divide_is_refused(size, patch):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} image.* {patch} x {patch}"):
        Patchify(size, patch)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((8.0, 2, 1), "image_size must be a whole number, got 8.0"),
        (("8", 2, 1), "image_size must be a whole number, got '8'"),
        ((None, 2, 1), "image_size must be a whole number, got None"),
        (((8, 8, 3), 2, 1), "image_size must be one whole number or two"),
        ((8, 2.0, 1), "patch_size must be a whole number, got 2.0"),
        ((8, 2, 1.5), "channels must be a whole number, got 1.5"),
        ((8, 2, 0), "channels must be at least 1, got 0"),
    ],
)
def test_sizes_that_are_no_whole_numbers_are_refused(sizes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Patchify(*sizes)


def test_sizes_of_another_type():
    patchify = Patchify(np.array([8, 4]).tolist(), np.int64(2), np.int64(1))
    assert (patchify.image_shape, patchify.grid) == ((1, 8, 4), (4, 2)) and type(patchify.token_dim) is int


@pytest.mark.parametrize(
    ("method", "expected"), [("encode", "(B, 3, 4, 8)"), ("decode", "(B, 2, 48)"), ("join", "(B, 2, 3, 4, 4)")]
)
@pytest.mark.parametrize(
    ("wrong", "got"), [([[0.0]], "list"), ("a.png", "str"), (torch.zeros(2, 4), "torch.float32 (2, 4)")]
)
def test_what_is_no_batch_is_refused(method, expected, wrong, got):
    with pytest.raises(ValueError, match=re.escape(f"of shape {expected}, got {got}")):
        getattr(Patchify((4, 8), 4), method)(wrong)


@pytest.mark.parametrize("shape", [(2, 3, 8, 4), (2, 1, 4, 8), (3, 4, 8), (2, 3, 4, 8, 1)])
def test_encode_names_expected_and_given_shape(shape):
    with pytest.raises(ValueError) as error:
        Patchify((4, 8), 4).encode(torch.zeros(shape))
    assert "(B, 3, 4, 8)" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("shape", [(2, 3, 48), (2, 2, 47), (2, 48), (2, 48, 2)])
def test_decode_names_expected_and_given_shape(shape):
    with pytest.raises(ValueError) as error:
        Patchify((4, 8), 4).decode(torch.zeros(shape))
    assert "(B, 2, 48)" in str(error.value) and str(shape) in str(error.value)
