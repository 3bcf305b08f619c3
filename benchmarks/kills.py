"""Runs that are killed with SIGKILL at random moments, and go on: the same documents, losses and weights.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/kills.py                 # 50 kills: full, LoRA, plain, ZeRO-2
    OMP_WAIT_POLICY=PASSIVE python benchmarks/kills.py --kills 5       # the short form, a slow test

Each attempt is a process (two with ZeRO-2, over gloo) forked from one that has everything imported. It goes
on with ``resume_from_checkpoint: auto``. Half of the kills are aimed at a save: they come at a random moment
after its folder has appeared. Of a run that comes to its end, every step's batches and loss and the bytes of
the final weights must be those of the run that nobody killed; then another run is started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
import xxhash  # noqa: E402

from tests.ranks import allow_deepspeed  # noqa: E402
from tests.support import TEN  # noqa: E402
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model, load_processor  # noqa: E402
from vlcpt.demo import base_path  # noqa: E402
from vlcpt.training.checkpoints.files import (  # noqa: E402
    CheckpointError,
    is_unfinished,
    list_checkpoints,
    verify,
)

CASES = {
    "lora": ("lora", None),
    "full": ("full", None),
    "lora zero2": ("lora", "zero2"),
    "full zero2": ("full", "zero2"),
}
STEPS = 8
LONGEST = 180.0  # seconds that an attempt may take


class Noting(CPTTrainer):
    """Writes down what each micro-batch was."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore[no-untyped-def]
        """As the trainer's."""
        digest = xxhash.xxh3_64_hexdigest(inputs["input_ids"].numpy().tobytes())
        line = f"{self.state.global_step + 1} {self.args.process_index} {digest}\n"
        with (Path(self.args.output_dir).parent / "batches.txt").open("a") as file:
            file.write(line)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def train(folder: Path, tuning: str, engine: str | None) -> None:
    """One attempt, in this process."""
    torch.set_num_threads(1)
    if engine:
        allow_deepspeed(timeout=60)
    processor = load_processor(base_path())
    args = CPTConfig(
        output_dir=str(folder / "out"),
        use_cpu=engine is None,
        deepspeed=engine,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        gradient_accumulation_steps=1 if engine else 2,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_length=128,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        ddp_timeout=60,
    )
    dataset = CPTDataset(TEN, processor, max_length=128)
    torch.manual_seed(0)
    model = load_model(ModelConfig(base_path(), tuning=tuning, lora_dropout=0.1 if tuning == "lora" else 0.0))
    trainer = Noting(model, args, train_dataset=dataset, processing_class=processor)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()


