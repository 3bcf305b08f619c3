"""Tests of vlcpt/training/checkpoints/callback.py: checkpoints through the trainer."""

import errno
import json
import logging
import os
import resource
import shutil
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.processes import holding
from tests.support import FOUR, make_trainer
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.errors import ConfigError
from vlcpt.file_writes import WriteError
from vlcpt.folder_locks import LOCK
from vlcpt.training.checkpoints.files import (
    MANIFEST,
    RECORD,
    UNFINISHED,
    CheckpointError,
    list_checkpoints,
    verify,
    write_manifest,
)

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def make(tiny_model_dir, tiny_processor, tmp_path):
    """A function that makes a trainer that saves each step into ``tmp_path/out``."""

    def make(steps, tuning="lora", rows=FOUR, callbacks=(), **settings):
        dataset = CPTDataset(rows, tiny_processor, max_length=256, packing=False)
        torch.manual_seed(0)
        model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning))
        defaults = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        return make_trainer(
            model,
            dataset,
            tiny_processor,
            tmp_path / "out",
            callbacks=list(callbacks),
            max_steps=steps,
            **(defaults | settings),
        )

    return make


def steps(output):
    return [int(one.name.rpartition("-")[2]) for one in list_checkpoints(output)]


def weights(trainer):
    return {name: one.detach().clone() for name, one in trainer.model.named_parameters()}


def equal(first, second):
    return all(torch.equal(one, second[name]) for name, one in first.items())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_checkpoint_verifies_and_holds_no_pickle_of_the_arguments(make, tmp_path, tuning):
    make(2, tuning).train()

    assert steps(tmp_path / "out") == [1, 2]
    for folder in list_checkpoints(tmp_path / "out"):
        names = verify(folder).files.keys()
        assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} < names
        assert "training_args.bin" not in names
        assert not (folder / UNFINISHED).exists()


def test_files_that_another_callback_adds_belong_to_the_checkpoint(make, tmp_path):
    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / f"out/checkpoint-{state.global_step}/notes.txt").write_text("mine")

    trainer = make(1)
    trainer.add_callback(Note())  # after all others
    trainer.train()

    assert "notes.txt" in verify(tmp_path / "out/checkpoint-1").files


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "emptied": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "truncated": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "flipped": lambda folder: flip(folder / "adapter_model.safetensors"),
    "interrupted": lambda folder: [(folder / MANIFEST).unlink(), (folder / UNFINISHED).touch()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_with_a_damaged_newest_the_previous_is_used_and_the_end_is_the_same(make, tmp_path, caplog, damage):
    whole = make(4)
    whole.train()
    expected = weights(whole)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    DAMAGE[damage](tmp_path / "out/checkpoint-3")
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.append(state.global_step)

    resumed = make(4, callbacks=[Losses()])
    with caplog.at_level(logging.WARNING, "vlcpt"):
        resumed.train(resume_from_checkpoint=True)

    assert "skipped checkpoint-3: " in caplog.text
    assert losses[0] == 3  # from 2
    assert equal(weights(resumed), expected)
    verify(tmp_path / "out/checkpoint-3")  # written anew


def test_none_that_verifies_is_an_error(make, tmp_path):
    make(1).train()
    flip(tmp_path / "out/checkpoint-1/optimizer.pt")

    for resume in (True, "auto", str(tmp_path / "out/checkpoint-1")):
        with pytest.raises(CheckpointError, match=r"the content of optimizer\.pt is not what was saved"):
            make(2).train(resume_from_checkpoint=resume)


def test_auto_starts_fresh_where_nothing_was_saved(make, tmp_path):
    make(1).train(resume_from_checkpoint="auto")

    assert steps(tmp_path / "out") == [1]


def test_a_model_that_names_no_pad_token_resumes(make):
    """As published: Trainer then takes it from the tokenizer, after a checkpoint was chosen."""

    def bare(steps):
        trainer = make(steps)
        for name in ("pad_token_id", "bos_token_id"):
            setattr(trainer.model.config.get_text_config(), name, None)
        return trainer

    first = bare(1)
    first.train()
    assert first.model.config.get_text_config().pad_token_id is not None  # or nothing is shown

    resumed = bare(2)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 2


def test_a_checkpoint_of_another_run_is_refused_by_name(make):
    make(1).train()

    with pytest.raises(
        CheckpointError, match=r"checkpoint-1 is of another run\. .*seed: saved with 42, now 7"
    ):
        make(2, seed=7).train(resume_from_checkpoint=True)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1 is of another run\. the plan of the training data"
    ):
        make(2, rows=FOUR[:3]).train(resume_from_checkpoint=True)


