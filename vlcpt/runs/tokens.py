"""Which tokens need the picture: ``vlcpt eval --tokens``, and the model of ``vlcpt inspect --reliance``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console
from torch import nn
from transformers import ProcessorMixin

from vlcpt.config.precision import autocast_type
from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import Document
from vlcpt.data.encode.encoder import DocumentEncoder, TokenStream
from vlcpt.data.encode.pieces import token_texts
from vlcpt.data.plan.split import Part, split_stream
from vlcpt.file_writes import human_size, write_file
from vlcpt.model.loading import check_evaluated, load_trained
from vlcpt.report.pages.inspect import InspectPage
from vlcpt.report.reliance import token_nats
from vlcpt.report.screen import say
from vlcpt.runs.data import encoding_options, retention_names, with_native_model
from vlcpt.training.evaluate import EvalOptions
from vlcpt.training.reliance import ImageNats
from vlcpt.training.scores import SetScores

PACKAGES = ("transformers", "tokenizers", "torch")  # that a page names, with their versions


def image_nats(configs: Configs, checkpoint: Path, encoder: DocumentEncoder) -> ImageNats:
    """Load a checkpoint to ask it what images give the targets of documents.

    Raises:
        ConfigError: If it is no checkpoint of the run's base.
    """
    check_evaluated(configs.model, str(checkpoint))
    training = configs.training
    model = load_trained(with_native_model(configs).model, str(checkpoint))
    if not getattr(model, "is_quantized", False):
        nn.Module.to(model, training.device)  # transformers hides the type of its own
    options = EvalOptions(
        autocast=autocast_type(training), loss_chunk=training.loss_chunk, pixel_bytes=training.pixel_bytes
    )
    return ImageNats(model, encoder, options)


def write_tokens(
    path: Path,
    configs: Configs,
    checkpoint: Path,
    sets: Mapping[str, CPTDataset],
    scores: Mapping[str, SetScores],
    processor: ProcessorMixin,
    console: Console,
) -> None:
    """Write the documents that were measured, each target with what its image gives it.

    Args:
        path: Ends in ``.html`` or ``.jsonl``.
        configs: Those of the run.
        checkpoint: That was measured.
        sets: What was measured.
        scores: With their targets.
        processor: That of the model.
        console: Where to say so.
    """
    measured = _Measured(configs, sets, scores)
    if path.suffix == ".jsonl":
        lines = (json.dumps(one, ensure_ascii=False) + "\n" for one in measured.lines(processor))
        write_file(path, "".join(lines), "the tokens of documents")
        return
    text, lead = measured.page(checkpoint, processor)
    write_file(path, text, "the page")
    say(console, f"{path}: {lead} {human_size(len(text.encode()))}.")


class _Measured:
    """Documents that were measured, read again one by one.

    Args:
        configs: Those of the run.
        sets: What was measured.
        scores: With their targets.
    """

    def __init__(
        self, configs: Configs, sets: Mapping[str, CPTDataset], scores: Mapping[str, SetScores]
    ) -> None:
        self._configs, self._sets, self._scores = configs, sets, scores

    def _documents(self, name: str) -> Iterator[tuple[int, Document, TokenStream, list[Part], np.ndarray]]:
        """The documents of a set: number, tokens, parts, and what images give their targets."""
        targets, documents = self._scores[name].targets, self._sets[name].documents
        assert targets is not None
        for number in range(len(documents)):
            document, stream = documents.encoded(number)
            if (nats := targets.of_document(number, len(stream))) is not None:
                parts = split_stream(
                    stream, self._sets[name].max_length, on_overlong="split", source=document.source
                )
                yield number, document, stream, parts, nats

    def lines(self, processor: ProcessorMixin) -> Iterator[dict[str, object]]:
        """A line for each document."""
        texts = token_texts(processor.tokenizer)
        for name in self._sets:
            for _, document, stream, parts, nats in self._documents(name):
                own = nats[~np.isnan(nats)]
                yield {
                    "set": name,
                    "source": str(document.source),
                    "id": document.id,
                    "targets": len(own),
                    "nats": round(float(own.sum()), 4) + 0.0,
                    "tokens": token_nats(stream, parts, nats, texts),
                }

    def page(self, checkpoint: Path, processor: ProcessorMixin) -> tuple[str, str]:
        """A page, and what it says it shows."""
        kept = retention_names(self._configs.data)
        sources = [(name, "retention_data" if name in kept else "eval_data") for name in self._sets]
        limits = encoding_options(self._configs.data).limits
        page = InspectPage(sources, token_texts(processor.tokenizer), limits)
        for place, name in enumerate(self._sets):
            for number, document, stream, parts, nats in self._documents(name):
                page.add(place, number, document, stream, parts, nats=nats)
        lead = f"{len(page):,} documents of {', '.join(self._sets)}, measured with {checkpoint}."
        text = page.render(
            "Which tokens need the picture",
            lead,
            {name: version(name) for name in PACKAGES},
            reliance=str(checkpoint),
            command="vlcpt eval --tokens",
        )
        return text, lead
