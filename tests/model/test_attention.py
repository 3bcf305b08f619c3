"""Attention by documents: equal to each document alone, kernels that are wrong are not used."""

import inspect
import json
import logging
import math
import time

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from tests.exact_kernels import attend_apart, exact_varlen_kernel
from tests.support import TEN, make_trainer
from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model
from vlcpt.model import attention, attention_kernel
from vlcpt.model.attention import BY_DOCUMENT, attend_by_document, by_document
from vlcpt.model.attention_kernel import Timing, compare, measure


def layer(causal, group=1):
    one = nn.Module()
    one.is_causal, one.num_key_value_groups = causal, group
    return one


def random_inputs(rows, tokens, heads=4, kv_heads=2, width=8):
    shapes = ((rows, count, tokens, width) for count in (heads, kv_heads, kv_heads))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(
    "lengths",
    [[6, 6, 6, 6], [1, 9, 2, 12], [24], [3, 3, 5, 3, 3, 7]],
    ids=["equal", "unequal", "one", "runs"],
)
def test_output_and_gradients_are_those_of_each_document_alone(causal, lengths):
    """Two rows of 12; a document may end where a row does not."""
    query, key, value = random_inputs(rows=2, tokens=12)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)

    out, _ = by_document(layer(causal, 2), query, key, value, None, cu_seq_lens_q=bounds, scaling=0.3)
    flat = [one.transpose(1, 2).flatten(0, 1) for one in (query, key, value)]
    expected = attend_apart(*flat, bounds, 0.3, causal).unflatten(0, (2, 12))

    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(out, (query, key, value), upstream)
    right = torch.autograd.grad(expected, (query, key, value), upstream)
    for one, other in zip((out, *found), (expected, *right), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_without_bounds_documents_begin_where_positions_do_not_grow_by_one():
    query, key, value = random_inputs(rows=2, tokens=5)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    bounds = torch.tensor([0, 3, 5, 10], dtype=torch.int32)

    found, _ = by_document(layer(True, 2), query, key, value, None, position_ids=positions)
    expected, _ = by_document(layer(True, 2), query, key, value, None, cu_seq_lens_q=bounds)

    assert torch.equal(found, expected)


@pytest.fixture
def models(tiny_model_dir):
    """The same model with attention by documents, and with PyTorch's own."""
    kinds = ("auto", "sdpa")
    return [load_model(ModelConfig(str(tiny_model_dir), attn_implementation=one)) for one in kinds]


def test_generation_is_as_with_sdpa(models, tiny_processor):
    """With a cache and with padding on the left, where the caller's mask decides."""
    text = ["one two three four", "five"]
    inputs = tiny_processor.tokenizer(text, return_tensors="pt", padding=True, padding_side="left")
    assert (inputs["attention_mask"] == 0).any()

    found, expected = (
        one.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=True) for one in models
    )

    assert torch.equal(found, expected)


def test_padding_that_the_caller_masks_changes_nothing(models, tiny_processor):
    inputs = tiny_processor.tokenizer(["one two three four", "five"], return_tensors="pt", padding=True)
    real = inputs["attention_mask"].bool()
    assert not real.all()

    found, expected = (one(**inputs, use_cache=False).logits[real] for one in models)

    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_name_is_in_no_saved_configuration(models, tmp_path):
    model = models[0].get_base_model()
    assert model.config.vision_config._attn_implementation == BY_DOCUMENT

    model.save_pretrained(tmp_path)
    models[0].save_pretrained(tmp_path / "adapter")

    for file in (tmp_path / "config.json", tmp_path / "adapter/adapter_config.json"):
        assert BY_DOCUMENT not in json.dumps(json.loads(file.read_text()))


def test_a_model_with_sliding_windows_keeps_pytorchs_attention(make_tiny_model, tmp_path):
    model = make_tiny_model()
    model.config.text_config.update({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0})
    model.config.text_config.layer_types = ["sliding_attention"] * 2
    model.save_pretrained(tmp_path)

    loaded = load_model(ModelConfig(str(tmp_path)))

    assert loaded.config._attn_implementation == "sdpa"


