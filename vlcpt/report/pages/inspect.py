"""The page of ``vlcpt inspect --html``: each document with its targets, its pictures and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from markupsafe import Markup

from vlcpt.data.documents import Document, DocumentError, Image
from vlcpt.data.encode.encoder import TokenStream
from vlcpt.data.encode.pieces import Piece, TokenTexts, pieces_of, shown_sums
from vlcpt.data.encode.vision import PlacedMedium
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.media.thumbnails import data_uri, thumbnails
from vlcpt.data.plan.ledger import Ledger, count_tokens
from vlcpt.data.plan.split import Part
from vlcpt.data.planned_items import PlannedSample
from vlcpt.report.pages.base import render_page, script_data
from vlcpt.report.reliance import NatsSums
from vlcpt.report.terminal import ledger_table

PICTURE_BYTES = 16_000_000  # of all thumbnails of a page
TEXT_BYTES = 80_000_000  # of all documents
MOST_TOKENS = 20_000  # of a document that are shown
BLOCK_SIZE = 64  # documents, or pictures, that the page reads at a time
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_FLAGS = {"problem": 1, "media": 2, "split": 4, "cut": 8, "trimmed": 16, "weights": 32}


@dataclass
class InspectPage:
    """A page to which documents are added one by one.

    Args:
        sources: The name of each source, and its role in the configuration.
        texts: What the tokens write.
        limits: Those of media files.
        picture_bytes, text_bytes: What thumbnails and documents may take in all; what is left out is said.
    """

    sources: Sequence[tuple[str, str]]
    texts: TokenTexts
    limits: MediaLimits
    picture_bytes: int = PICTURE_BYTES
    text_bytes: int = TEXT_BYTES
    notes: list[str] = field(default_factory=list)
    has_nats: bool = False
    _index: list[list[object]] = field(default_factory=list)
    _lines: list[Markup] = field(default_factory=list)
    _pictures: list[str] = field(default_factory=list)
    _packs: list[Markup] = field(default_factory=list)
    _pack_facts: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = Ledger([name for name, _ in self.sources])
        self._sums = NatsSums([name for name, _ in self.sources])
        self._known: dict[object, list[int]] = {}
        self._numbers: dict[tuple[int, int], int] = {}
        self._media = {"image": 0, "video": 0}
        self._without_picture = self._without_text = self._problems = 0

    def __len__(self) -> int:
        return len(self._index)

    def add(
        self,
        source: int,
        row: int,
        document: Document,
        stream: TokenStream,
        parts: Sequence[Part],
        *,
        error: DocumentError | None = None,
        stops: bool = False,
        nats: np.ndarray | None = None,
    ) -> None:
        """Add a document.

        Args:
            source, row: The number of its source, and its own there.
            stream, parts: Its tokens, and what is trained of them.
            error: Why it cannot be used all the same.
            stops: Whether training stops at the error.
            nats: float (T,): what each target's image gives it; only targets are looked at.
        """
        # Of one that is refused, it is shown what would be trained.
        whole = [Part(0, len(stream), False, 0)]
        pieces = pieces_of(stream, whole if error is not None else parts, self.texts)
        media = [self._medium(placed, document) for placed in stream.media]
        counts = count_tokens(stream, list(parts))
        self._enter(source, len(stream), parts, stream, error)
        is_shown = self.text_bytes > 0
        found: dict[str, object] = {
            "name": document.name,
            "place": str(document.source or ""),
            "tokens": len(stream),
            "counts": {
                name: getattr(counts, name) for name in ("targets", "context", "media", "special", "trimmed")
            },
            "parts": len(parts),
            "media": media,
            "pieces": _as_json(pieces) if is_shown else [],
        }
        if nats is not None:
            self.has_nats = True
            self._sums.add(self.sources[source][0], np.where(_trained(stream, parts), nats, np.nan))
            if is_shown:
                found["nats"] = self._nats(pieces, nats, stream)
        if len(stream) > MOST_TOKENS:
            found["more"] = len(stream) - MOST_TOKENS
        if not is_shown:
            self._without_text += 1
            found["left_out"] = True
        if error is not None:
            found["error"] = {"text": str(error), "stops": stops}
        weights = {one.weight for one in pieces} - {0.0, 1.0}
        has = {
            "problem": error is not None or not parts or any("error" in one for one in media),
            "media": bool(media),
            "split": len(parts) > 1,
            "cut": stream.cut_edges > 0,
            "trimmed": counts.trimmed > 1,  # the end of text alone is no news
            "weights": bool(weights),
        }
        self._append(source, row, document.name, counts.targets, has, found)

    def add_failure(self, source: int, row: int, name: str, error: DocumentError, *, stops: bool) -> None:
        """Add a row that is no document, or whose media cannot be opened."""
        account = self.ledger.sources[self.sources[source][0]]
        account.documents["read"] += 1
        account.dropped_documents[error.kind] += 1
        found: dict[str, object] = {
            "name": name, "place": str(error.source or name), "tokens": 0, "counts": {}, "parts": 0,
            "media": [], "pieces": [], "error": {"text": str(error), "stops": stops},
        }  # fmt: skip
        self._append(source, row, name, 0, {"problem": True}, found)

    def add_pack(self, samples: Sequence[PlannedSample], max_length: int) -> None:
        """Add a pack: the documents that share it."""
        rows = [
            [
                self._numbers.get((one.source, one.row), -1),
                one.place,
                one.source,
                one.stop - one.start,
                one.targets,
                one.media,
                one.start > 0,
            ]
            for one in samples
        ]
        self._packs.append(script_data({"rows": rows, "length": max_length}))

    def note_packs(self, **facts: object) -> None:
        """Say what all packs are: ``said``, a sentence, and ``ledger``, a table; or ``error``: why none."""
        self._pack_facts = facts

    def render(
        self,
        title: str,
        lead: str,
        versions: Mapping[str, str],
        reliance: str = "",
        command: str = "vlcpt inspect",
    ) -> str:
        """The page.

        Args:
            title: Its heading.
            lead: What is shown, in a sentence.
            versions: Those of packages, for the footer.
            reliance: Which checkpoint gave the nats.
            command: What wrote the page.
        """
        notes = list(self.notes)
        if self._without_picture:
            notes.append(
                f"{self._without_picture:,} images and videos are shown without a picture: those of a page "
                f"take {PICTURE_BYTES / 1e6:.0f} MB at most. Show fewer rows for all of them."
            )
        if self._without_text:
            notes.append(
                f"The last {self._without_text:,} documents are listed without their text: that of a page "
                f"takes {TEXT_BYTES / 1e6:.0f} MB at most. Show fewer rows for all of it."
            )
        total = self.ledger.total
        names = ("targets", "context", "media", "special", "trimmed")
        bar = {name: total.tokens[name] for name in names} | {"dropped": total.dropped_tokens.total()}
        return render_page(
            "inspect.html.j2",
            title=title,
            lead=lead,
            versions=versions,
            notes=notes,
            facts=self._facts(),
            bar=bar,
            ledger=ledger_table(self.ledger),
            packs=self._pack_facts,
            pack_lines=Markup("\n").join(self._packs),
            has_weights=any(int(str(one[3])) & _FLAGS["weights"] for one in self._index),
            has_nats=self.has_nats,
            reliance=reliance,
            command=command,
            sums=self._sums.sheet(),
            sources=self.sources,
            index={"sources": self.sources, "index": self._index, "nats": self.has_nats, "block": BLOCK_SIZE},
            documents=_blocks(self._lines),
            pictures=_blocks([Markup(one) for one in self._pictures]),
            style_file="inspect.css",
            script_file="inspect.js",
        )

    def _facts(self) -> list[tuple[str, str, str]]:
        total = self.ledger.total
        read, targets = total.tokens["read"], total.tokens["targets"]
        several = f"from {len(self.sources)} sources" if len(self.sources) > 1 else ""
        found = [
            ("documents", f"{len(self):,}", several),
            ("targets", f"{targets:,}", f"{targets / max(read, 1):.0%} of {read:,} tokens"),
            ("images", f"{self._media['image']:,}", ""),
        ]
        if self._media["video"]:
            found.append(("videos", f"{self._media['video']:,}", ""))
        if any(self._media.values()):
            media = total.tokens["media"]
            found.append(("media tokens", f"{media:,}", f"{media / max(read, 1):.0%} of all tokens"))
        found.append(("rows with a problem", f"{self._problems:,}", ""))
        return found

    def _append(
        self,
        source: int,
        row: int,
        name: str,
        targets: int,
        has: Mapping[str, bool],
        found: Mapping[str, object],
    ) -> None:
        flags = sum(_FLAGS[key] for key, value in has.items() if value)
        self._problems += has["problem"]
        self._numbers[source, row] = len(self._index)
        self._index.append([name[:200], source, targets, flags])
        line = script_data(found)
        self.text_bytes -= len(line)
        self._lines.append(line)

    def _enter(
        self,
        source: int,
        tokens: int,
        parts: Sequence[Part],
        stream: TokenStream,
        error: DocumentError | None,
    ) -> None:
        account = self.ledger.sources[self.sources[source][0]]
        account.documents["read"] += 1
        account.documents["split"] += len(parts) > 1
        account.tokens["read"] += tokens
        if error is not None or not parts:
            reason = error.kind if error is not None else "without_targets"
            account.dropped_documents[reason] += 1
            account.dropped_tokens[reason] += tokens
            return
        account.documents["used"] += 1
        for name, count in count_tokens(stream, list(parts))._asdict().items():
            if name != "read":
                account.tokens[name] += count

    def _nats(self, pieces: Sequence[Piece], nats: np.ndarray, stream: TokenStream) -> list[float]:
        """For each token that is shown as a target."""
        return [
            round(value, 3) + 0.0
            for piece in pieces
            if piece.weight > 0 and piece.start < MOST_TOKENS
            for value in shown_sums(piece, np.nan_to_num(nats), stream, self.texts)
        ]

    def _medium(self, placed: PlacedMedium, document: Document) -> dict[str, object]:
        """A medium as the page shows it, with its thumbnails while there is room for them."""
        kind = "image" if isinstance(placed.medium, Image) else "video"
        self._media[kind] += 1
        height, width = placed.size
        found: dict[str, object] = {
            "kind": kind,
            "name": str(placed.medium),
            "tokens": placed.tokens,
            "grid": "×".join(map(str, reversed(placed.merged_grid[kind == "image" :]))),
            "size": f"{width:,}×{height:,}",
        }
        if placed.clip is not None:
            found["frames"] = f"{len(placed.clip.indices):,} of {placed.clip.total_frames:,} frames"
        if self.picture_bytes <= 0:
            self._without_picture += 1
            return found
        root = None if document.media_root is None else Path(document.media_root)
        key = (placed.medium, document.media_root)  # bytes too: equal ones are one picture
        try:
            if key not in self._known:
                self._known[key] = self._keep(placed, root)
        except MediaError as error:
            found["error"] = str(error)
            return found
        return found | {"pictures": self._known[key]}

    def _keep(self, placed: PlacedMedium, root: Path | None) -> list[int]:
        numbers = []
        for picture in thumbnails(placed.medium, placed.clip, media_root=root, limits=self.limits):
            numbers.append(len(self._pictures))
            self._pictures.append(data_uri(picture))
            self.picture_bytes -= len(self._pictures[-1])
        return numbers


def _blocks(lines: Sequence[Markup]) -> list[Markup]:
    return [
        Markup("\n").join(lines[first : first + BLOCK_SIZE]) for first in range(0, len(lines), BLOCK_SIZE)
    ]


def _trained(stream: TokenStream, parts: Sequence[Part]) -> np.ndarray:
    """Which tokens are targets: bool (T,)."""
    found = np.zeros(len(stream), dtype=bool)
    for part in parts:
        found[part.start + part.repeated : part.stop] = True
    return found & (stream.labels >= 0)


def _as_json(pieces: Sequence[Piece]) -> list[list[object]]:
    """Pieces for the page's script, up to ``MOST_TOKENS``.

    Each is a list: a letter for its kind, then what that kind has. ``x``, ``t``, ``d`` and ``k``: text that
    is context, trained, trimmed, or a control token; ``m``: a medium; ``p``: a part begins; ``e``: a span's
    edge cut a token; ``o``: so many tokens are trimmed from here.
    """
    found: list[list[object]] = []
    was_trimmed = False
    for number, piece in enumerate(pieces):
        if piece.start >= MOST_TOKENS:
            break
        if piece.kind == "part":
            found.append(["p", piece.medium + 1, piece.stop - piece.start])
        elif piece.kind == "cut":
            found.append(["e"])
        else:
            if piece.is_trimmed and not was_trimmed:
                found.append(["o", _trimmed_from(pieces, number)])
            was_trimmed = piece.is_trimmed
            found.append(_one_as_json(piece))
    return found


def _trimmed_from(pieces: Sequence[Piece], number: int) -> int:
    count = 0
    for piece in pieces[number:]:
        if piece.kind not in ("part", "cut"):
            if not piece.is_trimmed:
                break
            count += piece.stop - piece.start
    return count


def _one_as_json(piece: Piece) -> list[object]:
    if piece.kind == "medium":
        return ["m", piece.medium, int(piece.is_trimmed)]
    room = MOST_TOKENS - piece.start
    lengths = list(piece.lengths[:room])
    text = piece.text[: sum(lengths)]
    if text and max(text) > "\uffff":
        lengths = _utf16(text, lengths)
    # Seven digits are what float32 has: 0.3, and not 0.30000001192092896.
    weight = float(f"{piece.weight:.7g}")
    if piece.kind == "control":
        return ["k", text, weight, int(piece.is_trimmed)]
    if piece.weight > 0:
        return ["t", text, _digits(lengths), weight]
    return ["d" if piece.is_trimmed else "x", text, _digits(lengths)]


def _digits(lengths: Sequence[int]) -> str:
    """Lengths as digits to base 36, larger ones in brackets: half the size of a list."""
    return "".join(_DIGITS[one] if one < 36 else f"({one})" for one in lengths)


def _utf16(text: str, lengths: Sequence[int]) -> list[int]:
    """Lengths as JavaScript counts: characters above U+FFFF are two."""
    found, done = [], 0
    for length in lengths:
        part = text[done : done + length]
        found.append(length + sum(character > "\uffff" for character in part))
        done += length
    return found
