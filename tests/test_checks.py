"""Checks of numbers and choices: every kind of number is taken, everything else is refused with what came."""

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from biglearn_vae import checks


@pytest.mark.parametrize("number", [1, 0.5, np.float32(0.25), Fraction(1, 2), torch.tensor(0.5)])
def test_a_number_of_any_type_is_a_float(number):
    found = checks.real_number("p", number, "[0, 1]")
    assert type(found) is float and found == float(number)
    assert checks.real_numbers("p", (number, 0), 2, "[0, 1]") == [found, 0.0]


@pytest.mark.parametrize("number", ["0.5", True, None, [0.5], torch.ones(2), 1j, math.nan, math.inf, 10**400])
def test_what_is_no_number_of_the_interval_is_refused(number):
    with pytest.raises(ValueError, match=r"^p must be a number in \[0, inf\), got "):
        checks.real_number("p", number, "[0, inf)")
    with pytest.raises(ValueError, match=r"^p must be 2 numbers in \[0, inf\), got .*: a pair$"):
        checks.real_numbers("p", [1, number], 2, "[0, inf)", ": a pair")


def test_a_count_is_one_that_torch_can_count():
    assert checks.whole_number("n", np.int64(3), 0) == checks.whole_number("n", 3) == 3
    assert checks.whole_number("n", 2**63 - 1, 0) == 2**63 - 1 and checks.whole_number("n", 10**20) == 10**20
    with pytest.raises(ValueError, match=r"^n must be below 2\^63, got 9223372036854775808$"):
        checks.whole_number("n", 2**63, 0)


@pytest.mark.parametrize("values", [[0.1, "top"], (0.1, "top"), iter((0.1, "top")), np.array([0.1, "top"], object)])
def test_several_values_of_any_kind_are_a_list(values):
    assert checks.several("tasks", values) == [0.1, "top"]


@pytest.mark.parametrize("values", ["top", 0.1, None, [], torch.tensor(2), {"top": 1}])
def test_what_is_not_several_is_refused(values):
    with pytest.raises(ValueError, match=r"^tasks must be a list of at least one, got "):
        checks.several("tasks", values)


def test_a_path_is_a_text_or_a_path(tmp_path):
    assert checks.path("folder", tmp_path) == checks.path("folder", str(tmp_path)) == tmp_path
    assert checks.path("folder", "~/a") == Path("~/a").expanduser()
    with pytest.raises(ValueError, match=r"^folder must be a path, got 3$"):
        checks.path("folder", 3)


@pytest.mark.parametrize(
    ("interval", "inside"), [("[0, 1]", (True, True)), ("[0, 1)", (True, False)), ("(0, 1]", (False, True))]
)
def test_the_ends_of_an_interval_are_in_it_or_not(interval, inside):
    for end, taken in zip((0, 1), inside, strict=True):
        if taken:
            assert checks.real_number("p", end, interval) == end
        else:
            with pytest.raises(ValueError, match=f"got {end}$"):
                checks.real_number("p", end, interval)


@pytest.mark.parametrize("values", ["12", 1.0, None, [1.0], (1.0, 2.0, 3.0)])
def test_as_many_numbers_as_asked_for(values):
    with pytest.raises(ValueError, match="p must be 2 numbers"):
        checks.real_numbers("p", values, 2, "(0, inf)")


def test_a_choice_is_one_of_those_named():
    checks.check_choice("unit", "nats", ("nats", "bits"))
    with pytest.raises(ValueError, match=r"^unit must be nats or bits, got 'bytes'$"):
        checks.check_choice("unit", "bytes", ("nats", "bits"))
    with pytest.raises(ValueError, match=r"^unit must be a, b or c, got None$"):
        checks.check_choice("unit", None, ("a", "b", "c"))
