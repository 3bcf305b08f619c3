"""What other tools call our keys: whole files in the shape that those tools ship, and single values."""

import re
import runpy
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from vlcpt.config.keys import known_types, read_table, remarks, synonyms
from vlcpt.config.rules import OPTIMIZERS
from vlcpt.config.schema import ModelConfig
from vlcpt.config.values import Loader
from vlcpt.config.yaml import load_config, read_early
from vlcpt.data.rows.open import SourceConfig
from vlcpt.errors import ConfigError

DOCS = Path(__file__).parents[2] / "docs"
PAGE = runpy.run_path(str(DOCS / "make_coming_from.py"))

# Each with what it becomes here, worked out by hand from what the tool does with it.
FILES = {
    "LLaMA-Factory, pre-training with LoRA": (
        """
        ### model
        model_name_or_path: org/model
        image_max_pixels: 262144
        video_max_pixels: 16384

        ### method
        stage: pt
        do_train: true
        finetuning_type: lora
        lora_rank: 8
        lora_target: all

        ### dataset
        dataset: corpus.jsonl
        template: qwen2_vl
        cutoff_len: 2048
        max_samples: 1000
        overwrite_cache: true
        preprocessing_num_workers: 16
        dataloader_num_workers: 4

        ### output
        output_dir: saves/lora
        logging_steps: 10
        save_steps: 500
        plot_loss: true
        overwrite_output_dir: true
        save_only_model: false
        report_to: none

        ### train
        per_device_train_batch_size: 1
        gradient_accumulation_steps: 8
        learning_rate: 1.0e-4
        num_train_epochs: 3.0
        lr_scheduler_type: cosine
        warmup_ratio: 0.1
        bf16: true
        ddp_timeout: 180000000
        resume_from_checkpoint: null

        ### eval
        val_size: 0.1
        """,
        {
            "max_pixels": 262144,
            "tuning": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "train_data": ["corpus.jsonl"],
            "max_length": 2048,
            "overwrite": True,
            "warmup_steps": 0.1,
        },
    ),
    "LLaMA-Factory, full": (
        """
        model_name_or_path: org/model
        image_min_pixels: 3136
        finetuning_type: full
        stage: sft
        freeze_vision_tower: true
        freeze_multi_modal_projector: false
        freeze_language_model: false
        flash_attn: sdpa
        disable_gradient_checkpointing: true
        enable_liger_kernel: false
        dataset: corpus.jsonl, more.jsonl
        dataset_dir: data
        media_dir: media
        mix_strategy: interleave_over
        interleave_probs: 0.7, 0.3
        neat_packing: true
        mask_history: false
        cutoff_len: 1024
        pad_to_multiple_of: 28
        video_fps: 1.0
        video_maxlen: 64
        tokenized_path: cache
        pure_bf16: true
        use_badam: false
        swanlab_project: mine
        output_dir: saves/full
        evaluation_strategy: no
        """,
        {
            "min_pixels": 3136,
            "tuning": "full",
            "train_vision": False,
            "train_merger": True,
            "train_language": True,
            "attn_implementation": "sdpa",
            "activation_checkpointing": False,
            "train_data": [
                {"path": "corpus.jsonl", "media_root": "media", "share": 0.7},
                {"path": "more.jsonl", "media_root": "media", "share": 0.3},
            ],
            "packing": True,
            "max_length": 1024,
            "fps": 1.0,
            "max_frames": 64,
            "eval_strategy": "no",
        },
    ),
    "ms-swift": (
        """
        model: org/model
        dataset: ['corpus.jsonl#20000']
        val_dataset: [more.jsonl]
        train_type: lora
        torch_dtype: bfloat16
        attn_impl: sdpa
        quant_method: bnb
        quant_bits: 4
        freeze_vit: false
        freeze_aligner: false
        freeze_llm: false
        vit_lr: 1e-5
        aligner_lr: 2e-5
        target_modules: [all-linear]
        lora_rank: 16
        lora_alpha: 32
        max_length: 8192
        truncation_strategy: delete
        packing: true
        padding_free: true
        lazy_tokenize: true
        split_dataset_ratio: 0.01
        dataset_num_proc: 4
        loss_scale: all
        use_chat_template: false
        vit_gradient_checkpointing: true
        warmup_ratio: 0.05
        MAX_PIXELS: 1003520
        FPS_MAX_FRAMES: 12
        NPROC_PER_NODE: 4
        add_version: false
        output_dir: output
        """,
        {
            "model_name_or_path": "org/model",
            "train_data": ["corpus.jsonl"],
            "eval_data": ["more.jsonl"],
            "tuning": "qlora",
            "dtype": "bfloat16",
            "attn_implementation": "sdpa",
            "train_vision": True,
            "train_merger": True,
            "train_language": True,
            "vision_learning_rate": 1e-5,
            "merger_learning_rate": 2e-5,
            "lora_r": 16,
            "on_overlong": "drop",
            "warmup_steps": 0.05,
            "max_pixels": 1003520,
            "max_frames": 12,
        },
    ),
    "2U1, LoRA on the language model and the tower in full": (
        """
        model_id: org/model
        data_path: corpus.jsonl
        image_folder: media
        lora_enable: True
        vision_lora: False
        lora_namespan_exclude: "['lm_head', 'embed_tokens']"
        lora_rank: 64
        lora_alpha: 128
        num_lora_modules: -1
        freeze_vision_tower: False
        freeze_llm: True
        freeze_merger: True
        unfreeze_topk_llm: 0
        bits: 16
        use_liger: True
        disable_flash_attn2: True
        vision_lr: 2e-6
        image_min_pixels: 200704
        image_max_pixels: 1003520
        nframes: 8
        max_seq_length: 4096
        lazy_preprocess: True
        warmup_ratio: 0.03
        output_dir: output/lora
        """,
        {
            "model_name_or_path": "org/model",
            "train_data": [{"path": "corpus.jsonl", "media_root": "media"}],
            "tuning": "lora",
            "lora_r": 64,
            "train_vision": True,
            "lora_towers": ["language"],
            "train_language": True,
            "train_merger": False,
            "attn_implementation": "sdpa",
            "vision_learning_rate": 2e-6,
            "min_pixels": 200704,
            "max_pixels": 1003520,
            "max_length": 4096,
            "warmup_steps": 0.03,
        },
    ),
    "Qwen's scripts": (
        """
        model_name_or_path: org/model
        dataset_use: corpus.jsonl%100
        tune_mm_llm: True
        tune_mm_mlp: True
        tune_mm_vision: False
        lora_enable: False
        cache_dir: cache
        model_max_length: 4096
        data_flatten: True
        data_packing: True
        max_pixels: 451584
        video_max_frames: 8
        video_min_frames: 4
        video_max_frame_pixels: 25088
        base_interval: 2
        mm_projector_lr: 1e-5
        warmup_ratio: 0.03
        output_dir: checkpoints
        """,
        {
            "train_data": ["corpus.jsonl"],
            "train_language": True,
            "train_merger": True,
            "train_vision": False,
            "tuning": "full",
            "max_length": 4096,
            "packing": True,
            "max_frames": 8,
            "merger_learning_rate": 1e-5,
            "warmup_steps": 0.03,
        },
    ),
    "TRL": (
        """
        model_name_or_path: org/model
        model_revision: main
        torch_dtype: bfloat16
        use_peft: true
        load_in_4bit: true
        bnb_4bit_quant_type: nf4
        use_bnb_nested_quant: true
        lora_r: 64
        lora_modules_to_save: [embed_tokens, lm_head]
        dataset_name: corpus.jsonl
        dataset_train_split: train
        dataset_text_field: text
        dataset_num_proc: 4
        max_seq_length: 1024
        packing_strategy: bfd
        eval_packing: false
        assistant_only_loss: true
        gradient_checkpointing_use_reentrant: false
        output_dir: out-trl
        """,
        {
            "dtype": "bfloat16",
            "tuning": "qlora",
            "train_embeddings": True,
            "train_data": ["corpus.jsonl"],
            "max_length": 1024,
        },
    ),
    "transformers 4": (
        """
        model_name_or_path: org/model
        train_data: corpus.jsonl
        output_dir: out-4
        overwrite_output_dir: false
        evaluation_strategy: "no"
        per_gpu_train_batch_size: 2
        per_gpu_eval_batch_size: 2
        logging_dir: logs
        save_safetensors: true
        no_cuda: true
        group_by_length: true
        fp16_backend: auto
        adafactor: true
        warmup_ratio: 0.1
        include_tokens_per_second: false
        local_rank: -1
        _n_gpu: 1
        """,
        {
            "overwrite": False,
            "eval_strategy": "no",
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "use_cpu": True,
            "optim": "adafactor",
            "warmup_steps": 0.1,
        },
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the data that the files name."""
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.jsonl", "more.jsonl"):
        Path(name).write_text('{"text": "a"}\n')
    Path("media").mkdir()
    return tmp_path


def reported(folder, text):
    path = folder / "theirs.yaml"
    path.write_text("\n".join(line.strip() for line in text.splitlines()))
    with pytest.raises(ConfigError) as caught:
        read_early(path)
    return path.read_text(), str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_every_key_of_another_tools_file_is_explained_at_its_line(folder, name):
    text, message = reported(folder, FILES[name][0])

    given = yaml.compose(text).value
    ours = known_types().keys() - synonyms("launchers").keys()
    for key, _ in given:
        place = f"theirs.yaml:{key.start_mark.line + 1}: {key.value}: "
        if key.value in ours:
            assert place not in message
        else:
            (line,) = [line for line in message.splitlines() if place in line]
            assert line.endswith(" Remove the key.") or re.search(r" Write: \w+: \S", line), line
    assert "Did you mean" not in message


@pytest.mark.parametrize("name", FILES)
def test_the_lines_to_paste_make_of_their_file_one_that_loads(folder, name):
    text, message = reported(folder, FILES[name][0])
    pasted = message.partition("In their place, write:\n")[2]

    # By hand: the keys that are ours stay, the others go, and the lines come in their place.
    ours = known_types().keys() - synonyms("launchers").keys()
    kept = [line for line in text.splitlines() if line.partition(":")[0] in ours]
    (folder / "ours.yaml").write_text("\n".join([*kept, pasted]))

    assert yaml.load(pasted, Loader=Loader) == FILES[name][1]
    load_config(folder / "ours.yaml", ["--bf16", "false", "--use_cpu"])


# Single values


def explained(folder, line):
    _, message = reported(
        folder, f"model_name_or_path: org/model\ntrain_data: corpus.jsonl\noutput_dir: out\n{line}"
    )
    return message.removeprefix(f"{folder}/theirs.yaml:4: ")


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("freeze_vision_tower: true", "Write: train_vision: false  # the default"),
        ("freeze_vision_tower: false", "Write: train_vision: true"),
        ("tune_mm_llm: true", "Write: train_language: true  # the default"),
        ("flash_attn: fa2", "Write: attn_implementation: flash_attention_2"),
        ("flash_attn: disabled", "Write: attn_implementation: eager"),
        ("lora_rank: 16", "Write: lora_r: 16  # the default"),
        ("lora_target: q_proj,v_proj", "Write: lora_target_modules: [q_proj, v_proj]"),
        ("quantization_bit: 4", "Write: tuning: qlora"),
        ("neat_packing: true", "Write: packing: true  # the default"),
        ("vision_lr: 1e-5", "Write: vision_learning_rate: 1e-5"),
        ("cutoff_len: 0x10", "Write: max_length: 0x10"),
        ("push_to_hub_model_id: 'a: b'", "Write: hub_model_id: 'a: b'"),
    ],
)
def test_a_value_is_translated(folder, line, written):
    assert explained(folder, line).endswith(written)


@pytest.mark.parametrize(
    "line",
    [
        "quantization_bit: 8",  # only 4 bits are there
        "finetuning_type: freeze",
        "train_type: adalora",
        "neat_packing: false",  # packs are always neat
        "warmup_ratio: 1",  # warmup_steps: 1 is one step
        "lora_target: all",
        "truncation_strategy: left",
        "additional_target: norm",
        "flash_attn: fa9",
        "dataset:",
        "cutoff_len: null",
        "unfreeze_topk_llm: 4",
        "pissa_init: true",
        "dpo_label_smoothing: 0.1",
        "lora_rank: !!python/name:os.system",
    ],
)
def test_what_vlcpt_does_not_have_is_to_be_removed(folder, line):
    said = explained(folder, line)

    assert said.endswith("Remove the key.")
    assert "Write:" not in said


def test_overwriting_is_not_pasted_beside_a_resume_which_refuses_it(folder):
    said = explained(folder, "overwrite_output_dir: true\nresume_from_checkpoint: true")

    assert said.endswith("cannot stand with resume_from_checkpoint. Remove the key.")


# Fields of a source, and values


def test_the_fields_of_a_source_are_explained_in_one_message_with_their_lines(folder):
    (folder / "run.yaml").write_text(
        "model_name_or_path: org/model\n"
        "train_data:\n"
        "- {annotation_path: a.jsonl, data_path: images}\n"
        "- {file_name: b.json, formatting: sharegpt, columns: {messages: conversations}}\n"
        "eval_data: {path: c.jsonl, num_samples: 10, mediaroot: d}\n"
        "output_dir: out\n"
    )

    with pytest.raises(ConfigError) as error:
        read_early(folder / "run.yaml")

    reported = [line.removeprefix(f"{folder}/run.yaml:") for line in str(error.value).splitlines()]
    assert [line.split(": unknown")[0] for line in reported] == [
        "3: train_data[0].annotation_path",
        "3: train_data[0].data_path",
        "4: train_data[1].file_name",
        "4: train_data[1].formatting",
        "4: train_data[1].columns",
        "5: eval_data[0].num_samples",
        "5: eval_data[0].mediaroot",
    ]
    ends = [
        "Write: path: a.jsonl",
        "Write: media_root: images",
        "Write: path: b.json",
        "Write: format: sharegpt",
        "rename them in the data. Remove the key.",
        "share weighs it. Remove the key.",
        "Did you mean media_root?",
    ]
    assert [line.endswith(end) for line, end in zip(reported, ends, strict=True)] == [True] * 7


def test_each_field_of_a_source_is_new_here_and_has_its_place():
    ours = {field.name for field in fields(SourceConfig)}

    assert not ours & synonyms("source").keys()
    assert {row.key for row in synonyms("source").values()} - {""} <= ours


@pytest.mark.parametrize(
    ("line", "written"),
    [
        ("optim: adamw_hf", "optim: adamw_torch"),
        ("dtype: bf16", "dtype: bfloat16"),
        ("attn_implementation: flash_attn", "attn_implementation: flash_attention_2"),
    ],
)
def test_a_value_that_another_tool_has_for_our_key_is_translated(folder, line, written):
    (folder / "run.yaml").write_text(
        f"model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\n{line}\n"
    )
    (folder / "a.jsonl").touch()

    with pytest.raises(ConfigError, match=rf"run\.yaml:4: .* Write: {written}$"):
        load_config(folder / "run.yaml")


def test_each_translated_value_is_one_that_the_key_takes():
    choices = get_type_hints(ModelConfig)
    for key, values in read_table()["values"].items():
        taken = OPTIMIZERS if key == "optim" else get_args(choices[key])
        assert set(values.values()) <= set(taken)


@pytest.mark.parametrize("line", ["xyz: 1", "train_the_tower: 1", "local_ranks: 1", "rate: 1"])
def test_no_hint_where_nothing_is_near(folder, line):
    assert explained(folder, line) == (
        f"{line.partition(':')[0]}: unknown key. See docs/configuration.md for the known keys."
    )


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("image_max_pixles: 8", "Did you mean image_max_pixels? Here that is max_pixels."),
        (
            "plot_losses: 8",
            "Did you mean plot_loss? train_log.jsonl has the loss of every logging step; "
            "report_to sends it to a tracker.",
        ),
        ("lora_rnak: 8", "Did you mean lora_rank? Here that is lora_r."),
    ],
)
def test_a_misspelt_name_is_explained_as_what_it_is_here(folder, line, hint):
    assert explained(folder, line) == f"{line.partition(':')[0]}: unknown key. {hint}"


@pytest.mark.parametrize("key", synonyms("launchers"))
def test_what_a_launcher_sets_is_refused_in_a_file(folder, key):
    said = explained(folder, f"{key}: 0")

    assert said.startswith(f"{key}: is of a process, not of a run.")


def test_what_a_launcher_passes_on_the_command_line_is_accepted(folder):
    path = folder / "run.yaml"
    path.write_text("model_name_or_path: org/model\ntrain_data: corpus.jsonl\noutput_dir: out\n")

    read_early(path, ["--local_rank", "0"])


def test_a_key_of_the_command_line_is_translated_as_an_option(folder):
    path = folder / "run.yaml"
    path.write_text("model_name_or_path: org/model\ntrain_data: corpus.jsonl\noutput_dir: out\n")

    with pytest.raises(
        ConfigError, match=r"^command line: cutoff_len: unknown key .* Write: --max_length 8$"
    ):
        read_early(path, ["--cutoff_len", "8"])


def test_a_key_that_stands_under_both_names_is_to_be_kept_once(folder):
    said = explained(folder, "max_length: 8\ncutoff_len: 16")

    assert said.endswith("It is max_length: 16; max_length is given too. Keep one of them.")


def test_repeated_and_unknown_keys_are_reported_together(folder):
    said = explained(folder, "seed: 1\nseed: 2\nmax_lenght: 4\nseed: 3")

    assert [line.rpartition("theirs.yaml:")[2] for line in said.splitlines()] == [
        "5: seed is repeated, first on line 4. Keep one of them.",
        "7: seed is repeated, first on line 4. Keep one of them.",
        "6: max_lenght: unknown key. Did you mean max_length?",
    ]


@pytest.mark.parametrize("key", ["hf_hub_token", "push_to_hub_model_id", "nonsense"])
def test_a_secret_under_another_tools_key_is_never_shown(folder, key):
    secret = "hf_" + "a" * 34

    assert secret not in explained(folder, f"{key}: {secret}")


# The table and the page


def test_each_name_is_new_here_has_its_place_and_stands_once():
    table, ours = read_table(), known_types()
    rows = [*table["keys"], *table["launchers"]]
    names = [name for row in rows for name in row["names"]]

    assert len(names) == len(set(names)) > 200
    assert {name for name in names if name in ours} == {"local_rank"}
    assert {row.get("key", "") for row in rows} - {""} <= ours.keys()
    for row in (*rows, *table["source"]):
        assert all(code in table["files"] for codes in row["names"].values() for code in codes.split())
        assert len(remarks(row)) == 2 and all(remarks(row)) == any(remarks(row))


@pytest.mark.parametrize(("file", "language"), [("coming-from.md", "en"), ("coming-from.zh.md", "zh")])
def test_the_page_has_the_table(file, language):
    text = (DOCS / file).read_text("utf-8")

    for table in ("lines", "source_fields", "families", "sources"):
        assert "\n".join(PAGE[table](language)) in text
