"""What its image gives each target of a document, asked of a model document by document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from vlcpt.data.collator import CPTDataCollator
from vlcpt.data.documents import Document
from vlcpt.data.encode.encoder import DocumentEncoder, TokenStream
from vlcpt.data.plan.split import Part
from vlcpt.model.tuning import base_model
from vlcpt.training.evaluate import EvalOptions, evaluating
from vlcpt.training.loss import BatchTensors, target_losses
from vlcpt.training.step import sent
from vlcpt.training.target_nats import TargetPlaces

_PIXELS = ("pixel_values", "pixel_values_videos")


class ImageNats:
    """Asks a model for the targets of documents, with their images and with blank ones.

    Args:
        model: In the state it is to be asked in.
        encoder: What makes tokens of the documents.
        options: The type of products, ``loss_chunk`` and ``pixel_bytes`` are read from these.
    """

    def __init__(self, model: nn.Module, encoder: DocumentEncoder, options: EvalOptions) -> None:
        self._model, self._encoder, self._options = model, encoder, options
        self._collator = CPTDataCollator(encoder.processor)
        self._collator.keeps_bytes = options.pixel_bytes
        self._collator.window_size = base_model(model).config.vision_config.window_size
        self._device = next(model.parameters()).device

    def __call__(self, document: Document, stream: TokenStream, parts: Sequence[Part]) -> np.ndarray:
        """What images give each token: float64 (T,), NaN where nothing is trained, 0 in a part without media.

        Args:
            document: The document.
            stream: Its tokens.
            parts: What is trained of them.

        Raises:
            DocumentError: If a medium cannot be decoded.
        """
        found = np.full(len(stream), np.nan)
        with (
            evaluating(self._model),
            torch.autocast(
                self._device.type, self._options.autocast, enabled=self._options.autocast is not None
            ),
        ):
            for part in parts:
                places, nats = self._of_part(document, stream, part)
                found[places] = nats
        return found

    def _of_part(
        self, document: Document, stream: TokenStream, part: Part
    ) -> tuple[np.ndarray, np.ndarray | float]:
        """The places of its targets in the document, and what images give them."""
        sample = self._encoder.sample(document, stream, part.start, part.stop, repeated=part.repeated)
        places = TargetPlaces.of([(0, part.start, sample)]).places.numpy()
        right = sent(self._collator([sample]), self._device, self._collator.scales)
        pixels = {name: one for name in _PIXELS if isinstance(one := right.get(name), torch.Tensor)}
        if not pixels:
            return places, 0.0
        blank = {**right, **{name: torch.zeros_like(one) for name, one in pixels.items()}}
        return places, self._losses(blank) - self._losses(right)

    def _losses(self, inputs: BatchTensors) -> np.ndarray:
        nll = target_losses(self._model, inputs, self._options.loss_chunk).nll
        return nll.cpu().double().numpy()
