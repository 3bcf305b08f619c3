"""One source of documents, as a configuration names it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath

from vlcpt import config_checks
from vlcpt.data.readers.storage import default_name


@dataclass(frozen=True)
class SourceConfig:
    """One entry of ``train_data`` and its like.

    Example:
        >>> SourceConfig("books/train.jsonl").name
        'train'
    """

    path: str = field(metadata={"help": "A file, a folder, or a data set's name on the Hub."})
    split: str | None = field(default=None, metadata={"help": "Split of a data set; files have none."})
    format: str = field(
        default="auto", metadata={"help": "The schema of the rows. auto: told from the first rows."}
    )
    media_root: str | None = field(
        default=None, metadata={"help": "Folder that media must lie in. Default: the data file's."}
    )
    name: str = field(
        default="", metadata={"help": "Its name in ledger and results. Default: the last part of path."}
    )
    share: float | None = field(
        default=None, metadata={"help": "Its part of all targets, up to 1; of train_data, all or none."}
    )
    targets: str | None = field(
        default=None,
        metadata={"help": "What trains of formats without spans: assistant, last, all. Default: theirs."},
    )
    chat_template: bool = field(
        default=False, metadata={"help": "Keep the model's turn markers, of replayed chats for example."}
    )
    ignore_fields: tuple[str, ...] = field(
        default=(), metadata={"help": "Fields that are not read on purpose: nothing is said of them."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.ignore_fields, str):
            object.__setattr__(self, "ignore_fields", (self.ignore_fields,))
        if not self.name:
            object.__setattr__(self, "name", default_name(self.path))
        config_checks.check_source(self)


SourceLike = str | PathLike[str] | Mapping[str, object] | SourceConfig
"""What a Python caller may write for a source: a path, its fields as a mapping, or the thing itself."""


def as_sources(value: SourceLike | Sequence[SourceLike]) -> tuple[SourceConfig, ...]:
    """Turn what a caller may write for a list of sources into that list.

    Raises:
        ValueError: For a mapping with an unknown field, with the nearest known one.

    Example:
        >>> [source.name for source in as_sources(["a.jsonl", {"path": "b.jsonl", "name": "books"}])]
        ['a', 'books']
    """
    sources = []
    for item in [value] if isinstance(value, str | PathLike | Mapping | SourceConfig) else value:
        if isinstance(item, Mapping):
            sources.append(config_checks.build(SourceConfig, item))
        else:
            sources.append(item if isinstance(item, SourceConfig) else SourceConfig(fspath(item)))
    return tuple(sources)
