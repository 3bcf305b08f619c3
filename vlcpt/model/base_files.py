"""The files of a base that training does not change: a result has them byte for byte.

What transformers 5 writes, transformers 4.57 cannot read: lists where it expects mappings, and a nested
config.json. The base's own files are read wherever the base itself is.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from vlcpt.errors import ConfigError
from vlcpt.model.base import local_folder
from vlcpt.model.loading import load_processor

logger = logging.getLogger(__name__)

# Files that belong together: a tokenizer from two origins would be neither of them.
GROUPS = (
    ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    ("chat_template.jinja", "chat_template.json"),
)
# Older tools read these two instead of tokenizer.json.
VOCABULARY = ("vocab.json", "merges.txt")
GENERATION = "generation_config.json"
_LICENCE = re.compile(r"(?i)(licen[cs]e|notice|copying)([-_.][\w.-]*)?")
_CODE = (".py", ".safetensors", ".bin", ".pt", ".pth", ".pkl")
# Keys of a configuration that say where and how it was loaded, or that Trainer copies from the tokenizer.
_PASSING = re.compile(
    r"_.*|dtype|torch_dtype|use_cache|transformers_version|architectures|(pad|bos|eos)_token_id"
)

_LOADING = ("is_local", "local_files_only", "name_or_path", "_commit_hash", "processor_class")


def is_licence(name: str) -> bool:
    """Whether a file of this name is a licence.

    Example:
        >>> is_licence("LICENSE"), is_licence("Notice.txt"), is_licence("license.py"), is_licence("a.txt")
        (True, True, False, False)
    """
    return _LICENCE.fullmatch(name) is not None and not name.endswith(_CODE)


def has_processor(folder: Path) -> bool:
    """Whether a folder holds a processor: as published, or as transformers 5 saves it.

    Example:
        >>> has_processor(Path("/none"))
        False
    """
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


class BaseFiles:
    """The files of a base, beside its weights.

    Args:
        folder: Where they are, for a name on the Hub in its cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._as_written: dict[str, object] | None = None  # what its processor saves

    @property
    def size(self) -> int:
        """Bytes of all that a result takes over from here, its config.json included."""
        names = {"config.json", GENERATION, *VOCABULARY, *(name for group in GROUPS for name in group)}
        found = [one for one in self.folder.iterdir() if one.name in names or is_licence(one.name)]
        return sum(one.stat().st_size for one in found if one.is_file())

    def restore(self, target: Path, *, model: PreTrainedModel | None) -> None:
        """Replace files of a result by the base's own, where they differ only in layout.

        A tokenizer, processor or template that differs from the base's, because the caller has changed it,
        stays as it was saved.

        Args:
            target: Folder of the result, as ``save_pretrained`` of this transformers left it.
            model: What is saved there in full; None for an adapter, which gets no config.json.
        """
        unchanged = [group for group in GROUPS if self._is_unchanged(group, target)]
        for group in unchanged:
            for name in (*group, *(VOCABULARY if group is GROUPS[0] else ())):
                (target / name).unlink(missing_ok=True)
                self._copy(name, target)
        if model is None or _is_same(model.generation_config, self._generation()):
            (target / GENERATION).unlink(missing_ok=True)
            self._copy(GENERATION, target)
        for path in self.folder.iterdir():
            if is_licence(path.name) and path.is_file():
                self._copy(path.name, target)

    def restore_config(self, target: Path) -> None:
        """Give a result's config.json the layout of the base's; type and tied embeddings stay its own.

        Left as it is where the model's shape or working is another than the base's.
        """
        saved, path = target / "config.json", self.folder / "config.json"
        written, ours = AutoConfig.from_pretrained(target), AutoConfig.from_pretrained(self.folder)
        tied = written.tie_word_embeddings
        is_parted = ours.tie_word_embeddings != tied
        for one in (written, ours):
            one.tie_word_embeddings = one.get_text_config().tie_word_embeddings = tied
        if not _is_same(written, ours):
            logger.info("%s: config.json is not the base's, so it is saved as it is.", target)
            return
        text = path.read_text("utf-8")
        config = json.loads(text)
        found = json.loads(saved.read_text("utf-8"))
        set_type(config, found.get("dtype") or found.get("torch_dtype"))
        if is_parted:
            for part in (config, config.get("text_config", {})):
                part |= {key: tied for key in ("tie_word_embeddings",) if key in part or part is config}
        if config == json.loads(text):
            shutil.copyfile(path, saved)
        else:
            saved.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _copy(self, name: str, target: Path) -> None:
        if (self.folder / name).is_file():
            shutil.copyfile(self.folder / name, target / name)

    def _generation(self) -> GenerationConfig | None:
        if not (self.folder / GENERATION).is_file():
            return None
        return GenerationConfig.from_pretrained(self.folder)

    def _is_unchanged(self, group: tuple[str, ...], target: Path) -> bool:
        """Whether a result's files are what the base's own processor saves, or the base's, or not there."""
        found = {name: _content(target / name) for name in group if (target / name).is_file()}
        if all(content == _content(self.folder / name) for name, content in found.items()):
            return True
        written = self._written(target)
        return found == {name: written[name] for name in group if name in written}

    def _written(self, target: Path) -> dict[str, object]:
        if self._as_written is None:
            # Not where TMPDIR says: there is room beside the result, which is of the same size or larger.
            with tempfile.TemporaryDirectory(prefix=".base-", dir=target) as folder:
                load_processor(str(self.folder)).save_pretrained(folder)
                self._as_written = {path.name: _content(path) for path in Path(folder).iterdir()}
        return self._as_written


