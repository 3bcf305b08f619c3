"""Interrupted and resumed equals uninterrupted under every engine, and with another number of processes."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.processes import run_on_ranks
from tests.training.layouts import train
from tests.training.resumed_layouts import CONVERTED, FROM_ONE, RUNS, STEPS
from vlcpt import ModelConfig, load_model
from vlcpt.training.checkpoints.files import CheckpointError

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def on_one(folder: Path) -> dict[str, dict[str, object]]:
    """What one process does, uninterrupted; what it saved at half of the way stays."""
    found = {}
    for name, run in FROM_ONE.items():
        found[name] = train(run, folder / f"one {name}", base=str(folder / "base"), processes=1)
        shutil.rmtree(folder / f"one {name}" / f"checkpoint-{STEPS}")
        shutil.copytree(folder / f"one {name}", folder / f"kept {name}")
    return found


@pytest.fixture(scope="module")
def on_two(folder: Path, on_one: object) -> dict[str, list[dict[str, dict[str, object]]]]:
    """What each run did whole and resumed, by its name: on rank 0 and on rank 1."""
    done = run_on_ranks("tests.training.resumed_layouts", str(folder))
    assert done.returncode == 0, done.stdout
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in (0, 1)] for name in RUNS | CONVERTED}


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys() and len(first) > 50
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("name", RUNS | CONVERTED)
def test_interrupted_and_resumed_ends_with_the_losses_and_weights_of_the_whole_run(name, on_two):
    for rank in on_two[name]:
        whole, resumed = rank["whole"], rank["resumed"]
        assert len(whole["losses"]) == STEPS
        assert whole["stage"] == resumed["stage"]
        # state.log_history holds the steps before the interruption as well
        assert resumed["losses"] == whole["losses"]
        assert furthest(whole["weights"], resumed["weights"]) == 0


@pytest.mark.parametrize("name", RUNS)
def test_what_is_saved_at_the_end_is_what_was_trained(name, on_two, folder, tiny_inputs):
    """Read by transformers and peft alone; under ZeRO-3 put together from the parts."""
    expected = on_two[name][0]["resumed"]["weights"]
    run = RUNS[name]
    trained = load_model(ModelConfig(str(folder / "base"), **run.model))
    trained.load_state_dict(expected, strict=False)
    saved = AutoModelForImageTextToText.from_pretrained(
        folder / ("base" if "lora" in name else name), dtype=torch.float32
    )
    if "lora" in name:
        saved = PeftModel.from_pretrained(saved, folder / name)
    inputs = {key: value for key, value in tiny_inputs.items() if key != "labels"}
    with torch.no_grad():
        found, wanted = (model.eval()(**inputs).logits for model in (saved, trained))

    assert torch.equal(found, wanted)
    untrained = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        assert (untrained.eval()(**inputs).logits - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["", f"checkpoint-{STEPS}"])
@pytest.mark.parametrize("name", [name for name in CONVERTED if "full" in name])
def test_a_config_says_the_16_bits_that_deepspeed_saves(name, where, on_two, folder):
    saved = load_file(folder / name / where / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}

    loaded = AutoModelForImageTextToText.from_pretrained(folder / name / where)

    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    weights = on_two[name][0]["resumed"]["weights"]
    assert furthest(weights, loaded.state_dict()) == 0


@pytest.mark.parametrize("name", FROM_ONE)
def test_one_process_goes_on_where_two_stopped_and_the_other_way_round(name, on_one, on_two, folder):
    base = str(folder / "base")
    shutil.rmtree(folder / name / f"checkpoint-{STEPS}")
    fewer = train(RUNS[name], folder / name, base=base, processes=1, resume=True)
    more = torch.load(folder / f"one {name}.0.pt")

    whole = on_one[name]
    for resumed in (fewer, more):
        assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-5)
        assert furthest(resumed["weights"], whole["weights"]) < 1e-4
    assert (fewer["world"], more["world"]) == (1, 2)


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_states_of_an_engine_are_refused_elsewhere_with_the_reason(engine, on_two, folder):
    name = f"{engine} lora"
    assert (folder / name / f"checkpoint-{STEPS}").is_dir()

    with pytest.raises(
        CheckpointError, match=rf"saved with ZeRO-{engine[-1]}, now plain \(keep deepspeed as"
    ):
        train(RUNS[name], folder / name, base=str(folder / "base"), processes=1, resume=True)