def start(folder: Path, tuning: str, engine: str | None) -> list[int]:
    """Fork the processes of an attempt; their ids."""
    ranks = 2 if engine else 1
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in range(ranks):
        if child := os.fork():
            started.append(child)
            continue
        code = 1
        try:
            log = os.open(folder / f"log.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if engine:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            train(folder, tuning, engine)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return started


def wait(processes: list[int], seconds: float) -> bool:
    """Whether all ended, and well, before the time was over."""
    end = time.monotonic() + seconds
    left = list(processes)
    while left and time.monotonic() < end:
        for one in list(left):
            ended, status = os.waitpid(one, os.WNOHANG)
            if ended:
                left.remove(one)
                if status:
                    raise RuntimeError(f"process {one} ended with {os.waitstatus_to_exitcode(status)}")
        time.sleep(0.002)
    processes[:] = left
    return not left


def kill(processes: list[int]) -> None:
    """SIGKILL for all."""
    for one in processes:
        os.kill(one, signal.SIGKILL)
    for one in processes:
        os.waitpid(one, 0)


@dataclass
class Outcome:
    """What a case came to."""

    kills: int = 0
    inside_saves: int = 0
    runs: int = 0
    skipped: int = 0
    problems: list[str] = field(default_factory=list)


def outcome_of(folder: Path) -> tuple[object, ...]:
    """Losses, batches and final weights of a run that has ended; lines of steps done twice fall together."""
    log = [json.loads(line) for line in (folder / "out/train_log.jsonl").read_text().splitlines()]
    losses = [(one["step"], one["loss"], one["grad_norm"]) for one in log if "loss" in one]
    batches = sorted(set((folder / "batches.txt").read_text().splitlines()))
    (weights,) = (folder / "out").glob("*model.safetensors")
    return losses, batches, xxhash.xxh3_128_hexdigest(weights.read_bytes())


def unfinished(folder: Path) -> set[str]:
    """Checkpoints that are being written, or were."""
    return {one.name for one in list_checkpoints(folder / "out") if is_unfinished(one)}


def run_case(name: str, kills: int, work: Path, rng: random.Random) -> Outcome:
    """Kill runs of a case so often, each of them until it comes to its end."""
    tuning, engine = CASES[name]
    whole = work / "whole"
    whole.mkdir(parents=True)
    began = time.monotonic()
    processes = start(whole, tuning, engine)
    if not wait(processes, LONGEST):
        kill(processes)
        raise RuntimeError(f"{name}: the run that nobody kills did not end")
    seconds = time.monotonic() - began
    expected = outcome_of(whole)
    outcome = Outcome()
    folder = work / "killed-0"
    folder.mkdir()
    while True:
        left = unfinished(folder)
        processes = start(folder, tuning, engine)
        try:
            aimed = outcome.kills < kills and rng.random() < 0.5
            if outcome.kills >= kills:
                ended = wait(processes, LONGEST)
            elif not aimed:
                ended = wait(processes, rng.uniform(0.3, 1.0) * seconds)
            else:
                # A random one of the saves that come now, and a random moment of it.
                saves, seen, ended = rng.randint(1, 3), set(left), False
                end = time.monotonic() + LONGEST
                while saves and not ended and time.monotonic() < end:
                    ended = wait(processes, 0.002)
                    now = unfinished(folder)
                    saves -= bool(now - seen)
                    seen = now
                ended = ended or wait(processes, rng.uniform(0, 0.08))
        except RuntimeError as error:
            kill(processes)
            outcome.problems.append(f"{folder.name}: {error}; {(folder / 'log.0.txt').read_text()[-2000:]}")
            return outcome
        if not ended:
            kill(processes)
            outcome.kills += 1
            broken = unfinished(folder)
            outcome.inside_saves += bool(broken)
            for one in list_checkpoints(folder / "out"):
                try:
                    verify(one)
                except CheckpointError as error:
                    if one.name not in broken:
                        outcome.problems.append(f"{folder.name}/{one.name}: {error}")
            if outcome.kills <= kills:
                continue
            outcome.problems.append(f"{folder.name}: it did not end")
            return outcome
        found = outcome_of(folder)
        outcome.runs += 1
        outcome.skipped += (folder / "log.0.txt").read_text().count("skipped checkpoint-")
        for what, one, other in zip(("losses", "batches", "weights"), expected, found, strict=True):
            if one != other:
                outcome.problems.append(f"{folder.name}: other {what}: {other} instead of {one}")
        shutil.rmtree(folder)
        if outcome.kills >= kills:
            return outcome
        folder = work / f"killed-{outcome.runs}"
        folder.mkdir()


def main() -> None:
    """Run the cases and print a table; exit with 1 if anything differed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    print("| case | kills | inside a save | runs to their end | all equal |\n|---|---|---|---|---|")
    total, problems = Outcome(), []
    for number, name in enumerate(options.cases):
        kills = options.kills // len(options.cases) + (number < options.kills % len(options.cases))
        with tempfile.TemporaryDirectory() as work:
            found = run_case(name, kills, Path(work), rng)
        equal = "no" if found.problems else "yes"
        print(f"| {name} | {found.kills} | {found.inside_saves} | {found.runs} | {equal} |", flush=True)
        total.kills += found.kills
        total.inside_saves += found.inside_saves
        total.runs += found.runs
        problems += [f"{name}: {one}" for one in found.problems]
    print(f"| all | {total.kills} | {total.inside_saves} | {total.runs} | {'no' if problems else 'yes'} |")
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