class Looks(TorchDispatchMode):
    """Counts what would make a program wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += func in looks
        return func(*args, **(kwargs or {}))


@pytest.fixture
def looks_of(monkeypatch):
    """A function that calls another one and counts its looks at the device."""

    def looks_of(call):
        looks, own = Looks(), torch.Tensor.tolist

        def tolist(tensor):  # passes by the dispatcher
            looks.count += 1
            return own(tensor)

        with monkeypatch.context() as patched, looks:
            patched.setattr(torch.Tensor, "tolist", tolist)
            return call(), looks.count

    return looks_of


def test_the_vision_tower_calls_attention_once_a_layer_and_looks_at_nothing(
    models, tiny_processor, monkeypatch, looks_of
):
    tower = models[0].get_base_model().model.visual
    collator = CPTDataCollator(tiny_processor)
    collator.window_size = tower.config.window_size
    batch = collator([CPTDataset(TEN[:1], tiny_processor, max_length=70)[0]])
    calls = []

    def counted(module, *args, **kwargs):
        calls.append(module)
        return by_document(module, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, BY_DOCUMENT, counted)
    given = {name.removeprefix("image_"): value for name, value in batch.items() if name.startswith("image_")}
    plain = tower(batch["pixel_values"], given["grid_thw"])
    calls.clear()
    found, looks = looks_of(lambda: tower(batch["pixel_values"], **given))

    assert torch.equal(found.pooler_output, plain.pooler_output)
    assert len(calls) == len(tower.blocks)
    assert looks == 0
    # Or counting proves nothing: lengths that are not given are a ``tolist`` in each layer.
    without = {name: value for name, value in given.items() if not name.endswith("_lengths")}
    assert looks_of(lambda: tower(batch["pixel_values"], **without))[1] == len(tower.blocks)
    assert looks_of(lambda: tower(batch["pixel_values"], given["grid_thw"]))[1] > len(tower.blocks)


def test_a_kernel_is_called_once_a_layer_of_both_towers(models, tiny_processor, monkeypatch, tmp_path):
    seen = exact_varlen_kernel(monkeypatch)
    dataset = CPTDataset(TEN[:1], tiny_processor, max_length=70)
    trainer = make_trainer(models[0], dataset, tiny_processor, tmp_path, eval_blank_images=False)

    trainer.evaluate(dataset)

    assert seen.calls == 2 + 2  # two blocks, two layers


def kernel_of(change):
    """An exact kernel but for a change of its output."""

    def kernel(query, key, value, bounds, longest, scaling, causal):
        return change(attend_apart(query, key, value, bounds, scaling, causal))

    return kernel


def exact(query, key, value, bounds, longest, scaling, causal):
    return attend_apart(query, key, value, bounds, scaling, causal)


def without_bounds(query, key, value, bounds, longest, scaling, causal):
    return attend_apart(query, key, value, bounds[[0, -1]], scaling, causal)


def without_a_gradient(query, key, value, bounds, longest, scaling, causal):
    out = attend_apart(query.detach(), key, value, bounds, scaling, causal)
    return out + 0 * query


COMPARED = {
    "device": torch.device("cpu"), "dtype": torch.bfloat16, "width": 16, "group": 1, "causal": True,
}  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_a_kernel_that_is_off_by_rounding_alone_is_right(causal, group):
    assert compare(exact, (48, 16), **COMPARED | {"causal": causal, "group": group}) == ""


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_kernel_may_be_compared_inside_a_layer_that_is_computed_again(unproven, monkeypatch, reentrant):
    """There the first pass compares, and the second finds that it was done."""
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)
    query, key, value = random_inputs(rows=1, tokens=6, width=16)

    def attend(query, key, value):
        attention_kernel.kernel_for(device, torch.bfloat16, 16, 4, 2, True)
        out, _ = by_document(layer(True, 2), query, key, value, None)
        return out

    device = OnGpu()
    checkpoint(attend, query, key, value, use_reentrant=reentrant).sum().backward()

    again = [one.detach().requires_grad_() for one in (query, key, value)]
    attend(*again).sum().backward()
    assert all(torch.equal(one.grad, two.grad) for one, two in zip((query, key, value), again, strict=True))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_also_compared_where_no_gradient_is_kept(mode):
    with mode():
        assert compare(exact, (48, 16), **COMPARED) == ""


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (without_bounds, "output"),
        (kernel_of(lambda out: out * 1.05), "output"),
        (kernel_of(lambda out: out * float("nan")), "output"),
        (without_a_gradient, "gradient of the queries"),
    ],
    ids=["documents that see each other", "wrong scale", "not a number", "no gradient"],
)
def test_a_kernel_that_is_wrong_is_found(kernel, wrong):
    found = compare(kernel, (48, 16), **COMPARED)

    assert found.startswith(f"its {wrong} is off by")


@pytest.fixture
def unproven(monkeypatch):
    """Nothing is proven yet, and what is compared on a GPU is compared here; the kernel is the faster one."""
    on_cpu = torch.device("cpu")
    monkeypatch.setattr(
        attention_kernel, "compare", lambda one, lengths, device, *rest: compare(one, lengths, on_cpu, *rest)
    )
    monkeypatch.setattr(attention_kernel, "measure", lambda *given: Timing(kernel=0.001, plain=0.002))
    attention_kernel.kernel_for.cache_clear()
    yield
    attention_kernel.kernel_for.cache_clear()


class OnGpu:
    """As much of a device as the proof looks at."""

    type = "cuda"

    def __str__(self):
        return "cuda:0"


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ImportError("no module"), "it does not run: no module"),
        (RuntimeError("FlashAttention only supports Ampere\nstack"), "it does not run: FlashAttention only"),
        (kernel_of(lambda out: out * 2), "its output is off by"),
    ],
    ids=["older torch", "older card", "wrong"],
)
def test_a_gpu_without_a_right_kernel_falls_back_and_says_so(unproven, monkeypatch, caplog, kernel, reason):
    def find():
        if isinstance(kernel, Exception):
            raise kernel
        return kernel

    monkeypatch.setattr(attention_kernel, "_varlen_kernel", find)
    with caplog.at_level(logging.WARNING):
        proof = attention_kernel.kernel_for(OnGpu(), torch.bfloat16, 16, 4, 2, True)

    assert proof.kernel is None
    assert proof.reason.startswith(reason)
    assert "attention by documents runs on PyTorch's own attention on cuda:0" in caplog.text
    assert "stack" not in caplog.text


def test_a_gpu_with_a_right_kernel_uses_it(unproven, monkeypatch):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)

    assert attention_kernel.kernel_for(OnGpu(), torch.bfloat16, 16, 4, 2, True).kernel is exact


def timed(unequal, equal):
    """A timer that finds these milliseconds of the kernel, and one of PyTorch's attention."""

    def measured(kernel, lengths, *layer):
        return Timing(kernel=(equal if len(set(lengths)) == 1 else unequal) / 1000, plain=0.001)

    return measured


