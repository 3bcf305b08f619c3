"""``vlcpt prepare``: the data of a run, encoded once into a folder that ``train_data`` can name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from vlcpt.config.schema import ROLES, DataConfig
from vlcpt.config.yaml import Configs
from vlcpt.data.documents import DocumentError
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.prepared.fingerprint import fingerprint
from vlcpt.data.prepared.read import BEGUN, SET_KIND, WHOLE, prepared_members, read_json
from vlcpt.data.prepared.write import Engine, prepare_source, remove_prepared
from vlcpt.data.rows.open import SourceConfig
from vlcpt.data.sources import open_sources
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_json
from vlcpt.folder_locks import LOCK, hold
from vlcpt.model.loading import load_processor
from vlcpt.report.screen import Screen, say
from vlcpt.report.terminal import ledger_table
from vlcpt.runs.data import (
    RunData,
    encoding_options,
    quiet_libraries,
    show_unmeasured,
    show_unread,
    shown,
)
from vlcpt.runs.features import fill_cache


def prepare_run(
    configs: Configs, output: Path | None, engine: Engine = "local", console: Console | None = None
) -> None:
    """Encode all sources of a configuration, or go on where that was interrupted, and show their ledger.

    Where it names a ``vision_cache``, that is filled then.

    Args:
        output: A folder: new, empty, or with the same data as far as it is prepared; None: no shards.
        engine: Where the work is done; the result is the same.

    Raises:
        ConfigError: Before anything is read, if the folder is not free or another process's, or Ray is not
            installed; if there is nothing to do.
        ValueError: If the data failed.
        WriteError: If something cannot be written.
    """
    console = console or Screen()
    has_cache = configs.training.vision_cache is not None
    if output is None and not has_cache:
        raise ConfigError("there is nothing to prepare: give --output for shards, or --vision_cache.")
    if output is not None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("--output is written by one process: start it without a launcher.")
        _check(output, engine)
        with hold(output, "--output"):
            _prepare(configs, output, engine, console)
    if has_cache:
        fill_cache(configs, console)


def _prepare(configs: Configs, output: Path, engine: Engine, console: Console) -> None:
    data, training = configs.data, configs.training
    if training.overwrite:
        for folder in (*(one for role in ROLES for one in output.glob(f"{role}/*/")), output):
            remove_prepared(folder)
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    options = encoding_options(data)
    write_json(output / BEGUN, {"kind": SET_KIND}, "the mark of what is being prepared")
    for role, entry in _entries(data):
        if prepared_members(entry.path) is not None:
            raise DocumentError("it is prepared already.", kind="source", field=entry.path)
        (source,) = open_sources([entry], data.untagged, max_row_bytes=data.max_row_bytes)
        prepare_source(
            source,
            # What is encoded for good is checked as `vlcpt check` does: a cut file is no medium.
            partial(DocumentEncoder, processor, replace(options, media_check="container")),
            output / _folder(role, entry),
            fingerprint=fingerprint(processor, data.untagged, options),
            stops=data.on_bad_data == "error",
            engine=engine,
            num_proc=training.workers,
            timeout=training.dataloader_timeout,
            track=shown(console),
        )
    # As a run would read it: rules about bad data hold over all of a source, and shares over all sources.
    prepared = RunData(replace(configs, data=_prepared(data, output)), processor, shown(console))
    dataset = prepared.train()
    console.print(ledger_table(dataset.ledger))
    sets = prepared.evaluations()
    show_unread(dataset.ledger, console)
    show_unmeasured(sets, console)
    dataset.ledger.write(output)
    sources = [
        {"folder": _folder(role, entry), "role": role, "name": entry.name, "share": entry.share}
        for role, entry in _entries(data)
    ]
    write_json(output / WHOLE, {"kind": SET_KIND, "sources": sources}, "the list of what is prepared")
    (output / BEGUN).unlink()
    if isinstance(console, Screen) and console.brief:
        say(console, f"prepared in {output}", is_result=True)
    console.print(f"prepared in {output}. To train from it, write in the configuration:", highlight=False)
    for role in ROLES:
        if getattr(data, role):
            console.print(f"{role}: {json.dumps(str(output))}", highlight=False, soft_wrap=True)


def _check(output: Path, engine: Engine) -> None:
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(output)):  # of ://, Path has made :/
        raise ConfigError(
            f"--output {output}: shards are written to a folder. Give one, and copy it to the address then."
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file. Give a folder.")
    if engine == "ray" and find_spec("ray") is None:
        raise ConfigError('--engine ray needs Ray: pip install "vlcpt[ray]". Or remove the option.')
    if not output.exists() or all(path.name == LOCK for path in output.iterdir()):
        return
    if all(read_json(str(output), name, (SET_KIND,)) is None for name in (WHOLE, BEGUN)):
        raise ConfigError(
            f"--output {output} is not empty, and holds nothing that was prepared. Give another folder."
        )


def _entries(data: DataConfig) -> Iterator[tuple[str, SourceConfig]]:
    return ((role, entry) for role in ROLES for entry in getattr(data, role))


def _folder(role: str, entry: SourceConfig) -> str:
    name = quote(entry.name, safe="")
    return f"{role}/{name.replace('.', '%2E') if name.startswith('.') else name}"


def _prepared(data: DataConfig, output: Path) -> DataConfig:
    """The same data, read from what was prepared."""
    entries = {
        role: tuple(
            SourceConfig(str(output / _folder(role, entry)), name=entry.name, share=entry.share)
            for entry in getattr(data, role)
        )
        for role in ROLES
    }
    return replace(data, **entries)  # type: ignore[arg-type]
