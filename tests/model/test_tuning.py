"""Tests of vlcpt/model/tuning.py."""

import copy
import pickle
import re

import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode

from tests.model.changing import logits, one_step
from vlcpt.config.schema import ModelConfig
from vlcpt.data.families import TOWERS, is_embedding, tower_of
from vlcpt.model.tuning import apply_tuning, base_model, limit_checkpointing, parameter_groups, tower_table

WAYS = [
    {"tuning": "full"},
    {"tuning": "full", "train_language": False, "train_merger": True},
    {"tuning": "full", "train_vision": True, "train_merger": True, "train_language": False},
    {"tuning": "full", "train_language": False, "train_embeddings": True},
    {"tuning": "lora"},
    {"tuning": "lora", "train_merger": True, "train_vision": True},
    {"tuning": "lora", "train_merger": True, "lora_towers": ["language"]},
    {"tuning": "lora", "train_vision": True, "lora_towers": ["language"]},
    {"tuning": "lora", "train_vision": True, "lora_towers": ["vision"]},
    {"tuning": "lora", "train_embeddings": True},
    {"tuning": "lora", "use_dora": True, "use_rslora": True, "train_merger": True},
]
IDS = [" ".join(f"{key}={value}" for key, value in way.items()) for way in WAYS]


def trained_towers(way):
    language = way.get("train_language", True)
    flags = {"vision": way.get("train_vision"), "merger": way.get("train_merger"), "language": language}
    return {tower for tower, flag in flags.items() if flag}


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_step_changes_the_chosen_towers_and_nothing_else(make_tiny_model, tiny_inputs, way, tie):
    model = apply_tuning(make_tiny_model(tie=tie), ModelConfig("base", **way))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    one_step(model, tiny_inputs)

    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    towers = {tower_of(name) for name in changed if not is_embedding(name)}
    assert towers == trained_towers(way)
    trains_language_in_full = way["tuning"] == "full" and "language" in trained_towers(way)
    in_full_beside_lora = way.get("lora_towers") == ["vision"]
    assert any(is_embedding(name) for name in changed) == (
        bool(way.get("train_embeddings")) or trains_language_in_full or in_full_beside_lora
    )
    # Every trained parameter moves: none is cut off from the loss. A new adapter's A has no gradient yet.
    stuck = {n for n, p in model.named_parameters() if p.requires_grad and n not in changed}
    assert all(".lora_A." in name for name in stuck)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_trained_parameters_are_float32_and_frozen_ones_keep_bfloat16(
    make_tiny_model, tiny_inputs, way, autocast
):
    model = apply_tuning(make_tiny_model(dtype=torch.bfloat16), ModelConfig("base", **way))

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = one_step(model, tiny_inputs)

    assert loss > 0
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}


def test_towers_of_two_types_also_stand_side_by_side_with_adapters_off(make_tiny_model, tiny_inputs):
    model = make_tiny_model(dtype=torch.bfloat16)
    original = logits(model, tiny_inputs)
    way = {"train_merger": True, "train_vision": True, "train_embeddings": True, "lora_towers": ["language"]}
    model = apply_tuning(model, ModelConfig("base", **way))
    one_step(model, tiny_inputs)
    assert not torch.equal(logits(model, tiny_inputs).float(), original.float())

    with model.disable_adapter():
        off = logits(model, tiny_inputs)

    assert torch.equal(off, original)


@pytest.mark.parametrize("way", [way for way in WAYS if way["tuning"] == "lora"])
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_a_saved_adapter_gives_equal_logits_when_peft_alone_loads_it(
    make_tiny_model, tiny_inputs, tmp_path, way, tie
):
    base = make_tiny_model(tie=tie)
    base.save_pretrained(tmp_path / "base")
    untouched = copy.deepcopy(base)
    model = apply_tuning(base, ModelConfig("base", **way))
    one_step(model, tiny_inputs)
    trained = logits(model, tiny_inputs)
    model.save_pretrained(tmp_path / "adapter")

    reloaded = PeftModel.from_pretrained(untouched, tmp_path / "adapter")

    assert torch.equal(logits(reloaded, tiny_inputs), trained)
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded, tiny_inputs), trained, atol=1e-3)