@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_that_is_slower_is_not_used_and_the_start_says_so(
    unproven, monkeypatch, models, causal, caplog
):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)
    monkeypatch.setattr(attention_kernel, "measure", timed(unequal=1.5, equal=0.5))
    model = models[0].get_base_model()

    assert attention_kernel.kernel_for(OnGpu(), torch.bfloat16, 16, 4, 2, causal).kernel is None
    said = attention.describe_kernels(model, OnGpu(), torch.bfloat16)
    takes = "documents of unequal lengths take 1 ms, and by torch.nn.attention.varlen 1.5 ms"
    assert said == (
        "attention by documents: PyTorch's own attention, which is faster here "
        f"(language model: {takes}; vision tower: {takes})"
    )
    assert caplog.text == ""  # nothing is wrong


def test_a_kernel_that_is_a_little_slower_is_used_so_that_a_resumed_run_chooses_it_again(
    unproven, monkeypatch
):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)
    monkeypatch.setattr(attention_kernel, "measure", timed(unequal=1.05, equal=1.05))

    proof = attention_kernel.kernel_for(OnGpu(), torch.bfloat16, 16, 4, 2, True)

    assert (proof.kernel, proof.faster) == (exact, "nowhere")


@pytest.mark.parametrize("lengths", [[6, 6], [5, 7]], ids=["equal", "unequal"])
def test_documents_of_one_length_run_as_unpacked_rows_do_where_that_is_faster(monkeypatch, lengths):
    seen = exact_varlen_kernel(monkeypatch)
    proof = attention.kernel_for()._replace(faster="at equal lengths")
    monkeypatch.setattr(attention, "kernel_for", lambda *layer: proof)
    query, key, value = random_inputs(rows=1, tokens=12)
    bounds = torch.tensor([0, lengths[0], 12], dtype=torch.int32)

    by_document(
        layer(True, 2),
        query,
        key,
        value,
        None,
        cu_seq_lens_q=bounds,
        document_lengths=lengths,
        max_length_q=7,
    )

    assert seen.calls == (lengths == [5, 7])


