"""Which documents make up each step does not depend on ranks, batch size, accumulation or workers."""

from functools import cache

import pytest
from accelerate import Accelerator

from tests.support import digits, make_trainer, row
from vlcpt import CPTDataset
from vlcpt.data.workers import end_persistent_workers

PER_STEP = 8
EPOCHS = 2
# Ranks, batch size, accumulation, workers.
LAYOUTS = [
    (1, 8, 1, 0),
    (1, 8, 1, 1),
    (1, 8, 1, 4),
    (1, 1, 8, 0),
    (1, 2, 4, 4),
    (2, 4, 1, 0),
    (2, 1, 4, 1),
    (4, 2, 1, 0),
    (4, 1, 2, 0),
    (8, 1, 1, 0),
]


def documents(items) -> list[tuple[int, ...]]:
    """In the place of a collator: the documents of some packs, known by their ids."""
    return [tuple(sample.input_ids.tolist()) for pack in items for sample in pack]


@pytest.fixture(scope="module")
def dataset(tiny_processor) -> CPTDataset:
    rows = [
        row(f"{number:03} <trainable_text>{digits(5 + number % 40)}</trainable_text>")
        for number in range(150)
    ]
    dataset = CPTDataset(rows, tiny_processor, max_length=64)
    assert len(dataset) % PER_STEP  # the last step of an epoch is filled up
    assert len(dataset) > 5 * PER_STEP
    return dataset


@pytest.fixture(scope="module")
def steps(make_tiny_model, tiny_processor, dataset, tmp_path_factory):
    """A function: of a layout, the documents of each step of each epoch, through each rank's own loader."""
    model = make_tiny_model()

    @cache
    def of(ranks: int, batch: int, accumulation: int, workers: int) -> list[list[set[tuple[int, ...]]]]:
        epochs = [[] for _ in range(EPOCHS)]
        for rank in range(ranks):
            with pytest.MonkeyPatch.context() as patch:
                # What accelerate shards by; no other rank is needed to read what this one is given.
                patch.setattr(Accelerator, "num_processes", ranks)
                patch.setattr(Accelerator, "process_index", rank)
                trainer = make_trainer(
                    model,
                    dataset,
                    tiny_processor,
                    tmp_path_factory.mktemp("run"),
                    per_device_train_batch_size=batch,
                    dataloader_num_workers=workers,
                )
                trainer.data_collator = documents
                loader = trainer.get_train_dataloader()
            for epoch, found in enumerate(epochs):
                loader.set_epoch(epoch)
                batches = list(loader)
                for first in range(0, len(batches), accumulation):
                    step = first // accumulation
                    if step == len(found):
                        found.append(set())
                    found[step].update(
                        one for given in batches[first : first + accumulation] for one in given
                    )
            end_persistent_workers(loader)
        for found in epochs:
            # Ranks that would have too few rows are given some of the epoch's first again, without targets.
            found[-1] -= set().union(*found[:-1])
        return epochs

    return of


@pytest.mark.parametrize(("ranks", "batch", "accumulation", "workers"), LAYOUTS)
def test_each_step_has_the_documents_that_it_has_in_one_process(ranks, batch, accumulation, workers, steps):
    assert ranks * batch * accumulation == PER_STEP

    found = steps(ranks, batch, accumulation, workers)

    assert found == steps(*LAYOUTS[0])


def test_an_epoch_has_every_document_once_and_the_next_another_order(steps, dataset):
    first, second = steps(*LAYOUTS[0])

    assert sum(len(step) for step in first) == 150 == len(set().union(*first))
    assert set().union(*first) == set().union(*second)
    assert first != second
    assert set(documents(dataset[n] for n in range(PER_STEP))) != first[0]  # nor is it that of the file
