"""Tests of vlcpt/model/merge.py."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from tests.conftest import DEMO_BASE
from tests.model.changing import logits, name_base
from tests.processes import holding, run_module
from vlcpt.cli import app
from vlcpt.config.schema import ModelConfig
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError, Writing
from vlcpt.folder_locks import staging_folder
from vlcpt.model import merge as merging
from vlcpt.model.loading import load_model, load_processor
from vlcpt.model.merge import check_logits, merge_adapter
from vlcpt.model.tuning import apply_tuning

WAYS = [
    {},
    {"train_merger": True, "train_vision": True, "use_dora": True},
    {"train_merger": True, "train_vision": True, "lora_towers": ["language"]},
    {"train_embeddings": True},
    {"train_vision": True, "lora_towers": ["vision"]},
    {"lora_target_modules": ["q_proj", "up_proj"]},
    {"train_merger": True, "use_rslora": True, "lora_r": 3},
]


def trained_adapter(model, processor, inputs, folder, **way):
    """Save base and adapter, trained for a step; returns the logits of both together."""
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    model = apply_tuning(model, ModelConfig("base", **way))
    model(**inputs).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.save_pretrained(folder / "adapter")
    return logits(model, inputs)


@pytest.fixture(scope="module")
def an_adapter(make_tiny_model, tiny_processor, tiny_inputs, tmp_path_factory):
    """A base and its adapter, not to be written to."""
    folder = tmp_path_factory.mktemp("an adapter")
    trained_adapter(make_tiny_model(), tiny_processor, tiny_inputs, folder)
    return folder


@pytest.fixture
def adapter(an_adapter, tmp_path):
    """Copies of a base and its adapter that a test may change, beside where it merges into."""
    for name in ("base", "adapter"):
        shutil.copytree(an_adapter / name, tmp_path / name)
    name_base(tmp_path / "adapter", str(tmp_path / "base"))
    return tmp_path / "adapter"


@pytest.mark.parametrize("way", WAYS, ids=[str(way) for way in WAYS])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_merged_model_gives_the_adapters_logits_without_peft(
    make_tiny_model, tiny_processor, tiny_inputs, tmp_path, way, tie
):
    model = make_tiny_model(tie=tie)
    untrained = logits(model, tiny_inputs)
    expected = trained_adapter(model, tiny_processor, tiny_inputs, tmp_path, **way)
    assert not torch.allclose(expected, untrained, atol=1e-2)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)
    assert merged.config.tie_word_embeddings is tie
    assert (merged.lm_head.weight is merged.get_input_embeddings().weight) is tie
    assert merged.config.text_config.use_cache is True
    assert load_processor(str(tmp_path / "merged")).image_token == "<|image_pad|>"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


# A tie changes the output layer alone: each way with one or the other, both where that layer is trained.
@pytest.mark.parametrize(
    ("tie", "way"),
    [*((bool(number % 2), way) for number, way in enumerate(WAYS)), (False, {"train_embeddings": True})],
)
def test_a_merge_into_bfloat16_stays_bfloat16(
    make_tiny_model, tiny_processor, tiny_inputs, tmp_path, way, tie
):
    model = make_tiny_model(tie=tie, dtype=torch.bfloat16)
    trained_adapter(model, tiny_processor, tiny_inputs, tmp_path, **way)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def foreign_adapter(model, inputs, folder, **settings):
    """An adapter made with plain peft, and trained for a step; returns the logits of both together."""
    model.save_pretrained(folder / "base")
    load_processor(str(DEMO_BASE)).save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **settings))
    tuned.save_pretrained(folder / "adapter")
    return logits(tuned, inputs)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["on the input", "on the output", "output in full"],
)
def test_an_adapter_that_parts_tied_embeddings_gives_an_untied_model(
    make_tiny_model, tiny_inputs, tmp_path, settings
):
    """As plain peft allows it: vlcpt itself refuses to train one."""
    expected = foreign_adapter(make_tiny_model(tie=True), tiny_inputs, tmp_path, **settings)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)
    if "modules_to_save" not in settings:  # a copy that was never trained is still the same
        assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
        assert merged.config.tie_word_embeddings is False


def test_an_adapter_with_biases_of_its_own_is_merged_with_them(make_tiny_model, tiny_inputs, tmp_path):
    expected = foreign_adapter(
        make_tiny_model(), tiny_inputs, tmp_path, target_modules=["q_proj", "k_proj"], lora_bias=True
    )

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)


def test_the_sum_is_rounded_once(make_tiny_model, tiny_processor, tiny_inputs, tmp_path):
    """Rounding the product before the sum, as peft does in bfloat16, loses small updates."""
    model = make_tiny_model(dtype=torch.bfloat16)
    trained_adapter(model, tiny_processor, tiny_inputs, tmp_path, lora_r=4, lora_alpha=2)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    pairs = [key for key in adapter if "lora_A" in key]
    assert len(pairs) == 14
    for key in pairs:
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        name = name.replace("model.language_model.", "model.")
        name = name if name in base else name.replace("model.", "model.language_model.", 1)
        product = adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
        expected = (base[name].float() + product * 2 / 4).bfloat16()
        assert torch.equal(merged[name], expected)
        assert not torch.equal(merged[name], base[name])


def test_a_merged_model_is_written_in_shards_of_the_size_asked_for(
    tiny_model, tiny_processor, tiny_inputs, tmp_path
):
    expected = trained_adapter(tiny_model, tiny_processor, tiny_inputs, tmp_path, train_merger=True)

    merge_adapter(tmp_path / "adapter", tmp_path / "merged", max_shard_size="100KB")

    files = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in files for name in load_file(file)}
    assert len(files) > 2
    assert index["weight_map"] == held
    assert held.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    alone = [file for file in files if file.stat().st_size > 110_000]
    assert all(len(load_file(file)) == 1 for file in alone)  # a weight is never cut
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)


def test_the_command_says_how_far_the_logits_are_apart(adapter, tmp_path):
    arguments = [str(tmp_path / "adapter"), str(tmp_path / "merged"), "--max_shard_size", "100KB"]

    done = CliRunner().invoke(app, ["merge", *arguments])

    assert done.exit_code == 0, done.output
    assert re.search(r"differ from the run's by \d\.\de-0\d of their norm \(at most 1e-04", done.output)
    assert f"merged into {tmp_path / 'merged'}" in done.output
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    again = CliRunner().invoke(app, ["merge", *arguments])
    assert again.exit_code == 2
    assert "exists and is not empty" in again.output


def test_a_size_that_is_none_is_an_error(adapter, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size 'huge' is no size"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", max_shard_size="huge")

    assert not (tmp_path / "merged").exists()


def test_the_files_are_those_that_save_pretrained_writes(adapter, tmp_path):
    """Names and types: all but the numbers. The configuration is the base's own."""
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    saved, again = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "again"))
    assert {name: (one.shape, one.dtype) for name, one in saved.items()} == {
        name: (one.shape, one.dtype) for name, one in again.items()
    }