def test_tied_embeddings_stay_tied_when_they_train_beside_adapters(make_tiny_model, tiny_inputs):
    model = apply_tuning(make_tiny_model(tie=True), ModelConfig("base", train_embeddings=True))
    embeddings = [
        n for n, p in model.named_parameters(remove_duplicate=False) if is_embedding(n) and p.requires_grad
    ]

    one_step(model, tiny_inputs)

    base = base_model(model)
    assert len(embeddings) == 2  # or the next line compares nothing
    assert base.lm_head.weight is base.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_refused_with_what_to_do_instead(make_tiny_model, name):
    with pytest.raises(ValueError, match=f"{name}.*shares its weight.*train_embeddings: true trains both"):
        apply_tuning(make_tiny_model(tie=True), ModelConfig("base", lora_target_modules=["q_proj", name]))


@pytest.mark.parametrize(
    ("towers", "names", "expected"),
    [
        ({}, ["gate_proj"], {("language", "gate_proj")}),
        ({"train_vision": True, "train_language": False}, ["attn.proj"], {("vision", "proj")}),
        ({"train_merger": True, "train_language": False}, ["mlp.2"], {("merger", "2")}),
        ({"train_vision": True}, ["gate_proj"], {("vision", "gate_proj"), ("language", "gate_proj")}),
        ({}, ["layers.1.self_attn.q_proj", "lm_head"], {("language", "q_proj"), ("language", "lm_head")}),
    ],
)  # fmt: skip
def test_adapters_by_name_stay_inside_the_chosen_towers(tiny_model, towers, names, expected):
    model = apply_tuning(tiny_model, ModelConfig("base", lora_target_modules=names, **towers))

    layers = {re.sub(r"\.lora_.*", "", name) for name, p in model.named_parameters() if p.requires_grad}
    assert {(tower_of(layer), layer.split(".")[-1]) for layer in layers} == expected
    if "layers.1.self_attn.q_proj" in names:
        assert not any(".layers.0." in layer for layer in layers)


def test_a_layer_name_that_matches_nothing_is_an_error_naming_the_nearest(tiny_model):
    with pytest.raises(
        ValueError, match=r"'q_porj', which matches no layer of language.*nearest is 'q_proj'"
    ):
        apply_tuning(tiny_model, ModelConfig("base", lora_target_modules=["v_proj", "q_porj"]))


def test_a_layer_of_another_tower_matches_nothing(tiny_model):
    with pytest.raises(ValueError, match=r"'attn\.qkv', which matches no layer of language"):
        apply_tuning(tiny_model, ModelConfig("base", lora_target_modules=["q_proj", "attn.qkv"]))


def test_a_trained_tower_left_without_adapters_is_an_error(tiny_model):
    with pytest.raises(
        ValueError, match=r"no layer of the merger tower.*such as 'model.visual.merger.mlp.0'"
    ):
        apply_tuning(tiny_model, ModelConfig("base", train_merger=True, lora_target_modules=["q_proj"]))


def count_vision_calls(model):
    """Count how often the first vision block's attention runs forward, and how often backward."""
    calls = {"forward": 0, "backward": 0}

    def on_backward(_):
        calls["backward"] += 1

    def on_forward(module, args, output):
        calls["forward"] += 1
        if output.requires_grad:
            output.register_hook(on_backward)

    # Inside the block, so that a run repeated by checkpointing is seen as well.
    base_model(model).model.visual.blocks[0].attn.register_forward_hook(on_forward)
    return calls


FROZEN_VISION = [way for way in WAYS if not way.get("train_vision")]


@pytest.mark.parametrize("way", FROZEN_VISION, ids=[IDS[WAYS.index(way)] for way in FROZEN_VISION])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_a_frozen_vision_tower_runs_forward_once_and_backward_never(
    tiny_model, tiny_inputs, way, checkpointing
):
    model = apply_tuning(tiny_model, ModelConfig("base", **way))
    if checkpointing:
        model.activation_checkpointing_enable()
        limit_checkpointing(model)
    calls = count_vision_calls(model)

    one_step(model, tiny_inputs)

    assert calls == {"forward": 1, "backward": 0}


