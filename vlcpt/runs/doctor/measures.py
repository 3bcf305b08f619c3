"""What a run reaches: peak memory against the estimate, tokens a second, what it waits for data."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.model.counting import count_towers, empty_model
from vlcpt.model.gpus import gpu_of
from vlcpt.report.doctor import Line, judged
from vlcpt.report.memory import MemoryEstimate
from vlcpt.run_files import read_log
from vlcpt.runs.doctor.documents import long_documents, text_of
from vlcpt.runs.doctor.subject import Subject, release
from vlcpt.runs.memory import choose_checkpointing, foresee
from vlcpt.training.clock import PHASES
from vlcpt.training.cost import MEGA, cost_of

# Over the estimate, as part of it, and beside it. In fresh processes the estimate is off by 8% at most
# (docs/scale.md); here other checks ran before, and a small model is lost in what libraries take.
MEMORY_SHARE = 0.25
MEMORY_ASIDE = 2**28
_ACCUMULATION = 2  # batches of a step, at most: more of them show nothing else
_WARM = 1  # steps that are not counted
_COUNTED = {True: 2, False: 6}
_QUICK_TOKENS = 1024  # of a pack, on a CPU


@dataclass
class Load:
    """A training on full packs, as it was seen on this rank.

    Args:
        seconds: For each counted step.
        phases: Seconds of a counted step: waiting for data, forward, backward, in the optimizer.
        losses: Those of all steps.
        peak: Bytes at most, over those before the model was loaded.
        estimate: What was foreseen.
        dataset: The packs.
        batch: Packs of a step on this rank.
        operations: That a pack needs on average, without what is computed twice.
    """

    seconds: list[float]
    phases: dict[str, float]
    losses: list[float]
    peak: int
    estimate: MemoryEstimate
    dataset: CPTDataset
    batch: int
    operations: float


class Clock(TrainerCallback):
    """Notes when each step ends, when the device is done with it; and the peak of memory since the first."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: list[float] = []
        self.peak = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """What loading took is no part of a step."""
        release()
        reset_peak(self._device)
        self.ends.append(time.perf_counter())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.ends.append(time.perf_counter())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.peak = peak_memory(self._device)


def load(subject: Subject) -> Load:
    """Train on full packs of the run's length, batch size and kernels; done once."""
    kept = vars(subject).get("_load")
    if isinstance(kept, Load):
        return kept
    training = subject.training
    max_length = training.max_length
    if subject.quick and subject.device.type == "cpu":
        max_length = min(max_length, _QUICK_TOKENS)
    rows, steps = training.per_device_train_batch_size, _WARM + _COUNTED[subject.quick]
    accumulation = min(1 if subject.quick else _ACCUMULATION, training.gradient_accumulation_steps)
    dataset = _full_packs(subject, max_length, rows * accumulation * steps * subject.ranks)
    release()
    before = held_memory(subject.device)
    args = subject.settings(
        "load",
        max_length=max_length,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        lr_scheduler_type="constant",
    )
    configs = Configs(subject.config, subject.early.data, args)
    choose_checkpointing(configs, dataset, subject.processor.image_processor.merge_size**2)
    clock = Clock(subject.device)
    trainer = subject.trainer(args, dataset, [clock])
    trainer.train()
    ends = clock.ends
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    found = Load(
        seconds=[stop - start for start, stop in zip(ends[_WARM:], ends[_WARM + 1 :], strict=False)],
        phases=_phases(Path(str(args.output_dir))),
        losses=losses,
        peak=clock.peak - before,
        estimate=_estimate(subject, configs, dataset),
        dataset=dataset,
        batch=rows * accumulation,
        operations=MEGA * float(dataset.pack_costs(cost_of(trainer.model, recomputes=False), 1)[0].mean()),
    )
    del trainer
    release()
    vars(subject)["_load"] = found
    return found


def _phases(folder: Path) -> dict[str, float]:
    """The mean of each phase over the counted steps, as the log of the run has them; rank 0 writes it."""
    logged = [entry for _, entry in read_log(folder) if int(str(entry["step"])) > _WARM]
    mine = {}
    for phase in PHASES:
        found = [float(str(one)) for entry in logged if (one := entry.get(f"seconds/{phase}")) is not None]
        mine[phase] = sum(found) / len(found) if found else math.nan
    everywhere: list[dict[str, float]] = gather_object([mine])
    return everywhere[0]