def find_base_files(name_or_path: str, revision: str | None = None) -> BaseFiles | None:
    """The files of a base, without its weights; None for a model without a folder, made in Python.

    Files of a name on the Hub that are not cached yet are fetched, unless the Hub does not answer.

    Example:
        >>> from vlcpt.demo import base_path
        >>> files = find_base_files(base_path())
        >>> (files.folder / "config.json").is_file(), find_base_files("")
        (True, None)
    """
    if not name_or_path:
        return None
    wanted = ["*.json", "*.txt", "*.jinja", "[Ll][Ii][Cc]*", "NOTICE*", "COPYING*"]
    try:
        folder = local_folder("model", name_or_path, wanted, revision)
    except ConfigError as error:
        logger.warning(
            "The base's own files could not be read, so tokenizer and configuration are saved as this "
            "transformers writes them, which older versions may not read. %s",
            error,
        )
        return None
    return BaseFiles(folder) if (folder / "config.json").is_file() and has_processor(folder) else None


def set_type(config: dict[str, object], dtype: str) -> None:
    """Write a type into a config.json, under the key that the file has.

    Example:
        >>> config = {"torch_dtype": "bfloat16", "vision_config": {"dtype": "bfloat16"}}
        >>> set_type(config, "float32")
        >>> config
        {'torch_dtype': 'float32', 'vision_config': {'dtype': 'float32'}}
    """
    parts = [config, *(one for one in (config.get("text_config"), config.get("vision_config")) if one)]
    for part in parts:
        assert isinstance(part, dict)
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = dtype


def set_pixels(folder: Path, min_pixels: int | None, max_pixels: int | None) -> None:
    """Write the limits of pixels that were trained with into a processor's configuration.

    In each key that its file has: ``max_pixels`` of the published layout, ``size`` of transformers 5.

    Args:
        folder: That of a merged model.
        min_pixels, max_pixels: Those of an image; None: not limited in training, and left as they are.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> _ = (folder / "preprocessor_config.json").write_text('{"max_pixels": 12845056}')
        >>> set_pixels(folder, None, 602112)
        >>> json.loads((folder / "preprocessor_config.json").read_text())
        {'max_pixels': 602112}
    """
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    given = {name: value for name, value in limits.items() if value is not None}
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    for name in GROUPS[1] if given else ():
        path = folder / name
        if not path.is_file():
            continue
        config = json.loads(path.read_text("utf-8"))
        inner = [one for key in ("image_processor", "video_processor") if (one := config.get(key))]
        for part in inner if name == "processor_config.json" else [config]:
            if size := part.get("size"):
                size |= {edges[key]: value for key, value in given.items()}
            part |= {key: value for key, value in given.items() if key in part or not size}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_same(
    one: PreTrainedConfig | GenerationConfig | None, other: PreTrainedConfig | GenerationConfig | None
) -> bool:
    if one is None or other is None:
        return one is other or one is None
    return _lasting(one.to_dict()) == _lasting(other.to_dict())


def _lasting(values: Mapping[str, object]) -> dict[str, object]:
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if not _PASSING.fullmatch(str(key))
    }


def _content(path: Path) -> object:
    """What a file holds, without how it was loaded: a folder and a name on the Hub differ in that."""
    if not path.is_file():
        return None
    if path.name in ("tokenizer_config.json", "processor_config.json"):
        content = json.loads(path.read_text("utf-8"))
        return {key: value for key, value in content.items() if key not in _LOADING}
    return path.read_bytes()
