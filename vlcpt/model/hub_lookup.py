"""Whether a name stands for something on the Hub, asked once before the libraries look for a dozen files."""

import time
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from vlcpt.errors import ConfigError
from vlcpt.model.saved_files import CONFIGS, Saved, not_loaded

_PAUSE = 1.0  # seconds before the second and last try


def only_cached(what: Saved, name_or_path: str, revision: str | None = None) -> bool:
    """Whether only the cache can be asked for this name, because the Hub does not answer.

    transformers 5.24 and peft 0.21 try each of their files six times, for 24 seconds, where the network is
    down: two to three minutes and thirty lines before one message. tests/model/test_hub_lookup.py counts.

    Args:
        what: What is looked for, of a model its processor or itself.
        name_or_path: A folder, of which nothing is asked, or an id on the Hub.

    Raises:
        ConfigError: If the Hub has no such id for this user, or does not answer, and nothing is cached.

    Example:
        >>> from importlib.resources import files
        >>> only_cached("model", str(files("vlcpt") / "demo/base"))
        False
    """
    if Path(name_or_path).is_dir() or is_offline_mode():
        return False  # the libraries then look nowhere else themselves
    file = CONFIGS["adapter" if what == "adapter" else "model"]
    try:
        error = _asked(hf_hub_url(name_or_path, file, revision=revision))
        is_cached = isinstance(try_to_load_from_cache(name_or_path, file, revision=revision), str)
    except HFValidationError as invalid:  # no id that the Hub could have
        raise ConfigError(not_loaded(what, name_or_path, invalid)) from None
    if error is None or is_cached:
        return error is not None
    raise ConfigError(not_loaded(what, name_or_path, error)) from error


def _asked(url: str) -> Exception | None:
    """Why there is nothing to be had; None if the Hub answers, be it that it has no such file."""
    error: Exception | None = None
    for pause in (_PAUSE, 0.0):
        try:
            get_hf_file_metadata(url)
        except (RepositoryNotFoundError, OfflineModeIsEnabled) as final:
            return final
        except HfHubHTTPError:
            return None  # the libraries know what it means for them
        except HTTPError as failed:
            error = failed
            time.sleep(pause)
        else:
            return None
    return error
