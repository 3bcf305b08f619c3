"""The patch embedding as a linear layer: equal to the convolution, chosen by measurement on GPUs alone."""

import copy

import pytest
import torch
from torch import nn

from tests.support import FOUR, Gradients, largest_deviation, make_trainer
from vlcpt import CPTConfig, CPTDataset, ModelConfig, load_model
from vlcpt.errors import ConfigError
from vlcpt.model import patch_embedding
from vlcpt.model.patch_embedding import Timing, choose_form, embed_patches, is_patchwise, measure
from vlcpt.training.loss import target_losses

CUDA = torch.device("cuda")  # only named: nothing here runs on one


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Conv3d(3, 32, (2, 14, 14), stride=(2, 14, 14), bias=False)


def forms(model: nn.Module, inputs: torch.Tensor) -> list[list[torch.Tensor]]:
    """What each form gives of inputs: the output, and the gradient of the weight."""
    found = []
    for form in ("conv", "linear"):
        embed_patches(model, form)
        out = model(inputs)
        (gradient,) = torch.autograd.grad(out.square().mean(), list(model.parameters()))
        found.append([out.detach(), gradient])
    return found


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found.double() - exact.double()).abs().max() / exact.abs().max())


def test_both_forms_are_the_same_product(layer):
    patches = torch.randn(40, 3, 2, 14, 14)
    plain, fast = forms(layer.double(), patches.double())

    assert (
        [one.shape for one in fast] == [one.shape for one in plain] == [(40, 32, 1, 1, 1), layer.weight.shape]
    )
    assert all(distance(b, a) < 1e-13 for a, b in zip(plain, fast, strict=True))


def test_in_float32_the_linear_form_is_exact_to_a_millionth_and_no_worse_than_the_convolution(layer):
    """The convolution of CPUs is off by up to 1.4e-6 at the published shape, this by 3.5e-7."""
    patches = torch.randn(40, 3, 2, 14, 14)
    plain, fast = forms(layer, patches)
    exact, _ = forms(layer.double(), patches.double())

    for a, b, right in zip(plain, fast, exact, strict=True):
        assert distance(b, right) <= 1e-6
        assert distance(b, right) <= 1.1 * distance(a, right)


