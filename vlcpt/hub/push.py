"""A checkpoint goes to the Hub: its name there, files of the allow-list alone, private unless asked."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from vlcpt import __version__
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import Configs
from vlcpt.errors import ConfigError
from vlcpt.hub.access import (
    as_one_message,
    check_access,
    check_folders,
    check_names,
    hub_api,
    hub_id,
    is_revision,
    push_command,
)
from vlcpt.model.adapters import read_adapter_config, read_adapter_shapes
from vlcpt.model.base import base_folders, check_parameters
from vlcpt.model.base_files import GENERATION, GROUPS, VOCABULARY, has_processor, is_licence
from vlcpt.model.loading import read_config
from vlcpt.model.saved import WEIGHTS, Kind
from vlcpt.report.card import PLOT, Licence, model_card, read_run

if TYPE_CHECKING:
    from peft import PeftConfig


def hub_base(named: str, checkpoint: Path) -> str:
    """The Hub id of an adapter's base.

    Raises:
        ConfigError: If the adapter names a folder, which nobody else has.

    Example:
        >>> hub_base("Qwen/Qwen2.5-VL-3B-Instruct", Path("out"))
        'Qwen/Qwen2.5-VL-3B-Instruct'
    """
    found = hub_id(named)
    if found is None or (found == named and base_folders(named, checkpoint)):
        raise ConfigError(
            f"{checkpoint}: the adapter's base model is the folder {named!r}, which others do not have. Say "
            "what it is on the Hub: --base_model owner/name. If it is not there, merge, and push the model."
        )
    return found


@dataclass(frozen=True)
class Push:
    """What goes to the Hub, or went there.

    Args:
        repo_id: ``owner/name``, or the name alone for the owner of the token.
        private: Whether only its owner can see it.
        revision: The branch; None is the main one.
        files: All of them, the card included.
        card: The text of README.md.
        url: That of the commit; None where nothing was sent.
    """

    repo_id: str
    private: bool
    revision: str | None
    files: tuple[PushedFile, ...]
    card: str
    url: str | None = None


def push_adapter(
    checkpoint: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = False,
    base_model: str | None = None,
    run: str | Path | None = None,
    licence: Licence | None = None,
    evaluation: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Push:
    """Send an adapter, or a model trained in full, to the Hub in one commit, with a model card.

    Files go by an allow-list: weights, configurations, processor and licences, never optimizer state, logs,
    data or this machine's paths. What an earlier push left in the repository and this one does not have is
    deleted in the same commit, so that no loader mixes the two; licences stay.

    Args:
        checkpoint: A run's folder, or a checkpoint in it. ``config.yaml``, ``ledger.json`` and
            ``train_log.jsonl`` there say for the card what was done.
        repo_id: ``owner/name``; made if it is not there.
        private: False makes a public repository. One that is public already must be asked for with it.
        dry_run: Only say what would go; needs no token and no network.
        base_model: Hub id of the base, where the checkpoint names a folder.
        run: Folder whose files say for the card what was done, where that is not the checkpoint's own run:
            for a merged model, that of its adapter.
        licence: What to state; by default that it is unknown.
        evaluation: What ``vlcpt eval --output`` wrote, for the card.
        revision: Branch to push to; made if it is not there.
        token: Default: that of ``hf auth login`` or ``HF_TOKEN``.

    Raises:
        ConfigError: Before anything is sent, for what the caller can put right.
        ValueError: If the checkpoint is incomplete, or the Hub does not take it; with how to try again.

    Example:
        >>> from vlcpt.demo import base_path
        >>> push = push_adapter(base_path(), "me/model", dry_run=True)
        >>> push.private, push.files[0].name, push.url
        (True, 'README.md', None)
    """
    checkpoint, licence = Path(checkpoint), licence or Licence()
    again = "Try again: " + push_command(
        checkpoint,
        repo_id,
        private=private,
        base_model=base_model,
        run=run,
        license=licence.id,
        license_link=licence.link,
        evaluation=evaluation,
        revision=revision,
    )
    check_names(repo_id, base_model, revision)
    kind = check_folders(checkpoint, run, evaluation)
    adapter = _read_adapter(checkpoint) if kind == "adapter" else None
    if adapter is None:
        check_parameters(read_config(str(checkpoint)), str(checkpoint), times=1)
    facts = read_run(Path(run or checkpoint), None if evaluation is None else Path(evaluation))
    base_revision = None
    if base_model is None and adapter is not None:
        base_model = hub_base(adapter.base_model_name_or_path or "", checkpoint)
        base_revision = adapter.revision if is_revision(adapter.revision or "") else None
    elif base_model is None and facts.base:
        base_model = hub_id(facts.base)
    files = pushed_files(checkpoint, kind, base_model)
    card = model_card(
        kind,
        repo_id,
        facts,
        base_model=base_model,
        base_revision=base_revision,
        revision=revision,
        has_processor=has_processor(checkpoint),
        licence=licence,
    )
    own = [PushedFile("README.md", card.encode())]
    own += [] if facts.plot is None else [PushedFile(PLOT, facts.plot)]
    push = Push(repo_id, private, revision, (*own, *files), card)
    if dry_run:
        return push
    then = f"Check the network. {again}"
    repo_id = check_access(
        repo_id, private=private, base=base_model, revision=revision, token=token, then=then
    )
    with as_one_message(f"{repo_id}: the push failed", f"{checkpoint} is unchanged. {again}"):
        return _commit(replace(push, repo_id=repo_id), token)


def _read_adapter(checkpoint: Path) -> PeftConfig:
    """The configuration of an adapter, whose weights fit it."""
    config = read_adapter_config(str(checkpoint))
    if (checkpoint / WEIGHTS["adapter"][0]).is_file():  # else its own message follows
        read_adapter_shapes(checkpoint)
    return config


def _commit(push: Push, token: str | None) -> Push:
    """Send all files in one commit, which is there completely or not at all."""
    api = hub_api(token)
    info = api.model_info(push.repo_id, revision=push.revision)
    names = {file.name for file in push.files}
    stale = [
        one.rfilename
        for one in info.siblings or []
        if one.rfilename not in names
        and (one.rfilename == PLOT or is_allowed(one.rfilename, "adapter", "model"))
    ]
    commit = api.create_commit(
        push.repo_id,
        operations=[
            *(CommitOperationAdd(file.name, file.content) for file in push.files),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"Push from vlcpt {__version__}",
        revision=push.revision,
    )
    return replace(push, private=bool(info.private), url=commit.commit_url)


def open_repository(configs: Configs) -> str:
    """Make sure before hours of training that their result can be pushed; gives the repository's full id.

    Raises:
        ConfigError: If there is no token, it may not write there, an adapter's base is a folder, or a base
            that is none is not on the Hub.
        ValueError: If the Hub cannot be reached.
    """
    model, training = configs.model, configs.training
    # A model trained in full needs no base, and names one only if that is no folder.
    base = None if Path(model.model_name_or_path).exists() else hub_id(model.model_name_or_path)
    if model.tuning != "full":
        try:
            base = hub_base(model.model_name_or_path, Path(str(training.output_dir)))
        except ConfigError as error:
            raise ConfigError(
                "push_to_hub: an adapter on the Hub needs its base there, and model_name_or_path is the "
                f"folder {model.model_name_or_path}. Give its Hub id, or train without push_to_hub and then "
                "`vlcpt push OUTPUT_DIR REPO_ID --base_model owner/name`."
            ) from error
    return check_access(
        training.hub_model_id or Path(str(training.output_dir)).absolute().name,
        private=training.hub_private_repo is not False,
        base=base,
        revision=training.hub_revision,
        token=training.hub_token,
    )


def push_run(configs: Configs, repo_id: str) -> Push:
    """Push what a finished run has saved, as ``vlcpt push`` would.

    Raises:
        ValueError: If it could not be pushed, with how to try again.
    """
    training = configs.training
    output, private = str(training.output_dir), training.hub_private_repo is not False
    revision = training.hub_revision
    try:
        return push_adapter(output, repo_id, private=private, revision=revision, token=training.hub_token)
    except ConfigError as error:
        # It was right when the run began: no mistake in the configuration any more.
        again = push_command(output, repo_id, private=private, revision=revision)
        raise ValueError(f"{output} is saved, but not pushed: {error} Try again: {again}") from error


def without_pushes(training: CPTConfig) -> CPTConfig:
    """The same for Trainer, whose own pushes take whatever lies in the folder.

    Example:
        >>> training = without_pushes(CPTConfig("out", use_cpu=True, push_to_hub=True, hub_model_id="mine"))
        >>> training.push_to_hub, training.hub_model_id
        (False, None)
    """
    quiet = copy.copy(training)
    quiet.push_to_hub = False
    quiet.hub_model_id = quiet.hub_revision = None  # they would not be used
    return quiet


# --- what may leave the machine ---

# Everything else stays on this machine: optimizer and trainer state, logs, pickles, a person's own files.
_PROCESSOR = {GENERATION, *VOCABULARY, *(name for group in GROUPS for name in group)}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_OWN: Mapping[Kind, re.Pattern[str]] = {
    "adapter": re.compile(r"adapter_config\.json|adapter_model\.safetensors"),
    "model": re.compile(rf"config\.json|model\.safetensors(\.index\.json)?|{_SHARD.pattern}"),
}
# A licence to read, not one that unlocks a program: license.key, license.json.
_TEXT = re.compile(r"|\.(txt|md|rst|html?|pdf|\d+)")
# In other files a text that begins with a slash may be what a model reads and writes.
_CONFIGS = re.compile(r"(.*_)?config\.json")
_PATH = re.compile(r"(/|~|[A-Za-z]:[\\/]|\\\\|file:)")
_NAMES = ("_name_or_path", "name_or_path", "_commit_hash")  # of the folder that something was loaded from


@dataclass(frozen=True)
class PushedFile:
    """A file as it goes to the Hub.

    Args:
        name: Its name there.
        content: The file, or its bytes where they are not those on disk.
    """

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def is_allowed(name: str, *kinds: Kind) -> bool:
    """Whether a file of this name is a part of an adapter or a model, whichever is asked for.

    Example:
        >>> is_allowed("model-00001-of-00002.safetensors", "model"), is_allowed("optimizer.pt", "model")
        (True, False)
        >>> is_allowed("model.safetensors", "adapter")
        False
    """
    return name in _PROCESSOR or any(_OWN[kind].fullmatch(name) for kind in kinds)


def pushed_files(checkpoint: Path, kind: Kind, base_model: str | None) -> list[PushedFile]:
    """The files of an adapter or model that go to the Hub, in order of their names, with its licences.

    A configuration goes byte for byte unless something in it must not go, or names the base otherwise.

    Args:
        base_model: What an adapter's configuration shall call its base.

    Raises:
        ValueError: If the weights are only there as a pickle, or a configuration is not JSON or has
            a key twice.

    Example:
        >>> from vlcpt.demo import base_path
        >>> [file.name for file in pushed_files(Path(base_path()), "model", None)][:2]
        ['config.json', 'generation_config.json']
    """
    weights, index, *_ = WEIGHTS[kind]
    names = sorted(path.name for path in checkpoint.iterdir() if path.is_file())
    shards = [name for name in names if _SHARD.fullmatch(name) and kind == "model"]
    if weights in names:  # then loaders read nothing else, and shards are left from an earlier save
        names = [name for name in names if name not in (*shards, index)]
    elif not shards:
        raise ValueError(
            f"{checkpoint} holds no {weights}, but weights in a format that can run code when it is loaded. "
            "Load the model and save it with safetensors first."
        )
    return [
        PushedFile(name, _cleaned(checkpoint / name, base_model))
        for name in names
        if is_allowed(name, kind) or (is_licence(name) and _TEXT.fullmatch(Path(name).suffix.lower()))
    ]


def _cleaned(path: Path, base_model: str | None) -> Path | bytes:
    """A configuration without names of folders; the file itself where it has none, or is no configuration."""
    if not _CONFIGS.fullmatch(path.name):
        return path
    try:
        found = json.loads(path.read_text("utf-8"), object_pairs_hook=_mapping)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}. Save the model anew.") from error
    cleaned = without_paths(found)
    if path.name == "adapter_config.json":
        assert isinstance(cleaned, dict)
        cleaned["base_model_name_or_path"] = base_model
    if cleaned == found:
        return path
    return (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _mapping(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object; refused where a key stands twice, because only the last one would be looked at."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def without_paths(value: object) -> object:
    """JSON without entries that name a place on this machine.

    Example:
        >>> without_paths({"_name_or_path": "out", "a": {"b": "/home/me/base", "c": 1}})
        {'a': {'c': 1}}
    """
    if isinstance(value, dict):
        # The tokens of a tokenizer are no paths, whatever they look like.
        return {
            key: item if key in ("added_tokens_decoder", "extra_special_tokens") else without_paths(item)
            for key, item in value.items()
            if key not in _NAMES and not (isinstance(item, str) and _PATH.match(item))
        }
    if isinstance(value, list):
        return [without_paths(item) for item in value if not (isinstance(item, str) and _PATH.match(item))]
    return value
