"""Tests of vlcpt/training/step.py: what fails only while training runs."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info
from transformers import TrainerCallback

from tests.processes import run_on_ranks, start_ranks
from tests.support import wait_for
from tests.training.failing_ranks import RUNS
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, DocumentError, ModelConfig, load_model
from vlcpt.data.plan.failures import FailedSample
from vlcpt.data.plan.ledger import BadDataError, Dropped
from vlcpt.data.workers import LoadingError
from vlcpt.training.checkpoints.files import list_checkpoints, verify
from vlcpt.training.step import FAILED, ReadBatch, note_failed, share_towers


def rows(folder: Path, count: int = 4) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for number in range(count):
        Image.new("RGB", (56, 56), (number * 40, 0, 0)).save(folder / f"{number}.png")
        text = f"<image>one <trainable_text>two {number}</trainable_text>"
        found.append({"text": text, "images": [f"{number}.png"]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return found


def trainer(folder: Path, model, processor, workers: int = 0, packing: bool = True, **options):
    data = {key: options.pop(key) for key in ("on_bad_data", "max_bad_fraction") if key in options}

    def of_rows():
        return CPTDataset(folder / "train.jsonl", processor, max_length=256, packing=packing, **data)

    dataset = of_rows()
    args = CPTConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        num_train_epochs=options.pop("num_train_epochs", 1),
        dataloader_num_workers=workers,
        **({"save_strategy": "no"} | options),
    )
    evaluated = of_rows() if "eval_strategy" in options else None  # with a board of its own for its workers
    run = CPTTrainer(model, args, train_dataset=dataset, eval_dataset=evaluated, processing_class=processor)
    return run, dataset


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
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.25}
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, workers, **skip)
    spoil(tmp_path, 2)
    run.train()

    total = dataset.ledger.total
    assert (total.documents["used"], total.dropped_documents["medium"]) == (3, 1)
    dataset.ledger.check()
    (line,) = (tmp_path / "out/dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["line"] == 3


class Steps(TrainerCallback):
    """Keeps the step and the loss of each line of the log, and how often the optimizer stepped."""

    def __init__(self):
        self.losses, self.updates = [], 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append((state.global_step, logs["loss"]))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.updates += 1


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def test_a_step_of_which_nothing_is_left_is_counted_and_a_resume_goes_on_behind_it(
    tiny_model_dir, tiny_processor, tmp_path
):
    rows(tmp_path)
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.25, "packing": False, "num_train_epochs": 2}
    config = ModelConfig(str(tiny_model_dir), tuning="full")

    def run(**more):
        run, _ = trainer(tmp_path, load_model(config), tiny_processor, **skip, logging_steps=1, **more)
        run.add_callback(steps := Steps())
        return run, steps

    whole, seen = run(save_strategy="steps", save_steps=1)
    spoil(tmp_path, 1)
    whole.train()
    trained = [step for step, _ in seen.losses]
    assert len(trained) == seen.updates == 6
    assert set(trained) < set(range(1, 9))  # two are missing
    assert all(loss > 1 for _, loss in seen.losses)  # a mean over a step that was lost would be half

    for step in (trained[1], trained[3], trained[-1]):
        again, more = run()
        again.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{step}"))
        assert more.losses == [one for one in seen.losses if one[0] > step]
        expected = weights(whole.model)
        assert all(torch.equal(one, expected[name]) for name, one in weights(again.model).items())


def test_after_a_lost_step_the_last_batches_of_an_epoch_are_trained(tiny_model, tiny_processor, tmp_path):
    """Five documents, two a step: one step is lost, and two are left, the last of which has one document."""
    rows(tmp_path, 5)
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.4, "packing": False}
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, **skip, gradient_accumulation_steps=2)
    order = [sample for batch in run.get_train_dataloader().batch_sampler for sample in batch]
    for item in order[:2]:
        spoil(tmp_path, int(dataset.names(item)[0].rpartition(":")[2]) - 1)
    run.add_callback(steps := Steps())
    run.train()

    assert dataset.ledger.total.dropped_documents == {"medium": 2}
    assert steps.updates == 2
    assert all(one.grad is None for one in run.model.parameters())


def test_failures_count_with_the_rows_that_planning_left_out_and_stop_the_run(
    tiny_model, tiny_processor, tmp_path
):
    """Of 10 rows, 2 may be bad: one is before training, and the second that fails in it is one too many."""
    rows(tmp_path, 9)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": 3}\n')
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.2}
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, packing=False, num_train_epochs=3, **skip)
    spoil(tmp_path, 1)
    spoil(tmp_path, 4)

    with pytest.raises(BadDataError) as raised:
        run.train()

    assert re.match(
        r"3 of 10 rows of 'train' cannot be used, more than max_bad_fraction 0\.2: 1 were left out in "
        r"planning, and 2 failed when they were read\. Reasons: 2 medium\. Mend them .*, or set "
        r"max_bad_fraction above 0\.3\. The last: .*train\.jsonl:[25]: images: [14]\.png",
        str(raised.value),
    )
    assert run.state.epoch < 1  # a document that fails again in a later epoch would not count again
    assert len((tmp_path / "out/dropped.jsonl").read_text().splitlines()) == 2
    assert dataset.ledger.total.dropped_documents == {"row": 1, "medium": 2}
    dataset.ledger.check()


def test_a_document_counts_once_in_all_epochs(tiny_model, tiny_processor, tmp_path):
    rows(tmp_path)
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.25}
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, packing=False, num_train_epochs=3, **skip)
    spoil(tmp_path, 1)
    run.train()

    assert dataset.ledger.total.dropped_documents["medium"] == 1


def test_a_resumed_run_knows_what_failed_before(tiny_model, tiny_processor, tmp_path):
    rows(tmp_path, 6)
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.4, "packing": False}
    run, dataset = trainer(
        tmp_path, tiny_model, tiny_processor, **skip, save_strategy="steps", save_steps=1, seed=3
    )
    whole = (tmp_path / "2.png").read_bytes()
    spoil(tmp_path, 2)
    run.train()
    (tmp_path / "2.png").write_bytes(whole)  # so that it is not found again
    first = dataset.ledger.as_json()
    lines = (tmp_path / "out/dropped.jsonl").read_text()
    assert first["total"]["documents"]["dropped"] == {"medium": 1}
    assert first["samples"] == first["total"]["samples"] == 5
    newest = list_checkpoints(tmp_path / "out")[-1]
    assert FAILED in verify(newest).files

    resumed, dataset = trainer(tmp_path, tiny_model, tiny_processor, **skip, seed=3)
    resumed.train(resume_from_checkpoint=str(newest))

    assert dataset.ledger.as_json() == first
    assert json.loads((tmp_path / "out/ledger.json").read_text()) == json.loads(json.dumps(first))
    assert (tmp_path / "out/dropped.jsonl").read_text() == lines
    assert lines.count("\n") == 1


def test_a_checkpoint_before_the_failure_does_not_know_of_it(tiny_model, tiny_processor, tmp_path):
    """Its document is read again, and may be whole by then."""
    rows(tmp_path, 6)
    skip = {"on_bad_data": "skip", "max_bad_fraction": 0.4, "packing": False}
    run, dataset = trainer(tmp_path, tiny_model, tiny_processor, **skip, save_strategy="steps", save_steps=1)
    whole = (tmp_path / "2.png").read_bytes()
    spoil(tmp_path, 2)
    run.train()
    (tmp_path / "2.png").write_bytes(whole)
    assert dataset.ledger.total.dropped_documents == {"medium": 1}
    unaware = [one for one in list_checkpoints(tmp_path / "out") if FAILED not in verify(one).files]
    assert 0 < len(unaware) < 5

    resumed, dataset = trainer(tmp_path, tiny_model, tiny_processor, **skip)
    resumed.train(resume_from_checkpoint=str(unaware[-1]))

    assert dataset.ledger.total.dropped_documents.total() == 0
    assert dataset.ledger.samples == 6
    assert (tmp_path / "out/dropped.jsonl").read_text() == ""


def test_100_that_fail_in_a_row_stop_the_run_whatever_the_fraction(tiny_processor):
    """As where a disk goes away. One that is read in between starts the count again."""
    texts = [{"text": f"one {number}"} for number in range(300)]
    dataset = CPTDataset(texts, tiny_processor, max_length=64, on_bad_data="skip", max_bad_fraction=1)
    failed = [
        FailedSample(
            0, number, Dropped("rows", number, None, "medium", "gone"), f"rows:{number}: gone", False
        )
        for number in range(300)
    ]
    for one in failed[:99]:
        note_failed([ReadBatch([one], any_read=False)], dataset, None)
    note_failed([ReadBatch([], any_read=True)], dataset, None)
    for one in failed[99:198]:
        note_failed([ReadBatch([one], any_read=False)], dataset, None)

    with pytest.raises(BadDataError, match=r"^100 documents in a row failed .* The last: rows:198: gone$"):
        note_failed([ReadBatch([failed[198]], any_read=False)], dataset, None)
    assert dataset.ledger.total.dropped_documents == {"medium": 199}


def test_failures_before_a_resume_count_towards_both_limits(tiny_processor):
    def dataset(max_bad_fraction):
        texts = [{"text": f"one {number}"} for number in range(300)]
        return CPTDataset(
            texts, tiny_processor, max_length=64, on_bad_data="skip", max_bad_fraction=max_bad_fraction
        )

    def note(number, dataset):
        dropped = Dropped("rows", number, None, "medium", "gone")
        failed = FailedSample(0, number, dropped, f"rows:{number}: gone", stops=False)
        note_failed([ReadBatch([failed], any_read=False)], dataset, None)

    first = dataset(1)
    for number in range(60):
        note(number, first)
    state = json.loads(json.dumps(first.failures.state()))

    in_a_row, fraction = dataset(1), dataset(0.2)
    in_a_row.failures.restore(state)
    fraction.failures.restore(state)
    assert in_a_row.ledger.as_json() == first.ledger.as_json()
    note(59, in_a_row)  # again
    for number in range(60, 99):
        note(number, in_a_row)
    with pytest.raises(BadDataError, match=r"^100 documents in a row failed"):
        note(99, in_a_row)
    with pytest.raises(BadDataError, match=r"^61 of 300 rows .* and 61 failed when they were read"):
        note(60, fraction)


@pytest.mark.slow
@pytest.mark.alone
def test_two_ranks_enter_each_others_failures_and_stop_together(tiny_model_dir, tmp_path):
    rows(tmp_path, 12)
    for name in RUNS:
        shutil.copytree(tmp_path, tmp_path / name, ignore=lambda *_: list(RUNS))
    done = run_on_ranks("tests.training.failing_ranks", str(tmp_path), str(tiny_model_dir), timeout=200)
    assert done.returncode == 0, done.stdout

    def found(name: str) -> list[dict[str, object]]:
        return [json.loads((tmp_path / name / f"rank-{rank}").read_text()) for rank in range(2)]

    few, many, stops = found("few"), found("many"), found("stops")
    assert few[0] == few[1]
    assert few[0]["resumed"] == few[0]["ledger"]
    assert few[0]["error"] is None
    assert few[0]["ledger"]["total"]["documents"]["dropped"] == {"medium": 3}
    lines = (tmp_path / "few/out/dropped.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["line"] for line in lines) == [2, 5, 8]
    assert many[0] == many[1]
    assert many[0]["error"].startswith("BadDataError: ")
    assert stops[0] == stops[1]
    assert stops[0]["error"].startswith("DocumentError: ")


def test_a_row_that_changes_during_the_run_is_an_error(tiny_model, tiny_processor, tmp_path):
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


class Strike(TrainerCallback):
    """Sends a signal to all loader workers in the middle of a step, or of an evaluation."""

    def __init__(self, number, place="on_step_begin"):
        self.number, self.ended = number, []
        self._before = multiprocessing.active_children()
        setattr(self, place, self._strike)

    def children(self):
        return [one for one in multiprocessing.active_children() if one not in self._before]

    def _strike(self, args, state, control, **kwargs):
        if self.number is None:
            return
        time.sleep(0.5)  # they have read ahead, and would hand it over
        assert self.children()
        for child in self.children():
            os.kill(child.pid, self.number)
        self.number = None
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:  # where an exception out of a handler would come
            pass

    def on_step_end(self, args, state, control, **kwargs):
        self.ended.append(state.global_step)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_that_end_or_stop_amid_a_step_end_the_run_after_it(
    tiny_model, tiny_processor, tmp_path, number, persistent, workers
):
    rows(tmp_path, 12)
    run, _ = trainer(
        tmp_path,
        tiny_model,
        tiny_processor,
        workers,
        packing=False,
        dataloader_timeout=2,
        dataloader_persistent_workers=persistent,
        save_strategy="steps",
        save_steps=1,
    )
    run.add_callback(strike := Strike(number))
    start = time.monotonic()
    with pytest.raises(LoadingError) as raised:
        run.train()

    assert time.monotonic() - start < 30
    what = "timed out after 2 seconds .*stopped" if number == signal.SIGSTOP else r"was killed \(SIGKILL\)"
    assert re.search(rf"{what}.*worker 0 .*train\.jsonl:\d", str(raised.value))
    assert strike.ended  # the step was finished
    assert strike.children() == []
    assert list_checkpoints(tmp_path / "out")[-1].name == f"checkpoint-{strike.ended[-1]}"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("trains", [True, False])
def test_workers_that_end_or_stop_amid_an_evaluation_end_it(
    tiny_model, tiny_processor, tmp_path, number, trains
):
    rows(tmp_path, 12)
    run, _ = trainer(
        tmp_path,
        tiny_model,
        tiny_processor,
        1,
        packing=False,
        dataloader_timeout=2,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.add_callback(strike := Strike(number, "on_prediction_step"))
    with pytest.raises(LoadingError, match=r"(timed out|killed).* worker 0 .*train\.jsonl:\d") as raised:
        run.train() if trains else run.evaluate()

    assert ("stopped, as by kill -STOP" in str(raised.value)) == (number == signal.SIGSTOP)
    assert strike.children() == []


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_of_one_rank_ends_all_ranks_and_the_run_can_go_on(tiny_model_dir, tmp_path, number):
    rows(tmp_path, 6)
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 256\n"
        "packing: false\nuse_cpu: true\nmax_steps: 30\nsave_steps: 1\nsave_strategy: steps\n"
        "dataloader_num_workers: 1\ndataloader_timeout: 5\nddp_timeout: 30\nreport_to: none\n"
    )
    command = ["vlcpt", "train", str(tmp_path / "my.yaml")]
    ranks, store = start_ranks(command, tmp_path / "output")
    try:
        wait_for(lambda: list_checkpoints(tmp_path / "out"), 120)
        workers = Path(f"/proc/{ranks[1].pid}/task/{ranks[1].pid}/children").read_text().split()
        assert workers
        for worker in workers:
            os.kill(int(worker), number)
        codes = [rank.wait(90) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
        del store

    said = (tmp_path / "output").read_text()
    assert codes == [1, 1], said
    assert re.search(r"worker 0 .*train\.jsonl:\d", said.replace("\n", " ")), said
    assert "Traceback" not in said
    done = run_on_ranks(*command, "--resume_from_checkpoint", "auto", "--max_steps", "30", timeout=200)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "out" / "checkpoint-30").is_dir()


@pytest.mark.parametrize(
    ("towers", "has_media", "fills", "looks"),
    [
        ({}, True, True, False),
        ({"train_merger": True}, True, True, False),
        ({"train_merger": True}, False, True, True),
        ({"train_merger": True}, True, False, True),
    ],
    ids=["frozen", "filled", "no media", "another collator"],
)
def test_ddp_looks_for_unused_weights_only_where_a_batch_may_leave_a_trained_tower_out(
    tiny_model_dir, tiny_processor, tmp_path, towers, has_media, fills, looks
):
    rows(tmp_path)
    data = tmp_path / "train.jsonl" if has_media else [{"text": "one two"}]
    dataset = CPTDataset(data, tiny_processor, max_length=256)
    args = CPTConfig(str(tmp_path), use_cpu=True)

    share_towers(
        load_model(ModelConfig(str(tiny_model_dir), **towers)),
        args,
        [dataset],
        is_partitioned=False,
        fills=fills,
    )

    assert args.ddp_find_unused_parameters is looks
