"""For mkdocs.yml, an extension of griffe: examples of docstrings are code there, and roles are names."""

from __future__ import annotations

import re

import griffe


class ExampleSections(griffe.Extension):
    """Google's style knows only ``Examples:``, so doctests would be Markdown; and no role of Sphinx."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
            obj.docstring.value = re.sub(r":(?:func|class|meth|mod|data|attr):`~?([^`]+)`", r"`\1`", text)
