"""Tests of vlcpt/model/loading.py."""

import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BertConfig, BertTokenizer

from tests.model.changing import logits, one_step, rewrite
from vlcpt.config.schema import ModelConfig
from vlcpt.errors import ConfigError
from vlcpt.model.attention import BY_DOCUMENT
from vlcpt.model.loading import load_base, load_model, load_processor
from vlcpt.model.tuning import tower_table


@pytest.fixture
def model_copy(tiny_model_dir, tmp_path):
    """A folder with the tiny model that a test may break."""
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


def test_a_processor_is_loaded_with_all_its_parts(tiny_model_dir, tiny_processor):
    processor = load_processor(str(tiny_model_dir))

    assert processor.image_token_id == tiny_processor.image_token_id
    assert len(processor.tokenizer) == len(tiny_processor.tokenizer)


def test_a_processor_that_is_not_there_is_an_error_that_says_what_is(tmp_path):
    (tmp_path / "notes.txt").write_text("")

    with pytest.raises(
        ValueError, match=r"no processor could be loaded from this folder, which holds notes.txt"
    ):
        load_processor(str(tmp_path))
    with pytest.raises(ValueError, match=r"nowhere/at-all: no such folder, and no processor of this id"):
        load_processor("nowhere/at-all")


def test_another_models_processor_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    BertConfig().save_pretrained(tmp_path)

    with pytest.raises(
        ValueError,
        match=r"not a Qwen2_5_VLProcessor\. .* preprocessor_config\.json, .* processor_config\.json, ",
    ):
        load_processor(str(tmp_path))


@pytest.mark.parametrize("layout", ["3B"], indirect=True)
def test_the_file_that_a_published_processor_lacks_is_named(model_copy):
    (model_copy / "preprocessor_config.json").unlink()

    with pytest.raises(
        ConfigError, match=r"no processor could be loaded .* a preprocessor_config\.json file"
    ):
        load_processor(str(model_copy))


def test_a_loaded_model_gives_the_logits_of_transformers(tiny_model_dir, tiny_inputs):
    expected = logits(AutoModelForImageTextToText.from_pretrained(tiny_model_dir), tiny_inputs)

    model = load_model(ModelConfig(str(tiny_model_dir)))

    assert torch.equal(logits(model, tiny_inputs), expected)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_cache_is_off_in_both_configurations(tiny_model_dir, tuning):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning))

    assert model.config.use_cache is False
    assert model.config.text_config.use_cache is False


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_dtype_auto_keeps_frozen_weights_as_the_checkpoint_has_them(make_tiny_model, tmp_path, tuning):
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)

    model = load_model(ModelConfig(str(tmp_path), tuning=tuning))

    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_named_dtype_wins_over_the_checkpoints(tiny_model_dir):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="bfloat16"))

    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("asked", "used"), [("auto", BY_DOCUMENT), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_by_documents_unless_another_is_asked_for(tiny_model_dir, asked, used):
    model = load_model(ModelConfig(str(tiny_model_dir), attn_implementation=asked))

    assert model.config._attn_implementation == used
    assert model.config.vision_config._attn_implementation == used


def test_a_checkpoint_without_one_of_its_tensors_is_refused(model_copy):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(model_copy / "model.safetensors", lambda found: {k: v for k, v in found.items() if k != name})

    with pytest.raises(ValueError, match=r"1 missing \(model.language_model.layers.1.mlp.up_proj.weight\)"):
        load_model(ModelConfig(str(model_copy)))


def test_a_checkpoint_with_a_tensor_too_many_is_refused(model_copy):
    rewrite(model_copy / "model.safetensors", lambda found: found | {"model.extra.weight": torch.ones(1)})

    with pytest.raises(ValueError, match=r"1 unexpected \(model.*extra.weight\)"):
        load_model(ModelConfig(str(model_copy)))


def test_a_checkpoint_with_a_tensor_of_another_shape_is_refused(model_copy):
    rewrite(model_copy / "model.safetensors", lambda found: found | {"lm_head.weight": torch.ones(8, 64)})

    with pytest.raises(ValueError, match=r"1 mismatched .*lm_head.weight"):
        load_model(ModelConfig(str(model_copy)))


def test_a_broken_file_of_weights_is_an_error_that_names_it(model_copy):
    (model_copy / "model.safetensors").write_bytes(b"1234")

    with pytest.raises(ValueError, match=r"model/model\.safetensors: it is no complete safetensors file"):
        load_model(ModelConfig(str(model_copy)))


def test_attention_that_cannot_run_here_is_an_error_that_names_it(tiny_model_dir):
    if torch.cuda.is_available():
        pytest.skip("flash attention may run here")

    with pytest.raises(ValueError, match="cannot be loaded with attn_implementation flash_attention_2"):
        load_model(ModelConfig(str(tiny_model_dir), attn_implementation="flash_attention_2"))


def test_another_family_is_refused_before_its_weights_are_read(tmp_path):
    BertConfig().save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="'bert' is not supported; supported: qwen2_5_vl"):
        load_model(ModelConfig(str(tmp_path)))


