"""What other tools call the keys of a configuration, and how their values are written here.

The names stand in ``synonyms.json``. Each one cites, by a code of ``files``, the file in which it was read.
Names that mean the same under the same key are not listed. The tables of
``docs/coming-from.md`` and its Chinese twin are printed from that file.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, TypedDict

File = Mapping[str, object]
"""All that a configuration holds, by key: some translations depend on another key."""


class Row(TypedDict, total=False):
    """A row of ``synonyms.json``.

    Args:
        names: Each name, with the codes of the files in which it was read.
        key: Our key; absent where there is none.
        value: The values by their words (``*``: any other), or the name of a translation in
            :data:`_TRANSLATIONS`; absent where a value means the same here.
        remark: In English and in Chinese, or the name of one in ``remarks``.
    """

    names: dict[str, str]
    key: str
    value: dict[str, object] | str
    remark: list[str] | str


class Family(TypedDict):
    remark: list[str]
    starts: list[str]


class Table(TypedDict):
    files: dict[str, tuple[str, str, str, str]]
    remarks: dict[str, list[str]]
    keys: list[Row]
    launchers: list[Row]
    source: list[Row]
    values: dict[str, dict[str, str]]
    families: list[Family]


@cache
def read_table() -> Table:
    """``synonyms.json`` as it is: ``files`` holds tool, repository, path and version of each file.

    Example:
        >>> read_table()["values"]["dtype"]["bf16"]
        'bfloat16'
    """
    found: Table = json.loads((files("vlcpt.config") / "synonyms.json").read_text("utf-8"))
    return found


@dataclass(frozen=True)
class Synonym:
    """What a name of another tool is here.

    Args:
        tools: Who calls it so.
        key: Our key; empty where there is none.
        remark: What else a person needs to know; a sentence.
        value: As in :class:`Row`; None where a value means the same here.
    """

    tools: tuple[str, ...]
    key: str
    remark: str
    value: Mapping[str, object] | str | None

    def translate(self, value: object, file: File) -> File:
        """The lines that stand for a value here, by key; none where nothing here corresponds to it."""
        if not self.key or value is None:
            return {}
        if self.value is None:
            return {self.key: value}
        if isinstance(self.value, str):
            return _TRANSLATIONS[self.value](value, file)
        word = "true" if _is(value) else str(value).lower()
        meant = self.value.get(word, self.value.get("*"))
        return {} if meant is None else {self.key: meant}


@cache
def synonyms(section: Literal["keys", "launchers", "source"]) -> Mapping[str, Synonym]:
    """The names of a section of the table, and what each is here.

    Example:
        >>> found = synonyms("keys")["lora_rank"]
        >>> found.key, found.tools
        ('lora_r', ('LLaMA-Factory', 'ms-swift', '2U1'))
    """
    table = read_table()
    found = {}
    for row in table[section]:
        for name, codes in row["names"].items():
            tools = tuple(dict.fromkeys(table["files"][code][0] for code in codes.split()))
            found[name] = Synonym(tools, row.get("key", ""), remarks(row)[0], row.get("value"))
    return found


def remarks(row: Row) -> list[str]:
    """The remark of a row in English and in Chinese.

    Example:
        >>> remarks({"names": {}, "remark": "packs"})[0]
        'Packs always keep documents apart and have no padding.'
    """
    found = row.get("remark", ["", ""])
    return read_table()["remarks"][found] if isinstance(found, str) else found


# Translations that depend on other keys, or on more than a word


def _is(value: object) -> bool:
    """Whether a value says yes, also in quotes as a shell script has it."""
    return value is True or str(value).lower() in ("true", "1")


def _listed(value: object) -> list[object]:
    """The items of a list, or of text with commas between them."""
    items = value if isinstance(value, list) else str(value or "").split(",")
    return [item.strip() if isinstance(item, str) else item for item in items if item not in ("", None)]


def _adapter(value: object, file: File) -> File:
    return {"adapter_name_or_path": _listed(value)[0]} if _listed(value) else {}


def _in_4_bits(file: File) -> bool:
    """Whether a file asks for frozen weights in 4 bits."""
    numbers = ("quantization_bit", "quant_bits", "bits")
    return any(str(file.get(name)) == "4" for name in numbers) or any(
        _is(file.get(name)) for name in ("load_in_4bit", "q_lora")
    )


def _method(value: object, file: File) -> File:
    word = str(value).lower()
    if word == "lora":
        return {"tuning": "qlora" if _in_4_bits(file) else "lora"}
    return {"tuning": "full"} if word == "full" else {}


def _with_lora(value: object, file: File) -> File:
    return _method("lora" if _is(value) else "full", file)


def _quantized(value: object, file: File) -> File:
    return {"tuning": "qlora"} if _in_4_bits(file) else {}


def _rank(value: object, file: File) -> File:
    # LLaMA-Factory's lora_alpha follows the rank where it is not set; ours does not.
    if "finetuning_type" in file and file.get("lora_alpha") is None and isinstance(value, int):
        return {"lora_r": value, "lora_alpha": 2 * value}
    return {"lora_r": value}


def _modules(value: object, file: File) -> File:
    names = [name for name in _listed(value) if name not in ("all", "all-linear", "DEFAULT")]
    return {"lora_target_modules": names} if names else {}


def _saved_modules(value: object, file: File) -> File:
    return {"train_embeddings": True} if {"embed_tokens", "lm_head"} & set(map(str, _listed(value))) else {}


def _in_full(file: File) -> File:
    """2U1 trains in full, beside adapters, what is neither frozen nor under vision_lora."""
    if not _is(file.get("lora_enable")):
        return {}
    return {"lora_towers": ["vision", "language"] if _is(file.get("vision_lora")) else ["language"]}


def _freeze_vision(value: object, file: File) -> File:
    if _is(value):  # 2U1 freezes a tower that gets adapters
        return {"train_vision": _is(file.get("vision_lora"))}
    return {"train_vision": True, **_in_full(file)}


def _freeze_merger(value: object, file: File) -> File:
    return {"train_merger": False} if _is(value) else {"train_merger": True, **_in_full(file)}


def _freeze_language(value: object, file: File) -> File:
    return {"train_language": not _is(value) or _is(file.get("lora_enable"))}


def _first(file: File, names: tuple[str, ...]) -> list[object]:
    """The items of the first of these keys that has any."""
    return next((items for name in names if (items := _listed(file.get(name)))), [])


def _paths(items: list[object]) -> list[str]:
    # ms-swift writes name:subset#count, Qwen's scripts name%percent; here a source is read to its end.
    return [re.sub(r"[#%]\d+$", "", str(item)) for item in items]


def _train_data(value: object, file: File) -> File:
    """The one line that all keys about the training data make together."""
    paths = _paths(_first(file, ("dataset", "data_path", "dataset_use", "dataset_name", "dataset_path")))
    roots = _first(file, ("media_dir", "image_folder", "data_root"))
    shares = _first(file, ("interleave_probs", "interleave_prob"))
    sources: list[object] = []
    for number, path in enumerate(paths):
        more: dict[str, object] = {"media_root": roots[0]} if roots else {}
        if len(paths) == len(shares) > 1:
            share = shares[number]
            more["share"] = float(str(share)) if re.fullmatch(r"0?\.\d+", str(share)) else share
        sources.append({"path": path, **more} if more else path)
    return {"train_data": sources} if sources else {}


def _eval_data(value: object, file: File) -> File:
    return {"eval_data": _paths(_listed(value))} if _listed(value) else {}


def _overwrite(value: object, file: File) -> File:
    # There it only lets a run start; with this key here a run that resumes is refused.
    resumes = file.get("resume_from_checkpoint") not in (None, False, "false")
    return {} if resumes else {"overwrite": _is(value)}


def _warmup(value: object, file: File) -> File:
    return {"warmup_steps": value} if isinstance(value, int | float) and 0 <= value < 1 else {}


_TRANSLATIONS: Mapping[str, Callable[[object, File], File]] = {
    "adapter": _adapter,
    "eval_data": _eval_data,
    "freeze_language": _freeze_language,
    "freeze_merger": _freeze_merger,
    "freeze_vision": _freeze_vision,
    "method": _method,
    "modules": _modules,
    "overwrite": _overwrite,
    "quantized": _quantized,
    "rank": _rank,
    "saved_modules": _saved_modules,
    "train_data": _train_data,
    "warmup": _warmup,
    "with_lora": _with_lora,
}
