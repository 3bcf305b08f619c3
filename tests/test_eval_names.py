"""Tests of vlcpt/eval_names.py: a name of the log is read back as it was made."""

import pytest

from vlcpt.eval_names import UNNAMED, measured_in

NUMBERS = {"loss": 1.0, "perplexity": 2.7, "blank_images_loss": 1.5, "reliance": 0.5}


@pytest.mark.parametrize(
    "name", ["new", "a_b", "new_loss", "x_blank_images", "blank_images", "reliance", "eval_a"]
)
@pytest.mark.parametrize("has_media", [True, False])
def test_a_set_of_any_name_is_read_back(name, has_media):
    numbers = NUMBERS if has_media else {"loss": 1.0, "perplexity": 2.7}

    line = {"step": 3, **{f"eval_{name}_{key}": value for key, value in numbers.items()}, "eval_x_runtime": 1}

    assert measured_in(line) == {name: numbers}


def test_sets_of_one_line_are_told_apart():
    line = {"eval_a_loss": 1.0, "eval_a_blank_images_loss": 2.0, "eval_b_blank_images_loss": 3.0, "loss": 4.0}

    found = measured_in(line)

    assert found == {"a": {"loss": 1.0, "blank_images_loss": 2.0}, "b_blank_images": {"loss": 3.0}}


def test_a_set_with_the_name_of_anothers_blank_images_keeps_its_loss():
    line = {"eval_a_loss": 1.0, "eval_a_blank_images_loss": 2.0, "eval_a_blank_images_perplexity": 7.4}

    found = measured_in(line)

    assert found == {"a": {"loss": 1.0}, "a_blank_images": {"loss": 2.0, "perplexity": 7.4}}


def test_a_set_without_a_name_has_one():
    assert measured_in({"eval_loss": 1.0, "eval_reliance": 0.5}) == {UNNAMED: {"loss": 1.0, "reliance": 0.5}}


@pytest.mark.parametrize("value", [None, "1.0", True])
def test_what_is_no_number_is_no_measure(value):
    assert measured_in({"eval_a_loss": value}) == {}
