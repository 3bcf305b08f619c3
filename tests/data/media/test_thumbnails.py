from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image as PILImage
from PIL.PngImagePlugin import PngInfo

from tests.support import avi, png
from vlcpt import Image, Video
from vlcpt.data.media.files import MediaError
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.media.thumbnails import thumbnails
from vlcpt.data.media.videos import clip_of

LIMITS = MediaLimits()


def small(medium, clip=None):
    found = thumbnails(medium, clip, media_root=None, limits=LIMITS)
    return [PILImage.open(BytesIO(one)) for one in found]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(40, 30), (900, 300)])
def test_nothing_of_the_users_file_but_pixels_is_in_a_thumbnail(tmp_path: Path, kind, size):
    file, exif, text = BytesIO(), PILImage.Exif(), PngInfo()
    exif[0x010E] = "a secret"
    text.add_text("Comment", "a secret")
    extra = {"comment": b"a secret"} if kind == "JPEG" else {"pnginfo": text}
    PILImage.new("RGB", size, "red").save(file, kind, exif=exif, icc_profile=b"a secret", **extra)
    assert b"a secret" in file.getvalue()

    (found,) = thumbnails(Image(data=file.getvalue()), None, media_root=None, limits=LIMITS)

    assert b"a secret" not in found
    assert not PILImage.open(BytesIO(found)).getexif()


def test_a_picture_is_upright_and_on_white():
    file, exif = BytesIO(), PILImage.Exif()
    exif[0x0112] = 6  # turned by a quarter
    PILImage.new("RGB", (200, 100), "red").save(file, "JPEG", exif=exif)
    clear = BytesIO()
    PILImage.new("RGBA", (20, 10), (255, 0, 0, 0)).save(clear, "PNG")

    assert small(Image(data=file.getvalue()))[0].size == (100, 200)
    assert small(Image(data=clear.getvalue()))[0].getpixel((5, 5)) == (255, 255, 255)


def test_a_video_is_shown_by_four_frames_from_first_to_last():
    video = Video(data=avi(1, frames=40, width=112, height=84))
    clip = clip_of(video, fps=8.0, max_frames=768, media_root=None)
    assert len(clip.indices) > 8

    assert [one.size for one in small(video, clip)] == [(112, 84)] * 4


def test_a_cut_file_is_an_error():
    with pytest.raises(MediaError, match="cannot be decoded"):
        small(Image(data=png(1)[:200]))
