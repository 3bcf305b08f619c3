"""Invariant 3: packed logits equal unpacked logits, through the trainer, in training and evaluation."""

import pytest
import torch

from tests.exact_kernels import exact_flash_attention, exact_varlen_kernel
from tests.published import REAL
from tests.support import TEN, Alone, encode_rows, make_trainer, run_alone
from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model
from vlcpt.model.attention import BY_DOCUMENT


class Watch:
    """Keeps what goes into the model and what comes out, cut into the documents of each row.

    A document begins where the text row of the positions is 0; padding is one as well.
    """

    def __init__(self, model):
        self.documents: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self.rows_of_several, self.batches_of_several, self.padded = 0, 0, False
        self._handle = model.register_forward_hook(self._keep, with_kwargs=True)

    def _keep(self, model, args, kwargs, output):
        assert kwargs.get("attention_mask") is None
        assert kwargs["use_cache"] is False
        ids, keep, positions = kwargs["input_ids"], kwargs["logits_to_keep"], kwargs["position_ids"]
        counts = [0, *keep.flatten().cumsum(0).tolist()]  # targets before each place of the batch
        width = ids.shape[1]
        self.batches_of_several += len(ids) > 1
        for number in range(len(ids)):
            starts = (positions[0, number] == 0).nonzero()[:, 0].tolist()
            self.rows_of_several += len(starts) > 1
            for start, stop in zip(starts, [*starts[1:], width], strict=True):
                first, last = counts[number * width + start], counts[number * width + stop]
                if first == last:
                    self.padded = True
                else:
                    document = tuple(ids[number, start:stop].tolist())
                    self.documents.append((document, output.logits[first:last].detach()))

    def deviation(self, alone: list[Alone]) -> float:
        """The largest difference of any logit, every document found exactly once."""
        expected = {one.ids: one.logits for one in alone}
        assert sorted(ids for ids, _ in self.documents) == sorted(expected)
        return max(float((logits - expected[ids]).abs().max()) for ids, logits in self.documents)


@pytest.fixture(scope="module")
def dataset(tiny_processor):
    return CPTDataset(TEN, tiny_processor, max_length=70)


@pytest.fixture
def load(tiny_model_dir, monkeypatch):
    """The tiny model with an ``attn_implementation``, and where it is not here, one with exact kernels.

    Flash attention needs a GPU and a package. Its path through transformers is what is to be shown, so
    that its kernels are replaced by exact ones, and nothing else.
    """

    def load(attention: str):
        given = attention if attention in ("auto", "sdpa", "eager") else "sdpa"
        if attention == "auto, with a kernel":
            given = "auto"
            exact_varlen_kernel(monkeypatch)
        config = ModelConfig(str(tiny_model_dir), dtype="float32", tuning="full", attn_implementation=given)
        model = load_model(config)
        if attention.startswith("flash"):
            exact_flash_attention(monkeypatch)
            model.config._attn_implementation = attention
        used = BY_DOCUMENT if attention.startswith("auto") else attention
        assert model.config.text_config._attn_implementation == used
        assert model.config.vision_config._attn_implementation == used
        return model

    return load


KINDS = ["auto", "auto, with a kernel", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


@pytest.mark.parametrize(
    ("layout", "attention", "batch_size"),
    [
        *(("saved", attention, rows) for attention in KINDS for rows in (1, 2, 4)),
        *((layout, attention, 2) for layout in ("3B", "7B") for attention in ("auto", "sdpa", "eager")),
        pytest.param(REAL, "auto", 2, marks=pytest.mark.slow),
    ],
    indirect=["layout"],
)
def test_packed_logits_equal_those_of_each_document_alone(
    load, tiny_processor, dataset, tmp_path, attention, batch_size
):
    plain = load("eager")
    with torch.no_grad():
        alone = [run_alone(plain, sample) for sample in encode_rows(TEN, tiny_processor)]
    model = load(attention)
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        learning_rate=0,
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        loss_chunk=0,  # so that there are logits to look at
        eval_blank_images=False,  # each document is looked for once
    )

    for run in (trainer.train, lambda: trainer.evaluate(dataset)):
        watch = Watch(model)
        run()

        assert watch.deviation(alone) < 1e-5 * float(max(one.logits.abs().max() for one in alone))
        assert watch.rows_of_several
        assert bool(watch.batches_of_several) == watch.padded == (batch_size > 1)
        watch._handle.remove()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_that_see_each_other_would_be_noticed(load, tiny_processor, dataset, attention):
    """Or the comparison above proves nothing."""
    model = load(attention)
    alone = [run_alone(model, sample) for sample in encode_rows(TEN, tiny_processor)]
    batch = CPTDataCollator(tiny_processor)([dataset[1]])
    labels, _ = batch.pop("labels"), batch.pop("loss_weights")
    keep = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    boundaries = batch["position_ids"][0, 0] == 0
    assert boundaries.sum() > 1

    apart = model(**batch, logits_to_keep=keep).logits
    batch["position_ids"][0] = torch.arange(len(boundaries))
    together = model(**batch, logits_to_keep=keep).logits

    expected = torch.cat(
        [one.logits for sample in dataset[1] for one in alone if one.ids == tuple(sample.input_ids.tolist())]
    )
    assert (apart - expected).abs().max() < 1e-4
    assert (together - expected).abs().max() > 0.1


def test_flash_attention_without_bounds_would_mix_the_documents_of_two_rows(load, tiny_processor, dataset):
    """The bounds are what keeps them apart: transformers looks for packs in batches of one row only."""
    model = load("flash_attention_2")
    batch = CPTDataCollator(tiny_processor)([dataset[0], dataset[1]])
    batch.pop("labels"), batch.pop("loss_weights")
    with torch.no_grad():
        apart = model(**batch).logits
        for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
            batch.pop(name)
        together = model(**batch).logits

    assert (apart - together).abs().max() > 0.1


class WithoutBounds(CPTDataCollator):
    """As a collator of one's own might be."""

    def __call__(self, items):
        bounds = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return {name: value for name, value in super().__call__(items).items() if name not in bounds}


@pytest.mark.parametrize("attention", KINDS)
def test_a_collator_without_bounds_is_right_or_refused(load, tiny_processor, dataset, tmp_path, attention):
    plain = load("eager")
    with torch.no_grad():
        alone = [run_alone(plain, sample) for sample in encode_rows(TEN, tiny_processor)]
    model = load(attention)
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        per_device_eval_batch_size=2,
        loss_chunk=0,
        eval_blank_images=False,
    )
    trainer.data_collator = WithoutBounds(tiny_processor)

    if attention.startswith("flash"):
        with pytest.raises(ValueError, match=r"several rows of packed documents but no cu_seq_lens_q"):
            trainer.evaluate(dataset)
        return
    watch = Watch(model)
    trainer.evaluate(dataset)
    assert watch.deviation(alone) < 1e-5 * float(max(one.logits.abs().max() for one in alone))
