"""Secrets have one place in a configuration, the ``…_token`` keys; nowhere else are they taken or shown."""

import re
from collections.abc import Iterator

import yaml

# An access token of the Hub, or a password in an address.
_SECRET = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}|(?<=://)[^/\s@]+(?=@)")


def redacted(text: str) -> str:
    """Text without what looks like an access token or a password in an address.

    Example:
        >>> redacted("hf_" + "a" * 34 + " and https://me:pass@example.org")
        '*** and https://***@example.org'
    """
    return _SECRET.sub("***", text)


def holds_secret(key: str, node: yaml.Node) -> bool:
    """Whether a value holds what looks like a secret under a key that is written down, as ``run_name`` is.

    Example:
        >>> node = yaml.compose("hf_" + "a" * 34)
        >>> holds_secret("run_name", node), holds_secret("hub_token", node)
        (True, False)
    """
    return not is_secret(key) and any(_SECRET.search(text) for text in _texts(node, set()))


def is_secret(key: str) -> bool:
    """Whether a key's value is a secret, and never shown."""
    return key.endswith("_token")


def _texts(node: yaml.Node, seen: set[int]) -> Iterator[str]:
    if id(node) in seen:  # an alias, which may point back to what it stands in
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        yield node.value
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _texts(item, seen)
    elif isinstance(node, yaml.MappingNode):
        for pair in node.value:
            for item in pair:
                yield from _texts(item, seen)
