"""Images that a row gives as URLs: their files were downloaded before, nothing is fetched here."""

from __future__ import annotations

from urllib.parse import urlsplit

from vlcpt.data.documents import DocumentError, Image
from vlcpt.data.references import image_from, shown_url


class LocalFiles:
    """The local files of one row's URLs; two URLs may not mean the same file.

    Args:
        mapping: The field that names files, for messages.

    Example:
        >>> LocalFiles("image_files").image("https://example.org/a/b.jpg?w=9", None, "images[0]").path
        'b.jpg'
    """

    def __init__(self, mapping: str) -> None:
        self._mapping = mapping
        self._url_of: dict[str, str] = {}

    def image(self, reference: object, name: object, place: str) -> Image:
        """The image by its file's name, else by its URL's last part, else as any reference.

        Raises:
            DocumentError: If there is neither, or the last part stands for another URL already.
        """
        try:
            if name is not None:
                if not isinstance(name, str):
                    raise DocumentError(
                        f"expected a file's name, found {type(name).__name__}.", kind="reference"
                    )
                return image_from(name)
            if not isinstance(reference, str) or not reference.lower().startswith(("http://", "https://")):
                return image_from(reference)
            return image_from(self._last_part(reference))
        except DocumentError as error:
            raise error.at(None, place) from None

    def _last_part(self, url: str) -> str:
        try:
            last = urlsplit(url).path.rpartition("/")[2]
        except ValueError:
            last = ""
        if not last:
            raise DocumentError(
                f"the URL {shown_url(url)!r} ends in no file's name. Name its file in {self._mapping}.",
                kind="reference",
            )
        other = self._url_of.setdefault(last, url)
        if other != url:
            raise DocumentError(
                f"{shown_url(url)!r} and {shown_url(other)!r} both end in {last!r}: one file cannot be both. "
                f"Name their files in {self._mapping}.",
                kind="reference",
            )
        return last
