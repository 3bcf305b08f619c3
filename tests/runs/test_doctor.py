"""``vlcpt doctor``: right where all is right; for each line one planted fault that fails that line alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

import vlcpt.data.collator
import vlcpt.data.encode.encoder
import vlcpt.model.vision_cache
import vlcpt.runs.doctor.measures
import vlcpt.runs.doctor.run
import vlcpt.runs.memory
import vlcpt.training.guards
import vlcpt.training.trainer
from vlcpt.config.yaml import complete, read_early
from vlcpt.data.encode.encoder import DocumentEncoder
from vlcpt.data.encode.features import FeatureStore
from vlcpt.report.doctor import Diagnosis
from vlcpt.runs.doctor import plain, steps
from vlcpt.runs.doctor import run as doctor
from vlcpt.runs.doctor.run import CHECKS, doctor_run
from vlcpt.training.loss import TargetLosses
from vlcpt.training.trainer import CPTTrainer

NAMES = [name for name, _ in CHECKS]
CACHED = "cached features = computed"  # not run where vision tower or merger trains
ALONE = "every rank calls the towers equally"  # not run on one process


@pytest.fixture
def examine(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Diagnosis]:
    """A function that examines the tiny model in this process."""

    def run(*options: str) -> Diagnosis:
        data = tmp_path / "train.jsonl"
        data.write_text('{"text": "one two"}\n')
        options = ("--lora_r", "4", *options) if "full" not in options else options
        config = tmp_path / "my.yaml"
        config.write_text(
            f"model_name_or_path: {tiny_model_dir}\ntrain_data: train.jsonl\noutput_dir: out\n"
            "max_length: 96\nuse_cpu: true\ndataloader_num_workers: 0\nlearning_rate: 1e-3\n"
        )
        early = read_early(config, options)
        console = Console(file=StringIO(), width=200)
        return doctor_run(early, complete(early), tmp_path / "doctor.json", quick=True, console=console)

    return run


def statuses(diagnosis: Diagnosis) -> dict[str, str]:
    return {line.name: line.status for line in diagnosis.lines}


def failed(diagnosis: Diagnosis) -> list[str]:
    return [f"{line.name}: {line.detail}" for line in diagnosis.lines if line.status == "failed"]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--bf16", "--dtype", "bfloat16"),
        pytest.param(
            ("--tuning", "full", "--train_merger", "--attn_implementation", "sdpa"), marks=pytest.mark.slow
        ),
        pytest.param(
            ("--activation_checkpointing", "--train_merger", "--lora_towers", "[language]"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["lora", "bfloat16", "full", "checkpointing, merger in full"],
)
def test_nothing_is_wrong_with_the_tiny_model(
    examine: Callable[..., Diagnosis], options: tuple[str, ...]
) -> None:
    found = examine(*options)

    assert failed(found) == []
    not_run = {ALONE, CACHED} if "--train_merger" in options else {ALONE}
    assert statuses(found) == dict.fromkeys(NAMES, "passed") | dict.fromkeys(not_run, "not run")


# A fault each: what is patched, and the line that must notice.


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """All documents of a row are one."""

    def bounds(packs, row):
        ends = torch.arange(0, row * len(packs) + 1, row, dtype=torch.int32)
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": row, "max_length_k": row,
                "document_lengths": [row] * len(packs)}  # fmt: skip

    monkeypatch.setattr(vlcpt.data.collator, "_bounds", bounds)


def mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch of a step counts the same, however many targets it has."""
    given = CPTTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return given(self, model, inputs, return_outputs) / self.args.gradient_accumulation_steps

    monkeypatch.setattr(CPTTrainer, "compute_loss", compute_loss)


def positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As every token moves by one, attention is the same: only the positions tell."""
    given = vlcpt.data.encode.encoder.mrope_positions
    monkeypatch.setattr(
        vlcpt.data.encode.encoder, "mrope_positions", lambda length, blocks: given(length, blocks) + 1
    )


def label_on_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    given = DocumentEncoder.sample

    def sample(self, *args, **kwargs):
        found = given(self, *args, **kwargs)
        for place in (found.input_ids == self._pads[vlcpt.data.documents.Image]).nonzero()[:1, 0].tolist():
            found.labels[place], found.loss_weights[place] = found.input_ids[place], 1.0
        return found

    monkeypatch.setattr(DocumentEncoder, "sample", sample)


def frozen_weight_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the smallest amount there is, and by the same one in every run."""
    given, moved = CPTTrainer.get_batch_samples, {}

    def get_batch_samples(self, *args, **kwargs):
        weight = next(one for name, one in self.model.named_parameters() if "visual" in name)
        first = weight.data.view(-1)[:1]
        first[:] = moved.setdefault("to", torch.nextafter(first, torch.ones(1)))
        return given(self, *args, **kwargs)

    monkeypatch.setattr(CPTTrainer, "get_batch_samples", get_batch_samples)


def frozen_tower_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """With activation checkpoints transformers lets a frozen tower run backward too."""
    monkeypatch.setattr(vlcpt.training.guards, "limit_checkpointing", lambda model: None)


def wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is right, its gradient is 1% too large."""
    given = vlcpt.training.trainer.target_losses

    def target_losses(*args, **kwargs) -> TargetLosses:
        found = given(*args, **kwargs)
        return found._replace(nll=found.nll * 1.01 - (found.nll * 0.01).detach())

    monkeypatch.setattr(vlcpt.training.trainer, "target_losses", target_losses)


def wrong_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are kept come back 1% too large."""
    given = FeatureStore.get

    def get(self, key, tokens):
        found = given(self, key, tokens)
        return None if found is None else found * 1.01

    monkeypatch.setattr(FeatureStore, "get", get)


