"""A data file and its schema become documents by number."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import orjson

from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.markup import Untagged
from vlcpt.data.readers import segments, text, vlcpt
from vlcpt.data.readers.fields import id_field
from vlcpt.data.readers.rows import TEXT_SUFFIXES, JsonlRows, MemoryRows, Rows, TextRows

logger = logging.getLogger(__name__)

SCHEMAS: dict[str, Callable[..., Document]] = {
    "vlcpt": vlcpt.read_row,
    "segments": segments.read_row,
    "text": text.read_row,
}
FORMATS = ("auto", *SCHEMAS)


@dataclass(frozen=True)
class DocumentSource:
    """Documents by number: stored rows and the schema that reads them.

    Args:
        name: What the ledger calls it.
        rows: The rows.
        read: The schema's reader.
        media_root: Folder of its media; None: paths are trusted.
        share: The part of all targets asked for.
    """

    name: str
    rows: Rows
    read: Callable[..., Document]
    media_root: str | None
    share: float | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def document(self, number: int) -> Document:
        """Document ``number``.

        Raises:
            DocumentError: With file, line and field.
        """
        source = self.rows.source(number)
        try:
            row = self.rows.row(number)
            if isinstance(row, Document):
                root = self.media_root if row.media_root is None else row.media_root
                return replace(row, source=row.source or source, media_root=root)
            return replace(self.read(row), id=id_field(row), source=source, media_root=self.media_root)
        except DocumentError as error:
            raise error.at(source) from None


def open_source(
    path: str | Path | Sequence[object],
    *,
    format: str = "auto",
    media_root: str | Path | None = None,
    name: str | None = None,
    share: float | None = None,
    untagged: Untagged = "train",
) -> DocumentSource:
    """Open a data file, a folder of text files, or rows in memory.

    Args:
        path: ``.jsonl``, ``.json``, ``.txt``, ``.md``, a folder of text files; or a sequence of rows
            or Documents, such as a ``datasets.Dataset``.
        format: The rows' schema; ``auto`` looks at the fields of the first rows.
        media_root: Folder that media paths start from and may not leave. Default: the data file's.
        name: Its name in the ledger. Default: the file's, without suffix.
        share: The part of all targets asked for.
        untagged: What becomes of text without any tag.

    Raises:
        DocumentError: If the file cannot be opened or its schema is not known.

    Example:
        >>> source = open_source([{"text": "a"}, {"text": "b"}])
        >>> len(source), source.document(1).name
        (2, 'rows:2')
    """
    rows: Rows
    if isinstance(path, str | Path):
        if "://" in str(path):  # before Path, which would make it one slash
            reason = "an address is not opened. Download the data and give its path."
            raise DocumentError(reason, kind="source", field=str(path))
        file = Path(path)
        rows = _open_rows(file, format)
        root: str | None = str(media_root or (file if file.is_dir() else file.parent))
        name = name or file.stem
    else:
        name = name or "rows"
        rows = MemoryRows(path, name)
        root = None if media_root is None else str(media_root)
    if not len(rows):
        raise DocumentError("there is no row in it.", kind="source", field=str(path)[:200])
    schema = _detect(rows, name) if format == "auto" else format
    if schema not in SCHEMAS:
        raise DocumentError(
            f"unknown format {schema!r}. Known: {', '.join(FORMATS)}.", kind="source", field=name
        )
    return DocumentSource(name, rows, partial(SCHEMAS[schema], untagged=untagged), root, share)


def read_documents(
    path: str | Path, *, format: str = "auto", media_root: str | Path | None = None
) -> Iterator[Document]:
    """Every document of a file, each with its source.

    Args:
        path: The data file, see :func:`open_source`.
        format: The rows' schema.
        media_root: Folder of its media; default: the data file's.

    Raises:
        DocumentError: At the first row that cannot be read.

    Example:
        >>> from vlcpt.demo import data_path
        >>> next(read_documents(data_path("old_eval.jsonl"))).source.line
        1
    """
    source = open_source(path, format=format, media_root=media_root)
    for number in range(len(source)):
        yield source.document(number)


def _open_rows(path: Path, format: str) -> Rows:
    if not path.exists():
        raise DocumentError(
            "no such file or folder. Give the path of a .jsonl, .json, .txt or .md file.",
            kind="source",
            field=str(path),
        )
    suffix = path.suffix.lower()
    if path.is_dir() or suffix in TEXT_SUFFIXES:
        return TextRows(path)
    if suffix in (".jsonl", ".ndjson"):
        return JsonlRows(path)
    if suffix == ".json":
        try:
            rows = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise DocumentError(f"not JSON: {error}.", kind="json", field=str(path)) from None
        if not isinstance(rows, list):
            raise DocumentError(
                f"expected a list of rows, found {type(rows).__name__}.", kind="source", field=str(path)
            )
        return MemoryRows(rows, str(path))
    raise DocumentError(
        f"cannot read files ending in {suffix or 'nothing'!r}. Known: .jsonl, .json, .txt, .md.",
        kind="source",
        field=str(path),
    )


def _detect(rows: Rows, name: str) -> str:
    """The schema that the fields of the first rows show: of the first that fits one."""
    if isinstance(rows, TextRows):
        return "text"
    unknown: DocumentError | None = None
    for number in range(min(len(rows), 100)):
        try:
            row = rows.row(number)
        except DocumentError:
            continue  # told, or counted, when its turn comes
        if isinstance(row, Document):
            return "vlcpt"
        for schema, field in (("vlcpt", "text"), ("segments", "segments")):
            if field in row:
                logger.info("%s: format %s, because row %d has %r", name, schema, number + 1, field)
                return schema
        unknown = unknown or DocumentError(
            f"no format fits the fields {', '.join(map(repr, row)) or '(none)'}. "
            "Rows need 'text' (format vlcpt) or 'segments' (format segments).",
            kind="source",
            source=rows.source(number),
        )
    if unknown:
        raise unknown
    return "vlcpt"  # its reader names what is wrong with each row
