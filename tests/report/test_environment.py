"""The text for a bug report."""

import os
from pathlib import Path

from vlcpt.report.environment import PACKAGES, describe


def test_every_package_has_a_version_or_is_said_to_be_missing() -> None:
    lines = dict(line.split(maxsplit=1) for line in describe().splitlines() if not line.startswith("gpu"))

    assert set(PACKAGES) <= set(lines)
    assert lines["torch"][0].isdigit()


def test_it_holds_no_path_and_no_user() -> None:
    text = describe()

    assert str(Path.home()) not in text
    assert os.getcwd() not in text
