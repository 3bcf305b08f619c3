"""Documents and tables as text, and as HTML for a notebook: the text of a row can do nothing there."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SEEN = "\t\n\u200c\u200d"  # the last two join letters, in Persian or in Hindi
# Of one opacity each, so that they are right on a light and on a dark page.
_TARGET = "background:rgba(0,114,178,.22);text-decoration:underline {kind} #0072b2 2px"
_MEDIUM = "background:rgba(0,148,107,.2);border:1px solid #00946b;border-radius:4px;padding:0 .4em"
_CONTEXT, _CELL = "opacity:.65", "text-align:right;padding:.1em .8em .1em 0"


def written_out(text: str) -> str:
    """Text with controls, and characters that turn the direction of reading, written out.

    Example:
        >>> print(written_out("a\\u202eb"))
        a\\u202eb
    """
    if text.isprintable():
        return text
    return "".join(
        one if one in _SEEN or unicodedata.category(one) not in _UNSEEN else f"\\u{ord(one):04x}"
        for one in text
    )


def table_html(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], caption: str
) -> str:
    """A table for a notebook.

    Example:
        >>> "&lt;b&gt;" in table_html("ledger", ["<b>"], [("read", ["1"])], "")
        True
    """
    head = "".join(f'<th style="{_CELL}">{_safe(name)}</th>' for name in columns)
    body = "".join(
        f'<tr><th style="text-align:left;padding-right:1em;font-weight:{400 if label[:1] == " " else 600}">'
        f"{'&emsp;' if label[:1] == ' ' else ''}{_safe(label.strip())}</th>"
        + "".join(f'<td style="{_CELL}">{_safe(cell)}</td>' for cell in cells)
        + "</tr>"
        for label, cells in rows
    )
    return (
        f"<table><caption>{_safe(title)}</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table>{_safe(caption)}"
    )


@dataclass(frozen=True)
class ShownText:
    """Text of one treatment; its weight is 0 for context."""

    text: str
    weight: float


@dataclass(frozen=True)
class ShownMedium:
    """An image or a video: what it is called, what it costs, and small pictures of it, as data: addresses."""

    name: str
    tokens: int
    pictures: Sequence[str] = ()


@dataclass(frozen=True)
class ShownDocument:
    """A document, or a part of one, as an item of a data set has it.

    Args:
        title: Its name, and what it costs.
        parts: In reading order.
    """

    title: str
    parts: Sequence[ShownText | ShownMedium]

    def as_text(self) -> str:
        """Its title, and below it its text with targets in «», as ``vlcpt inspect`` has them."""
        return f"{written_out(self.title)}\n" + "".join(map(_as_text, self.parts))

    def as_html(self) -> str:
        """The same with targets in colour, and with its pictures."""
        body = "".join(map(_as_html, self.parts))
        return (
            f'<div style="margin:.6em 0"><b>{_safe(self.title)}</b>'
            f'<div dir="auto" style="white-space:pre-wrap;line-height:1.7">{body}</div></div>'
        )


@dataclass(frozen=True)
class ShownPack:
    """An item of a data set: what a notebook or the prompt shows of it.

    Args:
        title: Which it is, and how full.
        documents: Those that share it.

    Example:
        >>> document = ShownDocument("a.jsonl:1", [ShownText("the ", 0.0), ShownText("valve", 1.0)])
        >>> ShownPack("item 0 of 1", [document])
        item 0 of 1
        <BLANKLINE>
        a.jsonl:1
        the «valve»
    """

    title: str
    documents: Sequence[ShownDocument]

    def __repr__(self) -> str:
        return "\n\n".join([written_out(self.title), *(one.as_text() for one in self.documents)])

    def _repr_html_(self) -> str:
        return f"<div><b>{_safe(self.title)}</b>{''.join(one.as_html() for one in self.documents)}</div>"


def _safe(text: str) -> str:
    return escape(written_out(text))


def _factor(weight: float) -> str:
    return "" if weight in (0.0, 1.0) else f"×{weight:g}"


def _as_text(part: ShownText | ShownMedium) -> str:
    if isinstance(part, ShownMedium):
        return written_out(f"[{part.name}: {part.tokens:,} tokens]")
    text = written_out(part.text)
    return f"«{text}»{_factor(part.weight)}" if part.weight else text


def _as_html(part: ShownText | ShownMedium) -> str:
    if isinstance(part, ShownMedium):
        pictures = "".join(
            f'<img src="{escape(one)}" alt="" style="height:6em;width:auto;display:inline-block;margin:.2em">'
            for one in part.pictures
        )
        return f'{pictures}<span style="{_MEDIUM}">{_safe(f"{part.name}: {part.tokens:,} tokens")}</span>'
    if not part.weight:
        return f'<span style="{_CONTEXT}">{_safe(part.text)}</span>'
    kind = "solid" if part.weight == 1 else "dashed" if part.weight < 1 else "double"
    factor = f"<sup>{_factor(part.weight)}</sup>" if _factor(part.weight) else ""
    return f'<span style="{_TARGET.format(kind=kind)}">{_safe(part.text)}</span>{factor}'
