"""Paths in the cache of the Hub, as messages show them: by what the user wrote, the data set's name."""

from __future__ import annotations

import os
import re

from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE

_SNAPSHOT = r"datasets--(?P<name>[^/'\"]+)/snapshots/[^/'\"]+"


def without_cache(message: str) -> str:
    """A message that names files of the cache by their data set, and says nothing of this machine.

    Example:
        >>> without_cache(f"'{HF_HUB_CACHE}/datasets--org--pages/snapshots/1f0c/a.png' does not exist.")
        "'org/pages/a.png' does not exist."
    """
    for cache in {HF_HUB_CACHE, os.path.realpath(HF_HUB_CACHE)}:
        if cache in message:
            snapshot = re.compile(re.escape(cache) + "/" + _SNAPSHOT)
            message = snapshot.sub(lambda found: found["name"].replace("--", "/", 1), message)
    for cache in (HF_HUB_CACHE, os.path.realpath(HF_HUB_CACHE), HF_HOME):
        message = message.replace(cache, "(the cache of Hugging Face)")
    return message
