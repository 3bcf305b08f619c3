"""For mkdocs.yml, an extension of griffe: shows a docstring's ``Example:`` as code."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Google's style knows only the plural; without this, doctests would be read as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
