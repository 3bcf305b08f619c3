"""Items become one batch: a row a pack, every sample and the padding a document of its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from transformers import ProcessorMixin
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from vlcpt.data.documents import Modality
from vlcpt.data.encode.encoder import IGNORE_INDEX, Sample
from vlcpt.data.encode.features import KeptMedium
from vlcpt.data.encode.fillers import make_fillers
from vlcpt.data.encode.pixels import pixel_scales, scaled_pixels
from vlcpt.data.plan.failures import FailedSample

Batch = dict[str, torch.Tensor | bool | int | list[int] | list[FailedSample] | list[str] | list[KeptMedium]]
# What a batch has of media: one after the other, those of all its samples.
_OF_MEDIA = (
    *("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"),
    *("image_features", "video_features"),
)


class CPTDataCollator:
    """Makes the arguments of ``forward``, plus ``loss_weights``, from items of a data set.

    There is no attention mask. Documents are kept apart by their bounds, where attention takes those
    (by documents, flash attention); elsewhere transformers reads them off the text row of the positions,
    which restarts at 0, and only if no mask is passed and no cache is used.

    Args:
        processor: A ``Qwen2_5_VLProcessor``.
        fill_modalities: ``image``, ``video`` or both: a batch without any gets a tiny one, as a document
            of its own in its shortest row. Ranks that share a tower need equal calls of it, see
            :func:`vlcpt.data.encode.fillers.make_fillers`; :class:`vlcpt.CPTTrainer` sets this where they do.

    Attributes:
        names_documents: Whether a batch also has ``documents``, the names of its samples, and
            ``document_sources``, the number of the source of each document in its bounds, -1 of padding: for
            the trainer, which takes them out again.
        keeps_bytes: Whether pixels stay as they were decoded, an eighth of what they become, for the trainer,
            which scales them on the device.
        window_size: Side of the vision tower's windows, pixels. Where it is set, a batch also has what the
            tower would work out of the grids, asking the device for each of them.

    Example:
        >>> from vlcpt import encode_document, load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> processor = load_processor(base_path())
        >>> samples = [encode_document(parse_markup(text), processor) for text in ("one two", "three")]
        >>> batch = CPTDataCollator(processor)([samples])
        >>> batch["position_ids"].shape[:2]
        torch.Size([4, 1])
    """

    def __init__(self, processor: ProcessorMixin, fill_modalities: Sequence[Modality] = ()) -> None:
        self._pad = int(processor.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        self._processor = processor
        self.fill_modalities = fill_modalities
        self.names_documents = False
        self.keeps_bytes = False
        self.scales = pixel_scales(processor)
        self.window_size: int | None = None

    @property
    def fill_modalities(self) -> tuple[Modality, ...]:
        """The modalities that every batch has."""
        return tuple(self._fillers)

    @fill_modalities.setter
    def fill_modalities(self, modalities: Sequence[Modality]) -> None:
        self._fillers = make_fillers(self._processor, modalities)

    def __call__(self, items: Sequence[Sequence[Sample | FailedSample] | Sample]) -> Batch:
        """One batch.

        Args:
            items: B packs of samples; a sample alone is a pack of one.

        Returns:
            ``input_ids``, ``labels``, ``loss_weights`` (B, T), ``position_ids`` (4, B, T), and where
            there are media ``pixel_values`` (ΣP, D), ``image_grid_thw`` (ΣI, 3) and the same for
            videos; ``use_cache`` is False. ``cu_seq_lens_q`` and ``cu_seq_lens_k``, int32 (N+1,), are the
            bounds of the N documents over all rows laid end to end, ``document_lengths`` the same as plain
            numbers and ``max_length_q`` and ``max_length_k`` the longest. Samples that could not be read
            are left out of their packs and listed in ``failed``, for the trainer. Where features are kept,
            ``media`` lists all media in order, ``image_features`` and ``video_features`` (ΣN, width) are of
            those that have some, and pixels and grids of the others: see
            :func:`vlcpt.model.vision_cache.with_features`.
        """
        given = [[item] if isinstance(item, Sample) else list(item) for item in items]
        packs = [[sample for sample in pack if isinstance(sample, Sample)] for pack in given]
        failed = [sample for pack in given for sample in pack if isinstance(sample, FailedSample)]
        for modality, filler in self._fillers.items():
            grids = "image_grid_thw" if modality == "image" else "video_grid_thw"
            if all(getattr(sample, grids) is None for pack in packs for sample in pack):
                min(packs, key=lambda pack: sum(len(sample) for sample in pack)).append(filler)
        # A pack of which nothing is left is a row of padding, and has room for the shift of the labels.
        longest = max(2, max(sum(len(sample) for sample in pack) for pack in packs))
        rows = [self._row(pack, longest) for pack in packs]
        # The first tensor of the batch tells Trainer its size.
        batch: Batch = {
            "input_ids": torch.stack([row[0] for row in rows]),
            "labels": torch.stack([row[1] for row in rows]),
            "loss_weights": torch.stack([row[2] for row in rows]),
            "position_ids": torch.stack([row[3] for row in rows], dim=1),
            "use_cache": False,
            **_bounds(packs, longest),
        }
        samples = [sample for pack in packs for sample in pack]
        for name in _OF_MEDIA:
            found = [tensor for sample in samples if (tensor := getattr(sample, name)) is not None]
            if found:
                batch[name] = self._joined(found)
            if found and self.window_size is not None and name.endswith("_grid_thw"):
                batch |= self._vision_bounds(name.partition("_")[0], torch.cat(found), self.window_size)
        if media := [one for sample in samples for one in sample.media]:
            batch["media"] = media
        if failed:
            batch["failed"] = failed
        if self.names_documents:
            batch["documents"] = [sample.name for sample in samples]
            batch["document_sources"] = _sources(packs, longest)
        return batch

    def _joined(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """Patches or grids of all samples; bytes only where they are to stay so, and there are no others."""
        is_mixed = len({(one.dtype, one.shape[1]) for one in found}) > 1
        if self.scales is not None and (is_mixed or not self.keeps_bytes):
            found = [scaled_pixels(one, self.scales) for one in found]
        return found[0] if len(found) == 1 else torch.cat(list(found))

    def _vision_bounds(self, modality: str, grids: torch.Tensor, window_size: int) -> Batch:
        """What the vision tower takes instead of working it out of the grids of its media.

        The names are those of ``transformers.vision_utils`` behind the modality's (transformers 5.24,
        ``accepts_precomputed_kwargs``), and the lengths of frames and windows as plain numbers.
        """
        one = self._processor.image_processor if modality == "image" else self._processor.video_processor
        frames = get_vision_cu_seqlens(grids)
        index, windows = get_vision_window_index(
            grids, spatial_merge_size=one.merge_size, window_size=window_size, patch_size=one.patch_size
        )
        frame_lengths, window_lengths = frames.diff().tolist(), windows.diff().tolist()
        found: Batch = {
            "position_ids": get_vision_position_ids(grids, one.merge_size),
            "cu_seqlens": frames,
            "max_seqlen": max(frame_lengths),
            "frame_lengths": frame_lengths,
            "window_index": index,
            "cu_window_seqlens": windows,
            "max_window_seqlen": max(window_lengths),
            "window_lengths": window_lengths,
        }
        return {f"{modality}_{name}": value for name, value in found.items()}

    def _row(self, pack: Sequence[Sample], length: int) -> tuple[torch.Tensor, ...]:
        """Ids, labels, weights (T,) and positions (4, T) of one pack."""
        room = length - sum(len(sample) for sample in pack)
        ids = [sample.input_ids for sample in pack] + [torch.full((room,), self._pad)]
        labels = [sample.labels for sample in pack] + [torch.full((room,), IGNORE_INDEX)]
        weights = [sample.loss_weights for sample in pack] + [torch.zeros(room)]
        positions = [torch.cat([torch.arange(len(sample))[None], sample.position_ids]) for sample in pack] + [
            torch.arange(room).expand(4, -1)
        ]
        return torch.cat(ids), torch.cat(labels), torch.cat(weights), torch.cat(positions, dim=1)


def _sources(packs: Sequence[Sequence[Sample]], row: int) -> list[int]:
    """The source of each document in the order of :func:`_bounds`; -1 of padding."""
    found: list[int] = []
    for pack in packs:
        own = [sample.source for sample in pack]
        found += own if sum(len(sample) for sample in pack) == row else [*own, -1]
    return found


def _bounds(packs: Sequence[Sequence[Sample]], row: int) -> Batch:
    """Where the documents of all rows begin and end, rows of ``row`` tokens laid end to end."""
    lengths: list[int] = []
    for pack in packs:
        own = [len(sample) for sample in pack]
        padding = row - sum(own)
        lengths += [*own, padding] if padding else own
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "document_lengths": lengths,
    }
