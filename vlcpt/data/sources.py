"""A source: stored rows and the format that makes them documents, by number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from vlcpt.data.documents import Document, DocumentError, Source
from vlcpt.data.encode.encoder import EncodedDocument
from vlcpt.data.formats.chat import PREFERENCES
from vlcpt.data.formats.detect import SCHEMAS, check_format, detect_format, log_formats, schema_reader
from vlcpt.data.formats.unread import Unread
from vlcpt.data.markup import Untagged
from vlcpt.data.media.files import may_hold_media
from vlcpt.data.prepared.read import PreparedRows, prepared_members
from vlcpt.data.rows.base import MAX_ROW_BYTES, Rows
from vlcpt.data.rows.fields import Row, id_field, is_given
from vlcpt.data.rows.open import SourceConfig, open_rows, why_empty
from vlcpt.data.rows.tables import DatasetRows, MemoryRows, is_dataset
from vlcpt.data.rows.tars import TarRow, with_own_files
from vlcpt.data.rows.text_files import TextRows
from vlcpt.file_writes import WriteError


@dataclass(frozen=True)
class DocumentSource:
    """Documents by number: stored rows and the schema that reads them.

    Args:
        name: What the ledger calls it.
        rows: The rows.
        read: The schema's reader.
        unread: Names what the schema does not read of a row; with the folder of the source's media.
        reading: The format and its options, by the names of the configuration.
        share: The part of all targets asked for.
        max_row_bytes: Above which a row is refused.
        is_detected: Whether its format was found from its rows.
    """

    name: str
    rows: Rows
    read: Callable[..., Document]
    unread: Unread
    reading: Mapping[str, object]
    share: float | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    is_detected: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def media_root(self) -> str | None:
        """Folder of its media; None: paths are trusted."""
        return self.unread.media_root

    @property
    def marking(self) -> str:
        """How a row without a target gets some; empty where nothing marks them."""
        schema = SCHEMAS.get(self.unread.format)
        return schema.marking if schema else ""

    def state(self) -> object:
        """What tells whether its files changed; None where nothing does."""
        return self.rows.state() if hasattr(self.rows, "state") else None

    def names(self, number: int) -> list[str]:
        """File and line of a row, as messages call it."""
        return [str(self.rows.source(number))]

    def left_out(self) -> dict[str, int]:
        """Files that lie with the rows and are not read, by what they are."""
        return {
            name: count
            for name, count in self.rows.left_out().items()
            if count and name not in self.unread.ignored
        }

    def root_of(self, number: int) -> str | None:
        """The folder of a document's media: of files in several folders, its own file's."""
        return self.rows.media_root(number) or self.media_root

    def document(self, number: int) -> Document:
        """Document ``number``.

        Raises:
            DocumentError: With file, line and field.
        """
        source: Source | None = None
        try:
            row = self.rows.row(number)
            if isinstance(row, EncodedDocument):
                return row
            source = self.rows.source(number)
            if isinstance(row, Document):
                root = self.media_root if row.media_root is None else row.media_root
                return replace(row, source=replace(row.source or source, id=row.id), media_root=root)
            # With the id: all messages about the document name it.
            source = Source(source.path, source.line, id_field(row))
            return self._read(row, source, self.root_of(number))
        except DocumentError as error:
            raise error.at(source or self.rows.source(number)) from None
        except OSError as error:
            raise DocumentError(
                f"the file cannot be read: {error.strerror or error}. Look whether it is still there.",
                source=source or self.rows.source(number),
            ) from None

    def _read(self, row: Row, source: Source, root: str | None) -> Document:
        unread = self.unread if root == self.media_root else replace(self.unread, media_root=root)
        tar_row = row if isinstance(row, TarRow) else None
        if unread.ignored:  # as if they were not there
            row = {key: value for key, value in row.items() if key not in unread.ignored - unread.fields}
        try:
            document = self.read(row)
        except DocumentError as error:
            unread.advise(error, row)
            raise
        names = [*document.not_read, *unread.of(row, document)]
        if tar_row is not None:
            document, unnamed = with_own_files(document, tar_row)
            names += unnamed if unread.format != "text" else ()
        not_read = tuple(name for name in dict.fromkeys(names) if name not in unread.ignored)
        # It is new, and nobody else has it: ``replace`` would look at its segments again.
        vars(document).update(id=source.id, source=source, media_root=root, not_read=not_read)
        return document


def open_source(
    source: SourceConfig,
    given: Sequence[object] | None = None,
    *,
    untagged: Untagged = "train",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> DocumentSource:
    """Open a data file, a folder, a data set on the Hub, a prepared source, or rows in memory.

    Args:
        source: ``.jsonl``, ``.json``, ``.parquet``, ``.arrow``, ``.tar``, ``.txt``, ``.md``, the first ones
            also with ``.gz`` or ``.zst``; a folder of such files, or one that ``save_to_disk`` wrote; a
            name on the Hub; what ``vlcpt prepare`` wrote, also at an address.
        given: Rows or Documents in memory, such as a ``datasets.Dataset``, instead of what is at its path.
        untagged: What becomes of text without any tag; format ``vlcpt`` alone.
        max_row_bytes: A row of more is refused before it is read; tables are read by groups of rows.

    Raises:
        DocumentError: If the data cannot be opened, its schema is not known, or has no such option.

    Example:
        >>> source = open_source(SourceConfig("rows"), [{"text": "a"}, {"text": "b"}])
        >>> len(source), source.document(1).name
        (2, 'rows:2')
    """
    if given is None and (members := prepared_members(source.path)) is not None:
        return _open_prepared(source, [member.folder for member in members])
    rows: Rows
    name, format, root = source.name, source.format, source.media_root
    ignored = frozenset(source.ignore_fields)
    try:
        check_format(format, source.targets, source.chat_template)
        if given is None:
            rows, root = open_rows(source, max_row_bytes)
        else:
            if source.split:
                raise ValueError(
                    f"split {source.split!r} does not apply to rows in memory. Choose it before."
                )
            rows = DatasetRows(given, name) if is_dataset(given) else MemoryRows(given, name)
        if not len(rows):
            reason = why_empty(source.path) if given is None else "there is no row in it."
            raise DocumentError(reason, kind="source", field=source.path)
        format = detect_format(rows, name, ignored) if format == "auto" else format
        read = schema_reader(
            format, untagged=untagged, targets=source.targets, chat_template=source.chat_template
        )
    except (DocumentError, WriteError):  # of what was unpacked: it says all
        raise
    except ValueError as error:
        raise DocumentError(str(error), kind="source", field=name) from None
    except OSError as error:
        reason = f"it cannot be opened: {error.strerror or error}. Check its permissions and the disk."
        raise DocumentError(reason, kind="source", field=source.path) from None
    fields = frozenset(("id", *SCHEMAS[format].fields))
    rows, untouched = _only_needed(rows, format, fields, ignored)
    unread = Unread(format, fields, ignored, root, untouched)
    targets = source.targets or next(iter(SCHEMAS[format].targets), None)
    reading = {"format": format, "targets": targets, "chat_template": source.chat_template or None}
    reading |= {"untagged": untagged} if format == "vlcpt" else {}
    is_detected = source.format == "auto" and not isinstance(rows, TextRows)
    return DocumentSource(
        name, rows, read, unread, reading, source.share, max_row_bytes, is_detected=is_detected
    )


def _only_needed(
    rows: Rows, format: str, fields: frozenset[str], ignored: frozenset[str]
) -> tuple[Rows, tuple[str, ...]]:
    """For tables, the columns that the schema reads or that may hold media; the names of the others."""
    if not rows.has_columns:
        return rows, ()
    first: list[Row] = []
    for number in range(min(len(rows), 20)):
        try:
            row = rows.row(number)
        except DocumentError:
            continue
        first += [] if isinstance(row, Document) else [row]
    others = {str(name): None for row in first for name in row if name not in fields and name not in ignored}
    looked_at = [
        name
        for name in others
        if (format != "text" and _is_looked_at(name, [row.get(name) for row in first]))
        or (SCHEMAS[format].chat and name in PREFERENCES)
    ]
    # What cannot hold a medium, and is full, is never read: a column of texts may be larger than all others.
    return rows.only((*fields, *looked_at)), tuple(name for name in others if name not in looked_at)


def _is_looked_at(name: str, values: Sequence[object]) -> bool:
    """Whether a column is looked at in each row: for media, or since it counts only where it has anything."""
    return may_hold_media(name, values) or not all(map(is_given, values))


def _open_prepared(source: SourceConfig, folders: Sequence[str]) -> DocumentSource:
    """A source that was encoded before; what was decided then cannot be decided again."""
    if len(folders) > 1:
        raise DocumentError(
            f"it holds {len(folders)} sources. Give one of them: {', '.join(folders)}.",
            kind="source",
            field=source.path,
        )
    rows = PreparedRows(folders[0])
    read_as = rows.contents.reading
    for key in ("split", "media_root", "targets", "format", "chat_template"):
        value = getattr(source, key)
        if value in (None, "auto", False) or value == read_as.get(key):
            continue
        then = f"{key} {read_as[key]!r}" if read_as.get(key) else f"no {key}"
        raise DocumentError(
            f"{key} {value!r} does not apply: it was prepared with {then}. Remove {key}, or run vlcpt "
            "prepare again.",
            kind="source",
            field=source.path,
        )
    name = source.name if source.is_named else rows.contents.name
    unread = Unread(str(read_as.get("format")), frozenset(), frozenset(), None)
    return DocumentSource(name, rows, _no_row, unread, read_as, source.share)


def _no_row(row: object) -> Document:
    raise AssertionError("rows of a prepared source are documents")


def read_documents(
    path: str | Path,
    *,
    split: str | None = None,
    format: str = "auto",
    media_root: str | Path | None = None,
    targets: str | None = None,
    ignore_fields: Sequence[str] = (),
) -> Iterator[Document]:
    """Every document of a file, each with its source.

    Args:
        path: The data file, see :func:`open_source`.
        split: That of a saved data set or one on the Hub.
        format: The rows' schema.
        media_root: Folder of its media; default: the data file's.
        targets: What trains, where the format leaves a choice.
        ignore_fields: Fields of which nothing is said, though the format does not read them.

    Raises:
        DocumentError: At the first row that cannot be read.

    Example:
        >>> from vlcpt.demo import data_path
        >>> next(read_documents(data_path("old_eval.jsonl"))).source.line
        1
    """
    source = open_source(
        SourceConfig(
            str(path),
            split=split,
            format=format,
            media_root=None if media_root is None else str(media_root),
            targets=targets,
            ignore_fields=tuple(ignore_fields),
        )
    )
    for number in range(len(source)):
        yield source.document(number)


Sources = str | Path | Mapping[str, object] | Sequence[object]


def open_sources(
    sources: Sources,
    untagged: Untagged,
    memory_name: str = "rows",
    role: str = "train_data",
    max_row_bytes: int = MAX_ROW_BYTES,
) -> list[DocumentSource]:
    """Sources as any caller may give them; formats that were found from rows are logged.

    Args:
        sources: A path, a mapping as in ``train_data``, or a list of these, ``DataConfig.train_data``
            included; or rows or Documents in memory, a ``datasets.Dataset`` or a list of them included.
        untagged: What becomes of text without any tag.
        memory_name: What rows in memory are called.
        role: Which sources are meant of a prepared set that holds several.
        max_row_bytes: A row of more is refused before it is read.

    Example:
        >>> [source.name for source in open_sources([{"text": "a"}, {"text": "b"}], "train")]
        ['rows']
    """
    found = list(_opened(sources, untagged, memory_name, role, max_row_bytes))
    log_formats({one.name: one.unread.format for one in found if one.is_detected})
    return found


def _opened(
    sources: Sources, untagged: Untagged, memory_name: str, role: str, max_row_bytes: int
) -> Iterator[DocumentSource]:
    given: Sequence[object] = sources if isinstance(sources, list | tuple) else [sources]
    is_one = isinstance(sources, str | Path | Mapping | SourceConfig) and not is_dataset(sources)
    if is_one or (given is sources and all(map(_is_source, given))):
        for source, rows in map(_source, given):
            for member in members_of(source, role) if rows is None else [source]:
                yield open_source(member, rows, untagged=untagged, max_row_bytes=max_row_bytes)
    elif not hasattr(sources, "__len__") or len(sources):
        tables = given if all(map(is_dataset, given)) else [sources]
        for number, one in enumerate(tables, 1):
            name = f"{memory_name}-{number}" if number > 1 else memory_name
            yield open_source(SourceConfig(name), one, untagged=untagged)  # type: ignore[arg-type]


_KEYS = {one.name for one in fields(SourceConfig)}


def _is_source(one: object) -> bool:
    """Whether this says where rows are, and is no row itself."""
    if isinstance(one, Mapping):
        return "path" in one and one.keys() <= _KEYS
    return isinstance(one, str | Path | SourceConfig)


def _source(given: object) -> tuple[SourceConfig, Sequence[object] | None]:
    """One source, and its rows where its path is rows in memory."""
    if isinstance(given, SourceConfig):
        return given, None
    if isinstance(given, str | Path):
        return SourceConfig(str(given)), None
    if isinstance(given, Mapping) and _is_source(given):
        values = {name: value for name, value in given.items() if value is not None}
        rows = None if isinstance(path := values.pop("path"), str | Path) else path
        return SourceConfig(str(path) if rows is None else "rows", **values), rows
    there = ", ".join(map(repr, given)) if isinstance(given, Mapping) else type(given).__name__
    raise DocumentError(
        f"a source is a mapping with 'path' and perhaps {', '.join(sorted(_KEYS - {'path'}))}; "
        f"found {there or 'nothing'}.",
        kind="source",
    )


def members_of(source: SourceConfig, role: str) -> list[SourceConfig]:
    """A source as it is, or for a prepared set each of its sources with this role.

    Args:
        source: An entry of ``train_data`` and its like.
        role: The configuration's key that it stands under.

    Raises:
        DocumentError: If the set holds none, or what is said of one source stands with several.

    Example:
        >>> [member.name for member in members_of(SourceConfig("no/such/file"), "train_data")]
        ['file']
    """
    members = prepared_members(source.path)
    if members is None or members[0].role == "":
        return [source]
    wanted = [member for member in members if member.role == role]
    if not wanted:
        there = ", ".join(f"{member.role} {member.name}" for member in members)
        raise DocumentError(
            f"it was prepared without {role}; it holds {there}. Give the folder of the source that is meant.",
            kind="source",
            field=source.path,
        )
    alone = ["name"] * source.is_named + ["share"] * (source.share is not None)
    if len(wanted) > 1 and alone:
        folders = ", ".join(member.folder for member in wanted)
        raise DocumentError(
            f"{' and '.join(alone)} cannot be set for {len(wanted)} sources at once. Give each its "
            f"own entry: {folders}.",
            kind="source",
            field=source.path,
        )
    return [
        replace(
            source,
            path=member.folder,
            name=source.name if source.is_named else member.name,
            share=member.share if source.share is None else source.share,
        )
        for member in wanted
    ]


def require_distinct(names: Sequence[str]) -> None:
    """Raise if two sources have one name, by which ledger and results know them.

    Raises:
        DocumentError: With the name.

    Example:
        >>> require_distinct(["a", "b"])
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        reason = f"two sources are called {twice!r}. Give each its own 'name'."
        raise DocumentError(reason, kind="source", field="name")
