"""Tests of vlcpt/training/failures.py: what fails only while training runs."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import get_worker_info

from vlcpt import CPTConfig, CPTDataset, CPTTrainer, DocumentError
from vlcpt.training.failures import LoadingError


def rows(folder: Path, count: int = 4) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for number in range(count):
        Image.new("RGB", (56, 56), (number * 40, 0, 0)).save(folder / f"{number}.png")
        text = f"<image>one <trainable_text>two {number}</trainable_text>"
        found.append({"text": text, "images": [f"{number}.png"]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def trainer(folder: Path, model, processor, workers: int = 0, packing: bool = True, **options):
    data = {key: options.pop(key) for key in ("on_bad_data",) if key in options}
    dataset = CPTDataset(folder / "train.jsonl", processor, max_length=256, packing=packing, **data)
    args = CPTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_train_epochs=1,
        dataloader_num_workers=workers,
        save_strategy="no",
        **options,
    )
    return CPTTrainer(model, args, train_dataset=dataset, processing_class=processor), dataset


def spoil(folder: Path, number: int) -> None:
    """Cut the pixels of an image off; its header stays."""
    path = folder / f"{number}.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_the_run_stops_it_with_one_message(
    tiny_model, tiny_processor, tmp_path, workers
):
    rows(tmp_path)
    run, _ = trainer(tmp_path, tiny_model, tiny_processor, workers)
    spoil(tmp_path, 2)

    with pytest.raises(DocumentError, match=r"train\.jsonl:3: images: 2\.png") as raised:
        run.train()
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_with_skip_it_leaves_its_pack_and_enters_the_ledger(tiny_model, tiny_processor, tmp_path, workers):
    rows(tmp_path)
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, workers, on_bad_data="skip")
    spoil(tmp_path, 2)
    run.train()

    total = dataset.ledger.total
    assert (total.documents["used"], total.dropped_documents["medium"]) == (3, 1)
    dataset.ledger.check()
    (line,) = (tmp_path / "out/dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 3


def test_a_step_of_which_nothing_is_left_takes_the_next_batches(tiny_model, tiny_processor, tmp_path):
    rows(tmp_path)
    run, _ = trainer(tmp_path, tiny_model, tiny_processor, packing=False, on_bad_data="skip")
    spoil(tmp_path, 1)
    run.train()

    assert run.state.global_step == 3


def test_a_row_that_changes_during_the_run_is_told(tiny_model, tiny_processor, tmp_path):
    rows(tmp_path)
    run, _ = trainer(tmp_path, tiny_model, tiny_processor)
    Image.new("RGB", (560, 560)).save(tmp_path / "1.png")

    with pytest.raises(DocumentError, match="a medium was changed since"):
        run.train()


def test_a_worker_that_dies_is_named_with_its_documents(tiny_model, tiny_processor, tmp_path, monkeypatch):
    rows(tmp_path)
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, workers=1)

    def die(number):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(dataset, "_sample_or_failure", die)
    with pytest.raises(LoadingError, match=r"worker 0 was reading .*train\.jsonl:1"):
        run.train()


def test_a_worker_that_hangs_is_named_after_the_timeout(tiny_model, tiny_processor, tmp_path, monkeypatch):
    rows(tmp_path)
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, workers=1, dataloader_timeout=2)
    monkeypatch.setattr(dataset, "_sample_or_failure", lambda number: time.sleep(60))

    with pytest.raises(LoadingError, match=r"timed out after 2 seconds.*worker 0 was reading"):
        run.train()