def test_a_model_that_is_not_there_is_an_error_that_says_so():
    with pytest.raises(ValueError, match=r"nowhere/at-all: no such folder, and no model of this id"):
        load_model(ModelConfig("nowhere/at-all"))


def four_bit(model):
    """Names of the weights that are packed in 4 bits."""
    return {n for n, p in model.named_parameters() if getattr(p, "quant_state", None) is not None}


def bytes_of(parameter):
    return parameter.detach().view(torch.uint8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_qlora_packs_the_language_towers_linear_layers_and_nothing_else(tiny_model_dir, dtype):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora", dtype=dtype))

    packed = four_bit(model)
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    prefix = "base_model.model.model.language_model.layers"
    assert {name.removesuffix(".base_layer.weight").split(".")[-1] for name in packed} == set(linear)
    assert len(packed) == 2 * len(linear)
    assert all(name.startswith(prefix) for name in packed)
    assert {p.dtype for n, p in model.named_parameters() if n not in packed and not p.requires_grad} == {
        getattr(torch, dtype)
    }
    language = tower_table(model)[2]
    assert (language.dtype, language.how) == (f"4-bit, {dtype}", "LoRA r=16")
    assert (
        language.total
        == sum(p.numel() for p in [*load_base(str(tiny_model_dir)).model.language_model.parameters()])
        + 1024 * 64
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "more", [{}, {"train_merger": True, "lora_towers": ("language",)}, {"train_embeddings": True}]
)
def test_qlora_trains_a_step_on_this_machine(tiny_model_dir, tiny_inputs, dtype, more):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora", dtype=dtype, **more))
    # Compared as bytes: read as floating-point numbers, some of them are NaN.
    packed = {n: bytes_of(p).clone() for n, p in model.named_parameters() if n in four_bit(model)}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []

    for _ in range(4):
        losses.append(float(model(**tiny_inputs).loss.detach()))
        one_step(model, tiny_inputs)

    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert packed
    assert all(torch.equal(bytes_of(now[name]), value) for name, value in packed.items())
    assert all(not torch.equal(now[name], value) for name, value in trained.items())


def test_qlora_trains_after_an_evaluation_and_evaluates_as_it_trains(tiny_model_dir, tiny_inputs):
    """bitsandbytes would repack the weights for the first evaluation, and lose some of their precision."""
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora"))
    with torch.no_grad():
        in_training = model.train()(**tiny_inputs).logits

    in_evaluation = logits(model, tiny_inputs)

    assert torch.equal(in_evaluation, in_training)
    one_step(model, tiny_inputs)
    assert not torch.equal(logits(model, tiny_inputs), in_evaluation)


def test_bitsandbytes_still_repacks_weights_for_evaluation(tiny_model_dir, tiny_inputs):
    """Fails when it no longer does: then the switch in load_base can go."""
    model = load_base(str(tiny_model_dir), in_4_bits=True)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert layer.support_avx512bf16_for_cpu is False
    if not type(layer)(32, 32).support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16")
    in_training = logits(model, tiny_inputs)

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True

    assert not torch.equal(logits(model, tiny_inputs), in_training)


def test_qlora_saved_and_reloaded_by_peft_alone_gives_equal_logits(tiny_model_dir, tiny_inputs, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora"))
    one_step(model, tiny_inputs)
    expected = logits(model, tiny_inputs)
    model.save_pretrained(tmp_path)

    reloaded = PeftModel.from_pretrained(load_base(str(tiny_model_dir), in_4_bits=True), tmp_path)

    assert torch.equal(logits(reloaded, tiny_inputs), expected)


def test_training_of_a_qlora_adapter_continues(tiny_model_dir, tiny_inputs, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora"))
    one_step(model, tiny_inputs)
    model.save_pretrained(tmp_path)

    again = load_model(ModelConfig(str(tiny_model_dir), tuning="qlora", adapter_name_or_path=str(tmp_path)))

    assert torch.equal(logits(again, tiny_inputs), logits(model, tiny_inputs))
    one_step(again, tiny_inputs)


def adapter_weights(model):
    return torch.cat([one.flatten() for name, one in model.named_parameters() if ".lora_A." in name])


def test_new_adapters_depend_on_the_given_seed_alone(tiny_model_dir):
    """Not on how many random numbers were drawn before, in this process or another."""
    config = ModelConfig(str(tiny_model_dir), lora_r=2)
    drawn = []
    for state, seed in ((0, 7), (1, 7), (0, 8)):
        torch.manual_seed(state)
        drawn.append(adapter_weights(load_model(config, seed=seed)))

    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_loading_a_model_twice_gives_the_same_adapters(tiny_model_dir):
    config = ModelConfig(str(tiny_model_dir), lora_r=2, train_embeddings=True)
    first, second = load_model(config), load_model(config)

    named = dict(second.named_parameters())
    assert all(torch.equal(one, named[name]) for name, one in first.named_parameters())


def test_loading_a_model_leaves_the_random_state_as_it_was(tiny_model_dir):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    load_model(ModelConfig(str(tiny_model_dir), lora_r=2))

    assert torch.equal(torch.rand(4), expected)
