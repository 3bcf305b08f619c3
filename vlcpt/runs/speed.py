"""How long an epoch takes on a GPU, and how many workers keep it busy, before a run is started."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from vlcpt.config.yaml import Configs
from vlcpt.data.collator import CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.families import Tower
from vlcpt.errors import ConfigError
from vlcpt.model.counting import TowerParameters
from vlcpt.model.gpus import GPUS, gpu_of
from vlcpt.report.check import Speed
from vlcpt.runs.memory import keeps_activations
from vlcpt.training.cost import MEGA, cost_of_shape

# Of a GPU's peak: what trainers of packed vision-language models publish is 35% to 45%. One that waits for
# data, for other ranks or for small products reaches less.
SHARES = (0.25, 0.5)
_BACKWARD = {"frozen": 0, "lora": 1, "full": 2}
_PACKS, _SECONDS = 8, 10.0  # that are loaded to time them, at most


@dataclass(frozen=True)
class Machine:
    """What a run is foreseen on.

    Args:
        name: In words.
        peak: Operations a second of a GPU; None where tokens a second are known.
        memory: Bytes of a GPU; None: not known.
        tokens_per_second: That of one GPU, measured there; None where they are not.
    """

    name: str
    peak: float | None = None
    memory: int | None = None
    tokens_per_second: float | None = None


def read_machine(given: str, configs: Configs) -> Machine:
    """A machine by its GPU's name, or by what ``vlcpt doctor`` has written on it.

    Args:
        configs: Those of the run; what doctor measured must be of the same kind.

    Raises:
        ConfigError: If the name is not known, or the file is not doctor's, or of a part of a model, or of
            another run.
    """
    if not given.endswith(".json"):
        if (gpu := gpu_of(given)) is None:
            raise ConfigError(
                f"--gpu {given}: not known. Give one of {', '.join(GPUS)}, or that machine's doctor.json."
            )
        return Machine(given, gpu.peak, gpu.memory * 2**30)
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
        run, rate = found["run"], float(found["speed"]["tokens_per_second"])
        ranks, layers, of_layers = int(run["ranks"]), list(run["layers"]), list(run["of_layers"])
        name = f"{run['device']}, as measured"
        mine = {
            "base": Path(configs.model.model_name_or_path).name,
            "tuning": configs.model.tuning,
            "trained": list(configs.model.trained_towers),
        }
        others = [f"{key} {run[key]}, here {value}" for key, value in mine.items() if run[key] != value]
    except OSError as error:
        raise ConfigError(f"--gpu {given}: {error.strerror}. Give a GPU's name, or a doctor.json.") from None
    except (ValueError, KeyError, TypeError):
        rate = ranks = 0
    if not (math.isfinite(rate) and rate > 0 and ranks > 0 and layers):
        raise ConfigError(
            f"--gpu {given}: it has no speed that vlcpt doctor measured. Run vlcpt doctor there with this "
            "configuration."
        )
    if layers != of_layers:
        raise ConfigError(
            f"--gpu {given}: doctor measured {layers[0]} of {of_layers[0]} layers, which says nothing of "
            "all. Run it without --quick where the whole model fits, or give the GPU's name."
        )
    if others:
        raise ConfigError(
            f"--gpu {given}: doctor measured another run ({'; '.join(others)}). Run it with this one."
        )
    return Machine(name, tokens_per_second=rate / ranks)


def foresee_speed(
    configs: Configs,
    dataset: CPTDataset,
    model: PreTrainedModel,
    towers: Mapping[Tower, TowerParameters],
    processor: ProcessorMixin,
    machine: Machine,
    devices: int,
) -> Speed:
    """How long an epoch takes, and how many workers each device needs.

    Args:
        model: On the meta device.
        towers: What trains of it.
        devices: GPUs that share the work.
    """
    loads = seconds_to_load(configs, dataset, model, processor)
    tokens = int(dataset.pack_sizes()[:, 0].sum())
    if machine.tokens_per_second is not None:
        seconds = tokens / machine.tokens_per_second / devices
        bounds, assumes = (seconds, seconds), f"{machine.tokens_per_second:,.0f} tokens a second"
    else:
        assert machine.peak is not None
        merge = processor.image_processor.merge_size**2
        memory = machine.memory
        keeps = memory is not None and keeps_activations(configs, model, towers, dataset, memory, merge)
        given = configs.training
        recomputes = not keeps if given.chooses_checkpointing else bool(given.activation_checkpointing)
        backward = {tower: _BACKWARD[one.how] for tower, one in towers.items()}
        trains_head = towers["language"].trained_head > 0
        cost = cost_of_shape(model.config, backward, trains_head=trains_head, recomputes=recomputes)
        operations = int(dataset.pack_costs(cost, 1)[0].sum()) * MEGA
        slow, fast = (operations / machine.peak / share / devices for share in SHARES)
        bounds = fast, slow
        how = "on" if recomputes else "off"
        assumes = (
            f"{operations / 1e15:,.3g} PFLOP at {SHARES[1]:.0%} to {SHARES[0]:.0%} of "
            f"{machine.peak / 1e12:,.0f} TFLOP/s, activation checkpointing {how}"
        )
    a_pack = bounds[0] * devices / len(dataset)
    # More than a device has packs would have nothing to do.
    workers = min(math.ceil(loads / a_pack), -(-len(dataset) // devices))
    return Speed(machine.name, devices, bounds, assumes, loads, workers, dataset.has_media)


def this_machine() -> Machine | None:
    """The machine that asks, where it has a GPU that is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    gpu = gpu_of(name)
    return None if gpu is None else Machine(name, gpu.peak, gpu.memory * 2**30)


def seconds_to_load(
    configs: Configs, dataset: CPTDataset, model: PreTrainedModel, processor: ProcessorMixin
) -> float:
    """Seconds of one worker for a pack, on this machine: the mean of some that are spread over the data.

    Args:
        model: On the meta device.
    """
    collator = CPTDataCollator(processor)
    collator.keeps_bytes = configs.training.pixel_bytes
    collator.window_size = model.config.vision_config.window_size
    dataset = copy.copy(dataset)
    dataset.keeps_bytes = configs.training.pixel_bytes
    count = min(_PACKS, len(dataset))
    numbers = [place * len(dataset) // count for place in range(count)]
    collator([dataset[numbers[0]]])  # libraries that are loaded at their first use
    start, done = time.perf_counter(), 0
    for number in numbers:
        collator([dataset[number]])
        done += 1
        if time.perf_counter() - start > _SECONDS:
            break
    return (time.perf_counter() - start) / done