def test_under_autocast_both_forms_compute_in_its_type(layer):
    """On some CPUs the gradient of a convolution is off by three steps of bfloat16."""
    patches = torch.randn(40, 3, 2, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        plain, fast = forms(layer, patches)
    exact, _ = forms(layer.double(), patches.double())

    assert plain[0].dtype == fast[0].dtype == torch.bfloat16
    assert plain[1].dtype == fast[1].dtype == torch.float32
    for a, b, right in zip(plain, fast, exact, strict=True):
        step, of_convolution = 2**-8 * float(right.abs().max()), float((a - right).abs().max())
        assert float((b - right).abs().max()) <= max(step, 1.1 * of_convolution)


WAYS = {
    "frozen": {"lora_r": 4},
    "with adapters": {"lora_r": 4, "train_vision": True, "train_merger": True},
    "beside adapters": {"lora_r": 4, "train_vision": True, "lora_towers": ["language"]},
    "in full": {"tuning": "full", "train_vision": True, "train_merger": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_has_the_same_loss_and_gradients_in_both_forms(
    tiny_model_dir, tiny_processor, tmp_path, way, bf16
):
    steps, losses = [], []
    for form in ("conv", "linear"):
        model = load_model(ModelConfig(str(tiny_model_dir), **WAYS[way]), seed=1)
        dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
        kept = Gradients()
        settings = {"max_steps": 1, "gradient_accumulation_steps": 4, "patch_embedding": form}
        trainer = make_trainer(
            model, dataset, tiny_processor, tmp_path / form, callbacks=[kept], bf16=bf16, **settings
        )
        losses.append(trainer.train().training_loss)
        steps.append(kept.steps[0])

    plain, fast = steps
    assert any("patch_embed" in name for name in plain) == (way in ("beside adapters", "in full"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if bf16 else 1e-5)
    if not bf16:  # where rounding alone may move a gradient that is nearly zero
        assert largest_deviation(fast, plain) < 1e-4


def test_the_form_is_a_property_of_the_model_in_memory_and_never_saved(tiny_model, tmp_path):
    names = list(tiny_model.state_dict())
    embed_patches(tiny_model, "linear")

    assert list(tiny_model.state_dict()) == names
    tiny_model.save_pretrained(tmp_path)
    fresh = type(tiny_model).from_pretrained(tmp_path)
    (layer,) = filter(is_patchwise, fresh.modules())
    assert "forward" not in vars(layer)


def test_a_copy_of_a_model_uses_its_own_weight(layer):
    embed_patches(layer, "linear")
    copied = copy.deepcopy(layer)
    copied.weight.data.zero_()

    assert not copied(torch.ones(1, 3, 2, 14, 14)).any()
    assert layer(torch.ones(1, 3, 2, 14, 14)).any()


def test_the_convolution_comes_back(layer):
    embed_patches(layer, "linear")
    assert "forward" in vars(layer)

    embed_patches(layer, "conv")

    assert "forward" not in vars(layer)


def test_what_is_no_row_of_patches_is_convolved(layer):
    picture = torch.randn(1, 3, 2, 28, 28)
    expected = layer(picture)
    embed_patches(layer, "linear")

    assert torch.equal(layer(picture), expected)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv3d(3, 8, 2),  # its windows overlap
        nn.Conv3d(3, 8, 2, stride=2, padding=1),
        nn.Conv3d(4, 8, 2, stride=2, groups=2),
        nn.Conv2d(3, 8, 2, stride=2),
    ],
)
def test_another_convolution_is_left_alone(other):
    embed_patches(other, "linear")

    assert not is_patchwise(other)
    assert "forward" not in vars(other)


def test_a_hook_of_the_layer_still_runs(layer):
    """ZeRO-3 gathers the weight in one."""
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    embed_patches(layer, "linear")

    layer(torch.ones(5, 3, 2, 14, 14))

    assert seen == [(5, 3, 2, 14, 14)]


# --- the choice ---


def test_linear_runs_where_it_is_clearly_faster():
    assert Timing(conv=0.010, linear=0.001).faster == "linear"
    assert Timing(conv=float("inf"), linear=0.001).faster == "linear"  # there is no convolution
    assert Timing(conv=0.00105, linear=0.001).faster == "conv"
    assert Timing(conv=0.001, linear=0.010).faster == "conv"


def test_on_a_cpu_nothing_is_measured_or_changed(tiny_model, tiny_processor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(patch_embedding, "measure", None)
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)

    make_trainer(tiny_model, dataset, tiny_processor, tmp_path, max_steps=1).train()

    (layer,) = filter(is_patchwise, tiny_model.modules())
    assert "forward" not in vars(layer)
    assert "patch embedding" not in capsys.readouterr().out


@pytest.mark.parametrize(("conv", "form"), [(0.5, "linear"), (0.0001, "conv")])
def test_on_a_gpu_the_faster_one_is_chosen_and_named(tiny_model, monkeypatch, conv, form):
    asked = []

    def measured(*given: object, **options: object) -> Timing:
        asked.append((given, options))
        return Timing(conv=conv, linear=0.00025)

    monkeypatch.setattr(patch_embedding, "measure", measured)

    choice = choose_form(tiny_model.requires_grad_(False), "auto", CUDA, torch.bfloat16)

    assert asked == [((CUDA, torch.bfloat16, (32, 3, 2, 14, 14)), {"trains": False})]
    assert choice.form == form
    assert choice.reason == (
        f"patch embedding: {form}; 2,048 patches take {conv * 1e3:.3g} ms as Conv3d and 0.25 ms as the equal "
        "linear layer here"
    )


def test_the_key_turns_the_measurement_off(tiny_model, monkeypatch):
    monkeypatch.setattr(patch_embedding, "measure", None)

    for form in ("conv", "linear"):
        choice = choose_form(tiny_model, form, CUDA, torch.bfloat16)
        assert choice == (form, f"patch embedding: {form}, as configured")


@pytest.mark.parametrize("trains", [False, True])
def test_both_forms_are_measured_without_touching_the_runs_random_numbers(trains):
    before = torch.get_rng_state()

    found = measure(torch.device("cpu"), torch.float32, (32, 3, 2, 14, 14), trains=trains, patches=64)

    assert found.conv > 0
    assert found.linear > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_machine_without_a_convolution_of_the_type_gets_the_linear_layer(monkeypatch):
    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    monkeypatch.setattr(patch_embedding, "conv3d", missing)

    assert measure(torch.device("cpu"), torch.float32, (8, 3, 2, 14, 14), trains=False, patches=8).faster == (
        "linear"
    )


def test_the_start_says_what_runs(tiny_model, tiny_processor, tmp_path, capsys):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    make_trainer(tiny_model, dataset, tiny_processor, tmp_path, max_steps=1, patch_embedding="linear").train()

    assert "patch embedding: linear, as configured" in capsys.readouterr().out


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError, match=r"patch_embedding 'fast' is none of its choices: auto, conv, "):
        CPTConfig("out", use_cpu=True, patch_embedding="fast")


def test_a_frozen_tower_keeps_no_patches_for_a_backward_pass(tiny_model, tiny_inputs):
    """As the convolution: a saved copy of the pixels would cost memory in every batch."""
    embed_patches(tiny_model.requires_grad_(False), "linear")
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: sizes.append(one.shape), lambda one: one):
        target_losses(tiny_model, tiny_inputs)

    assert sizes == []