def test_one_without_states_is_refused(make):
    make(1, save_only_model=True).train()

    with pytest.raises(
        CheckpointError, match=r"has no optimizer.pt, scheduler.pt, rng_state.pth, .*save_only_m"
    ):
        make(2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_changed_tensor_is_refused_even_if_the_manifest_is_made_anew(make, tmp_path, tuning):
    make(1, tuning).train()
    folder = tmp_path / "out/checkpoint-1"
    (path,) = folder.glob("*model.safetensors")
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[3])
    save_file(tensors, path, {"format": "pt"})
    write_manifest(folder, facts_of(folder))

    with pytest.raises(CheckpointError, match=r"its tensors are not those of the model in memory: 1 missing"):
        make(2, tuning).train(resume_from_checkpoint=True)


def facts_of(folder):
    return json.loads((folder / MANIFEST).read_text())["run"]


@pytest.mark.parametrize(("limit", "left"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_older_checkpoints_go_when_the_new_one_is_complete(make, tmp_path, limit, left):
    trainer = make(4, save_total_limit=limit)
    trainer.train()

    assert steps(tmp_path / "out") == left
    assert not (tmp_path / "out" / RECORD).exists()  # only DeepSpeed's states need one
    assert trainer.args.save_total_limit == limit


def test_none_is_deleted_before_the_manifest_of_the_next_is_there(make, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(folder, facts):
        if folder.name == "checkpoint-3":
            raise Killed
        return write_manifest(folder, facts)

    monkeypatch.setattr("vlcpt.training.checkpoints.callback.write_manifest", killed)
    with pytest.raises(Killed):
        make(3, save_total_limit=1).train()

    verify(tmp_path / "out/checkpoint-2")


def test_transformers_alone_still_rotates_before_callbacks(make, tmp_path):
    """When this fails, Trainer's own save_total_limit may be enough."""
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(steps(tmp_path / "out"))

    trainer = make(2, callbacks=[Look()])
    kept = trainer._checkpoints.kept

    @contextmanager
    def not_off():
        with kept():
            trainer.args.save_total_limit = 1
            yield

    trainer._checkpoints.kept = not_off
    trainer.train()

    assert seen == [[1], [2]]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_the_best_is_kept_verified_and_loaded_after_a_resume(make, tmp_path, tiny_processor, tuning):
    held_out = CPTDataset(FOUR, tiny_processor, max_length=256)
    best = {
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that the best is the first
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "eval_dataset": held_out,
    }
    make(2, tuning, **best).train()
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", moved)
    shutil.rmtree(tmp_path / "out")
    moved.rename(tmp_path / "out")

    resumed = make(3, tuning, **best)
    resumed.train(resume_from_checkpoint=True)

    assert steps(tmp_path / "out") == [1, 3]
    first = make(1, tuning)
    first.args.output_dir = str(tmp_path / "once")
    first.train()
    assert equal(weights(resumed), weights(first))


def test_a_best_checkpoint_that_does_not_verify_is_named_and_forgotten(
    make, tmp_path, tiny_processor, caplog
):
    held_out = CPTDataset(FOUR, tiny_processor, max_length=256)
    best = {
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "eval_dataset": held_out,
    }
    make(2, **best).train()
    flip(tmp_path / "out/checkpoint-1/adapter_model.safetensors")

    resumed = make(3, **best)
    with caplog.at_level(logging.WARNING, "vlcpt"):
        resumed.train(resume_from_checkpoint=True)

    assert "the best checkpoint so far, checkpoint-1, cannot be used: the content of adapter_m" in caplog.text
    assert resumed.state.best_model_checkpoint.endswith("checkpoint-3")


def test_a_best_checkpoint_that_breaks_during_the_run_is_not_saved_as_the_result(
    make, tmp_path, tiny_processor
):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                flip(tmp_path / "out/checkpoint-1/tokenizer.json")

    trainer = make(
        2,
        callbacks=[Break()],
        metric_for_best_model="loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_dataset=CPTDataset(FOUR, tiny_processor, max_length=256),
    )
    with pytest.raises(
        CheckpointError, match=r"the best checkpoint, .*checkpoint-1: the content of tokenizer\.js"
    ):
        trainer.train()


def test_too_little_room_is_an_error_before_anything_is_written(make, tmp_path, monkeypatch):
    make(1).train()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 50_000))

    with pytest.raises(
        WriteError,
        match=r"checkpoint-2 could not be written: there is too little room\. It takes about .* kB, and "
        r"50\.0 kB are free there\. .*checkpoint-1 is complete\. Lower save_total_limit, and start again",
    ):
        make(2).train(resume_from_checkpoint=True)

    assert steps(tmp_path / "out") == [1]
    verify(tmp_path / "out/checkpoint-1")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_and_no_half_one(make, tmp_path, name):
    """A limit on the size of a file: the write fails in the adapter, or in the optimizer's states."""
    make(1).train()
    limit = (tmp_path / "out/checkpoint-1" / name).stat().st_size - 1000
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(
            WriteError,
            match=r"checkpoint-2 could not be written: .* It takes about .* checkpoint-1 is complete",
        ):
            make(2).train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)

    assert steps(tmp_path / "out") == [1]
    make(2).train(resume_from_checkpoint=True)
    assert steps(tmp_path / "out") == [1, 2]


