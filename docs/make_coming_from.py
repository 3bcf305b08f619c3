"""Print the tables of docs/coming-from.md, or with --zh those of docs/coming-from.zh.md.

Run: python docs/make_coming_from.py [--zh]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vlcpt.config.keys import Row, read_table, remarks

TABLE = read_table()
WORDS = {
    "en": {
        "names": "| key there | key here | what to know |",
        "none": "none",
        "process": "refused",
        "families": "| keys that begin with | here |",
        "read": "| key | read in |",
    },
    "zh": {
        "names": "| 其他工具的键 | vlcpt 的键 | 说明 |",
        "none": "无",
        "process": "不接受",
        "families": "| 以此开头的键 | 说明 |",
        "read": "| 键 | 出处 |",
    },
}


def lines(language: str) -> Iterator[str]:
    """The table of all names: those with a key of ours first."""
    yield WORDS[language]["names"]
    yield "|---|---|---|"
    for row in sorted(TABLE["keys"], key=lambda row: "key" not in row):
        yield line(row, language)
    for row in TABLE["launchers"]:
        yield line(row, language, WORDS[language]["process"])


def source_fields(language: str) -> Iterator[str]:
    """The table of the fields of a source."""
    yield WORDS[language]["names"]
    yield "|---|---|---|"
    for row in TABLE["source"]:
        yield line(row, language)


def line(row: Row, language: str, here: str = "") -> str:
    """One row: names, our key, what to know."""
    here = here or (f"`{row['key']}`" if "key" in row else WORDS[language]["none"])
    return (
        f"| {', '.join(f'`{name}`' for name in row['names'])} | {here} | {remarks(row)[language == 'zh']} |"
    )


def families(language: str) -> Iterator[str]:
    """The table of methods that vlcpt does not have, by the beginnings of their keys."""
    yield WORDS[language]["families"]
    yield "|---|---|"
    for family in TABLE["families"]:
        starts = ", ".join(f"`{start}`" for start in family["starts"])
        yield f"| {starts} | {family['remark'][language == 'zh']} |"


def sources(language: str) -> Iterator[str]:
    """Where each name was read."""
    yield WORDS[language]["read"]
    yield "|---|---|"
    names: dict[str, list[str]] = {code: [] for code in TABLE["files"]}
    for row in (*TABLE["keys"], *TABLE["launchers"], *TABLE["source"]):
        for name, codes in row["names"].items():
            for code in codes.split():
                names[code].append(f"`{name}`")
    for code, found in names.items():
        _, repository, path, version = TABLE["files"][code]
        yield f"| {', '.join(found)} | {repository} `{path}` {version} |"


def main() -> None:
    language = "zh" if "--zh" in sys.argv[1:] else "en"
    for table in (lines, source_fields, families, sources):
        print(*table(language), "", sep="\n")


if __name__ == "__main__":
    main()