def kept_of_the_tower(model, inputs):
    """Bytes of each tensor that autograd keeps while the vision tower and the merger run."""
    visual, kept, hooks = base_model(model).model.visual, [], []

    def note(tensor):
        kept.append(tensor.nbytes)
        return tensor

    def begin(module, args, kwargs):
        hooks.append(torch.autograd.graph.saved_tensors_hooks(note, lambda one: one))
        hooks[-1].__enter__()

    def end(module, args, output):
        hooks.pop().__exit__(None, None, None)

    visual.register_forward_pre_hook(begin, with_kwargs=True)
    visual.register_forward_hook(end)
    model(**inputs)
    return kept


def autocast_step(model, inputs):
    """Loss and gradients of a step in bfloat16, and the bytes that autograd kept for it."""
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu"):
        loss = model(**inputs).loss
    loss.backward()
    grads = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return loss.detach(), grads, sum(kept.values())


def step_with_and_without_peft_casting(model, inputs):
    """A step as the model makes it, and one where peft casts inputs itself."""
    for name, one in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1)
    left_alone = autocast_step(model, inputs)
    for module in model.modules():
        vars(module).pop("_cast_input_dtype", None)
    return left_alone, autocast_step(model, inputs)


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_that_leave_inputs_to_autocast_give_the_same_bits(make_tiny_model, tiny_inputs, more):
    """One layer of a block has adapters: the order of several sums in bfloat16 is not what is compared."""
    config = ModelConfig("base", lora_target_modules=["down_proj"], **more)
    model = apply_tuning(make_tiny_model().to(torch.bfloat16), config)

    (loss, grads, _), (right, expected, _) = step_with_and_without_peft_casting(model, tiny_inputs)

    assert loss.equal(right)
    assert grads.keys() == expected.keys() != set()
    assert all(one.equal(expected[name]) for name, one in grads.items())


def test_adapters_of_one_input_keep_it_once_under_autocast(make_tiny_model, tiny_inputs):
    config = ModelConfig("base", lora_target_modules=["q_proj", "k_proj", "v_proj"])
    model = apply_tuning(make_tiny_model().to(torch.bfloat16), config)

    (*_, kept), (*_, expected) = step_with_and_without_peft_casting(model, tiny_inputs)

    layers, width = model.config.text_config.num_hidden_layers, model.config.text_config.hidden_size
    assert expected - kept == 2 * layers * tiny_inputs["input_ids"].numel() * width * 2


