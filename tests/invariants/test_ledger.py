"""Invariant 7: every document and token read is in the ledger once."""

import json

import pytest
import torch

from tests.published import PROCESSOR_LAYOUTS
from tests.support import FOUR, TEN, digits, encode_rows, make_trainer, png, row
from vlcpt import CPTDataset

ROWS = [
    *TEN,
    row("no target <trainable_text></trainable_text>here"),
    row("no tag at all"),
    row(f"<trainable_text>starts with a target {digits(5)}</trainable_text>"),
    row(f"too long <trainable_text>{digits(80)}</trainable_text>"),
    row("not <trainable_text>closed"),
    row("a picture of <image>", images=[b"nothing"]),
    row(f"<image><trainable_text>{digits(4)}</trainable_text>", images=[png(1, 400, 400)]),
]


def make(processor, on_overlong="split", packing=True, untagged="train", **settings):
    return CPTDataset(
        ROWS,
        processor,
        max_length=70,
        packing=packing,
        on_overlong=on_overlong,
        on_bad_data="skip",
        max_bad_fraction=0.5,
        untagged=untagged,
        **settings,
    )


@pytest.mark.parametrize("layout", PROCESSOR_LAYOUTS, indirect=True)
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("untagged", ["train", "mask"])
@pytest.mark.parametrize("on_overlong", ["split", "drop"])
def test_the_ledger_balances_and_says_what_items_hold(tiny_processor, on_overlong, packing, untagged):
    dataset = make(tiny_processor, on_overlong, packing, untagged)
    total = dataset.ledger.as_json()["total"]
    documents, tokens = total["documents"], total["tokens"]
    samples = [sample for number in range(len(dataset)) for sample in dataset[number]]

    assert documents["read"] == len(ROWS)
    assert documents["read"] == documents["used"] + sum(documents["dropped"].values())
    kinds = ("targets", "context", "media", "special", "trimmed", "not_drawn")
    assert tokens["read"] == sum(tokens[kind] for kind in kinds) + sum(tokens["dropped"].values())
    assert documents["untagged"] == 1
    assert documents["empty_spans"] == 1
    assert documents["without_targets"] == (1 if untagged == "train" else 2)
    assert documents["dropped"]["markup"] == 1
    # The last image fits no part, so its document is overlong as well.
    assert documents["dropped"].get("overlong", 0) == (2 if on_overlong == "drop" else 0)
    assert documents["dropped"].get("medium_too_large", 0) == (0 if on_overlong == "drop" else 1)
    assert documents["split"] == (on_overlong == "split")
    assert len(dataset.ledger.dropped) == sum(documents["dropped"].values())

    pads = [tiny_processor.image_token_id, tiny_processor.video_token_id]
    assert tokens["targets"] == sum(int((sample.labels != -100).sum()) for sample in samples) > 0
    assert tokens["media"] == sum(int(torch.isin(s.input_ids, torch.tensor(pads)).sum()) for s in samples) > 0
    kept = tokens["targets"] + tokens["context"] + tokens["media"] + tokens["special"]
    assert kept + tokens["repeated"] == sum(map(len, samples))
    assert total["samples"] == len(samples) == dataset.ledger.samples
    assert dataset.ledger.packs == len(dataset)
    assert dataset.ledger.fill == (
        pytest.approx(sum(map(len, samples)) / len(dataset) / 70, abs=1e-6) if packing else None
    )


@pytest.mark.parametrize("layout", PROCESSOR_LAYOUTS, indirect=True)
def test_each_kind_of_token_is_counted_as_it_stands_in_the_documents(tiny_processor):
    """Against the encoded documents, counted here by ids."""
    whole = encode_rows(FOUR, tiny_processor)
    tokens = CPTDataset(FOUR, tiny_processor, max_length=128).ledger.as_json()["total"]["tokens"]
    special = torch.tensor(
        tiny_processor.tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|endoftext|>"]
        )
    )
    pads = torch.tensor([tiny_processor.image_token_id, tiny_processor.video_token_id])
    counted = dict.fromkeys(("read", "targets", "context", "media", "special", "trimmed"), 0)
    for sample in whole:
        is_target = sample.labels != -100
        stop = int(is_target.nonzero()[-1]) + 1
        ids, is_target = sample.input_ids[:stop], is_target[:stop]
        counted["read"] += len(sample)
        counted["trimmed"] += len(sample) - stop
        counted["targets"] += int(is_target.sum())
        counted["media"] += int(torch.isin(ids, pads).sum())
        counted["special"] += int((torch.isin(ids, special) & ~is_target).sum())
        counted["context"] += int((~torch.isin(ids, torch.cat([pads, special])) & ~is_target).sum())

    assert {key: tokens[key] for key in counted} == counted
    assert all(counted.values())


def test_one_conversation_is_one_document_at_any_number_of_processes(tiny_processor):
    """More rows than one process reads at a time; every tenth cannot be read."""
    rows = [
        {
            "id": f"chat-{number}",
            "messages": [
                {"role": role, "content": None if number % 10 == 9 else f"{role} {number} {turn}"}
                for turn in range(2)
                for role in ("user", "assistant")
            ],
        }
        for number in range(1300)
    ]
    found = []
    for num_proc in (0, 1, 4):
        dataset = CPTDataset(
            rows, tiny_processor, max_length=64, on_bad_data="skip", max_bad_fraction=0.1, num_proc=num_proc
        )
        names = [dataset.names(number) for number in range(len(dataset))]
        found.append((dataset.ledger.as_json(), [vars(one) for one in dataset.ledger.dropped], names))

    assert found[0] == found[1] == found[2]
    ledger, dropped, names = found[0]
    assert ledger["total"]["documents"]["read"] == 1300
    assert ledger["total"]["documents"]["used"] == 1170 == ledger["samples"]
    assert sorted(name for pack in names for name in pack) == sorted(
        f"chat-{n}" for n in range(1300) if n % 10 != 9
    )
    assert [one["line"] for one in dropped] == list(range(10, 1301, 10))


def test_replay_that_is_not_drawn_is_told_apart(tiny_processor):
    replay = [row(f"old <trainable_text>{digits(9, seed)}</trainable_text>") for seed in range(20)]
    old = {"path": replay, "name": "old"}
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128, replay_data=old, replay_share=0.3)
    found = [sample for number in range(len(dataset)) for sample in dataset[number]]
    total = dataset.ledger.as_json()["total"]

    assert total["documents"]["read"] == 24
    assert total["documents"]["not_drawn"] == 24 - len(found) > 0
    assert total["tokens"]["not_drawn"] > 0
    assert total["tokens"]["targets"] == sum(int((sample.labels != -100).sum()) for sample in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_epoch_trains_the_targets_that_the_ledger_promised(tiny_model, tiny_processor, tmp_path, workers):
    dataset = make(tiny_processor)
    dataset.ledger.write(tmp_path)
    promised = json.loads((tmp_path / "ledger.json").read_text())["total"]["tokens"]["targets"]
    seen = []
    tiny_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(int(kwargs["logits_to_keep"].sum())), with_kwargs=True
    )

    settings = {"num_train_epochs": 1, "dataloader_num_workers": workers, "loss_chunk": 0}
    make_trainer(tiny_model, dataset, tiny_processor, tmp_path, **settings).train()

    assert len(seen) == len(dataset) > 1
    assert sum(seen) == promised
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [one["line"] for one in dropped] == [11, 15, 16, 17]
