"""Invariant 6: save, load, same logits, with vlcpt uninstalled; frozen towers are unchanged."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from tests.published import LAYOUTS
from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model, merge_adapter

FULL_MERGER = {"train_merger": True, "lora_towers": ["language"]}
WAYS = {
    "full": {"tuning": "full", "train_merger": True},
    "full bfloat16": {"tuning": "full", "train_merger": True, "dtype": "bfloat16"},
    "lora": {"tuning": "lora", "lora_r": 4, "train_merger": True, "train_vision": True},
    "lora and a tower in full": {"lora_r": 4, **FULL_MERGER},
    "lora bfloat16": {"lora_r": 4, "dtype": "bfloat16", **FULL_MERGER},
    "qlora": {"tuning": "qlora", "lora_r": 4, **FULL_MERGER},
}
# The largest difference of any logit over the largest logit. A bfloat16 model holds what trained in float32:
# both sides are computed in float32, so that every bit of the saved tensors counts.
TOLERANCE = dict.fromkeys(WAYS, 1e-6) | {"merged": 1e-5}
# A merged model has the type of its base on disk, and so is rounded to 8 bits where that was published.
MERGED_IN_BFLOAT16 = 2e-2

# Reads on each line a folder, and the base of each way that was saved there; writes their logits beside them.
PLAIN = """
import json
import sys
class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vlcpt":
            raise ImportError("vlcpt is uninstalled")
sys.meta_path.insert(0, Uninstalled())

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig


def logits(folder, way, base):
    saved = f"{folder}/{way}"
    AutoProcessor.from_pretrained(saved)
    if "full" in way.split()[:1] or way == "merged":
        model = AutoModelForImageTextToText.from_pretrained(saved, dtype=torch.float32)
    else:
        settings = {"dtype": torch.float32}
        if way == "qlora":
            settings["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.float32,
                llm_int8_skip_modules=["model.visual", "lm_head"],
            )
        model = AutoModelForImageTextToText.from_pretrained(base, **settings)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # rounds scales to bfloat16
                module.support_avx512bf16_for_cpu = False
        model = PeftModel.from_pretrained(model, saved)
    with torch.no_grad():
        return model.eval()(**torch.load(f"{folder}/inputs.pt")).logits

for line in sys.stdin:
    folder, bases = json.loads(line)
    torch.save({way: logits(folder, way, base) for way, base in bases.items()}, f"{folder}/results.pt")
    assert "vlcpt" not in sys.modules
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def bases(layout, tiny_model_dir, make_tiny_model, tiny_processor, tmp_path_factory):
    """The base model's folder, by whether it is stored in bfloat16."""
    if layout != "saved":  # published in bfloat16 alone; read as float32 where that is wanted
        return {False: tiny_model_dir, True: tiny_model_dir}
    folder = tmp_path_factory.mktemp("bfloat16")
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return {False: tiny_model_dir, True: folder}


def load_untrained(bases, way):
    is_bfloat16 = "bfloat16" in way
    settings = {"dtype": "bfloat16" if is_bfloat16 else "float32", **WAYS[way]}
    return load_model(ModelConfig(str(bases[is_bfloat16]), **settings))


def read_tensors(folder):
    """All tensors of a saved model, in one file or several."""
    return {name: one for file in folder.glob("model*.safetensors") for name, one in load_file(file).items()}


@pytest.fixture(scope="module")
def trained(bases, tiny_processor, tiny_inputs, tmp_path_factory):
    """A folder with a saved model of each kind; the logits of each before saving; and the models."""
    folder = tmp_path_factory.mktemp("saved")
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128, packing=False)
    logits, models = {}, {}
    for way in WAYS:
        set_seed(0)
        model = load_untrained(bases, way)
        trainer = make_trainer(
            model, dataset, tiny_processor, folder / way, learning_rate=3e-2, max_steps=3, use_cpu=True
        )
        trainer.train()
        trainer.save_model()
        models[way] = copy.deepcopy(model)
        with torch.no_grad():
            logits[way] = (model.float() if "bfloat16" in way else model).eval()(**tiny_inputs).logits
    merge_adapter(folder / "lora", folder / "merged")
    logits["merged"] = logits["lora"]
    return folder, logits, models


@pytest.fixture(scope="module")
def plain_process():
    """A process that cannot import vlcpt; one for all layouts, as most of its time is imports."""
    with subprocess.Popen(
        [sys.executable, "-I", "-c", PLAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture(scope="module")
def reloaded(trained, bases, tiny_inputs, plain_process):
    """The logits of each saved model in a process that cannot import vlcpt."""
    folder, logits, _ = trained
    torch.save(tiny_inputs, folder / "inputs.pt")
    base_of = {way: str(bases["bfloat16" in way]) for way in logits}
    plain_process.stdin.write(json.dumps([str(folder), base_of]) + "\n")
    plain_process.stdin.flush()
    assert plain_process.stdout.readline() == "saved\n"  # or it ended, and its error is among the output
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("way", [*WAYS, "merged"])
def test_the_saved_model_has_the_same_logits_without_vlcpt(trained, reloaded, layout, way):
    _, logits, _ = trained
    is_rounded = way == "merged" and layout != "saved"

    difference = (reloaded[way] - logits[way]).abs().max() / logits[way].abs().max()

    assert difference <= (MERGED_IN_BFLOAT16 if is_rounded else TOLERANCE[way])


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("way", WAYS)
def test_training_changed_the_logits(trained, bases, tiny_inputs, way):
    """Or the comparison above proves nothing."""
    _, logits, _ = trained
    untrained = load_untrained(bases, way)
    with torch.no_grad():
        before = untrained.eval()(**tiny_inputs).logits.float()

    difference = (logits[way] - before).abs().max() / before.abs().max()

    assert difference > 0.1


@pytest.mark.parametrize(
    ("layout", "way"),
    [("saved", "full"), *((layout, "full bfloat16") for layout in ("saved", "3B", "7B"))],
    indirect=["layout"],
)
def test_a_frozen_tower_is_saved_as_it_was(trained, bases, way):
    folder, _, _ = trained
    unchanged, changed = set(), set()
    before, after = read_tensors(bases["bfloat16" in way]), read_tensors(folder / way)
    assert before.keys() == after.keys()
    for name, first in before.items():
        second = after[name]
        is_same = first.dtype == second.dtype and torch.equal(first, second)
        (unchanged if is_same else changed).add(name)
        assert is_same or second.dtype == torch.float32

    assert unchanged == {name for name in unchanged | changed if "visual" in name and "merger" not in name}
    assert any("merger" in name for name in changed)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("way", [way for way in WAYS if "lora" in way])
def test_the_base_under_an_adapter_is_unchanged(trained, bases, way):
    _, _, models = trained
    untrained = load_untrained(bases, way)
    before = dict(untrained.named_parameters())
    frozen = {name: p for name, p in models[way].named_parameters() if not p.requires_grad}

    assert len(frozen) > 30
    # As bytes: packed in 4 bits and read as float32, many are no numbers, which never equal themselves.
    assert all(torch.equal(p.view(torch.uint8), before[name].view(torch.uint8)) for name, p in frozen.items())


@pytest.mark.parametrize("layout", ["saved"], indirect=True)
def test_a_saved_run_holds_nothing_pickled(trained):
    folder, logits, _ = trained

    for way in logits:
        assert not list((folder / way).rglob("training_args.bin"))
