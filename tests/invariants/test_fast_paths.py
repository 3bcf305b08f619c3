"""Every fast path together gives the losses and gradients of the plain one, document by document.

Fast is what a run does by default: packs, attention by documents, logits in chunks, pixels as bytes, a frozen
tower without gradients, activations computed again. Beside these, what a run may ask for: patches embedded by
a linear layer, and features of a frozen tower from a folder. Plain is transformers' own forward pass on each
document alone, with all logits and eager attention; in float64 PyTorch's, for the eager one has a softmax in
float32.
"""

from functools import lru_cache
from itertools import product

import pytest
import torch

from tests.support import (
    TEN,
    Gradients,
    encode_rows,
    largest_deviation,
    make_trainer,
    run_alone,
    weighted_mean,
)
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.model.patch_embedding import is_patchwise
from vlcpt.model.tuning import base_model

KINDS = {
    "images": [one for one in TEN if "images" in one and "videos" not in one],
    "video": [one for one in TEN if "videos" in one],
    "text alone": [one for one in TEN if "images" not in one and "videos" not in one],
    "mixed": TEN,
}
TUNINGS = {
    "lora": {"tuning": "lora", "lora_r": 4},
    "lora, all towers": {"tuning": "lora", "lora_r": 4, "train_merger": True, "train_vision": True},
    "qlora": {"tuning": "qlora", "lora_r": 4},
    "full": {"tuning": "full"},
    "full, all towers": {
        "tuning": "full", "train_merger": True, "train_vision": True, "train_embeddings": True
    },
}  # fmt: skip
DTYPES = {torch.float32: (1e-5, 1e-4), torch.float64: (1e-9, 1e-9)}
PATHS = ("by default", "linear patches", "features kept")


def cases():
    """What trains on what, in which numbers and by which path; those of one plain computation in a row."""
    for kind, (tuning, model), dtype, path in product(KINDS, TUNINGS.items(), DTYPES, PATHS):
        if tuning == "qlora" and dtype == torch.float64:  # four bits are those of float32
            continue
        trains_tower = "train_vision" in model
        if (path == "features kept" and trains_tower) or (path != "by default" and kind == "text alone"):
            continue
        own = "linear patches" if trains_tower else "features kept"  # that of the tests that always run
        runs = kind == "mixed" and (path == "by default" or (path == own and dtype == torch.float32))
        name = f"{kind}-{tuning}-{str(dtype).removeprefix('torch.')}-{path}"
        yield pytest.param(kind, tuning, dtype, path, marks=[] if runs else pytest.mark.slow, id=name)


@pytest.fixture
def exact_casts(monkeypatch):
    """Let a model in float64 compute in it: transformers casts norms and rotations to float32."""
    to, as_float = torch.Tensor.to, torch.Tensor.float

    def kept(tensor, *args, **kwargs):
        narrows = torch.float32 in (*args, kwargs.get("dtype")) and tensor.dtype == torch.float64
        return tensor if narrows else to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", kept)
    monkeypatch.setattr(
        torch.Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else as_float(tensor)
    )


def loaded(folder, attention: str, tuning: str, dtype: torch.dtype):
    model = load_model(
        ModelConfig(str(folder), dtype="float32", attn_implementation=attention, **TUNINGS[tuning])
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: lora_A would have no gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model if dtype == torch.float32 else model.double()


@pytest.fixture(scope="module")
def plain(tiny_model_dir, tiny_processor):
    """A function: loss and gradients of documents one by one. The next tests often have the same."""

    @lru_cache(maxsize=1)
    def computed(kind: str, attention: str, tuning: str, dtype: torch.dtype):
        model = loaded(tiny_model_dir, attention, tuning, dtype)
        samples = encode_rows(KINDS[kind], tiny_processor)
        loss = weighted_mean([run_alone(model, sample) for sample in samples])
        loss.backward()
        return float(loss.detach()), {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    return computed


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("kind", "tuning", "dtype", "path"), cases())
def test_losses_and_gradients_are_those_of_the_plain_path(
    tiny_model_dir, tiny_processor, tmp_path, exact_casts, plain, kind, tuning, dtype, path, batch_size
):
    loss, expected = plain(kind, "eager" if dtype == torch.float32 else "sdpa", tuning, dtype)
    dataset = CPTDataset(KINDS[kind], tiny_processor, max_length=75)
    model, gradients, calls = loaded(tiny_model_dir, "auto", tuning, dtype), Gradients(), []
    base_model(model).model.visual.register_forward_hook(lambda *_: calls.append(len(gradients.steps)))
    keeps = path == "features kept"
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=-(-len(dataset) // batch_size),
        num_train_epochs=2 if keeps else 1,  # the second time from the folder
        max_grad_norm=0,
        learning_rate=0,
        logging_steps=1,
        loss_chunk=5,
        activation_checkpointing=True,
        patch_embedding="linear" if path == "linear patches" else "auto",
        vision_cache=str(tmp_path / "features") if keeps else None,
        callbacks=[gradients],
    )
    trainer.train()

    is_linear = ["forward" in vars(one) for one in model.modules() if is_patchwise(one)]
    assert is_linear == [path == "linear patches"]
    assert set(calls) == (set() if kind == "text alone" else {0})
    of_loss, of_gradients = DTYPES[dtype]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(gradients.steps) == (2 if keeps else 1)
    # Trainer adds losses up in float32.
    assert losses == pytest.approx([loss] * len(losses), rel=max(of_loss, 1e-6))
    for found in gradients.steps:
        # Without media nothing calls the vision tower: Trainer gives it no gradient, or one that is zero.
        is_zero = {name for name in found if name not in expected}
        assert not any(found[name].any() for name in is_zero)
        found = {name: gradient for name, gradient in found.items() if name not in is_zero}
        assert largest_deviation(found, expected) < of_gradients
