"""``push_to_hub: true``: the repository is opened before training, and gets the result after it."""

from __future__ import annotations

import copy
from pathlib import Path

from vlcpt.config import ConfigError, CPTConfig
from vlcpt.config_reading import Configs
from vlcpt.hub import Push, check_access, push_adapter, push_command
from vlcpt.hub_names import hub_base, hub_id


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
