"""A data set whose planning also looks into the files of its media, as far as asked."""

from __future__ import annotations

from pathlib import Path

from vlcpt.data.dataset import CPTDataset
from vlcpt.data.documents import Document, Image, Medium
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.streams import TokenStream
from vlcpt.data.encode.vision import PlacedMedium, medium_errors
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import giants_in_turn, read_image
from vlcpt.data.media.videos import read_video
from vlcpt.data.media.whole import check_container


class CheckingEncoder(DocumentEncoder):
    """Encodes documents, and refuses those with a cut media file.

    Training needs no such check: it decodes the pixels. Here a cut file shows long before that.

    Example:
        >>> from vlcpt import load_processor, parse_markup
        >>> from vlcpt.demo import base_path
        >>> len(CheckingEncoder(load_processor(base_path())).tokens(parse_markup("a")))
        2
    """

    decodes = False

    def tokens(self, document: Document) -> TokenStream:
        """As in training; each medium's file is checked for cuts, and decoded where that is asked for."""
        root = None if document.media_root is None else Path(document.media_root)
        # First: that a file is cut says more than what its header then lacks.
        media: tuple[Medium, ...] = (*document.images, *document.videos)
        for medium in media:
            with medium_errors(medium, document):
                check_container(medium, media_root=root, limits=self.options.limits)
        stream = super().tokens(document)
        for placed in stream.media if self.decodes else ():
            with medium_errors(placed.medium, document):
                self._decode(placed, root)
        return stream

    def _decode(self, placed: PlacedMedium, root: Path | None) -> None:
        if not isinstance(placed.medium, Image):
            assert placed.clip is not None
            read_video(placed.medium, placed.clip, media_root=root, limits=self.options.limits)
            return
        with giants_in_turn(placed.size[0] * placed.size[1]):
            width, height = read_image(placed.medium, media_root=root, limits=self.options.limits).size
        if (height, width) != placed.size:
            raise MediaError(
                f"{placed.medium} decodes to {height} × {width} pixels, but its header promised "
                f"{placed.size[0]} × {placed.size[1]}. Write the file again."
            )


class DecodingEncoder(CheckingEncoder):
    """Decodes every medium, too."""

    decodes = True


class CheckedDataset(CPTDataset):
    """A data set for ``vlcpt check``: planned as for training, with each media file checked for cuts."""

    _encoder_class: type[CheckingEncoder] = CheckingEncoder
    _max_bad_in_a_row = None


class DecodedDataset(CheckedDataset):
    """A data set for ``vlcpt check --decode``: every medium is decoded once."""

    _encoder_class = DecodingEncoder
