"""A page as one file: a template, its style sheet, its script, under a policy that lets nothing else in."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from hashlib import sha256

import jinja2
from markupsafe import Markup

from vlcpt import __version__
from vlcpt.report.screen import visible


def render_page(template: str, **content: object) -> str:
    """A page that works from a disk and asks nobody for anything.

    Values are escaped, and control characters in them are written out. The policy in the page names the
    hashes of its own style sheet and script: no other runs, and nothing is loaded but pictures inside the
    page. So a template uses classes in place of ``style="…"``, and listeners in place of ``onclick="…"``.

    Args:
        template: The name of its file in this folder; it extends ``base.html.j2``.
        content: Its values.

    Example:
        >>> page = render_page("base.html.j2", title="<script>", lead="", versions={})
        >>> "<title>&lt;script&gt;</title>" in page
        True
    """
    return _environment().get_template(template).render(version=__version__, **content)


def script_data(value: object) -> Markup:
    r"""JSON for a ``<script type="application/json">``: no text in it can end the element.

    Example:
        >>> print(script_data({"text": "</script>"}))
        {"text":"\u003c/script>"}
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A browser turns NUL and lone carriage returns into something else; JSON has escaped them already.
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _hash_of(content: str) -> str:
    """A style sheet or script, as the policy names it."""
    return f"sha256-{b64encode(sha256(content.encode()).digest()).decode()}"


def _shown(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlcpt.report", "pages"),
        autoescape=True,
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["csp_hash"] = _hash_of
    environment.filters["script_data"] = script_data
    environment.globals["shares"] = shares
    return environment


def shares(counts: Mapping[str, int]) -> list[tuple[str, int, float, float]]:
    """The parts of a bar: name, count, where it begins and how wide it is in percent.

    Example:
        >>> shares({"targets": 1, "context": 3, "media": 0})
        [('targets', 1, 0.0, 25.0), ('context', 3, 25.0, 75.0)]
    """
    total, done, found = sum(counts.values()), 0, []
    for name, count in counts.items():
        if count > 0:
            found.append((name, count, round(100 * done / total, 3), round(100 * count / total, 3)))
            done += count
    return found
