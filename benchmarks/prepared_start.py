"""From the start of a run to its first step, with a million documents that are prepared already.

    python benchmarks/prepared_start.py                        # prepares them first, in ./prepared-start
    python benchmarks/prepared_start.py --documents 100000

Each row is a fresh process that has imported everything and loaded processor and model. From there on it
counts: opening the set, the plan, the ledger and its file, the trainer, its workers, until the first batch
is there and the first step begins. Peaks are the kernel's (VmHWM, reset there), less what the process held.
Every other row has 1,000 documents: what a run takes in any case.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from machine import memory

CONTROL = 1_000
MAX_LENGTH = 1024
CHARACTERS = 230


def write_rows(path: Path, documents: int) -> None:
    """Texts of about 230 characters, some marked; of 1,000 one is long, one broken, one without targets."""
    rng = random.Random(0)
    words = ["valve", "the", "red", "house", "stands", "by", "a", "river", "where", "coffee", "is", "slow"]
    with path.open("w") as file:
        for number in range(documents):
            length = 30 * CHARACTERS if number % 1000 == 500 else rng.randrange(2 * CHARACTERS)
            text = " ".join(rng.choices(words, k=1 + length // 5))
            if number % 3 == 0:
                text = f"{text} <trainable_text>{text[: length // 2]} end</trainable_text>"
            if number % 1000 == 600:
                text = "<trainable_text>"
            if number % 1000 == 700:
                text = f"<trainable_text></trainable_text>{text}"
            file.write(json.dumps({"text": text, "id": f"d{number}"}) + "\n")


def configuration(folder: Path, documents: int) -> Path:
    from vlcpt.demo import base_path

    path = folder / f"{documents}.yaml"
    path.write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: set-{documents}\noutput_dir: out-{documents}\n"
        f"max_length: {MAX_LENGTH}\nmax_steps: 1\nuse_cpu: true\non_bad_data: skip\nsave_strategy: 'no'\n"
        "overwrite: true\n"
    )
    return path


def prepare(folder: Path, documents: int) -> float | None:
    """Prepare what is not prepared yet; seconds."""
    if (folder / f"set-{documents}" / "prepared.json").exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / f"rows-{documents}.jsonl", documents)
    config = configuration(folder, documents)
    start = time.perf_counter()
    command = [sys.executable, "-m", "vlcpt", "prepare", str(config), "--output", f"{folder}/set-{documents}"]
    rows = json.dumps([{"path": f"{folder}/rows-{documents}.jsonl"}])
    subprocess.run([*command, "--train_data", rows], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def start_run(config: Path) -> dict[str, object]:
    """Everything from the configuration to the begin of the first step, in this process."""
    from transformers import TrainerCallback

    from vlcpt.config.yaml import load_config
    from vlcpt.model.loading import load_model, load_processor
    from vlcpt.model.tuning import tower_table
    from vlcpt.report.screen import Screen
    from vlcpt.report.terminal import ledger_table, towers_table
    from vlcpt.runs.data import RunData
    from vlcpt.training.trainer import CPTTrainer

    configs = load_config(config)
    processor = load_processor(configs.model.model_name_or_path)
    model = load_model(configs.model)
    screen = Screen(file=sys.stderr)
    screen.print(towers_table(tower_table(model)))
    held = memory("VmRSS") / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    start, used = time.perf_counter(), time.process_time()
    dataset = RunData(configs, processor).train()
    planned, plan_peak = time.perf_counter() - start, memory() / 2**20 - held
    digest = dataset.digest
    dataset.ledger.write(Path(str(configs.training.output_dir)))
    screen.print(ledger_table(dataset.ledger))
    begun: dict[str, float] = {}

    class Begin(TrainerCallback):
        def on_step_begin(self, *arguments: object, **more: object) -> None:
            begun.update(
                first_step=time.perf_counter() - start,
                cpu=time.process_time() - used,
                peak=memory() / 2**20 - held,
            )

    trainer = CPTTrainer(
        model, configs.training, train_dataset=dataset, processing_class=processor, console=screen
    )
    trainer.add_callback(Begin())
    trainer.train()
    return {
        "documents": dataset.ledger.total.documents["read"],
        "samples": dataset.ledger.samples,
        "packs": dataset.ledger.packs,
        "plan": planned,
        "plan_peak": plan_peak,
        "digest": digest,
        **begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path("prepared-start"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(start_run(arguments.run)))
        return
    folder: Path = arguments.folder.resolve()
    for documents in (CONTROL, arguments.documents):
        if seconds := prepare(folder, documents):
            print(f"prepared {documents:,} documents in {seconds:.0f} s")
    print(
        "| documents | samples | packs | planned | peak | first step begins | CPU | peak |\n|" + "---:|" * 8
    )
    for _ in range(arguments.repeats):
        for documents in (CONTROL, arguments.documents):
            command = [sys.executable, __file__, "--run", str(configuration(folder, documents))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            one = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {one['documents']:,} | {one['samples']:,} | {one['packs']:,} | {one['plan']:.2f} s "
                f"| {one['plan_peak']:,.0f} MiB | {one['first_step']:.2f} s | {one['cpu']:.2f} s "
                f"| {one['peak']:,.0f} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
