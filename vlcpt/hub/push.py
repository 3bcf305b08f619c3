"""A checkpoint goes to the Hub: its name there, files of the allow-list alone, private unless asked."""

from __future__ import annotations

import copy
import logging
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from vlcpt import __version__
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import Configs
from vlcpt.errors import ConfigError
from vlcpt.folder_locks import require_free
from vlcpt.hub.files import PushedFile, is_allowed, kind_of, pushed_files
from vlcpt.model.adapters import read_adapter_config, read_adapter_shapes
from vlcpt.model.base import base_folders, check_parameters
from vlcpt.model.loading import read_config
from vlcpt.report.card import Licence, model_card, read_run
from vlcpt.training.checkpoints.files import is_unfinished

logger = logging.getLogger(__name__)

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a model's folder in the Hub's cache


def is_revision(name: str) -> bool:
    """Whether a branch or commit can have this name.

    Example:
        >>> is_revision("v1/a"), is_revision("a b")
        (True, False)
    """
    return re.fullmatch(r"\w[\w./-]*", name, re.ASCII) is not None


def check_names(repo_id: str, base_model: str | None = None, revision: str | None = None) -> None:
    """Raise ConfigError for an id or a branch that the Hub cannot have.

    Example:
        >>> check_names("me/adapter")
        >>> check_names("a/b/c")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: 'a/b/c' is no name of a repository on the Hub...
    """
    for name in (repo_id, *([base_model] if base_model is not None else [])):
        if hub_id(name) is None:
            raise ConfigError(f"{name!r} is no name of a repository on the Hub. Write owner/name.")
    if revision is not None and not is_revision(revision):
        raise ConfigError(f"{revision!r} is no name of a branch. Use letters, digits, dots, dashes, slashes.")


def hub_id(name: str) -> str | None:
    """The name if the Hub could have it, or the id of a folder in the Hub's cache; else None.

    Example:
        >>> hub_id("/home/me/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/1b2c")
        'Qwen/Qwen2.5-VL-3B-Instruct'
        >>> hub_id("../base") is None
        True
    """
    if cached := [found for part in Path(name).parts if (found := _CACHED.fullmatch(part))]:
        return f"{cached[-1][1]}/{cached[-1][2]}"
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


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


_PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass(frozen=True)
class Push:
    """What goes to the Hub, or went there.

    Args:
        repo_id: ``owner/name``, or the name alone for the owner of the token.
        private: Whether only its owner can see it.
        revision: The branch; None is the main one.
        files: All of them, the card included.
        card: The text of README.md.
        url: Of the commit; None where nothing was sent.
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
    taken away in the same commit, so that no loader mixes the two; licences stay.

    Args:
        checkpoint: A run's folder, or a checkpoint in it. ``config.yaml``, ``ledger.json`` and
            ``train_log.jsonl`` there tell the card what was done.
        repo_id: ``owner/name``; made if it is not there.
        private: False makes a public repository. One that is public already must be asked for with it.
        dry_run: Only say what would go; needs no token and no network.
        base_model: Hub id of the base, where the checkpoint names a folder.
        run: Folder whose files tell the card what was done, where that is not the checkpoint's own run: for
            a merged model, that of its adapter.
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
    push, base = plan_push(
        Path(checkpoint),
        repo_id,
        private=private,
        base_model=base_model,
        run_folder=checkpoint if run is None else run,
        licence=licence or Licence(),
        evaluation=None if evaluation is None else Path(evaluation),
        revision=revision,
    )
    if dry_run:
        return push
    again = "Try again: " + push_command(
        checkpoint,
        repo_id,
        private=private,
        base_model=base_model,
        run=run,
        license=licence.id if licence else None,
        license_link=licence.link if licence else None,
        evaluation=evaluation,
        revision=revision,
    )
    repo_id = check_access(
        repo_id,
        private=private,
        base=base,
        revision=revision,
        token=token,
        then=f"Check the network. {again}",
    )
    with _as_one_message(f"{repo_id}: the push failed", f"{checkpoint} is whole as before. {again}"):
        return _commit(replace(push, repo_id=repo_id), token)


def push_command(
    checkpoint: str | Path, repo_id: str, *, private: bool = True, **options: str | Path | None
) -> str:
    """The command line of a push.

    Args:
        checkpoint, repo_id, private: As in :func:`push_adapter`.
        options: Those of ``vlcpt push``; None: not given.

    Example:
        >>> push_command("my out", "me/mine", private=False, revision="v1", run=None)
        "vlcpt push 'my out' me/mine --public --revision v1"
    """
    words = ["vlcpt", "push", str(checkpoint), repo_id, *([] if private else ["--public"])]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words)


def plan_push(
    checkpoint: Path,
    repo_id: str,
    *,
    private: bool,
    base_model: str | None,
    run_folder: str | Path,
    licence: Licence,
    evaluation: Path | None,
    revision: str | None,
) -> tuple[Push, str | None]:
    """What would go, and the Hub id of the base; nothing is sent."""
    check_names(repo_id, base_model, revision)
    if not checkpoint.is_dir():
        raise ConfigError(f"{checkpoint}: no such folder. Give a run's folder, or a checkpoint in it.")
    # A checkpoint in it is whole; the result is written file by file.
    require_free(checkpoint, "the run's folder")
    if is_unfinished(checkpoint):
        raise ConfigError(f"{checkpoint} was not saved to its end. Give another checkpoint.")
    if evaluation is not None and not evaluation.is_file():
        raise ConfigError(f"{evaluation}: no such file. Give what `vlcpt eval --output` wrote.")
    if not Path(run_folder).is_dir():
        raise ConfigError(f"--run {run_folder}: no such folder. Give the run's, or a checkpoint in it.")
    kind = kind_of(checkpoint)
    config = None
    if kind == "adapter":
        config = read_adapter_config(str(checkpoint))
        if (checkpoint / "adapter_model.safetensors").is_file():  # else its own message follows
            read_adapter_shapes(checkpoint)
    else:
        check_parameters(read_config(str(checkpoint)), str(checkpoint), times=1)
    run = read_run(Path(run_folder), evaluation)
    base_revision = None
    if config is not None:
        base_revision = config.revision if base_model is None else None
        base_model = base_model or hub_base(config.base_model_name_or_path or "", checkpoint)
    elif base_model is None and run.base:
        base_model = hub_id(run.base)
    files = pushed_files(checkpoint, kind, base_model)
    card = model_card(
        kind,
        repo_id,
        run,
        base_model=base_model,
        base_revision=base_revision if base_revision and is_revision(base_revision) else None,
        revision=revision,
        has_processor=any(
            file.name in ("processor_config.json", "preprocessor_config.json") for file in files
        ),
        licence=licence,
        versions={"vlcpt": __version__, **{package: version(package) for package in _PACKAGES}},
    )
    readme = card.encode()
    whole = (PushedFile("README.md", readme, len(readme)), *files)
    return Push(repo_id, private, revision, whole, card), base_model


def check_access(
    repo_id: str,
    *,
    private: bool,
    base: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    then: str = "Check the network, and try again.",
) -> str:
    """Make the repository if it is not there, so that a later push will work; gives its full id.

    Args:
        base: Hub id of the model that the card will name as the base.
        then: What to do if the Hub cannot be reached.

    Raises:
        ConfigError: Without a token, or with one that may not; if a private one is asked for and is public;
            if the base is not there.
        ValueError: If the Hub cannot be reached.
    """
    check_names(repo_id, revision=revision)
    if not (token or get_token()):
        raise ConfigError("no access token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed to the Hub. Unset it.")
    api = _api(token)
    with _as_one_message(f"{repo_id}: the repository could not be opened for a push", then):
        try:
            full = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if private and api.model_info(full).private is False:
                raise ConfigError(
                    f"{full} is on the Hub already and public. Ask for that (vlcpt push --public, or "
                    "hub_private_repo: false), make it private there, or give another name."
                )
            if base is not None and not api.repo_exists(base):
                raise ConfigError(
                    f"the base model {base} is not on the Hub, or not for this token. Put it there, take a "
                    "token that may see it, or name another base: vlcpt push … --base_model owner/name."
                )
            if revision is not None:
                api.create_branch(full, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (400, 401, 403, 404):
                raise ConfigError(
                    f"{repo_id}: the Hub does not let this token write there: {_first_line(error)} Check the "
                    "name, and that the token may write (https://huggingface.co/settings/tokens)."
                ) from error
            raise
    return str(full)


def _commit(push: Push, token: str | None) -> Push:
    """All files in one commit, which is there whole or not at all."""
    api = _api(token)
    info = api.model_info(push.repo_id, revision=push.revision)
    names = {file.name for file in push.files}
    stale = [
        one.rfilename
        for one in info.siblings or []
        if one.rfilename not in names and is_allowed(one.rfilename)
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


def _api(token: str | None) -> HfApi:
    return HfApi(token=token, library_name="vlcpt", library_version=__version__)


@contextmanager
def _as_one_message(what: str, then: str) -> Iterator[None]:
    """What the Hub, the network or the upload objects to becomes one message with what to do."""
    try:
        yield
    except ConfigError:
        raise
    # Uploads wrap what went wrong in a RuntimeError; a malformed answer is a ValueError.
    except (OSError, HTTPError, RuntimeError, ValueError) as error:
        reason = _first_line(error)
        if isinstance(error, RuntimeError) and error.__cause__:
            reason += f" {_first_line(error.__cause__)}"
        raise ValueError(f"{what}: {reason} {then}") from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"{lines[0].rstrip('. ')}."


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
        >>> without_pushes(CPTConfig("out", use_cpu=True, push_to_hub=True)).push_to_hub
        False
    """
    quiet = copy.copy(training)
    quiet.push_to_hub = False
    return quiet
