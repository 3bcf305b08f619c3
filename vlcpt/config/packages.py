"""Packages that a value of a key needs, looked for before anything is read.

Without one the run would stop at its first step, after data and weights were read. Nothing is imported here.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from vlcpt.config.values import Given
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
# Optimizers that take a group for each tower. Others (lomo, galore, apollo …) make their own groups, or need
# the model.
_TORCH_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
OPTIMIZERS = (
    *_TORCH_OPTIMIZERS,
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_8bit", "paged_ademamix_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)


def require_packages(settings: Mapping[str, object], given: Mapping[str, Given] | None = None) -> None:
    """Raise for all packages at once that these values need and that are not installed.

    Args:
        settings: Values by key, as the configuration has them; those of no package may be among them.
        given: Where they were written, for the message.

    Raises:
        ConfigError: With a line for each, and how to install it.

    Example:
        >>> require_packages({"optim": "adamw_torch", "report_to": "none", "seed": 1})
        >>> require_packages({"report_to": "tensor_board"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: report_to: tensor_board is not known. Choose of: azure_ml, ... or none.
    """
    found = {name: getattr(value, "value", value) for name, value in settings.items()}  # of an Enum, its text
    lines = [
        given[key].message(message) if given and key in given else message for key, message in _missing(found)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def _missing(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """For each missing package the key that needs it, and how to go on."""
    for name in _listed(settings.get("report_to")):
        modules, pip = _REPORTS.get(name, ((), ""))
        if name not in (*_REPORTS, "all", "none"):
            yield (
                "report_to",
                f"report_to: {name} is not known. Choose of: {', '.join(_REPORTS)}, all or none.",
            )
        elif not all(map(_is_there, modules)) and not (name == "tensorboard" and _is_there("tensorboardX")):
            yield (
                "report_to",
                f"report_to: {name} is not installed. Run pip install {pip}, or remove it from report_to.",
            )
    attention = settings.get("attn_implementation")
    modules, pip = _ATTENTION.get(str(attention), ((), ""))
    if modules and not any(map(_is_there, modules)):
        yield (
            "attn_implementation",
            "attn_implementation: its package is not installed, and the model cannot be loaded with "
            f"attn_implementation {attention} without. Run pip install {pip}, or set auto, which needs none.",
        )
    optimizer = settings.get("optim")
    for key, wanted, package, is_needed in (
        ("optim", f"optim: {optimizer}", "bitsandbytes", optimizer and optimizer not in _TORCH_OPTIMIZERS),
        ("tuning", "tuning: qlora", "bitsandbytes", settings.get("tuning") == "qlora"),
        ("deepspeed", "deepspeed", "deepspeed", settings.get("deepspeed")),
    ):
        if is_needed and not _is_there(package):
            yield key, f"{wanted} needs {package}, which is not installed. Run pip install {package}."


def _listed(value: object) -> list[str]:
    if value in (None, False):
        return []
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def _is_there(module: str) -> bool:
    return find_spec(module) is not None