def test_an_adapter_of_a_qlora_run_is_merged_into_the_bases_own_weights_and_says_so(
    tiny_model_dir, tiny_inputs, tmp_path, caplog
):
    run = tmp_path / "run"
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora", lora_r=4))
    model(**tiny_inputs).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    model.save_pretrained(run)
    (run / "config.yaml").write_text(f"model_name_or_path: {tiny_model_dir}\ntuning: qlora\n")
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    expected = logits(PeftModel.from_pretrained(base, run), tiny_inputs)

    with caplog.at_level(logging.INFO, logger="vlcpt"):
        merge_adapter(run, tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, tiny_inputs), expected, atol=1e-4, rtol=1e-4)
    assert merged.lm_head.weight.dtype == merged.model.language_model.layers[0].mlp.up_proj.weight.dtype
    assert "merged into, and compared on, the base's own weights" in caplog.text


def test_a_base_that_is_saved_in_4_bits_is_refused(adapter, tmp_path):
    file = tmp_path / "base" / "config.json"
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    file.write_text(json.dumps(json.loads(file.read_text()) | packed))

    with pytest.raises(ValueError, match=r"base is saved in few bits.*into base_model_name_or_path"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_what_rounding_hides_is_warned_of(make_tiny_model, tiny_processor, tiny_inputs, tmp_path, caplog):
    trained_adapter(
        make_tiny_model(dtype=torch.bfloat16), tiny_processor, tiny_inputs, tmp_path, lora_alpha=1
    )

    merge = merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert 0 < merge.effect < 2 * merge.difference
    assert "hardly more than what rounding to torch.bfloat16 changes" in caplog.text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_merge_leaves_nothing(adapter, tmp_path, monkeypatch, error):
    synced = []

    def fails(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise error

    monkeypatch.setattr("os.fsync", fails)
    expected = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match=r"^$|merged \(the merged model\) could not be written: No space left"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", max_shard_size="100KB")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_disk_that_is_too_full_is_an_error_with_sizes(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())

    with pytest.raises(
        WriteError, match=r"merged \(the merged model\) could not be .* takes about .*B, and 1\.0 kB are free"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize(
    "change",
    [
        lambda found: found | {"base_model.model.extra.lora_A.weight": torch.ones(1)},
        # As an adapter of an older transformers has them: peft itself would load nothing, and warn.
        lambda found: {k.replace("model.language_model.", "model."): v for k, v in found.items()},
    ],
    ids=["unexpected", "old prefix"],
)
def test_an_adapter_with_other_keys_is_not_merged(adapter, tmp_path, change):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)

    with pytest.raises(ValueError, match=r"tensors are not those.*unexpected \("):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_is_not_finite_is_not_merged(adapter, tmp_path):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    found = load_file(file)
    found[next(key for key in found if "lora_B" in key)][0, 0] = float("nan")
    save_file(found, file)

    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors: .*\.weight holds numbers that are not finite"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_nothing_is_written_when_the_logits_differ(adapter, tmp_path, monkeypatch):
    # As if peft had dropped the adapter instead of merging it.
    monkeypatch.setattr(
        "peft.tuners.lora.layer.Linear.get_delta_weight",
        lambda self, _: torch.zeros_like(self.get_base_layer().weight),
    )

    with pytest.raises(ValueError, match=r"differ from the run's by .* Nothing was written"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_the_checked_logits_depend_on_image_and_text(tiny_model):
    before = check_logits(tiny_model)
    with torch.no_grad():
        tiny_model.model.visual.merger.mlp[2].bias.add_(1.0)
    assert ((check_logits(tiny_model) - before).norm() / before.norm()) > max(merging.TOLERANCES.values())


def test_an_adapter_without_one_of_its_tensors_is_not_merged(adapter, tmp_path):
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)

    with pytest.raises(ValueError, match=r"1 missing \("):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert not (tmp_path / "merged").exists()


def test_a_folder_that_is_not_empty_is_not_overwritten(adapter, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        merge_adapter(tmp_path / "adapter", tmp_path / "base")


def test_a_model_that_no_run_made_is_refused_unless_a_type_is_asked_for(tiny_model_dir, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"so the type to write is not known\. Say it with --dtype bfloat16"):
        merge_adapter(tiny_model_dir, tmp_path / "merged")

    merge = merge_adapter(tiny_model_dir, tmp_path / "merged", dtype="bfloat16")

    assert (merge.dtype, merge.effect) == (torch.bfloat16, None)
    saved = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}


def test_a_folder_with_neither_an_adapter_nor_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither an adapter"):
        merge_adapter(tmp_path, tmp_path / "merged")


def test_a_base_that_has_moved_is_an_error_that_says_what_to_correct(adapter, tmp_path):
    name_base(tmp_path / "adapter", "/gone")

    with pytest.raises(ValueError, match=r"adapter_config\.json.*correct base_model_name_or_path.*/gone"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")


def test_a_base_named_relative_to_where_it_was_trained_is_found_from_elsewhere(
    adapter, tmp_path, monkeypatch
):
    """As a run leaves it: the adapter's name starts at the directory of training, config.yaml's at itself."""
    checkpoint = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(tmp_path / "adapter", checkpoint)
    name_base(checkpoint, "base")
    (tmp_path / "out" / "config.yaml").write_text("model_name_or_path: ../base\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    merge_adapter(checkpoint, "merged")

    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "elsewhere" / "merged")


def test_a_base_name_that_may_mean_two_folders_is_an_error_naming_both(adapter, tmp_path, monkeypatch):
    name_base(tmp_path / "adapter", "base")
    shutil.copytree(tmp_path / "base", tmp_path / "elsewhere" / "base")
    monkeypatch.chdir(tmp_path / "elsewhere")

    with pytest.raises(ValueError, match=r"'base' may be .*elsewhere/base or .*/base.*absolute"):
        merge_adapter(tmp_path / "adapter", "merged")


@pytest.mark.slow
def test_a_merge_takes_the_memory_of_about_one_copy_of_the_model():
    """In fresh processes: a model of 2 GiB with the 3B's widths, its vision tower and vocabulary."""
    script = Path(__file__).parents[2] / "benchmarks" / "merge_memory.py"
    with TemporaryDirectory() as folder:  # pytest would keep its own, of 4 GiB
        command = [sys.executable, str(script), "--folder", folder, "--layers", "1"]
        made = subprocess.run([*command, "--make", "1"], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        done = subprocess.run([*command, "--merge", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, found = int(made.stdout.split()[-1]), json.loads(done.stdout.splitlines()[-1])

    assert size > 1.9 * 2**30
    assert found["effect"] > 0  # there was something to merge
    # Beside the copy: the output layer's work, and what the libraries load late. Two copies would be 4 GiB.
    assert found["peak"] - found["libraries"] < size + 0.75 * 2**30


def test_what_a_killed_merge_left_is_removed_by_the_next(adapter, tmp_path):
    before = set(tmp_path.iterdir())
    command = ("tests.model.killed_merge", str(adapter), str(tmp_path / "merged"))
    assert run_module(*command).returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert (left / "model/model.safetensors").is_file()
    (tmp_path / ".merged-of-mine").mkdir()

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    assert set(tmp_path.iterdir()) - before == {tmp_path / "merged", tmp_path / ".merged-of-mine"}


def test_a_second_merge_into_one_output_is_refused_and_names_the_first(adapter, tmp_path):
    with holding(staging_folder(tmp_path / "merged")) as (first, _):
        (staging_folder(tmp_path / "merged") / "model").mkdir()
        with pytest.raises(
            ConfigError, match=rf"^output {tmp_path}/merged is in use by process {first.pid} on host "
        ):
            merge_adapter(tmp_path / "adapter", tmp_path / "merged")
        command = [
            sys.executable,
            "-m",
            "vlcpt",
            "merge",
            str(tmp_path / "adapter"),
            str(tmp_path / "merged"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"output {tmp_path}/merged is in use by process {first.pid} on host " in done.stderr
        assert (staging_folder(tmp_path / "merged") / "model").is_dir()

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")  # when that has ended
    assert not staging_folder(tmp_path / "merged").exists()


def test_what_a_merged_model_takes_is_foreseen_within_a_fifth(adapter, tmp_path, monkeypatch):
    foreseen = []
    monkeypatch.setattr(Writing, "require_room", lambda self: foreseen.append(self.needed))

    merge_adapter(tmp_path / "adapter", tmp_path / "merged")

    written = sum(path.stat().st_size for path in (tmp_path / "merged").iterdir())
    assert len(foreseen) == 1
    assert 0.83 <= foreseen[0] / written <= 1.2
