"""Packages that a value of a key needs, looked for before anything is read.

Without one the run would stop at its first step, after data and weights were read. Nothing is imported here.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from vlcpt.errors import ConfigError

# transformers' names for report_to, with the modules of each and what pip calls them.
_REPORTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "dagshub": (("dagshub", "mlflow"), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard",), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "wandb"),
}
# Modules of which any is enough; kernels fetches the attention's kernel from the Hub.
_ATTENTION: Mapping[str, tuple[tuple[str, ...], str]] = {
    "flash_attention_2": (("flash_attn", "kernels"), "flash-attn --no-build-isolation"),
    "flash_attention_3": (("flash_attn_interface", "kernels"), "kernels"),
}
_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
NEEDING = ("report_to", "attn_implementation", "optim", "tuning", "deepspeed")


def missing_packages(key: str, value: object) -> Iterator[str]:
    """For each package that this value needs and that is not installed, how to go on.

    Args:
        key: One of :data:`NEEDING`; others need no package.
        value: As it stands in the YAML, or as the dataclasses have it.

    Example:
        >>> list(missing_packages("report_to", "tensor_board"))  # doctest: +ELLIPSIS
        ['report_to: tensor_board is not known. Choose of: azure_ml, clearml, ... or none.']
        >>> list(missing_packages("report_to", "none"))
        []
    """
    value = getattr(value, "value", value)  # of an Enum, its text
    if key == "report_to":
        yield from _missing_reports(value)
    elif key == "attn_implementation" and value in _ATTENTION:
        modules, pip = _ATTENTION[str(value)]
        if not any(map(_is_there, modules)):
            yield (
                "attn_implementation: its package is not installed, and the model cannot be loaded with "
                f"attn_implementation {value} without. Run pip install {pip}, or set auto, which needs none."
            )
    elif key == "optim" and isinstance(value, str) and value not in _TORCH_OPTIMIZERS:
        yield from _missing(f"optim: {value}", "bitsandbytes")
    elif key == "tuning" and value == "qlora":
        yield from _missing("tuning: qlora", "bitsandbytes")
    elif key == "deepspeed" and value:
        yield from _missing("deepspeed", "deepspeed")


def require_packages(settings: Mapping[str, object]) -> None:
    """Raise for all packages at once that these values need.

    Raises:
        ConfigError: With a line for each, and how to install it.

    Example:
        >>> require_packages({"optim": "adamw_torch", "report_to": [], "deepspeed": None})
    """
    if told := [line for key, value in settings.items() for line in missing_packages(key, value)]:
        raise ConfigError("\n".join(told))


def _missing_reports(value: object) -> Iterator[str]:
    names = value if isinstance(value, list | tuple) else [] if value in (None, False) else [value]
    for name in map(str, names):
        if name in ("all", "none"):
            continue
        if name not in _REPORTS:
            yield f"report_to: {name} is not known. Choose of: {', '.join(_REPORTS)}, all or none."
            continue
        modules, pip = _REPORTS[name]
        if name == "tensorboard" and _is_there("tensorboardX"):
            continue
        if not all(map(_is_there, modules)):
            yield f"report_to: {name} is not installed. Run pip install {pip}, or remove it from report_to."


def _missing(wanted: str, package: str) -> Iterator[str]:
    if not _is_there(package):
        yield f"{wanted} needs {package}, which is not installed. Run pip install {package}."


def _is_there(module: str) -> bool:
    return find_spec(module) is not None
