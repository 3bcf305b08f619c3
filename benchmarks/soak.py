"""A long run: memory, open files and disk must not grow with its steps.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/soak.py                 # 2,000 steps, two workers

Every 20 steps the resident memory of this process (after a collection) and of its workers, the open files and
the bytes in its folder are noted; a checkpoint is saved every 50 steps, two are kept. The slope is that of a
line through all but the first fifth, in MB per 100 steps. Exits with 1 if a bound of the load table breaks.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from tests.support import TEN, make_trainer  # noqa: E402
from vlcpt import CPTDataset, ModelConfig, load_model, load_processor  # noqa: E402
from vlcpt.demo import base_path  # noqa: E402

EVERY = 20


class Watch(TrainerCallback):
    """Looks at the process and its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = psutil.Process()
        self.rows: list[tuple[int, float, float, int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step % EVERY:
            return
        gc.collect()
        workers = [one for one in self._process.children(recursive=True) if one.is_running()]
        self.rows.append(
            (
                state.global_step,
                self._process.memory_info().rss / 1e6,
                # Shared pages count once for each; what grows is what matters.
                sum(one.memory_info().rss for one in workers) / 1e6,
                self._process.num_fds() + sum(one.num_fds() for one in workers),
                sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file()) / 1e6,
            )
        )


def main() -> None:
    """Train, and print what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        processor = load_processor(base_path())
        dataset = CPTDataset(TEN, processor, max_length=128)
        watch = Watch(folder)
        trainer = make_trainer(
            load_model(ModelConfig(base_path(), lora_r=4)),
            dataset,
            processor,
            folder / "out",
            max_steps=options.steps,
            dataloader_num_workers=2,
            dataloader_persistent_workers=True,
            save_strategy="steps",
            save_steps=50,
            save_total_limit=2,
            logging_steps=10,
            callbacks=[watch],
        )
        trainer.train()
    seconds = time.monotonic() - began
    rows = np.array(watch.rows)
    late = rows[len(rows) // 5 :]
    slope, worker_slope = (100 * np.polyfit(late[:, 0], late[:, column], 1)[0] for column in (1, 2))
    files = sorted({int(one) for one in late[:, 3]})
    disk = late[:, 4].max()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {options.steps:,} steps in {seconds:,.0f} s\n"
    )
    print("| step | memory, MB | workers, MB | open files | disk, MB |\n|---|---|---|---|---|")
    for row in watch.rows[:: max(1, len(watch.rows) // 10)]:
        print(f"| {row[0]:,} | {row[1]:,.1f} | {row[2]:,.1f} | {row[3]} | {row[4]:,.2f} |")
    print(
        f"\nmemory {slope:+.3f} MB per 100 steps (workers {worker_slope:+.3f}); open files {files}; "
        f"at most {disk:,.2f} MB on disk"
    )
    sys.exit(not (slope < 1 and worker_slope < 1 and files[-1] - files[0] <= 2))


if __name__ == "__main__":
    main()
