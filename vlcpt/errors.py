"""ConfigError: the error that every part raises where the configuration or command is wrong, not the data."""

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot be used: where it says so, which key, what was found and what to do."""


@contextmanager
def wrong_config() -> Iterator[None]:
    """Make each ValueError of the block one of the configuration, with its own message.

    Example:
        >>> with wrong_config():
        ...     raise ValueError("lora_r must be above 0.")
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: lora_r must be above 0.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
