"""Tests of vlcpt/training/loss.py."""

import sys
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.support import FOUR, encode_rows, largest_deviation, run_alone
from vlcpt import CPTDataCollator, ModelConfig, load_model
from vlcpt.model.tuning import apply_tuning, base_model
from vlcpt.training import loss as loss_module
from vlcpt.training.loss import chunked_nll, target_losses, total_weight, warn_of_hooks


class Table(nn.Module):
    """A model whose logits at a place depend on the token there alone."""

    def __init__(self, size=8):
        super().__init__()
        self.logits = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        self.kept = 0

    def forward(self, input_ids, logits_to_keep):
        self.kept += int(logits_to_keep.sum())
        return SimpleNamespace(logits=self.logits[input_ids[logits_to_keep]])


INPUTS = {
    "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]]),
    "labels": torch.tensor([[-100, 2, -100, 4], [-100, -100, 7, -100]]),
    "loss_weights": torch.tensor([[0, 0.5, 0, 1], [0, 0, 3, 0]]),
}


def test_a_target_is_predicted_from_the_token_before_it():
    model = Table()

    losses = target_losses(model, INPUTS)

    log = model.logits.log_softmax(1)
    assert losses.nll == pytest.approx([-float(log[1, 2]), -float(log[3, 4]), -float(log[6, 7])])
    assert losses.ids.tolist() == [2, 4, 7]
    assert losses.rows.tolist() == [0, 0, 1]
    assert losses.weights.tolist() == [0.5, 1, 3]
    assert model.kept == 3


def test_without_loss_weights_each_target_weighs_1():
    inputs = {key: value for key, value in INPUTS.items() if key != "loss_weights"}

    assert target_losses(Table(), inputs).weights.tolist() == [1, 1, 1]
    assert float(total_weight(inputs)) == 3


def test_the_total_weight_leaves_out_a_label_that_nothing_precedes():
    labels = INPUTS["labels"].clone()
    labels[:, 0] = 1
    weights = INPUTS["loss_weights"].clone()
    weights[:, 0] = 100

    assert float(total_weight({"labels": labels, "loss_weights": weights})) == 4.5


def test_a_batch_without_targets_has_no_losses():
    inputs = INPUTS | {"labels": torch.full((2, 4), -100)}

    assert len(target_losses(Table(), inputs).nll) == 0
    assert float(total_weight(inputs)) == 0


def test_bfloat16_logits_are_scored_in_float32():
    model = Table()
    model.logits = model.logits.bfloat16()

    losses = target_losses(model, INPUTS)

    assert losses.nll.dtype == torch.float32
    assert losses.nll[0] == -model.logits.float().log_softmax(1)[1, 2]


def test_a_real_model_gives_the_losses_of_its_full_logits(tiny_model, tiny_processor):
    samples = encode_rows(FOUR, tiny_processor)
    with torch.no_grad():
        losses = target_losses(tiny_model, CPTDataCollator(tiny_processor)(samples))
        alone = [run_alone(tiny_model, sample) for sample in samples]

    assert torch.allclose(losses.nll, torch.cat([one.nll for one in alone]), atol=1e-4)
    assert torch.equal(losses.weights, torch.cat([one.weights for one in alone]))
    assert len(losses.nll) == 63


HEADS = {
    "frozen": {"tuning": "lora"},
    "trained": {"tuning": "full", "train_embeddings": True},
    "trained beside adapters": {"tuning": "lora", "train_embeddings": True},
    "with adapters": {"tuning": "lora", "lora_target_modules": ["lm_head", "q_proj"]},
    "with DoRA": {"tuning": "lora", "lora_target_modules": ["lm_head", "q_proj"], "use_dora": True},
}


def losses_and_gradients(model, batch, chunk):
    model.zero_grad()
    losses = target_losses(model, batch, chunk)
    (losses.nll * losses.weights).sum().backward()
    return losses, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("head", "tied"),
    # Adapters on tied heads are refused: merging them would give other logits.
    [*((head, False) for head in HEADS), *((head, True) for head in list(HEADS)[:3])],
)
@pytest.mark.parametrize("chunk", [1, 5, 63, 1000])
def test_chunks_give_the_losses_and_gradients_of_all_logits_at_once(
    make_tiny_model, tiny_processor, tmp_path, head, tied, dtype, chunk
):
    make_tiny_model(tie=tied).save_pretrained(tmp_path)
    model = load_model(ModelConfig(str(tmp_path), dtype="float32", **HEADS[head])).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, so that lora_A would have no gradient
            torch.nn.init.normal_(parameter, std=0.02)
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))

    plain, expected = losses_and_gradients(model, batch, 0)
    losses, gradients = losses_and_gradients(model, batch, chunk)

    exact = 1e-9 if dtype == torch.float64 else 1e-5
    assert losses.nll.dtype == dtype
    assert torch.allclose(losses.nll, plain.nll, rtol=exact, atol=0)
    assert any("lm_head" in name or "embed_tokens" in name for name in gradients) == (head != "frozen")
    assert largest_deviation(gradients, expected) < 10 * exact


