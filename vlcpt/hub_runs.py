"""``push_to_hub: true``: the repository is opened before training, and gets the result after it."""

from __future__ import annotations

import copy
from pathlib import Path

from vlcpt.config import ConfigError, CPTConfig
from vlcpt.config_reading import Configs
from vlcpt.hub import Push, check_access, push_adapter
from vlcpt.hub_names import hub_base


def open_repository(configs: Configs) -> str:
    """Make sure before hours of training that their result can be pushed; gives the repository's full id.

    Raises:
        ConfigError: If there is no token, it may not write there, or an adapter's base is a folder.
        ValueError: If the Hub cannot be reached.
    """
    model, training = configs.model, configs.training
    if model.tuning != "full":
        try:
            hub_base(model.model_name_or_path, Path(str(training.output_dir)))
        except ConfigError as error:
            raise ConfigError(
                "push_to_hub: an adapter on the Hub needs its base there, and model_name_or_path is the "
                f"folder {model.model_name_or_path}. Give its Hub id, or train without push_to_hub and then "
                "`vlcpt push OUTPUT_DIR REPO_ID --base_model owner/name`."
            ) from error
    return check_access(
        training.hub_model_id or Path(str(training.output_dir)).absolute().name,
        private=training.hub_private_repo is not False,
        revision=training.hub_revision,
        token=training.hub_token,
    )


def push_run(configs: Configs, repo_id: str) -> Push:
    """Push what a finished run has saved, as ``vlcpt push`` would."""
    training = configs.training
    return push_adapter(
        str(training.output_dir),
        repo_id,
        private=training.hub_private_repo is not False,
        revision=training.hub_revision,
        token=training.hub_token,
    )


def without_pushes(training: CPTConfig) -> CPTConfig:
    """The same for Trainer, whose own pushes take whatever lies in the folder.

    Example:
        >>> without_pushes(CPTConfig("out", use_cpu=True, push_to_hub=True)).push_to_hub
        False
    """
    quiet = copy.copy(training)
    quiet.push_to_hub = False
    return quiet
