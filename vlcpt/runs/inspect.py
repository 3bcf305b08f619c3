"""``vlcpt inspect``: documents of each source with the tokens that are trained, in the terminal or a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from transformers import ProcessorMixin

from vlcpt.config.yaml import Configs
from vlcpt.data.documents import Document, DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder, TokenStream
from vlcpt.data.encode.pieces import token_texts
from vlcpt.data.formats.unread import list_unread
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.data.plan.split import Part, split_stream
from vlcpt.data.prepared.fingerprint import require_same_encoding
from vlcpt.data.sources import DocumentSource, open_sources
from vlcpt.errors import ConfigError
from vlcpt.file_writes import human_size, write_file
from vlcpt.model.loading import load_processor
from vlcpt.report.pages.inspect import InspectPage
from vlcpt.report.reliance import NatsSums
from vlcpt.report.screen import Screen, say
from vlcpt.report.terminal import document_lines, ledger_table, legend, nats_legend
from vlcpt.runs.data import RunData, encoding_options, quiet_libraries, shown
from vlcpt.runs.tokens import PACKAGES, image_nats

PAGE_ROWS = 100  # of each source, where a page is written and --rows does not say
_ROWS_TO_PLAN = 5_000  # planning packs reads all rows: that many take seconds
_PACKS = 200  # that a page shows

# What each token's image gives it, of a document: float (T,), NaN where nothing is measured. It raises
# DocumentError if a medium cannot be decoded.
NatsOf = Callable[[Document, TokenStream, Sequence[Part]], np.ndarray]


@dataclass(frozen=True)
class Inspected:
    """A row, as far as it could be read.

    Args:
        name: What messages call it.
        document: None where the row gives none.
        stream: None where it has no tokens.
        parts: What is trained of it.
        error: Why it cannot be used.
        stops: Whether training stops there.
    """

    name: str
    document: Document | None
    stream: TokenStream | None
    parts: Sequence[Part]
    error: DocumentError | None = None
    stops: bool = False


@dataclass(frozen=True)
class _Rows:
    """The rows of all training sources, opened for a configuration."""

    configs: Configs
    processor: ProcessorMixin
    encoder: DocumentEncoder
    sources: Sequence[DocumentSource]
    roles: Sequence[str]

    @classmethod
    def of(cls, configs: Configs) -> _Rows:
        processor = load_processor(configs.model.model_name_or_path)
        data, options = configs.data, encoding_options(configs.data)
        found = [
            (source, role)
            for role in ("train_data", "replay_data")
            for source in open_sources(
                getattr(data, role), data.untagged, role=role, max_row_bytes=data.max_row_bytes
            )
        ]
        sources = [source for source, _ in found]
        require_same_encoding(sources, processor, data.untagged, options)
        encoder = DocumentEncoder(processor, options)
        return cls(configs, processor, encoder, sources, [role for _, role in found])

    def require_any(self, rows: slice) -> None:
        """Raise where no source has such rows."""
        if not any(range(*rows.indices(len(source))) for source in self.sources):
            most = max(len(source) for source in self.sources)
            raise ConfigError(
                f"--rows {rows.start}: no source has so many documents; the longest has {most:,}."
            )

    def read(self, source: DocumentSource, number: int) -> Inspected:
        """A row: its tokens and what is trained of them, or why not."""
        data = self.configs.data
        name, document, stream = source.names(number)[0], None, None
        try:
            document = source.document(number)
            stream = self.encoder.tokens(document)
            parts = split_stream(
                stream,
                self.configs.training.max_length,
                on_overlong=data.on_overlong,
                source=document.source,
            )
        except DocumentError as error:
            is_dropped = error.kind == "overlong" and data.on_overlong == "drop"
            stops = not is_dropped and (data.on_bad_data == "error" or error.kind == "overlong")
            known = error.id if error.source is None else error.source.id
            name = (known or name) if document is None else document.name
            return Inspected(name, document, stream, [], error, stops)
        return Inspected(document.name, document, stream, parts)


def inspect_run(
    configs: Configs,
    rows: slice | None,
    console: Console | None = None,
    *,
    html: Path | None = None,
    packs: bool | None = None,
    reliance: Path | None = None,
    nats_of: NatsOf | None = None,
) -> None:
    """Show which tokens of the documents of each training source are trained.

    Args:
        configs: Those of the run.
        rows: Which of each source; None: the first.
        console: Where to.
        html: Write a page there, and only say so.
        packs: Whether the page has packs, for which all rows are read; None: where there are few.
        reliance: A checkpoint: targets are coloured by what their image gives them there.
        nats_of: What the image gives each token, in place of asking a checkpoint.
    """
    console = console or Screen()
    quiet_libraries()
    opened = _Rows.of(configs)
    opened.require_any(rows or slice(0, 5))
    if reliance is not None:
        say(console, f"{reliance}: loading the model")
        nats_of = image_nats(configs, reliance, opened.encoder)
    if html is not None:
        _write_page(opened, rows, console, html, packs, nats_of, reliance)
    else:
        _show(opened, rows or slice(0, 5), console, nats_of)


def _show(opened: _Rows, rows: slice, console: Console, nats_of: NatsOf | None) -> None:
    """Documents in the terminal."""
    sums = NatsSums([source.name for source in opened.sources])
    console.print(legend(console) if nats_of is None else nats_legend(console), end="\n\n")
    for source in opened.sources:
        numbers = range(*rows.indices(len(source)))
        unread: Counter[str] = Counter(source.left_out())
        if not numbers:
            say(console, f"{source.name} has {len(source):,} documents, none of them in --rows.")
        for number in numbers:
            one = opened.read(source, number)
            if one.document is not None:
                unread.update(one.document.not_read)
            if one.error is not None:
                what = "training would stop here" if one.stops else "not used"
                say(console, f"{what}: {one.error}\n", "red")
            elif one.stream is not None:
                try:
                    nats = _nats(one, nats_of)
                except DocumentError as error:
                    say(console, f"not measured: {error}\n", "red")
                    continue
                if nats is not None:
                    sums.add(source.name, nats)
                tokenizer = opened.processor.tokenizer
                for line in document_lines(one.name, one.stream, one.parts, tokenizer, console, nats):
                    console.print(line)
        if unread:
            say(console, f"{source.name}: {list_unread(dict(unread.most_common()))}")
    if nats_of is not None:
        console.print(sums.sheet())


def _nats(one: Inspected, nats_of: NatsOf | None) -> np.ndarray | None:
    """What images give the tokens of a row, where a model is asked and the row has targets.

    Raises:
        DocumentError: If a medium cannot be decoded.
    """
    if nats_of is None or one.document is None or one.stream is None or not one.parts:
        return None
    return nats_of(one.document, one.stream, one.parts)


def _write_page(
    opened: _Rows,
    rows: slice | None,
    console: Console,
    html: Path,
    packs: bool | None,
    nats_of: NatsOf | None,
    reliance: Path | None,
) -> None:
    chosen = rows or slice(0, PAGE_ROWS)
    opened.require_any(chosen)
    names = [(source.name, role) for source, role in zip(opened.sources, opened.roles, strict=True)]
    page = InspectPage(names, token_texts(opened.processor.tokenizer), opened.encoder.options.limits)
    everything = sum(map(len, opened.sources))
    found = [
        (place, number)
        for place, source in enumerate(opened.sources)
        for number in range(*chosen.indices(len(source)))
    ]
    unread = [Counter(source.left_out()) for source in opened.sources]
    for place, number in shown(console)(found, "reading"):
        one = opened.read(opened.sources[place], number)
        if one.document is not None:
            unread[place].update(one.document.not_read)
        if one.document is not None and one.stream is not None:
            try:
                nats = _nats(one, nats_of)
            except DocumentError:  # the page says of each medium why it cannot be shown
                nats = None
            page.add(
                *(place, number, one.document, one.stream, one.parts),
                error=one.error,
                stops=one.stops,
                nats=nats,
            )
        elif one.error is not None:
            page.add_failure(place, number, one.name, one.error, stops=one.stops)
    page.notes += [
        f"{source.name}: {list_unread(dict(counts.most_common()))}"
        for source, counts in zip(opened.sources, unread, strict=True)
        if counts
    ]
    if packs or (packs is None and everything <= _ROWS_TO_PLAN):
        _add_packs(page, opened, console)
    of = ", ".join(dict.fromkeys(name for name, _ in names))
    lead = f"{len(found):,} of {everything:,} documents of {of}."
    if len(found) < everything:
        last = "" if chosen.stop is None else chosen.stop
        lead += f" Rows {chosen.start}:{last} of each source; --rows chooses others."
    title = "Which tokens train" if nats_of is None else "Which tokens need the picture"
    versions = {name: version(name) for name in PACKAGES}
    text = page.render(title, lead, versions, reliance=str(reliance or ""))
    write_file(html, text, "the page")
    say(console, f"{html}: {lead} {human_size(len(text.encode()))}.")


def _add_packs(page: InspectPage, opened: _Rows, console: Console) -> None:
    """The packs of the training data, or why there are none."""
    if not opened.configs.training.packing:
        page.note_packs(error="packing is off: each document, or part of one, is a sample of its own.")
        return
    try:
        dataset = RunData(opened.configs, opened.processor, shown(console)).train()
    except (DocumentError, BadDataError) as error:
        page.note_packs(error=f"the training data cannot be planned as it is. {error}")
        return
    shown_packs = min(len(dataset), _PACKS)
    for index in range(shown_packs):
        page.add_pack(dataset.samples_of(index), dataset.max_length)
    ledger = dataset.ledger
    said = f"{len(dataset):,} packs of {dataset.max_length:,} tokens"
    if ledger.fill is not None:
        said += f", {ledger.fill:.1%} full"
    said += ". Documents that share a pack do not see each other."
    if shown_packs < len(dataset):
        said += f" The first {shown_packs:,} are shown."
    page.note_packs(said=said, ledger=ledger_table(ledger))