@pytest.mark.parametrize("head", ["frozen", "trained", "with adapters"])
def test_logits_of_no_more_than_a_chunk_are_made(tiny_model_dir, tiny_processor, monkeypatch, head):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", **HEADS[head]))
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))
    seen = []
    for name in ("_nll", "_nll_and_normaliser", "_logit_gradient"):
        original = getattr(loss_module, name)

        def watched(logits, *rest, original=original):
            seen.append(len(logits))
            return original(logits, *rest)

        monkeypatch.setattr(loss_module, name, watched)

    target_losses(model, batch, 10).nll.sum().backward()

    assert max(seen) == 10
    assert sum(seen) >= 2 * 63  # forward and backward


def test_a_frozen_head_keeps_no_logits_for_the_backward_pass(tiny_model_dir, tiny_processor):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32"))
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))
    wide = model.config.text_config.vocab_size
    kept = []

    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        target_losses(model, batch, 10)

    assert kept
    assert not [one.shape for one in kept if wide in one.shape]


@pytest.fixture
def cut(monkeypatch):
    """Marks a layer as ZeRO-3 does, with hooks of its parts; what is registered, and the calls of hooks."""
    registered, calls = [], []
    zero = SimpleNamespace(register_external_parameter=lambda layer, one: registered.append((layer, one)))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))

    def cut(layer):
        for number, parameter in enumerate(layer.parameters()):
            parameter.ds_id = number
        for part in layer.modules():
            part.register_forward_pre_hook(lambda part, inputs: calls.append(part))
            part.register_forward_hook(lambda part, inputs, output: calls.append(part))
        return registered, calls

    return cut


@pytest.mark.parametrize("head", ["with adapters", "with DoRA"])
@pytest.mark.parametrize("targets", [0, 4, 63])
def test_parts_that_zero_3_cut_are_gathered_by_the_layer_once_and_never_by_themselves(
    tiny_model_dir, tiny_processor, cut, head, targets
):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", **HEADS[head]))
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))
    so_far = batch["labels"].ne(-100).flatten().cumsum(0).view_as(batch["labels"])
    batch["labels"][so_far > targets] = -100
    plain, expected = losses_and_gradients(model, batch, 0)
    layer = model.get_output_embeddings()
    registered, calls = cut(layer)

    losses, gradients = losses_and_gradients(model, batch, 5)

    assert len(losses.nll) == targets
    assert torch.allclose(losses.nll, plain.nll, rtol=1e-5, atol=0)
    assert largest_deviation(gradients, expected) < 1e-4
    assert {id(one) for _, one in registered} == {id(one) for one in layer.parameters()}
    assert {of for of, _ in registered} == {layer}
    assert calls == [layer, layer]  # before and after; in the backward pass its output and input say so
    layer(torch.zeros(1, layer.in_features))
    assert len(calls) > 4  # the hooks are there again


def test_a_head_in_4_bits_is_scored_in_chunks(tiny_model, tiny_processor):
    """As vlcpt loads none, but others may."""
    from bitsandbytes.nn import Linear4bit

    wide, high = tiny_model.lm_head.weight.shape[1], tiny_model.lm_head.weight.shape[0]
    head = Linear4bit(wide, high, bias=False, compute_dtype=torch.float32)
    head.load_state_dict(tiny_model.lm_head.state_dict())
    tiny_model.lm_head = head.to("cpu")
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))

    plain, expected = losses_and_gradients(tiny_model, batch, 0)
    losses, gradients = losses_and_gradients(tiny_model, batch, 5)

    assert not tiny_model.lm_head.weight.is_floating_point()
    assert torch.allclose(losses.nll, plain.nll, rtol=1e-5, atol=0)
    assert largest_deviation(gradients, expected) < 1e-4


@pytest.mark.parametrize("head", ["frozen", "trained", "with adapters"])
def test_a_batch_without_targets_gives_every_trained_weight_a_zero_gradient(
    tiny_model_dir, tiny_processor, head
):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", **HEADS[head]))
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))
    batch["labels"][:] = -100

    losses, gradients = losses_and_gradients(model, batch, 10)

    assert len(losses.nll) == 0
    assert gradients
    assert not any(one.any() for one in gradients.values())