def test_the_start_says_that_documents_of_one_length_run_otherwise(unproven, monkeypatch, models):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)
    monkeypatch.setattr(attention_kernel, "measure", timed(unequal=0.5, equal=1.5))
    model = models[0].get_base_model()

    assert (
        "torch.nn.attention.varlen, but documents of one length by PyTorch's own, which is faster there "
        "(language model: they take 1 ms, and by torch.nn.attention.varlen 1.5 ms; vision tower: "
    ) in attention.describe_kernels(model, OnGpu(), torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_both_ways_are_measured_forward_and_backward_on_the_heads_of_the_run(mode):
    calls = []

    def slow(query, key, value, *rest):
        calls.append((query.shape, key.shape, query.requires_grad))
        time.sleep(0.01)
        return exact(query, key, value, *rest)

    before = torch.get_rng_state()
    with mode():
        found = measure(slow, (5, 3), torch.device("cpu"), torch.bfloat16, 8, 6, 3, True)

    assert set(calls) == {((8, 6, 8), (8, 2, 8), True)}
    assert found.kernel > 0.01
    assert 0 < found.plain < math.inf
    assert torch.equal(torch.get_rng_state(), before)


def test_the_proof_leaves_the_runs_random_numbers_alone():
    before = torch.get_rng_state()

    compare(exact, (48, 16), **COMPARED)

    assert torch.equal(torch.get_rng_state(), before)


def test_attention_can_be_set_on_a_model_of_ones_own(tiny_model, tiny_inputs):
    expected = tiny_model(**tiny_inputs).logits

    attend_by_document(tiny_model)

    torch.testing.assert_close(tiny_model(**tiny_inputs).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "said"),
    [(exact, "torch.nn.attention.varlen, which agrees"), (kernel_of(lambda out: out * 2), "which is slower")],
    ids=["right", "wrong"],
)
def test_the_start_of_a_run_on_a_gpu_says_what_attention_runs_on(unproven, monkeypatch, models, kernel, said):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: kernel)
    by_documents, plain = (one.get_base_model() for one in models)

    assert said in attention.describe_kernels(by_documents, OnGpu(), torch.bfloat16)
    in_float32 = attention.describe_kernels(by_documents, OnGpu(), torch.float32)
    assert "language model: it computes in float32, and the kernel needs 16 bits" in in_float32
    assert attention.describe_kernels(plain, OnGpu(), torch.bfloat16) == ""
    assert attention.describe_kernels(by_documents, torch.device("cpu"), torch.bfloat16) == ""


def test_the_kernel_of_torch_takes_what_it_is_given(monkeypatch):
    """It runs on GPUs only; its signature is here."""
    given = {}
    signature = inspect.signature(varlen.varlen_attn)

    def spy(*args, **kwargs):
        given.update(signature.bind(*args, **kwargs).arguments)
        return args[0]

    monkeypatch.setattr(varlen, "varlen_attn", spy)
    query, key = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)

    attention_kernel._varlen_kernel()(query, key, key, bounds, 4, 0.5, True)
    assert (given["window_size"], given["enable_gqa"], given["scale"]) == ((-1, 0), True, 0.5)
    assert (given["max_q"], given["max_k"]) == (4, 4)
    assert given["cu_seq_q"] is given["cu_seq_k"] is bounds

    attention_kernel._varlen_kernel()(query, query, query, bounds, 4, 0.5, False)
    assert (given["window_size"], given["enable_gqa"]) == ((-1, -1), False)


def test_a_model_that_drops_attention_is_said_to_run_without_the_kernel(unproven, monkeypatch, models):
    monkeypatch.setattr(attention_kernel, "_varlen_kernel", lambda: exact)
    model = models[0].get_base_model()
    model.config.text_config.attention_dropout = 0.1

    found = attention.describe_kernels(model, OnGpu(), torch.bfloat16)

    assert "language model: attention_dropout is 0.1, and the kernel has none" in found
