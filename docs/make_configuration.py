"""Print the tables of docs/configuration.md: every key that vlcpt adds, or whose default it changes.

Run: python docs/make_configuration.py
"""

from __future__ import annotations

from collections.abc import Iterator

from vlcpt.config.keys import Key, read_keys

SECTIONS = {"Model": "model", "Data": "data", "A source": "source", "Training": "training"}


def lines(section: str) -> Iterator[str]:
    """The table of one section of keys.json."""
    yield "| key | takes | default | |"
    yield "|---|---|---|---|"
    for name, key in read_keys()[section].items():
        help = key["help"].replace("<trainable_text>", "`<trainable_text>`")
        yield f"| `{name}` | {key['takes']} | {default(key)} | {help} |"


def default(key: Key) -> str:
    """A default as YAML has it."""
    if "default" not in key:
        return "needed"
    value = key["default"]
    if value in (None, ""):
        return ""
    return "" if value == [] else str(value).lower() if isinstance(value, bool) else str(value)


def main() -> None:
    for title, section in SECTIONS.items():
        print(f"## {title}\n", *lines(section), "", sep="\n")


if __name__ == "__main__":
    main()