def test_the_layer_gives_logits_again_after_an_error(tiny_model, tiny_processor):
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))

    with pytest.raises(TypeError):
        target_losses(tiny_model, batch | {"use_cache": False, "no_such_argument": 1, "input_ids": None}, 10)

    assert "forward" not in vars(tiny_model.lm_head)


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_under_autocast_chunks_are_as_exact_as_all_logits_at_once(tiny_model_dir, tiny_processor, head):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32", **HEADS[head]))
    batch = CPTDataCollator(tiny_processor)(encode_rows(FOUR, tiny_processor))
    _, exact = losses_and_gradients(model, batch, 0)

    with torch.autocast("cpu", torch.bfloat16):
        plain, of_plain = losses_and_gradients(model, batch, 0)
        losses, gradients = losses_and_gradients(model, batch, 10)

    assert torch.allclose(losses.nll, plain.nll, rtol=1e-6)
    assert largest_deviation(gradients, exact) < 2 * largest_deviation(of_plain, exact)


def in_16_bits(head, dtype, scale, chunk):
    """Gradients of a head of 16 bits by itself; of all logits at once in float64 where the type is None."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 600, bias=False).requires_grad_(head == "trained")
    nn.init.normal_(layer.weight, std=0.02)
    hidden, ids = torch.randn(200, 96), torch.randint(600, (200,))
    model = nn.Sequential(OrderedDict(head=layer))
    if head not in ("frozen", "trained"):
        config = LoraConfig(r=8, target_modules=["head"], use_dora=head == "with DoRA")
        layer = get_peft_model(model, config).base_model.model.head
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    rounded, compute = dtype
    layer.to(rounded).to(compute)
    hidden = hidden.to(rounded).to(compute).requires_grad_()
    if chunk:
        nll = chunked_nll(layer, hidden, ids, chunk, layer.forward)
    else:
        logits = layer(hidden)
        wide = logits if compute == torch.float64 else logits.float()
        nll = nn.functional.cross_entropy(wide, ids, reduction="none")
    (nll.mean() * scale).backward()
    found = {name: one.grad for name, one in layer.named_parameters() if one.grad is not None}
    return {name: one.double() / scale for name, one in {"hidden": hidden.grad, **found}.items()}


def errors(gradients, exact):
    return {name: float((one - exact[name]).norm()) for name, one in gradients.items()}


@pytest.mark.parametrize(
    ("head", "most"),
    [("frozen", 1.15), ("trained", 1.3)],
)
@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 1), (torch.float16, 1024), (torch.float16, 65536)]
)
def test_in_16_bits_chunks_are_as_exact_as_all_logits_at_once(head, most, dtype, scale):
    exact = in_16_bits(head, (dtype, torch.float64), scale, 0)
    of_plain = errors(in_16_bits(head, (dtype, dtype), scale, 0), exact)

    of_chunks = errors(in_16_bits(head, (dtype, dtype), scale, 16), exact)

    assert min(of_plain.values()) > 0
    ratios = {name: one / of_plain[name] for name, one in of_chunks.items()}
    assert max(ratios.values()) < most, ratios


@pytest.mark.parametrize("chunk", [16, 1000])
def test_dropout_in_the_head_draws_the_same_when_logits_are_made_again(chunk):
    model = nn.Sequential(OrderedDict(head=nn.Linear(24, 60, bias=False)))
    layer = get_peft_model(
        model, LoraConfig(r=4, target_modules=["head"], lora_dropout=0.5)
    ).base_model.model.head
    nn.init.normal_(layer.lora_B["default"].weight)
    hidden, ids = torch.randn(50, 24, dtype=torch.float64, requires_grad=True), torch.randint(60, (50,))
    layer.double()

    def scored(moved):
        torch.manual_seed(3)
        nll = chunked_nll(layer, hidden + moved, ids, chunk, layer.forward).sum()
        torch.rand(7)
        return nll

    toward = torch.randn_like(hidden)
    (slope,) = torch.autograd.grad(scored(0), hidden)
    with torch.no_grad():
        measured = (scored(1e-6 * toward) - scored(-1e-6 * toward)) / 2e-6
    assert float((slope * toward).sum()) == pytest.approx(float(measured), rel=1e-5)


def note(module, args, output):
    """A hook of a user."""


@pytest.mark.parametrize(
    ("chunk", "hook", "warns"),
    [(128, note, True), (0, note, False), (128, nn.functional.dropout, False)],
    ids=["a user's", "all at once", "a library's"],
)
def test_a_hook_that_would_get_losses_for_logits_is_warned_of(tiny_model, caplog, chunk, hook, warns):
    tiny_model.lm_head.register_forward_hook(hook)

    warn_of_hooks(tiny_model, chunk)

    assert [one.getMessage() for one in caplog.records if "(note)" in one.getMessage()] == caplog.messages
    assert ("Set loss_chunk: 0" in caplog.text) == warns


def test_a_hook_on_a_trained_copy_of_the_output_layer_is_warned_of(make_tiny_model, caplog):
    model = apply_tuning(make_tiny_model(), ModelConfig("base", train_embeddings=True))
    for name, layer in model.named_modules():
        if name.endswith("lm_head.modules_to_save.default"):
            layer.register_forward_hook(note)

    warn_of_hooks(base_model(model), 128)

    assert "(note)" in caplog.text
