"""The part of ``gpu.py`` that trains: a model of the 3B's shapes, on packs of images and text."""

from __future__ import annotations

import gc
import io
import json
import os
import random
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from gpu_machine import Findings, device, rounded, wait
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, ProcessorMixin

    from vlcpt.config.yaml import Configs
    from vlcpt.data.dataset import CPTDataset
    from vlcpt.report.memory import MemoryEstimate

# The reference document: 3 images of 800×600 (609 tokens each) and 606 tokens of text, 400 of them targets;
# the others have fewer images, and text in proportion.
IMAGES, CONTEXT, TARGETS = (3, 2, 1, 0), 206, 400
TINY_TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 3168,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6},
}  # fmt: skip
TINY_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "tokens_per_second": 2, "window_size": 112, "fullatt_block_indexes": [1],
}  # fmt: skip
CONFIG = """
model_name_or_path: base
tuning: {tuning}
dtype: bfloat16
bf16: true
use_cpu: {use_cpu}
train_data: train.jsonl
output_dir: {output}
max_length: {tokens}
max_steps: {steps}
learning_rate: 1e-5
save_strategy: "no"
report_to: none
disable_tqdm: true
overwrite: true
"""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Args:
        tuning: lora or full.
        tokens: Of a pack.
        tiny: Small shapes, documents and images.
        steps: At most.
        warm: Steps that are not counted: the allocator, the workers and libraries settle.
        seconds: After which no further step begins.
        workers: Loader workers; None: as configured, or as many as ``vlcpt check`` names.
        profiles: Whether torch's profiler watches the last step.
    """

    tuning: str
    tokens: int
    tiny: bool = False
    steps: int = 24
    warm: int = 4
    seconds: float = 60
    workers: int | None = None
    profiles: bool = False


# --- what is trained on ---


def write_inputs(folder: Path, *, tiny: bool) -> None:
    """A configuration of the model, its processor, images and documents; nothing where they are."""
    if (folder / "train.jsonl").is_file():
        return
    _write_base(folder / "base", tiny=tiny)
    _write_documents(folder, tiny=tiny)


def _write_base(folder: Path, *, tiny: bool) -> None:
    """The configuration and the demo's processor with the published pixel budget; no weights."""
    from shapes_3b import TEXT, VISION
    from transformers import Qwen2_5_VLConfig

    from vlcpt import load_processor
    from vlcpt.demo import base_path

    processor = load_processor(base_path())
    processor.image_processor.size = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=TINY_TEXT if tiny else TEXT,
        vision_config=TINY_VISION if tiny else VISION,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
    )
    processor.save_pretrained(folder)
    config.save_pretrained(folder)


def _write_documents(folder: Path, *, tiny: bool) -> None:
    """192 documents (220,000 tokens), or 24 small ones; images are JPEG files of 800×600, as photos are."""
    from PIL import Image

    draw = random.Random(0)
    size = (112, 84) if tiny else (800, 600)
    names = [f"image-{number}.jpg" for number in range(8 if tiny else 32)]
    for name in names:
        coarse = Image.frombytes("RGB", (40, 30), draw.randbytes(40 * 30 * 3))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
    rows = []
    for number in range(24 if tiny else 192):
        count = IMAGES[number % len(IMAGES)]
        share = (max(count, 1) / 3) * draw.uniform(0.5, 1.5) / (20 if tiny else 1)
        parts = []
        for image in range(max(count, 1)):
            marker = "<image>" if image < count else ""
            context, targets = _digits(draw, CONTEXT / 3 * share), _digits(draw, TARGETS / 3 * share)
            parts.append(f"{marker}{context}<trainable_text>{targets}</trainable_text>")
        rows.append({"text": "".join(parts), "images": draw.choices(names, k=count)})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _digits(draw: random.Random, count: float) -> str:
    # Each digit is a token.
    return "".join(draw.choices("0123456789", k=max(1, round(count))))


# --- older releases ---


