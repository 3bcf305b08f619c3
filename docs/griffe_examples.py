"""An extension of griffe for mkdocs.yml: shows a docstring's ``Example:`` as code, as ``Examples:`` would be."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Google's style knows only the plural; without this, doctests would be read as Markdown."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
