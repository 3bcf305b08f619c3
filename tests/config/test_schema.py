"""Configuration: YAML and command line in, checked dataclasses out, and back. No weights, no data."""

import os
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames

from vlcpt.config.paths import read_deepspeed, shipped_deepspeed
from vlcpt.config.rules import OPTIMIZERS
from vlcpt.config.schema import DataConfig, ModelConfig
from vlcpt.config.training import CPTConfig
from vlcpt.config.values import Given, Loader, convert
from vlcpt.config.yaml import Configs, dump_config, load_config
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.rows.open import SourceConfig
from vlcpt.errors import ConfigError

ESSENTIAL = "model_name_or_path: org/model\ntrain_data: data/train.jsonl\noutput_dir: out\nuse_cpu: true\n"
Load = Callable[..., Configs]
BASE = Configs(ModelConfig("org/model"), DataConfig("a.jsonl"), CPTConfig("out", use_cpu=True))
ABSOLUTE = str(Path(__file__).resolve())  # a file that is there, outside the test's folder


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A function that loads lines put after the four essential ones; its file is run.yaml, lines from 5."""
    monkeypatch.chdir(tmp_path)
    here = ("a.jsonl", "b.jsonl", "held.jsonl", "old.jsonl")
    for name in (*here, "data/train.jsonl", "a/x.jsonl", "b/x.jsonl", "old/train.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def load(lines: str = "", *overrides: str, essential: str = ESSENTIAL) -> Configs:
        Path("run.yaml").write_text(essential + lines, encoding="utf-8")
        return load_config("run.yaml", overrides)

    return load


def message(load: Load, lines: str = "", *overrides: str, essential: str = ESSENTIAL) -> str:
    with pytest.raises(ConfigError) as caught:
        load(lines, *overrides, essential=essential)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Fields


@pytest.mark.parametrize("cls", [ModelConfig, DataConfig, SourceConfig, CPTConfig])
def test_every_field_says_what_it_means(cls):
    for item in fields(cls):
        text = item.metadata["help"]
        assert len(text) > 10, item.name
        assert "%" not in text.replace("%%", ""), item.name


def test_every_key_belongs_to_one_dataclass_only():
    names = [item.name for cls in (ModelConfig, DataConfig, CPTConfig) for item in fields(cls)]
    assert len(names) == len(set(names))


def test_defaults_are_those_of_the_contract(load):
    configs = load()

    assert (configs.model.tuning, configs.model.lora_r, configs.model.lora_alpha) == ("lora", 16, 32)
    assert configs.model.trained_towers == configs.model.adapter_towers == ("language",)
    assert configs.data.train_data == (SourceConfig("data/train.jsonl", name="train"),)
    assert (configs.data.on_overlong, configs.data.on_bad_data) == ("split", "error")
    training = configs.training
    assert (training.max_length, training.packing, training.logging_steps) == (4096, True, 1)
    assert training.per_device_train_batch_size == training.per_device_eval_batch_size == 1
    assert training.remove_unused_columns is training.logging_nan_inf_filter is False
    assert training.dataloader_num_workers > 0
    assert training.dataloader_timeout == 1800
    assert training.report_to == []


def test_limits_on_media_are_those_of_the_module_that_opens_them():
    data = DataConfig(train_data="a.jsonl")
    for item in fields(MediaLimits):
        assert getattr(data, item.name) == item.default


def test_tokens_are_not_in_the_repr():
    assert "secret" not in repr(CPTConfig("out", use_cpu=True, hub_token="secret"))


# Values


def test_a_number_in_scientific_notation_is_a_float(load):
    assert load("learning_rate: 1e-5").training.learning_rate == 1e-5
    assert load("learning_rate: '1e-5'").training.learning_rate == 1e-5
    assert load("lr_scheduler_kwargs: {lr_end: 1e-7}").training.lr_scheduler_kwargs == {"lr_end": 1e-7}


@pytest.mark.parametrize("key", ["max_length", "learning_rate"])
@pytest.mark.parametrize("written", ["10:30", "10:30.5"])
def test_a_time_of_day_is_no_number(load, key, written):
    """YAML 1.1 reads 10:30 to base 60."""
    assert f"found {written}. Correct it" in message(load, f"{key}: {written}")


@pytest.mark.parametrize(
    ("written", "meant"), [("'no'", False), ("no", False), ("'yes'", True), ("on", True)]
)
def test_words_for_true_and_false_are_never_just_truthy(load, written, meant):
    assert load(f"packing: {written}").training.packing is meant


@pytest.mark.parametrize(
    ("line", "expected", "found"),
    [
        ("learning_rate: fast", "a number", "fast"),
        ("learning_rate: true", "a number", "true"),
        ("learning_rate: .nan", "a number", ".nan"),
        ("max_length: true", "a whole number", "true"),
        ("max_length: 10.5", "a whole number", "10.5"),
        ("max_length: [1, 2]", "a whole number", "[1, 2]"),
        ("max_length:", "a whole number", "nothing"),
        ("bf16: 'maybe'", "true or false or null", "'maybe'"),
        ("bf16: 2", "true or false or null", "2"),
        ("run_name: [a]", "text or null", "['a']"),
        ("max_pixels: many", "a whole number or null", "many"),
        ("tuning: loar", "one of full, lora, qlora", "loar"),
        (
            "lora_towers: [language, eyes]",
            "a list of vision, merger, language or null",
            "['language', 'eyes']",
        ),
        ("eval_strategy: sometimes", "one of no, steps, epoch or null", "sometimes"),
        (
            "train_sampling_strategy: best",
            "one of random, sequential, group_by_length, batch_rebalance",
            "best",
        ),
    ],
)
def test_a_wrong_value_names_line_key_expected_and_found(load, line, expected, found):
    key = line.split(":")[0]
    assert message(load, line) == (
        f"run.yaml:5: {key}: expected {expected}, found {found}. Correct it, or remove it."
    )


def test_text_is_taken_as_typed_where_text_is_wanted(load):
    lines = "run_name: 2026-11-24\npush_to_hub: true\nhub_revision: 0123456\neval_strategy: no\nproject: off"
    training = load(lines).training
    assert (training.run_name, training.hub_revision, training.project) == ("2026-11-24", "0123456", "off")
    assert training.eval_strategy is IntervalStrategy.NO


def test_one_item_needs_no_list(load):
    model = load("lora_towers: language\nlora_target_modules: q_proj").model
    assert (model.lora_towers, model.lora_target_modules) == (("language",), ("q_proj",))


@pytest.mark.parametrize("written", ["true", "false", "'true'", "auto", "out/checkpoint-5"])
def test_resuming_takes_true_false_auto_and_a_path(load, written):
    Path("out/checkpoint-5").mkdir(parents=True)
    value = load(f"resume_from_checkpoint: {written}").training.resume_from_checkpoint
    assert value == {"true": True, "'true'": True, "false": False}.get(written, written)


# Keys and files


def test_an_unknown_key_names_the_nearest_known_one_and_its_line(load):
    assert message(load, "\nmax_lenght: 5") == "run.yaml:6: max_lenght: unknown key. Did you mean max_length?"


def test_a_repeated_key_is_an_error_with_both_lines(load):
    assert message(load, "seed: 1\n\nseed: 2") == (
        "run.yaml:7: seed is repeated, first on line 5. Keep one of them."
    )
    assert "run.yaml:5: x is repeated" in message(load, "lr_scheduler_kwargs: {x: 1, x: 2}")


@pytest.mark.parametrize("key", ["model_name_or_path", "train_data", "output_dir"])
def test_a_missing_or_empty_essential_key_is_named(load, key):
    without = "".join(line for line in ESSENTIAL.splitlines(keepends=True) if not line.startswith(key))
    assert message(load, essential=without) == f"run.yaml: {key} is missing. Add a line {key}: …"
    assert f"run.yaml:4: {key}: expected a value, found nothing." in message(
        load, f"{key}:", essential=without
    )


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("", "run.yaml: expected lines of key: value, found nothing."),
        ("# only a comment", "found nothing."),
        ("- a\n- b", "found a list."),
        ("hello", "found text."),
        ("seed: 1\n\tmax_length: 5", "run.yaml:2: not YAML: "),
        ("seed: [1", "run.yaml:1: not YAML: "),
        ("seed: 1\n---\nseed: 2", "run.yaml:2: not YAML: "),
        ("seed: \x07", "run.yaml: not YAML: "),
        (
            ESSENTIAL + "run_name: !!python/object/apply:os.system [ls]",
            "run.yaml:5: run_name: not a plain value",
        ),
        ("seed: " + "[" * 3000, "run.yaml: lists or mappings stand more than 50 deep inside each other"),
        (
            ESSENTIAL + "lr_scheduler_kwargs: " + "{a: " * 400 + "1" + "}" * 400,
            "run.yaml:5: lists or mappings stand more than 50 deep inside each other. Write them flat.",
        ),
        (
            ESSENTIAL + "lr_scheduler_kwargs: " + "{a: " * 60 + "1" + "}" * 60,
            "run.yaml:5: lists or mappings stand more than 50 deep",
        ),
        (
            ESSENTIAL + f"a: &a {'[' * 40}1{']' * 40}\nb: {'[' * 20}*a{']' * 20}",
            "run.yaml:6: lists or mappings stand more than 50 deep",
        ),
        ("seed: " + "[" * 500_000, "run.yaml: lists or mappings stand more than 50 deep inside each other"),
        (
            ESSENTIAL
            + "lr_scheduler_kwargs:\n  a0: &a0 [x, x]\n"
            + "".join(f"  a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)),
            "run.yaml: with aliases (*name) written out, it has over 100,000 values.",
        ),
        (
            "# " + "a" * 2**20,
            "run.yaml: it has over 1,048,576 bytes, which no configuration has. Give the path",
        ),
        ("{{seed}}: 1", "run.yaml:1: a list or mapping stands where a key should"),
        ("&a seed: &b [*b]", "run.yaml:1: lists or mappings stand more than 50 deep inside each other"),
    ],
)
def test_a_file_that_is_no_flat_mapping_is_one_clear_error(load, text, reported):
    assert reported in message(load, essential=text).replace("\n", " ")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("run_name: Müller".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


# Command line


def test_the_command_line_wins_over_the_file(load):
    configs = load(
        "seed: 1\nlearning_rate: 1e-3",
        "--seed",
        "2",
        "--learning-rate=1e-5",
        "--overwrite",
        "--max_steps",
        "-1",
    )
    training = configs.training
    assert (training.seed, training.learning_rate, training.max_steps) == (2, 1e-5, -1)
    assert training.overwrite is True


def test_the_command_line_replaces_a_list_of_sources(load):
    data = load("", "--train_data", "[a.jsonl, {path: b.jsonl, format: text}]").data
    assert data.train_data == (SourceConfig("a.jsonl"), SourceConfig("b.jsonl", format="text"))


def test_a_launchers_local_rank_is_accepted(load):
    assert load("", "--local_rank=0").training.local_rank == 0


@pytest.mark.parametrize(
    ("tokens", "reported"),
    [
        (["--sed", "1"], "command line: sed: unknown key. Did you mean seed?"),
        (["--seed", "x"], "command line: seed: expected a whole number, found x."),
        (["--seed", "1", "--seed", "2"], "command line: seed: repeated."),
        (["--seed"], "command line: seed: expected a whole number, found true."),
        (["seed", "1"], "command line: seed is no option."),
        (["--train_data", "a.jsonl", "b.jsonl"], "command line: b.jsonl is no option."),
        (["--run_name", "a: b: c"], "command line: run_name:1: not YAML"),
        (["--output_dir", ""], "command line: output_dir: expected a value, found nothing."),
    ],
)
def test_a_wrong_option_is_named(load, tokens, reported):
    assert reported in message(load, "", *tokens)


# Sources


def test_a_source_may_be_a_path_a_mapping_or_a_list_of_both(load):
    data = load(
        "eval_data: held.jsonl\n"
        "retention_data: {path: old.jsonl, name: general}\n"
        "replay_data: [a.jsonl, {path: b.jsonl, media_root: pictures}]\n"
        "replay_share: 0.25"
    ).data

    assert [source.name for source in data.eval_data + data.retention_data] == ["held", "general"]
    assert data.replay_data[1] == SourceConfig("b.jsonl", media_root="pictures")


@pytest.mark.parametrize("key", ["eval_data", "retention_data", "replay_data"])
@pytest.mark.parametrize("written", ["", " null", " []"])
def test_an_optional_list_without_a_value_is_empty(load, key, written):
    assert load(f"{key}:{written}") == load()


def test_an_empty_text_is_no_list_of_sources(load):
    """As from an unset shell variable: it is a mistake."""
    assert "command line: eval_data[0]: path is empty" in message(load, "", "--eval_data", "")


@pytest.mark.parametrize(
    ("lines", "reported"),
    [
        (
            "eval_data:\n- a.jsonl\n- path: b.jsonl\n  frmat: x",
            "run.yaml:8: eval_data[1].frmat: unknown key. Did",
        ),
        (
            "eval_data:\n- {path: 5, share: x}",
            "run.yaml:6: eval_data[0].share: expected a number or null, found x",
        ),
        ("eval_data:\n- name: x", "run.yaml:6: eval_data[0]: path is missing"),
        ("eval_data:\n- [a.jsonl]", "run.yaml:6: eval_data[0]: expected a path, or a mapping"),
        ("eval_data: ['']", "run.yaml:5: eval_data[0]: path is empty"),
        (
            "eval_data: {path: a, format: alpacca}",
            "run.yaml:5: eval_data[0]: unknown format 'alpacca'. Known: auto",
        ),
        (
            "eval_data: {path: a, format: messages, targets: user}",
            "run.yaml:5: eval_data[0]: targets 'user' is unknown. Format messages has: assistant, last, all.",
        ),
        ("eval_data: {path: a, targets: all, format: vlcpt}", "targets 'all' does not apply to format vlcpt"),
        (
            "eval_data: {path: a, chat_template: true, format: text}",
            "chat_template does not apply to format text",
        ),
        (
            "eval_data: [{path: a.jsonl, share: 0.5}]",
            "run.yaml:5: eval_data has a source with a share, which",
        ),
        (
            "eval_data: [a/x.jsonl, b/x.jsonl]",
            "run.yaml:5: eval_data and retention_data have 2 sources named x (",
        ),
    ],
)
def test_a_wrong_source_is_named_with_its_line(load, lines, reported):
    assert reported in message(load, lines)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/docs-v1.5", "docs-v1.5"),
        ("a/train.jsonl.gz", "train"),
        ("shards/0001.tar", "0001"),
        ("pages", "pages"),
    ],
)
def test_a_source_is_called_by_the_last_part_of_its_path(path, name):
    assert SourceConfig(path).name == name


def test_in_python_a_mapping_is_a_source_and_an_unknown_field_is_named():
    assert DataConfig(train_data={"path": "a.jsonl", "format": "text"}).train_data[0].format == "text"
    with pytest.raises(ValueError, match=r"no field pth\. Did you mean path\?"):
        DataConfig(train_data=[{"pth": "a.jsonl"}])


# Combinations


@pytest.mark.parametrize(
    ("lines", "reported"),
    [
        ("train_language: false", "nothing would be trained"),
        ("tuning: full\nlora_r: 8\nuse_dora: true", "lora_r, use_dora would not be used by tuning: full"),
        ("tuning: full\nadapter_name_or_path: org/a", "adapter_name_or_path needs tuning: lora or qlora"),
        ("lora_towers: [language, vision]", "Set train_vision: true, or shorten the list."),
        ("lora_towers: []", "has no tower to put adapters on (trained towers: language)"),
        ("train_language: false\ntrain_embeddings: true", "(trained towers: none)"),
        ("lora_r: 0", "lora_r 0 must be 1 or more"),
        ("lora_dropout: 1", "lora_dropout 1.0 must be from 0 to below 1"),
        ("replay_data: old.jsonl", "replay_data needs replay_share"),
        ("replay_share: 0.2", "replay_share 0.2 needs replay_data"),
        ("replay_share: 1\nreplay_data: old.jsonl", "replay_share 1.0 must be from 0 to below 1"),
        (
            "replay_share: 0.2\nreplay_data: old/train.jsonl",
            "2 sources named train (data/train.jsonl, old/tr",
        ),
        ("min_pixels: 100\nmax_pixels: 50", "min_pixels 100 is above max_pixels 50"),
        ("fps: 0", "fps 0.0 must be above 0"),
        ("max_bad_fraction: 1.5", "max_bad_fraction 1.5 must be from 0 to 1"),
        ("max_length: 1", "max_length 1 must be 2 or more"),
        ("per_device_train_batch_size: 0", "per_device_train_batch_size 0 must be 1 or more"),
        ("learning_rate: -1", "learning_rate -1.0 must be 0 or more"),
        ("num_train_epochs: 0", "num_train_epochs 0.0 must be above 0"),
        ("vision_learning_rate: 1e-6", "Set train_vision: true"),
        ("embedding_learning_rate: 1e-6", "Set train_embeddings: true"),
        ("eval_strategy: epoch", "give eval_data"),
        ("fsdp: full_shard", "FSDP is refused: use deepspeed"),
        ("fsdp_config: {min_num_params: 1}", "FSDP is refused: use deepspeed"),
        ("remove_unused_columns: true", "would drop loss_weights"),
        ("label_smoothing_factor: 0.1", "without smoothing"),
        ("neftune_noise_alpha: 5", "neftune_noise_alpha: Its noise would"),
        ("batch_eval_metrics: true", "batch_eval_metrics: "),
        ("bf16_full_eval: true", "bf16_full_eval: It would round the weights that train, in place"),
        ("dataloader_drop_last: true", "dataloader_drop_last: It would lose documents"),
        ("ignore_data_skip: true", "ignore_data_skip: A resumed run would read documents again"),
        ("auto_find_batch_size: true", "auto_find_batch_size: It would begin anew with trained weights"),
        ("dataloader_in_order: false", "dataloader_in_order: Workers would change the order"),
        ("eval_do_concat_batches: false", "eval_do_concat_batches: Evaluation needs all rows"),
        ("train_sampling_strategy: group_by_length", "Choose one of: random, sequential"),
        ("train_sampling_strategy: batch_rebalance", "Choose one of: random, sequential"),
        ("packing: false\nbalance_ranks: true", "balance_ranks: true would not be used"),
        ("train_sampling_strategy: sequential\nbalance_ranks: true", "balance_ranks: true would not be used"),
        ("accelerator_config: {split_batches: true}", "split_batches: a batch is of each process"),
        ("accelerator_config: {dispatch_batches: true}", "dispatch_batches: rank 0 would cut batches"),
        ("accelerator_config: {even_batches: false}", "even_batches: ranks would wait"),
        ("accelerator_config: {use_seedable_sampler: false}", "use_seedable_sampler: a resumed run would"),
        (
            "accelerator_config: {gradient_accumulation_kwargs: {num_steps: 2}}",
            "num_steps: Set gradient_accumulation_steps",
        ),
        ("hub_always_push: true", "hub_always_push: Only the result is pushed, once"),
        ("hub_strategy: all_checkpoints", "hub_strategy: Only the result is pushed, no checkpoint"),
        ("hub_model_id: me/mine", "hub_model_id would not be used. Set push_to_hub: true"),
        ("hub_revision: v1", "hub_revision would not be used. Set push_to_hub: true"),
        ("activation_checkpointing_kwargs: {use_reentrant: true}", "use_reentrant: true does not work"),
        ("gradient_checkpointing_kwargs: {use_reentrant: true}", "use_reentrant: true does not work"),
        ("activation_checkpointing_kwargs: '{\"use_reentrant\": true}'", "use_reentrant: true does not work"),
        ("activation_checkpointing_kwargs: offload", "activation_checkpointing_kwargs: expected a mapping"),
        ("seed: -1", "seed -1 must be from 0 to 4294967295"),
        ("seed: 4294967296", "seed 4294967296 must be from 0 to 4294967295"),
        ("data_seed: -1", "data_seed -1 must be from 0 to 4294967295"),
        ("dataloader_timeout: -1", "dataloader_timeout -1 must be 0 or more"),
        ("dataloader_num_workers: -1", "dataloader_num_workers -1 must be 0 or more"),
        ("max_frames: 1", "max_frames 1 must be 2 or more"),
        ("eval_on_start: true", "give eval_data"),
        ("save_strategy: best\neval_data: held.jsonl", "save_strategy: best needs eval_strategy"),
        ("metric_for_best_model: x", "metric_for_best_model needs eval_strategy: steps or epoch"),
        ("model_name_or_path: ./nowhere", "there is no folder nowhere"),
    ],
)
def test_what_cannot_work_together_is_said_with_the_line(load, lines, reported):
    essential = (
        ESSENTIAL if "model_name" not in lines else ESSENTIAL.replace("model_name_or_path: org/model", "")
    )
    error = message(load, lines, essential=essential)
    assert reported in error
    assert error.startswith("run.yaml"), error


@pytest.mark.parametrize(
    "lines",
    [
        "accelerator_config: {non_blocking: true, dispatch_batches: false}",
        "accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}",
        "train_sampling_strategy: sequential",
        "average_tokens_across_devices: false",
    ],
)
def test_settings_of_trainer_that_change_no_result_are_passed(load, lines):
    load(lines)


@pytest.mark.parametrize("towers", ["merger", "vision", "[merger, vision]"])
def test_four_bit_weights_that_would_train_in_full_are_refused(load, towers):
    lines = f"train_merger: true\ntrain_vision: true\nlora_towers: {towers}\n"
    load(lines + "tuning: lora")
    assert "tuning: qlora holds the language tower in 4 bits" in message(load, lines + "tuning: qlora")


def test_other_towers_than_the_one_in_four_bits_may_train_in_full(load):
    lines = "tuning: qlora\ntrain_merger: true\nlora_towers: language"
    assert load(lines).model.adapter_towers == ("language",)
    lines = "tuning: qlora\ntrain_language: false\ntrain_merger: true"
    assert load(lines).model.adapter_towers == ("merger",)


@pytest.mark.parametrize(
    "line",
    [
        "lora_r: 8",
        "lora_alpha: 8",
        "lora_dropout: 0.1",
        "lora_target_modules: q_proj",
        "lora_towers: language",
        "use_dora: true",
        "use_rslora: true",
    ],
)
def test_the_shape_of_an_adapter_that_is_there_cannot_be_set(load, line):
    reported = message(load, f"adapter_name_or_path: org/adapter\n{line}")
    assert f"run.yaml:6: {line.split(':')[0]} would not be used with adapter_name_or_path" in reported
    load("adapter_name_or_path: org/adapter\nlora_r: 16\ntrain_merger: true")


@pytest.mark.parametrize("word", ["all-linear", "all"])
def test_the_word_of_peft_for_every_layer_is_the_default(load, word):
    """Taken as a name it would match no layer; taken as peft does it would match the frozen towers too."""
    reported = message(load, f"lora_target_modules: {word}")
    assert f"run.yaml:5: lora_target_modules: {word} is the default here" in reported


def test_a_saved_adapter_can_be_measured_with_the_configuration_that_made_it():
    """What ``vlcpt eval`` does with it."""
    made = ModelConfig("org/model", lora_r=8, use_dora=True)
    assert replace(made, adapter_name_or_path="out").adapter_name_or_path == "out"


def test_overwriting_what_a_run_would_resume_from_is_refused(load):
    Path("out/checkpoint-5").mkdir(parents=True)
    for written in ("true", "'true'", "auto", "out/checkpoint-5"):
        reported = message(load, f"resume_from_checkpoint: {written}", "--overwrite")
        assert "overwrite would delete the checkpoints that resume_from_checkpoint continues from" in reported
        assert reported.endswith("Remove one of them.")
    for written in ("false", "null", "'false'"):
        assert load(f"resume_from_checkpoint: {written}", "--overwrite").training.overwrite


# Optimizers


def test_every_optimizer_that_is_allowed_takes_the_groups_of_the_towers():
    for name in OPTIMIZERS:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(CPTConfig("out", use_cpu=True, optim=name))
        assert issubclass(cls, torch.optim.Optimizer), name
        assert not {"params", "model", "optimizer_dict"} & set(kwargs), name


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "adafactor", "paged_adamw_8bit"])
def test_an_optimizer_of_torch_or_bitsandbytes_is_allowed(load, name):
    assert load(f"optim: {name}").training.optim == OptimizerNames(name)


@pytest.mark.parametrize(
    "name", ["lomo", "adalomo", "galore_adamw", "galore_adafactor_layerwise", "apollo_adamw"]
)
def test_an_optimizer_that_makes_its_own_groups_is_refused_with_those_that_do_not(load, name):
    reported = message(load, f"optim: {name}\noptim_target_modules: all-linear")
    assert reported.startswith(f"run.yaml:5: optim {name} ")
    assert "Choose one of: adamw_torch, adamw_torch_fused, " in reported


# Evaluation sets and the best model

BEST = """
eval_data: [{path: held.jsonl, name: new}, {path: a.jsonl, name: far}]
retention_data: {path: old.jsonl, name: general}
eval_strategy: steps
eval_steps: 500
save_steps: 500
"""


@pytest.mark.parametrize(
    "line",
    ["load_best_model_at_end: true", "save_strategy: best", "lr_scheduler_type: reduce_lr_on_plateau"],
)
def test_the_best_model_is_that_of_the_first_set_by_default(load, line):
    training = load(BEST + line).training
    assert (training.metric_for_best_model, training.greater_is_better) == ("eval_new_loss", False)


def test_without_a_use_for_it_no_metric_is_named(load):
    assert load(BEST).training.metric_for_best_model is None


def test_without_held_out_data_the_best_model_is_that_of_the_first_retention_set(load):
    lines = BEST.replace("eval_data", "# eval_data") + "load_best_model_at_end: true"
    assert load(lines).training.metric_for_best_model == "eval_general_loss"


def test_evaluation_at_the_start_needs_no_other(load):
    training = load("eval_on_start: true\neval_data: held.jsonl").training
    assert (training.eval_on_start, training.eval_strategy) == (True, IntervalStrategy.NO)


@pytest.mark.parametrize(
    "metric", ["eval_far_loss", "far_loss", "eval_general_perplexity", "general_perplexity"]
)
def test_a_metric_of_any_set_may_be_named_and_less_of_it_is_better(load, metric):
    training = load(BEST + f"load_best_model_at_end: true\nmetric_for_best_model: {metric}").training
    assert (training.metric_for_best_model, training.greater_is_better) == (metric, False)


@pytest.mark.parametrize("metric", ["loss", "eval_loss", "eval_old_loss", "far_accuracy"])
def test_a_metric_of_no_set_is_refused_with_those_there_are(load, metric):
    reported = message(load, BEST + f"load_best_model_at_end: true\nmetric_for_best_model: {metric}")
    assert reported == (
        f"run.yaml:12: metric_for_best_model {metric!r} chooses no model. Choose one of: eval_new_loss, "
        "eval_new_perplexity, eval_far_loss, eval_far_perplexity, eval_general_loss, eval_general_perplexity."
    )


def test_sets_of_which_two_numbers_would_have_one_name_are_refused(load):
    lines = "eval_data: [{path: a.jsonl, name: a}, {path: b.jsonl, name: a_blank_images}]\n"

    assert "'a' and 'a_blank_images' would be logged under one name" in message(load, lines)
    assert load(lines + "eval_blank_images: false").training.eval_blank_images is False


def test_the_worst_model_cannot_be_asked_for(load):
    reported = message(load, BEST + "load_best_model_at_end: true\ngreater_is_better: true")
    assert "run.yaml:12: greater_is_better: less loss is better" in reported


def test_shares_must_cover_every_source_and_add_up():
    def data(*shares: float | None) -> DataConfig:
        return DataConfig(train_data=[{"path": f"{n}.jsonl", "share": s} for n, s in enumerate(shares)])

    assert [source.share for source in data(0.25, 0.75).train_data] == [0.25, 0.75]
    for wrong in [(0.5, None), (0.5, 0.6)]:
        with pytest.raises(ValueError, match="Give every source a share, with the sum 1"):
            data(*wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bf16_without_a_gpu_is_reported_with_what_to_do(load):
    reported = message(load, "bf16: true", "--use_cpu", "false")
    assert reported.startswith(
        "run.yaml:5: bf16: there is no GPU here that computes in bfloat16. Remove the key"
    )
    assert load("bf16: true").training.bf16


def test_what_transformers_objects_to_is_reported_with_file_and_line(load):
    reported = message(load, "bf16: true\nfp16: true")
    assert reported == "run.yaml:6: fp16: At most one of fp16 and bf16 can be True, but not both"


def test_a_choice_is_checked_in_python_too():
    with pytest.raises(ValueError, match="tuning 'loar' is none of its choices: full, lora, qlora"):
        ModelConfig("org/model", tuning="loar")


# Activation checkpointing, workers, DeepSpeed


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "on"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_activation_checkpointing_is_on_when_a_gpu_is_used(monkeypatch, gpu, use_cpu, on):
    monkeypatch.setattr("vlcpt.config.training.torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", None)

    training = CPTConfig("out", use_cpu=use_cpu)

    assert training.activation_checkpointing is on
    assert training.activation_checkpointing_kwargs == ({"use_reentrant": False} if on else None)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_the_users_choice_of_activation_checkpointing_stands(load, name):
    training = load(f"{name}: true\n{name}_kwargs: {{every_n_layers: 2}}").training
    assert training.activation_checkpointing is training.gradient_checkpointing is True
    assert training.activation_checkpointing_kwargs == {"use_reentrant": False, "every_n_layers": 2}


def test_activation_checkpointing_auto_is_the_default(load):
    training = load("activation_checkpointing: auto").training

    assert training.chooses_checkpointing
    assert training.activation_checkpointing is False  # there is no GPU
    with pytest.raises(ConfigError, match=r"expected true, false or auto, found 'often'"):
        load("activation_checkpointing: often")


def test_no_workers_means_none_to_keep(load):
    assert load("dataloader_num_workers: 0").training.dataloader_persistent_workers is False
    assert load("dataloader_num_workers: 1").training.dataloader_persistent_workers is True


def test_a_deepspeed_config_is_a_shipped_name_or_a_path(tmp_path):
    (tmp_path / "mine.json").write_text('{"train_batch_size": 1}')
    assert read_deepspeed(str(tmp_path / "mine.json")) == {"train_batch_size": 1}
    assert read_deepspeed("zero3")["zero_optimization"]["stage"] == 3
    assert {path.name for path in shipped_deepspeed().values()} >= {"zero1.json", "zero3_offload.json"}


def test_an_unknown_deepspeed_config_lists_those_shipped(load):
    reported = message(load, "deepspeed: zero9")
    assert reported.startswith("run.yaml:5: deepspeed 'zero9' is no file and no shipped config. Shipped: ")
    assert "zero2, " in reported


def test_a_deepspeed_config_that_is_not_json_is_named(load, tmp_path):
    (tmp_path / "mine.json").write_text("{nope")
    assert message(load, "deepspeed: mine.json").startswith("run.yaml:5: deepspeed mine.json is not JSON: ")


def test_a_shipped_deepspeed_config_keeps_its_name(load):
    assert load("deepspeed: zero2").training.deepspeed == "zero2"


# Paths, and writing


@pytest.mark.parametrize("key", ["eval_data", "retention_data", "replay_data"])
def test_a_data_file_that_is_not_there_is_named(load, key):
    share = "replay_share: 0.1\n" if key == "replay_data" else ""
    reported = message(load, f"{key}: [held.jsonl, no/where.jsonl]\n{share}")
    assert reported.startswith(
        f"run.yaml:5: {key}[1]: no/where.jsonl: no such file or folder. Correct the path"
    )


def test_training_data_that_is_not_there_is_named_where_it_was_written(load):
    essential = ESSENTIAL.replace("data/train", "none")
    assert "run.yaml:2: train_data[0]: none.jsonl: no such" in message(load, essential=essential)
    assert "command line: train_data[0]: none.jsonl: no such" in message(
        load, "", "--train_data", "none.jsonl"
    )


def test_a_data_set_on_the_hub_needs_no_file_but_a_split(load):
    assert load("eval_data: {path: org/set, split: test}").data.eval_data[0].path == "org/set"
    assert "for a dataset on the Hub add its split" in message(load, "eval_data: org/set")
    assert "squad: no such file or folder" in message(load, "eval_data: {path: squad, split: test}")


def test_an_address_is_no_path_of_data(load):
    reported = message(load, "eval_data: https://host/a.jsonl")
    assert "run.yaml:5: eval_data[0]: https://host/a.jsonl is an address. Download the data" in reported


def test_a_checkpoint_that_is_not_there_cannot_be_resumed_from(load):
    reported = message(load, "resume_from_checkpoint: out/checkpoint-7")
    assert reported.startswith("run.yaml:5: resume_from_checkpoint: there is no folder out/checkpoint-7.")


def test_an_output_folder_that_is_a_file_is_refused(load):
    for written in ("a.jsonl", "a.jsonl/out"):
        reported = message(load, "", "--output_dir", written)
        assert reported == f"command line: output_dir {written}: a.jsonl is no folder. Give another one."


def test_an_output_folder_that_cannot_be_made_is_refused_and_nothing_is_made(load, monkeypatch):
    Path("mine").mkdir()
    load("", "--output_dir", "mine/deep/out")
    monkeypatch.setattr("vlcpt.config.paths.os.access", lambda path, mode: str(path) != "mine")
    reported = message(load, "", "--output_dir", "mine/deep/out")
    assert reported == (
        "command line: output_dir mine/deep/out cannot be made: mine is not yours to write to. "
        "Give another folder."
    )
    assert list(Path("mine").iterdir()) == []


def test_a_finished_run_may_be_read_only(load, monkeypatch):
    """``vlcpt eval out/config.yaml`` writes nothing there."""
    Path("out").mkdir()
    monkeypatch.setattr("vlcpt.config.paths.os.access", lambda path, mode: False)
    assert load().training.output_dir == "out"


def test_paths_start_at_the_file_and_on_the_command_line_at_the_current_folder(load, tmp_path):
    (tmp_path / "conf" / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "conf" / "run.yaml").write_text(
        "model_name_or_path: models/qwen\nadapter_name_or_path: org/adapter\noutput_dir: ../out\n"
        f"train_data: [{{path: a.jsonl, media_root: ../pics}}, {ABSOLUTE}, {{path: org/set, split: train}}]\n"
        "use_cpu: true\n"
    )
    (tmp_path / "conf" / "a.jsonl").touch()

    configs = load_config("conf/run.yaml", ["--eval_data", "held.jsonl"])

    assert configs.model.model_name_or_path == "conf/models/qwen"
    assert configs.model.adapter_name_or_path == "org/adapter"
    assert configs.training.output_dir == "out"
    a, b, hub = configs.data.train_data
    assert (a.path, a.media_root) == ("conf/a.jsonl", "pics")
    assert (b.path, hub.path) == (ABSOLUTE, "org/set")
    assert configs.data.eval_data[0].path == "held.jsonl"


LINES = f"""
train_vision: true
train_merger: true
lora_towers: [language, merger]
vision_learning_rate: 1e-6
use_dora: true
eval_data: [{{path: held.jsonl, name: new}}, {ABSOLUTE}]
replay_data: {{path: org/set, split: train}}
replay_share: 0.3
on_overlong: drop
learning_rate: 3e-4
eval_strategy: steps
save_steps: 7
lr_scheduler_type: cosine
lr_scheduler_kwargs: {{num_cycles: 1e-1}}
activation_checkpointing: true
accelerator_config: {{non_blocking: true}}
report_to: [tensorboard]
run_name: '1e-5'
debug: underflow_overflow
"""


REDEFINED = {
    item.name: item.default
    for item in fields(TrainingArguments)
    if item.name in CPTConfig.__annotations__
    # Two are not written, one is refused at Trainer's default, and one chosen where it is not given.
    and item.name
    not in ("resume_from_checkpoint", "overwrite", "remove_unused_columns", "activation_checkpointing")
}


def test_there_are_fields_with_another_default_than_trainers():
    assert {"dataloader_num_workers", "logging_steps", "per_device_eval_batch_size"} <= set(REDEFINED)


@pytest.mark.parametrize("name", REDEFINED)
def test_a_setting_at_trainers_default_survives_writing(load, name):
    configs = load(f"{name}: {yaml.dump(REDEFINED[name])}")
    Path("out").mkdir()
    Path("out/config.yaml").write_text(dump_config(configs, Path("out")), encoding="utf-8")

    again = load_config("out/config.yaml")

    assert getattr(again.training, name) == REDEFINED[name]
    assert again == configs


@pytest.mark.parametrize(
    "lines",
    [
        "",
        LINES,
        "tuning: full\npacking: false\nlora_dropout: 0",
        BEST + "load_best_model_at_end: true",
        BEST + "load_best_model_at_end: true\nmetric_for_best_model: far_perplexity",
    ],
)
def test_a_written_configuration_reads_back_equal(load, lines):
    configs = load(lines)
    Path("out").mkdir()
    Path("out/config.yaml").write_text(dump_config(configs, Path("out")), encoding="utf-8")

    assert load_config("out/config.yaml") == configs


def test_a_written_configuration_reads_back_from_another_folder(load, monkeypatch, tmp_path):
    """Also where output_dir is a link to elsewhere, so that `..` is not where it seems."""
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    Path("out").symlink_to(tmp_path / "disk" / "runs")
    text = dump_config(load(), Path("out"))
    Path("out/config.yaml").write_text(text)
    monkeypatch.chdir("/")

    configs = load_config(tmp_path / "disk" / "runs" / "config.yaml")

    assert os.path.samefile(configs.data.train_data[0].path, tmp_path / "data" / "train.jsonl")
    assert os.path.samefile(configs.training.output_dir, tmp_path / "out")


def test_only_paths_written_absolute_are_absolute(load, tmp_path):
    load()
    configs = load_config(tmp_path / "run.yaml", ["--eval_data", ABSOLUTE, "--deepspeed", "zero2"])
    written = yaml.safe_load(dump_config(configs, tmp_path / "out"))

    assert written["train_data"] == ["../data/train.jsonl"]
    assert written["eval_data"] == [ABSOLUTE]
    assert (written["output_dir"], written["deepspeed"]) == (".", "zero2")
    assert str(tmp_path) not in str(written)


def test_no_secret_and_no_way_of_starting_is_written(load):
    for start in ("overwrite: true", "resume_from_checkpoint: auto"):
        text = dump_config(load(f"hub_token: hf_planted\n{start}"), Path("out"))

        assert "hf_planted" not in text
        assert not {"hub_token", "overwrite", "resume_from_checkpoint"} & set(yaml.safe_load(text))


def test_what_decides_the_result_is_written_even_at_its_default(load):
    written = yaml.safe_load(dump_config(load(), Path("out")))
    assert {"learning_rate", "optim", "seed", "max_length", "packing", "lora_r", "untagged"} <= set(written)
    assert not {"report_to", "debug", "accelerator_config", "disable_tqdm"} & set(written)


@given(st.floats(0, 1e3, exclude_min=True), st.text(st.characters(codec="utf-8", exclude_categories=["C"])))
def test_any_number_and_text_survive_writing(rate, name):
    training = replace(BASE.training, learning_rate=rate, run_name=name)
    node = yaml.compose(dump_config(replace(BASE, training=training), Path("out")), Loader=Loader)

    written = {key.value: Given(key.value, value, Path(), "x") for key, value in node.value}

    hints = get_type_hints(CPTConfig)
    assert convert(written["learning_rate"], hints["learning_rate"]) == rate
    assert convert(written["run_name"], hints["run_name"]) == name


def test_choices_of_a_list_are_named(load):
    assert "expected text or a list of underflow_overflow, tpu_metrics_debug, found nothing" in message(
        load, "debug:\n"
    )


@pytest.mark.parametrize(
    ("cores", "processes", "workers"), [(1, 1, 2), (4, 1, 3), (64, 1, 8), (64, 8, 7), (16, 8, 2)]
)
def test_workers_are_sized_to_the_machine(tmp_path, monkeypatch, cores, processes, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))

    assert CPTConfig(str(tmp_path), use_cpu=True).dataloader_num_workers == workers
    assert CPTConfig(str(tmp_path), use_cpu=True, dataloader_num_workers=1).dataloader_num_workers == 1