def _bridge(findings: Findings) -> bool:
    """Let releases of transformers before 5.23 run the trainer, as far as they can; whether this is one.

    They know activation checkpointing by another name, so that vlcpt's configuration finds no such key.
    """
    if any(one.name == "activation_checkpointing" for one in fields(TrainingArguments)):
        return False
    import transformers

    findings.unproven(
        "the release that vlcpt asks for",
        f"transformers {transformers.__version__} is older; the names that it lacks were added for this run",
    )
    for name in ("activation_checkpointing", "activation_checkpointing_kwargs"):
        setattr(TrainingArguments, name, None)
    return True


def _bridge_model(model: nn.Module) -> None:
    """Keep the documents' bounds from the vision tower, which older releases give all they get."""

    def without_bounds(
        module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return args, {name: value for name, value in kwargs.items() if name not in names}

    model.get_submodule("model.visual").register_forward_pre_hook(without_bounds, with_kwargs=True)


# --- training ---


_KERNELS = "the kernels that took most of a step"


class Meter(TrainerCallback):
    """Notes when steps end, stops in time, and has torch's profiler watch one step after the others.

    Args:
        plan: What is trained.
        findings: Where a profiler that does not run is noted.
    """

    def __init__(self, plan: Plan, findings: Findings) -> None:
        self.ends: list[float] = []
        self.kernels: list[dict[str, object]] = []
        self._plan, self._findings = plan, findings
        self._start = time.perf_counter()
        self._profiler: torch.profiler.profile | None = None
        self._stack = ExitStack()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start the profiler before the last step."""
        if not self._plan.profiles or state.global_step != state.max_steps - 1:
            return
        with self._findings.proving(_KERNELS):
            kinds = torch.profiler.ProfilerActivity
            activities = [kinds.CUDA if torch.cuda.is_available() else kinds.CPU]
            self._profiler = self._stack.enter_context(torch.profiler.profile(activities=activities))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Note the time; end when it is over."""
        wait()
        if self._profiler is not None:
            with self._findings.proving(_KERNELS):
                self._stack.close()
                self.kernels = _longest(self._profiler)
            return
        self.ends.append(time.perf_counter())
        if self.ends[-1] - self._start > self._plan.seconds and len(self.ends) > self._plan.warm + 2:
            control.should_training_stop = True


def _longest(profiler: torch.profiler.profile, count: int = 15) -> list[dict[str, object]]:
    """The kernels that took most of a step; on a CPU the operations."""
    on_gpu = torch.cuda.is_available()
    spent = {
        one.key: (one.self_device_time_total if on_gpu else one.self_cpu_time_total, one.count)
        for one in profiler.key_averages()
    }
    total = sum(time for time, _ in spent.values()) or 1
    longest = sorted(spent.items(), key=lambda one: -one[1][0])[:count]
    return [
        {"kernel": key[:120], "calls": calls, "ms": round(time / 1e3, 2), "share": round(time / total, 3)}
        for key, (time, calls) in longest
    ]


def train(findings: Findings, folder: Path, plan: Plan) -> None:
    """One run as ``vlcpt train`` makes it, but for weights, which are random and made on the device."""
    from rich.console import Console

    is_older = _bridge(findings)  # before vlcpt's configuration is imported
    from vlcpt import CPTTrainer, load_processor
    from vlcpt.model.tuning import base_model
    from vlcpt.runs.data import RunData, quiet_libraries

    write_inputs(folder, tiny=plan.tiny)
    quiet_libraries()
    configs = _configs(folder, plan)
    if is_older:
        configs.training.chooses_checkpointing = True
    processor = load_processor(configs.model.model_name_or_path)
    dataset = RunData(configs, processor).train()
    findings.note("packs", len(dataset))
    findings.note("fill", dataset.ledger.fill)
    estimate = _foresee(findings, configs, dataset, processor)
    if not _fits(findings, estimate):
        return
    findings.note("workers", _choose_workers(findings, configs, dataset, processor, plan))
    held = _held()
    start = time.perf_counter()
    model = make_model(configs)
    if is_older:
        _bridge_model(base_model(model))
        configs.training.gradient_checkpointing_kwargs = {"use_reentrant": False}
    wait()
    findings.note("seconds to make the model", round(time.perf_counter() - start, 1))
    said, meter = io.StringIO(), Meter(plan, findings)
    trainer = CPTTrainer(
        model,
        configs.training,
        train_dataset=dataset,
        processing_class=processor,
        callbacks=[meter],
        console=Console(file=said, width=400),
    )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        trainer.train()
    finally:
        lines = said.getvalue().splitlines()
        findings.note("said at the start", [one for one in lines if not one.startswith("step ")])
        _note_speed(findings, Path(str(configs.training.output_dir)) / "train_log.jsonl", meter, plan)
    _note_work(findings, trainer.model, dataset, meter, plan)
    _note_memory(findings, estimate, held)


def _configs(folder: Path, plan: Plan) -> Configs:
    """The configuration of the run, read as from a user."""
    from vlcpt.config.yaml import load_config

    config = folder / f"{plan.tuning}-{plan.tokens}.yaml"
    config.write_text(
        CONFIG.format(
            tuning=plan.tuning,
            tokens=plan.tokens,
            steps=plan.steps,
            use_cpu=str(not torch.cuda.is_available()).lower(),
            output=f"out-{plan.tuning}-{plan.tokens}",
        )
    )
    return load_config(config)


def make_model(configs: Configs) -> PreTrainedModel | PeftModel:
    """The model with random weights, made on the device, tuned as the configuration says."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from vlcpt.model.attention import attend_by_document
    from vlcpt.model.loading import read_config
    from vlcpt.model.tuning import apply_tuning

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    config = read_config(configs.model.model_name_or_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device()):  # also the tables of angles, which no file holds
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")):
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
    model.tie_weights()
    attend_by_document(model)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    return apply_tuning(model, configs.model)


# --- what is foreseen ---


def _foresee(
    findings: Findings, configs: Configs, dataset: CPTDataset, processor: ProcessorMixin
) -> MemoryEstimate:
    """What ``vlcpt check`` says of memory; activation checkpointing is chosen as ``vlcpt train`` does."""
    from vlcpt.model.counting import count_towers, empty_model
    from vlcpt.runs.memory import choose_checkpointing, foresee

    merge = processor.image_processor.merge_size**2
    chosen = choose_checkpointing(configs, dataset, merge)
    said = chosen.said if chosen else bool(configs.training.activation_checkpointing)
    findings.note("checkpointing", said)
    empty = empty_model(configs.model)
    towers = count_towers(empty, configs.model)
    found = foresee(configs, empty, towers, dataset.pack_sizes(), devices=1, merge=merge)["as configured"]
    findings.note("foreseen", {"total": found.total, **vars(found)})
    return found


def _fits(findings: Findings, estimate: MemoryEstimate) -> bool:
    """Whether the run may be tried; else it is unproven."""
    from vlcpt.report.memory import CONTEXT

    if not torch.cuda.is_available():
        return True
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if estimate.total + CONTEXT < 0.95 * free:
        return True
    needed = f"{estimate.total / 2**30:.1f} GiB foreseen, {free / 2**30:.1f} GiB free"
    findings.unproven("the run", f"it does not fit: {needed}")
    return False


def _choose_workers(
    findings: Findings, configs: Configs, dataset: CPTDataset, processor: ProcessorMixin, plan: Plan
) -> int:
    """As many as asked for; else those that ``vlcpt check --gpu`` names, and no fewer than configured."""
    training = configs.training
    with findings.proving("the number of workers that check names"):
        from vlcpt.model.counting import count_towers, empty_model
        from vlcpt.runs.speed import foresee_speed, read_machine

        empty = empty_model(configs.model)
        towers = count_towers(empty, configs.model)
        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "H100"
        machine = read_machine(name, configs)
        speed = foresee_speed(configs, dataset, empty, towers, processor, machine, 1)
        findings.note(f"workers that check names for {name}", speed.workers)
        findings.note("seconds of a worker for a pack", round(speed.loads, 4))
        findings.note("epoch that check foresees, seconds", [round(one, 1) for one in speed.seconds])
        if torch.cuda.is_available() and not plan.tiny:
            most = max(1, len(os.sched_getaffinity(0)) - 1)
            configured = training.dataloader_num_workers or 0
            training.dataloader_num_workers = min(max(configured, speed.workers), most)
    if plan.workers is not None:
        training.dataloader_num_workers = plan.workers
    if training.dataloader_num_workers == 0:
        training.dataloader_persistent_workers = False
    return training.dataloader_num_workers or 0


def _held() -> int:
    """Bytes that are on the GPU before the model is made."""
    gc.collect()
    if not torch.cuda.is_available():
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


# --- what was found ---


def _note_speed(findings: Findings, log: Path, meter: Meter, plan: Plan) -> None:
    """Seconds of the phases, and the share of the peak, as the log of the run has them."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    lines = [one for one in lines if "loss" in one]
    if meter.kernels:  # the profiler slowed the last step down
        lines = lines[:-1]
        findings.note(_KERNELS, meter.kernels)
    elif plan.profiles:
        findings.unproven(_KERNELS, "the last step was not reached in the time, or the profiler did not run")
    counted = lines[plan.warm :]
    findings.note("steps counted", len(counted))
    if not counted:
        findings.unproven("its speed", f"only {len(lines)} steps were made in the time")
        return
    phases = [name for name in counted[0] if name.startswith("seconds/")]
    spent = {name: statistics.median(one[name] for one in counted) for name in phases}
    every = sum(one[name] for one in counted for name in phases)
    waited = sum(one["seconds/data_wait"] for one in counted)
    findings.note("seconds of a step", rounded(spent))
    findings.note("data wait, share", round(waited / max(every, 1e-9), 4))
    findings.note("targets a second", statistics.median(one["targets_per_second"] for one in counted))
    findings.note("losses", [round(one["loss"], 3) for one in lines])
    if "mfu" in counted[0]:
        shares = [one["mfu"] for one in counted]
        findings.note("mfu", {"median": statistics.median(shares), "least": min(shares), "most": max(shares)})
    else:
        findings.unproven("mfu", "the peak of this device is not known (vlcpt/model/gpus.py)")


def _note_work(
    findings: Findings, model: PreTrainedModel | PeftModel, dataset: CPTDataset, meter: Meter, plan: Plan
) -> None:
    """Operations that the model needs a second, and tokens: for a device whose peak is not known, too."""
    from vlcpt.training.cost import MEGA, cost_of

    ends = meter.ends[plan.warm :]
    if len(ends) < 2:
        findings.unproven("operations a second", f"only {len(meter.ends)} steps were made in the time")
        return
    a_step = statistics.median(after - before for before, after in pairwise(ends))
    packs = dataset.pack_costs(cost_of(model, recomputes=False), 1)[0]
    tokens = dataset.pack_sizes()[:, 0]
    findings.note("seconds of a step, by the clock", round(a_step, 4))
    findings.note("tokens a second", round(float(tokens.mean()) / a_step))
    findings.note("model operations a second", float(f"{float(packs.mean()) * MEGA / a_step:.4g}"))


def _note_memory(findings: Findings, estimate: MemoryEstimate, held: int) -> None:
    """The peak of the allocator against the estimate."""
    if not torch.cuda.is_available():
        findings.unproven("peak memory against the estimate", "there is no GPU")
        return
    found = torch.cuda.max_memory_allocated() - held
    free, total = torch.cuda.mem_get_info()
    findings.note(
        "memory",
        {
            "peak": found,
            "foreseen": estimate.total,
            "off": round(estimate.total / found - 1, 4),
            "reserved": torch.cuda.max_memory_reserved(),
            "used of the device": total - free,
        },
    )
