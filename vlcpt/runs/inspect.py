"""``vlcpt inspect``: the first documents of each source, with the tokens that are trained marked."""

from __future__ import annotations

from collections import Counter

from rich.console import Console

from vlcpt.config.yaml import Configs
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.formats.unread import list_unread
from vlcpt.data.plan.split import split_stream
from vlcpt.data.prepared.write import require_same_encoding
from vlcpt.data.sources import open_sources
from vlcpt.errors import ConfigError
from vlcpt.model.loading import load_processor
from vlcpt.report.screen import Screen, say
from vlcpt.report.terminal import document_lines, legend
from vlcpt.runs.data import encoding_options, quiet_libraries


def inspect_run(configs: Configs, rows: slice, console: Console | None = None) -> None:
    """Show which tokens of the first documents of each training source are trained."""
    console = console or Screen()
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    data, options = configs.data, encoding_options(configs.data)
    encoder = DocumentEncoder(processor, options)
    sources = [
        source
        for role in ("train_data", "replay_data")
        for source in open_sources(
            getattr(data, role), data.untagged, role=role, max_row_bytes=data.max_row_bytes
        )
    ]
    require_same_encoding(sources, processor, data.untagged, options)
    if not any(range(*rows.indices(len(source))) for source in sources):
        most = max(len(source) for source in sources)
        raise ConfigError(f"--rows {rows.start}: no source has so many documents; the longest has {most:,}.")
    console.print(legend(console), end="\n\n")
    for source in sources:
        numbers = range(*rows.indices(len(source)))
        unread: Counter[str] = Counter(source.left_out())
        if not numbers:
            say(console, f"{source.name} has {len(source):,} documents, none of them in --rows.")
        for number in numbers:
            try:
                document = source.document(number)
                unread.update(document.not_read)
                stream = encoder.tokens(document)
                parts = split_stream(
                    stream,
                    configs.training.max_length,
                    on_overlong=data.on_overlong,
                    source=document.source,
                )
            except DocumentError as error:
                is_dropped = error.kind == "overlong" and data.on_overlong == "drop"
                stops = not is_dropped and (data.on_bad_data == "error" or error.kind == "overlong")
                what = "training would stop here" if stops else "not used"
                say(console, f"{what}: {error}\n", "red")
                continue
            for line in document_lines(document.name, stream, parts, processor.tokenizer, console):
                console.print(line)
        if unread:
            say(console, f"{source.name}: {list_unread(dict(unread.most_common()))}")
