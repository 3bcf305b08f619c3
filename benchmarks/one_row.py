"""The functions and modules of vlcpt that one row passes from its YAML to its loss, and how often it climbs.

    python benchmarks/one_row.py            # three numbers
    python benchmarks/one_row.py --list     # and each module with its functions

A row of text and image is configured, planned, encoded, batched and given to ``CPTTrainer.compute_loss``, in
this process and without workers. Model and trainer are made outside what is counted. A climb is a call from
one part of the package up into another, against the way in which imports point.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import PIL.Image
import torch

import vlcpt
from vlcpt import CPTTrainer, load_model, load_processor
from vlcpt.config.yaml import load_config
from vlcpt.data.collator import CPTDataCollator
from vlcpt.demo import base_path
from vlcpt.runs.data import RunData

PACKAGE = Path(vlcpt.__file__).parent
ORDER = ("errors", "file_writes", "config", "data", "model", "training", "report", "hub", "runs", "cli")


@contextmanager
def followed(functions: dict[str, set[str]], climbs: Counter[tuple[str, str]]) -> Iterator[None]:
    """Note each function of the package that is entered, and each call that climbs."""
    before = sys.getprofile()

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not (module := module_of(frame)):
            return
        functions[module].add(frame.f_code.co_qualname)
        if frame.f_back is not None and (caller := module_of(frame.f_back)):
            first, second = (name.partition(".")[0] for name in (caller, module))
            if first in ORDER and second in ORDER and ORDER.index(first) < ORDER.index(second):
                climbs[caller, module] += 1

    sys.setprofile(enter)
    try:
        yield
    finally:
        sys.setprofile(before)


def module_of(frame: FrameType) -> str:
    """The module of a frame, from the package's folder; empty for other code, and for comprehensions."""
    path = Path(frame.f_code.co_filename)
    if frame.f_code.co_name.startswith("<") or not path.is_relative_to(PACKAGE):
        return ""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def write_inputs(folder: Path) -> Path:
    """One row with an image, and the YAML that names it."""
    PIL.Image.new("RGB", (112, 84), (200, 30, 30)).save(folder / "a.png")
    row = {"text": "<image>\nFig. 1 <trainable_text>shows the valve.</trainable_text>", "images": ["a.png"]}
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    config = folder / "run.yaml"
    config.write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nmax_length: 128\n"
        "use_cpu: true\nreport_to: none\ndataloader_num_workers: 0\n"
    )
    return config


def follow(folder: Path) -> tuple[dict[str, set[str]], Counter[tuple[str, str]], float]:
    """The functions by module, the climbs, and the loss that came of it."""
    functions: dict[str, set[str]] = defaultdict(set)
    climbs: Counter[tuple[str, str]] = Counter()
    path = write_inputs(folder)
    processor = load_processor(base_path())
    model = load_model(load_config(path).model)
    with followed(functions, climbs):
        configs = load_config(path)
        dataset = RunData(configs, processor).train()
    collator = CPTDataCollator(processor)
    trainer = CPTTrainer(model, configs.training, train_dataset=dataset, data_collator=collator)
    loss: Callable[..., torch.Tensor] = trainer.compute_loss
    with followed(functions, climbs), torch.no_grad():
        value = loss(trainer.model, collator([dataset[0]])).item()
    return functions, climbs, value


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--list", action="store_true", help="name each module with its functions")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        functions, climbs, value = follow(Path(folder))
    assert value > 0
    if options.list:
        for module, names in sorted(functions.items()):
            print(f"{module}: {', '.join(sorted(names))}")
        for (caller, module), count in climbs.most_common():
            print(f"climb: {caller} -> {module}: {count:,}")
    print(f"functions {sum(map(len, functions.values()))}")
    print(f"modules   {len(functions)}")
    print(f"climbs    {sum(climbs.values())}")


if __name__ == "__main__":
    main()
