"""What it says of a text that other images cost it nothing, something, or less than its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Where the interval of a difference lies: surely above nothing, at it, surely below it, or too wide to say.
Place = Literal["above", "within", "below", "unsure"]

# Advice is filled in by :meth:`vlcpt.report.verdict.CommandPaths.fill`.
_MARK = (
    "see with `vlcpt inspect {config} --reliance {checkpoint}` which tokens need the picture. Mark with "
    "<trainable_text> what only the picture shows, and leave as context what follows from the text; check "
    "that each document has its own images."
)
_ANY = (
    "another document's image serves as well: the text says that there is a picture, not what is in it. Mark "
    "as trainable what only this picture shows, and check that each document has its own images."
)
_PAIRS = (
    "another document's image serves better: look at pairs of image and text (`vlcpt inspect {config} --html "
    "rows.html`), and check that each document has its own images, in the order of its markers."
)
_HARM = (
    "its images make it worse: look at pairs of image and text (`vlcpt inspect {config} --html rows.html`), "
    "check that each document has its own images, and that they are not too small to read (max_pixels). "
    "Where pictures are of a new kind, set train_merger: true."
)


@dataclass(frozen=True)
class Reading:
    """How a text reads its images.

    Args:
        words: In words, to follow the name of a set.
        is_good: Whether that is as it should be; None where it is neither, or not known.
        advice: What to change, with {config} and {checkpoint} in its commands; None where nothing.
        is_unsure: Whether more documents would say more.
    """

    words: str
    is_good: bool | None = None
    advice: str | None = None
    is_unsure: bool = False


_UNKNOWN = Reading("too few documents to say whether your text needs its images", is_unsure=True)
_READ = Reading("read from its images", True)
_NEEDLESS = Reading("your text does not need its images", False, _MARK)
_HARMED = Reading("does better without its images: they make it worse", False, _HARM)
# By what another document's image costs, and what a blank one costs; None: not measured.
_READINGS: dict[tuple[Place | None, Place | None], Reading] = {
    ("above", "above"): _READ,
    ("above", None): _READ,
    (None, "above"): _READ,
    ("above", "within"): Reading(
        "another image misleads it, but without one it does as well: your text does not need its images",
        False,
        _MARK,
    ),
    ("above", "below"): Reading(
        "another image is worse than its own, but without one it does better: its images make it worse",
        False,
        _HARM,
    ),
    ("above", "unsure"): Reading(
        "another image misleads it; too few documents to say whether it does as well without one",
        is_unsure=True,
    ),
    ("within", "above"): Reading("your text needs some image, but not its own", False, _ANY),
    ("within", "within"): _NEEDLESS,
    ("within", "below"): _HARMED,
    ("within", "unsure"): Reading(
        "another document's image serves as well; too few documents to say whether it needs any image",
        False,
        _MARK,
        is_unsure=True,
    ),
    ("within", None): Reading("another document's image serves as well", False, _MARK),
    ("below", "above"): Reading(
        "your text needs an image, but does better with another document's than with its own", False, _PAIRS
    ),
    ("below", "within"): Reading(
        "does better with another document's image, and as well without one: your text does not need its "
        "images",
        False,
        _PAIRS,
    ),
    ("below", "below"): Reading(
        "does better with another document's image, and without one: its images make it worse", False, _HARM
    ),
    ("below", "unsure"): Reading(
        "does better with another document's image than with its own; too few documents to say whether it "
        "needs any image",
        False,
        _PAIRS,
        is_unsure=True,
    ),
    ("below", None): Reading("does better with another document's image than with its own", False, _PAIRS),
    ("unsure", "above"): Reading(
        "your text needs an image; too few documents to say whether it needs its own", is_unsure=True
    ),
    ("unsure", "within"): Reading(
        "does as well without an image: your text does not need its images", False, _MARK
    ),
    ("unsure", "below"): _HARMED,
    ("unsure", "unsure"): _UNKNOWN,
    ("unsure", None): _UNKNOWN,
    (None, "within"): _NEEDLESS,
    (None, "below"): _HARMED,
    (None, "unsure"): _UNKNOWN,
}


def reading(shuffled: Place | None, blank: Place | None) -> Reading | None:
    """How a text reads its images.

    Args:
        shuffled: What another document's image costs it: where the interval lies; None: not measured.
        blank: What a blank image costs it.

    Returns:
        None where neither was measured.

    Example:
        >>> reading("within", "above").words
        'your text needs some image, but not its own'
    """
    return _READINGS.get((shuffled, blank))
