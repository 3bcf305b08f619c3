"""Which settings of training are refused, alone or together, and which packages a value needs. No torch.

Without a package the run would stop at its first step, after data and weights were read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from vlcpt.config.keys import defaults
from vlcpt.config.schema import LEARNING_RATES, DataConfig, ModelConfig, wrong_numbers
from vlcpt.data.families import SEEING
from vlcpt.eval_names import Number, logged_name
from vlcpt.run_files import asks_to_resume

# transformers' names for report_to, with the modules of each and what pip calls them.
_REPORTS: Mapping[str, tuple[tuple[str, ...], str]] = {
    **{name: ((name,), name) for name in ("clearml", "codecarbon", "comet_ml", "dvclive", "mlflow")},
    **{name: ((name,), name) for name in ("neptune", "swanlab", "tensorboard", "trackio", "wandb")},
    "azure_ml": (("azureml",), "azureml-core"),
    "dagshub": (("dagshub", "mlflow"), "dagshub mlflow"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),
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


# Settings that keep their default, since another value would be ignored or spoil the run: what to do instead.
_REFUSED: Mapping[str, str] = {
    "fsdp": "FSDP is refused: use deepspeed: zero2 or deepspeed: zero3.",
    "fsdp_config": "FSDP is refused: use deepspeed: zero2 or deepspeed: zero3.",
    "parallelism_config": "Only data parallelism is supported: use deepspeed: zero3.",
    "remove_unused_columns": "It would drop loss_weights and positions from the data. Remove the key.",
    "label_smoothing_factor": "The loss is over marked targets, without smoothing. Remove the key.",
    "use_liger_kernel": "It replaces the loss that vlcpt computes. Remove the key.",
    "neftune_noise_alpha": "Its noise would depend on how documents are packed. Remove the key.",
    "batch_eval_metrics": "Evaluation adds up rows, and no means of batches. Remove the key.",
    "bf16_full_eval": "It would round the weights that train, in place. Set bf16: true, or remove the key.",
    "fp16_full_eval": "It would round the weights that train, in place. Set fp16: true, or remove the key.",
    "ignore_data_skip": "A resumed run would read documents again, and others never. Remove the key.",
    "auto_find_batch_size": "It would begin anew with trained weights. Set per_device_train_batch_size: 1.",
    "dataloader_drop_last": "It would lose documents. Remove the key.",
    "enable_jit_checkpoint": "vlcpt saves at SIGTERM and SIGINT by itself. Remove the key.",
    "hub_always_push": "Only the result is pushed, once. Remove the key.",
    "dataloader_in_order": "Workers would change the order, on which a resume relies. Remove the key.",
    "eval_do_concat_batches": "Evaluation needs all rows of a batch together. Remove the key.",
}
_SAMPLING = ("random", "sequential")
_PATCH_EMBEDDINGS = ("auto", "conv", "linear")


def training_rules(values: Mapping[str, object]) -> Iterator[str]:
    """A message for each setting of the Trainer that cannot work here, or means nothing.

    Args:
        values: By key; one that is not among them has its default.

    Example:
        >>> list(training_rules({"dataloader_drop_last": True, "max_length": 1}))  # doctest: +ELLIPSIS
        ['max_length 1 must be 2 or more: ...', 'dataloader_drop_last: It would lose documents. Remove the key.']
    """  # noqa: E501
    # The text of an Enum.
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    training = SimpleNamespace(**{**defaults(), **plain})
    yield from wrong_numbers(plain)
    if training.optim not in OPTIMIZERS:
        yield (
            f"optim {training.optim} makes its own parameter groups, or is not known to take those of the "
            f"towers. Choose one of: {', '.join(OPTIMIZERS)}."
        )
    for name, instead in _REFUSED.items():
        if bool(getattr(training, name)) != bool(defaults()[name]):
            yield f"{name}: {instead}"
    if training.train_sampling_strategy not in _SAMPLING:
        yield (
            f"train_sampling_strategy {training.train_sampling_strategy}: it cannot see how long a pack is. "
            f"Choose one of: {', '.join(_SAMPLING)}."
        )
    if training.balance_ranks and not (training.packing and training.train_sampling_strategy == "random"):
        yield (
            "balance_ranks: true would not be used: it puts packs together, and orders them at random. "
            "Remove it, or packing: false and train_sampling_strategy."
        )
    if training.patch_embedding not in _PATCH_EMBEDDINGS:
        yield (
            f"patch_embedding {training.patch_embedding!r} is none of its choices: "
            f"{', '.join(_PATCH_EMBEDDINGS)}."
        )
    if training.hub_strategy not in ("end", "every_save"):
        yield "hub_strategy: Only the result is pushed, no checkpoint. Remove the key."
    for name in ("hub_model_id", "hub_revision"):
        if getattr(training, name) is not None and not training.push_to_hub:
            yield f"{name} would not be used. Set push_to_hub: true, or remove it."
    if training.num_train_epochs <= 0 and training.max_steps <= 0:
        yield f"num_train_epochs {training.num_train_epochs} must be above 0, or max_steps."
    if training.overwrite and asks_to_resume(training.resume_from_checkpoint):
        yield (
            "overwrite would delete the checkpoints that resume_from_checkpoint continues from. "
            "Remove one of them."
        )


def rules_between(model: ModelConfig, data: DataConfig, values: Mapping[str, object]) -> Iterator[str]:
    """A message wherever one part of a configuration asks for what another does not give.

    Args:
        values: As for :func:`training_rules`.

    Example:
        >>> model, data = ModelConfig("org/model"), DataConfig("a.jsonl")
        >>> list(rules_between(model, data, {"vision_learning_rate": 1e-5}))
        ['vision_learning_rate would not be used. Set train_vision: true, or remove it.']
    """
    training = SimpleNamespace(**{**defaults(), **values})
    for group, key in LEARNING_RATES.items():
        if (
            group != "language"
            and getattr(training, key) is not None
            and not getattr(model, f"train_{group}")
        ):
            yield f"{key} would not be used. Set train_{group}: true, or remove it."
    if training.vision_cache is not None:
        folder, output = (Path(str(one)) for one in (training.vision_cache, training.output_dir))
        if not str(training.vision_cache).strip():
            yield "vision_cache: expected a folder, found nothing. Give one, or remove the key."
        elif next((one for one in (folder, *folder.parents) if one.exists()), output).is_file():
            yield f"vision_cache: {folder} is a file, or inside one. Give a folder."
        elif folder.absolute() == output.absolute():
            yield f"vision_cache: {folder} is output_dir, which --overwrite empties. Give another folder."
        for tower in SEEING:
            if getattr(model, f"train_{tower}"):
                yield (
                    f"vision_cache keeps what frozen towers give, and train_{tower} changes that. Set "
                    f"train_{tower}: false, or remove vision_cache."
                )
    elif training.vision_cache_dtype != "auto":
        yield "vision_cache_dtype would not be used. Set vision_cache, or remove it."
    if model.adapter_name_or_path is not None and (changed := model.changed_lora):
        yield (
            f"{changed} would not be used with adapter_name_or_path: the adapter brings its own. "
            "Remove what you set, or start a new adapter."
        )
    sets = data.eval_data + data.retention_data
    no_strategy = training.eval_strategy in (None, "no")
    if (not no_strategy or training.eval_on_start or training.eval_on_end) and not sets:
        yield "eval_strategy, eval_on_start and eval_on_end need documents: give eval_data, or remove them."
    if training.eval_blank_images:
        yield from shared_names([one.name for one in sets])
    metric, saves_best = training.metric_for_best_model, training.save_strategy == "best"
    numbers: tuple[Number, ...] = ("loss", "perplexity")
    chosen_by = [logged_name(one.name, number) for one in sets for number in numbers]
    if no_strategy and (metric is not None or saves_best):
        needs = "save_strategy: best" if saves_best else "metric_for_best_model"
        yield f"{needs} needs eval_strategy: steps or epoch. Set it, or remove the key."
    elif metric is not None and metric not in chosen_by and f"eval_{metric}" not in chosen_by:
        yield f"metric_for_best_model {metric!r} chooses no model. Choose one of: {', '.join(chosen_by)}."
    if training.greater_is_better:
        yield "greater_is_better: less loss is better, and less perplexity. Remove the key."


def shared_names(sets: Collection[str]) -> Iterator[str]:
    """A message for each pair of evaluation sets of which two numbers would be logged under one name.

    Example:
        >>> list(shared_names(["a", "a_blank_images"]))  # doctest: +ELLIPSIS
        ["the evaluation sets 'a' and 'a_blank_images' would be logged under one name. Rename one of them, ...
    """
    for name in sets:
        if (other := f"{name}_blank_images") in sets:
            yield (
                f"the evaluation sets {name!r} and {other!r} would be logged under one name. Rename one of "
                "them, or set eval_blank_images: false."
            )


def missing_packages(values: Mapping[str, object]) -> Iterator[str]:
    """A message for each package that these values need and that is not installed. Imports none.

    Args:
        values: By key; those that need no package may be among them.

    Example:
        >>> list(missing_packages({"optim": "adamw_torch", "report_to": "none", "seed": 1}))
        []
        >>> list(missing_packages({"report_to": "tensor_board"}))  # doctest: +ELLIPSIS
        ['report_to: tensor_board is not known. Choose one of: azure_ml, ..., all or none.']
    """
    reports, known = values.get("report_to") or [], sorted(_REPORTS)
    for name in reports if isinstance(reports, list | tuple) else [str(reports)]:
        modules, pip = _REPORTS.get(name, ((), ""))
        if name not in (*known, "all", "none"):
            yield f"report_to: {name} is not known. Choose one of: {', '.join(known)}, all or none."
        elif not all(map(_is_there, modules)) and not (name == "tensorboard" and _is_there("tensorboardX")):
            yield f"report_to: {name} is not installed. Run pip install {pip}, or remove it from report_to."
    attention = values.get("attn_implementation")
    modules, pip = _ATTENTION.get(str(attention), ((), ""))
    if modules and not any(map(_is_there, modules)):
        yield (
            "attn_implementation: its package is not installed, and the model cannot be loaded with "
            f"attn_implementation {attention} without. Run pip install {pip}, or set auto, which needs none."
        )
    optimizer = getattr(values.get("optim"), "value", values.get("optim"))
    for wanted, package, is_needed in (
        (f"optim: {optimizer}", "bitsandbytes", optimizer and optimizer not in _TORCH_OPTIMIZERS),
        ("tuning: qlora", "bitsandbytes", values.get("tuning") == "qlora"),
        ("deepspeed", "deepspeed", values.get("deepspeed")),
    ):
        if is_needed and not _is_there(package):
            yield f"{wanted} needs {package}, which is not installed. Run pip install {package}."


def _is_there(module: str) -> bool:
    return find_spec(module) is not None
