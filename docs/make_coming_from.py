"""Print the tables of docs/coming-from.md, or with --zh those of docs/coming-from_zh.md.

Run: python docs/make_coming_from.py [--zh]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from vlcpt.config.synonyms import FAMILIES, LAUNCHERS, SOURCE_FIELDS, SOURCES, SYNONYMS, Synonym

WORDS = {
    "en": {
        "names": "| their names | here | |",
        "none": "nothing",
        "process": "refused",
        "families": "| names that begin with | instead |",
        "read": "| name | read in |",
    },
    "zh": {
        "names": "| 它们的名字 | 这里 | |",
        "none": "没有",
        "process": "拒绝",
        "families": "| 以此开头的名字 | 替代 |",
        "read": "| 名字 | 出处 |",
    },
}


def lines(language: str) -> Iterator[str]:
    """The table of all names: those with a key of ours first."""
    yield WORDS[language]["names"]
    yield "|---|---|---|"
    for row in sorted(SYNONYMS, key=lambda row: not row.key):
        yield line(row, f"`{row.key}`" if row.key else WORDS[language]["none"], language)
    yield line(LAUNCHERS, WORDS[language]["process"], language)


def source_fields(language: str) -> Iterator[str]:
    """The table of the fields of a source."""
    yield WORDS[language]["names"]
    yield "|---|---|---|"
    for row in SOURCE_FIELDS:
        yield line(row, f"`{row.key}`" if row.key else WORDS[language]["none"], language)


def line(row: Synonym, here: str, language: str) -> str:
    """One row: names, our key, what to know."""
    return f"| {', '.join(f'`{name}`' for name in row.names)} | {here} | {getattr(row, language)} |"


def families(language: str) -> Iterator[str]:
    """The table of methods that vlcpt does not have, by the beginnings of their keys."""
    yield WORDS[language]["families"]
    yield "|---|---|"
    for said in dict.fromkeys(FAMILIES.values()):
        starts = ", ".join(f"`{start}`" for start, other in FAMILIES.items() if other == said)
        yield f"| {starts} | {said if language == 'en' else ZH[said]} |"


ZH = {
    "report_to: swanlab reads its settings from variables": "report_to: swanlab 从环境变量读取设置",
    "see optim for the optimizers": "优化器见 optim",
    "there is full, lora and qlora": "只有 full、lora 和 qlora",
    "there is no preference training": "没有偏好训练",
    "nothing is generated": "不做生成",
    "use torchrun or deepspeed": "请用 torchrun 或 deepspeed",
}


def sources(language: str) -> Iterator[str]:
    """Where each name was read."""
    yield WORDS[language]["read"]
    yield "|---|---|"
    names: dict[str, list[str]] = {code: [] for code in SOURCES}
    for row in (*SYNONYMS, LAUNCHERS, *SOURCE_FIELDS):
        for name, codes in row.names.items():
            for code in codes.split():
                names[code].append(f"`{name}`")
    for code, found in names.items():
        source = SOURCES[code]
        yield f"| {', '.join(found)} | {source.repository} `{source.path}` {source.version} |"


def main() -> None:
    language = "zh" if "--zh" in sys.argv[1:] else "en"
    for table in (lines, source_fields, families, sources):
        print(*table(language), "", sep="\n")


if __name__ == "__main__":
    main()
