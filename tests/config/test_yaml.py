"""Mistakes in a configuration that are reported before anything heavy is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlcpt
from vlcpt.config.yaml import load_config, read_early
from vlcpt.errors import ConfigError

WHOLE = "model_name_or_path: org/model\ntrain_data: a.jsonl\noutput_dir: out\n"


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A function that writes run.yaml: three keys that every run needs, and these lines after them."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").touch()

    def write(lines, whole=WHOLE):
        Path("run.yaml").write_text(whole + lines)
        return Path("run.yaml")

    return write


@pytest.mark.parametrize(
    "lines",
    [
        "max_lenght: 8\n",
        "learning_rate: fast\n",
        "train_merger: [1]\n",
        "seed: 1\nseed: 2\n",
        "trust_remote_code: true\n",
        f"run_name: hf_{'a' * 34}\n",
        "nested: {a: 1\n",
    ],
)
def test_an_early_message_is_that_of_load_config(file, lines):
    path = file(lines)
    said = []
    for look in (read_early, load_config):
        with pytest.raises(ConfigError) as caught:
            look(path)
        said.append(str(caught.value))

    assert said[0] == said[1]


def test_a_missing_key_is_reported_early(file):
    with pytest.raises(ConfigError, match=r"run\.yaml: output_dir is missing\. Add a line output_dir: …"):
        read_early(file("", WHOLE.replace("output_dir: out\n", "")))


def test_wrong_values_and_unknown_keys_are_reported_together(file):
    path = file("max_length: long\nmax_lenght: 8\neval_strategy: sometimes\neval_data: {path: a, share: x}\n")

    with pytest.raises(ConfigError) as caught:
        read_early(path, ["--seed", "x"])

    assert sorted(line.partition(": expected")[0] for line in str(caught.value).splitlines()) == [
        "command line: seed",
        "run.yaml:4: max_length",
        "run.yaml:5: max_lenght: unknown key. Did you mean max_length?",
        "run.yaml:6: eval_strategy",
        "run.yaml:7: eval_data[0].share",
    ]


def test_all_rules_and_paths_are_reported_together(file):
    """Rules of the model, the data and the training, and between these."""
    path = file(
        "lora_r: 0\nlora_towers: [vision]\nfps: 0\nreplay_share: 0.2\neval_data: none.jsonl\n"
        "dataloader_drop_last: true\nseed: -1\n",
        WHOLE.replace("output_dir: out", "output_dir: a.jsonl"),
    )
    with pytest.raises(ConfigError) as caught:
        read_early(path)

    assert sorted(" ".join(line.split()[:2]) for line in str(caught.value).splitlines()) == [
        "run.yaml:10: seed",
        "run.yaml:3: output_dir",
        "run.yaml:4: lora_r",
        "run.yaml:5: lora_towers",
        "run.yaml:6: fps",
        "run.yaml:7: replay_share",
        "run.yaml:8: eval_data[0]:",
        "run.yaml:9: dataloader_drop_last:",
    ]
    with pytest.raises(ConfigError) as caught:
        read_early(file("vision_learning_rate: 1e-6\neval_strategy: epoch\nhub_revision: v1\n"))
    assert len(str(caught.value).splitlines()) == 3


def test_a_wrong_path_is_reported_beside_an_unknown_key(file):
    with pytest.raises(ConfigError) as caught:
        read_early(file("max_lenght: 8\ndeepspeed: zero9\nresume_from_checkpoint: none\n"))

    assert [line.partition(" ")[0] for line in str(caught.value).splitlines()] == [
        "run.yaml:4:",
        "run.yaml:6:",
        "run.yaml:5:",
    ]


def test_a_key_of_a_launcher_is_one_message(file):
    with pytest.raises(ConfigError) as caught:
        read_early(file("local_rank: x\n"))

    assert str(caught.value).startswith("run.yaml:4: local_rank: is of a process, not of a run.")
    assert "\n" not in str(caught.value)


def test_a_configuration_that_may_be_right_is_passed(file):
    path = file("learning_rate: 1e-5\nlr_scheduler_type: cosine\nlora_towers: [language]\n")

    early = read_early(path, ["--report-to", "none", "--num_train_epochs=2", "--use_cpu"])

    assert early.training["num_train_epochs"] == 2.0
    assert early.model.lora_towers == ("language",)


NO_RUN = {"check": [], "inspect": [], "eval": ["--checkpoint", "full"], "prepare": ["--output", "shards"]}


@pytest.mark.parametrize(
    ("command", "lines", "reported"),
    [
        *((command, "max_lenght: 8", "Did you mean max_length?") for command in ("train", *NO_RUN)),
        *(
            (command, "eval_data: b.jsonl", "eval_data[0]: b.jsonl: no such file")
            for command in ("train", *NO_RUN)
        ),
        ("eval --checkpoint none", "seed: 1", "--checkpoint none: no such folder"),
        ("train", "deepspeed: zero9", "deepspeed 'zero9' is no file"),
        ("train", "lora_r: 0", "lora_r 0 must be 1 or more"),
        ("train", "output_dir: a.jsonl", "output_dir a.jsonl: a.jsonl is no folder"),
        ("train", "output_dir: full", "output_dir full is not empty"),
        ("train", "dataloader_drop_last: true", "dataloader_drop_last: It would lose documents."),
        ("check", "vision_learning_rate: 1e-6", "Set train_vision: true, or remove it."),
        ("train", "report_to: tensor_board", "report_to: tensor_board is not known."),
    ],
)
def test_a_mistake_is_reported_without_torch_or_transformers(file, command, lines, reported):
    path = file(
        lines + "\n", WHOLE.replace("output_dir: out\n", "" if "output_dir" in lines else "output_dir: out\n")
    )
    Path("full/checkpoint-1").mkdir(parents=True)
    Path("full/train_log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = (
        "import sys; from vlcpt.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as done: assert done.code == 2, done.code\n"
        "assert not {'torch', 'transformers', 'peft', 'datasets', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), str(path), *NO_RUN.get(command, [])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(vlcpt.__file__).parents[1])},
    )

    assert done.returncode == 0, done.stderr
    assert reported in done.stderr
    assert not Path("out").exists()