def _full_packs(subject: Subject, max_length: int, packs: int) -> CPTDataset:
    """At least so many packs, all but one of them full."""
    sample = text_of(long_documents(max_length, max_length, characters=4.0))
    tokens = len(subject.processor.tokenizer(sample.replace("<image>", "")).input_ids)
    characters = len(sample) / max(tokens, 1)
    rows = long_documents(max_length, (packs + 1) * max_length, characters=characters)
    dataset = subject.dataset(rows, max_length, packing=subject.training.packing)
    while len(dataset) < packs:  # images may take fewer tokens than was asked for
        rows = [*rows, *({**row, "id": f"{row['id']}-{len(rows)}"} for row in rows)]
        dataset = subject.dataset(rows, max_length, packing=subject.training.packing)
    return dataset


def _estimate(subject: Subject, configs: Configs, dataset: CPTDataset) -> MemoryEstimate:
    """What ``vlcpt check`` foresees for these packs."""
    model = empty_model(subject.config)
    towers, merge = count_towers(model, subject.config), subject.processor.image_processor.merge_size**2
    found = foresee(configs, model, towers, dataset.pack_sizes(), devices=subject.ranks, merge=merge)
    return found["as configured"]


def foreseen_memory(subject: Subject, name: str) -> Line:
    """The peak of training on full packs against the estimate of ``vlcpt check``; only far above it fails."""
    seen = load(subject)
    if subject.device.type not in ("cuda", "cpu") or not seen.peak:
        return Line(name, "not run", detail=f"the peak is not known on {subject.device.type}")
    foreseen = seen.estimate.total
    subject.notes["memory"] = {"estimate": float(foreseen), "peak": float(seen.peak)}
    tolerance = foreseen * (1 + MEMORY_SHARE) + (MEMORY_ASIDE if subject.device.type == "cpu" else 0)
    cause = (
        f"training needs {_mib(seen.peak)} at most, and {_mib(foreseen)} were foreseen: vlcpt check would "
        "let a run start that does not fit. Leave room for it, and report it."
    )
    detail = f"foreseen {_mib(foreseen)}, without what other programs and CUDA take"
    return judged(name, seen.peak / 2**20, tolerance / 2**20, unit="MiB", cause=cause, detail=detail)


def _mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def speed(subject: Subject, name: str) -> Line:
    """Tokens and targets a second of all ranks, data wait, share of the peak: a measurement."""
    seen = load(subject)
    steps, seconds = len(seen.seconds), sum(seen.seconds)
    sizes = seen.dataset.pack_sizes()
    per_step = sizes.mean(axis=0) * seen.batch * subject.ranks  # tokens, targets and tokens of media
    found = {
        "tokens_per_second": per_step[0] * steps / seconds if seconds else math.nan,
        "targets_per_second": per_step[1] * steps / seconds if seconds else math.nan,
        "data_wait": seen.phases["data_wait"] / sum(seen.phases.values()),
        "share_of_peak": _share_of_peak(subject, seen, seconds / max(steps, 1)),
        "seconds_per_step": seconds / steps if steps else math.nan,
        "tokens_per_step": float(per_step[0]),
        **{f"seconds/{phase}": spent for phase, spent in seen.phases.items()},
    }
    subject.notes["speed"] = {key: None if one is None else float(one) for key, one in found.items()}
    numbers = [one for key, one in found.items() if one is not None]
    measured = float(found["tokens_per_second"] or 0)
    if not all(math.isfinite(one) for one in (*numbers, *seen.losses)) or measured <= 0:
        what = f"losses {seen.losses}, {found}"
        return Line(name, "failed", measured, unit="tokens/s", detail=f"a number is not finite: {what}.")
    share = found["share_of_peak"]
    of_peak = "unknown GPU peak" if share is None else f"{share:.0%} of the GPU's peak"
    cut = (
        ""
        if subject.base.has_all_layers
        else f"; with {subject.base.layers[0]} of {subject.base.all_layers[0]} layers"
    )
    detail = (
        f"{found['targets_per_second']:,.0f} targets/s, data wait {found['data_wait']:.1%}, {of_peak}{cut}"
    )
    return Line(name, "passed", measured, unit="tokens/s", detail=detail)


def _share_of_peak(subject: Subject, seen: Load, seconds: float) -> float | None:
    """For each GPU; None where its peak is not known, or products are not in 16 bits."""
    if subject.device.type != "cuda" or subject.autocast is None or not seconds:
        return None
    gpu = gpu_of(torch.cuda.get_device_name(subject.device))
    return None if gpu is None else seen.operations * seen.batch / seconds / gpu.peak


def held_memory(device: torch.device) -> int:
    """Bytes that the process holds, on its GPU or else in all."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


def peak_memory(device: torch.device) -> int:
    """The most that it held since :func:`reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def reset_peak(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _status(name: str) -> int:
    """A number of the kernel's about this process, in bytes; 0 where there is none."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(
        (int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name)), 0
    )
