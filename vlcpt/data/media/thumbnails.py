"""Small pictures of images and videos for pages: decoded within the limits, and encoded anew."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import PIL.Image

from vlcpt.data.documents import Image, Medium
from vlcpt.data.media.open import MediaLimits, giants_in_turn, opened_image
from vlcpt.data.media.references import as_shown
from vlcpt.data.media.videos import Clip, read_video

FRAMES = 4  # of a video, at most
_LAST_FRAME = 1500  # a minute: all frames up to the last that is shown are decoded


def thumbnails(
    medium: Medium, clip: Clip | None, *, media_root: Path | None, limits: MediaLimits, side: int = 224
) -> list[bytes]:
    """WebP or PNG files of an image, or of a few frames of a video, as the model sees them.

    No byte of the user's file is in them, and no metadata.

    Args:
        medium: What to show.
        clip: Which frames of a video are taken; None for an image.
        media_root, limits: See :func:`vlcpt.data.media.open.read_image`.
        side: Pixels of the longer side, at most.

    Raises:
        MediaError: If the medium cannot be opened or decoded.

    Example:
        >>> file = BytesIO()
        >>> PIL.Image.new("RGB", (400, 300)).save(file, "PNG")
        >>> (small,) = thumbnails(Image(data=file.getvalue()), None, media_root=None, limits=MediaLimits())
        >>> PIL.Image.open(BytesIO(small)).size
        (224, 168)
    """
    if isinstance(medium, Image):
        with opened_image(medium, media_root, limits) as opened:
            width, height = opened.size
            with giants_in_turn(width * height):
                opened.draft("RGB", (2 * side, 2 * side))  # a JPEG is decoded at a fraction of its size
                opened.load()
                return [_small(as_shown(opened), side)]
    assert clip is not None
    within = [index for index in clip.indices if index <= _LAST_FRAME]
    steps = max(1, min(FRAMES, len(within)) - 1)
    chosen = sorted({within[place * (len(within) - 1) // steps] for place in range(steps + 1)})
    frames = read_video(medium, replace(clip, indices=tuple(chosen)), media_root=media_root, limits=limits)
    return [_small(PIL.Image.fromarray(frame), side) for frame in frames]


def data_uri(picture: bytes) -> str:
    """A WebP or PNG file as an address that holds it.

    Example:
        >>> data_uri(b"\\x89PNG")
        'data:image/png;base64,iVBORw=='
    """
    kind = "png" if picture.startswith(b"\x89PNG") else "webp"
    return f"data:image/{kind};base64,{b64encode(picture).decode()}"


def _small(picture: PIL.Image.Image, side: int) -> bytes:
    picture.thumbnail((side, side))
    # Of pixels alone: Pillow would write the user's own colour profile and comment again.
    picture = PIL.Image.frombytes("RGB", picture.size, picture.tobytes())
    file = BytesIO()
    if max(picture.size) <= 64:  # small enough to be shown enlarged: not blurred
        picture.save(file, "PNG", optimize=True)
    else:  # as good as a JPEG of quality 78 at 30 to 70% fewer bytes, so that a page has room for more
        picture.save(file, "WEBP", quality=60, method=4)
    return file.getvalue()
