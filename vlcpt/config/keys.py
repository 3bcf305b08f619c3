"""Which keys there are, and what an unknown one is here.

The keys of training stand in ``keys.json``, which ``docs/make_keys.py`` makes of the dataclasses.
``CPTConfig`` is a ``TrainingArguments``, which takes five seconds to import: a misspelt key must not wait.

The names of other tools stand in ``synonyms.json``. Each one cites, by a code of ``files``, the file in which
it was read. Names that mean the same under the same key are not listed. The tables of ``docs/coming-from.md``
and its Chinese twin are printed from that file.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_type_hints

import yaml

from vlcpt.config.schema import DataConfig, ModelConfig
from vlcpt.config.values import Dumper, Given, did_you_mean, holds_secret, nearest, plain_value
from vlcpt.run_files import asks_to_resume

_NAMES = {**vars(builtins), "Any": Any, "Literal": Literal, "Union": Union}  # in the types of keys.json
REQUIRED = ("model_name_or_path", "train_data", "output_dir")


class Key(TypedDict, total=False):
    """What ``keys.json`` says of a key.

    Args:
        type: As Python writes it; a class that is not Python's own is ``dict``, as YAML has it.
        default: What it is where nobody sets it; absent: it is needed, or its default is no plain value.
        takes: The same in words, of our own keys.
        help: A line, of our own keys.
    """

    type: str
    default: object
    takes: str
    help: str


@cache
def read_keys() -> Mapping[str, Any]:
    """``keys.json``: a section for each dataclass, and the version of transformers that ``trainer`` is of.

    Example:
        >>> read_keys()["training"]["max_length"]["default"]
        4096
    """
    found: Mapping[str, Any] = json.loads((files("vlcpt.config") / "keys.json").read_text("utf-8"))
    return found


@cache
def known_types() -> Mapping[str, Any]:
    """The known keys with their types; ``object`` for those that only the installed transformers has.

    Example:
        >>> types = known_types()
        >>> types["max_length"], types["logging_strategy"]
        (<class 'int'>, typing.Literal['no', 'steps', 'epoch'])
    """
    found = {**get_type_hints(ModelConfig), **get_type_hints(DataConfig)}
    for section in ("training", "trainer"):
        found |= {name: eval(key["type"], dict(_NAMES)) for name, key in read_keys()[section].items()}
    return dict.fromkeys(_newer_keys(), object) | found


@cache
def defaults() -> Mapping[str, object]:
    """What the keys are where nobody sets them.

    Example:
        >>> defaults()["max_length"], defaults()["seed"]
        (4096, 42)
    """
    sections = [read_keys()[name] for name in ("model", "data", "training", "trainer")]
    keys = {name: key for section in sections for name, key in section.items()}
    return {name: key["default"] for name, key in keys.items() if "default" in key}


def _newer_keys() -> Iterable[str]:
    """Fields of an installed transformers that ``keys.json`` is not of; more names may be among them."""
    spec = find_spec("transformers")
    if version("transformers") == read_keys()["transformers"] or spec is None or spec.origin is None:
        return ()
    try:
        text = Path(spec.origin).with_name("training_args.py").read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ()
    return re.findall(r"^    (\w+)\s*:", text, re.MULTILINE)


def _is_default(key: str, value: object) -> bool:
    """Whether a key has this value where nobody sets it."""
    default = defaults().get(key)
    return type(default) is type(value) and bool(default == value)


def wrong_keys(given: Mapping[str, Given]) -> tuple[dict[str, str], list[str]]:
    """A message for each key that is unknown, or whose value is a secret that would be written down.

    Returns:
        The messages by key, each with what to write here where another tool has the key; and where several
        keys have that, the lines to write once more, for a person to paste.
    """
    known = known_types()
    file = {key: plain_value(value) for key, value in given.items()}
    wrong: dict[str, str] = {}
    pasted: dict[str, None] = {}
    for key, value in given.items():
        if key == "trust_remote_code":
            wrong[key] = value.message(_NO_CODE)
        elif key not in known or (value.line is not None and key in synonyms("launchers")):
            message, written = _explain(value, file, known)
            wrong[key] = value.message(message)
            pasted |= dict.fromkeys(written)
        elif holds_secret(key, value.node):
            wrong[key] = value.message(_SECRET)
    return wrong, ["In their place, write:", *pasted] if len(pasted) > 1 else []


_NO_CODE = "no code from a model's folder or the Hub is ever run. Remove the key."
_SECRET = (
    "it holds what looks like an access token or a password, and is written to config.yaml. "
    "Log in with `hf auth login`, or set HF_TOKEN or hub_token."
)


def _explain(given: Given, file: Mapping[str, object], known: Collection[str]) -> tuple[str, list[str]]:
    """What an unknown key is here, and the lines that stand for it, where these can be pasted."""
    key = given.key
    if (process := synonyms("launchers").get(key)) is not None:
        return f"is of a process, not of a run. {process.remark} Remove the key.", []
    if (row := synonyms("keys").get(key)) is None:
        for family in read_table()["families"]:
            if key.startswith(tuple(family["starts"])):
                return f"unknown key. vlcpt has no such method: {family['remark'][0]}. Remove the key.", []
        return f"unknown key. {_guess(key, known)}", []
    said = _called(row)
    if not (lines := row.translate(file[key], file)):
        return f"{said} Remove the key.", []
    if holds_secret(key, given.node):
        return f"{said} {_SECRET}", []
    written = [_written(name, value, given) for name, value in lines.items()]
    if again := [name for name in lines if name in file]:
        return f"{said} It is {' and '.join(written)}; {again[0]} is given too. Keep one of them.", []
    if given.line is None:
        return f"{said} Write: {' '.join('--' + line.replace(': ', ' ', 1) for line in written)}", []
    written = [
        line + ("  # the default" if _is_default(name, value) else "")
        for line, (name, value) in zip(written, lines.items(), strict=True)
    ]
    return f"{said} Write: {', and '.join(written)}", written


def _called(row: Synonym) -> str:
    return f"unknown key ({', '.join(row.tools)}). {row.remark}".rstrip()


def _guess(key: str, known: Collection[str]) -> str:
    """Which key may be meant, ours or another tool's; never one that a launcher sets."""
    foreign, launchers = synonyms("keys"), synonyms("launchers")
    near = nearest(key, (*known, *foreign, *launchers))
    if near is None or near in launchers:
        return "See docs/configuration.md for the known keys."
    if near not in foreign:
        return f"Did you mean {near}?"
    here = f"Here that is {foreign[near].key}." if foreign[near].key else foreign[near].remark
    return f"Did you mean {near}? {here}"


def explain_field(name: str, given: Given) -> str:
    """What an unknown field of a source is here, where another tool has it."""
    if (row := synonyms("source").get(name)) is None:
        return f"unknown key. {did_you_mean(name, read_keys()['source'])}"
    said = _called(row)
    lines = row.translate(plain_value(given), {})
    written = ", and ".join(_written(key, value, given) for key, value in lines.items())
    return f"{said} Write: {written}" if written else f"{said} Remove the key."


def _written(key: str, value: object, given: Given) -> str:
    """One line of YAML; a plain value stays as the user wrote it."""
    node = given.node
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None and not isinstance(value, bool)
    if is_plain and value == plain_value(given):
        return f"{key}: {node.value}"
    text: str = yaml.dump([value], Dumper=Dumper, default_flow_style=True, allow_unicode=True, width=10**9)
    return f"{key}: {text.strip()[1:-1]}"


# --- the names of other tools ---

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
    resumes = asks_to_resume(file.get("resume_from_checkpoint"))
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