def features_of_an_earlier_tower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are no part of the key."""
    monkeypatch.setattr(vlcpt.model.vision_cache, "_weights", lambda base: iter(()))


def features_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FeatureStore, "get", lambda self, key, tokens: None)


def optimizer_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume begins with the optimizer's state of step 1."""
    monkeypatch.setattr(CPTTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)


def estimate_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    given = vlcpt.runs.memory.estimate_memory

    def estimate(shape, towers, batch, setup):
        found = given(shape, towers, batch, setup)
        small = {key: -(2**30) if key == "weights" else 0 for key in ("weights", "activations", "logits")}
        return vlcpt.report.memory.MemoryEstimate(**{**vars(found), **small})

    monkeypatch.setattr(vlcpt.runs.memory, "estimate_memory", estimate)


def loss_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the steps that are measured, in the log alone."""
    given = CPTTrainer.log

    def log(self, logs, *args, **kwargs):
        if "load" in str(self.args.output_dir) and "loss" in logs:
            logs["loss"] = math.nan
        return given(self, logs, *args, **kwargs)

    monkeypatch.setattr(CPTTrainer, "log", log)


# Each fault with its line and what that says; those of a tuple are planted together, and fail a line each.
FAULTS = [
    (
        (positions_off_by_one, "positions = the model's own", r"\d+ of \d+ tokens have other positions"),
        (optimizer_forgotten, "save and resume = uninterrupted", r"after a resume the weights are off by"),
        (estimate_too_low, "memory as foreseen", r"MiB at most, and -?[\d,]+ MiB were foreseen"),
    ),
    (
        (label_on_an_image, "media are never targets", r"\d+ of \d+ tokens of images and clips have a loss"),
        (frozen_weight_moved, "frozen towers are untouched", r"1 weights that do not train have changed"),
        (loss_not_a_number, "speed", r"a number is not finite"),
    ),
    (
        (leak, "packed = alone", r"documents see each other"),
        (wrong_features, CACHED, r"with kept features the .* of a step is off by"),
    ),
    ((wrong_gradient, "fast paths = plain", r"gradient of .* is off by 1\.0e-02"),),
    (
        (mean_of_means, "step = any split of it", r"depends on how it is divided"),
        (
            frozen_tower_backward,
            "frozen towers are untouched",
            r"\d+ of \d+ forward passes of the frozen vision tower keep",
        ),
    ),
]


@pytest.mark.parametrize(
    "faults", FAULTS, ids=lambda faults: " ".join(fault.__name__ for fault, *_ in faults)
)
def test_a_fault_fails_its_line_and_no_other(
    examine: Callable[..., Diagnosis],
    monkeypatch: pytest.MonkeyPatch,
    faults: tuple[tuple[Callable[[pytest.MonkeyPatch], None], str, str], ...],
) -> None:
    for fault, _, _ in faults:
        fault(monkeypatch)
    checkpointing = any(fault is frozen_tower_backward for fault, _, _ in faults)

    found = examine(*(("--activation_checkpointing",) if checkpointing else ()))

    by_line = {one.partition(":")[0]: one for one in failed(found)}
    assert by_line.keys() == {line for _, line, _ in faults}, failed(found)
    for _, line, cause in faults:
        assert re.search(cause, by_line[line]), failed(found)
    assert not found.passed


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (features_of_an_earlier_tower, "features of the earlier tower are taken for its own"),
        (features_never_read, "forward passes of the vision tower compute features that are kept"),
    ],
)
def test_other_faults_of_the_cache_fail_its_line(
    examine: Callable[..., Diagnosis],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[pytest.MonkeyPatch], None],
    cause: str,
) -> None:
    """The other checks do not use it."""
    fault(monkeypatch)
    monkeypatch.setattr(
        vlcpt.runs.doctor.run, "CHECKS", [one for one in vlcpt.runs.doctor.run.CHECKS if one[0] == CACHED]
    )

    assert cause in failed(examine())[0]


def test_what_deepspeed_holds_in_16_bits_is_compared_with_a_plain_path_in_16_bits(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\ntuning: full\ntrain_data: train.jsonl\noutput_dir: out\n"
        "max_length: 96\nuse_cpu: true\ndataloader_num_workers: 0\n"
    )
    (tmp_path / "train.jsonl").write_text('{"text": "one two"}\n')
    early = read_early(tmp_path / "my.yaml", ())
    held, found = [], []

    def narrow(model: torch.nn.Module, dtype: torch.dtype) -> None:
        plain.narrow_weights(model, dtype)
        held.append({one.dtype for one in model.parameters()})

    monkeypatch.setattr(steps, "narrow_weights", narrow)
    for converted in (None, torch.bfloat16):
        monkeypatch.setattr(steps, "converted_type", lambda training, converted=converted: converted)
        subject = doctor._subject(early, complete(early), tmp_path, quick=True)
        found.append(steps.reference(subject))

    assert held == [{torch.bfloat16}] * 2
    assert max(found[0].errors.values()) < 1e-4 < 1e-3 < min(found[1].errors.values())
    assert found[0].loss == found[1].loss


def test_every_line_has_a_fault() -> None:
    assert {line for faults in FAULTS for _, line, _ in faults} == set(NAMES) - {
        ALONE
    }  # that one: test_doctor_ranks.py
