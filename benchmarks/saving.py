"""What the manifest adds to the time of a save: flushing aside, reading every file once and hashing it.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/saving.py

A random model of middle size is tuned in full for a step with AdamW, and then saved as the trainer saves. The
parts of each save are timed: what Trainer writes, flushing it to the disk, and hashing with the manifest. The
first save is not counted. The share is taken save by save; medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
import xxhash  # noqa: E402
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402

from tests.support import make_trainer, row  # noqa: E402
from vlcpt import CPTDataset, load_processor  # noqa: E402
from vlcpt.config.schema import ModelConfig  # noqa: E402
from vlcpt.demo import base_path  # noqa: E402
from vlcpt.model.tuning import apply_tuning  # noqa: E402
from vlcpt.training.checkpoints import callback, files  # noqa: E402
from vlcpt.training.checkpoints.upstream import save_now  # noqa: E402


def build(hidden: int, layers: int) -> torch.nn.Module:
    """The demo's model, wider and deeper."""
    config = Qwen2_5_VLConfig.from_pretrained(base_path())
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 4 * hidden, layers
    text.layer_types = ["full_attention"] * layers
    head = 2 * sum(text.rope_parameters["mrope_section"])
    text.num_attention_heads, text.num_key_value_heads = hidden // head, hidden // head // 2
    config.vision_config.out_hidden_size = hidden
    return Qwen2_5_VLForConditionalGeneration(config)


def main() -> None:
    """Save several times, and print the parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--saves", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    processor = load_processor(base_path())
    model = apply_tuning(build(options.hidden, options.layers), ModelConfig("base", tuning="full"))
    dataset = CPTDataset([row("a <trainable_text>b</trainable_text>")], processor, max_length=64)
    spent = {"flush": 0.0, "manifest": 0.0}
    flush, write = files.sync, callback.write_manifest

    def timed_flush(path: Path) -> None:
        began = time.monotonic()
        flush(path)
        spent["flush"] += time.monotonic() - began

    def timed_manifest(folder: Path, run: dict[str, object]) -> files.Manifest:
        # Everything is flushed before, so that what is timed here reads and hashes.
        for path in [*folder.rglob("*"), folder]:
            timed_flush(path)
        began = time.monotonic()
        found = write(folder, run)
        spent["manifest"] += time.monotonic() - began
        return found

    callback.write_manifest = timed_manifest
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as work:
        trainer = make_trainer(
            model, dataset, processor, Path(work), max_steps=1, save_strategy="no", save_total_limit=1
        )
        trainer.train()
        for number in range(options.saves + 1):
            trainer.state.global_step = number + 1
            spent |= {"flush": 0.0, "manifest": 0.0}
            began = time.monotonic()
            save_now(trainer)
            whole = time.monotonic() - began
            size = sum(files.verify(Path(work) / f"checkpoint-{number + 1}", hashes=False).files.values())
            if number:
                rows.append((size, whole, whole - sum(spent.values()), spent["flush"], spent["manifest"]))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; torch {torch.__version__}, transformers "
        f"{transformers.__version__}, xxhash {xxhash.VERSION}\n"
    )
    print("| bytes | save, s | Trainer writes, s | flush, s | hashes and manifest, s | share |")
    print("|---|---|---|---|---|---|")
    for size, whole, writes, flushes, manifest in rows:
        print(
            f"| {size / 1e6:,.0f} MB | {whole:.2f} | {writes:.2f} | {flushes:.2f} | {manifest:.3f} | "
            f"{manifest / whole:.1%} |"
        )
    without_flush = [manifest / (writes + manifest) for _, _, writes, _, manifest in rows]
    print(
        f"\nmedian share of the save {statistics.median(one[4] / one[1] for one in rows):.1%}; "
        f"with the flush left out of the save as well {statistics.median(without_flush):.1%}"
    )


if __name__ == "__main__":
    main()
