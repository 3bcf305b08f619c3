"""ConfigError: the error that every part raises where the configuration or command is wrong, not the data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot be used: where it says so, which key, what was found and what to do.

    Example:
        >>> str(ConfigError("lora_r must be above 0.", "fps must be above 0."))
        'lora_r must be above 0.\\nfps must be above 0.'
    """

    def __str__(self) -> str:
        return "\n".join(self.args)


def refuse(wrong: Iterable[str]) -> None:
    """Raise one ConfigError with all these messages; do nothing where there is none.

    Example:
        >>> refuse([])
        >>> refuse(["lora_r must be above 0."])
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: lora_r must be above 0.
    """
    if messages := list(wrong):
        raise ConfigError(*messages)


@contextmanager
def collected(wrong: list[str]) -> Iterator[None]:
    """Add the messages of a ConfigError of the block to a list, instead of raising it.

    Example:
        >>> wrong = []
        >>> with collected(wrong):
        ...     raise ConfigError("fps must be above 0.")
        >>> wrong
        ['fps must be above 0.']
    """
    try:
        yield
    except ConfigError as error:
        wrong += error.args


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
