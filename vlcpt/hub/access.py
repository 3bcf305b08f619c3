"""What a push needs, looked at before anything heavy is loaded: names, folders, a token, and the Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from vlcpt import __version__
from vlcpt.errors import ConfigError
from vlcpt.folder_locks import require_free
from vlcpt.model.saved import Kind, check_checkpoint
from vlcpt.training.checkpoints.files import is_unfinished

_TRY_AGAIN = "Check the network, and try again."
_NOT_OPENED = "{}: the repository could not be opened for a push"
_SECONDS = 5.0  # for any answer; the library itself would wait without end, or try again five times
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


def check_folders(checkpoint: Path, run: str | Path | None, evaluation: str | Path | None) -> Kind:
    """What a checkpoint holds, by the names of its files.

    Raises:
        ConfigError: If it is no complete adapter or model, a run writes into it, or a path leads nowhere.
    """
    # A checkpoint in it is complete; the result is written file by file.
    require_free(checkpoint, "the run's folder")
    if is_unfinished(checkpoint):
        raise ConfigError(f"{checkpoint} was not saved to its end. Give another checkpoint.")
    if evaluation is not None and not Path(evaluation).is_file():
        raise ConfigError(f"{evaluation}: no such file. Give what `vlcpt eval --output` wrote.")
    if run is not None and not Path(run).is_dir():
        raise ConfigError(f"--run {run}: no such folder. Give the run's, or a checkpoint in it.")
    return check_checkpoint(str(checkpoint))


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


def require_hub(repo_id: str, *, token: str | None = None, then: str = _TRY_AGAIN) -> None:
    """Refuse a push without a token, or where the Hub does not answer within seconds.

    Args:
        repo_id: What is to be pushed to, for the message.
        then: What to do if the Hub cannot be reached.

    Raises:
        ConfigError: Without a token, or in offline mode.
        ValueError: If the Hub cannot be reached.
    """
    if not (token or get_token()):
        raise ConfigError("no access token for the Hub. Log in with `hf auth login`, or set HF_TOKEN.")
    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be pushed to the Hub. Unset it.")
    with as_one_message(_NOT_OPENED.format(repo_id), then):
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)


def check_access(
    repo_id: str,
    *,
    private: bool,
    base: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    then: str = _TRY_AGAIN,
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
    require_hub(repo_id, token=token, then=then)
    api = hub_api(token)
    with as_one_message(_NOT_OPENED.format(repo_id), then):
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


def hub_api(token: str | None) -> HfApi:
    """The Hub's interface for this library."""
    return HfApi(token=token, library_name="vlcpt", library_version=__version__)


@contextmanager
def as_one_message(what: str, then: str) -> Iterator[None]:
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