def test_a_full_disk_while_the_manifest_is_written_is_an_error(make, tmp_path, monkeypatch):
    make(1).train()

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("vlcpt.training.checkpoints.files.write_file", full)
    with pytest.raises(WriteError, match=r"checkpoint-2 could not be written: .*No space left on device"):
        make(2).train(resume_from_checkpoint=True)

    assert steps(tmp_path / "out") == [1]


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_does_not_run(make, tmp_path, name):
    """Its manifest is made anew, as whoever plants it would do."""
    make(1).train()
    folder = tmp_path / "out/checkpoint-1"
    torch.save({"state": Bomb(str(tmp_path / "ran"))}, folder / name)
    write_manifest(folder, facts_of(folder))

    with pytest.raises(CheckpointError, match="it is a pickle that holds more than tensors"):
        make(2).train(resume_from_checkpoint=True)

    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # or the file would be no bomb


def test_training_where_another_process_trains_is_refused_and_deletes_nothing(make, tmp_path):
    make(3).train()
    with holding(tmp_path / "out") as (first, _):
        for resume in (None, True):
            with pytest.raises(ConfigError, match=rf"is in use by process {first.pid} on host "):
                make(3, save_total_limit=1).train(resume_from_checkpoint=resume)
    assert steps(tmp_path / "out") == [1, 2, 3]
    make(4).train(resume_from_checkpoint=True)  # when that has ended
    make(4).train()  # and twice in one process
    assert not (tmp_path / "out" / LOCK).exists()


def test_what_fails_before_a_save_begins_leaves_the_checkpoint_that_it_would_replace(make, tmp_path):
    make(2).train()
    (tmp_path / "out" / ".checkpoint-9.deleted").touch()  # a file where a folder is to be deleted

    with pytest.raises(NotADirectoryError):
        make(2).train(str(tmp_path / "out" / "checkpoint-1"))

    verify(tmp_path / "out" / "checkpoint-2")