def test_a_pickled_model_leaves_inputs_of_its_own_adapters_to_autocast(tiny_model):
    model = pickle.loads(pickle.dumps(apply_tuning(tiny_model, ModelConfig("base"))))

    found = [one for one in model.modules() if "_cast_input_dtype" in vars(one)]
    assert found and all(vars(one)["_cast_input_dtype"].args == (one,) for one in found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("way", [{"tuning": "lora"}, {"tuning": "full"}], ids=["lora", "full"])
def test_autograd_keeps_no_byte_of_a_frozen_tower_and_a_merger(tiny_model, tiny_inputs, way, checkpointing):
    model = apply_tuning(tiny_model, ModelConfig("base", **way)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        limit_checkpointing(model)

    assert sum(kept_of_the_tower(model, tiny_inputs)) == 0


def test_autograd_keeps_much_of_a_tower_that_trains(tiny_model, tiny_inputs):
    """Or the test above would prove nothing."""
    model = apply_tuning(tiny_model, ModelConfig("base", train_vision=True)).train()

    assert sum(kept_of_the_tower(model, tiny_inputs)) > 10_000


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_backward_pass_of_a_frozen_tower_costs_no_operation(tiny_model, tiny_inputs, checkpointing):
    """As many as where its features were computed before."""
    model = apply_tuning(tiny_model, ModelConfig("base")).train()
    if checkpointing:
        model.activation_checkpointing_enable()
        limit_checkpointing(model)
    media = {key: value for key, value in tiny_inputs.items() if "pixel_values" in key or "grid" in key}
    features = base_model(model).model.get_image_features(*media.values(), return_dict=True)
    text = {key: value for key, value in tiny_inputs.items() if "pixel_values" not in key}

    counts = []
    for inputs in (tiny_inputs, text | {"mm_encoder_outputs": {"image": features}}):
        loss = model(**inputs).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts.append(counter.get_total_flops())

    assert counts[0] == counts[1] > 0


def test_without_the_limit_checkpointing_runs_a_frozen_tower_twice_and_backward(tiny_model, tiny_inputs):
    """Fails when transformers no longer does it: then limit_checkpointing can go."""
    model = apply_tuning(tiny_model, ModelConfig("base"))
    model.activation_checkpointing_enable()
    calls = count_vision_calls(model)

    one_step(model, tiny_inputs)

    assert calls == {"forward": 2, "backward": 1}


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_checkpointing_changes_no_gradient_and_still_checkpoints_what_trains(
    make_tiny_model, tiny_inputs, way
):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = apply_tuning(make_tiny_model(), ModelConfig("base", **way)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            limit_checkpointing(model)
            assert all(
                layer.gradient_checkpointing for layer in base_model(model).model.language_model.layers
            )
            blocks = base_model(model).model.visual.blocks
            assert all(block.gradient_checkpointing is bool(way.get("train_vision")) for block in blocks)
        model(**tiny_inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_each_trained_parameter_is_in_exactly_one_group(make_tiny_model, way, tie):
    model = apply_tuning(make_tiny_model(tie=tie), ModelConfig("base", **way))
    decay = [name for name, p in model.named_parameters() if p.ndim > 1]

    groups = parameter_groups(model, learning_rate=1e-4, weight_decay=0.1, decay_names=decay)

    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    torch.optim.AdamW(groups)  # takes them


def test_each_tower_has_its_own_learning_rate_and_decay_only_where_named(tiny_model):
    model = apply_tuning(tiny_model, ModelConfig("base", tuning="full", train_merger=True, train_vision=True))
    decay = {name for name, p in model.named_parameters() if p.ndim > 1}

    groups = parameter_groups(
        model,
        learning_rate=1.0,
        vision_learning_rate=2.0,
        merger_learning_rate=0.0,
        embedding_learning_rate=4.0,
        weight_decay=0.1,
        decay_names=decay,
    )

    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"vision": 2.0, "merger": 0.0, "language": 1.0, "embeddings": 4.0}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["name"] == ("embeddings" if is_embedding(name) else tower_of(name))
            assert group["weight_decay"] == (0.1 if name in decay else 0.0)


def test_a_tower_without_a_learning_rate_takes_the_common_one(tiny_model):
    model = apply_tuning(tiny_model, ModelConfig("base", train_merger=True, train_embeddings=True))

    groups = parameter_groups(model, learning_rate=3e-4)

    assert {group["name"]: group["lr"] for group in groups} == {
        "merger": 3e-4, "language": 3e-4, "embeddings": 3e-4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("way", "how"),
    [
        ({}, ["frozen", "frozen", "LoRA r=16"]),
        ({"use_dora": True, "lora_r": 2}, ["frozen", "frozen", "DoRA r=2"]),
        ({"train_merger": True, "lora_towers": ["language"]}, ["frozen", "full", "LoRA r=16"]),
        ({"train_embeddings": True}, ["frozen", "frozen", "LoRA r=16 + embeddings"]),
        ({"tuning": "full"}, ["frozen", "frozen", "full"]),
        (
            {"tuning": "full", "train_language": False, "train_embeddings": True},
            ["frozen", "frozen", "embeddings"],
        ),
        ({"train_vision": True, "lora_towers": ["vision"]}, ["LoRA r=16", "frozen", "full"]),
    ],
)  # fmt: skip
def test_the_table_says_how_each_tower_trains(make_tiny_model, way, how):
    model = make_tiny_model(dtype=torch.bfloat16)
    totals = [sum(p.numel() for n, p in model.named_parameters() if tower_of(n) == tower) for tower in TOWERS]

    rows = tower_table(apply_tuning(model, ModelConfig("base", **way)))

    assert [row.how for row in rows] == how
    assert [row.total for row in rows] == totals
    for row in rows:
        assert (row.trained == row.total) == (row.how == "full")
        assert (row.trained == 0) == (row.how == "frozen")
